# SPDX-License-Identifier: Apache-2.0
"""Law: what an input can make us spend is known before, and never exceeded."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.tree_util import Partial

from adaptivejax import core, decode
from adaptivejax.core.cost import Cost
from adaptivejax.core.depth import depth_loop, depth_scan
from adaptivejax.methods.depth import calm
from adaptivejax.methods.depth.dynamic_perceiver import budgeted_exit
from adaptivejax.methods.experts import TopPRouter
from adaptivejax.models import (
  Classifier,
  ClassifierConfig,
  DecoderConfig,
  DecoderLM,
)
from adaptivejax.nn import MixtureOfExperts, Mlp, stacked
from benchmarks import attack

N, D, E, K = 30, 4, 5, 3
X, W = jnp.linspace(-1, 1, N * D).reshape(N, D), jnp.ones((D, D)) / D
NEVER = 2.0
COVERS = (
  core.ladder(4, 16), core.tiles(6), core.coins(16, 8, 2),
  core.cheapest(16, 8, 3, price=5), core.default_cover(N),
)  # fmt: skip


@pytest.mark.parametrize("cover", COVERS)
def test_the_most_of_a_cover_is_that_of_its_dearest_count(cover):
  slots = [int(cover.slots(jnp.int32(count))) for count in range(N + 1)]
  for n in (1, 7, 16, N):
    assert cover.most(n) == max(slots[: n + 1])


def rows(x, mask, **more):
  return core.bucketed(lambda r, w: r @ w, x, mask, W, **more)


def test_the_bound_is_told_before_it_runs():
  shapes = (
    jax.ShapeDtypeStruct((N, D), X.dtype),
    jax.ShapeDtypeStruct((N,), bool),
  )
  told = core.worst_case(rows, *shapes)
  for count in (0, 3, N):
    cost = jax.jit(rows)(X, jnp.arange(N) < count)[1]
    assert cost.spent <= cost.bound == told
  inside = jax.jit(lambda x, mask: jnp.float32(core.worst_case(rows, x, mask)))
  assert inside(X, X[:, 0] > 0) == told


def test_a_bound_is_of_one_cost_and_of_shapes_alone():
  with pytest.raises(ValueError, match="one `Cost`.*got 0"):
    core.worst_case(lambda x: x, X)
  with pytest.raises(ValueError, match="one `Cost`.*got 2"):
    core.worst_case(lambda: (Cost.zero(), Cost.zero()))
  grown = lambda x: Cost.dense(1.0, 1)._replace(bound=x.sum())
  with pytest.raises(ValueError, match="depends on values"):
    core.worst_case(grown, X)


@pytest.mark.parametrize("most", [1, 8, N + 5])
def test_no_mask_runs_more_rows_than_the_cap(most):
  run = jax.jit(functools.partial(rows, most=most))
  told = core.worst_case(functools.partial(rows, most=most), X, X[:, 0] > 0)
  for mask in (X[:, 0] > 9, X[:, 0] > 0, X[:, 0] < 9):
    y, cost = run(X, mask)
    first = mask & (jnp.cumsum(mask) <= most)
    np.testing.assert_allclose(
      y, jnp.where(first[:, None], X @ W, X), atol=1e-6
    )
    twin, _ = core.masked(lambda r, w: r @ w, X, mask, W, most=most)
    np.testing.assert_allclose(y, twin, atol=1e-6)
    assert cost.spent <= cost.bound == told
    assert cost.items == mask.sum()
    assert cost.dropped == max(0, int(mask.sum()) - most)
  if most < N:
    assert told < core.worst_case(rows, X, X[:, 0] > 0)
  with pytest.raises(ValueError, match="most=0 must be at least 1 row"):
    rows(X, X[:, 0] > 0, most=0)


@pytest.mark.parametrize("loop", [depth_loop, depth_scan])
@pytest.mark.parametrize("most", [1, 2, 9, None])
def test_no_row_runs_more_layers_than_the_cap(loop, most):
  layer = lambda w, l, x, state, live: (x + w, state)
  never = lambda l, before, after, memory: (jnp.zeros(len(after), bool), memory)
  out = loop(layer, jnp.ones(4), X, None, never, max_depth=most)
  deep = 4 if most is None else min(most, 4)
  assert (out.depth == deep).all()
  np.testing.assert_allclose(out.x, X + deep, rtol=1e-6)
  capped = loop(layer, jnp.ones(4), X, None, never, min_depth=3, max_depth=2)
  assert (capped.depth == 2).all(), "the cap wins"


@functools.cache
def classifier():
  shape = {"tokens": 4, "inputs": 3, "classes": 3, "layers": K}
  config = ClassifierConfig(**shape, features=8, hidden=16, heads=2)
  return Classifier(config, rngs=nnx.Rngs(0))


@jax.jit
def classify(model, x, sure, most):
  levels = jnp.full(K, sure, jnp.float32)
  return model(x, Partial(budgeted_exit, thresholds=levels), max_exit=most)


def test_a_classifier_in_latency_mode_gives_up_quality_not_time():
  model, x = classifier(), jax.random.normal(jax.random.key(0), (5, 4, 3))
  every = jax.jit(Classifier.every_exit)(model, x).logits
  spent = []
  for most in (1, 2, K):
    out = classify(model, x, NEVER, most)
    assert (out.exit == most).all() and out.cost.spent <= out.cost.bound
    np.testing.assert_allclose(out.logits, every[most - 1], atol=1e-5)
    spent.append(float(out.cost.spent))
    least = classify(model, x, 0.0, most).cost
    assert (
      least.bound == out.cost.bound and least.spent < out.cost.bound * 0.99
    ) or most == 1
  assert spent[0] < spent[1] < spent[2]
  told = core.worst_case(lambda x: classify(model, x, NEVER, None), x)
  assert told == float(classify(model, x, 0.0, K).cost.bound)
  with pytest.raises(ValueError, match="max_exit=9 must lie in 1..3"):
    model(x, max_exit=9)


def test_a_capped_text_costs_no_more_than_its_bound():
  shape = {"vocab": 11, "layers": K, "features": 8, "hidden": 16}
  config = DecoderConfig(**shape, heads=2, kv_heads=1)
  model = DecoderLM(config, rngs=nnx.Rngs(0))
  prompt = jnp.asarray([[1, 2, 3], [4, 5, 6]])
  bounds = []
  for most in (1, K):
    stack = Partial(calm, threshold=NEVER, max_depth=jnp.int32(most))
    made = decode.generate(model, prompt, steps=4, policy=stack)
    assert made.mean_depth == most
    assert made.cost.spent <= made.cost.bound
    bounds.append(float(made.cost.bound))
  assert bounds[0] < bounds[1]
  with pytest.raises(ValueError, match="max_depth=9 must lie in 1..3"):
    decode.generate(
      model, prompt, steps=4, policy=Partial(calm, threshold=NEVER, max_depth=9)
    )


def test_an_unsure_router_runs_no_more_experts_than_the_cap():
  def layer(most):
    router = TopPRouter(D, E, p=1.0, most=most, rngs=nnx.Rngs(1))
    one = lambda rngs: Mlp(D, 8, rngs=rngs)
    return MixtureOfExperts(router, stacked(one, E, nnx.Rngs(2)))

  _, full, signals = layer(None)(X)
  assert signals.load[0].sum() == N * E
  _, cost, signals = layer(2)(X)
  assert (signals.choices[0] == 2).all()
  assert cost.spent <= cost.bound <= full.bound
  many = jax.ShapeDtypeStruct((512, D), jnp.float32)
  told = [core.worst_case(layer(most), many) for most in (1, 2, None)]
  assert told[0] < told[1] < told[2] / 2 + told[0]
  probabilities = jax.nn.softmax(layer(2).router.gate(X))
  best = np.argsort(-np.asarray(probabilities), axis=1)[:, :2]
  said = np.asarray(layer(2).router(X).experts)
  np.testing.assert_array_equal(np.sort(said, 1), np.sort(best, 1))
  with pytest.raises(ValueError, match="experts"):
    layer(0)


def test_an_attacked_model_stays_within_the_bound():
  """The attack of the benchmark, on a model that is not trained."""
  model, x = classifier(), jax.random.uniform(jax.random.key(1), (6, 4, 3))
  levels = jnp.full(K, 0.4, jnp.float32)

  def answer(x, most=None):
    out = model(x, Partial(budgeted_exit, thresholds=levels), max_exit=most)
    return out.logits, out.cost

  sure = lambda x: core.max_prob(model.every_exit(x).logits[:-1])
  victim = attack.Victim(
    answer,
    functools.partial(answer, most=2),
    lambda x: jax.nn.relu(sure(x) - 0.3).sum(0),
    lambda x: model.every_exit(x).logits[-1],
    x,
    jnp.zeros(6, jnp.int32),
  )
  moved = attack.attack(victim, keep=0)
  assert 0 < jnp.abs(moved - x).max() <= attack.RADIUS * (1 + 1e-5)
  clean, _, _ = attack.spend(answer, x, victim.labels)
  worse, _, whole = attack.spend(answer, moved, victim.labels)
  assert clean <= worse <= 1
  less, _, capped = attack.spend(victim.capped, moved, victim.labels)
  assert less <= 1 and capped < whole
