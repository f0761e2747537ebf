# SPDX-License-Identifier: Apache-2.0
"""A pretrained model made adaptive in many ways, and what each is worth."""

from adaptivejax.adapt.bench import Bench
from adaptivejax.adapt.config import AdaptConfig, load_config
from adaptivejax.adapt.measure import Trial, measure
from adaptivejax.adapt.recipes import RECIPES
from adaptivejax.adapt.run import adapt
from adaptivejax.adapt.text import Text, read_text

__all__ = [
  "AdaptConfig",
  "Bench",
  "RECIPES",
  "Text",
  "Trial",
  "adapt",
  "load_config",
  "measure",
  "read_text",
]
