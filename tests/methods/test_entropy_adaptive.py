# SPDX-License-Identifier: Apache-2.0
"""Law: the rule decides who speaks, and each speaks as if it had read all.

The oracle replays it in Python: both models by full forward passes, entropies
by scipy, the rule by hand.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from scipy.special import softmax
from scipy.stats import entropy

from adaptivejax.core.sampling import Draw, Sampling
from adaptivejax.decode import engine, generate
from adaptivejax.methods.decode import EntropyAdaptive
from adaptivejax.methods.kv import H2O
from adaptivejax.models import DecoderConfig, DecoderLM
from adaptivejax.nn import with_look
from tests import reference
from tests.decode.test_engine import inside_loops
from tests.methods.host import CONFIG, PROMPT, TOKENS, B, model, shaken

STEPS, LENGTHS = 16, jnp.array([PROMPT, 1, 3])
TEXT = TOKENS[:, :PROMPT]


@functools.cache
def small():
  config = DecoderConfig(
    vocab=13, layers=1, features=16, hidden=16, heads=2, kv_heads=2
  )
  return shaken(DecoderLM(config, rngs=nnx.Rngs(5)), 5)


def policy(threshold, **settings):
  settings = {"dwell": 2, "window": 3, "chunks": (1, 4)} | settings
  return EntropyAdaptive(model(), jnp.float32(threshold), **settings)


def speak(policy, **options):
  options = {"steps": STEPS, "lengths": LENGTHS} | options
  return generate(small(), TEXT, policy=policy, **options)


def replay(text, threshold, dwell, window, signal):
  """`(tokens, large: bool per token)` of one row."""
  text, said, spoke = list(text), [], []
  say = lambda which: np.asarray(reference.next_logits(which, [text])[0])
  heat = lambda logits: entropy(softmax(logits.astype(np.float64)))
  large, since, ring = heat(say(small())) > threshold, 0, []
  for n in range(STEPS):
    logits = say(model() if large else small())
    first, second = np.sort(logits)[:-3:-1]
    assert first - second > 1e-4, "no near tie, or rounding would decide"
    spoke.append(bool(large))
    own = signal == "small"
    ring.append(heat(say(small()) if own else logits))
    text.append(int(logits.argmax()))
    said.append(text[-1])
    wanted = np.mean(ring[-window:]) > threshold
    assert abs(np.mean(ring[-window:]) - threshold) > 1e-5
    since += n > 0
    if n == 0 or since >= dwell:
      since = 0 if wanted != large else since
      large = wanted
  return said, spoke


@pytest.mark.parametrize(
  ("threshold", "settings"),
  [
    (2.1, {}),
    (2.0, {"dwell": 1, "window": 1}),
    (2.0, {"dwell": 4, "signal": "small"}),
    (2.1, {"chunks": (1,)}),
  ],
)
def test_tokens_and_speakers_equal_the_replay(threshold, settings):
  rule = policy(threshold, **settings)
  made = speak(rule)
  depth = np.asarray(made.depth[:, 1:])
  spoke = depth > 1
  assert set(np.unique(depth)) == {1, 1 + CONFIG.layers}, "both speak"
  for b, length in enumerate(LENGTHS):
    tokens, large = replay(
      TEXT[b, :length].tolist(),
      threshold,
      rule.dwell,
      rule.window,
      rule.signal,
    )
    np.testing.assert_array_equal(made.tokens[b], tokens)
    np.testing.assert_array_equal(spoke[b], large[1:])


def test_the_ends_are_the_two_models():
  never, always = speak(policy(np.inf)), speak(policy(-np.inf))
  options = {"lengths": LENGTHS, "steps": STEPS}
  own = generate(small(), TEXT, **options)
  np.testing.assert_array_equal(never.tokens, own.tokens)
  theirs = generate(model(), TEXT, **options)
  np.testing.assert_array_equal(always.tokens, theirs.tokens)
  np.testing.assert_array_equal(never.depth[:, 1:], 1)
  np.testing.assert_array_equal(always.depth[:, 1:], 1 + CONFIG.layers)
  assert never.cost.spent < own.cost.spent * 1.01
  np.testing.assert_allclose(never.cost.full, always.cost.full)


def test_sampled_ends_draw_what_the_models_draw():
  heat = {"temperature": 1.0, "key": jax.random.key(0)}
  options = {"lengths": LENGTHS, "steps": STEPS} | heat
  np.testing.assert_array_equal(
    speak(policy(-np.inf), **heat).tokens,
    generate(model(), TEXT, **options).tokens,
  )


def test_after_a_change_the_cache_is_that_of_reading_everything():
  rule = policy(0.0, dwell=0)
  m = small()
  cache = m(TEXT, m.empty_cache(B, 20), lengths=LENGTHS).cache
  memory, _ = rule.start(m, TEXT, LENGTHS, 20, jnp.zeros((B, 13)))
  memory = memory._replace(large=jnp.zeros(B, bool))
  draw = Draw(Sampling.of(), jax.random.split(jax.random.key(0), B))
  step = jax.jit(type(rule).step)
  text, last = [list(t[:n]) for t, n in zip(TEXT, LENGTHS)], jnp.arange(B)
  live = jnp.ones(B, bool)
  for n in range(6):
    here = policy(np.inf if n < 4 else -np.inf, dwell=0)
    out = step(here, m, last, cache, memory, draw, live)
    for b in range(B):
      text[b].append(int(last[b]))
    cache, memory, last = out.cache, out.memory, out.tokens[:, 0]
  assert memory.large.all()
  for b in range(B):
    whole = jnp.array([text[b]])
    want = model()(whole, model().empty_cache(1, 20)).cache
    got = jax.tree.map(lambda a, b=b: a[b : b + 1], memory.cache)
    np.testing.assert_array_equal(got.length, want.length)
    np.testing.assert_array_equal(got.pos, want.pos)
    np.testing.assert_allclose(got.k, want.k, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(got.v, want.v, rtol=1e-4, atol=1e-5)


def test_a_lower_threshold_asks_the_large_model_more():
  used = [speak(policy(t)).mean_depth for t in (0.5, 2.0, 2.1, 2.2, 3.0)]
  assert used == sorted(used, reverse=True) and used[0] > used[-1]


def test_the_loop_copies_no_cache():
  text = engine._generate.lower(
    small(),
    TEXT,
    LENGTHS,
    jnp.full(B, 40),
    policy(2.0),
    Sampling.of(),
    jax.random.key(0),
    jnp.int32(-1),
    steps=40,
    slots=51,
    rungs=(B,),
  )
  inside = inside_loops(text.compile().as_text())
  assert "f32[3,4,1,51,8]" in inside
  assert "copy(" not in "".join(
    line for line in inside.split("\n") if "= f32[3,4,1,51,8]" in line
  )


@pytest.mark.parametrize(
  ("bad", "words"),
  [
    (lambda: policy(np.nan), "nan"),
    (lambda: policy(1.0, window=0), "window=0"),
    (lambda: policy(1.0, chunks=(4, 1)), "chunks"),
    (lambda: policy(1.0, chunks=()), "chunks"),
    (lambda: policy(1.0, signal="smal"), "signal"),
    (
      lambda: EntropyAdaptive(
        DecoderLM(DecoderConfig(vocab=5, layers=1), rngs=nnx.Rngs(0)), 1.0
      ),
      "vocabulary",
    ),
    (
      lambda: EntropyAdaptive(with_look(model(), H2O(2, 2)), 1.0),
      "H2O looks otherwise",
    ),
  ],
)
def test_bad_input_is_refused_in_words(bad, words):
  with pytest.raises(ValueError, match=words):
    speak(bad())
