# SPDX-License-Identifier: Apache-2.0
"""The laws' cases of attention that is trained to choose key blocks."""

import jax
import jax.numpy as jnp
import numpy as np

from adaptivejax.methods.attention import NSA, MoBA
from adaptivejax.nn import Attention, adjust
from tests import reference
from tests.laws.case import Case, D, T, gaussian
from tests.laws.primitives import no_rows

H, G, BLOCK, WINDOW = 2, 1, 2, 3
DEAD = 2
AT, BACK = np.arange(T), np.arange(T)[:, None]
CAUSAL, OWN = AT <= BACK, AT // BLOCK == BACK // BLOCK


def _sequence(batch):
  """A token of it is not live; whatever it holds goes nowhere."""
  live = jnp.broadcast_to(jnp.arange(T) != DEAD, (batch, T))
  return {"x": gaussian(batch, T, D), "live": live}


def _call(module, x, budget):
  del budget  # it is in the module
  places = jnp.broadcast_to(jnp.arange(T), x["live"].shape)
  y, _, cost, _ = module(x["x"], places, live=x["live"])
  return y, cost


def _moba(rngs):
  return Attention(D, H, G, look=MoBA(BLOCK, T // BLOCK), rngs=rngs)


def _over(pairs):
  def run(module, x):
    return reference.attention(module, x["x"], x["live"], pairs=pairs)

  return run


def _nsa(rngs):
  look = NSA(
    D, H, size=BLOCK, stride=1, block=BLOCK, blocks=T // BLOCK, window=WINDOW,
    hidden=8, rngs=rngs,
  )  # fmt: skip
  return Attention(D, H, G, look=look, rngs=rngs)


def _views(chosen):
  """All summaries, the chosen blocks and the window, gated."""

  def run(module, x):
    live, x = x["live"], x["x"]
    look, w = module.look, module.width
    heads = lambda a: a.reshape(*x.shape[:2], -1, w)
    there = live[..., None, None]
    places = np.broadcast_to(AT, x.shape[:2])
    q = reference.rotate(heads(x @ module.query.kernel.get_value()), places)
    k, v = jnp.split(x @ module.key_value.kernel.get_value(), 2, -1)
    k = jnp.where(there, reference.rotate(heads(k), places), 0)
    v = jnp.where(there, heads(v), 0)
    ck, cv = _summary(look.key, k), _summary(look.value, v)
    whole = np.arange(T - BLOCK + 1) + BLOCK - 1 <= BACK
    seen = live[:, None, None, :]
    near = CAUSAL & (AT > BACK - WINDOW)
    gate = x @ look.gate.kernel.get_value() + look.gate.bias.get_value()
    gate = jax.nn.sigmoid(gate).reshape(*x.shape[:2], H, 3)
    out = (
      gate[..., 0, None] * _mixed(q, ck, cv, whole)
      + gate[..., 1, None] * _mixed(q, k, v, chosen & CAUSAL & seen)
      + gate[..., 2, None] * _mixed(q, k, v, near & seen)
    )
    out = out.reshape(*x.shape[:2], -1) @ module.out.kernel.get_value()
    return jnp.where(live[..., None], out, 0)

  return run


def _summary(part, a):
  """[B, T, G, W] -> [B, N, G, W]."""
  a = jnp.stack([a[:, i : i + BLOCK] for i in range(T - BLOCK + 1)], 1)
  a = jnp.moveaxis(a, 3, 2) + part.place.get_value()
  a = a.reshape(*a.shape[:3], -1) @ part.up.kernel.get_value()
  return jax.nn.gelu(a) @ part.down.kernel.get_value()


def _mixed(q, k, v, pairs):
  score = jnp.einsum("bthw,bsw->bhts", q, k[:, :, 0]) / q.shape[-1] ** 0.5
  odds = jnp.where(pairs, jnp.exp(score), 0)
  odds = odds / jnp.maximum(odds.sum(-1, keepdims=True), 1e-30)
  return jnp.einsum("bhts,bsw->bthw", odds, v[:, :, 0])


def _poisoned(module, x):
  bad = jnp.where(x["live"][..., None], x["x"], jnp.nan)
  return module, {**x, "x": bad}, np.float32(0.5), None


_UNLESS = {
  "cover": no_rows,
  "cost": "causal lists of blocks cost less than all pairs at any budget",
}

TRAINED_ATTENTION = [
  Case(
    "moba",
    "attention.moba",
    _moba,
    _sequence,
    _call,
    full=np.float32(0),
    some=np.float32(0.5),
    none=np.float32(1),
    place=adjust,
    dense=_over(CAUSAL),
    least=_over(OWN),
    poison=_poisoned,
    unless=_UNLESS,
  ),
  Case(
    "nsa",
    "attention.nsa",
    _nsa,
    _sequence,
    _call,
    full=np.float32(0),
    some=np.float32(0.25),
    none=np.float32(1),
    place=adjust,
    dense=_views(CAUSAL),
    least=_views(OWN | (AT // BLOCK == BACK // BLOCK - 1) | (AT < BLOCK)),
    poison=_poisoned,
    unless=_UNLESS,
  ),
]
