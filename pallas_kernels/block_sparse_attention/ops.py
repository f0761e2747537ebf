# SPDX-License-Identifier: Apache-2.0
"""The public block-sparse attention: checks, derivatives and batching.

Axes: as in `types`.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_batching import custom_vmap

from pallas_kernels.block_sparse_attention import gpu, tpu, tpu_backward, xla
from pallas_kernels.block_sparse_attention.types import (
  CAUSAL,
  UNMARKED,
  Attended,
  BlockLists,
  Marks,
  Rule,
)
from pallas_kernels.mosaic_gpu import on_hopper
from pallas_kernels.varying import alike, axes_of


def block_sparse_attention(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  lists: BlockLists,
  marks: Marks = UNMARKED,
  rule: Rule = CAUSAL,
  *,
  mass: bool = False,
) -> Attended:
  """Softmax attention of each query over the visible keys of its blocks.

  Time and memory follow what the lists count.  Differentiable in `q`, `k`, `v`,
  `kv_bias` and `sinks`, by `out` and `lse`, once and in reverse mode.  Under
  `vmap` the mapped axis joins B; where it maps `sinks`, it is a loop.

  A key is as if it were not there for a query that does not see it, NaN
  included; a query that sees a key or value that is not finite gets NaN in
  `out` and `lse`, and gives no gradient.

  Args:
    q: queries, [B, H, T, D].
    k: keys, [B, G, S, D]; G divides H.
    v: values, [B, G, S, E].
    lists, marks, rule: see `types`; arrays whose B is 1 serve all.
    mass: return the attention that each listed block got.

  Raises:
    ValueError: shapes or dtypes do not fit together.
  """
  _check(q, k, v, lists, marks, rule)
  batch = q.shape[0]
  marks = marks._replace(
    **{
      name: jnp.broadcast_to(a, (batch, *a.shape[1:]))
      for name, a in marks._asdict().items()
      if a is not None and name != "sinks"
    }
  )
  operands = alike((q, k, v, lists, marks))
  return _attention((rule, mass), *operands)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(how, q, k, v, lists, marks):
  return _folded(functools.partial(_forward, *how))(q, k, v, lists, marks)


def _attention_forward(how, *operands):
  found = _attention(how, *operands)
  return found, (*operands, found.out, found.lse)


def _attention_backward(how, residuals, cotangents):
  *arrays, marks, out, lse = residuals
  dout, dlse = cotangents.out, cotangents.lse
  dsinks = None
  if marks.sinks is not None:  # they are in `lse`, for all that follows
    live, sinks = jnp.isfinite(lse), marks.sinks.astype(jnp.float32)[:, None]
    share = jnp.exp(jnp.where(live, sinks - lse, -jnp.inf))
    gain = dlse - jnp.einsum("bhte,bhte->bht", out, dout).astype(jnp.float32)
    dsinks = jnp.where(live, share * gain, 0).sum((0, 2))
    dsinks = dsinks.astype(marks.sinks.dtype)
    marks = marks._replace(sinks=None)
  run = _folded(functools.partial(_backward, how[0]))
  *d, dbias = run(*arrays, marks, out, lse, dout, dlse)
  return *d, None, Marks(kv_bias=dbias, sinks=dsinks)


_attention.defvjp(_attention_forward, _attention_backward)


def _forward(rule, mass, q, k, v, lists, marks):
  """For kernels, NaN moves from values to keys: who sees it meets it."""
  how = {"rule": rule, "mass": mass}

  def cleaned(kernel):
    def run(q, k, v, lists, marks):
      bad = _bad(k, v)
      k, v = jnp.where(bad, jnp.nan, k), jnp.where(bad, 0, v)
      return kernel(q, k, v, lists, marks, **how)

    return run

  on_gpu = None
  if not gpu.unfit(q, k, v, lists, **how) and on_hopper():
    on_gpu = cleaned(gpu.forward)
  default = functools.partial(xla.forward, **how)
  operands = q, k, v, lists, marks
  return _run(cleaned(tpu.forward), on_gpu, default, *operands)


def _backward(rule, q, k, v, lists, marks, out, lse, dout, dlse):
  """A row whose `lse` is not finite gives no gradient."""
  if marks.kv_bias is not None:
    bias = marks.kv_bias
    marks = marks._replace(kv_bias=jnp.where(jnp.isnan(bias), 0, bias))

  def on_tpu(q, k, v, lists, marks, out, lse, dout, dlse):
    """Given what is finite, but for `lse`."""
    bad = _bad(k, v)
    k, v = jnp.where(bad, 0, k), jnp.where(bad, 0, v)
    if marks.q_pos is not None:
      lse = jnp.where((marks.q_pos >= 0)[:, None], lse, -jnp.inf)
    live = jnp.isfinite(lse)
    q, out, dout = (jnp.where(live[..., None], a, 0) for a in (q, out, dout))
    operands = q, k, v, lists, marks, rule, out, lse, dout, dlse
    return tpu_backward.backward(*operands)[:4]

  def default(q, k, v, lists, marks, *found):
    operands = q, k, v, lists, marks, rule, *found
    return xla.backward(*operands)

  found = out, lse, dout, dlse
  return _run(on_tpu, None, default, q, k, v, lists, marks, *found)


def _run(on_tpu, on_gpu, default, *operands):
  """A kernel where there is one that takes these arrays; XLA elsewhere.

  In `shard_map` that of GPUs does not say over which axes its results differ.
  """
  kernels = {"cuda": on_gpu} if on_gpu and not axes_of(operands) else {}
  if not tpu.unfit(*operands[:5]):
    kernels["tpu"] = on_tpu
  if not kernels:
    return default(*operands)
  return lax.platform_dependent(*operands, default=default, **kernels)


def _bad(k, v):
  """Keys that are not finite, or whose value is not, bool[B, G, S, 1]."""
  fine = lambda a: jnp.isfinite(a).all(-1, keepdims=True)
  return ~(fine(k) & fine(v))


def _folded(f: Callable) -> Callable:
  """`f(q, k, v, lists, marks, ...)`, its batch made part of B under `vmap`."""
  op = custom_vmap(f)

  @op.def_vmap
  def rule(size, batched, *args):
    if batched[4].sinks:
      return _loop(op, size, batched, args)
    batch = args[0].shape[1 if batched[0] else 0]

    def fold(a, mapped):
      if not mapped and a.shape[0] != batch:
        return a  # lists that serve all
      if not mapped:
        a = jnp.broadcast_to(a, (size, *a.shape))
      a = jnp.broadcast_to(a, (size, batch, *a.shape[2:]))
      return a.reshape(size * batch, *a.shape[2:])

    sinks = args[4].sinks
    bare = lambda marks: marks._replace(sinks=None)
    q, k, v, lists, marks, *rest = jax.tree.map(
      fold,
      (*args[:4], bare(args[4]), *args[5:]),
      (*batched[:4], bare(batched[4]), *batched[5:]),
    )
    found = op(q, k, v, lists, marks._replace(sinks=sinks), *rest)
    found = jax.tree.map(lambda a: a.reshape(size, batch, *a.shape[1:]), found)
    return found, jax.tree.map(lambda _: True, found)

  return op


def _loop(op, size, batched, args):
  """One example after the other."""
  del size
  flags, leaves = jax.tree.leaves(tuple(batched)), jax.tree.leaves(args)
  tree = jax.tree.structure(args)

  def one(mapped):
    mapped = iter(mapped)
    filled = [next(mapped) if b else a for a, b in zip(leaves, flags)]
    return op(*jax.tree.unflatten(tree, filled))

  found = lax.map(one, [a for a, b in zip(leaves, flags) if b])
  return found, jax.tree.map(lambda _: True, found)


def _check(q, k, v, lists, marks, rule):
  """Raises where shapes, dtypes or settings do not fit together."""
  if not q.ndim == k.ndim == v.ndim == 4 or 0 in (q.size, k.size, v.size):
    raise ValueError(
      "q is [B, H, T, D], k [B, G, S, D] and v [B, G, S, E], none empty; got"
      f" {q.shape}, {k.shape} and {v.shape}"
    )
  (batch, heads, queries, width), (_, groups, keys, _) = q.shape, k.shape
  if k.shape[::3] != (batch, width) or v.shape[:3] != k.shape[:3]:
    raise ValueError(
      "q [B, H, T, D], k [B, G, S, D] and v [B, G, S, E] must agree in B, G, S"
      f" and D; got {q.shape}, {k.shape} and {v.shape}"
    )
  if heads % groups:
    raise ValueError(
      f"the {groups} key heads of k{k.shape} must divide the {heads} query"
      f" heads of q{q.shape}"
    )
  for name, a in (("q", q), ("k", k), ("v", v)):
    if not jnp.issubdtype(a.dtype, jnp.floating):
      raise ValueError(f"{name} must be floating; got {a.dtype}")
  _check_lists(lists, batch, {1, groups, heads}, queries)
  batches, owners = {1, batch}, {1, groups}
  _check_mark("q_pos", marks.q_pos, (batches, {queries}), jnp.integer)
  _check_mark("kv_pos", marks.kv_pos, (batches, owners, {keys}), jnp.integer)
  _check_mark("q_segment", marks.q_segment, (batches, {queries}), jnp.integer)
  _check_mark("kv_segment", marks.kv_segment, (batches, {keys}), jnp.integer)
  _check_mark("kv_bias", marks.kv_bias, (batches, owners, {keys}), jnp.floating)
  _check_mark("sinks", marks.sinks, ({heads},), jnp.floating)
  if (marks.q_segment is None) != (marks.kv_segment is None):
    raise ValueError("q_segment and kv_segment belong together: give both")
  if rule.window is not None and rule.window < 1:
    raise ValueError(f"window must be at least 1 key; got {rule.window}")
  if rule.softcap is not None and rule.softcap <= 0:
    raise ValueError(f"softcap must be positive; got {rule.softcap}")


def _check_lists(lists, batch, owners, queries):
  if lists.block_q < 1 or lists.block_kv < 1:
    raise ValueError(
      f"{lists.block_q=} and {lists.block_kv=} must be at least 1"
    )
  shape, tiles = lists.index.shape, -(-queries // lists.block_q)
  fits = len(shape) == 4 and shape[0] in {1, batch} and shape[1] in owners
  if not fits or shape[2] != tiles or not shape[3]:
    raise ValueError(
      f"lists.index is [B or 1, L, Q, C] with B = {batch}, L in"
      f" {sorted(owners)} and Q = {tiles} tiles of {lists.block_q} for the"
      f" {queries} queries; got {shape}"
    )
  if lists.count.shape != shape[:3]:
    raise ValueError(
      f"lists.count must be {shape[:3]}; got {lists.count.shape}"
    )
  for name, a in (("index", lists.index), ("count", lists.count)):
    if not jnp.issubdtype(a.dtype, jnp.integer):
      raise ValueError(f"lists.{name} must be integers; got {a.dtype}")
  rows = lists.rows
  if rows is not None:
    want = (*shape, lists.block_q)
    if rows.shape != want or rows.dtype != jnp.bool_:
      raise ValueError(
        f"lists.rows must be bool{want}; got {rows.dtype}{rows.shape}"
      )


def _check_mark(name, a, shape, dtype):
  if a is None:
    return
  fits = a.ndim == len(shape) and all(n in s for n, s in zip(a.shape, shape))
  if not fits or not jnp.issubdtype(a.dtype, dtype):
    want = ", ".join(" or ".join(map(str, sorted(s))) for s in shape)
    raise ValueError(
      f"{name} must be {dtype.__name__} of shape [{want}]; got {a.dtype} of"
      f" {a.shape}"
    )
