"""Eight billion parameters: Mixture-of-Depths in every other layer, and exits.

Raposo et al., 2024, of every second layer on an eighth of the tokens; trained
so that three depths are exits (Valipour et al., 2023), of which decoding takes
one, as data.  Shaped as Llama 3 8B.  256 chips, 64 sequences of 4096.

Compiled for v5e:16x16, in a train step a device holds 7.7 of 17.2 GB, computes
4.65e13 FLOPs, and receives 39.3 GB, most of it weights; no collective is
written down more often for more layers.

  adaptivejax compile configs/scale/depths_8b.py --topology v5e:16x16
"""

import functools

import jax.numpy as jnp
from flax import nnx
from jax.tree_util import Partial

from adaptivejax.core.rope import Rope
from adaptivejax.methods.depth import MixtureOfDepths, prefix
from adaptivejax.models import DecoderConfig, DecoderLM, decoder_block
from adaptivejax.nn import Group
from adaptivejax.training import DataConfig, OptimizerConfig, TrainConfig
from adaptivejax.training.decoding import Decoding
from adaptivejax.training.mesh import MeshConfig
from adaptivejax.training.tasks import sorted_language_modeling

MODEL = DecoderConfig(
  vocab=128_256,
  layers=32,
  features=4096,
  hidden=14_336,
  heads=32,
  kv_heads=8,
  gated=True,
  tied=False,
  rope=Rope(base=500_000.0),
)
MESH = MeshConfig(fsdp=64, model=4)
DATA = DataConfig(context=4096, batch=64)
EXITS = (8, 12, 16)
"""Of the 16 pairs of layers."""


def config(budget: float = 0.125) -> TrainConfig:
  """`budget`: tokens that every second layer computes, as a share."""

  def layer(rngs: nnx.Rngs) -> Group:
    first, second = decoder_block(MODEL, rngs), decoder_block(MODEL, rngs)
    if budget < 1:
      second = MixtureOfDepths(
        second, MODEL.features, capacity=budget, rngs=rngs
      )
    return Group([first, second])

  return TrainConfig(
    name="scale/depths_8b",
    build=lambda rngs: DecoderLM(MODEL, layer=layer, rngs=rngs),
    loss=functools.partial(sorted_language_modeling, exits=EXITS),
    data=DATA,
    optimizer=OptimizerConfig(learning_rate=3e-4, warmup=2000),
    mesh=MESH,
    precision="bfloat16",
    steps=100_000,
  )


def decoding() -> Decoding:
  last = jnp.int32(EXITS[-1])
  policy = lambda model: Partial(prefix, depth=last)
  return Decoding(rows=256, slots=4096, policy=policy)
