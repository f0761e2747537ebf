"""What makes the models of this folder twins.

The experts that a byte runs are together as wide as the dense layer; all of
them are four times as wide.
"""

from collections.abc import Callable

from flax import nnx

from adaptivejax.models import DecoderConfig, DecoderLM, decoder_block
from adaptivejax.nn import Block, MixtureOfExperts, Mlp, stacked

MODEL = DecoderConfig(layers=4, features=64, hidden=256, heads=4, kv_heads=4)
EXPERTS, ACTIVE = 8, 2
STEPS = 600


def decoder(
  router: Callable[[nnx.Rngs], nnx.Module], rngs: nnx.Rngs
) -> DecoderLM:
  """A decoder with a mixture of experts in every layer.

  Args:
    router: makes the rule, `router(rngs)`.
    rngs: for the parameters.
  """

  def expert(rngs: nnx.Rngs) -> Mlp:
    return Mlp(MODEL.features, MODEL.hidden // ACTIVE, rngs=rngs)

  def layer(rngs: nnx.Rngs) -> Block:
    experts = stacked(expert, EXPERTS, rngs)
    return decoder_block(MODEL, rngs, MixtureOfExperts(router(rngs), experts))

  return DecoderLM(MODEL, layer=layer, rngs=rngs)
