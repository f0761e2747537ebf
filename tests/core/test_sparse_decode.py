"""Law: sparse decode is its dense twin; group reductions are what they say."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from adaptivejax.core import (
  Keys,
  attend,
  attend_blocks,
  attention_mass,
  full_lists,
  group_reduce,
  masked_decode,
  quantise,
  sparse_decode,
  top_k,
  units_from_mask,
)

B, T, H, G, S, D = 2, 2, 4, 2, 24, 8


@pytest.fixture
def layer():
  keys = jax.random.split(jax.random.key(0), 4)
  normal = lambda key, *shape: jax.random.normal(key, shape)
  pos = jnp.stack([jax.random.permutation(keys[3], S), jnp.arange(S)]) - 2
  pos = jnp.maximum(pos, -1)[:, None]
  return normal(keys[0], B, T, H, D), Keys(
    normal(keys[1], B, G, S, D), normal(keys[2], B, G, S, D), pos
  ), jnp.array([[18, 19], [20, 21]])  # fmt: skip


def test_masks_become_lists():
  mask = np.random.default_rng(0).random((B, G, 6)) < 0.5
  units = units_from_mask(jnp.asarray(mask), 4)
  assert units.unit == 4 and units.index.shape == (B, G, 6)
  for b, g in np.ndindex(B, G):
    got = units.index[b, g, : int(units.count[b, g])]
    np.testing.assert_array_equal(got, np.flatnonzero(mask[b, g]))
  few = units_from_mask(jnp.ones((1, 1, 6), bool), capacity=2)
  assert few.index.tolist() == [[[0, 1]]] and few.count.tolist() == [[2]]


@pytest.mark.parametrize("lists", [1, G, H])
def test_equals_the_dense_twin(layer, lists):
  q, keys, positions = layer
  scores = jax.random.normal(jax.random.key(5), (B, lists, 6))
  units = units_from_mask(top_k(scores, 3), 4, capacity=3)
  got, cost = jax.jit(sparse_decode)(q, keys, units, positions)
  want, full = jax.jit(masked_decode)(q, keys, units, positions)
  np.testing.assert_allclose(got.out, want.out, atol=1e-5)
  np.testing.assert_allclose(got.lse, want.lse, atol=1e-5)
  assert cost.full == full.spent == 2 * B * H * T * S * 2 * D
  assert cost.share == 0.5 and cost.items == cost.capacity == B * lists * 12


def test_all_units_and_none_are_plain_attention(layer):
  q, keys, positions = layer
  want = attend(q, keys, positions)
  everything = units_from_mask(jnp.ones((1, 1, S), bool))
  for units in (None, everything):
    got, cost = sparse_decode(q, keys, units, positions)
    np.testing.assert_allclose(got.out, want, atol=1e-5)
    assert cost.share == 1
  nothing = units_from_mask(jnp.zeros((1, 1, S), bool))
  assert not np.asarray(sparse_decode(q, keys, nothing, positions)[0].out).any()


def test_positions_may_differ_between_key_heads(layer):
  q, keys, positions = layer
  split = jnp.concatenate([keys.pos, jnp.roll(keys.pos, 3, 2)], 1)
  got, _ = sparse_decode(q, keys._replace(pos=split), None, positions)
  half = H // G
  for g in range(G):
    part = Keys(keys.k[:, g : g + 1], keys.v[:, g : g + 1], split[:, g : g + 1])
    heads = slice(g * half, (g + 1) * half)
    want = attend(q[:, :, heads], part, positions)
    np.testing.assert_allclose(got.out[:, :, heads], want, atol=1e-5)


def test_the_mass_of_decode_is_that_of_the_reducer(layer):
  q, keys, positions = layer
  got, _ = sparse_decode(q, keys, None, positions, mass=True)
  want, cost = attention_mass(q, keys, positions)
  np.testing.assert_allclose(got.mass, want, atol=1e-5)
  again, _ = attention_mass(q, keys, positions, lse=got.lse)
  np.testing.assert_allclose(again, want, atol=1e-5)
  assert cost.spent == 2 * B * H * T * S * D


@pytest.mark.parametrize("how", ["mean", "max", "sum"])
def test_groups_reduce_to_lists(how):
  scores = np.random.default_rng(0).normal(size=(B, H, 3)).astype(np.float32)
  for lists in (1, 2, H):
    want = [
      getattr(np, how)(scores[:, n * H // lists : (n + 1) * H // lists], 1)
      for n in range(lists)
    ]
    got = group_reduce(jnp.asarray(scores), lists, how)
    np.testing.assert_allclose(got, np.stack(want, 1), rtol=1e-6)
  mesh = jax.make_mesh(
    (2,), ("heads",), axis_types=(jax.sharding.AxisType.Auto,)
  )
  spec = jax.sharding.PartitionSpec(None, "heads")
  sharded = jax.shard_map(
    lambda a: group_reduce(a, 1, how, "heads"),
    mesh=mesh,
    in_specs=spec,
    out_specs=jax.sharding.PartitionSpec(),
  )
  want = getattr(np, how)(scores, 1, keepdims=True)
  np.testing.assert_allclose(sharded(jnp.asarray(scores)), want, rtol=1e-5)


def test_bad_reductions_are_refused():
  scores = jnp.zeros((B, H, 3))
  for arguments, message in (
    ((2, "median"), "median"), ((3,), "3 lists"), ((2, "sum", "x"), "share"),
  ):  # fmt: skip
    with pytest.raises(ValueError, match=message):
      group_reduce(scores, *arguments)


def test_runs_in_shard_map(layer):
  """Heads of keys on different devices, with lists of their own."""
  q, keys, positions = layer
  q = jnp.tile(q, (1, 1, 1, 16))
  keys = keys._replace(k=jnp.tile(keys.k, 16), v=jnp.tile(keys.v, 16))
  units = units_from_mask(jnp.arange(3)[None, None] < jnp.array([[2], [1]]), 8)
  mesh = jax.make_mesh(
    (2,), ("heads",), axis_types=(jax.sharding.AxisType.Auto,)
  )
  P = jax.sharding.PartitionSpec
  f = lambda *args: sparse_decode(*args)[0].out
  sharded = jax.shard_map(
    f,
    mesh=mesh,
    in_specs=(
      P(None, None, "heads"), Keys(P(None, "heads"), P(None, "heads"), P()),
      P(None, "heads"), P(),
    ),
    out_specs=P(None, None, "heads"),
  )  # fmt: skip
  got = jax.jit(sharded)(q, keys, units, positions)
  np.testing.assert_allclose(got, f(q, keys, units, positions), atol=1e-5)


def test_biases_and_codes_of_the_cache_count(layer):
  q, keys, positions = layer
  bias = jax.random.normal(jax.random.key(9), (B, 1, S))
  (k, k_scale), (v, v_scale) = quantise(keys.k), quantise(keys.v)
  coded = Keys(k, v, keys.pos, bias, (k_scale, v_scale))
  want = attend(q, coded, positions)
  got, _ = sparse_decode(q, coded, None, positions)
  np.testing.assert_allclose(got.out, want, atol=2e-5)
  lists = full_lists(T, S, block_q=8, block_kv=8)
  got, _ = attend_blocks(q, coded, lists, positions)
  np.testing.assert_allclose(got.out, want, atol=2e-5)
  assert np.abs(want - attend(q, keys, positions)).max() > 0.05


def test_a_list_of_no_units_is_refused():
  with pytest.raises(ValueError, match="at least 1 unit"):
    units_from_mask(jnp.ones((1, 1, 3), bool), capacity=0)
