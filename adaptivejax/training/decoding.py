# SPDX-License-Identifier: Apache-2.0
"""What a model is to generate with: how many rows, how long, by which policy.

A config file may say so beside its training, `def decoding() -> Decoding`; the
step is that of the engine (`decode.generate`): the policy's, one token or more
for each row from a cache that is updated in place.

Axes: B batch, L layers, G key heads, S slots of the cache.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import PyTree

from adaptivejax.core.per_device import (
  BATCH_AXES,
  TOKEN_AXIS,
  WIDTH_AXIS,
  dividing,
)
from adaptivejax.core.sampling import Draw, Sampling
from adaptivejax.nn.policy import ByStack, Policy
from adaptivejax.nn.stack import FULL
from adaptivejax.training.config import TrainConfig
from adaptivejax.training.mesh import MeshConfig, shardings
from adaptivejax.training.step import cast


@dataclass(frozen=True)
class Decoding:
  """How a model generates; all static."""

  rows: int
  """B, texts that go on together."""

  slots: int
  """S, tokens of the longest, its prompt included."""

  policy: Callable[[nnx.Module], Any] = lambda model: FULL
  """`policy(model)`: a `Policy` or a stack."""

  mesh: MeshConfig | None = None
  """Where it runs; as the training, if not given."""

  def __post_init__(self):
    """Refuses sizes that are none."""
    if min(self.rows, self.slots) < 1:
      raise ValueError(
        f"rows={self.rows} and slots={self.slots} must be at least 1"
      )


def abstract_decoding(
  config: TrainConfig, decoding: Decoding, mesh: Mesh
) -> tuple[Any, tuple[PyTree, ...]]:
  """`(step, arguments)` on devices that need not be here.

  `step(model, policy, sampling, last, cache, memory, keys, live) -> (tokens,
  count, cache, memory, stop)`, jitted, its cache and memory donated; arguments
  are of `ShapeDtypeStruct`s.  The model has the precision it is trained in.
  """
  rows, slots = decoding.rows, decoding.slots
  model: Any = jax.eval_shape(lambda: _served(config))
  policy = decoding.policy(model)
  policy = policy if isinstance(policy, Policy) else ByStack(policy)
  policy.check(model)
  shape = jax.ShapeDtypeStruct
  numbers, one = shape((rows,), jnp.int32), shape((rows, 1), jnp.int32)
  cache = jax.eval_shape(lambda: model.empty_cache(rows, slots))
  logits = shape((rows, model.config.vocab), jnp.float32)

  def start(model, prompt, lengths, logits):
    return policy.start(model, prompt, lengths, slots, logits)[0]

  memory = jax.eval_shape(start, model, one, numbers, logits)
  keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), rows))
  live = shape((rows,), jnp.bool_)

  where = _of_model(model, decoding.mesh or config.mesh, mesh)
  of_rows = lambda a: P(dividing(BATCH_AXES, a.shape[0]))
  spread = lambda tree, spec: jax.tree.map(
    lambda a: _laid(a, NamedSharding(mesh, spec(a))), tree
  )
  whole = lambda a: P()
  arguments = (
    jax.tree.map(_laid, model, where),
    spread(policy, whole),
    spread(Sampling.of(), whole),
    spread(numbers, of_rows),
    spread(cache, lambda a: _of_cache(a, rows)),
    spread(memory, of_rows),
    spread(keys, of_rows),
    spread(live, of_rows),
  )

  def step(model, policy, sampling, last, cache, memory, keys, live):
    draw = Draw(sampling, keys)
    out = policy.step(model, last, cache, memory, draw, live)
    return out.tokens, out.count, out.cache, out.memory, out.stop

  out = (None, None, *(jax.tree.map(_place, a) for a in arguments[4:6]), None)
  return jax.jit(step, donate_argnums=(4, 5), out_shardings=out), arguments


def _served(config: TrainConfig) -> nnx.Module:
  """The model, its parameters as narrow as the step computes."""
  model = config.build(nnx.Rngs(config.seed))
  definition, params, rest = nnx.split(model, nnx.Param, ...)
  narrow = cast(nnx.to_pure_dict(params), config.precision)
  nnx.replace_by_pure_dict(params, narrow)
  return nnx.merge(definition, params, rest)


def _of_model(model: Any, config: MeshConfig, mesh: Mesh) -> Any:
  """A model of shardings: parameters by the rules, the rest whole."""
  definition, params, rest = nnx.split(model, nnx.Param, ...)
  pure = nnx.to_pure_dict(params)
  nnx.replace_by_pure_dict(params, shardings(pure, config, mesh))
  rest = jax.tree.map(lambda _: NamedSharding(mesh, P()), rest)
  return nnx.merge(definition, params, rest)


def _of_cache(a: jax.ShapeDtypeStruct, rows: int) -> P:
  """Of [B, L, G, S, ...]: rows as a batch lies, heads and slots if they can."""
  batch = dividing(BATCH_AXES, rows)
  if len(a.shape) < 4:
    return P(batch)
  heads, slots = a.shape[2:4]
  over = lambda name, size: dividing((name,), size) or None
  return P(batch, None, over(WIDTH_AXIS, heads), over(TOKEN_AXIS, slots))


def _laid(a: Any, where: NamedSharding) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=where)


def _place(a: jax.ShapeDtypeStruct) -> Any:
  return a.sharding
