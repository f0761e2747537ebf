# SPDX-License-Identifier: Apache-2.0
"""Prefill once, then one token at a time: to generate, or to score.

A policy is a stack (`nn.stack`) bound to its thresholds with
`jax.tree_util.Partial`; it is an argument of the compiled function, so trying
another threshold does not compile again.

Axes: B batch, P prompt tokens, T tokens.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.tree_util import Partial
from jaxtyping import Array, Int, Key

from adaptivejax.core.cost import Cost
from adaptivejax.core.losses import cross_entropy
from adaptivejax.nn.stack import plain

FULL = Partial(plain)
"""The policy that runs all layers."""


class Generation(NamedTuple):
  """What was generated.

  Attributes:
    tokens: i32[B, T], the prompt not included.
    depth: layers run to predict each of them, f32[B, T].
    cost: of the T - 1 decoding steps, without the prompt.
  """

  tokens: Array
  depth: Array
  cost: Cost


class Score(NamedTuple):
  """What given text costs, token by token.

  Attributes:
    nats: -log p of each token after the prompt, f32[B, T - P].
    depth: layers run when reading it, f32[B, T - P].
    shares: realised share of compute per layer then, f32[T - P, L].
    cost: of those steps, without the prompt.
  """

  nats: Array
  depth: Array
  shares: Array
  cost: Cost


def generate(
  model,
  prompt: Int[Array, "B P"],
  *,
  steps: int,
  policy=FULL,
  temperature: float = 0.0,
  key: Key[Array, ""] | None = None,
) -> Generation:
  """Continues each prompt by `steps` tokens (static).

  Args:
    model: a `DecoderLM`.
    prompt: at least one token; rows of equal length.
    steps: tokens to make.
    policy: how the layers run while decoding; the prompt runs them all.
    temperature: 0 is greedy; else sampling, which needs `key` (dynamic).
    key: for sampling.
  """
  prompt, policy = _checked(prompt, model.config.vocab), _bound(policy)
  if steps < 1:
    raise ValueError(f"{steps=} must be at least 1 token.")
  if not temperature >= 0 or (temperature > 0 and key is None):
    raise ValueError(
      f"{temperature=} must be 0 (greedy) or above, and then needs a `key`."
    )
  key = jax.random.key(0) if key is None else key
  return _generate(model, prompt, policy, jnp.float32(temperature), key, steps)


@functools.partial(jax.jit, static_argnames="steps")
def _generate(model, prompt, policy, temperature, key, steps) -> Generation:
  batch, length = prompt.shape
  cache = model.empty_cache(batch, length + steps - 1)  # the last is not read
  first = model(prompt, cache)

  def choose(logits, key):
    heat = jnp.where(temperature > 0, temperature, 1.0)
    drawn = jax.random.categorical(key, logits / heat)
    best = logits.argmax(-1)
    return jnp.where(temperature > 0, drawn, best).astype(jnp.int32)

  def step(carry, key):
    token, cache = carry
    out = model(token[:, None], cache, stack=policy)
    token = choose(out.logits[:, -1], key)
    return (token, out.cache), (token, out.depth[:, -1], out.cost)

  keys = jax.random.split(key, steps)
  token = choose(first.logits[:, -1], keys[0])
  _, (tokens, depth, cost) = lax.scan(step, (token, first.cache), keys[1:])
  join = lambda one, rest: jnp.concatenate([one[None], rest]).T
  depth = join(first.depth[:, -1], depth)
  return Generation(join(token, tokens), depth, cost.total())


def score(
  model, tokens: Int[Array, "B T"], *, prompt: int = 1, policy=FULL
) -> Score:
  """Reads given text as if decoding it: each token after its true past.

  Args:
    model: a `DecoderLM`.
    tokens: the text; its first `prompt` tokens are prefilled, not scored.
    prompt: static.
    policy: how the layers run while decoding.
  """
  tokens, policy = _checked(tokens, model.config.vocab), _bound(policy)
  if not 1 <= prompt < tokens.shape[1]:
    raise ValueError(
      f"{prompt=} must leave tokens to score of the {tokens.shape[1]} given."
    )
  return _score(model, tokens, policy, prompt)


@functools.partial(jax.jit, static_argnames="prompt")
def _score(model, tokens, policy, prompt) -> Score:
  cache = model.empty_cache(*tokens.shape)
  first = model(tokens[:, :prompt], cache)

  def step(carry, tokens):
    cache, logits = carry
    nats = cross_entropy(logits, tokens)
    out = model(tokens[:, None], cache, stack=policy)
    carry = out.cache, out.logits[:, -1]
    return carry, (nats, out.depth[:, -1], out.shares, out.cost)

  start = first.cache, first.logits[:, -1]
  _, (nats, depth, shares, cost) = lax.scan(step, start, tokens[:, prompt:].T)
  return Score(nats.T, depth.T, shares, cost.total())


def _bound(policy):
  """A policy as a pytree, so that its thresholds are data."""
  if not callable(policy):
    raise ValueError(
      f"a policy is a stack, as in `Partial(calm, threshold=0.9)`; got"
      f" {policy!r}."
    )
  return policy if isinstance(policy, Partial) else Partial(policy)


def _checked(tokens, vocab: int) -> Int[Array, "B T"]:
  tokens = jnp.asarray(tokens)
  if tokens.ndim != 2 or 0 in tokens.shape:
    raise ValueError(
      f"tokens must be [batch, length] with at least one of each; got shape"
      f" {tokens.shape}."
    )
  if not isinstance(tokens, jax.core.Tracer):
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0 or high >= vocab:
      raise ValueError(
        f"tokens must lie in 0..{vocab - 1}, the model's vocabulary; got"
        f" {low}..{high}."
      )
  return tokens
