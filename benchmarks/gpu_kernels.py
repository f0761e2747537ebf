# SPDX-License-Identifier: Apache-2.0
"""The Hopper kernels on a Hopper GPU, against what its libraries do.

All in bf16.  Experts: a layer D - F - D with GELU as in `benchmarks.experts`,
router, dispatch and combination included; `of dense` is the time of one dense
layer on T k rows over that of the mixture (1 is ideal), `x chunks` and `x
ragged_dot` how much longer the XLA forms take, `f` in chunks or the product of
XLA.  One layer: gather, feed-forward, scatter of a share of the rows through a
product of one group, of which the GPU and not the host reads the number of
rows; `of dense` is time(dense) x share / time.  Attention: lists of blocks, `x
cudnn` is the time of cuDNN's attention over all keys (causal if the lists are)
over that of the kernel, `x xla` that of the XLA form over the same lists.

Nothing is measured, and said, where there is no Hopper GPU.

    python -m benchmarks.gpu_kernels --json out.json
"""

import dataclasses
import functools
import sys
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from adaptivejax.core import compact, dispatch, expert_apply
from adaptivejax.report.clock import interleave
from benchmarks import experts
from benchmarks.harness import Options, Row, main
from pallas_kernels.block_sparse_attention import gpu, specs, xla
from pallas_kernels.block_sparse_attention.types import UNMARKED
from pallas_kernels.grouped_matmul import gpu as grouped
from pallas_kernels.mosaic_gpu import on_hopper, too_old

BEDS = (
  experts.Bed(8, 8192, 1024, 4096, 2),
  experts.Bed(32, 8192, 1024, 1024, 4),
  experts.Bed(64, 8192, 2048, 1408, 6),
  experts.Bed(128, 8192, 2048, 768, 8),
)
LAYERS = ((512, 2048, 2048), (1024, 4096, 8192), (2048, 8192, 16384))
SHARES = (0.1, 0.25, 0.5, 1.0)
LISTS = tuple(
  dataclasses.replace(spec, heads=8, key_heads=2)
  for spec in (specs.FINE, specs.COARSE, specs.DENSE)
) + (dataclasses.replace(specs.LONG, tokens=32768),)
RUN = 20
"""Calls of a timing: they are queued, so that the host is not what is timed."""


def halved(tree: Any) -> Any:
  return jax.tree.map(lambda a: a.astype(jnp.bfloat16), tree)


def queued(f: Callable[..., Any], *args: Any) -> Callable[[int], Any]:
  """Compiled, and called `RUN` times."""
  f = jax.jit(f)
  return lambda _: [f(*args) for _ in range(RUN)][-1]


def against(
  case: str, sides: dict[str, Callable[[int], Any]], seconds: float
) -> Iterator[Row]:
  """Each side's time over that of the last."""
  *others, ours = interleave(list(sides.values()), seconds=seconds)
  for name, times in zip(sides, others):
    yield Row.of(case, name, [a / b for a, b in zip(times, ours)])


def close(got: Any, want: Any) -> None:
  """As far as bf16 goes."""
  got, want = (np.asarray(a, np.float64) for a in (got, want))
  error = np.linalg.norm(got - want) / np.linalg.norm(want)
  assert error < 5e-3, error


def mixture(x, params, chosen, *, kernel: bool):
  """`benchmarks.experts.mixture`, by the kernel or in chunks."""
  router, *rest = params
  gates = jax.nn.softmax((x @ router).astype(jnp.float32))
  weights = jnp.take_along_axis(gates, chosen, axis=1).astype(x.dtype)
  plan = dispatch(chosen, weights, router.shape[1])
  f = lambda rows, p: experts.ffn(rows, *p)
  together = lambda rows, p, product: product(
    jax.nn.gelu(product(rows, p[0])), p[1]
  )
  whole = together if kernel else None
  return expert_apply(f, x, plan, tuple(rest), together=whole)[0]


def gradient(f: Callable[..., Any]) -> Callable[..., Any]:
  """By the items and all weights."""

  def loss(x, params, *rest):
    return jnp.sin(f(x, params, *rest).astype(jnp.float32)).sum()

  return jax.grad(loss, argnums=(0, 1))


