# SPDX-License-Identifier: Apache-2.0
"""The looks of a whole model: found, replaced, and what they share.

Axes: L layers.
"""

import math
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from adaptivejax.core.cache import KVCache
from adaptivejax.core.varying import vary, varying_axes
from adaptivejax.nn.attention import Attention
from adaptivejax.nn.look import Look
from adaptivejax.nn.stack import layer_at
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


def adopt_cache(module: nnx.Module, cache: KVCache) -> KVCache:
  """What other looks read, as the looks of `module` would have kept it.

  So one prompt, read once, is decoded in several ways.

  Args:
    module: the same model, with other looks.
    cache: made by looks that keep all keys (`Look.keeps_all`), of which it does
      not tell all itself.

  Raises:
    ValueError: the cache has not all keys as they are, or the looks of `module`
      do not keep them so, or its layers are not stacked alike.
  """
  attentions = _attentions(module)
  for look in looks_of(module):
    if not look.keeps_all:
      raise ValueError(
        f"{type(look).__name__} does not keep all keys as they are, or"
        " remembers more than follows from them: let it read them itself."
      )
  lacking = cache.evicts, cache.bias, cache.scale, cache.tree
  if any(part is not None for part in lacking):
    raise ValueError(
      "the cache has given keys up, merged them, stored them in 8 bits or holds"
      " a tree of drafts, so no other look can take them over."
    )
  _, layers, heads, slots, width = cache.k.shape
  leads = {a.query.kernel.shape[:-2] for a in attentions}
  lead = leads.pop() if len(leads) == 1 else (0,)  # () if not stacked
  repeats = math.prod(lead)
  if repeats * len(attentions) != layers or len(lead) > 1:
    raise ValueError(
      f"the cache has {layers} layers, which are not those of"
      f" {type(module).__name__}, or these are not stacked alike."
    )
  shape = layers, len(cache.length), heads, slots, width, cache.k.dtype
  made = vary(empty_cache_of(module, *shape), varying_axes(cache.k))
  for first, attention in enumerate(attentions):

    def read(i, made, first=first, attention=attention):
      look = layer_at(attention.look, i) if lead else attention.look
      layer = i * len(attentions) + first
      return look.append(made, layer, cache.read(layer))

    made = lax.fori_loop(0, repeats, read, made)
  return made._replace(length=cache.length)


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
