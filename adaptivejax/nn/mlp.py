# SPDX-License-Identifier: Apache-2.0
"""The feed-forward layer, and what every feed-forward module answers to.

A feed-forward module is called as `module(x, live, key)` and returns `(y, cost,
signals)`: `live` are the items to compute (the others get zero), `key` is given
in training and then asks for the differentiable form.

Axes: D features, F hidden.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key

from adaptivejax.core.buckets import bucketed
from adaptivejax.core.clusters import balanced_clusters
from adaptivejax.core.cost import Cost, Signals, flops
from adaptivejax.nn.linear import linear


class Mlp(nnx.Module):
  """`down(act(up(x)))`, or gated `down(act(gate(x)) * up(x))` (SwiGLU).

  Shazeer, 2020, https://arxiv.org/abs/2002.05202
  """

  def __init__(
    self,
    features: int,
    hidden: int,
    *,
    gated: bool = False,
    activation: Callable[[Array], Array] = jax.nn.gelu,
    bias: bool = False,
    rngs: nnx.Rngs,
  ):
    make = lambda into, out: linear(into, out, rngs=rngs, bias=bias)
    self.up = make(features, hidden)
    self.gate = make(features, hidden) if gated else None
    self.down = make(hidden, features)
    self.activation = activation

  def rows(
    self,
    x: Float[Array, "... D"],
    product: Callable[[Array, Array], Array] | None = None,
  ) -> Float[Array, "... D"]:
    """The layer itself, row by row.

    With `product`, that multiplies: `product(rows, kernel)`.
    """
    return _product(self.down, self.hidden(x, product), product)

  def hidden(
    self,
    x: Float[Array, "... D"],
    product: Callable[[Array, Array], Array] | None = None,
  ) -> Float[Array, "... F"]:
    """What its neurons say."""
    up = _product(self.up, x, product)
    if self.gate is None:
      return self.activation(up)
    return self.activation(_product(self.gate, x, product)) * up

  def __call__(
    self,
    x: Float[Array, "*N D"],
    live: Bool[Array, "*N"] | None = None,
    key: Key[Array, ""] | None = None,
  ) -> tuple[Float[Array, "*N D"], Cost, Signals]:
    del key
    if live is None:
      cost = Cost.dense(flops(Mlp.rows, self, x), x[..., 0].size)
      return self.rows(x), cost, Signals.none()
    y, cost = bucketed(lambda r, m: m.rows(r), x, live, self, keep=False)
    return y, cost, Signals.none()


def _check_linear(mlp: Mlp) -> None:
  """Raises ValueError if kernels are not stored as [in, out]."""
  for layer in (mlp.up, mlp.gate, mlp.down):
    if layer is not None and not isinstance(layer, nnx.Linear):
      raise ValueError(
        f"layers of {type(layer).__name__} are not cut into parts or joined: do"
        " it first, and store kernels otherwise (`out_major`) afterwards."
      )


def split_mlp(
  mlp: Mlp, parts: int, order: Int[Array | np.ndarray, " F"] | None = None
) -> Mlp:
  """The neurons of a layer dealt to parts, exactly: their sum is the layer.

  A bias of the output is shared equally.

  Args:
    mlp: the layer.
    parts: how many, each with as many neurons; they lead every leaf.
    order: the neurons, those of the first part first (dynamic); as they stand,
      if not given.

  Raises:
    ValueError: a remainder, or not one place for each neuron.
  """
  _check_linear(mlp)
  hidden = mlp.down.kernel.shape[0]
  if parts < 1 or hidden % parts:
    raise ValueError(f"{parts=} must divide the {hidden} hidden neurons.")
  if order is not None and order.shape != (hidden,):
    raise ValueError(
      f"`order` must name each of the {hidden} neurons once; got an array of"
      f" shape {order.shape}."
    )

  def columns(a):
    a = a if order is None else a[:, order]
    return jnp.moveaxis(a.reshape(a.shape[0], parts, -1), 1, 0)

  def rows(a):
    a = a if order is None else a[order]
    return a.reshape(parts, hidden // parts, a.shape[1])

  split = jax.tree.map(lambda a: a, mlp)  # a copy
  for layer, cut in (
    (split.up, columns),
    (split.gate, columns),
    (split.down, rows),
  ):
    if layer is not None:
      layer.kernel.set_value(cut(layer.kernel.get_value()))
  for layer in (split.up, split.gate):
    if layer is not None and layer.bias is not None:
      layer.bias.set_value(columns(layer.bias.get_value()[None])[:, 0])
  if split.down.bias is not None:
    bias = split.down.bias.get_value() / parts
    split.down.bias.set_value(jnp.broadcast_to(bias, (parts, *bias.shape)))
  return split


def join_mlp(parts: Mlp) -> Mlp:
  """The layer that is the sum of its parts: undoes `split_mlp`."""
  _check_linear(parts)
  whole = jax.tree.map(lambda a: a, parts)  # a copy
  for layer in (whole.up, whole.gate):
    if layer is not None:
      kernel = jnp.moveaxis(layer.kernel.get_value(), 0, 1)
      layer.kernel.set_value(kernel.reshape(kernel.shape[0], -1))
      if layer.bias is not None:
        layer.bias.set_value(layer.bias.get_value().reshape(-1))
  if whole.down.bias is not None:
    whole.down.bias.set_value(whole.down.bias.get_value().sum(0))
  down = whole.down.kernel.get_value()
  whole.down.kernel.set_value(down.reshape(-1, down.shape[-1]))
  return whole


def cluster_neurons(
  mlp: Mlp, parts: int, *, seed: int = 0
) -> Int[np.ndarray, " F"]:
  """An order for `split_mlp` in which the neurons of a part are alike.

  Alike is in the direction of their input weights (`core.clusters`, host).
  """
  layer = mlp.up if mlp.gate is None else mlp.gate
  points = np.asarray(layer.kernel.get_value(), np.float32).T
  points = points / np.maximum(np.linalg.norm(points, axis=1)[:, None], 1e-12)
  part = balanced_clusters(points, parts, seed=seed)
  return np.argsort(part, kind="stable").astype(np.int32)


def _product(layer, x: Array, product) -> Array:
  if product is None:
    return layer(x)
  if layer.bias is not None:
    raise ValueError("rows of several experts have no bias: make them without.")
  return product(x, layer.kernel.get_value())
