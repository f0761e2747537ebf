# SPDX-License-Identifier: Apache-2.0
"""Law: `bucketed` is `masked` is brute force; values and every gradient.

For each mask and each cover, whatever the unselected rows hold.
"""

import functools

import chex
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from adaptivejax import core
from tests.core import brute

D, E = 3, 2
CASES = [
  (1, None),
  (1, core.ladder(1)),
  (13, None),
  (13, core.ladder(1, 4, 13)),
  (13, core.ladder(2, 5)),  # the top rung holds less than N: it repeats
  (13, core.tiles(5)),
  (13, core.coins(13, 4)),
  (13, core.coins(7, 3, 1)),
  (33, None),
  (521, None),
]


def name(case):
  n, cover = case
  kind = cover.trips.__qualname__.split(".")[0] if cover else "default"
  return f"{n}-{kind}{list(cover.sizes) if cover else ''}"


@functools.cache
def program(cover, keep, op=core.bucketed):
  """Jitted `(x, mask, w, b, dy) -> y, (dx, dw, db), cost`."""
  if op is core.bucketed:
    op = functools.partial(op, cover=cover)

  @jax.jit
  def run(x, mask, w, b, dy):
    def f(x, w, b):
      return op(brute.layer(b), x, mask, w, brute.SCALE, keep=keep)

    y, pull, cost = jax.vjp(f, x, w, b, has_aux=True)
    return y, pull(dy), cost

  return run


def data(n, out, seed=0, dtype=np.float32):
  random = np.random.default_rng(seed)
  draw = lambda *shape: random.normal(size=shape).astype(dtype)
  return draw(n, D), draw(D, out), draw(out), draw(n, out)


def check(run, mask, keep, seed=0, tol=1e-5):
  out = D if keep else E
  x, w, b, dy = data(len(mask), out, seed)
  bad = brute.poisoned(x, mask)
  y, grads, cost = run(bad, jnp.asarray(mask), w, b, dy)
  brute.close(y, brute.forward(bad, mask, w, b, keep), tol)
  for got, want in zip(grads, brute.backward(bad, mask, w, b, dy, keep)):
    brute.close(got, want, tol)
  return cost


@pytest.mark.parametrize("keep", [True, False], ids=["keep", "zero"])
@pytest.mark.parametrize("case", CASES, ids=name)
def test_equals_brute_force(case, keep):
  n, cover = case
  sizes = (cover or core.default_cover(n)).sizes
  for seed, mask in enumerate(brute.masks(n, sizes)):
    check(program(cover, keep), mask, keep, seed)


@pytest.mark.parametrize("keep", [True, False], ids=["keep", "zero"])
def test_masked_equals_brute_force(keep):
  for seed, mask in enumerate(brute.masks(13)):
    check(program(None, keep, core.masked), mask, keep, seed)


@hypothesis.settings(max_examples=8)
@hypothesis.given(st.data())
def test_any_items_any_cover_any_mask(draw):
  n = draw.draw(st.integers(1, 24), "items")
  sizes = draw.draw(
    st.lists(st.integers(1, n), min_size=1, max_size=3, unique=True), "sizes"
  )
  kind = draw.draw(st.sampled_from([core.ladder, core.coins]), "cover")
  cover = kind(*sorted(sizes, reverse=kind is core.coins))
  run = program(cover, True)
  for seed in range(4):
    flags = draw.draw(st.lists(st.booleans(), min_size=n, max_size=n), "mask")
    check(run, np.array(flags), True, seed)


def test_nan_cotangents_of_unselected_rows_stay_there():
  mask = np.arange(13) % 3 == 0
  x, w, b, dy = data(13, E)
  _, (dx, dw, db), _ = program(core.coins(8, 4), False)(
    x, mask, w, b, brute.poisoned(dy, mask)
  )
  chex.assert_tree_all_finite((dx, dw, db))
  np.testing.assert_array_equal(dx[~mask], 0)


def test_one_trace_and_one_compile_serve_every_count():
  traced = []

  def f(rows, w):
    traced.append(len(rows))
    return jnp.tanh(rows @ w)

  cover = core.coins(8, 4, 2)
  loss = lambda w, x, mask: core.bucketed(f, x, mask, w, cover=cover)[0].sum()
  run = jax.jit(jax.grad(chex.assert_max_traces(loss, n=1)))
  x, w, *_ = data(13, D)
  for count in range(14):
    run(w, x, np.arange(13) < count)
  assert traced == [8, 4, 2]
  assert run._cache_size() == 1


def value_and_grads(op, f, x, mask, *operands, **kwargs):
  """Value, and gradients of a wavy sum of it wrt x and float operands."""

  @jax.jit
  def run(args, mask):
    def loss(args):
      y, _ = op(f, args[0], mask, *args[1:], **kwargs)
      return sum(jnp.sin(a).sum() for a in jax.tree.leaves(y)), y

    return jax.value_and_grad(loss, has_aux=True, allow_int=True)(args)

  return run((x, *operands), mask)


