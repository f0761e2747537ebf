# SPDX-License-Identifier: Apache-2.0
r"""A lens: what a hidden state of an early layer would be after the last one.

Belrose et al., 2023, https://arxiv.org/abs/2303.08112 (tuned lens)

After layer l the readout of the model sees h + A_l h + b_l, with A_l and b_l
trained to make it say what it says after the last layer, which has no lens.
With one a model that was never trained to exit can be asked early.

Axes: L layers, E exits, B batch, T tokens, D features.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from adaptivejax.core.halting import margin, max_prob
from adaptivejax.nn.stack import StackOutput


class Lens(nnx.Module):
  """An affine change of the state after each layer but the last.

  Args:
    layers: L, of the model.
    features: D.
  """

  def __init__(self, layers: int, features: int):
    self.kernel = nnx.Param(jnp.zeros((layers, features, features)))
    self.bias = nnx.Param(jnp.zeros((layers, features)))

  def __call__(
    self, l: Int[Array, ""] | int, x: Float[Array, "... D"]
  ) -> Float[Array, "... D"]:
    """The state after layer l (from 0, dynamic), as if after the last."""
    kernel, bias = self.kernel.get_value(), self.bias.get_value()
    change = x @ kernel[l] + bias[l]
    return x + jnp.where(l < len(bias) - 1, change, 0)

  def by_row(
    self, l: Int[Array, " B"], x: Float[Array, "B T D"]
  ) -> Float[Array, "B T D"]:
    """The same for rows that left after different layers."""
    return jax.vmap(self)(l, x)


class Through(nnx.Module):
  """A measure of confidence, see `nn.confidence`, that looks through a lens.

  Args:
    lens: see above.
    gap: whether it is the margin between the two largest probabilities, or the
      largest probability (static).
  """

  def __init__(self, lens: Lens, *, gap: bool = True):
    self.lens, self.gap = lens, gap

  def __call__(self, l, before, after, readout) -> Float[Array, "..."]:
    del before
    logits = readout(self.lens(l, after))
    return margin(logits) if self.gap else max_prob(logits)


def through_lens(
  layers,
  x: Float[Array, "B T D"],
  positions,
  cache=None,
  *,
  readout,
  key=None,
  stack: Callable[..., StackOutput],
  lens: Lens,
) -> StackOutput:
  """A stack whose rows are read out through the lens of where they left.

  Args:
    stack: which rows leave early, such as `calm` that measures `Through` it.
    lens: see above.

  Other arguments as in `nn.stack`.
  """
  out = stack(layers, x, positions, cache, readout=readout, key=key)
  if cache is None or x.shape[1] > 1:
    return out
  left = jnp.maximum(out.depth[:, 0].astype(jnp.int32) - 1, 0)
  return out._replace(x=lens.by_row(left, out.x))


def lens_loss(
  lens: Lens,
  hidden: Float[Array, "L B T D"],
  readout: Callable[[Array], Array],
  targets: Int[Array, "B T"] | None = None,
  *,
  exits: Sequence[int],
) -> Float[Array, ""]:
  """KL from the last layer to the readout of each exit, in nats, the mean.

  Args:
    lens: to train.
    hidden: after every layer, from `nn.every_layer`; gets no gradient.
    readout: hidden state to logits.
    targets: the next tokens; the last layer is what is learned from.
    exits: layers to look after, from 0 (static).
  """
  del targets
  hidden = jax.lax.stop_gradient(hidden)
  wanted = jax.nn.log_softmax(readout(hidden[-1]))

  @jax.checkpoint
  def gap(lens, state, l):
    said = jax.nn.log_softmax(readout(lens(l, state)))
    return (jnp.exp(wanted) * (wanted - said)).sum(-1).mean()

  return jnp.stack([gap(lens, hidden[l], l) for l in exits]).mean()
