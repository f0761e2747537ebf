# SPDX-License-Identifier: Apache-2.0
"""Law: ADED writes the text of plain decoding, in the steps of its paper.

The oracle of the text is the engine's plain decoding (tested by full forward
passes); that of the steps is a dictionary that learns from the text.
"""

import collections
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from adaptivejax.core.sampling import Draw, Sampling
from adaptivejax.core.trigrams import TrigramTable
from adaptivejax.decode import Ended, generate
from adaptivejax.methods.decode import ADED
from tests.methods.host import CONFIG, TOKENS, B, model

V, STEPS = CONFIG.vocab, 40
LENGTHS, LIMITS = np.array([5, 1, 10]), np.array([STEPS, STEPS - 3, STEPS])
ALL, KEY = np.arange(B), jax.random.key(3)
SETTINGS = {
  "greedy": {},
  "sampled": {"temperature": 1.0, "key": KEY},
  "cut": {"temperature": 0.6, "top_k": 4, "top_p": 0.9, "key": KEY},
}


def run(rows=ALL, **options):
  options = {"limits": LIMITS[rows], "steps": STEPS, **options}
  lengths = jnp.asarray(LENGTHS[rows])
  return generate(model(), TOKENS[rows], lengths=lengths, **options)


@functools.cache
def plain(setting):
  return run(**SETTINGS[setting])


def policy(texts, **settings):
  return ADED(TrigramTable.build(texts), **{"nodes": 8, "depth": 3, **settings})


def whole(tokens):
  """Prompts and what follows."""
  return [np.r_[TOKENS[b, : LENGTHS[b]], tokens[b]] for b in range(B)]


@functools.cache
def table(kind):
  """Of the texts to come: the best of all tables.  Or of other tokens."""
  texts = [text for name in SETTINGS for text in whole(plain(name).tokens)]
  return policy([(text + (kind == "wrong")) % V for text in texts])


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("kind", ["right", "wrong"])
def test_text_is_that_of_plain_decoding(kind, setting):
  """Token for token, for rows of many lengths, whatever the table holds."""
  want, options = plain(setting), SETTINGS[setting]
  got = run(policy=table(kind), **options)
  np.testing.assert_array_equal(got.tokens, want.tokens)
  np.testing.assert_array_equal(got.count, LIMITS)
  assert (got.ended == Ended.LENGTH).all()
  if kind == "right":
    assert got.tokens_per_step > 1.5
  # a stop token that comes in the middle of a step ends the row there
  stop = int(want.tokens[0, 17])
  want = run(stop=stop, **options)
  got = run(policy=table(kind), stop=stop, **options)
  np.testing.assert_array_equal(got.tokens, want.tokens)
  np.testing.assert_array_equal(got.ended, want.ended)


def steps_by_dictionary(text, start, limit, window, rate, depth):
  """Steps of a row whose tree holds all that its own table knows."""
  known, done, steps = collections.Counter(), start + 1, 0
  while done < start + limit:
    recent = text[max(done - window, 0) : done]
    for trigram in zip(recent, recent[1:], recent[2:]):
      known[trigram] += rate
    kept = 0
    while kept < depth and known[tuple(text[done + kept - 2 :][:3])] > 0:
      kept += 1
    done, steps = done + kept + 1, steps + 1
  return steps


@pytest.mark.parametrize("rate", [0.04, 0.0])
def test_steps_are_those_of_a_dictionary_that_learns(rate):
  """The less the more it has seen; at no rate, one token each."""
  learner = policy([], nodes=64, window=6, rate=jnp.float32(rate))
  got, want = run(policy=learner), plain("greedy")
  np.testing.assert_array_equal(got.tokens, want.tokens)
  expected = [
    steps_by_dictionary(text.tolist(), length, limit, 6, rate, 3)
    for text, length, limit in zip(whole(want.tokens), LENGTHS, LIMITS)
  ]
  np.testing.assert_array_equal(got.steps, expected)
  assert (got.steps == LIMITS - 1).all() == (rate == 0)


