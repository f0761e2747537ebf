"""The dense twin: every token runs every layer.

adaptivejax train configs/quickstart/dense.py
"""

from adaptivejax.models import DecoderLM
from adaptivejax.training import TrainConfig
from adaptivejax.training.tasks import language_modeling
from configs.quickstart.common import DATA, MODEL, OPTIMIZER, STEPS


def config() -> TrainConfig:
  return TrainConfig(
    name="quickstart/dense",
    build=lambda rngs: DecoderLM(MODEL, rngs=rngs),
    loss=language_modeling,
    data=DATA,
    optimizer=OPTIMIZER,
    steps=STEPS,
  )