def mixtures(bed: experts.Bed, seconds: float) -> Iterator[Row]:
  x, params = halved((bed.x, bed.params))
  route, skewed = bed.route(False), bed.route(True)
  rows, one = jnp.tile(x, (bed.k, 1)), tuple(a[0] for a in params[1:])
  dense = lambda x, p: experts.ffn(x, *p)
  ours, chunks = (functools.partial(mixture, kernel=k) for k in (True, False))
  ragged = functools.partial(experts.ragged, lax.ragged_dot)
  close(*(jax.jit(f)(x, params, skewed) for f in (ours, chunks)))
  few = bed.experts <= 32  # with more the XLA forms take long
  for name, wrap in (("forward", lambda f: f), ("forward+backward", gradient)):
    sides = {f"{name}, of dense": queued(wrap(dense), rows, one)}
    if few:
      sides |= {
        f"{name}, x chunks": queued(wrap(chunks), x, params, route),
        f"{name}, x ragged_dot": queued(wrap(ragged), x, params, route),
      }
    sides[f"{name}, skewed"] = queued(wrap(ours), x, params, skewed)
    sides["ours"] = queued(wrap(ours), x, params, route)
    yield from against(
      f"{bed.name} {bed.features}-{bed.hidden}", sides, seconds
    )


def one_group(mask, x, up, down):
  """A residual layer on the chosen rows."""
  order, count = compact(mask)
  rows = x.at[order].get(mode="clip")
  sizes = count[None].astype(jnp.int32)
  hidden = jax.nn.gelu(grouped.grouped_matmul(rows, up[None], sizes))
  y = rows + grouped.grouped_matmul(hidden, down[None], sizes)
  to = jnp.where(jnp.arange(len(x)) < count, order, len(x))
  return x.at[to].set(y, mode="drop")


def layers(shape: tuple[int, int, int], seconds: float) -> Iterator[Row]:
  features, hidden, items = shape
  bed = experts.Bed(1, items, features, hidden, 1)
  x, (_, up, down) = halved((bed.x, bed.params))
  up, down = up[0], down[0]
  dense = lambda mask, x, up, down: x + experts.ffn(x, up, down)
  masks = [
    jnp.asarray(np.random.default_rng(0).permutation(items) < share * items)
    for share in SHARES
  ]
  close(*(jax.jit(f)(masks[-1], x, up, down) for f in (one_group, dense)))
  full, *ours = interleave(
    [queued(dense, masks[0], x, up, down)]
    + [queued(one_group, mask, x, up, down) for mask in masks],
    seconds=seconds,
  )
  for share, times in zip(SHARES, ours):
    rates = [share * a / b for a, b in zip(full, times)]
    name = f"{features}-{hidden}/{items}"
    yield Row.of(name, f"one layer, of dense at {share:.0%}", rates)


def attention(spec: specs.Spec, seconds: float) -> Iterator[Row]:
  draw = lambda i, heads: jax.random.normal(
    jax.random.key(i), (1, heads, spec.tokens, spec.width), jnp.bfloat16
  )
  q, k, v = (
    draw(0, spec.heads),
    draw(1, spec.key_heads),
    draw(2, spec.key_heads),
  )
  lists, rule = spec.lists(), spec.rule
  ours = lambda q, k, v: gpu.forward(q, k, v, lists, rule=rule).out
  slow = lambda q, k, v: xla.forward(q, k, v, lists, UNMARKED, rule).out
  swap = lambda a: a.swapaxes(1, 2)
  cudnn = lambda q, k, v: jax.nn.dot_product_attention(
    swap(q), swap(k), swap(v), is_causal=rule.causal, implementation="cudnn"
  )
  close(jax.jit(ours)(q, k, v), jax.jit(slow)(q, k, v))
  name = f"{spec.name}, {spec.tokens} tokens"
  sides = {
    "x cudnn": queued(cudnn, q, k, v),
    "x xla": queued(slow, q, k, v),
    "ours": queued(ours, q, k, v),
  }
  yield from against(name, sides, seconds)
  (times,) = interleave([sides["ours"]], seconds=seconds / 4)
  flops = spec.squares * 128 * 128 * spec.width * 4 * spec.heads
  yield Row.of(name, "TFLOP/s", [RUN * flops / t / 1e12 for t in times])


def rows(options: Options) -> Iterator[Row]:
  if reason := too_old() or (None if on_hopper() else "no Hopper GPU here"):
    print(f"gpu_kernels: nothing measured: {reason}", file=sys.stderr)
    return
  seconds = 0.0 if options.quick else 3.0
  parts: dict[str, Callable[[], Iterator[Row]]] = {}
  part = functools.partial
  for spec in LISTS:
    parts[f"attention, {spec.name}"] = part(attention, spec, seconds)
  for bed in BEDS:
    parts[f"{bed.name}"] = part(mixtures, bed, seconds)
  for shape in LAYERS:
    parts[f"one layer, {shape[2]} rows"] = part(layers, shape, seconds)
  for name in options.select(parts):
    yield from parts[name]()


if __name__ == "__main__":
  main(__doc__, rows)