def twins(f, x, mask, *operands, tol=1e-5, **kwargs):
  """Asserts that `bucketed` and `masked` agree; returns value and grads."""
  args = (f, x, mask, *operands)
  got = value_and_grads(core.bucketed, *args, **kwargs)
  want = value_and_grads(core.masked, *args, **kwargs)
  numbers = lambda tree: [
    np.asarray(a, np.float32)
    for a in jax.tree.leaves(tree)
    if a.dtype != jax.dtypes.float0
  ]
  chex.assert_trees_all_close(numbers(got), numbers(want), rtol=tol, atol=tol)
  return got


def test_batch_shaped_mask_and_a_pytree_of_rows():
  key = jax.random.key(0)
  x = {
    "h": jax.random.normal(key, (2, 5, D)),
    "gate": jax.random.normal(key, (2, 5)),
  }
  mask = jnp.arange(10).reshape(2, 5) % 3 == 1
  f = lambda r, w: {
    "h": r["h"] @ w * r["gate"][:, None],
    "gate": r["h"].sum(-1),
  }
  (_, y), grads = twins(f, x, mask, jnp.eye(D) + 0.3)
  chex.assert_trees_all_equal_shapes((y, grads[0]), (x, x))
  for leaf, old in zip(jax.tree.leaves(y), jax.tree.leaves(x)):
    np.testing.assert_array_equal(leaf[~mask], old[~mask])


def test_integer_rows_and_keys_are_inputs_too():
  token = jnp.arange(13) % 4
  noise = jax.random.split(jax.random.key(0), 13)
  f = lambda r, table: table[r[0]] + jax.vmap(jax.random.normal)(r[1])[:, None]
  mask = token != 2
  (_, y), _ = twins(f, (token, noise), mask, jnp.ones((4, D)), keep=False)
  assert not np.any(y[token == 2])


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_low_precision(dtype):
  x, w, b, dy = (jnp.asarray(a / 2, dtype) for a in data(33, D))
  mask = np.arange(33) % 3 == 0
  y, grads, _ = program(None, True)(x, mask, w, b, dy)
  brute.close(y, brute.forward(x, mask, w, b, True), 1e-2)
  for got, want in zip(grads, brute.backward(x, mask, w, b, dy, True)):
    assert got.dtype == dtype
    brute.close(got, want, 1e-2)


def test_small_gradients_add_up_in_f32():
  """bf16 stops at 256 when it adds ones; the sum over chunks must not."""
  x = jnp.ones((1024, 1), jnp.bfloat16)
  total = jax.grad(
    lambda w: core.bucketed(
      jnp.multiply, x, jnp.ones(1024, bool), w, cover=core.tiles(1)
    )[0].sum()
  )(jnp.ones(1, jnp.bfloat16))
  assert float(total[0]) == 1024


def test_numpy_arrays_scalars_and_weak_types():
  x, w, *_ = data(13, D)
  mask = jnp.arange(13) % 2 == 0
  f = lambda r, w, s, nothing: jnp.tanh(r @ w) * s
  for s in (2, np.float32(2)):
    twins(f, x, mask, w, s, None)
  twins(lambda r: r * 2, jnp.broadcast_to(1.0, (13,)), mask)
  twins(lambda r: r * 2, jnp.zeros((13, 0)), mask)
  twins(jnp.ones_like, x, mask)


def test_modules_as_operand_as_closure_and_as_f():
  linear = nnx.Linear(D, D, rngs=nnx.Rngs(0))
  x, mask = data(13, D)[0], jnp.arange(13) % 3 == 0
  uses = [
    lambda op, m: op(lambda r, m: m(r), x, mask, m),
    lambda op, m: op(lambda r: m(r), x, mask),
    lambda op, m: op(m, x, mask),
  ]
  gradient = lambda use, op: nnx.state(
    jax.jit(jax.grad(lambda m: use(op, m)[0].sum()))(linear)
  )
  ops = (core.bucketed, core.masked)
  grads = [gradient(use, op) for use in uses for op in ops]
  for other in grads[1:]:
    chex.assert_trees_all_close(grads[0], other, rtol=1e-5, atol=1e-5)


def test_nested_selections():
  """A row function may itself select rows: exact at both levels."""
  x, w, b, _ = data(13, D)

  mask = jnp.arange(13) % 3 != 0

  def gradients(op):
    def f(rows, w):
      inner, _ = op(lambda r: jnp.tanh(r @ w), rows, rows[:, 0] > 0)
      return inner * b

    loss = lambda x, w: op(f, x, mask, w)[0].sum()
    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(x, w)

  chex.assert_trees_all_close(
    gradients(core.bucketed), gradients(core.masked), rtol=1e-5, atol=1e-5
  )
