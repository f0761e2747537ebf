"""The dense twin with every layer trained to be an exit (SoFT), for CALM.

Schuster et al., 2022; Valipour et al., 2023.

  adaptivejax train configs/quickstart/exits.py
"""

from adaptivejax.models import DecoderLM
from adaptivejax.training import TrainConfig
from adaptivejax.training.tasks import sorted_language_modeling
from configs.quickstart.common import DATA, MODEL, OPTIMIZER, STEPS


def config() -> TrainConfig:
  return TrainConfig(
    name="quickstart/exits",
    build=lambda rngs: DecoderLM(MODEL, rngs=rngs),
    loss=sorted_language_modeling,
    data=DATA,
    optimizer=OPTIMIZER,
    steps=STEPS,
  )
