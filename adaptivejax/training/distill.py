# SPDX-License-Identifier: Apache-2.0
"""Distillation: a model after surgery learns from the model it was made of.

    layerwise    every feed-forward layer by itself, all at once, on what the
                 teacher's layer gets and gives: no error travels
    gates        which of its learners a token needs, layer by layer
    end_to_end   what the teacher says of the next token, with a budget

A loss is `loss(student, teacher, tokens, key) -> (f32[], metrics)`; `distill`
runs any of them on the part of the student that its `rates` name.  Labels and
phases of Adaptive Computation Modules: Wojcik et al., 2023,
https://arxiv.org/abs/2312.10193, sec. 3.

Axes: N windows, S their tokens, B batch, T tokens, M learners, D features,
V vocabulary.
"""

import functools
import math
import re
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import lax
from jaxtyping import Array, Float, Int, PyTree

from adaptivejax.core.budget import budget_loss
from adaptivejax.core.losses import cross_entropy
from adaptivejax.methods.width import AdaptiveComputationModule
from adaptivejax.nn.block import Block
from adaptivejax.nn.mlp import Mlp

M = TypeVar("M", bound=nnx.Module)
Metrics = dict[str, Array]
Loss = Callable[[Any, Any, Array, Array], tuple[Array, Metrics]]
EVERYTHING = {".*": 1e-4}


def distill(
  student: M,
  teacher: Any,
  windows: Int[np.ndarray, "N S"],
  loss: Loss,
  *,
  rates: Mapping[str, float] = EVERYTHING,
  steps: int = 100,
  batch: int = 4,
  clip: float = 1.0,
  seed: int = 0,
  progress: Callable[[int, Metrics], Any] = lambda step, metrics: None,
) -> M:
  """The student after `steps` updates; it itself and the teacher stay.

  Args:
    student: made from `teacher` by surgery.
    teacher: gets no gradient.
    windows: text to learn from.
    loss: one of this module, or another (static).
    rates: regular expression -> peak learning rate of Adam.  A parameter goes
      by the first that is found in its path, such as `layers/mlp/gate`; what
      none finds is frozen, and has neither gradient nor moments.
    steps, batch: of the updates; the rate falls by a cosine to 0.
    clip: largest global norm of the gradient.
    seed: of the order of windows and of the keys.
    progress: called after every step, with the loss among the metrics.

  Raises:
    ValueError: no text, or a pattern that finds no parameter.
  """
  if min(steps, batch, len(windows)) < 1 or windows.shape[1] < 2:
    raise ValueError(
      f"{steps=}, {batch=} and the windows, {windows.shape}, must be at least"
      " 1, and a window needs a next token."
    )
  rules = tuple(rates)
  trained = lambda path, value: (
    isinstance(value, nnx.Param) and _rule(rules, path) is not None
  )
  graph, params, rest = nnx.split(student, trained, ...)
  params = jax.tree.map(jnp.copy, nnx.to_pure_dict(params))  # are given away
  optimizer = by_path(rates, params, clip)
  state = optimizer.init(params)

  @functools.partial(jax.jit, donate_argnums=(0, 1))
  def step(params, state, rest, teacher, tokens, key, fade):
    def value(params):
      model = nnx.merge(graph, nnx.State(params), rest)
      return loss(model, teacher, tokens, key)

    (lost, metrics), grads = jax.value_and_grad(value, has_aux=True)(params)
    updates, state = optimizer.update(grads, state, params)
    updates = jax.tree.map(lambda u: fade * u, updates)
    params = optax.apply_updates(params, updates)
    return params, state, {**metrics, "loss": lost}

  draw, key = np.random.default_rng(seed), jax.random.key(seed)
  for i in range(steps):
    tokens = windows[np.sort(draw.integers(0, len(windows), batch))]
    fade = (1 + math.cos(math.pi * i / steps)) / 2
    params, state, metrics = step(
      params,
      state,
      rest,
      teacher,
      jnp.asarray(tokens, jnp.int32),
      jax.random.fold_in(key, i),
      fade,
    )
    progress(i + 1, metrics)
  return nnx.merge(graph, nnx.State(params), rest)


def by_path(
  rates: Mapping[str, float], params: PyTree, clip: float = 1.0
) -> optax.GradientTransformation:
  """Adam with a rate for each pattern; what none finds does not move.

  Args:
    rates: regular expression -> learning rate, see `distill`.
    params: nested dicts of arrays.
    clip: largest global norm of the gradient of all that moves.

  Raises:
    ValueError: a pattern that finds no parameter.
  """
  if not rates or "" in rates:
    raise ValueError(
      f"{rates=} must name at least one parameter, by expressions that are not"
      " empty: what none finds does not move."
    )
  for pattern in rates:
    try:
      re.compile(pattern)
    except re.error as error:
      raise ValueError(
        f"{pattern!r} of `rates` is no regular expression: {error}."
      ) from None
  labels = jax.tree_util.tree_map_with_path(
    lambda path, _: _rule(tuple(rates), [k.key for k in path]) or "", params
  )
  used = set(jax.tree.leaves(labels))
  for pattern in rates:
    if pattern not in used:
      raise ValueError(
        f"the pattern {pattern!r} of `rates` finds no parameter that is not"
        " taken by one before it."
      )
  adam = lambda rate: optax.chain(
    optax.scale_by_adam(b2=0.99), optax.scale(-rate)
  )
  each: dict[Any, Any] = {p: adam(rate) for p, rate in rates.items()}
  each[""] = optax.set_to_zero()
  moves = jax.tree.map(lambda label: label != "", labels)
  return optax.chain(
    optax.masked(optax.clip_by_global_norm(clip), moves),
    optax.multi_transform(each, labels),
  )


