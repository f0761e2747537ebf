"""A hundred billion parameters: eight of 128 experts, spread over 16 devices.

The routing of DeepSeek-V3 (2024): sigmoid scores, a bias that balances, two
shared experts; attention with grouped queries instead of latent ones.  256
chips, 256 sequences of 4096.

Compiled for v6e:16x16, in a train step a device holds 33.3 of 34.4 GB, computes
3.34e14 FLOPs, most of them in the grouped matmul, and receives 114.9 GB: tokens
go to their experts by all-to-all, and what is gathered are weights.

  adaptivejax compile configs/scale/experts_100b.py --topology v6e:16x16
"""

from flax import nnx

from adaptivejax.methods.experts import DeepSeekRouter
from adaptivejax.models import DecoderConfig, DecoderLM, decoder_block
from adaptivejax.models.decoder_layer import decoder_mlp
from adaptivejax.nn import Block, MixtureOfExperts, stacked
from adaptivejax.training import DataConfig, OptimizerConfig, TrainConfig
from adaptivejax.training.decoding import Decoding
from adaptivejax.training.mesh import MeshConfig
from adaptivejax.training.tasks import language_modeling

MODEL = DecoderConfig(
  vocab=128_256,
  layers=40,
  features=4096,
  hidden=1536,
  heads=32,
  kv_heads=8,
  gated=True,
  tied=False,
)
EXPERTS, SHARED = 128, 2
MESH = MeshConfig(fsdp=16, expert=16)
DATA = DataConfig(context=4096, batch=256)


def config(budget: float = 1 / 16) -> TrainConfig:
  """`budget`: experts that a token runs, as a share."""

  def layer(rngs: nnx.Rngs) -> Block:
    mlp = lambda width, rngs: decoder_mlp(MODEL, width * MODEL.hidden, rngs)
    if budget == 1:
      return decoder_block(MODEL, rngs, mlp(EXPERTS + SHARED, rngs))
    router = DeepSeekRouter(
      MODEL.features, EXPERTS, top_k=round(budget * EXPERTS), rngs=rngs
    )
    experts = stacked(lambda rngs: mlp(1, rngs), EXPERTS, rngs)
    mixture = MixtureOfExperts(router, experts, mlp(SHARED, rngs))
    return decoder_block(MODEL, rngs, mixture)

  return TrainConfig(
    name="scale/experts_100b",
    build=lambda rngs: DecoderLM(MODEL, layer=layer, rngs=rngs),
    loss=language_modeling,
    data=DATA,
    optimizer=OptimizerConfig(learning_rate=3e-4, warmup=2000),
    mesh=MESH,
    precision="bfloat16",
    steps=100_000,
  )


def decoding() -> Decoding:
  return Decoding(rows=1024, slots=4096)
