# SPDX-License-Identifier: Apache-2.0
"""One update of the parameters, and one evaluation, as jitted functions.

A model is split once into its parameters, a nested dict of arrays, and a
function that joins them with the rest.  Only `nnx.Param` leaves are trained.

    g = 1/A sum_a grad loss(params, batch_a, key_a)

summed in a scan over the A parts of a batch, so the memory is that of one part
and the result that of the whole batch.

A step whose loss or gradient is not finite changes nothing but its number.
`optax.apply_if_finite` is not it: it sees no loss, after its limit it lets the
update through, and its state moves every moment to another path, which is how
placement and checkpoints find them.  A choice between old and new values is
fused into the update; a branch would copy them.

Axes: A accumulated parts of a batch, B batch, N batches, S context + 1, the
bytes of a window.
"""

import math
from collections.abc import Callable, Iterable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float, Int, Key, PyTree

from adaptivejax.training.config import TrainConfig
from adaptivejax.training.optimizer import BALANCE

Metrics = dict[str, Float[Array, ""]]
Join = Callable[[PyTree], nnx.Module]


class TrainState(NamedTuple):
  """What a step reads and replaces."""

  step: Int[Array, ""]
  params: PyTree
  optimizer: PyTree


def split(model: nnx.Module) -> tuple[Join, PyTree]:
  """`(join, params)`: `join(params)` is the model, `params` nested dicts."""
  params, rest = parts(model)
  return joining(model, rest), params


def parts(model: nnx.Module) -> tuple[PyTree, PyTree]:
  """`(params, rest)`: nested dicts of what is trained and what is not."""
  _, params, rest = nnx.split(model, nnx.Param, ...)
  return nnx.to_pure_dict(params), nnx.to_pure_dict(rest)


def joining(model: nnx.Module, rest: PyTree) -> Join:
  """The `join` of `split`; of `model` only the structure is used."""
  definition, _, state = nnx.split(model, nnx.Param, ...)
  nnx.replace_by_pure_dict(state, rest)
  return lambda params: nnx.merge(definition, nnx.State(params), state)


def make_step(
  config: TrainConfig,
  join: Join,
  optimizer: optax.GradientTransformation,
  shardings: TrainState | None = None,
  *,
  donate: bool = True,
) -> Callable[..., tuple[TrainState, Metrics]]:
  """`step(state, batch i32[B,S], key) -> (state, metrics)`, jitted.

  The buffers of `state` are donated, unless told not to.  `key` is that of the
  run; each step folds its number in.  To the metrics of the loss it adds
  `loss`, `gradient_norm`, the `budget` if there is one, and `skipped`: 1 if the
  loss or the gradient is not finite, and so nothing was learned, else 0.  The
  new state lies as `shardings` say, if given.
  """

  def step(state, batch, key):
    grads, metrics = gradients(
      config, join, state, batch, jax.random.fold_in(key, state.step)
    )
    norm = optax.tree.norm(grads)
    updates, moments = optimizer.update(grads, state.optimizer, state.params)
    params = optax.apply_updates(state.params, updates)
    moved = optax.tree.norm(updates)  # a finite gradient may move too far
    finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(norm + moved)
    params, moments = jax.tree.map(
      lambda new, old: jnp.where(finite, new, old),
      (params, moments),
      (state.params, state.optimizer),
    )
    metrics |= {"gradient_norm": norm, "skipped": 1 - finite.astype(jnp.int32)}
    return TrainState(state.step + 1, params, moments), metrics

  where = None if shardings is None else (shardings, None)
  donated = 0 if donate else ()
  return jax.jit(step, donate_argnums=donated, out_shardings=where)


def gradients(
  config: TrainConfig,
  join: Join,
  state: TrainState,
  batch: Int[Array, "B S"],
  key: Key[Array, ""],
) -> tuple[PyTree, Metrics]:
  """The gradient and the metrics of the loss: means over the parts."""
  parts = config.optimizer.accumulate
  budget = () if config.budget is None else (config.budget(state.step),)

  def loss(params, rows, key):
    model = join(cast(params, config.precision))
    value, metrics = config.loss(model, rows, key, *budget)
    target = {"budget": budget[0]} if budget else {}
    return value, {**target, **metrics, "loss": value}

  def part(rows, key):
    return jax.grad(loss, has_aux=True)(state.params, rows, key)

  if parts == 1:
    return part(batch, key)
  rows = batch.reshape(parts, -1, batch.shape[-1])
  keys = jax.random.split(key, parts)
  add = lambda total, one: (jax.tree.map(jnp.add, total, part(*one)), None)
  zero = jax.tree.map(jnp.zeros_like, jax.eval_shape(part, rows[0], keys[0]))
  total, _ = jax.lax.scan(add, zero, (rows, keys))
  return jax.tree.map(lambda leaf: leaf / parts, total)


def cast(params: PyTree, precision: str) -> PyTree:
  """Parameters in the precision that a step computes in.

  Those that balance the load of experts move by steps that bfloat16 has not.
  """
  if precision == "float32":
    return params

  def narrow(path, leaf):
    kept = BALANCE in jax.tree_util.keystr(path)
    if kept or not jnp.issubdtype(leaf.dtype, jnp.floating):
      return leaf
    return leaf.astype(precision)

  return jax.tree_util.tree_map_with_path(narrow, params)


def evaluate(
  model: nnx.Module, batches: Iterable[Int[Array | np.ndarray, "B S"]]
) -> dict[str, float]:
  """Teacher-forced `bits_per_byte` and realised `share` of compute.

  The model runs in its inference form, without a key.
  """
  sums = [_evaluate(model, batch) for batch in batches]
  nats, spent, full = (float(sum(column)) for column in zip(*sums))
  return {
    "bits_per_byte": nats / len(sums) / math.log(2),
    "share": spent / full,
  }


@jax.jit
def _evaluate(model, batch):
  output = model(batch[:, :-1])
  nats = optax.softmax_cross_entropy_with_integer_labels(
    output.logits, batch[:, 1:]
  )
  return nats.mean(), output.cost.spent, output.cost.full
