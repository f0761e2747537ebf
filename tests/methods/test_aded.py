# SPDX-License-Identifier: Apache-2.0
"""Law: ADED writes the text of plain decoding, in fewer steps."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from adaptivejax.core.trigrams import TrigramTable
from adaptivejax.decode import Ended, generate
from adaptivejax.methods.decode import ADED
from tests.methods.host import CONFIG, TOKENS, B, model

V, STEPS = CONFIG.vocab, 24
LENGTHS = jnp.asarray([5, 1, 10])
WRONG = np.random.default_rng(1).integers(0, V, 3000)
SETTINGS = {
  "greedy": {},
  "sampled": {"temperature": 1.0, "key": jax.random.key(3)},
  "cut": {
    "temperature": 0.8,
    "top_k": 4,
    "top_p": 0.9,
    "key": jax.random.key(4),
  },
}


def plain(setting):
  return generate(
    model(), TOKENS, lengths=LENGTHS, steps=STEPS, **SETTINGS[setting]
  )


def policy(texts, **settings):
  return ADED(TrigramTable.build(texts), **{"nodes": 8, "depth": 3, **settings})


def own_text(setting):
  """What plain decoding writes, with its prompts: the best of all tables."""
  tokens = np.asarray(plain(setting).tokens)
  return [
    np.concatenate([TOKENS[b, : LENGTHS[b]], tokens[b]]) for b in range(B)
  ]


TABLES = {
  "empty": lambda setting: [],
  "wrong": lambda setting: [WRONG],
  "right": own_text,
}


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("table", TABLES)
def test_text_is_that_of_plain_decoding(table, setting):
  """Token for token, for rows of many lengths and any table."""
  want = plain(setting)
  got = generate(
    model(),
    TOKENS,
    lengths=LENGTHS,
    steps=STEPS,
    policy=policy(TABLES[table](setting)),
    **SETTINGS[setting],
  )
  np.testing.assert_array_equal(got.tokens, want.tokens)
  np.testing.assert_array_equal(got.count, want.count)
  assert (got.ended == Ended.LENGTH).all()
  if table == "right":
    assert (got.steps < want.steps).all()
    assert got.tokens_per_step > 1.5


def test_every_row_is_as_alone():
  """Text, steps and all: what one row learns, no other knows."""
  adaptive = policy([WRONG], rate=0.2)
  run = lambda rows: generate(
    model(),
    TOKENS[rows],
    lengths=LENGTHS[rows],
    steps=STEPS,
    policy=adaptive,
  )
  both = run(jnp.arange(B))
  for b in range(B):
    alone = run(jnp.asarray([b]))
    np.testing.assert_array_equal(alone.tokens[0], both.tokens[b])
    np.testing.assert_array_equal(alone.steps[0], both.steps[b])
