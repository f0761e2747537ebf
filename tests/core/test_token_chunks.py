# SPDX-License-Identifier: Apache-2.0
"""Law: chunk by chunk is all at once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from adaptivejax.core.token_chunks import chunk_sizes, scan_chunks

B, T = 2, 11


@pytest.mark.parametrize("chunk", [1, 2, 3, 5, 10, 11, 40])
def test_all_tokens_in_order_and_no_other(chunk):
  rng = np.random.default_rng(0)
  a, b = rng.normal(size=(B, T, 3)), rng.normal(size=(B, 4, T))
  sizes = set()

  def running(total, new):  # sums so far
    a, b = new
    sizes.add(a.shape[1])
    both = a * b[:, :3].swapaxes(1, 2)
    sums = total[:, None] + jnp.cumsum(both, 1)
    return sums[:, -1], sums

  run = jax.jit(
    lambda *arrays: scan_chunks(
      running, jnp.zeros((B, 3)), arrays, (1, 2), (0, 0), chunk
    )
  )
  total, sums = run(a, b)
  want = np.cumsum(a * b[:, :3].swapaxes(1, 2), 1)
  np.testing.assert_allclose(sums, want, rtol=1e-5, atol=1e-5)
  np.testing.assert_allclose(total, want[:, -1], rtol=1e-5, atol=1e-5)
  count, size = chunk_sizes(T, chunk)
  assert sizes == {size} and size <= chunk and count == -(-T // chunk)
  assert 0 <= count * size - T < count


def test_what_fills_the_last_chunk():
  seen = lambda total, new: (total + (new[0] == -7).sum(), new[0])
  total, out = scan_chunks(
    seen, jnp.int32(0), (jnp.ones((B, T)),), (1,), (-7,), 4
  )
  assert total == B and out.shape == (B, T) and (out == 1).all()


def test_no_tokens_are_one_chunk():
  both = lambda total, new: (total, new[0])
  _, out = scan_chunks(both, 0, (jnp.ones((B, 0)),), (1,), (0,), 4)
  assert out.shape == (B, 0) and chunk_sizes(0, 4) == (1, 0)


def test_a_carry_varies_as_the_arrays_do():
  """Inside shard_map: one device suffices to ask for the types."""
  add = lambda total, new: (total + new[0].sum(1), new[0])
  over = jax.shard_map(
    lambda a: scan_chunks(add, jnp.zeros(B), (a,), (1,), (0,), 4),
    mesh=jax.make_mesh((1,), ("data",), axis_types=(AxisType.Auto,)),
    in_specs=P("data"),
    out_specs=P("data"),
  )
  total, out = over(jnp.ones((B, T)))
  assert (total == T).all() and out.shape == (B, T)
