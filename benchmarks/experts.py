# SPDX-License-Identifier: Apache-2.0
"""Experts: does a mixture cost what its rows cost?

The measure is the dense equivalent: one feed-forward layer, D - F - D with
GELU, in f32, on T x k rows.  `of dense` is its time over that of the mixture of
E experts, router, dispatch and combination included, in the same rounds; 1 is
ideal.  Routes are balanced, or Zipf-distributed (`skewed`: the time over that
of the balanced route).  Forward + backward is the gradient by the items, the
experts and the router.  A case is `E experts, top-k`.

`ragged_dot` does the same with `lax.ragged_dot`, forward.  `fewer rows`: a
share of the choices goes to experts that cost nothing; the time over that of
all rows, beside the share that `Cost` says was spent.  `torch`: the eager
Mixtral block of transformers with the same shapes, where it is installed.

    python -m benchmarks.experts --json out.json
    python -m benchmarks.experts --cases '8 experts*' 'fewer rows'
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from adaptivejax.core import NOBODY, dispatch, expert_apply
from adaptivejax.report.clock import interleave
from benchmarks.harness import Options, Row, main

FORWARD = {8: 0.9, 32: 0.75, 128: 0.6}
BACKWARD = {8: 0.85, 32: 0.7, 128: 0.55}
RAGGED = {8: 7.0, 32: 20.0}
SKEWED = 1.15


@dataclasses.dataclass(frozen=True)
class Bed:
  """Shapes of a mixture, and its arrays."""

  experts: int
  tokens: int = 2048
  features: int = 512
  hidden: int = 1024
  k: int = 2

  @property
  def name(self) -> str:
    """How `--cases` calls it."""
    return f"{self.experts} experts, top-{self.k}"

  @functools.cached_property
  def x(self) -> jax.Array:
    """The items."""
    return _normal(0, self.tokens, self.features)

  @functools.cached_property
  def params(self) -> tuple[jax.Array, ...]:
    """Router, up and down projections of all experts."""
    e, d, f = self.experts, self.features, self.hidden
    shapes = ((d, e), (e, d, f), (e, f, d))
    return tuple(
      _normal(i + 1, *shape) / math.sqrt(shape[-2])
      for i, shape in enumerate(shapes)
    )

  def route(self, skewed: bool) -> jax.Array:
    """Distinct experts of each item, drawn evenly or by Zipf's law."""
    rng = np.random.default_rng(0)
    chance = 1 / np.arange(1, self.experts + 1) if skewed else None
    if chance is not None:
      chance = chance / chance.sum()
    draw = lambda: rng.choice(self.experts, self.k, replace=False, p=chance)
    return jnp.asarray([draw() for _ in range(self.tokens)], jnp.int32)


def _normal(seed: int, *shape: int) -> jax.Array:
  return jax.random.normal(jax.random.key(seed), shape)


def ffn(rows, up, down):
  return jax.nn.gelu(rows @ up) @ down


def mixture(x, params, experts):
  """Top-k with the router's weights; which experts, is given."""
  router, *rest = params
  gates = jax.nn.softmax(x @ router)
  weights = jnp.take_along_axis(gates, jnp.maximum(experts, 0), axis=1)
  plan = dispatch(experts, weights, router.shape[1])
  return expert_apply(lambda rows, p: ffn(rows, *p), x, plan, tuple(rest))


def ragged(x, params, experts):
  """The same by `lax.ragged_dot`."""
  router, up, down = params
  gates = jax.nn.softmax(x @ router)
  weights = jnp.take_along_axis(gates, experts, axis=1)
  plan = dispatch(experts, weights, router.shape[1])
  hidden = jax.nn.gelu(lax.ragged_dot(x[plan.item], up, plan.sizes))
  out = lax.ragged_dot(hidden, down, plan.sizes) * plan.weight[:, None]
  return jnp.zeros_like(x).at[plan.item].add(out)


@jax.jit
def forward(x, params, experts):
  return mixture(x, params, experts)[0]


@jax.jit
def backward(x, params, experts):
  loss = lambda x, params: jnp.sin(mixture(x, params, experts)[0]).sum()
  return jax.grad(loss, argnums=(0, 1))(x, params)


@jax.jit
def dense(x, up, down):
  return ffn(x, up, down)


@jax.jit
def dense_backward(x, up, down):
  loss = lambda *args: jnp.sin(ffn(*args)).sum()
  return jax.grad(loss, argnums=(0, 1, 2))(x, up, down)


