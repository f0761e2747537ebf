# SPDX-License-Identifier: Apache-2.0
"""The laws' cases of looks that read a prompt sparsely.

The prompt goes on from a cache: one tile of queries after as many keys, so that
each block is there for the choosing and the whole budget costs what dense does.
"""

import jax.numpy as jnp
import numpy as np

from adaptivejax.core import Keys, attend, flops
from adaptivejax.methods.attention import (
  Budgets,
  FlexPrefill,
  MInference,
  XAttention,
)
from adaptivejax.nn import adjust
from tests.laws.case import Case, gaussian
from tests.laws.primitives import no_rows

H, G, W, TILE, BLOCK, KEYS = 4, 2, 8, 8, 2, 24
SIZES = {"block_q": TILE, "block_kv": BLOCK}
ALL, NO = np.float32(0), np.float32(1)


def _prompt(batch):
  keys = gaussian(batch, G, KEYS, W, seed=1)
  q = 2 * gaussian(batch, TILE, H, W)
  return {"q": q, "k": keys, "v": gaussian(batch, G, KEYS, W, seed=2)}


def _arguments(x):
  place = jnp.arange(KEYS, dtype=jnp.int32)
  place = jnp.broadcast_to(place, (x["q"].shape[0], KEYS))
  keys = Keys(x["k"], x["v"], place[:, None])
  return x["q"], keys, place[:, -TILE:]


def _call(look, x, budget):
  del budget
  looked = look(*_arguments(x))
  return looked.out, looked.cost


def _sees(look, x):
  """Pairs of a choice, bool[B, H, 1, S]: there is one tile."""
  chosen = look.choose(*_arguments(x))
  sees = jnp.repeat(chosen.mask, BLOCK, axis=-1)
  return sees if chosen.columns is None else sees | chosen.columns[:, :, None]


def _least(look, x):
  """Attention over what is seen without a budget, all pairs computed."""
  q, keys, at = _arguments(x)
  sees = _sees(adjust(look, 1.0), x)
  sees = jnp.broadcast_to(sees, (*sees.shape[:2], TILE, KEYS))
  heads = []
  for h in range(H):
    g = h // (H // G)
    one = Keys(keys.k[:, g : g + 1], keys.v[:, g : g + 1], keys.pos)
    heads.append(attend(q[:, :, h : h + 1], one, at, mask=sees[:, h]))
  return jnp.concatenate(heads, 2)


def _poisoned(level):
  """NaN in the values that no query head of a key head chose."""

  def poison(look, x):
    sees = _sees(adjust(look, level), x)[:, :, 0]
    unseen = ~sees.reshape(-1, G, H // G, KEYS).any(2)
    bad = jnp.where(unseen[..., None], jnp.nan, x["v"])
    return look, {**x, "v": bad}, np.float32(level), None

  return poison


def _scoring(look, x):
  return flops(look.choose, *_arguments(x))


def _flex_prefill(rngs):
  del rngs
  return FlexPrefill(tau=0.2, min_budget=1, **SIZES)


def _minference(rngs):
  del rngs
  heads = ("a_shape", "vertical_slash", "block_sparse", "vertical_slash")
  budgets = Budgets(
    sinks=2,
    window=KEYS,
    verticals=6,
    first=1,
    slashes=KEYS,
    recent=1,
    blocks=KEYS,
    probe=4,
  )
  return MInference(heads, budgets, **SIZES)


ATTENTION = [
  Case(
    name,
    f"attention.{name}",
    build,
    _prompt,
    _call,
    full=ALL,
    some=np.float32(some),
    none=NO,
    place=adjust,
    dense=lambda look, x: attend(*_arguments(x)),
    least=_least,
    poison=_poisoned(some),
    overhead=_scoring,
    unless={"cover": no_rows},
  )
  for name, build, some in (
    ("x_attention", lambda rngs: XAttention(stride=2, **SIZES), 0.4),
    ("flex_prefill", _flex_prefill, 0.6),
    ("minference", _minference, 0.75),
  )
]
