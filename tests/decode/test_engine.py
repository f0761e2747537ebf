# SPDX-License-Identifier: Apache-2.0
"""Law: decoding step by step says what one full forward pass says."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from adaptivejax.core.sampling import Sampling
from adaptivejax.decode import (
  FULL,
  POLICIES,
  Ended,
  engine,
  generate,
  make_policy,
  score,
)
from adaptivejax.methods.decode import SelfSpeculation
from adaptivejax.models import DecoderConfig, DecoderLM
from adaptivejax.nn.linear import linear
from tests import reference

V, P, STEPS = 13, 4, 5
CONFIG = DecoderConfig(
  vocab=V, layers=3, features=16, hidden=32, heads=2, kv_heads=1
)
MODEL = DecoderLM(CONFIG, rngs=nnx.Rngs(0))
CONTROLLER = linear(CONFIG.features, 3, rngs=nnx.Rngs(1))
TEXT = jax.random.randint(jax.random.key(0), (3, P + STEPS), 0, V)


def test_greedy_is_repeated_full_forward():
  made = generate(MODEL, TEXT[:, :P], steps=STEPS)
  text = TEXT[:, :P]
  for _ in range(STEPS):
    best = reference.next_logits(MODEL, text).argmax(-1)
    text = jnp.concatenate([text, best[:, None]], 1)
  np.testing.assert_array_equal(made.tokens, text[:, P:])
  np.testing.assert_array_equal(made.depth, CONFIG.layers)
  np.testing.assert_allclose(made.cost.share, 1)


@pytest.mark.parametrize("prompt", [1, P])
def test_score_is_the_parallel_loss(prompt):
  out = score(MODEL, TEXT, prompt=prompt)
  odds = jax.nn.log_softmax(reference.decoder(MODEL, TEXT[:, :-1]))
  nats = -jnp.take_along_axis(odds, TEXT[:, 1:, None], -1)[..., 0]
  np.testing.assert_allclose(
    out.nats, nats[:, prompt - 1 :], rtol=1e-4, atol=1e-5
  )
  assert out.shares.shape == (P + STEPS - prompt, CONFIG.layers)


def test_sampling_follows_the_model():
  prompt = jnp.tile(TEXT[:1, :P], (4000, 1))
  made = generate(
    MODEL, prompt, steps=1, temperature=0.7, key=jax.random.key(1)
  )
  odds = jax.nn.softmax(reference.decoder(MODEL, TEXT[:1, :P])[0, -1] / 0.7)
  seen = np.bincount(np.asarray(made.tokens[:, 0]), minlength=V) / 4000
  assert 0.5 * np.abs(seen - odds).sum() < 0.05, "total variation"


def test_sampling_is_a_function_of_the_key():
  draw = lambda seed: (
    generate(
      MODEL, TEXT[:, :P], steps=STEPS, temperature=1.0, key=jax.random.key(seed)
    ).tokens
  )
  np.testing.assert_array_equal(draw(0), draw(0))
  assert (draw(0) != draw(1)).any()


LENGTHS = jnp.array([P, 1, 2])
RAGGED = {"lengths": LENGTHS, "steps": 9}
HEAT = {"temperature": 1.0, "key": jax.random.key(3)}


@pytest.mark.parametrize("how", [{}, HEAT], ids=["greedy", "sampled"])
def test_a_row_is_what_it_is_alone(how):
  """Padding, neighbours and their lengths change nothing."""
  made = generate(MODEL, TEXT[:, :P], **RAGGED, **how)
  alone = generate(MODEL, TEXT[:1, :P], steps=9, **how)
  np.testing.assert_array_equal(made.tokens[:1], alone.tokens)
  if not how:
    for b in (1, 2):
      text = TEXT[b : b + 1, : LENGTHS[b]]
      alone = generate(MODEL, text, steps=9)
      np.testing.assert_array_equal(made.tokens[b : b + 1], alone.tokens)


@pytest.mark.parametrize("rungs", [(3,), (3, 2), (3, 2, 1), (3, 1)])
def test_rows_end_where_they_please_on_any_ladder(rungs):
  whole = generate(MODEL, TEXT[:, :P], **RAGGED, **HEAT)
  limits = jnp.array([2, 9, 5])
  made = generate(
    MODEL, TEXT[:, :P], **RAGGED, **HEAT, limits=limits, rungs=rungs
  )
  inside = np.arange(9) < np.asarray(limits)[:, None]
  np.testing.assert_array_equal(made.tokens, np.where(inside, whole.tokens, 0))
  np.testing.assert_array_equal(made.count, limits)
  np.testing.assert_array_equal(made.steps, limits - 1)
  np.testing.assert_array_equal(made.ended, Ended.LENGTH)
  assert made.mean_depth == CONFIG.layers and made.tokens_per_step == 1
  # a loop leaves its rung as soon as the next holds the rows that are left
  slots = {(3,): 24, (3, 2): 3 + 14, (3, 2, 1): 3 + 6 + 4, (3, 1): 12 + 4}
  per_slot = whole.cost.spent / 24
  np.testing.assert_allclose(made.cost.spent / per_slot, slots[rungs], 1e-5)


def test_a_stop_token_ends_its_row():
  whole = generate(MODEL, TEXT[:, :P], **RAGGED, **HEAT)
  stop = int(whole.tokens[1, 3])
  made = generate(MODEL, TEXT[:, :P], **RAGGED, **HEAT, stop=stop)
  for b, row in enumerate(np.asarray(whole.tokens)):
    hits = np.flatnonzero(row == stop)
    count = hits[0] + 1 if len(hits) else 9
    np.testing.assert_array_equal(made.tokens[b, :count], row[:count])
    np.testing.assert_array_equal(made.tokens[b, count:], 0)
    assert made.count[b] == count
    assert made.ended[b] == (Ended.STOP if len(hits) else Ended.LENGTH)
  assert (made.ended == Ended.STOP).any()


@pytest.mark.parametrize("policy", [FULL, SelfSpeculation(1, 2)])
def test_a_full_cache_ends_a_row_and_overwrites_nothing(policy):
  whole = generate(MODEL, TEXT[:, :P], **RAGGED)
  made = generate(MODEL, TEXT[:, :P], **RAGGED, policy=policy, capacity=7)
  for b, row in enumerate(np.asarray(whole.tokens)):
    count = int(made.count[b])
    np.testing.assert_array_equal(made.tokens[b, :count], row[:count])
    if made.ended[b] == Ended.FULL:  # one more token was read than slots hold
      reach = 1 if policy is FULL else 3
      assert 7 - reach < LENGTHS[b] + count - 1 <= 7
    else:
      assert made.ended[b] == Ended.LENGTH and count == 9
  assert (made.ended[0], made.ended[1]) == (Ended.FULL, made.ended[1])


def test_one_candidate_is_greedy():
  greedy = generate(MODEL, TEXT[:, :P], steps=5)
  for narrow in ({"top_k": 1}, {"top_p": 1e-6}):
    made = generate(MODEL, TEXT[:, :P], steps=5, **HEAT, **narrow)
    np.testing.assert_array_equal(made.tokens, greedy.tokens)


def test_a_key_per_row_makes_a_row_independent_of_its_place():
  keys = jax.random.split(jax.random.key(5), 3)
  how = {"steps": 9, "temperature": 1.0}
  whole = generate(MODEL, TEXT[:, :P], key=keys, **how).tokens
  turned = generate(MODEL, TEXT[::-1, :P], key=keys[::-1], **how).tokens
  np.testing.assert_array_equal(whole, turned[::-1])
  one = generate(MODEL, TEXT[1:2, :P], key=keys[1:2], **how).tokens
  np.testing.assert_array_equal(whole[1:2], one)


@pytest.mark.parametrize("name", ["full", "self_speculation", "aded"])
def test_the_cost_counts_the_tokens_that_stay(name):
  """Of a draft that overshoots its limit, only what was asked for."""
  limits = jnp.array([2, 9, 3])
  made = generate(
    MODEL, TEXT[:, :P], **RAGGED, limits=limits, policy=of_name(name)
  )
  assert made.cost.items == 1 + 8 + 2
  slots = P + 9 - 2 + engine.bound(of_name(name)).reach
  step = MODEL(TEXT[:1, :1], MODEL.empty_cache(1, slots)).cost.full
  np.testing.assert_allclose(made.cost.full / 11, step, rtol=1e-5)
  assert made.cost.spent >= made.cost.full * 0.99


def test_settings_may_be_traced():
  def text(heat, stop, limits):
    return generate(
      MODEL,
      TEXT[:, :P],
      steps=5,
      temperature=heat,
      stop=stop,
      limits=limits,
      key=jax.random.key(0),
    ).tokens

  args = jnp.float32(0.9), jnp.int32(3), jnp.array([2, 5, 4])
  got = jax.jit(text)(*args)
  np.testing.assert_array_equal(got, text(0.9, 3, [2, 5, 4]))


def test_settings_compile_once():
  before = engine._generate._cache_size()
  for heat in (0.5, 0.9):
    for level in (0.1, 0.9):
      generate(
        MODEL,
        TEXT[:, :P],
        steps=3,
        policy=make_policy("calm", MODEL, threshold=level),
        temperature=heat,
        top_k=3 + int(10 * level),
        key=jax.random.key(0),
        stop=int(10 * level),
        limits=[1 + int(2 * level)] * 3,
      )
  assert engine._generate._cache_size() <= before + 1


def of_name(name):
  """Each policy there is, with what it needs."""
  needs = {
    "stop_and_exit": {"controller": CONTROLLER},
    "entropy_adaptive": {"large": MODEL},
    "aded": {"corpus": np.arange(V)},
  }
  return make_policy(name, MODEL, **needs.get(name, {}))


@pytest.mark.parametrize("name", POLICIES)
def test_the_loop_copies_no_cache(name):
  """The optimised program updates the cache in place, in every loop body."""
  text = engine._generate.lower(
    MODEL,
    TEXT[:, :P],
    LENGTHS,
    jnp.full(3, 40),
    engine.bound(of_name(name)),
    Sampling.of(),
    jax.random.key(0),
    jnp.int32(-1),
    steps=40,
    slots=51,
    rungs=(3, 2) if name == "full" else (3,),
  )
  inside = inside_loops(text.compile().as_text())
  cache = r"f32\[[23],3,1,51,8\]\S*"
  assert re.search(rf"= {cache} ", inside), "the cache is updated in there"
  assert not re.findall(rf"= {cache} copy\(.*", inside)


def inside_loops(text):
  """The lines of all computations that a while body calls."""
  parts = {}
  for part in re.split(r"\n\n", text):
    if named := re.match(r"(?:ENTRY )?%?([\w.\-]+) ", part):
      parts[named[1]] = part
  loops = re.findall(r"body=%?([\w.\-]+)", text)
  seen, todo = set(), list(loops)
  while todo:
    name = todo.pop()
    if name in parts and name not in seen:
      seen.add(name)
      todo += re.findall(
        r"(?:calls|to_apply|body|condition)=%?([\w.\-]+)", parts[name]
      )
      for group in re.findall(r"computations=\{([^}]*)\}", parts[name]):
        todo += re.findall(r"[\w.\-]+", group)
  assert seen
  return "\n".join(parts[name] for name in seen)


@pytest.mark.parametrize("name", POLICIES)
def test_every_policy_by_name_decodes(name):
  made = generate(MODEL, TEXT[:, :P], steps=2, policy=of_name(name))
  assert made.tokens.shape == (3, 2)


@pytest.mark.parametrize(
  ("call", "words"),
  [
    (lambda: generate(MODEL, TEXT[:, :0], steps=1), "at least one"),
    (lambda: generate(MODEL, TEXT[:0], steps=1), "at least one"),
    (lambda: generate(MODEL, TEXT, steps=0), "at least 1 token"),
    (lambda: generate(MODEL, TEXT + V, steps=1), "vocabulary"),
    (lambda: generate(MODEL, TEXT, steps=1, temperature=-1.0), "greedy"),
    (lambda: generate(MODEL, TEXT, steps=1, temperature=1.0), "key"),
    (lambda: generate(MODEL, TEXT, steps=1, lengths=[P, 0, 1]), "empty"),
    (lambda: generate(MODEL, TEXT, steps=1, lengths=[P, 99, 1]), "lengths"),
    (
      lambda: generate(MODEL, TEXT, steps=1, lengths=[1, 1]),
      "one whole number per",
    ),
    (lambda: generate(MODEL, TEXT, steps=2, limits=[1, 3, 1]), "limits"),
    (lambda: generate(MODEL, TEXT, steps=2, limits=[0, 1, 1]), "limits"),
    (
      lambda: generate(MODEL, TEXT, steps=2, limits=np.array([1.5, 1, 1])),
      "whole",
    ),
    (
      lambda: generate(
        MODEL, TEXT, steps=2, key=jax.random.split(jax.random.key(0), 2)
      ),
      "one per row",
    ),
    (lambda: make_policy("stop_and_exit", MODEL), "controller"),
    (lambda: make_policy("entropy_adaptive", MODEL), "large"),
    (lambda: make_policy("calm", MODEL, thresh=1.0), "threshold"),
    (lambda: generate(MODEL, TEXT, steps=2, stop=V), "stop"),
    (lambda: generate(MODEL, TEXT, steps=2, capacity=P), "no room"),
    (lambda: generate(MODEL, TEXT, steps=2, top_k=0), "top_k"),
    (lambda: generate(MODEL, TEXT, steps=2, top_p=0.0), "top_p"),
    (lambda: generate(MODEL, TEXT, steps=2, policy="calm"), "Partial"),
    (lambda: score(MODEL, TEXT, policy=SelfSpeculation(1, 2)), "not a stack"),
    (lambda: score(MODEL, TEXT, prompt=P + STEPS), "must leave tokens"),
    (lambda: score(MODEL, TEXT, prompt=0), "must leave tokens"),
    (lambda: make_policy("clam", MODEL), "calm"),
  ],
)
def test_bad_input_is_refused_in_words(call, words):
  with pytest.raises(ValueError, match=words):
    call()
