# SPDX-License-Identifier: Apache-2.0
"""Law: speculation changes how the text is made, never which text.

The oracles are plain decoding by full forward passes, exact enumeration of a
small vocabulary, and a replay of the drafts with a truncated model.
"""

import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from adaptivejax.core.sampling import Draw, Sampling
from adaptivejax.core.trigrams import TrigramTable
from adaptivejax.decode import FULL, generate
from adaptivejax.methods.decode import ADED, SelfSpeculation
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
    text = text[:length].tolist()
    for _ in range(STEPS):
      logits = reference.next_logits(model(), [text])[0]
      first, second = np.sort(logits)[:-3:-1]
      assert first - second > 1e-4, "no near tie, or rounding would decide"
      text.append(int(logits.argmax()))
    rows.append(text[length:])
  return np.array(rows)


def speculate(policy, **options):
  return generate(
    model(), TEXT, lengths=LENGTHS, steps=STEPS, policy=policy, **options
  )


@pytest.mark.parametrize("draft", range(7))
@pytest.mark.parametrize("exit", range(1, L))
def test_greedy_is_the_full_model_token_for_token(plain, exit, draft):
  made = speculate(SelfSpeculation(exit, draft))
  np.testing.assert_array_equal(made.tokens, plain)
  np.testing.assert_array_equal(made.count, STEPS)
  np.testing.assert_array_equal(made.steps, replay(plain, exit, draft))


def replay(plain, exit, draft):
  """Steps of each row: drafts by the truncated model, kept while they agree."""
  steps = []
  for start, length, row in zip(np.asarray(TEXT), LENGTHS, plain):
    done, count = 1, 0
    while done < STEPS:
      kept = 0
      while kept < draft and done + kept < STEPS:
        text = [*start[:length], *row[: done + kept]]
        logits = reference.next_logits(model(), [text], exit - 1)[0]
        if logits.argmax() != row[done + kept]:
          break
        kept += 1
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
    held = (want.pos[0] >= 0)[..., None]
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


def test_depth_is_the_layers_of_the_steps_in_a_row():
  made = speculate(SelfSpeculation(2, 3))
  ahead = 4 * 2 + (L - 2)
  np.testing.assert_allclose(made.depth[:, 1:].sum(1), ahead * made.steps, 1e-5)


def test_cost_is_the_work_of_all_slots():
  made = speculate(SelfSpeculation(2, 3))
  slots = int(made.steps.max()) * 3 * 4  # all rows go on until the last is done
  assert made.cost.items == made.count.sum() - 3
  per_token = made.cost.full / made.cost.items
  readouts = made.cost.spent / per_token / slots
  assert 1 < readouts < 1.2, "and the draft's readout"


def test_without_a_draft_decoding_costs_what_plain_decoding_does():
  made, plain = speculate(SelfSpeculation(2, 0)), speculate(FULL)
  np.testing.assert_array_equal(made.tokens, plain.tokens)
  np.testing.assert_array_equal(made.depth, plain.depth)
  chex.assert_trees_all_close(made.cost, plain.cost, rtol=1e-5)


def test_a_draft_of_nan_changes_nothing():
  """A token that the model never says has no embedding, but is drafted."""
  m, text = model(), TEXT[:1]
  plain = generate(m, text, steps=8)
  said = {*text[0].tolist(), *plain.tokens[0].tolist()}
  never = next(t for t in range(13) if t not in said)
  m = jax.tree.map(lambda a: a, m)  # a copy
  m.embedding.set_value(m.embedding.get_value().at[never].set(jnp.nan))
  pairs = itertools.product(range(13), repeat=2)
  table = TrigramTable.build([[a, b, never] for a, b in pairs])
  made = generate(m, text, steps=8, policy=ADED(table))
  np.testing.assert_array_equal(made.tokens, plain.tokens)


@pytest.mark.parametrize(
  ("call", "words"),
  [
    (lambda: speculate(SelfSpeculation(0, 2)), "exit=0 .* 1..3"),
    (lambda: speculate(SelfSpeculation(L, 2)), f"exit={L} .* 1..3"),
    (lambda: speculate(SelfSpeculation(1, -1)), "draft=-1"),
    (lambda: speculate(SelfSpeculation(1, 9), capacity=14), "step of up to 10"),
  ],
)
def test_bad_input_is_refused_in_words(call, words):
  with pytest.raises(ValueError, match=words):
    call()
