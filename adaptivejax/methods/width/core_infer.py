# SPDX-License-Identifier: Apache-2.0
r"""CoreInfer: a text is continued by the neurons that its prompt used most.

Wang et al., 2024, https://arxiv.org/abs/2410.18311

With z_t = act(x_t) the neurons of a feed-forward layer at prompt token t (what
goes into `down`), each token nominates its

    n = floor(token_share * mean_t #{i : z_ti > 0})

largest, and the core is the floor(share F) neurons with most nominations.  It
is found once per text and layer ("stability-guided"); every generated token
runs the core only, whose weights are gathered once, so nothing is decided while
decoding and the other weights are not even read.  The first and the last layers
stay whole, and so does the prompt.

Primitive: `top_k` to nominate; then `nn.by_neurons`, the core's weights being
the policy's memory.
Departs: neurons are ranked by magnitude, which for ReLU is the same.  The
prompt is read a second time to see its neurons.  No sets for clusters of texts
("similarity-guided").
Axes: L layers, J of them with a core, B batch, T tokens, P prompt tokens,
D features, F hidden neurons, K of the core.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.tree_util import Partial
from jaxtyping import Array, Bool, Float, Int

from adaptivejax.core.select import top_k
from adaptivejax.nn.block import Block
from adaptivejax.nn.mlp import Mlp
from adaptivejax.nn.neurons import Neurons, by_neurons, gather_neurons
from adaptivejax.nn.policy import ByStack, Policy, static
from adaptivejax.nn.stack import layer_count


def nominate(
  z: Float[Array, "P F"], real: Bool[Array, " P"], token_share: float, k: int
) -> Int[Array, " K"]:
  """The `k` neurons that most of the `real` tokens nominate, rising."""
  active = ((z > 0) & real[:, None]).sum() / jnp.maximum(real.sum(), 1)
  many = jnp.floor(token_share * active).astype(jnp.int32)
  votes = (top_k(jnp.abs(z), many) & real[:, None]).sum(0)
  return jnp.sort(lax.top_k(votes, k)[1])  # ties go to the first


def core_of(
  model: Any,
  prompt: Int[Array, "B P"],
  lengths: Int[Array, " B"] | None = None,
  *,
  share: float = 0.4,
  token_share: float = 0.4,
  cold_first: int = 1,
  cold_last: int = 1,
) -> Neurons:
  """The core of each prompt; all is static but the prompts.

  Args:
    model: a `DecoderLM` of `Block`s with an `Mlp`.
    prompt: row b has `lengths[b]` tokens, or all.
    share: K / F, in (0, 1].
    token_share: of a token's active neurons, those it nominates.
    cold_first, cold_last: layers that stay whole.
  """
  layers, total = model.layers, layer_count(model.layers)
  if not isinstance(layers, Block) or not isinstance(layers.mlp, Mlp):
    raise ValueError("CoreInfer picks neurons of `Block`s with an `Mlp`.")
  if not 0 < share <= 1 or not 0 < token_share <= 1:
    raise ValueError(f"{share=} and {token_share=} must be shares in (0, 1].")
  if min(cold_first, cold_last) < 0 or cold_first + cold_last >= total:
    raise ValueError(
      f"{cold_first=} and {cold_last=} must leave one of the {total} layers."
    )
  real = jnp.ones_like(prompt, bool)
  if lengths is not None:
    real = jnp.arange(prompt.shape[1]) < lengths[:, None]
  k = max(int(share * layers.mlp.down.kernel.shape[-2] + 1e-6), 1)
  positions = jnp.where(real, jnp.arange(prompt.shape[1]), -1)

  def body(x, layer):
    x, *_ = layer.attend(x, positions)
    z = layer.mlp.hidden(layer.norm_mlp(x))
    pick = jax.vmap(lambda z, real: nominate(z, real, token_share, k))
    return layer.feed(x)[0], pick(z, real)

  _, neurons = lax.scan(body, model.embed(prompt), layers)
  warm = lambda tree: jax.tree.map(
    lambda a: a[cold_first : total - cold_last], tree
  )
  return gather_neurons(warm(layers.mlp), jnp.moveaxis(warm(neurons), 1, 0))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class CoreInfer(Policy):
  """Decoding by the core neurons of each prompt; fields as in `core_of`."""

  share: float = static(0.4)
  token_share: float = static(0.4)
  cold_first: int = static(1)
  cold_last: int = static(1)

  def start(self, model, prompt, lengths, slots, logits):
    del slots
    settings = dataclasses.asdict(self)
    return core_of(model, prompt, lengths, **settings), logits

  def step(self, model, last, cache, memory, draw, live):
    stack = Partial(by_neurons, neurons=memory, first=self.cold_first)
    return ByStack(stack).step(model, last, cache, memory, draw, live)
