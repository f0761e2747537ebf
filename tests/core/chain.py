# SPDX-License-Identifier: Apache-2.0
"""A language of four tokens, whose texts can be enumerated.

The next token depends on the last one only: `P[last, next]`.  A step of some
decoder is `(last, at) -> (tokens, count)` for a batch of rows.
"""

import itertools

import jax
import numpy as np

V = 4
P = np.array(
  [[0.5, 0.1, 0.4, 0], [0.05, 0.15, 0.2, 0.6], [0, 0, 0.3, 0.7], [0.25] * 4],
  np.float32,
)
"""The target; row 2 has one token it never follows with, row 0 another."""

Q = np.array(
  [[0.1, 0.5, 0.2, 0.2], [0.4, 0.3, 0, 0.3], [0.7, 0.1, 0.1, 0.1], [0.25] * 4],
  np.float32,
)
"""A draft model: wrong everywhere but after token 3."""


def log(p):
  with np.errstate(divide="ignore"):
    return np.log(p)


def write(step, rows, length):
  """Texts of `length` tokens, after token 0: `i32[rows, length]`."""
  text = np.zeros((rows, length + 16), np.int32)
  last, n = np.zeros(rows, np.int32), np.zeros(rows, np.int32)
  step, row = jax.jit(step), np.arange(rows)
  while n.min() < length:
    tokens, count = map(np.asarray, step(last, n))
    assert count.min() >= 1
    for i in range(tokens.shape[1]):
      now = (i < count) & (n + i < length)
      text[row[now], (n + i)[now]] = tokens[now, i]
    last, n = tokens[row, count - 1], n + count
  return text[:, :length]


def exact(length, p=P):
  """The probability of every text of `length` tokens."""
  joint = {}
  for text in itertools.product(range(V), repeat=length):
    steps = zip((0, *text), text)
    joint[text] = np.prod([p[a, b] for a, b in steps], dtype=np.float64)
  return joint


def agree(texts, p=P):
  """The texts are draws from `p`: total variation is that of chance."""
  n, joint = len(texts), exact(texts.shape[1], p)
  seen = dict.fromkeys(joint, 0)
  for text in map(tuple, texts.tolist()):
    seen[text] += 1
  distance = 0.5 * sum(abs(seen[t] / n - joint[t]) for t in joint)
  chance = sum(np.sqrt(w * (1 - w) / (2 * np.pi * n)) for w in joint.values())
  assert distance < chance + 4 * 0.5 / np.sqrt(n), (distance, chance)
  assert not any(seen[t] for t in joint if joint[t] == 0)
