# SPDX-License-Identifier: Apache-2.0
"""Conditional efficiency: does `bucketed` cost what was selected?

Efficiency is time(dense) x fraction / time(adaptive), 1 if a quarter of the
rows takes a quarter of the time.  The layer is a residual feed-forward block,
x + gelu(x w1) w2, in f32; masks are random with exactly round(fraction N) rows;
`any` is the mean over fractions spread evenly from 0 to 1.  Forward + backward
is `value_and_grad` for x and both weights.  A case is FEATURES-HIDDEN/N.

    python -m benchmarks.conditional --json out.json
    python -m benchmarks.conditional --cases '512-2048/2048' '*/512'
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from adaptivejax.core import bucketed
from adaptivejax.report.clock import interleave
from benchmarks.harness import Options, Row, main
from benchmarks.measure import compile_seconds, temp_bytes

FRACTIONS = (0.02, 0.05, 0.10, 0.25, 0.50, 0.75, 1.00)
NO_SLOWER = 1 / 1.03
TARGETS = {
  "forward": dict(
    zip(FRACTIONS, [None, 0.75, 0.85] + [0.93] * 3 + [NO_SLOWER])
  ),
  "forward+backward": dict(
    zip(FRACTIONS, [None, 0.7, 0.8] + [0.88] * 3 + [NO_SLOWER])
  ),
}


@dataclasses.dataclass(frozen=True)
class Shape:
  """A feed-forward block on N items; `targets`: the shape that has them."""

  features: int
  hidden: int
  items: int
  targets: bool = False

  @property
  def name(self) -> str:
    """How `--cases` calls it."""
    return f"{self.features}-{self.hidden}/{self.items}"

  def arrays(self, *layers: int) -> tuple[jax.Array, ...]:
    """`x`, `w1`, `w2` and a cotangent; weights with leading axes `layers`."""
    d, f, n = self.features, self.hidden, self.items
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = (n, d), (*layers, d, f), (*layers, f, d), (n, d)
    x, w1, w2, g = (jax.random.normal(k, s) for k, s in zip(keys, shapes))
    return x, w1 / math.sqrt(d), w2 / math.sqrt(f), g


def ffn(x, w1, w2):
  return x + jax.nn.gelu(x @ w1) @ w2


def dense(mask, x, w1, w2):
  del mask
  return ffn(x, w1, w2)


def adaptive(mask, x, w1, w2):
  return bucketed(ffn, x, mask, w1, w2)[0]


def forward(layer: Callable[..., Any]) -> Callable[..., Any]:
  return lambda mask, x, w1, w2, g: layer(mask, x, w1, w2)


def backward(layer: Callable[..., Any]) -> Callable[..., Any]:
  def loss(mask, x, w1, w2, g):
    return jnp.vdot(layer(mask, x, w1, w2), g)

  return jax.value_and_grad(loss, argnums=(1, 2, 3))


def stack(layer: Callable[..., Any]) -> Callable[..., Any]:
  """The layer scanned over stacked weights."""

  def run(mask, x, w1, w2):
    step = lambda x, w: (layer(mask, x, *w), None)
    return jax.lax.scan(step, x, (w1, w2))[0]

  return run


def select(fraction: float, items: int, seed: int) -> tuple[jax.Array, float]:
  """A random mask of `fraction` of the items, and the fraction it really is."""
  count = max(1, round(fraction * items))
  mask = np.random.default_rng(seed).permutation(items) < count
  return jnp.asarray(mask), count / items


def efficiency(shape: Shape, kind: str, seconds: float) -> Iterator[Row]:
  """One row for each fraction, one for `any`, and the number of traces."""
  wrap = {"forward": forward, "forward+backward": backward}[kind]
  arrays, traces = shape.arrays(), []

  def traced(*args):
    traces.append(None)
    return wrap(adaptive)(*args)

  plain, ours = jax.jit(wrap(dense)), jax.jit(traced)
  fixed = [[select(p, shape.items, seed=0)] for p in FRACTIONS]
  golden = (math.sqrt(5) - 1) / 2  # its multiples mod 1 fill (0, 1) evenly
  spread = [
    select((i + 0.5) * golden % 1, shape.items, seed=i) for i in range(32)
  ]
  masks = fixed + [spread]
  base = lambda _: plain(masks[0][0][0], *arrays)
  calls = [functools.partial(_on, ours, arrays, choice) for choice in masks]
  # Pairs where there is a target; elsewhere the fractions share one dense run.
  each = list(range(len(masks)))
  groups = [[i] for i in each] if shape.targets else [each]
  for group in groups:
    times = interleave(
      [base] + [calls[i] for i in group], seconds=seconds / len(groups), least=3
    )
    for i, ours_times in zip(group, times[1:]):
      rates = [
        a * masks[i][r % len(masks[i])][1] / b
        for r, (a, b) in enumerate(zip(times[0], ours_times))
      ]
      yield _row(shape, kind, i, rates)
  target = 1 if shape.targets else None
  name = f"{kind} traces"
  yield Row.of(shape.name, name, [len(traces)], target=target, better="lower")


def _on(step, arrays, masks, i):
  return step(masks[i % len(masks)][0], *arrays)


def _row(shape: Shape, kind: str, index: int, rates: list[float]) -> Row:
  if index == len(FRACTIONS):
    row = Row.of(shape.name, f"{kind} efficiency, any", rates)
    return dataclasses.replace(row, value=float(np.mean(rates)))
  fraction = FRACTIONS[index]
  name = f"{kind} efficiency at {fraction:.0%}"
  target = TARGETS[kind][fraction] if shape.targets else None
  return Row.of(shape.name, name, rates, target=target)


def resources(shape: Shape, layers: int, seconds: float) -> Iterator[Row]:
  """Backward memory and compile time against dense; `stack`: scanned layers."""
  goal = lambda value: value if shape.targets else None
  case = f"{layers} x {shape.name}"
  mask = jax.ShapeDtypeStruct((shape.items,), bool)
  one = [backward(layer) for layer in (dense, adaptive)]
  many = [backward(stack(layer)) for layer in (dense, adaptive)]
  for steps, depth in (one, ()), (many, (layers,)):
    args = (mask, *jax.eval_shape(functools.partial(shape.arrays, *depth)))
    plain, ours = (temp_bytes(step, *args) for step in steps)
    name = f"backward memory / dense, {'stack' if depth else 'one layer'}"
    yield Row.of(case, name, [ours / plain], target=goal(1.05), better="lower")
  times = compile_seconds(many, *args, seconds=seconds)
  ratios = [ours / plain for plain, ours in zip(*times)]
  name = "compile time / dense, stack"
  yield Row.of(case, name, ratios, target=goal(3), better="lower")


def rows(options: Options) -> Iterator[Row]:
  if options.quick:
    shapes = [Shape(64, 256, 128), Shape(64, 256, 257)]
    layers, seconds, depth = [shapes[0]], 0.0, 2
  else:
    shapes = [
      Shape(d, 4 * d, n, targets=(d, n) == (512, 2048))
      for d in (256, 512, 1024)
      for n in (512, 2048, 8192)
    ]
    layers, seconds, depth = [s for s in shapes if s.targets], 8.0, 12
  named = {shape.name: shape for shape in shapes}
  scanned = {f"{depth} x {shape.name}": shape for shape in layers}
  for name in options.select([*named, *scanned]):
    if name in scanned:
      yield from resources(scanned[name], depth, seconds)
    else:
      for kind in TARGETS:
        long = 5 if named[name].targets else 1
        yield from efficiency(named[name], kind, long * seconds)


if __name__ == "__main__":
  main(__doc__, rows)
