"""Mixture-of-Depths in every other layer, on a quarter of the tokens.

Raposo et al., 2024.

  adaptivejax train configs/quickstart/mod.py
"""

from flax import nnx

from adaptivejax.methods.depth import MixtureOfDepths
from adaptivejax.models import DecoderLM, decoder_block
from adaptivejax.nn import Group
from adaptivejax.training import TrainConfig
from adaptivejax.training.tasks import language_modeling
from configs.quickstart.common import DATA, MODEL, OPTIMIZER, STEPS


def layer(rngs: nnx.Rngs) -> Group:
  routed = MixtureOfDepths(
    decoder_block(MODEL, rngs), MODEL.features, capacity=0.25, rngs=rngs
  )
  return Group([decoder_block(MODEL, rngs), routed])


def config() -> TrainConfig:
  return TrainConfig(
    name="quickstart/mod",
    build=lambda rngs: DecoderLM(MODEL, layer=layer, rngs=rngs),
    loss=language_modeling,
    data=DATA,
    optimizer=OPTIMIZER,
    steps=STEPS,
  )
