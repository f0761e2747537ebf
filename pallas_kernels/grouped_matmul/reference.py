# SPDX-License-Identifier: Apache-2.0
"""What a grouped matmul means, in plain jax.numpy: every row times every group.

E times the work of a kernel; for tests, and for reading.
"""

import jax
import jax.numpy as jnp


def grouped_matmul(
  x: jax.Array,
  w: jax.Array,
  sizes: jax.Array,
  *,
  rows: jax.Array | None = None,
  transpose_w: bool = False,
) -> jax.Array:
  """y_m = x_m w_e for the rows m of group e, and 0 past the last group.

  See `grouped_matmul.grouped_matmul` for shapes.  Products are summed in f32.
  A row that belongs to no group, or that `rows` does not name for one, is not
  looked at: neither are its NaNs.
  """
  ends = jnp.cumsum(sizes)
  place = jnp.arange(len(x) if rows is None else len(rows))
  mine = (place >= (ends - sizes)[:, None]) & (place < ends[:, None])
  if rows is not None:
    x = x[jnp.where(mine.any(0), rows, 0)]
  x = jnp.where(mine[..., None], x, 0)
  y = jnp.einsum(
    "emk,enk->mn" if transpose_w else "emk,ekn->mn",
    x, w, preferred_element_type=jnp.float32,
  )  # fmt: skip
  return jnp.where(mine.any(0)[:, None], y, 0).astype(x.dtype)
