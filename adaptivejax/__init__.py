# SPDX-License-Identifier: Apache-2.0
"""Adaptive computation for JAX: spend compute only where it is worth it.

    import adaptivejax as aj

    y, cost = aj.bucketed(f, x, mask, weights)   # f on the selected rows only

`aj.core` holds the primitives (those of `PRIMITIVES` are also at the top),
`aj.nn` modules, `aj.methods` one file per paper, `aj.models` host models,
`aj.training`, `aj.decode` and `aj.report` what to do with them; `aj.load` and
`aj.save` read and write pretrained ones.  Everything is imported on first use.
"""

import importlib
from typing import Any

__version__ = "0.1.0"

PACKAGES = ("adapt", "core", "decode", "io", "linen", "methods", "models", "nn")
PACKAGES += ("report", "surgery", "training")
FILES = ("load", "save")
PRIMITIVES = ("Cost", "bucketed", "compact", "depth_loop", "depth_scan")
PRIMITIVES += ("level_apply", "masked", "worst_case")
__all__ = [*FILES, *PACKAGES, *PRIMITIVES]


def __getattr__(name: str) -> Any:
  if name in PACKAGES:
    return importlib.import_module(f"adaptivejax.{name}")
  if name in PRIMITIVES:
    return getattr(importlib.import_module("adaptivejax.core"), name)
  if name in FILES:
    return getattr(importlib.import_module("adaptivejax.io"), name)
  raise AttributeError(f"module 'adaptivejax' has no attribute {name!r}")


def __dir__() -> list[str]:
  return sorted(__all__)
