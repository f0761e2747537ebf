# SPDX-License-Identifier: Apache-2.0
"""Law: every transform of `bucketed` equals that of `masked`, and still skips.

What skips is read off the compiled program: a batched predicate would turn the
conditionals into selects that run every branch.  Backward memory is dense's.
"""

import functools
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from adaptivejax import core

B, N, D = 3, 12, 4
COVER = core.coins(8, 2)
draw = lambda i, *shape: jax.random.normal(jax.random.key(i), shape)
X, W, DY = draw(0, B, N, D), draw(1, B, D, D), draw(2, B, N, D)
MASK = draw(3, B, N) > 0.6
MASK = MASK.at[1].set(False).at[2].set(True)  # some, none, all
bucketed = functools.partial(core.bucketed, cover=COVER)


def layer(op, x, mask, w):
  return op(lambda rows, w: jnp.tanh(rows @ w), x, mask, w)[0]


def loss(op, x, mask, w, dy):
  return (layer(op, x, mask, w) * dy).sum()


def agree(transformed, *args):
  """`transformed(op)(*args)` is the same for both; returns what compiled."""
  programs = [
    jax.jit(transformed(op)).lower(*args).compile()
    for op in (bucketed, core.masked)
  ]
  got, want = (program(*args) for program in programs)
  chex.assert_trees_all_close(got, want, rtol=1e-5, atol=1e-5)
  return programs[0].as_text()


def conditionals(hlo):
  return hlo.count(" conditional("), hlo.count(" while(")


@functools.cache
def plain():
  return conditionals(
    agree(lambda op: functools.partial(layer, op), X[0], MASK[0], W[0])
  )


@functools.cache
def plain_grad():
  f = lambda op: jax.grad(functools.partial(loss, op), (0, 2))
  return conditionals(agree(f, X[0], MASK[0], W[0], DY[0]))


def test_one_conditional_per_chunk_size():
  assert plain()[0] == len(COVER.sizes)
  assert plain_grad()[0] == len(COVER.sizes)  # y is not needed


@pytest.mark.parametrize(
  "axes",
  [(0, 0, None), (None, 0, None), (0, None, None)],
  ids=["x+mask", "mask", "x"],
)
def test_vmap_with_shared_operands_folds_into_the_rows(axes):
  args = [a if b == 0 else a[0] for a, b in zip((X, MASK, W), axes)]
  hlo = agree(lambda op: jax.vmap(functools.partial(layer, op), axes), *args)
  assert conditionals(hlo)[0] == len(COVER.widened(B).sizes)


def test_chunks_grow_with_the_batch():
  """Many examples of one row each are not many chunks of one row."""
  assert core.default_cover(1).widened(64).sizes == (64, 1)
  run = lambda x, m: core.bucketed(lambda r, w: r @ w, x, m, W[0])[0]
  x, mask = jnp.ones((64, 1, D)), jnp.ones((64, 1), bool)
  text = jax.jit(jax.vmap(run)).lower(x, mask).as_text()
  assert re.search(rf"dot_general.*tensor<64x1x{D}xf32>", text)


def test_vmap_with_own_operands_loops():
  hlo = agree(lambda op: jax.vmap(functools.partial(layer, op)), X, MASK, W)
  conds, loops = plain()
  assert conditionals(hlo) == (conds, loops + 1)


def test_nested_vmap():
  x, mask = jnp.stack([X, -X]), jnp.stack([MASK, ~MASK])
  f = lambda op: functools.partial(layer, op)
  shared = lambda op: jax.vmap(jax.vmap(f(op), (0, 0, None)), (0, 0, None))
  wide = COVER.widened(B).widened(2)
  assert conditionals(agree(shared, x, mask, W[0]))[0] == len(wide.sizes)
  own = lambda op: jax.vmap(jax.vmap(f(op), (0, 0, None)), (0, 0, 0))
  agree(own, x, mask, W[:2])


def test_ladder_under_vmap_serves_more_rows_than_its_top_rung():
  op = functools.partial(core.bucketed, cover=core.ladder(4, N))
  run = lambda op: jax.vmap(functools.partial(layer, op), (0, 0, None))
  mask = jnp.ones((B, N), bool)
  got, want = (jax.jit(run(f))(X, mask, W[0]) for f in (op, core.masked))
  chex.assert_trees_all_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("own", [False, True], ids=["shared", "own"])
def test_grad_of_vmap_and_vmap_of_grad(own):
  axes = (0, 0, 0 if own else None, 0)
  w = W if own else W[0]

  def outside(op):
    each = jax.vmap(functools.partial(loss, op), axes)
    return jax.grad(lambda *args: each(*args).sum(), (0, 2))

  def inside(op):
    return jax.vmap(jax.grad(functools.partial(loss, op), (0, 2)), axes)

  for transform in (outside, inside):
    hlo = agree(transform, X, MASK, w, DY)
    assert conditionals(hlo)[0] >= plain_grad()[0]


