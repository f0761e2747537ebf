# SPDX-License-Identifier: Apache-2.0
"""Law: an item gets the weighted sum over its experts, at their cost alone."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from adaptivejax.core.covers import coins
from adaptivejax.core.dispatch import NOBODY, Dispatch, dispatch
from adaptivejax.core.expert_executor import KEPT
from adaptivejax.core.experts import (
  expert_apply,
  expert_apply_dense,
  grouped_matmul,
)

N, K, E, D, F = 45, 2, 5, 6, 9
KEYS = jax.random.split(jax.random.key(0), 4)
PARAMS = {
  "up": jax.random.normal(KEYS[0], (E, D, F)),
  "down": jax.random.normal(KEYS[1], (E, F, D)),
}
X = jax.random.normal(KEYS[2], (N, D))
WEIGHTS = jax.random.normal(KEYS[3], (N, K))
COVER = coins(32, 8, 3)


def expert(rows, params):
  return jnp.tanh(rows @ params["up"]) @ params["down"]


def routed(x, weights, params, experts, cover=COVER):
  plan = dispatch(experts, weights, E)
  return expert_apply(expert, x, plan, params, cover=cover)


def brute(x, weights, params, experts):
  """Item by item, choice by choice."""
  rows = []
  for n, chosen in enumerate(np.asarray(experts)):
    row = jnp.zeros(D)
    for k, e in enumerate(chosen):
      if e != NOBODY:
        of_one = jax.tree.map(lambda a, e=e: a[e], params)
        row += weights[n, k] * expert(x[n], of_one)
    rows.append(row)
  return jnp.stack(rows)


def some(seed, absent=0.2):
  rng = np.random.default_rng(seed)
  picks = np.stack([rng.permutation(E)[:K] for _ in range(N)])
  return np.where(rng.random((N, K)) < absent, NOBODY, picks)


ROUTES = {
  "some": some(0),
  "all": some(1, 0.0),
  "none": np.full((N, K), NOBODY),
  "one expert": np.tile([3, NOBODY], (N, 1)),
  "one item": np.where(np.arange(N)[:, None] == 7, [4, 0], NOBODY),
  "dead expert": np.where(some(2) == 2, NOBODY, some(2)),
}
close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)


@functools.cache
def compiled():
  def run(*args):
    y, cost = routed(*args)
    return jnp.sin(y).sum(), (y, cost)

  return jax.jit(jax.grad(run, argnums=(0, 1, 2), has_aux=True))


@pytest.mark.parametrize("name", ROUTES)
def test_values_and_gradients(name):
  experts = jnp.asarray(ROUTES[name])
  grads, (y, cost) = compiled()(X, WEIGHTS, PARAMS, experts)
  close(y, brute(X, WEIGHTS, PARAMS, experts))
  loss = lambda *args: jnp.sin(brute(*args, experts)).sum()
  wanted = jax.grad(loss, argnums=(0, 1, 2))(X, WEIGHTS, PARAMS)
  jax.tree.map(close, grads, wanted)
  sizes = np.bincount(experts[experts >= 0], minlength=E)
  row = 4 * D * F
  assert cost.items == sizes.sum()
  assert cost.capacity == jax.vmap(COVER.slots)(jnp.asarray(sizes)).sum()
  assert cost.spent == cost.capacity * row
  assert cost.full == N * E * row
  assert cost.dropped == 0


@pytest.mark.parametrize("features", [3, 8, 16, 32])
def test_weights_as_long_as_a_chunk(features):
  """A product of weights is no row, however long (LoRA)."""
  keys = jax.random.split(jax.random.key(1), 4)
  d = features
  params = [
    jax.random.normal(k, s) / d
    for k, s in zip(keys, [(E, d, d), (E, d, 2), (E, 2, d)])
  ]
  x = jax.random.normal(keys[3], (N, d))
  low_rank = lambda r, p: jnp.tanh(r @ (p[0] + p[1] @ p[2]))
  plan = dispatch(jnp.asarray(ROUTES["some"]), WEIGHTS, E)

  def loss(apply, x, params):
    cover = coins(32, 16, 8, 3) if d != 8 else coins(8)
    return jnp.sin(apply(low_rank, x, plan, params, cover=cover)[0]).sum()

  ours, twin = (
    jax.jit(jax.grad(functools.partial(loss, apply), argnums=(0, 1)))(x, params)
    for apply in (expert_apply, expert_apply_dense)
  )
  jax.tree.map(close, ours, twin)


def test_one_trace_for_all_routes():
  traces = []

  @jax.jit
  def run(experts):
    traces.append(1)
    return routed(X, WEIGHTS, PARAMS, experts)[0]

  for experts in ROUTES.values():
    run(jnp.asarray(experts))
  assert len(traces) == 1


def test_nothing_leaks_from_the_dead():
  """NaN in an expert nobody chose and in an item without an expert."""
  experts = np.array(ROUTES["dead expert"])
  experts[5] = NOBODY
  params = jax.tree.map(lambda a: a.at[2].set(jnp.nan), PARAMS)
  x = X.at[5].set(jnp.nan)
  weights = jnp.where(experts == NOBODY, jnp.nan, WEIGHTS)
  args = x, weights, params, jnp.asarray(experts)
  grads, (y, _) = compiled()(*args)
  close(y, brute(X, WEIGHTS, PARAMS, experts))
  assert all(jnp.isfinite(g).all() for g in jax.tree.leaves(grads))
  assert not grads[0][5].any()
  assert not any(g[2].any() for g in jax.tree.leaves(grads[2]))


def test_the_cover_changes_nothing():
  experts = jnp.asarray(ROUTES["some"])
  make = lambda cover: routed(X, WEIGHTS, PARAMS, experts, cover)[0]
  whole = make(None)
  for cover in (coins(1), coins(64), coins(16, 1)):
    close(make(cover), whole)


def test_vmap_is_a_bigger_batch():
  xs = jax.random.normal(jax.random.key(9), (3, N, D))
  experts = jnp.stack([jnp.asarray(some(seed)) for seed in range(3)])
  run = lambda x, e: routed(x, WEIGHTS, PARAMS, e)[0]
  made = jax.jit(jax.vmap(run))(xs, experts)
  close(made, jnp.stack([run(x, e) for x, e in zip(xs, experts)]))
  loss = lambda p: sum(
    jnp.sin(routed(x, WEIGHTS, p, e)[0]).sum() for x, e in zip(xs, experts)
  )
  both = lambda p: jnp.sin(
    jax.vmap(lambda x, e: routed(x, WEIGHTS, p, e)[0])(xs, experts)
  ).sum()
  jax.tree.map(close, jax.grad(both)(PARAMS), jax.grad(loss)(PARAMS))


def test_vmap_over_parameters():
  many = jax.tree.map(lambda a: jnp.stack([a, 2 * a]), PARAMS)
  experts = jnp.asarray(ROUTES["some"])
  made = jax.vmap(lambda p: routed(X, WEIGHTS, p, experts)[0])(many)
  for i in range(2):
    one = jax.tree.map(lambda a, i=i: a[i], many)
    close(made[i], routed(X, WEIGHTS, one, experts)[0])


def test_bf16_sums_in_f32():
  half = lambda tree: jax.tree.map(lambda a: a.astype(jnp.bfloat16), tree)
  experts = jnp.asarray(ROUTES["some"])
  y, _ = routed(half(X), half(WEIGHTS), half(PARAMS), experts)
  assert y.dtype == jnp.bfloat16
  wanted = brute(X, WEIGHTS, PARAMS, experts)
  scale = float(jnp.abs(wanted).max())
  np.testing.assert_allclose(y / scale, wanted / scale, atol=2e-2)


@pytest.mark.parametrize("sizes", [(3, 0, 40, 1, 0), (0,) * E, (0, 0, 0, 0, N)])
def test_grouped_matmul(sizes):
  x = X.at[sum(sizes) :].set(jnp.nan)
  w = PARAMS["up"]
  y = jax.jit(grouped_matmul)(x, w, jnp.array(sizes))
  ends = np.cumsum(sizes)
  wanted = np.zeros((N, F))
  for e, (end, size) in enumerate(zip(ends, sizes)):
    wanted[end - size : end] = np.asarray(X)[end - size : end] @ np.asarray(
      w[e]
    )
  close(y, wanted)


@pytest.mark.parametrize(
  ("change", "says"),
  [
    ({"params": {"w": jnp.zeros((E + 1, D))}}, "leading axis"),
    ({"x": jnp.zeros((0, D))}, "at least one item"),
    (
      {"plan": Dispatch(jnp.zeros(3, int), jnp.zeros(2), jnp.zeros(E, int))},
      "d",
    ),
    ({"f": lambda r, p: (r, r)}, "one array"),
    ({"f": lambda r, p: r.sum(0)}, "one row per row"),
  ],
)
def test_bad_input(change, says):
  plan = dispatch(jnp.asarray(ROUTES["some"]), WEIGHTS, E)
  args = {"f": expert, "x": X, "plan": plan, "params": PARAMS, **change}
  with pytest.raises(ValueError, match=says):
    expert_apply(**args)


@pytest.mark.parametrize("absent", [0.0, 0.1, 0.7])
def test_a_choice_of_any_number_of_experts(absent):
  """More slots than are kept, fewer, and in the midst of a chunk."""
  rng = np.random.default_rng(0)
  experts = np.where(rng.random((N, E)) < absent, NOBODY, np.arange(E))
  weights = jax.random.normal(KEYS[3], (N, E))
  args = X, weights, PARAMS
  loss = lambda *args: jnp.sin(routed(*args, jnp.asarray(experts))[0]).sum()
  wanted = lambda *args: jnp.sin(brute(*args, experts)).sum()
  grads = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(*args)
  jax.tree.map(close, grads, jax.grad(wanted, argnums=(0, 1, 2))(*args))


def test_what_is_kept_is_bounded():
  """Of a plan with a place for every expert of every item: 4 N rows."""
  count = 4 * E
  params = jax.tree.map(lambda a: jnp.tile(a, (4, 1, 1)), PARAMS)

  def rows_kept(choices, most=None):
    def run(x):
      experts = jnp.zeros((N, choices), int).at[:, 1:].set(NOBODY)
      plan = dispatch(experts, jnp.ones((N, choices)), count, most=most)
      return expert_apply(expert, x, plan, params)[0]

    kept = jax.eval_shape(lambda: jax.vjp(run, X)[1])
    return {a.shape[0] for a in jax.tree.leaves(kept) if a.shape[1:] == (F,)}

  assert rows_kept(count) == {KEPT * N}
  assert rows_kept(count - 1) == {(count - 1) * N}  # told apart by its choices
  assert rows_kept(count, most=N) == {N}


def test_a_plan_of_other_items_is_refused():
  plan = dispatch(jnp.zeros((4, 1), jnp.int32), jnp.ones((4, 1)), 2)
  with pytest.raises(ValueError, match="the plan is for 4 items"):
    expert_apply(
      lambda r, w: r @ w, jnp.ones((2, 3)), plan, jnp.ones((2, 3, 3))
    )
