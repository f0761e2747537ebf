# SPDX-License-Identifier: Apache-2.0
"""Writes tests/laws/held.json, which METHODS.md shows.

python -m tests.laws
"""

import json
from pathlib import Path

from tests.laws import held

if __name__ == "__main__":
  text = json.dumps(held(), indent=2) + "\n"
  Path(__file__).with_name("held.json").write_text(text, encoding="utf-8")
