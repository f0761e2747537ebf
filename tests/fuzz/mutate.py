# SPDX-License-Identifier: Apache-2.0
"""Mutations of JSON that are still JSON: a fuzzer of bytes makes few."""

import json
import random
from typing import Any

NASTY = [
  None, True, False, 0, 1, -1, 2**31, 2**63, -(2**63), 10**40, 0.5, -0.0,
  1e-300, 1e300, float("nan"), float("inf"), "", "\0", "</script><script>",
  "\ud800", "../../etc/passwd", "$x_{$", "a" * 5000, [], {}, [[]], [None],
  {"": None}, [0] * 100, "\u202e", "%s{0}", "NaN",
]  # fmt: skip


def mutated(data: bytes, size: int, seed: int) -> bytes | None:
  """Another JSON text of at most `size` bytes; None where `data` is none."""
  rng = random.Random(seed)
  try:
    tree = json.loads(data)
  except (ValueError, RecursionError):
    return None
  for _ in range(rng.choice([1, 1, 2, 4])):
    tree = _changed(tree, rng)
  text = json.dumps(tree, ensure_ascii=rng.random() < 0.7)
  return text.encode("utf-8", "surrogatepass")[:size]


def _changed(tree: Any, rng: random.Random) -> Any:
  places = list(_places(tree))
  if not places or rng.random() < 0.02:
    return rng.choice(NASTY)
  parent, key = rng.choice(places)
  way = rng.randrange(7)
  if way == 0:
    del parent[key]
  elif way == 1 and isinstance(parent, dict):
    parent[str(rng.choice([*parent, "x", ""]))] = parent[key]
  elif way == 1:
    parent.insert(key, parent[key])
  elif way == 2:
    other, at = rng.choice(places)
    parent[key] = json.loads(json.dumps(other[at]))
  elif way == 3 and isinstance(parent[key], int | float):
    parent[key] = parent[key] * rng.choice([-1, 2, 10**6, 0.5]) + 1
  elif way == 4 and isinstance(parent[key], str):
    at = rng.randrange(len(parent[key]) + 1)
    nasty = str(rng.choice(NASTY))[:50]
    parent[key] = parent[key][:at] + nasty + parent[key][at:]
  elif way == 5 and isinstance(parent[key], list):
    parent[key] = parent[key] * rng.choice([0, 2, 5])
  else:
    parent[key] = json.loads(json.dumps(rng.choice(NASTY)))
  return tree


def _places(tree: Any):
  """`(parent, key)` of everything inside."""
  if not isinstance(tree, dict | list):
    return
  for key in list(tree) if isinstance(tree, dict) else range(len(tree)):
    yield tree, key
    if isinstance(tree[key], dict | list):
      yield from _places(tree[key])
