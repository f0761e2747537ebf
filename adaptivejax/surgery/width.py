# SPDX-License-Identifier: Apache-2.0
"""Feed-forward layers cut into parts, of which a token runs some.

A cut is exact: the parts sum to the layer they were made of.  They are dealt by
`nn.cluster_neurons`, or in the order of how much each neuron says
(`neuron_sizes`), the loudest first, which is what nested parts want.

Axes: L layers, B batch, T tokens, D features, F hidden neurons.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jaxtyping import Array, Float, Int

from adaptivejax.methods.experts import FactorLLM
from adaptivejax.methods.width import AdaptiveComputationModule
from adaptivejax.nn.mlp import cluster_neurons, join_mlp, split_mlp
from adaptivejax.surgery.layers import Model, map_mlps


@jax.jit
def neuron_sizes(model, tokens: Int[Array, "B T"]) -> Float[Array, "L F"]:
  """How much each neuron says in a text: mean |z_i| ||down_i||."""
  positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)

  def body(x, layer):
    x, *_ = layer.attend(x, positions)
    z = jnp.abs(layer.mlp.hidden(layer.norm_mlp(x))).mean((0, 1))
    reach = jnp.linalg.norm(layer.mlp.down.kernel.get_value(), axis=-1)
    return layer.feed(x)[0], z * reach

  return lax.scan(body, model.embed(tokens), model.layers)[1]


def to_acm(
  model: Model,
  learners: int = 4,
  *,
  tokens: Int[Array | np.ndarray, "B T"] | None = None,
  temperature: float = 0.8,
  seed: int = 0,
) -> Model:
  """Every feed-forward layer as an `AdaptiveComputationModule`.

  Args:
    model: trained, of `Block`s.
    learners: that a layer is cut into; divides its neurons (static).
    tokens: text by which neurons are ordered, the loudest first; they stay as
      they stand, if not given.
    temperature: of the gates, in training.
    seed: of the gates.

  At its full budget (`full_budget`) it says what `model` says.
  """
  order = None
  if tokens is not None:
    order = np.asarray(jnp.argsort(-neuron_sizes(model, jnp.asarray(tokens))))
  rngs, features = nnx.Rngs(seed), model.config.features

  def cut(mlp, l):
    parts = split_mlp(mlp, learners, None if order is None else order[l])
    return AdaptiveComputationModule(
      parts, features, temperature=temperature, rngs=rngs
    )

  return map_mlps(model, cut)


def to_experts(
  model: Model,
  experts: int = 4,
  top_k: int = 2,
  *,
  clusters: bool = True,
  prior: float = 0.05,
  seed: int = 0,
) -> Model:
  """Every feed-forward layer as a `FactorLLM` of so many experts.

  Args:
    model: trained, of `Block`s.
    experts, top_k: of which a token runs so many (static).
    clusters: neurons that are alike share an expert; else as they stand.
    prior: weight of what teaches the routers, see `FactorLLM`.
    seed: of clusters and routers.
  """
  rngs = nnx.Rngs(seed)
  order = functools.partial(cluster_neurons, parts=experts, seed=seed)
  cut = lambda mlp, l: FactorLLM(
    mlp,
    experts,
    top_k=top_k,
    order=order(mlp) if clusters else None,
    prior=prior,
    rngs=rngs,
  )
  return map_mlps(model, cut)


def to_dense(model: Model) -> Model:
  """Undoes `to_acm` and `to_experts`: the parts of each layer joined to one.

  It says what `model` says at its full budget, and has the shape that
  `adaptivejax.save` writes.

  Raises:
    ValueError: layers of other modules.
  """

  def join(mlp, l):
    if isinstance(mlp, AdaptiveComputationModule):
      return join_mlp(mlp.learners)
    if isinstance(mlp, FactorLLM):
      return join_mlp(mlp.experts)
    raise ValueError(f"layer {l} is no ACM or FactorLLM: {type(mlp).__name__}.")

  return map_mlps(model, join)
