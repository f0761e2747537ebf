# SPDX-License-Identifier: Apache-2.0
"""The laws' case of attention that keeps a state; tokens are its budget."""

import jax
import jax.numpy as jnp
import numpy as np

from adaptivejax.methods.attention import LightningAttention
from adaptivejax.nn import Attention
from tests.laws.case import Case, D, T, gaussian

H = 2
ORDER = np.random.default_rng(3).permutation(T)


def _sequence(batch):
  return gaussian(batch, T, D)


def _lightning(rngs):
  look = LightningAttention(D, H, chunk=16, rngs=rngs)
  return Attention(D, H, look=look, rngs=rngs)


def _live(x, budget):
  return jnp.broadcast_to(budget > ORDER, x.shape[:2])


def _call(module, x, budget):
  places = jnp.broadcast_to(jnp.arange(T), x.shape[:2])
  y, _, cost, _ = module(x, places, live=_live(x, budget))
  return y, cost


def _recurrence(module, x):
  """Token by token, head by head."""
  kernel = lambda part: part.kernel.get_value()
  split = lambda a: a.reshape(*x.shape[:2], H, D // H)
  q = split(jax.nn.silu(x @ kernel(module.query)))
  k, v = jnp.split(jax.nn.silu(x @ kernel(module.key_value)), 2, -1)
  k, v = split(k), split(v)
  left = np.exp(-(2.0 ** (-8 * np.arange(1, H + 1) / H)) * (1 + 1e-5))
  state, outs = 0.0, []
  for t in range(T):
    new = k[:, t, :, :, None] * v[:, t, :, None]
    state = left[:, None, None] * state + new
    outs.append((q[:, t, :, :, None] * state).sum(-2))
  o = jnp.stack(outs, 1).reshape(x.shape)
  o = o / jnp.sqrt((o * o).mean(-1, keepdims=True) + 1e-6)
  o = o * module.look.norm.scale.get_value()
  return (o / (1 + jnp.exp(-x @ kernel(module.look.gate)))) @ kernel(module.out)


def _poisoned(module, x):
  bad = jnp.where(_live(x, 3)[..., None], x, jnp.nan)
  return module, bad, np.int32(3), None


RECURRENT = [
  Case(
    "lightning",
    "attention.lightning",
    _lightning,
    _sequence,
    _call,
    full=np.int32(T),
    some=np.int32(3),
    none=np.int32(0),
    dense=_recurrence,
    least=lambda m, x: jnp.zeros_like(x),
    poison=_poisoned,
    unless={"oracle": "the twin still asks which platform it runs on"},
  )
]