def layerwise(student, teacher, tokens: Int[Array, "B S"], key):
  """Relative squared error of every feed-forward layer, and its penalty.

  Modules of nested learners are judged with each number of them.
  """

  def error(mlp, x, wanted, key):
    if isinstance(mlp, AdaptiveComputationModule):
      return nested_errors(mlp, x, wanted)[1:].mean(), jnp.float32(0)
    y, _, signals = mlp(x, None, key)
    return relative(y - wanted, wanted).mean(), signals.penalty

  errors, penalties = _by_layer(student, teacher, tokens, key, error)
  loss = errors.mean() + penalties.mean()
  return loss, {"error": errors.mean()}


def gates(
  student,
  teacher,
  tokens: Int[Array, "B S"],
  key,
  *,
  gain: float = 1.2,
  tolerance: float = math.inf,
):
  """Cross-entropy of each token's gate with the number of learners it needs.

  Needed are k where one more makes the error less than `gain` times smaller;
  all, if it never does.  The published rule has no `tolerance`: it also stops
  at errors above it, which learners that are not trained for long still have.
  """

  def error(mlp, x, wanted, key):
    del key
    if not isinstance(mlp, AdaptiveComputationModule):
      raise ValueError(
        "gates are trained in `AdaptiveComputationModule`s; got"
        f" {type(mlp).__name__}."
      )
    errors = nested_errors(mlp, x, wanted)  # [M + 1, B, T]
    enough = (errors[:-1] < gain * errors[1:]) & (errors[:-1] < tolerance)
    last = jnp.ones_like(enough[:1])
    needed = lax.stop_gradient(jnp.concatenate([enough, last]).argmax(0))
    nats = cross_entropy(mlp.gate(x).astype(jnp.float32), needed)
    return nats.mean(), needed.mean() / mlp.count

  nats, share = _by_layer(student, teacher, tokens, key, error)
  return nats.mean(), {"share": share.mean()}


def end_to_end(
  student,
  teacher,
  tokens: Int[Array, "B S"],
  key,
  *,
  target: float | None = None,
  weight: float = 1.0,
):
  """KL of the student from the teacher per token, in nats, and the budget.

  Args:
    target: share of compute to come to; none if not given.
    weight: of the distance from it.
  """
  wanted = jax.nn.log_softmax(lax.stop_gradient(teacher(tokens).logits))
  out = student(tokens, key=key)
  gap = wanted - jax.nn.log_softmax(out.logits)
  kl = (jnp.exp(wanted) * gap).sum(-1).mean()
  loss = kl + out.signals.penalty
  if target is not None:
    loss += weight * budget_loss(out.signals.share, target)
  return loss, {"kl": kl, "share": out.signals.share}


def at_budget(target: float, weight: float = 1.0) -> Loss:
  """`end_to_end` with a budget."""
  return functools.partial(end_to_end, target=target, weight=weight)


def nested_errors(
  module: AdaptiveComputationModule,
  x: Float[Array, "B T D"],
  wanted: Float[Array, "B T D"],
) -> Float[Array, "M1 B T"]:
  """Relative error with the first 0..M learners, token by token."""
  parts = jax.vmap(Mlp.rows, in_axes=(0, None))(module.learners, x)
  sums = jnp.concatenate([0 * parts[:1], jnp.cumsum(parts, axis=0)])
  return relative(sums - wanted, wanted)


def relative(
  gap: Float[Array, "... D"], wanted: Float[Array, "... D"]
) -> Float[Array, "..."]:
  """Squared length of `gap` over that of `wanted`."""
  power = lambda a: (a.astype(jnp.float32) ** 2).sum(-1)
  return power(gap) / jnp.maximum(power(wanted), 1e-12)


def _by_layer(student, teacher, tokens, key, error):
  """`error(mlp, x, wanted, key)` of every layer, on the teacher's states."""
  for model in (student, teacher):
    if not isinstance(model.layers, Block):
      raise ValueError(
        "layers are compared half by half in models that stack `Block`s; got"
        f" {type(model.layers).__name__}."
      )
  positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)

  @jax.checkpoint
  def body(x, step):
    taught, mlp, key = step
    x, *_ = lax.stop_gradient(taught.attend(x, positions))
    inputs = lax.stop_gradient(taught.norm_mlp(x))
    wanted = lax.stop_gradient(taught.mlp(inputs)[0])
    said = error(mlp, inputs, wanted, key)
    return lax.stop_gradient(x + wanted), said

  count = jax.tree.leaves(teacher.layers)[0].shape[0]
  steps = teacher.layers, student.layers.mlp, jax.random.split(key, count)
  return lax.scan(body, lax.stop_gradient(teacher.embed(tokens)), steps)[1]


def _rule(rules: tuple[str, ...], path) -> str | None:
  """The first pattern that is found in a path."""
  name = "/".join(map(str, path))
  return next((rule for rule in rules if re.search(rule, name)), None)
