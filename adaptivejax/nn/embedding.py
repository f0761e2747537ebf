# SPDX-License-Identifier: Apache-2.0
"""What encoders make tokens of: patches of an image, or words.

Axes: B batch, H height and W width in pixels, C channels, T tokens, D features.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from adaptivejax.nn.norm import LayerNorm


class PatchEmbedding(nnx.Module):
  """Patches of an image behind a class token, with learned positions.

  Dosovitskiy et al., 2021, https://arxiv.org/abs/2010.11929, eq. 1.

  Args:
    image: side of the square images that the positions are for, in pixels.
    patch: side of a patch, which divides it.
    channels: C.
    features: D.
    masks: with what stands for a patch that is hidden in training, which is
      kept but not used here (static).
    rngs: for the parameters.
  """

  def __init__(
    self,
    image: int,
    patch: int,
    channels: int,
    features: int,
    *,
    masks: bool = False,
    rngs: nnx.Rngs,
  ):
    if min(image, patch) < 1 or image % patch:
      raise ValueError(f"{patch=} must be at least 1 and divide {image=}.")
    init = jax.nn.initializers.normal(0.02)
    make = lambda *shape: nnx.Param(init(rngs.params(), shape))
    self.kernel = make(patch, patch, channels, features)
    self.bias = nnx.Param(jnp.zeros(features))
    self.first = make(1, 1, features)
    self.places = make(1, 1 + (image // patch) ** 2, features)
    self.mask = make(1, features) if masks else None

  def __call__(self, image: Float[Array, "B H W C"]) -> Float[Array, "B T D"]:
    """The class token, then the patches row by row.

    Sides may differ from those of training, in whole patches: the positions are
    then interpolated (bicubic, as in transformers).
    """
    kernel = self.kernel.get_value()
    p, features = kernel.shape[0], kernel.shape[-1]
    if image.ndim != 4 or image.shape[1] % p or image.shape[2] % p:
      raise ValueError(
        "images must be [batch, height, width, channels], sides in whole"
        f" patches of {p} pixels; got {image.shape}."
      )
    batch, height, width, channels = image.shape
    rows, columns = height // p, width // p
    cut = image.reshape(batch, rows, p, columns, p, channels).swapaxes(2, 3)
    x = cut.reshape(batch, rows * columns, p * p * channels)
    x = x.astype(kernel.dtype) @ kernel.reshape(-1, features)
    x = x + self.bias.get_value()
    first = jnp.broadcast_to(self.first.get_value(), (batch, 1, features))
    places = _resized(self.places.get_value()[0], rows, columns)
    return jnp.concatenate([first, x], 1) + places


class WordEmbedding(nnx.Module):
  """Words, their positions and types, normalised.

  Devlin et al., 2019, https://arxiv.org/abs/1810.04805, sec. 3.

  Args:
    vocab: words there are.
    context: tokens of a text, at most.
    types: kinds of segments.
    features: D.
    epsilon: of the norm.
    rngs: for the parameters.
  """

  def __init__(
    self,
    vocab: int,
    context: int,
    types: int,
    features: int,
    *,
    epsilon: float = 1e-12,
    rngs: nnx.Rngs,
  ):
    init = jax.nn.initializers.normal(0.02)
    table = lambda n: nnx.Param(init(rngs.params(), (n, features)))
    self.words, self.places, self.types = map(table, (vocab, context, types))
    self.norm = LayerNorm(features, epsilon=epsilon)

  def __call__(
    self, tokens: Int[Array, "B T"], types: Int[Array, "B T"] | None = None
  ) -> Float[Array, "B T D"]:
    """`types` are all 0 if not given."""
    words, places = self.words.get_value(), self.places.get_value()
    length = tokens.shape[1]
    if length > len(places):
      raise ValueError(
        f"a text of {length} tokens is longer than the {len(places)} positions"
        " there are: cut it."
      )
    kinds = self.types.get_value()
    kind = kinds[0] if types is None else kinds[types]
    return self.norm(words[tokens] + kind + places[:length])


def _resized(places: Float[Array, "N D"], rows: int, columns: int):
  """Positions of a grid of other sides; those of the class token stay."""
  side = round((len(places) - 1) ** 0.5)
  if (rows, columns) == (side, side):
    return places
  grid = places[1:].reshape(side, side, -1).astype(jnp.float32)
  down, along = _bicubic(side, rows), _bicubic(side, columns)
  grid = jnp.einsum("rs,stf,ct->rcf", down, grid, along)
  grid = grid.reshape(rows * columns, -1).astype(places.dtype)
  return jnp.concatenate([places[:1], grid])


def _bicubic(have: int, want: int) -> np.ndarray:
  """Weights f32[want, have] of cubic convolution, a = -3/4, edges repeated.

  Keys, 1981, https://doi.org/10.1109/TASSP.1981.1163711, eq. 15 for other a.
  """
  a = -0.75
  at = (np.arange(want) + 0.5) * have / want - 0.5
  weights = np.zeros((want, have))
  for tap in range(-1, 3):
    near = np.floor(at) + tap
    d = np.abs(at - near)
    close = (a + 2) * d**3 - (a + 3) * d**2 + 1
    far = a * (d**3 - 5 * d**2 + 8 * d - 4)
    to = np.clip(near, 0, have - 1).astype(int)
    np.add.at(weights, (np.arange(want), to), np.where(d <= 1, close, far))
  return weights.astype(np.float32)
