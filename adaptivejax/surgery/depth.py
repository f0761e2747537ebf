# SPDX-License-Identifier: Apache-2.0
"""Layers put behind routers, or left out for good.

Axes: L layers, K kept.
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from flax import nnx

from adaptivejax.core.plans import specialize
from adaptivejax.methods.depth import MixtureOfDepths
from adaptivejax.nn.norm import RMSNorm
from adaptivejax.surgery.layers import Model, group_layers, map_layers

TIES = 1e-6
"""Size of a new router's weights: breaks ties, and changes nothing.

In bf16 ties stay, and the first tokens win them: teach in f32.
"""


def to_mixture_of_depths(
  model: Model, capacity: float = 0.5, *, every: int = 2, seed: int = 0
) -> Model:
  """Every `every`-th layer behind a Mixture-of-Depths router.

  The routers weigh all tokens by 1, so that at its full budget (`full_budget`)
  it says what `model` says, until it is trained.  They read normalised states:
  those of a trained model have features so large that no small weight is.

  Args:
    model: trained.
    capacity: share of the tokens that a routed layer computes in training.
    every: 1 routes all layers, 2 the second of each pair (static).
    seed: of the routers.
  """
  rngs, features = nnx.Rngs(seed), model.config.features
  dtype = model.embedding.get_value().dtype

  def route(layer):
    routed = MixtureOfDepths(
      layer, features, capacity=capacity, norm=RMSNorm, rngs=rngs
    )
    last = routed.router.outer
    last.kernel.set_value(last.kernel.get_value() * TIES)
    last.bias = nnx.Param(jnp.ones(1))
    routed.router = jax.tree.map(lambda a: a.astype(dtype), routed.router)
    return routed

  if every == 1:
    return map_layers(model, lambda layer, l: route(layer))
  return group_layers(model, every, lambda row: [*row[:-1], route(row[-1])])


def keep_layers(model: Model, kept: Sequence[int]) -> Model:
  """The model of some layers only, in that order: a static plan, baked in.

  Args:
    model: trained.
    kept: layers, from 0, such as `methods.depth.kept_layers` names.
  """
  new = jax.tree.map(lambda a: a, model)  # a copy
  new.layers = specialize(model.layers, list(kept))
  count = len(kept) * model.layers.depth
  new.config = dataclasses.replace(model.config, layers=count)
  return new
