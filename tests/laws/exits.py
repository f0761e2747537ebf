# SPDX-License-Identifier: Apache-2.0
"""The laws' cases of exits of a classifier."""

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.tree_util import Partial

from adaptivejax.core import Streak
from adaptivejax.methods.depth import (
  deer_vla,
  dynamic_perceiver,
  jei_dnn,
  pabee,
  ponder_net,
)
from adaptivejax.models import Classifier, ClassifierConfig
from tests import reference
from tests.laws.case import NEVER, Case, D, F, L, M, T, gaussian
from tests.laws.layers import no_halting
from tests.laws.models import poisoned_layers

ENCODER = ClassifierConfig(
  tokens=T, inputs=M, classes=3, layers=L, features=D, hidden=F, heads=2
)


def _images(batch):
  return gaussian(batch, T, M)


def _exit(index):
  return lambda model, x: reference.classifier(model, x)[0][index]


def _asking(model, x):
  """FLOPs of the dearest rule: a `Lambda` after every layer."""
  return 2.0 * L * len(x) * (2 * D * F + F * F + F)


def _exits(name, rule, start=lambda batch: None, **budgets):
  """A case of a rule: `rule(budget)`, `start(batch)` its first memory."""

  def call(model, x, budget):
    out = model(x, rule(budget), start(len(x)))
    return out.logits, out.cost

  return Case(
    name,
    f"depth.{name}",
    lambda rngs: Classifier(ENCODER, rngs=rngs),
    _images,
    call,
    **budgets,
    dense=_exit(-1),
    least=_exit(0),
    poison=poisoned_layers(budgets["none"], 1, 2, 3),
    overhead=_asking,
    unless={"gradient": no_halting, "poison_gradient": no_halting},
  )


def _lambda():
  return ponder_net.Lambda(D, F, rngs=nnx.Rngs(5))


def _settled(batch):
  """The action before the first exit: none at all."""
  return deer_vla.Control(jnp.zeros((batch, 3)), jnp.zeros(batch, jnp.int32))


EXITS = [
  _exits(
    "ponder_net",
    lambda q: Partial(ponder_net.q_exit, head=_lambda(), q=q),
    lambda batch: ponder_net.Pondering.start(batch, D),
    full=np.float32(1),
    some=np.float32(0.7),
    none=np.float32(0),
  ),
  _exits(
    "pabee",
    lambda limit: Partial(pabee.patient_exit, limit=limit),
    Streak.none,
    full=np.int32(L),
    some=np.int32(1),
    none=np.int32(0),
  ),
  _exits(
    "deer_vla",
    lambda eta: Partial(deer_vla.action_exit, thresholds=eta, max_layer=L),
    _settled,
    full=np.full(L, -1, np.float32),
    some=np.full(L, 0.7, np.float32),
    none=np.full(L, 1e9, np.float32),
  ),
  _exits(
    "dynamic_perceiver",
    lambda levels: Partial(dynamic_perceiver.budgeted_exit, thresholds=levels),
    full=np.full(L, NEVER, np.float32),
    some=np.full(L, 0.6, np.float32),
    none=np.full(L, 0, np.float32),
  ),
  _exits(
    "jei_dnn",
    lambda level: Partial(
      jei_dnn.gated_exit, gates=jei_dnn.Gates(L), level=level
    ),
    jnp.ones,
    full=np.float32(NEVER),
    some=np.float32(0.7),
    none=np.float32(0),
  ),
]
