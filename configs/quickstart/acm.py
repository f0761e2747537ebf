"""Adaptive Computation Modules: feed-forward layers of four learners each.

Wojcik et al., 2023.  Trained from scratch, the budget coming down to half.

  adaptivejax train configs/quickstart/acm.py
"""

from flax import nnx

from adaptivejax.methods.width import AdaptiveComputationModule
from adaptivejax.models import DecoderLM, decoder_block
from adaptivejax.nn import Block, Mlp, split_mlp
from adaptivejax.training import TrainConfig
from adaptivejax.training.schedules import cosine
from adaptivejax.training.tasks import language_modeling
from configs.quickstart.common import DATA, MODEL, OPTIMIZER, STEPS


def layer(rngs: nnx.Rngs) -> Block:
  dense = Mlp(MODEL.features, MODEL.hidden, rngs=rngs)
  module = AdaptiveComputationModule(
    split_mlp(dense, 4), MODEL.features, rngs=rngs
  )
  return decoder_block(MODEL, rngs, mlp=module)


def config() -> TrainConfig:
  return TrainConfig(
    name="quickstart/acm",
    build=lambda rngs: DecoderLM(MODEL, layer=layer, rngs=rngs),
    loss=language_modeling,
    budget=cosine(0.5, steps=STEPS),
    data=DATA,
    optimizer=OPTIMIZER,
    steps=STEPS,
  )
