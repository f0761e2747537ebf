"""The dense twin with four of its layers trained to be exits (SoFT).

Schuster et al., 2022; Valipour et al., 2023.

  adaptivejax train configs/quickstart/exits.py
"""

import functools

from adaptivejax.models import DecoderLM
from adaptivejax.training import TrainConfig
from adaptivejax.training.tasks import sorted_language_modeling
from configs.quickstart.common import DATA, EXITS, MODEL, OPTIMIZER, STEPS


def config() -> TrainConfig:
  return TrainConfig(
    name="quickstart/exits",
    build=lambda rngs: DecoderLM(MODEL, rngs=rngs),
    loss=functools.partial(sorted_language_modeling, exits=EXITS),
    data=DATA,
    optimizer=OPTIMIZER,
    steps=STEPS,
  )
