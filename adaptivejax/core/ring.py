# SPDX-License-Identifier: Apache-2.0
r"""Ring attention: queries stay on their device, keys and values go round.

Liu et al., 2023, https://arxiv.org/abs/2310.01889

Inside `jax.shard_map` each of n devices of a mesh axis holds a shard of a
sequence: its queries, keys and values.  In n turns the keys visit all devices,
each sending what it has to the next while it computes.  A visit is attention of
the device's queries to the visiting keys, by the kernel that attends on one
device; visits are joined by their log-sum-exp (`merge_lse`):

    out = sum_i exp(lse_i - lse) out_i,    lse = log sum_i exp(lse_i)

* Memory is that of two shards of keys, and backward of their gradients in f32
  besides: it needs `out` and `lse` of the whole only, so it sends the keys
  round again, their gradients with them, and adds what each visit gives.
* Keys travel n times, not n - 1: the last brings them home, so that one body
  serves all turns.
* A visit with nothing to see, all of it later than the queries or in no list,
  is skipped: a conditional around the computing, with no collective in it.
* Nothing hangs: all devices take n turns, whatever they skip, and wait for one
  another in each.

So a turn takes as long as the visit that computes most.  Of a causal text laid
out in order that is a whole shard in every turn; `core.stripes` halves it.

Axes: B batch, H query heads, G key heads, T queries and S keys of this device,
D and E widths, P key heads that own marks (1 or G), L heads that own a list, Q
query tiles, C entries of a list.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from adaptivejax.core.block_lists import lists_from_mask, lists_within
from adaptivejax.core.block_masks import BLOCK, visible_blocks
from adaptivejax.core.varying import vary, varying_axes
from pallas_kernels.block_sparse_attention import (
  Attended,
  BlockLists,
  Marks,
  Rule,
  block_sparse_attention,
  block_sparse_gradient,
  merge_lse,
)


class Visitor(NamedTuple):
  """A shard of keys, which travels.

  Attributes:
    k, v: f[B, G, S, D] and f[B, G, S, E].
    pos: i32[B, P, S].
    segment: i32[B, S], or None.
    bias: f32[B, P, S], or None.
  """

  k: Array
  v: Array
  pos: Array
  segment: Array | None
  bias: Array | None


class Host(NamedTuple):
  """What a device knows of its queries, and keeps.

  Attributes:
    lists: blocks of the whole sequence; None for all that is visible.
    pos: i32[B, T].
    segment: i32[B, T], or None.
  """

  lists: BlockLists | None
  pos: Array
  segment: Array | None


def ring_attention(
  q: Array,
  k: Array,
  v: Array,
  lists: BlockLists | None,
  marks: Marks,
  rule: Rule,
  *,
  axis: str,
) -> Attended:
  """`block_sparse_attention` inside `shard_map`, the sequence over `axis`.

  Args:
    q: queries of this device, f[B, H, T, D].
    k, v: its keys and values, f[B, G, S, D] and f[B, G, S, E].
    lists: which blocks of the whole sequence, counted from its beginning, each
      of its tiles looks at; None for all that positions let it see.
    marks: of its queries and keys; both positions must be given.
    rule: as there (static).
    axis: mesh axis over which the sequence is split, in equal shards (static).

  Returns:
    `out` and `lse`, differentiable once and in reverse mode.

  Raises:
    ValueError: positions are missing; a shard does not hold whole blocks.
  """
  if marks.q_pos is None or marks.kv_pos is None:
    raise ValueError(
      "the positions of queries and keys must be given: those of a shard do not"
      " begin at 0."
    )
  _check_blocks(q, k, lists, axis)
  host = Host(lists, marks.q_pos, marks.q_segment)
  bias = marks.kv_bias
  if bias is not None:  # its gradient is that of each row
    bias = jnp.broadcast_to(bias, (len(k), *bias.shape[1:]))
  visitor = Visitor(k, v, marks.kv_pos, marks.kv_segment, bias)
  axes = varying_axes(lax.axis_index(axis), q, host, visitor)
  out, lse = _ring((rule, axis), *vary((q, visitor, host), axes))
  if marks.sinks is not None:
    out, lse = _with_sinks(out, lse, marks.sinks)
  return Attended(out, lse)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _ring(how, q, visitor: Visitor, host: Host) -> tuple[Array, Array]:
  """`(out f[B, H, T, E], lse f32[B, H, T])` of queries to all visitors."""
  rule, axis = how

  def visit(visitor, source, carried, found):
    def attend(lists):
      marks = _marks(visitor, host)
      new = block_sparse_attention(q, visitor.k, visitor.v, lists, marks, rule)
      outs = jnp.stack([found[0], new.out.astype(jnp.float32)])
      return merge_lse(outs, jnp.stack([found[1], new.lse]))

    return carried, _if_seen(rule, visitor, host, source, attend, found)

  full = functools.partial(jnp.full_like, q, dtype=jnp.float32)
  shape = *q.shape[:3], visitor.v.shape[3]
  start = full(0, shape=shape), full(-jnp.inf, shape=shape[:3])
  _, (out, lse) = _go_round(axis, visitor, (), start, visit)
  return out.astype(q.dtype), lse


def _ring_forward(how, q, visitor, host):
  out, lse = _ring(how, q, visitor, host)
  return (out, lse), (q, visitor, host, out, lse)


def _ring_backward(how, residuals, cotangents):
  (rule, axis), (q, visitor, host, out, lse) = how, residuals
  dout, dlse = cotangents

  def visit(visitor, source, carried, dq):
    """`carried` are the gradients of the visitor's `(k, v, bias)`."""

    def attend(lists):
      marks = _marks(visitor, host)
      part, *more = block_sparse_gradient(
        q, visitor.k, visitor.v, lists, marks, rule, out, lse, dout, dlse
      )
      add = lambda total, new: total + new.astype(jnp.float32)
      return jax.tree.map(add, (carried, dq), (tuple(more), part))

    return _if_seen(rule, visitor, host, source, attend, (carried, dq))

  moving = visitor.k, visitor.v, visitor.bias
  zeros = lambda a: jnp.zeros_like(a, jnp.float32)
  carried, dq = jax.tree.map(zeros, (moving, q))
  moved, dq = _go_round(axis, visitor, carried, dq, visit)
  of_type = lambda total, a: total.astype(a.dtype)
  dk, dv, dbias = jax.tree.map(of_type, moved, moving)
  none: Any = None
  return dq.astype(q.dtype), Visitor(dk, dv, none, none, dbias), None


