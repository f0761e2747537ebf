# SPDX-License-Identifier: Apache-2.0
"""A stack in which every text has feed-forward neurons of its own.

Which ones is decided before decoding (`Neurons`); their weights are gathered
once, and the others are not read.

Axes: L layers, J of them with neurons of each text's own, B batch, T tokens,
D features, F hidden neurons, K of a text.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float, Int

from adaptivejax.core.cost import Cost, Signals, bound_of, flops, times
from adaptivejax.core.varying import vary, varying_axes
from adaptivejax.nn.block import Block
from adaptivejax.nn.mlp import Mlp
from adaptivejax.nn.setting import Frozen
from adaptivejax.nn.stack import StackOutput, layer_at, layer_count, plain


class Neurons(NamedTuple):
  """The neurons of each text in J layers that follow each other.

  Attributes:
    chosen: which, i32[B, J, K].
    up, gate, down: their weights, f[B, J, K, D], f[B, J, K, D] (None if the
      layers have no gate), f[B, J, D, K].
  """

  chosen: Array
  up: Array
  gate: Array | None
  down: Array


def gather_neurons(mlp: Mlp, chosen: Int[Array, "B J K"]) -> Neurons:
  """The weights of `chosen` neurons of J stacked layers.

  Raises:
    ValueError: the layers have biases, which neurons of a text have not.
  """
  if mlp.up.bias is not None or mlp.down.bias is not None:
    raise ValueError("neurons are gathered from layers without biases.")

  def rows(w):  # [J, F, D] -> [B, J, K, D]
    return jax.vmap(jax.vmap(lambda w, at: w[at]), (None, 0))(w, chosen)

  into = lambda layer: rows(jnp.swapaxes(layer.kernel.get_value(), 1, 2))
  gate = None if mlp.gate is None else into(mlp.gate)
  down = jnp.swapaxes(rows(mlp.down.kernel.get_value()), 2, 3)
  return Neurons(chosen, into(mlp.up), gate, down)


class NeuronMlp(nnx.Module):
  """A feed-forward layer of which each row of the batch has some neurons."""

  def __init__(self, some: Neurons, whole: Mlp):
    self.up, self.down = Frozen(some.up), Frozen(some.down)
    self.gate = None if some.gate is None else Frozen(some.gate)
    self.activation = whole.activation
    self.share = some.down.shape[-1] / whole.down.kernel.shape[0]

  def rows(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
    z = _product(x, self.up.get_value())
    if self.gate is None:
      z = self.activation(z)
    else:
      z = self.activation(_product(x, self.gate.get_value())) * z
    return _product(z, self.down.get_value())

  def __call__(self, x, live=None, key=None):
    del live, key
    cost = Cost.dense(flops(NeuronMlp.rows, self, x), x[..., 0].size)
    cost = cost._replace(full=cost.full / self.share)
    return self.rows(x), cost, Signals.none()


def by_neurons(
  layers,
  x: Float[Array, "B T D"],
  positions,
  cache=None,
  *,
  readout,
  key=None,
  neurons: Neurons,
  first: int | Int[Array, ""] = 1,
) -> StackOutput:
  """A stack that runs the texts' own neurons when decoding (T = 1).

  Args:
    neurons: of the same rows (dynamic).
    first: layers before the J that have them, which run whole (dynamic).

  Other arguments as in `nn.stack`.  The layers behind run whole, too.
  """
  if cache is None or x.shape[1] > 1:
    return plain(layers, x, positions, cache, readout=readout, key=key)
  if not isinstance(layers, Block) or not isinstance(layers.mlp, Mlp):
    raise ValueError(
      "neurons are those of `Block`s with an `Mlp`; this model stacks"
      f" {type(layers).__name__}."
    )
  total, some = layer_count(layers), neurons.down.shape[1]

  def whole(l):
    return layer_at(layers, l)

  def thin(l):
    block = layer_at(layers, l)
    pick = lambda a: lax.dynamic_index_in_dim(a, l - first, 1, keepdims=False)
    block.mlp = NeuronMlp(jax.tree.map(pick, neurons), block.mlp)
    return block

  def run(layer, l, carry):
    x, cache, said = carry
    x, cache, *new = layer(l)(x, positions, cache, l)
    put = lambda all, one: all.at[l].set(one)
    return x, cache, jax.tree.map(put, said, tuple(new))

  blank = jax.eval_shape(lambda: whole(0)(x, positions, cache, 0)[2:])
  most = bound_of(
    lambda x, cache: whole(0)(x, positions, cache, 0)[2], x, cache
  )
  most = times(most, total)
  said = jax.tree.map(lambda a: jnp.zeros((total, *a.shape), a.dtype), blank)
  carry, start = (x, cache, vary(said, varying_axes(x))), 0
  for layer, end in ((whole, first), (thin, first + some), (whole, total)):
    carry = lax.fori_loop(start, end, functools.partial(run, layer), carry)
    start = end
  x, cache, (cost, signals) = carry
  shares = cost.share
  cost = cost.total()._replace(bound=jnp.float32(most))
  depth = jnp.full(x.shape[:2], total, jnp.float32)
  signals = signals.mean()
  return StackOutput(x, cache, cost, signals, depth, shares)


def _product(x, w):
  """[B, T, I] times the own [B, O, I] of each row.

  One row is a matrix of its own: so its weights are read where they lie.
  """
  if len(x) == 1:
    return (x[0] @ w[0].T)[None]
  return jnp.einsum("bti,boi->bto", x, w)
