# SPDX-License-Identifier: Apache-2.0
"""Law: speculation changes how the text is made, never which text.

The oracles are plain decoding by full forward passes, exact enumeration of a
small vocabulary, and a replay of the drafts with a truncated model.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from adaptivejax.core.sampling import Draw, Sampling
from adaptivejax.decode import generate
from adaptivejax.methods.decode import SelfSpeculation
from adaptivejax.models import DecoderConfig, DecoderLM
from tests import reference
from tests.methods.host import CONFIG, PROMPT, TOKENS, model, shaken

L, STEPS = CONFIG.layers, 12
LENGTHS = jnp.array([PROMPT, 1, 3])
TEXT = TOKENS[:, :PROMPT]


@pytest.fixture(scope="module")
def plain():
  """Greedy texts by full forward passes, row by row."""
  rows = []
  for text, length in zip(np.asarray(TEXT), LENGTHS):
    text = jnp.asarray(text[:length])[None]
    for _ in range(STEPS):
      logits = reference.decoder(model(), text)[:, -1]
      first, second = np.sort(logits[0])[:-3:-1]
      assert first - second > 1e-4, "no near tie, or rounding would decide"
      text = jnp.concatenate([text, logits.argmax(-1)[:, None]], 1)
    rows.append(text[0, length:])
  return jnp.stack(rows)


def speculate(policy, **options):
  return generate(
    model(), TEXT, lengths=LENGTHS, steps=STEPS, policy=policy, **options
  )


@pytest.mark.parametrize("draft", range(1, 7))
@pytest.mark.parametrize("exit", range(1, L))
def test_greedy_is_the_full_model_token_for_token(plain, exit, draft):
  made = speculate(SelfSpeculation(exit, draft))
  np.testing.assert_array_equal(made.tokens, plain)
  np.testing.assert_array_equal(made.count, STEPS)
  np.testing.assert_array_equal(made.steps, replay(plain, exit, draft))


def replay(plain, exit, draft):
  """Steps of each row: drafts by the truncated model, kept while they agree."""
  steps = []
  for start, length, row in zip(np.asarray(TEXT), LENGTHS, np.asarray(plain)):
    done, count = 1, 0
    while done < STEPS:
      text = jnp.asarray(np.concatenate([start[:length], row[:done]]))[None]
      kept = 0
      while kept < draft and done + kept < STEPS:
        hidden = reference.hidden(model(), text)[exit - 1]
        guess = reference.readout(model(), hidden[:, -1]).argmax(-1)
        if guess[0] != row[done + kept]:
          break
        kept, text = kept + 1, jnp.concatenate([text, guess[:, None]], 1)
      done, count = done + kept + 1, count + 1
    steps.append(count)
  return steps


def test_the_cache_after_a_step_is_that_of_reading_the_text():
  m, policy = model(), SelfSpeculation(2, 4)
  cache = m(TEXT, m.empty_cache(3, 20), lengths=LENGTHS).cache
  draw = Draw(Sampling.of(), jax.random.split(jax.random.key(0), 3))
  last, live = jnp.array([1, 2, 3], jnp.int32), jnp.array([True, True, False])
  out = jax.jit(policy.step)(m, last, cache, None, draw, live)
  count = np.asarray(out.count)
  assert count[2] == 0 and count[:2].min() >= 1
  np.testing.assert_array_equal(out.cache.length, LENGTHS + count)
  for b in range(2):
    text = [
      TEXT[b, : LENGTHS[b]],
      last[b : b + 1],
      out.tokens[b, : count[b] - 1],
    ]
    text = jnp.concatenate(text)[None]
    want = m(text, m.empty_cache(1, 20)).cache
    np.testing.assert_array_equal(out.cache.pos[b], want.pos[0])
    held = (want.pos[0] >= 0)[:, None, :, None]
    for got, that in ((out.cache.k, want.k), (out.cache.v, want.v)):
      np.testing.assert_allclose(
        jnp.where(held, got[b], 0), that[0], rtol=1e-4, atol=1e-5
      )


def test_sampled_text_has_the_distribution_of_the_model():
  """Total variation over all texts of three tokens from a vocabulary of 4."""
  config = DecoderConfig(
    vocab=4, layers=3, features=8, hidden=16, heads=2, kv_heads=1
  )
  small = shaken(DecoderLM(config, rngs=nnx.Rngs(3)), 3)
  rows, heat = 20_000, 0.8
  prompt = jnp.array([[1, 3]])
  texts = np.array(list(itertools.product(range(4), repeat=3)))
  whole = jnp.concatenate([jnp.tile(prompt, (64, 1)), texts], 1)
  odds = jax.nn.log_softmax(reference.decoder(small, whole)[:, 1:-1] / heat)
  odds = np.exp(np.take_along_axis(odds, texts[..., None], -1).sum((1, 2)))
  made = generate(
    small,
    jnp.tile(prompt, (rows, 1)),
    steps=3,
    policy=SelfSpeculation(1, 2),
    temperature=heat,
    key=jax.random.key(0),
    rungs=(rows,),
  )
  seen = np.bincount(made.tokens @ np.array([16, 4, 1]), minlength=64) / rows
  noise = 0.5 * np.sqrt(2 / np.pi * odds * (1 - odds) / rows).sum()
  assert made.tokens_per_step > 1.2, "drafts were kept"
  assert 0.5 * np.abs(seen - odds).sum() < 2 * noise


def test_a_row_does_not_know_its_neighbours():
  key = jax.random.key(1)
  options = {
    "steps": STEPS,
    "policy": SelfSpeculation(2, 3),
    "temperature": 1.0,
  }
  whole = generate(model(), TEXT, lengths=LENGTHS, key=key, **options)
  alone = generate(model(), TEXT[:1], key=key, **options)
  np.testing.assert_array_equal(whole.tokens[:1], alone.tokens)
  np.testing.assert_array_equal(whole.steps[:1], alone.steps)


def test_depth_and_cost_are_those_of_the_steps():
  made = speculate(SelfSpeculation(2, 3))
  ahead = 4 * 2 + (L - 2)  # layers one after the other in a step
  np.testing.assert_allclose(made.depth[:, 1:].sum(1), ahead * made.steps, 1e-5)
  slots = int(made.steps.max()) * 3 * 4  # all rows go on until the last is done
  assert made.cost.items == made.count.sum() - 3
  full = speculate(SelfSpeculation(3, 3)).cost.full  # of the same text
  np.testing.assert_allclose(made.cost.full, full, rtol=1e-6)
  per_slot = made.cost.full / made.cost.items
  readouts = made.cost.spent / per_slot / slots
  assert 1 < readouts < 1.2, "the work of all slots, and the draft's readout"


@pytest.mark.parametrize(
  ("call", "words"),
  [
    (lambda: speculate(SelfSpeculation(0, 2)), "exit=0 .* 1..3"),
    (lambda: speculate(SelfSpeculation(L, 2)), f"exit={L} .* 1..3"),
    (lambda: speculate(SelfSpeculation(1, 0)), "draft=0"),
    (lambda: speculate(SelfSpeculation(1, 9), capacity=14), "step of up to 10"),
  ],
)
def test_bad_input_is_refused_in_words(call, words):
  with pytest.raises(ValueError, match=words):
    call()
