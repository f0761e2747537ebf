# SPDX-License-Identifier: Apache-2.0
"""Experts: does a mixture cost what its rows cost?

The measure is the dense equivalent: one feed-forward layer, D - F - D with
GELU, in f32, on T x k rows.  `of dense` is its time over that of the mixture of
E experts, router, dispatch and combination included, in the same rounds; 1 is
ideal.  Routes are balanced, or Zipf-distributed (`skewed`: the time over that
of the balanced route).  Forward + backward is the gradient by the items, the
experts and the router.  A case is `E experts, top-k`.

`ragged_dot` does the same with `lax.ragged_dot`, forward; `tokamax` and
`ejkernel` with the grouped matmul of these, where they are installed (in an
environment of their own), as they are on CPU.  `fewer rows`: a
share of the choices goes to experts that cost nothing; the time over that of
all rows, beside the share that `Cost` says was spent.  `torch`: the eager
Mixtral block of transformers with the same weights, on the same items, where it
is installed.

    python -m benchmarks.experts --json out.json
    python -m benchmarks.experts --cases '8 experts*' 'fewer rows'
"""

import dataclasses
import functools
import importlib
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
Product = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


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


def ragged(product: Product, x, params, experts):
  """The same by another grouped matmul."""
  router, up, down = params
  gates = jax.nn.softmax(x @ router)
  weights = jnp.take_along_axis(gates, experts, axis=1)
  plan = dispatch(experts, weights, router.shape[1])
  hidden = jax.nn.gelu(product(x[plan.item], up, plan.sizes))
  out = product(hidden, down, plan.sizes) * plan.weight[:, None]
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


def tokamax() -> Product:
  """Its flags are told that they are read: else it reads our command line."""
  importlib.import_module("absl.flags").FLAGS.mark_as_parsed()
  module = importlib.import_module("tokamax")
  return functools.partial(module.ragged_dot, implementation="xla")


def products() -> dict[str, Callable[[], Product]]:
  """The grouped matmuls of others, each imported when it is called."""
  ejkernel = "ejkernel.modules"
  return {
    "ragged_dot": lambda: lax.ragged_dot,
    "tokamax": tokamax,
    "ejkernel": lambda: importlib.import_module(ejkernel).grouped_matmul,
  }


def against_ragged(bed: Bed, seconds: float, name: str) -> Iterator[Row]:
  """`lax.ragged_dot` computes every expert on every row on CPU."""
  try:
    other = jax.jit(functools.partial(ragged, products()[name]()))
  except ImportError as error:
    print(f"{name}: not compared: {error}")
    return
  route = bed.route(False)
  want, given = forward(bed.x, bed.params, route), (bed.x, bed.params, route)
  np.testing.assert_allclose(other(*given), want, rtol=1e-3, atol=1e-4)
  theirs, ours = interleave(
    [lambda _: other(*given), lambda _: forward(*given)],
    seconds=seconds,
    least=3,
  )
  yield Row.of(
    bed.name,
    f"x {name}",
    [a / b for a, b in zip(theirs, ours)],
    target=RAGGED.get(bed.experts) if name == "ragged_dot" else None,
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
  except ImportError as error:
    print(f"torch: not compared: {error} (pip install torch transformers)")
    return
  config = MixtralConfig(
    hidden_size=bed.features,
    intermediate_size=bed.hidden,
    num_local_experts=bed.experts,
    num_experts_per_tok=bed.k,
  )
  config._experts_implementation = "eager"
  block = modeling_mixtral.MixtralSparseMoeBlock(config).eval()
  keys = [_normal(i, bed.experts, bed.features, bed.hidden) for i in (5, 6)]
  router, _, down = bed.params
  swiglu = (*(k / math.sqrt(bed.features) for k in keys), down)
  tensor = lambda a: torch.from_numpy(np.array(a))
  across = lambda a: np.swapaxes(a, -1, -2)
  with torch.no_grad():
    block.gate.weight.copy_(tensor(across(router)))
    both = np.concatenate([across(a) for a in swiglu[:2]], 1)
    block.experts.gate_up_proj.copy_(tensor(both))
    block.experts.down_proj.copy_(tensor(across(down)))
  given = tensor(bed.x)[None]

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
      out = block(given)
    return (out[0] if isinstance(out, tuple) else out).reshape(bed.x.shape)

  made = ours(bed.x, router, swiglu)
  np.testing.assert_allclose(made, theirs(0), rtol=1e-3, atol=1e-3)
  torch_times, times = interleave(
    [theirs, lambda _: ours(bed.x, router, swiglu)], seconds=seconds
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
    parts |= {
      f"{name}, {bed.name}": functools.partial(
        against_ragged, bed, seconds, name
      )
      for name in products()
    }
  parts["fewer rows"] = functools.partial(fewer_rows, beds[0], seconds)
  parts["torch"] = functools.partial(against_torch, beds[0], seconds)
  for name in options.select(parts):
    yield from parts[name]()


if __name__ == "__main__":
  main(__doc__, rows)