@pytest.mark.parametrize(
  "wrap", [lambda f: f, jax.checkpoint], ids=["", "remat"]
)
def test_grad_through_scan_over_layers(wrap):
  def stack(op):
    def run(x, w):
      body = wrap(lambda x, w: (layer(op, x, x[:, 0] > 0, w), None))
      return jax.lax.scan(body, x, w)[0].sum()

    return jax.value_and_grad(run, (0, 1))

  agree(stack, X[0], W)


def hessian_product(op):
  def run(x, mask, w, dy, v):
    gradient = jax.grad(lambda x: loss(op, x, mask, w, dy))
    return jax.jvp(gradient, (x,), (v,))[1]

  return run


def test_forward_over_reverse():
  x, mask, w, dy = X[0], MASK[0], W[0], DY[0]
  agree(hessian_product, x, mask, w, dy, X[1])
  hessian = lambda op: jax.hessian(functools.partial(loss, op), argnums=2)
  agree(hessian, x, mask, w, dy)


@pytest.mark.parametrize(
  "axes",
  [
    (0, None, None, None, 0),
    (0, 0, None, None, 0),
    (0, 0, 0, 0, 0),
    (None, 0, None, None, None),
    (None, None, 0, 0, None),
  ],
)
def test_vmap_of_forward_over_reverse(axes):
  """Arguments batched with their tangents, without, and neither."""
  args = (X, MASK, W, DY, -X)
  args = [a if b == 0 else a[0] for a, b in zip(args, axes)]
  agree(lambda op: jax.vmap(hessian_product(op), axes), *args)


FORWARD = {
  "jvp": lambda f, x: jax.jvp(f, (x,), (x,)),
  "jacfwd": lambda f, x: jax.jacfwd(f)(x),
  "jvp_of_vmap": lambda f, x: jax.jvp(jax.vmap(f), (x[None],), (x[None],)),
}


@pytest.mark.parametrize("use", FORWARD.values(), ids=FORWARD)
def test_forward_mode_refuses_and_names_the_twin(use):
  f = lambda op: lambda x: layer(op, x, MASK[0], W[0])
  with pytest.raises(ValueError, match="`masked`"):
    use(f(bucketed), X[0])
  use(f(core.masked), X[0])


def test_reverse_over_reverse_refuses_under_jit():
  def second(op):
    inner = jax.grad(lambda w: loss(op, X[0], MASK[0], w, DY[0]))
    return jax.jit(jax.grad(lambda w: (inner(w) ** 2).sum()))

  with pytest.raises(ValueError, match="everse"):
    second(bucketed)(W[0])
  chex.assert_tree_all_finite(second(core.masked)(W[0]))


def test_eager_is_jit():
  run = functools.partial(layer, bucketed)
  args = X[0], MASK[0], W[0]
  chex.assert_trees_all_close(run(*args), jax.jit(run)(*args), rtol=1e-5)


def temp_bytes(apply):
  """Temporary memory of the gradient of an FFN; compiles only."""
  n, d, hidden = 2048, 512, 2048

  def ffn(rows, w1, w2):
    return rows + jax.nn.gelu(rows @ w1) @ w2

  run = lambda x, mask, w1, w2: apply(ffn, x, mask, w1, w2).sum()
  shape = jax.ShapeDtypeStruct
  args = [(n, d), (n,), (d, hidden), (hidden, d)]
  args = [shape(a, bool if a == (n,) else jnp.float32) for a in args]
  compiled = jax.jit(jax.value_and_grad(run, (0, 2, 3))).lower(*args).compile()
  return compiled.memory_analysis().temp_size_in_bytes


@functools.cache
def dense_bytes():
  return temp_bytes(lambda f, x, mask, *w: f(x, *w))


def adaptive_bytes(cover):
  return temp_bytes(lambda *args: core.bucketed(*args, cover=cover)[0])


@pytest.mark.parametrize(
  "cover",
  [None, core.ladder(128, 512), core.tiles(128)],
  ids=["default", "ladder", "tiles"],
)
def test_backward_memory_is_at_most_dense(cover):
  assert adaptive_bytes(cover) <= 1.05 * dense_bytes()


def test_backward_memory_does_not_grow_with_the_chunks():
  one = adaptive_bytes(core.tiles(256))
  for cover in (core.coins(256, 64), core.coins(256, 128, 64, 32)):
    assert adaptive_bytes(cover) <= 1.05 * one


def test_all_rows_on_the_top_rung_are_bitwise_dense():
  """It runs on x itself, without gather and scatter."""
  mask = jnp.ones(N, bool)
  whole = functools.partial(core.bucketed, cover=core.ladder(4, N))
  run = lambda op: jax.jit(functools.partial(layer, op))(X[0], mask, W[0])
  np.testing.assert_array_equal(run(whole), jnp.tanh(X[0] @ W[0]))