def test_text_that_repeats_itself_comes_ever_faster():
  learner = policy([], nodes=64, window=6, rate=jnp.float32(0.04))
  half = run(policy=learner, limits=np.full(B, STEPS // 2)).steps
  rest = run(policy=learner, limits=np.full(B, STEPS)).steps - half
  assert (rest < half).all()


def test_it_starts_from_the_last_tokens_of_a_prompt():
  lengths = jnp.asarray(LENGTHS)
  memory, _ = policy([], window=6).start(
    model(), TOKENS, lengths, 30, jnp.zeros((B, V))
  )
  for window, text, length in zip(memory.window, TOKENS, LENGTHS):
    want = [-1] * 5 + text[:length].tolist()
    assert window.tolist() == want[-5:]


def test_the_cache_after_a_step_is_that_of_reading_the_text():
  m, adaptive, slots = model(), table("right"), 30
  lengths, last = jnp.asarray(LENGTHS), plain("greedy").tokens[:, 0]

  @jax.jit
  def read(tokens, lengths):
    return m(tokens, m.empty_cache(B, slots), lengths=lengths).cache

  @jax.jit
  def step(cache):
    memory, _ = adaptive.start(m, TOKENS, lengths, slots, jnp.zeros((B, 13)))
    draw = Draw(Sampling.of(), jax.random.split(jax.random.key(0), B))
    live = jnp.array([True, True, False])
    return adaptive.step(m, last, cache, memory, draw, live)

  before = read(TOKENS, lengths)
  out = step(before)
  count = np.asarray(out.count)
  assert count[2] == 0 and count[:2].min() > 1
  assert (out.depth == CONFIG.layers).all()
  for got, that in zip(out.cache[:4], before[:4]):  # a row that has ended
    np.testing.assert_array_equal(got[2], that[2])
  text = np.zeros((B, slots), np.int32)
  for b in range(B):
    now = np.r_[TOKENS[b, : LENGTHS[b]], last[b], out.tokens[b]]
    text[b, : len(now)] = now
  want = read(jnp.asarray(text), jnp.asarray(LENGTHS + count))
  np.testing.assert_array_equal(out.cache.length, want.length)
  np.testing.assert_array_equal(out.cache.pos, want.pos)
  held = (want.pos >= 0)[..., None]
  for got, that in ((out.cache.k, want.k), (out.cache.v, want.v)):
    got = jnp.where(held, got, 0)
    np.testing.assert_allclose(got, that, rtol=1e-4, atol=1e-5)


def test_a_row_is_decoded_the_same_alone():
  """Text and steps: what one row learns, no other knows."""
  learner = table("wrong")
  together = run(policy=learner)
  for b in range(B):
    alone = run(np.array([b]), policy=learner)
    np.testing.assert_array_equal(alone.tokens[0], together.tokens[b])
    np.testing.assert_array_equal(alone.steps[0], together.steps[b])


def test_a_full_cache_ends_the_row_in_time():
  capacity = 10 + 8 + 9
  got = run(policy=table("right"), capacity=capacity)
  want = np.asarray(plain("greedy").tokens)
  full = np.asarray(got.ended) == Ended.FULL
  assert full.any()
  for b in range(B):
    n = int(got.count[b])
    np.testing.assert_array_equal(got.tokens[b, :n], want[b, :n])
    # all that a step may write fitted when it began
    assert not full[b] or LENGTHS[b] + n - 1 + 8 > capacity


BAD = {
  "depth of nothing": ({"depth": 0}, r"depth=0 must lie in 1\.\.7"),
  "deeper than nodes": ({"nodes": 3}, r"depth=3.*1\.\.2, of self.nodes=3"),
  "no tri-gram": ({"window": 2}, r"window=2 must lie in 3\.\.258"),
  "no room": ({"size": 13}, r"window=16.*3\.\.15.*self.size=13"),
  "tokens of another model": ({"texts": [[1, 2, V]]}, "token 13, but.* at 12"),
}


@pytest.mark.parametrize("settings, words", BAD.values(), ids=BAD)
def test_refused(settings, words):
  texts = settings.get("texts", [])
  settings = {k: v for k, v in settings.items() if k != "texts"}
  with pytest.raises(ValueError, match=words):
    run(policy=policy(texts, **settings))