def against_dense(bed: Bed, seconds: float) -> Iterator[Row]:
  """Both routes, both directions, one run each."""
  even, skewed = bed.route(False), bed.route(True)
  rows = jnp.tile(bed.x, (bed.k, 1))
  one = tuple(a[0] for a in bed.params[1:])
  for name, ours, theirs, targets in (
    ("forward", forward, dense, FORWARD),
    ("forward+backward", backward, dense_backward, BACKWARD),
  ):
    calls = [
      functools.partial(theirs, rows, *one),
      functools.partial(ours, bed.x, bed.params, even),
      functools.partial(ours, bed.x, bed.params, skewed),
    ]
    full, flat, steep = interleave(
      [lambda _, call=call: call() for call in calls], seconds=seconds
    )
    yield Row.of(
      bed.name,
      f"{name}, of dense",
      [a / b for a, b in zip(full, flat)],
      target=targets.get(bed.experts),
    )
    yield Row.of(
      bed.name,
      f"{name}, skewed",
      [b / a for a, b in zip(flat, steep)],
      target=SKEWED if bed.experts in FORWARD else None,
      better="lower",
    )


def against_ragged(bed: Bed, seconds: float) -> Iterator[Row]:
  """`lax.ragged_dot` computes every expert on every row on CPU."""
  route = bed.route(False)
  other = jax.jit(ragged)
  theirs, ours = interleave(
    [
      lambda _: other(bed.x, bed.params, route),
      lambda _: forward(bed.x, bed.params, route),
    ],
    seconds=seconds,
    least=3,
  )
  yield Row.of(
    bed.name,
    "x ragged_dot",
    [a / b for a, b in zip(theirs, ours)],
    target=RAGGED.get(bed.experts),
  )


def fewer_rows(bed: Bed, seconds: float) -> Iterator[Row]:
  """Time follows the rows that experts really run."""
  route = bed.route(False)
  share = jnp.asarray(np.random.default_rng(1).random(route.shape))
  parts = (1.0, 0.75, 0.5, 0.25, 0.1)
  routes = [jnp.where(share < part, route, NOBODY) for part in parts]
  run = jax.jit(lambda e: mixture(bed.x, bed.params, e))
  spent = [float(run(e)[1].spent) for e in routes]
  whole, *others = interleave(
    [lambda _, e=e: run(e) for e in routes], seconds=seconds
  )
  for part, cost, times in zip(parts[1:], spent[1:], others):
    name = f"{part:.0%} of the choices"
    time = [a / b for a, b in zip(times, whole)]
    yield Row.of("fewer rows", f"{name}, time", time, better="lower")
    yield Row.of("fewer rows", f"{name}, spent", [cost / spent[0]])


def against_torch(bed: Bed, seconds: float) -> Iterator[Row]:
  """Eager Mixtral on as many threads; nothing where it is not installed."""
  try:
    import torch  # pyrefly: ignore[missing-import]
    from transformers import (  # pyrefly: ignore[missing-import]
      MixtralConfig,
    )
    from transformers.models.mixtral import (  # pyrefly: ignore[missing-import]
      modeling_mixtral,
    )
  except ImportError:
    print(
      "torch: not installed, so not compared (pip install torch transformers)"
    )
    return
  config = MixtralConfig(
    hidden_size=bed.features,
    intermediate_size=bed.hidden,
    num_local_experts=bed.experts,
    num_experts_per_tok=bed.k,
  )
  config._experts_implementation = "eager"
  block = modeling_mixtral.MixtralSparseMoeBlock(config).eval()
  with torch.no_grad():
    for p in block.parameters():
      p.normal_(0, 0.02)
  given = torch.from_numpy(np.array(bed.x))[None]
  keys = [_normal(i, bed.experts, bed.features, bed.hidden) for i in (5, 6)]
  swiglu = (*keys, bed.params[2])

  @jax.jit
  def ours(x, router, params):
    gates = jax.nn.softmax(x @ router)
    weights, experts = lax.top_k(gates, bed.k)
    plan = dispatch(experts, weights / weights.sum(-1, keepdims=True),
                    bed.experts)  # fmt: skip
    f = lambda r, p: (jax.nn.silu(r @ p[0]) * (r @ p[1])) @ p[2]
    return expert_apply(f, x, plan, params)[0]

  def theirs(_):
    with torch.no_grad():
      block(given)

  torch_times, times = interleave(
    [theirs, lambda _: ours(bed.x, bed.params[0], swiglu)], seconds=seconds
  )
  speed = [a / b for a, b in zip(torch_times, times)]
  yield Row.of(bed.name, "x torch, eager", speed, target=1.0)


def rows(options: Options) -> Iterator[Row]:
  if options.quick:
    beds, seconds = [Bed(4, 64, 16, 32)], 0.0
  else:
    beds, seconds = [Bed(8), Bed(32), Bed(128)], 8.0
  parts: dict[str, Callable[[], Iterator[Row]]] = {}
  for bed in beds:
    parts[bed.name] = functools.partial(against_dense, bed, seconds)
  for bed in beds[:2]:
    name = f"ragged_dot, {bed.name}"
    parts[name] = functools.partial(against_ragged, bed, seconds)
  parts["fewer rows"] = functools.partial(fewer_rows, beds[0], seconds)
  parts["torch"] = functools.partial(against_torch, beds[0], seconds)
  for name in options.select(parts):
    yield from parts[name]()


if __name__ == "__main__":
  main(__doc__, rows)
