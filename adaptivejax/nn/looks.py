# SPDX-License-Identifier: Apache-2.0
"""The looks of a whole model: found, replaced, and what they share.

Axes: L layers.
"""

from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx

from adaptivejax.core.cache import KVCache
from adaptivejax.nn.attention import Attention
from adaptivejax.nn.look import Look
from adaptivejax.nn.window import Window

M = TypeVar("M", bound=nnx.Module)


def looks_of(module: nnx.Module) -> list[Look]:
  """The looks of all attentions in a module; of stacked layers, one."""
  return [attention.look for attention in _attentions(module)]


def with_look(model: M, look: Look) -> M:
  """The model with another look in every attention; itself unchanged.

  Args:
    model: trained, its layers stacked or not.
    look: its arrays, settings among them, are repeated for each layer.

  Raises:
    ValueError: there is no attention in `model`, or it was trained with a
      sliding window, which another look would not keep.
  """
  model = jax.tree.map(lambda a: a, model)  # a copy
  attentions = _attentions(model)
  if not attentions:
    raise ValueError(
      f"{type(model).__name__} has no `Attention`, so nothing in it looks."
    )
  for attention in attentions:
    if isinstance(attention.look, Window) and not isinstance(look, Window):
      raise ValueError(
        f"{type(look).__name__} would look beyond the window of"
        f" {attention.look.span} tokens that {type(model).__name__} was trained"
        " with: take a model without a window."
      )
    layers = attention.query.kernel.shape[:-2]  # (L,), or () if not stacked
    repeat = lambda a, lead=layers: jnp.broadcast_to(a, (*lead, *a.shape))
    attention.look = jax.tree.map(repeat, look).turning(attention.rope)
  return model


def empty_cache_of(module: nnx.Module, *shape: Any) -> KVCache:
  """The cache that all looks in a module share, `Look.empty_cache(*shape)`.

  Raises:
    ValueError: looks that need different caches.
  """
  looks = looks_of(module) or [Look()]
  made = [jax.eval_shape(lambda x=x: x.empty_cache(*shape)) for x in looks]
  if any(cache != made[0] for cache in made):
    names = sorted({type(look).__name__ for look in looks})
    raise ValueError(
      "all layers share one cache, so their looks must need the same slots,"
      f" marks and memory; got {', '.join(names)} with different ones."
    )
  return looks[0].empty_cache(*shape)


def refuse_drafts(module: nnx.Module, who: str) -> None:
  """Raises ValueError if a look would make of drafts another text."""
  for look in looks_of(module):
    if look.evicts:
      raise ValueError(
        f"{who} takes drafts back, but {type(look).__name__} cannot take back"
        " what it read: decode without drafts, or with a look that keeps all"
        " keys."
      )
  refuse_alone(module, who)


def refuse_alone(module: nnx.Module, who: str) -> None:
  """Raises ValueError if a look reads one token otherwise than several."""
  for look in looks_of(module):
    if look.alone:
      raise ValueError(
        f"{who} reads several tokens at once; {type(look).__name__} looks"
        " otherwise for one that comes alone: what is said would depend on how"
        " many there are. Decode one by one, or with a look at all keys."
      )


def _attentions(module: nnx.Module) -> list[Attention]:
  parts = (part for _, part in nnx.iter_modules(module))
  return [part for part in parts if isinstance(part, Attention)]
