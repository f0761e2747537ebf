# SPDX-License-Identifier: Apache-2.0
"""Given text, read as if decoding it: what it costs, token by token.

Axes: B batch, P prompt tokens, T tokens, L layers.
"""

import functools
from typing import NamedTuple

import jax
from jax import lax
from jaxtyping import Array, Int

from adaptivejax.core.cost import Cost
from adaptivejax.core.losses import cross_entropy
from adaptivejax.decode.inputs import bound, checked
from adaptivejax.nn.policy import ByStack
from adaptivejax.nn.stack import FULL


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
  tokens, _ = checked(tokens, model.config.vocab, None)
  policy = bound(policy)
  policy.check(model)
  if not isinstance(policy, ByStack):
    raise ValueError(
      f"{type(policy).__name__} is not a stack: it makes its own tokens, and"
      " cannot read given ones. Score what it made with a stack."
    )
  if not 1 <= prompt < tokens.shape[1]:
    raise ValueError(
      f"{prompt=} must leave tokens to score of the {tokens.shape[1]} given."
    )
  return _score(model, tokens, policy.stack, prompt)


@functools.partial(jax.jit, static_argnames="prompt")
def _score(model, tokens, stack, prompt) -> Score:
  cache = model.empty_cache(*tokens.shape)
  first = model(tokens[:, :prompt], cache)

  def step(carry, tokens):
    cache, logits = carry
    nats = cross_entropy(logits, tokens)
    out = model(tokens[:, None], cache, stack=stack)
    carry = out.cache, out.logits[:, -1]
    return carry, (nats, out.depth[:, -1], out.shares, out.cost)

  start = first.cache, first.logits[:, -1]
  _, (nats, depth, shares, cost) = lax.scan(step, start, tokens[:, prompt:].T)
  return Score(nats.T, depth.T, shares, cost.total())
