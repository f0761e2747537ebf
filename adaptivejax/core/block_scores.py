# SPDX-License-Identifier: Apache-2.0
"""What blocks, columns and diagonals of attention are worth, estimated cheaply.

Scores are f32 and carry no gradient; a token of position -1 counts nowhere,
whatever it holds.  A *column* is a key that many queries look at, a *slash* a
distance at which they look: the pairs of one offset, query minus key position.

    probe, at = last_queries(q, positions, 64)
    columns, slashes = line_mass(attention_weights(probe, keys, at), at, keys)
    near = slash_blocks(top_k(slashes, 50), positions, keys)

Axes: B batch, T queries, S keys, H query heads, G key heads, D head width, Q
query tiles, K key blocks, M queries of a probe, N items of a selection.
Offsets are as many as keys, S; farther ones count as the last.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from adaptivejax.core.attention import NEVER, Keys
from adaptivejax.core.block_masks import BLOCK, block_extremes, visible_blocks
from adaptivejax.core.per_head import tokens_here
from adaptivejax.core.select import top_p


def pooled_scores(
  q: Float[Array, "B T H D"],
  keys: Keys,
  positions: Int[Array, "B T"],
  *,
  block_q: int = BLOCK,
  block_kv: int = BLOCK,
) -> Float[Array, "B H Q K"]:
  """Score of the mean query of a tile for the mean key of a block.

  Scaled by 1 / sqrt(D), as the scores of attention are.
  """
  place = shared_positions(keys)
  q = _pool(jnp.swapaxes(q, 1, 2), positions, block_q)
  k = _pool(keys.k, place, block_kv)
  by_group = q.reshape(q.shape[0], k.shape[1], -1, *q.shape[2:])
  scores = jnp.einsum("bgrqd,bgkd->bgrqk", by_group, k) / q.shape[-1] ** 0.5
  return scores.reshape(*q.shape[:3], k.shape[2])


def antidiagonal_mass(
  q: Float[Array, "B T H D"],
  keys: Keys,
  positions: Int[Array, "B T"],
  *,
  stride: int,
  block_q: int = BLOCK,
  block_kv: int = BLOCK,
) -> Float[Array, "B H Q K"]:
  """Attention of a tile to each block, estimated from antidiagonals.

  Of `stride` (static) neighbouring queries and as many keys, every antidiagonal
  meets each query and each key once; the mean score along one stands for all.
  Softmax over groups of keys, added up by block and tile.  Tiles are scored one
  by one, so memory is T S / stride^2 of one tile only.

  Raises:
    ValueError: `stride` does not divide the blocks.
  """
  if stride < 1 or block_q % stride or block_kv % stride:
    raise ValueError(f"{stride=} must divide {block_q=} and {block_kv=}.")
  place = shared_positions(keys)
  batch, groups = keys.k.shape[:2]
  tiles = -(-q.shape[1] // block_q)
  blocks = -(-place.shape[1] // block_kv)
  q = _cut(jnp.swapaxes(q, 1, 2), positions, block_q)  # [B, H, Q block_q, D]
  k = _cut(keys.k, place, block_kv)
  q = q.reshape(batch, groups, -1, tiles, block_q // stride, stride, q.shape[3])
  k = k.reshape(batch, groups, -1, stride, k.shape[3])
  pad = lambda a, block: jnp.pad(
    a, ((0, 0), (0, -a.shape[1] % block)), constant_values=-1
  )
  seen = visible_blocks(
    pad(positions, block_q),
    pad(place, block_kv)[:, None],
    block_q=stride,
    block_kv=stride,
  )
  seen = seen.reshape(batch, tiles, -1, seen.shape[-1])
  scale = 1 / (stride * k.shape[-1] ** 0.5)

  def tile(asked):
    q, seen = asked  # [B, G, H/G, U, stride, D], [B, U, N]
    scores = scale * jnp.einsum("bgrutd,bgntd->bgrun", q[..., ::-1, :], k)
    seen = seen[:, None, None]
    weights = jax.nn.softmax(jnp.where(seen, scores, NEVER), axis=-1)
    weights = jnp.where(seen, weights, 0).sum(3)
    return weights.reshape(batch, -1, blocks, block_kv // stride).sum(-1)

  devices = tiles // tokens_here(tiles)
  if devices > 1:  # one tile of each at a time

    def deal(a):
      return jnp.swapaxes(a.reshape(devices, -1, *a.shape[1:]), 0, 1)

    asked = deal(jnp.moveaxis(q, 3, 0)), deal(jnp.moveaxis(seen, 1, 0))
    mass = jnp.swapaxes(lax.map(jax.vmap(tile), asked), 0, 1)
    mass = mass.reshape(tiles, *mass.shape[2:])
  else:
    mass = lax.map(tile, (jnp.moveaxis(q, 3, 0), jnp.moveaxis(seen, 1, 0)))
  return jnp.moveaxis(mass, 0, 2)


def last_queries(
  q: Float[Array, "B T H D"], positions: Int[Array, "B T"], count: int
) -> tuple[Float[Array, "B M H D"], Int[Array, "B M"]]:
  """The last `count` (static) queries by position, or all, and where they are.

  Positions are -1 where a row has fewer.
  """
  at, index = lax.top_k(positions, min(count, positions.shape[1]))
  return jnp.take_along_axis(q, index[..., None, None], axis=1), at


def line_mass(
  weights: Float[Array, "B H M S"], at: Int[Array, "B M"], keys: Keys
) -> tuple[Float[Array, "B H S"], Float[Array, "B H S"]]:
  """Attention along each column and each slash, per query of the probe.

  Args:
    weights: attention of the probe's queries.
    at: their positions.
    keys: what they look at, their positions one run.

  Returns:
    By key and by offset; each adds up to the share of queries that see a key.
  """
  weights = lax.stop_gradient(weights)
  count = jnp.maximum((at >= 0).sum(1), 1)[:, None, None]
  place, size = shared_positions(keys), keys.pos.shape[-1]
  first = _first(place)
  # Columns by falling position: then offset o of a query is column start + o.
  column = size - 1 - (place - first)
  column = jnp.where((place >= 0) & (column >= 0), column, 2 * size)
  rows = jnp.arange(len(place))[:, None]
  line = jnp.zeros((len(place), 2 * size, *weights.shape[1:3]), jnp.float32)
  by_key = jnp.moveaxis(weights, 3, 1)
  line = line.at[rows, column].set(by_key, mode="drop")
  start = jnp.clip(size - 1 - (at - first), 0, size - 1)
  shift = lambda line, start: lax.dynamic_slice_in_dim(line, start, size)
  shift = jax.vmap(jax.vmap(shift, (2, 0), 2))  # [B, S, H, M]
  slashes = jnp.moveaxis(shift(line, start).sum(-1), 1, 2)
  return weights.sum(2) / count, slashes / count


def slash_blocks(
  slashes: Bool[Array, "B H S"],
  positions: Int[Array, "B T"],
  keys: Keys,
  *,
  block_q: int = BLOCK,
  block_kv: int = BLOCK,
) -> Bool[Array, "B H Q K"]:
  """Blocks that hold a pair at one of the chosen offsets.

  Exact where positions are one run; else it may name one in vain.
  """
  first_q, last_q = block_extremes(positions[:, None], block_q)
  first_k, last_k = block_extremes(shared_positions(keys)[:, None], block_kv)
  most = slashes.shape[-1] - 1
  low = jnp.clip(first_q[..., None] - last_k[:, :, None], 0, most)
  high = jnp.clip(last_q[..., None] - first_k[:, :, None], 0, most)
  until = jnp.pad(jnp.cumsum(slashes, -1), ((0, 0), (0, 0), (1, 0)))
  flat = (len(until), 1, low[0].size)
  upto = lambda a: jnp.take_along_axis(until, a.reshape(flat), axis=2)
  hit = upto(high + 1) > upto(low)
  hit = hit.reshape(*slashes.shape[:2], *low.shape[2:])
  return hit & visible_blocks(
    positions, keys.pos[:, :1], block_q=block_q, block_kv=block_kv
  )


def end_blocks(
  positions: Int[Array, "B T"],
  keys: Keys,
  *,
  block_q: int = BLOCK,
  block_kv: int = BLOCK,
) -> Bool[Array, "B 1 Q K"]:
  """The block of the first key, and those of the tile's own tokens."""
  place = shared_positions(keys)
  first = jnp.where(place == _first(place), place, -1)
  blocks = {"block_q": block_q, "block_kv": block_kv}
  sink = visible_blocks(positions, first[:, None], **blocks)
  return sink | visible_blocks(positions, place[:, None], window=1, **blocks)


