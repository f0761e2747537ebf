# SPDX-License-Identifier: Apache-2.0
"""Attention of the newest tokens over chosen tokens or pages of a cache.

Axes: B batch, T new tokens, S slots, H query heads, G key heads, D head width,
L heads that own a list (1, G or H), N units of a cache, K entries of a list.
"""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from adaptivejax.core.attention import Keys
from adaptivejax.core.cost import Cost
from pallas_kernels.block_sparse_attention.types import (
  CAUSAL,
  UNMARKED,
  Attended,
  Marks,
  Rule,
)
from pallas_kernels.sparse_decode_attention import (
  Units,
  reference,
  sparse_decode_attention,
)


def units_from_mask(
  mask: Bool[Array, "B L N"], unit: int = 1, capacity: int | None = None
) -> Units:
  """The lists of a selection of tokens or pages.

  Args:
    mask: which units of the cache each head looks at.
    unit: slots in a unit (static).
    capacity: most entries of a list (static), all N if None.  Of a selection of
      more, the first are listed: take a capacity that cannot be exceeded.
  """
  if capacity is not None and capacity < 1:
    raise ValueError(f"{capacity=} must be at least 1 unit.")
  most = mask.shape[2] if capacity is None else min(capacity, mask.shape[2])
  index = lax.top_k(mask.astype(jnp.float32), most)[1]  # ties by index
  count = jnp.minimum(mask.sum(-1, dtype=jnp.int32), most)
  return Units(index, count, unit)


def sparse_decode(
  q: Float[Array, "B T H D"],
  keys: Keys,
  units: Units | None,
  positions: Int[Array, "B T"],
  *,
  rule: Rule = CAUSAL,
  marks: Marks = UNMARKED,
  page_table: Int[Array, "B P"] | None = None,
  mass: bool = False,
) -> tuple[Attended, Cost]:
  """Softmax attention of up to 16 new tokens over the listed keys they see.

  Nothing else of the cache is read.  See
  `pallas_kernels.sparse_decode_attention.sparse_decode_attention`.

  Args:
    q: queries of the new tokens.
    keys: a layer of the cache, in 8 bits with their scale, or not; with
      `page_table` a pool of pages, whose `pos` and `bias` are still by slot of
      each row.
    units: what is looked at (dynamic); the whole cache if None.
    positions: of the new tokens, -1 for none.
    rule: scale, window and so on (static).
    marks: segments, sinks and a bias besides that of `keys`, if any; positions
      are those given.
    page_table: pages of each row in the pool (dynamic).
    mass: return the attention that each listed unit got.

  Returns:
    `Attended`, its `out` as q, [B, T, H, D]; and what it cost, against the
    whole cache.  Items are keys of lists.
  """
  arguments = (q, keys, units, positions, rule, marks)
  more = {"page_table": page_table, "mass": mass}
  attended = _attend(sparse_decode_attention, *arguments, **more)
  return attended, _cost(q, keys, units, page_table)


def masked_decode(
  q: Float[Array, "B T H D"],
  keys: Keys,
  units: Units | None,
  positions: Int[Array, "B T"],
  *,
  rule: Rule = CAUSAL,
  marks: Marks = UNMARKED,
  page_table: Int[Array, "B P"] | None = None,
  mass: bool = False,
) -> tuple[Attended, Cost]:
  """The dense twin of `sparse_decode`: all pairs, and a mask of the listed."""
  attended = _attend(
    reference.sparse_decode_attention,
    q,
    keys,
    units,
    positions,
    rule,
    marks,
    page_table=page_table,
    mass=mass,
  )
  return attended, _cost(q, keys, None, page_table)


def _attend(f, q, keys, units, positions, rule, marks, **more) -> Attended:
  bias = marks.kv_bias
  if keys.bias is not None:
    bias = keys.bias if bias is None else bias + keys.bias
  marks = marks._replace(q_pos=positions, kv_pos=keys.pos, kv_bias=bias)
  more["k_scale"], more["v_scale"] = keys.scale or (None, None)
  heads_first = jnp.moveaxis(q, 2, 1)
  attended = f(heads_first, keys.k, keys.v, units, marks, rule, **more)
  return attended._replace(out=jnp.moveaxis(attended.out, 1, 2))


def _cost(q, keys, units, page_table) -> Cost:
  batch, queries, heads, _ = q.shape
  slots = keys.pos.shape[2]
  of_key = 2.0 * queries * heads * (keys.k.shape[3] + keys.v.shape[3])
  full = of_key * batch * slots
  if units is None:
    return Cost.dense(full, batch * slots)
  rows, lists, entries = units.index.shape
  wide = min(entries * units.unit, slots)
  asked = jnp.minimum(units.count, entries).sum() * units.unit * (batch // rows)
  spent = of_key * batch * wide
  fields = (spent, full, asked, batch * lists * wide, 0, spent)
  return Cost(*(jnp.asarray(field, jnp.float32) for field in fields))
