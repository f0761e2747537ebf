# SPDX-License-Identifier: Apache-2.0
"""Decisions: scores in, boolean masks out.

A selection is a mask `bool[..., N]` over the last axis; leading axes are
independent.  Comparisons run in f32 and ties go to the lower index, so that a
decision never depends on dtype, batch or hardware.  NaN is never selected.
`compact` lists the selected items, which is what the executors need; the
estimators give a hard decision the gradient of a soft one.

Axes: N items, K of them, E experts, G chunks.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from adaptivejax.core.per_device import (
  BATCH_AXES,
  Layout,
  dividing,
  on_each_device,
)


def compact(mask: Bool[Array, " N"]) -> tuple[Int[Array, " N"], Int[Array, ""]]:
  """Lists the selected items in ascending order.

  Args:
    mask: the selection.

  Returns:
    `(order, count)`: `order[:count]` are the selected items, ascending, and
    `order[count:]` repeats the last of them, so that padding is always a live
    item (item 0 if nothing is selected).
  """
  n = mask.shape[0]
  place = jnp.cumsum(mask, dtype=jnp.int32) - 1
  count = mask.sum(dtype=jnp.int32)
  item = jnp.arange(n, dtype=jnp.int32)
  order = (
    jnp.zeros_like(item).at[jnp.where(mask, place, n)].set(item, mode="drop")
  )
  last = jnp.max(jnp.where(mask, item, 0))
  return jnp.where(item < count, order, last), count


def threshold(
  scores: Float[Array, "... N"], level: Float[Array, "..."] | float
) -> Bool[Array, "... N"]:
  """Items of score above `level` (dynamic: one, or one per leading axis)."""
  return scores.astype(jnp.float32) > _setting("level", level, scores)


def top_k(
  scores: Float[Array, "... N"], k: Int[Array, "..."] | int
) -> Bool[Array, "... N"]:
  """The `k` items of highest score (dynamic; more than N means all)."""
  return (_rank(scores) < _setting("k", k, scores)) & ~jnp.isnan(scores)


def best(scores: Float[Array, "... N"], k: int) -> Int[Array, "... K"]:
  """The `k` items of highest score (static) as a list, the best first.

  There are always k: NaN counts as -inf, and -0 as 0.  Under an ambient mesh
  each device ranks its own rows: some compilers would bring all together.
  """
  n = scores.shape[-1]
  if not 1 <= k <= n:
    raise ValueError(f"{k=} must be at least 1 and at most the {n} items.")
  scores = jax.lax.stop_gradient(scores).astype(jnp.float32)
  scores = jnp.where(jnp.isnan(scores), -jnp.inf, scores)
  scores = jnp.where(scores == 0, 0, scores)
  rank = lambda scores, _: (jax.lax.top_k(scores, k)[1], ())
  rows = dividing(BATCH_AXES, scores.shape[0]) if scores.ndim > 1 else ()
  if rows:
    return on_each_device(rank, scores, (), Layout(rows))[0]
  return rank(scores, ())[0]


def top_p(
  weights: Float[Array, "... N"], p: Float[Array, "..."] | float
) -> Bool[Array, "... N"]:
  """The fewest items that hold a share `p` of the total weight, at least one.

  The weights are non-negative and need not sum to one; `p = 1` takes all that
  have any, however small.  Nucleus rule (Holtzman et al., 2020), also the mass
  rule of filter and expert routing.
  """
  p = _setting("p", p, weights)
  w = jnp.maximum(weights.astype(jnp.float32), 0.0)  # NaN stays and ranks last
  order = jnp.argsort(-w, axis=-1, stable=True)
  ranked = jnp.nan_to_num(jnp.take_along_axis(w, order, axis=-1))
  before = jnp.cumsum(ranked, axis=-1) - ranked
  enough = (before >= p * ranked.sum(-1, keepdims=True)) & (p < 1)
  first = jnp.arange(w.shape[-1]) == 0
  keep = jnp.where(first, True, ~enough & (ranked > 0))
  mask = jnp.take_along_axis(keep, _rank(w), axis=-1)
  return mask & ~jnp.isnan(weights)


def expert_choice(
  scores: Float[Array, "... N E"], k: Int[Array, "..."] | int
) -> Bool[Array, "... N E"]:
  """Each expert takes its `k` best items (Zhou et al., 2022); not causal."""
  return jnp.swapaxes(top_k(jnp.swapaxes(scores, -1, -2), k), -1, -2)


def chunk_union(mask: Bool[Array, "N E"], chunk: int) -> Bool[Array, "G E"]:
  """The experts that any item of a chunk selected (BlockFFN, 2025).

  Args:
    mask: item by expert; N need not be a multiple of `chunk`.
    chunk: items per chunk (static).
  """
  if chunk < 1:
    raise ValueError(f"`chunk` must be at least 1 item; got {chunk=}.")
  pad = -mask.shape[0] % chunk
  padded = jnp.pad(mask, ((0, pad), (0, 0)))
  return padded.reshape(-1, chunk, mask.shape[1]).any(1)


def straight_through(
  hard: Float[Array, "..."], soft: Float[Array, "..."]
) -> Float[Array, "..."]:
  """The value of `hard` with the gradient of `soft` (Bengio et al., 2013)."""
  stop = jax.lax.stop_gradient
  return stop(hard) + (soft - stop(soft))  # the last term is exactly 0


def gumbel_softmax(
  logits: Float[Array, "... N"],
  key: Key[Array, ""],
  temperature: Float[Array, ""] | float = 1.0,
) -> Float[Array, "... N"]:
  """A one-hot sample of softmax(`logits`) with straight-through gradient.

  Jang et al., 2017, https://arxiv.org/abs/1611.01144
  """
  noise = jax.random.gumbel(key, logits.shape, jnp.float32)
  soft = jax.nn.softmax((logits + noise) / temperature, axis=-1)
  hard = jax.nn.one_hot(soft.argmax(-1), logits.shape[-1], dtype=soft.dtype)
  return straight_through(hard, soft)


def gumbel_sigmoid(
  logits: Float[Array, "..."],
  key: Key[Array, ""],
  temperature: Float[Array, ""] | float = 1.0,
) -> Float[Array, "..."]:
  """A Bernoulli sample of sigmoid(`logits`), straight-through gradient."""
  noise = jax.random.logistic(key, logits.shape, jnp.float32)
  soft = jax.nn.sigmoid((logits + noise) / temperature)
  return straight_through((soft > 0.5).astype(soft.dtype), soft)


def _setting(name: str, value: Array | float, scores: Array) -> Array:
  """`value`, one for all or one per leading axis, against the item axis."""
  value = jnp.asarray(value)
  if value.shape not in ((), scores.shape[:-1]):
    raise ValueError(
      f"`{name}` must be one number or one per leading axis of the scores,"
      f" {scores.shape[:-1]}; got shape {value.shape}."
    )
  return value[..., None] if value.ndim else value


def _rank(scores: Float[Array, "... N"]) -> Int[Array, "... N"]:
  """Position of each item by falling score; ties by index, NaN last."""
  order = jnp.argsort(
    -scores.astype(jnp.float32), axis=-1, stable=True
  )  # argsort puts NaN last
  return jnp.argsort(order, axis=-1)