def fewest_of_mass(
  mass: Float[Array, "... N"],
  p: Float[Array, ""] | float,
  forced: Bool[Array, "... N"],
  allowed: Bool[Array, "... N"],
) -> Bool[Array, "... N"]:
  """The fewest allowed items beside the forced ones that hold a share p.

  Args:
    mass: of each item, not negative.
    p: of all mass (dynamic); 1 takes all that are allowed, whatever their mass.
    forced: items taken in any case; their mass counts.
    allowed: items there are.
  """
  mass = jnp.where(allowed, mass.astype(jnp.float32), 0)
  rest = jnp.where(forced, 0, mass)
  left = rest.sum(-1)
  missing = jnp.asarray(p) * mass.sum(-1) - (mass - rest).sum(-1)
  share = jnp.clip(missing / jnp.where(left > 0, left, 1), 0, 1)
  more = top_p(rest, share) & (missing > 0)[..., None]
  return (forced | more | (jnp.asarray(p) >= 1)) & allowed


def jensen_shannon(
  p: Float[Array, "... N"], q: Float[Array, "... N"]
) -> Float[Array, "..."]:
  """The square root of the Jensen-Shannon divergence, in 0..sqrt(log 2).

  Endres and Schindelin, 2003, https://doi.org/10.1109/TIT.2003.813506
  """
  mean = (p + q) / 2
  safe = lambda a: jnp.where(a > 0, a, 1)
  side = lambda a: jnp.where(a > 0, a * jnp.log(safe(a) / safe(mean)), 0)
  both = (side(p) + side(q)).sum(-1) / 2
  return jnp.sqrt(jnp.maximum(both, 0))


