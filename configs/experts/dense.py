"""The dense twin of the models of experts: 2.37 bits per byte of held-out text.

adaptivejax train configs/experts/dense.py
"""

import dataclasses

from adaptivejax.models import DecoderLM
from adaptivejax.training import TrainConfig
from configs.experts.common import MODEL, STEPS
from configs.quickstart import dense


def config() -> TrainConfig:
  return dataclasses.replace(
    dense.config(),
    name="experts/dense",
    build=lambda rngs: DecoderLM(MODEL, rngs=rngs),
    steps=STEPS,
  )
