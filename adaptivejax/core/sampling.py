# SPDX-License-Identifier: Apache-2.0
"""From logits to a token: the sampling distribution, and the draw from it.

The random numbers of a row depend on its key, on the position in its text that
is drawn and on what the draw is for: on nothing else.  So a row's text does not
depend on which rows share its batch, nor on how many tokens a step emits: a
method that emits several tokens per step can make the very draws that plain
decoding makes one by one.

Axes: B batch, V vocabulary.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from adaptivejax.core import select
from adaptivejax.core.varying import vary, varying_axes

TOKEN, DRAFT, ACCEPT = range(3)
"""Salts, what a draw is for: a token of the text, one of a draft, a coin."""


class Sampling(NamedTuple):
  """How sharp and how wide to sample; data, so that nothing recompiles.

  Attributes:
    temperature: divides the logits; 0 is greedy, f32[].
    top_k: keep this many of the most likely tokens, i32[].
    top_p: of these, keep the fewest that hold this mass, f32[].
  """

  temperature: Array
  top_k: Array
  top_p: Array

  @classmethod
  def of(
    cls,
    temperature: Float[Array, ""] | float = 0.0,
    top_k: Int[Array, ""] | int | None = None,
    top_p: Float[Array, ""] | float = 1.0,
  ) -> "Sampling":
    """Checked settings; by default greedy, and all tokens kept.

    Raises:
      ValueError: a setting that is not traced lies outside its range.
    """
    everything = jnp.iinfo(jnp.int32).max
    top_k = everything if top_k is None else top_k
    if _known(temperature) and not 0 <= temperature < math.inf:
      raise ValueError(
        f"{temperature=} must be 0 (greedy) or above, and finite."
      )
    if _known(top_k) and not 1 <= top_k <= everything:
      raise ValueError(
        f"{top_k=} must keep at least 1 token; None keeps them all."
      )
    if _known(top_p) and not 0 < top_p <= 1:
      raise ValueError(f"{top_p=} must be a share above 0, at most 1 (all).")
    return cls(
      jnp.asarray(temperature, jnp.float32),
      jnp.asarray(top_k, jnp.int32),
      jnp.asarray(top_p, jnp.float32),
    )


def log_probs(
  logits: Float[Array, "*B V"], sampling: Sampling
) -> Float[Array, "*B V"]:
  """Log of the distribution that is sampled; -inf for tokens left out, f32.

  Softmax of logits / temperature, cut to `top_k` (ties go to the lower index)
  and then to the nucleus of `top_p` (Holtzman et al., 2020,
  https://arxiv.org/abs/1904.09751), normalised.  Greedy is the limit: all mass
  on the first best token.  NaN counts as -inf; where nothing is above -inf,
  token 0 has all the mass.  Sorts only if a cut is active.
  """
  x = _clean(logits)
  peak = x.max(-1, keepdims=True)
  best = jnp.arange(x.shape[-1]) == x.argmax(-1, keepdims=True)
  below = jnp.where(x > -jnp.inf, x - peak, -jnp.inf)
  heat = jnp.maximum(sampling.temperature, jnp.finfo(jnp.float32).tiny)
  warm = sampling.temperature > 0
  scaled = jnp.where(best, 0.0, jnp.where(warm, below / heat, -jnp.inf))
  cuts = (sampling.top_k < x.shape[-1]) | (sampling.top_p < 1)
  cut = lax.cond(warm & cuts, _cut, lambda scaled, _: scaled, scaled, sampling)
  return jax.nn.log_softmax(cut, axis=-1)


class Draw(NamedTuple):
  """Draws for each row, at any position of its text.

  Attributes:
    sampling: the settings, shared by the rows.
    keys: one per row, Key[B].
  """

  sampling: Sampling
  keys: Array

  def log_probs(self, logits: Float[Array, "*B V"]) -> Float[Array, "*B V"]:
    """`log_probs` at these settings."""
    return log_probs(logits, self.sampling)

  def token(
    self, logits: Float[Array, "B V"], at: Int[Array, " B"], salt: int = TOKEN
  ) -> Int[Array, " B"]:
    """The token at position `at[b]` of row b; greedy costs one argmax."""
    warm = lambda x: self.categorical(self.log_probs(x), at, salt)
    cold = lambda x: _clean(x).argmax(-1).astype(jnp.int32)
    logits = self._vary(logits, at)
    return lax.cond(self.sampling.temperature > 0, warm, cold, logits)

  def categorical(
    self, log_probs: Float[Array, "B V"], at: Int[Array, " B"], salt: int
  ) -> Int[Array, " B"]:
    """A token from `log_probs` by the Gumbel trick; where greedy, the best.

    Args:
      log_probs: need not be normalised; -inf is never drawn.
      at: position in the text of the token drawn (dynamic).
      salt: what the draw is for (static).  Two draws that must be independent
        at the same position need different salts.
    """

    def noisy(x):
      noise = lambda key: jax.random.gumbel(key, x.shape[1:], jnp.float32)
      return x + jax.vmap(noise)(self._keys(at, salt))

    warm = self.sampling.temperature > 0
    scores = self._vary(log_probs.astype(jnp.float32), at)
    scores = lax.cond(warm, noisy, lambda x: x, scores)
    return scores.argmax(-1).astype(jnp.int32)

  def uniform(
    self, at: Int[Array, " B"], salt: int, shape: tuple[int, ...] = ()
  ) -> Float[Array, " B ..."]:
    """Numbers in [0, 1) for position `at[b]`; where greedy, all 0."""
    numbers = jax.vmap(lambda key: jax.random.uniform(key, shape))
    zeros = self._vary(jnp.zeros((*at.shape, *shape), jnp.float32), at)
    return lax.cond(
      self.sampling.temperature > 0,
      lambda _: numbers(self._keys(at, salt)),
      lambda zeros: zeros,
      zeros,
    )

  def _vary(self, x, at):
    return vary(x, varying_axes(self, at))

  def _keys(self, at, salt):
    fold = jax.random.fold_in
    return jax.vmap(lambda key, p: fold(fold(key, p), salt))(self.keys, at)


def _cut(scaled, sampling):
  kept = select.top_k(scaled, jnp.maximum(sampling.top_k, 1))
  scaled = jnp.where(kept, scaled, -jnp.inf)
  kept = select.top_p(jax.nn.softmax(scaled, axis=-1), sampling.top_p)
  return jnp.where(kept, scaled, -jnp.inf)


def _clean(logits):
  """f32 without NaN and +inf."""
  x = logits.astype(jnp.float32)
  largest = jnp.finfo(jnp.float32).max
  return jnp.where(jnp.isnan(x), -jnp.inf, jnp.minimum(x, largest))


def _known(value) -> bool:
  return not isinstance(value, jax.core.Tracer)
