"""Sequences of 131,072 tokens: each tile of queries looks at its best blocks.

The block-sparse heads of MInference (Jiang et al., 2024), trained with: of the
256 blocks of 512 keys a tile of 512 queries looks at the 32 whose mean scores
best, at the first and at its own, by the block-sparse kernel.  Shaped as Llama
3.1 8B.  512 chips, 32 sequences, each spread over 16 of them.

Compiled for v5p:8x8x8, in a train step a device holds 41.1 of 102.0 GB,
computes 7.05e14 FLOPs, half of them in the kernel, and receives 134.1 GB, most
of it keys, values and their gradients.

  adaptivejax compile configs/scale/context_131k.py --topology v5p:8x8x8
"""

from flax import nnx

from adaptivejax.core.rope import Rope
from adaptivejax.methods.attention import MInference
from adaptivejax.methods.attention.minference import Budgets
from adaptivejax.models import DecoderConfig, DecoderLM, decoder_block
from adaptivejax.nn import Block
from adaptivejax.training import DataConfig, OptimizerConfig, TrainConfig
from adaptivejax.training.decoding import Decoding
from adaptivejax.training.mesh import MeshConfig
from adaptivejax.training.tasks import language_modeling

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
BLOCK = 512
MESH = MeshConfig(fsdp=32, seq=16)
DATA = DataConfig(context=131_072, batch=32)


def config(budget: float = 0.125) -> TrainConfig:
  """`budget`: blocks that a tile of queries looks at, as a share."""
  blocks = round(budget * DATA.context / BLOCK)

  def layer(rngs: nnx.Rngs) -> Block:
    look = MInference(
      ("block_sparse",) * MODEL.heads,
      Budgets(blocks=blocks),
      block_q=BLOCK,
      block_kv=BLOCK,
    )
    look.most = blocks + 2  # and the ends, which are always seen
    return decoder_block(MODEL, rngs, look=look)

  return TrainConfig(
    name="scale/context_131k",
    build=lambda rngs: DecoderLM(MODEL, layer=layer, rngs=rngs),
    loss=language_modeling,
    data=DATA,
    optimizer=OptimizerConfig(learning_rate=3e-4, warmup=2000),
    mesh=MESH,
    precision="bfloat16",
    steps=20_000,
  )


def decoding() -> Decoding:
  return Decoding(rows=32, slots=DATA.context)
