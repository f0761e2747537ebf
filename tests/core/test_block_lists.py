# SPDX-License-Identifier: Apache-2.0
"""Block masks and lists against loops in NumPy."""

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

from adaptivejax import core
from adaptivejax.core import block_lists

SIZES = {"block_q": 4, "block_kv": 8}
T, S, Q, K = 14, 37, 4, 5


def mask_of(chance=0.5, shape=(2, 3, Q, K), seed=0):
  return np.random.default_rng(seed).random(shape) < chance


def listed(lists, *at):
  """The blocks of one tile, in their order."""
  return np.asarray(lists.index[at][: int(lists.count[at])]).tolist()


def by_pairs(visible):
  """bool[Q, K]: whether any pair of a block is visible, by looking at all."""
  want = np.zeros((Q, K), bool)
  for t in range(T):
    for s in range(S):
      want[t // 4, s // 8] |= bool(visible(t, s))
  return want


def test_lists_name_what_the_mask_selects_in_order():
  mask = mask_of()
  lists = jax.jit(lambda m: core.lists_from_mask(m, **SIZES))(mask)
  assert (lists.block_q, lists.block_kv, lists.rows) == (4, 8, None)
  assert lists.index.shape == mask.shape
  for at in np.ndindex(mask.shape[:3]):
    assert listed(lists, *at) == np.flatnonzero(mask[at]).tolist()
    past = np.asarray(lists.index[at])[int(lists.count[at]) :]
    assert set(past) <= set(listed(lists, *at)[-1:] or [0])


def test_lists_and_mask_are_each_other_s_inverse():
  mask = mask_of(0.3)
  lists = core.lists_from_mask(jnp.asarray(mask))
  np.testing.assert_array_equal(core.mask_from_lists(lists, K), mask)
  np.testing.assert_array_equal(block_lists.listed_blocks(lists), mask.sum(-1))


def test_less_capacity_is_refused_or_cuts():
  mask = jnp.asarray(mask_of(0.8))
  with pytest.raises(ValueError, match="may overflow"):
    core.lists_from_mask(mask, capacity=2)
  lists = core.lists_from_mask(mask, capacity=2, truncate=True)
  assert lists.index.shape[-1] == 2
  for at in np.ndindex(mask.shape[:3]):
    assert listed(lists, *at) == np.flatnonzero(mask[at])[:2].tolist()
  assert core.lists_from_mask(mask, capacity=99).index.shape[-1] == K
  with pytest.raises(ValueError, match="at least 1 block"):
    core.lists_from_mask(mask, capacity=0)


@pytest.mark.parametrize("bad", [np.ones((Q, K), bool), np.ones((1, 1, Q, K))])
def test_a_mask_is_boolean_of_four_axes(bad):
  with pytest.raises((ValueError, jaxtyping.TypeCheckError)):
    core.lists_from_mask(jnp.asarray(bad))


def test_each_query_s_blocks_become_a_union_with_rows():
  rng = np.random.default_rng(1)
  index = rng.integers(-1, K, (2, 1, T, 3))
  make = lambda i: core.lists_from_tokens(i, K, **SIZES)
  lists = jax.jit(make)(jnp.asarray(index))
  assert lists.rows.shape == (*lists.index.shape, 4)
  for b, tile in np.ndindex(2, Q):
    union = set(index[b, 0, tile * 4 : tile * 4 + 4].ravel()) - {-1}
    assert listed(lists, b, 0, tile) == sorted(union)
    for c, block in enumerate(sorted(union)):
      for row in range(4):
        t = tile * 4 + row
        wants = t < T and block in index[b, 0, t]
        assert bool(lists.rows[b, 0, tile, c, row]) == wants


def test_flex_attention_tables():
  """A BlockMask keeps partial and full blocks in tables of their own."""
  partial = jnp.array([[[2, 0, 1, 9], [1, 3, 0, 0]]])[:, None]
  whole = jnp.array([[[3, 0, 0, 0], [0, 2, 1, 3]]])[:, None]
  lists = core.lists_from_tables(
    jnp.array([[[2, 0]]]), partial, jnp.array([[[1, 3]]]), whole, blocks=4
  )
  assert listed(lists, 0, 0, 0) == [0, 2, 3]
  assert listed(lists, 0, 0, 1) == [0, 1, 2]
  lists = core.lists_from_tables(jnp.array([[[2, 0]]]), partial, blocks=4)
  assert listed(lists, 0, 0, 0) == [0, 2]
  with pytest.raises(ValueError, match="belong together"):
    core.lists_from_tables(
      jnp.array([[[2, 0]]]), partial, jnp.array([[[1, 3]]]), blocks=4
    )


@pytest.mark.parametrize("module", [np, jnp])
def test_a_mask_function_is_asked_at_trace_time(module):
  visible = lambda t, s: module.logical_and(s <= t, (t - s) % 9 < 2)

  @jax.jit
  def lists():
    return core.lists_from_function(visible, T, S, **SIZES)

  want = by_pairs(lambda t, s: s <= t and (t - s) % 9 < 2)
  assert lists().index.shape[-1] == want.sum(1).max()
  got = core.mask_from_lists(lists(), K)
  np.testing.assert_array_equal(got, want[None, None])


@pytest.mark.parametrize("start", [0, 3, 23])
def test_masks_by_position(start):
  more = SIZES | {"start": start}
  causal = core.causal_blocks(T, S, **more)
  want = by_pairs(lambda t, s: s <= t + start)
  np.testing.assert_array_equal(causal[0, 0], want)
  for window in (1, 6, 99):
    near = jax.jit(lambda w: core.window_blocks(T, S, w, **more))(window)
    want = by_pairs(lambda t, s: t + start - window < s <= t + start)  # noqa: B023
    np.testing.assert_array_equal(near[0, 0], want)
    pos = jnp.arange(T)[None] + start, jnp.arange(S)[None, None]
    same = core.visible_blocks(*pos, **SIZES, window=window)
    np.testing.assert_array_equal(same, near)
  np.testing.assert_array_equal(
    core.visible_blocks(*pos, **SIZES, causal=False), jnp.ones((1, 1, Q, K))
  )


def test_sinks_are_in_every_list():
  for sinks in (0, 1, 8, 9):
    mask = core.sink_blocks(T, S, sinks, **SIZES)
    want = by_pairs(lambda t, s: s < sinks)  # noqa: B023
    np.testing.assert_array_equal(mask[0, 0], want)


def test_no_visible_block_is_missed_whatever_the_order():
  rng = np.random.default_rng(2)
  at = np.where(rng.random(T) < 0.5, -1, rng.permutation(T))
  pos = np.where(rng.random(S) < 0.5, -1, rng.permutation(S))
  at[4:8], pos[8:16] = -1, -1
  seen = by_pairs(
    lambda t, s: at[t] >= 0 and 0 <= pos[s] <= at[t] and pos[s] > at[t] - 5
  )
  got = core.visible_blocks(
    jnp.asarray(at)[None], jnp.asarray(pos)[None, None], **SIZES, window=5
  )[0, 0]
  assert not (seen & ~np.asarray(got)).any()
  assert not got[1].any() and not got[:, 1].any(), "nobody there"


def test_masks_compose_with_scores():
  scores = jnp.asarray(np.random.default_rng(3).normal(size=(1, 2, Q, K)))
  causal = core.causal_blocks(T, S, **SIZES, start=S - T)
  mask = core.top_k(jnp.where(causal, scores, -jnp.inf), 2) & causal
  mask |= core.sink_blocks(T, S, 4, **SIZES)
  lists = core.lists_from_mask(mask, **SIZES, capacity=3, truncate=True)
  np.testing.assert_array_equal(core.mask_from_lists(lists, K), mask)
  assert lists.count.max() <= 3


def test_heads_of_a_group_share_what_any_looks_at():
  mask = mask_of(shape=(2, 6, Q, K))
  got = core.shared_by_group(jnp.asarray(mask), 2)
  want = np.stack([mask[:, :3].any(1), mask[:, 3:].any(1)], 1)
  np.testing.assert_array_equal(got, want)
  with pytest.raises(ValueError, match="groups of one size"):
    core.shared_by_group(jnp.asarray(mask), 4)


def test_full_lists():
  lists = core.full_lists(T, S, **SIZES)
  assert all(listed(lists, 0, 0, tile) == list(range(K)) for tile in range(Q))
  with pytest.raises(ValueError, match="at least 1"):
    core.full_lists(T, 0)