_ring.defvjp(_ring_forward, _ring_backward)


def _go_round(
  axis: str,
  visitor: Visitor,
  carried: Any,
  state: Any,
  visit: Callable[..., tuple[Any, Any]],
) -> tuple[Any, Any]:
  """All shards visit this device, its own first; they come home at the end.

  Args:
    axis: of the ring.
    visitor: the shard of this device.
    carried: what travels with a shard and is changed by visits.
    state: what stays.
    visit: `(visitor, source, carried, state) -> (carried, state)`, `source`
      being the device that the visitor is of.

  Returns:
    `(carried, state)`, what was carried with the shard of this device.
  """
  devices, here = lax.axis_size(axis), lax.axis_index(axis)
  to = [(i, (i + 1) % devices) for i in range(devices)]
  send = lambda tree: jax.tree.map(lambda a: lax.ppermute(a, axis, to), tree)

  def turn(i, held):
    visitor, carried, state = held
    coming = send(visitor)  # while this one is looked at
    source = lax.rem(here + devices - i, jnp.int32(devices))
    carried, state = visit(visitor, source, carried, state)
    return coming, send(carried), state

  _, carried, state = lax.fori_loop(0, devices, turn, (visitor, carried, state))
  return carried, state


def _if_seen(rule, visitor, host, source, attend, state) -> Any:
  """`attend(lists)` of what the visitor holds, `state` if that is nothing."""
  queries, keys = host.pos.shape[1], visitor.pos.shape[2]
  how = {"causal": rule.causal, "window": rule.window}
  if host.lists is None:
    sizes = {"block_q": min(BLOCK, queries), "block_kv": min(BLOCK, keys)}
    seen = visible_blocks(host.pos, visitor.pos, **sizes, **how)
    lists = lists_from_mask(seen, **sizes)
  else:
    sizes = {"block_q": queries, "block_kv": keys}
    seen = visible_blocks(host.pos, visitor.pos, **sizes, **how)
    blocks = keys // host.lists.block_kv
    lists = lists_within(host.lists, source * blocks, blocks)
  wanted = seen.any() & (lists.count > 0).any()
  return lax.cond(wanted, attend, lambda _: state, lists)


def _with_sinks(out, lse, sinks):
  """A sink is a key of value 0; a row that is NaN gives it no gradient."""
  broken = jnp.isnan(lse)
  out, lse = jnp.where(broken[..., None], 0, out), jnp.where(broken, 0, lse)
  sinks = jnp.broadcast_to(sinks.astype(jnp.float32)[:, None], lse.shape)
  parts = jnp.stack([out, jnp.zeros_like(out)]), jnp.stack([lse, sinks])
  out, lse = merge_lse(*parts)
  nan = jnp.nan
  return jnp.where(broken[..., None], nan, out), jnp.where(broken, nan, lse)


def _marks(visitor: Visitor, host: Host) -> Marks:
  return Marks(
    q_pos=host.pos,
    kv_pos=visitor.pos,
    q_segment=host.segment,
    kv_segment=visitor.segment,
    kv_bias=visitor.bias,
  )


def _check_blocks(q, k, lists, axis) -> None:
  if lists is None:
    return
  for name, tokens, size in (
    ("queries", q.shape[2], lists.block_q),
    ("keys", k.shape[2], lists.block_kv),
  ):
    if tokens % size:
      raise ValueError(
        f"each device of mesh axis `{axis}` holds {tokens} {name}, which blocks"
        f" of {size} do not divide: take blocks that do, or fewer devices."
      )
