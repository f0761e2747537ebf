# SPDX-License-Identifier: Apache-2.0
"""Law: by tile, by block or by page, choices of blocks mean a mask of pairs."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from adaptivejax.core.chosen_blocks import attend_chosen
from tests.methods import blocks
from tests.methods.blocks import AT, B, H, T

BLOCK, MOST = 4, 3
COUNT = -(-T // BLOCK)


def choices(lists, seed=0):
  """Distinct blocks for each query, none to three, the rest -1."""
  rng = np.random.default_rng(seed)
  order = rng.permuted(np.tile(np.arange(COUNT), (B, lists, T, 1)), axis=-1)
  many = rng.integers(0, MOST + 1, (B, lists, T, 1))
  return np.where(np.arange(MOST) < many, order[..., :MOST], -1)


def pairs(chosen, window):
  hot = (chosen[..., None] == np.arange(COUNT)).any(-2)
  seen = np.repeat(hot, BLOCK, -1)[..., :T] & np.tri(T, dtype=bool)
  if window is not None:
    seen &= ~np.tri(T, k=-window, dtype=bool)
  return jnp.asarray(np.repeat(seen, H // chosen.shape[1], 1))


@functools.partial(jax.jit, static_argnums=(5, 6))
def both(q, k, v, chosen, seen, by, window):
  """`((loss, out), gradients)` of ours and of the mask."""
  how = {"block": BLOCK, "by": by, "window": window}

  def ours(q, k, v):
    out, _ = attend_chosen(q, blocks.keys_of(k, v), chosen, AT, **how)
    return jnp.sin(out).sum(), out

  def mask(q, k, v):
    out = blocks.masked(q, k, v, seen)
    return jnp.sin(out).sum(), out

  grad = lambda f: jax.value_and_grad(f, (0, 1, 2), has_aux=True)(q, k, v)
  return grad(ours), grad(mask)


@pytest.mark.parametrize("by", ["tile", "block"])
@pytest.mark.parametrize(("lists", "window"), [(2, None), (4, None), (2, 6)])
def test_equals_a_mask_with_gradients(by, lists, window):
  """Queries that choose nothing, or blocks to come only, find 0."""
  q, k, v = map(jnp.asarray, blocks.drawn(scale=1.0))
  chosen = choices(lists)
  seen = pairs(chosen, window)
  assert not seen.any(-1).all()
  got, want = both(q, k, v, jnp.asarray(chosen), seen, by, window)
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want)):
    np.testing.assert_allclose(a, b, atol=5e-5)


def test_one_query_reads_pages():
  q, k, v = map(jnp.asarray, blocks.drawn())
  chosen = jnp.asarray(choices(4))
  want = blocks.masked(q, k, v, pairs(np.asarray(chosen), None))[:, -1:]
  out, cost = attend_chosen(
    q[:, -1:], blocks.keys_of(k, v), chosen[:, :, -1:], AT[:, -1:], block=BLOCK
  )
  np.testing.assert_allclose(out, want, atol=2e-5)
  assert float(cost.items) == (chosen[:, :, -1] >= 0).sum()


@pytest.mark.parametrize(
  "wrong", [{"by": "token"}, {"block": 0}, {"lists": 3}, {"lists": 1}]
)
def test_refuses_what_it_cannot_mean(wrong):
  q, k, v = map(jnp.asarray, blocks.drawn())
  chosen = jnp.zeros((B, wrong.pop("lists", 2), T, 1), jnp.int32)
  how: dict[str, Any] = {"block": BLOCK, **wrong}
  with pytest.raises(ValueError, match="must be tile or block"):
    attend_chosen(q, blocks.keys_of(k, v), chosen, AT, **how)