def shared_positions(keys: Keys) -> Int[Array, "B S"]:
  """Positions of the keys.

  Raises:
    ValueError: key heads hold different ones.
  """
  if keys.pos.shape[1] != 1:
    raise ValueError(
      "blocks are scored where all key heads hold the same keys; got positions"
      f" {keys.pos.shape}: choose before keys are evicted."
    )
  return keys.pos[:, 0]


def tokens_before(keys: Keys) -> Int[Array, "B 1 S"]:
  """Tokens before each key; of no key, more than there are."""
  place = shared_positions(keys)
  none = jnp.iinfo(jnp.int32).max
  return jnp.where(place >= 0, place - _first(place), none)[:, None]


def _first(place):
  """The least position there is, i32[B, 1]."""
  none = jnp.iinfo(jnp.int32).max
  return jnp.where(place >= 0, place, none).min(1, keepdims=True)


def _cut(x, place, block):
  """f32, 0 where there is no token, whole blocks: [B, X, M block, D]."""
  x = jnp.where((place >= 0)[:, None, :, None], x.astype(jnp.float32), 0)
  x = jnp.pad(x, ((0, 0), (0, 0), (0, -x.shape[2] % block), (0, 0)))
  return lax.stop_gradient(x)


def _pool(x, place, block):
  """The mean of each block's tokens, f32[B, X, M, D]."""
  there = jnp.pad(place >= 0, ((0, 0), (0, -place.shape[1] % block)))
  count = jnp.maximum(there.reshape(len(place), -1, block).sum(-1), 1)
  total = _cut(x, place, block)
  total = total.reshape(*x.shape[:2], -1, block, x.shape[3]).sum(3)
  return total / count[:, None, :, None]
