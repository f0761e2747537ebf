# SPDX-License-Identifier: Apache-2.0
"""BlockFFN: how many experts a byte leaves out, and eight bytes in a row.

The same model is trained with the two losses, at the largest weight that the
paper's schedule reaches, and without them.  The speed is
that of one layer of the paper's smallest model on eight tokens that share as
many experts as eight bytes do here.
"""

import functools
import statistics

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from adaptivejax.core.select import chunk_union
from adaptivejax.methods.experts import BlockFFN
from adaptivejax.models import DecoderLM, decoder_block
from adaptivejax.nn import adjust
from adaptivejax.nn.stack import layer_at, layer_count
from adaptivejax.report.clock import interleave
from adaptivejax.training import TrainConfig
from adaptivejax.training.tasks import language_modeling
from benchmarks.headlines import Headline, beds

PAPER = (
  "over 80 % of the experts left out by a token, 70 % by 8 tokens together; up"
  " to 3.67 times as fast as a dense model"
)
HIDDEN, EXPERTS, CHUNK, STEPS = 32, 32, 8, 300
LAYER = {"features": 768, "hidden": 64, "experts": 48}
LOSSES = {
  "losses": {"sparsity": 0.2},
  "none": {"sparsity": 0.0, "locality": 0.0},
}


def measure(quick: bool) -> Headline:
  text = beds.texts(20 if quick else 200)
  figures = {}
  for name, weights in LOSSES.items():
    model = beds.fit(_config(name, weights), quick)
    token, chunk = map(float, _left_out(model, text))
    figures |= {
      f"{name}_bits": float(beds.bits_per_byte(model, text)),
      f"{name}_token": token,
      f"{name}_chunk": chunk,
    }
  figures |= _speed(1 - figures["losses_chunk"], 0.2 if quick else 6)
  words = (
    f"a byte leaves out {figures['losses_token']:.0%} of {EXPERTS} experts, 8"
    f" bytes in a row {figures['losses_chunk']:.0%}, at"
    f" {figures['losses_bits']:.3f} bits per byte; without the losses"
    f" {figures['none_token']:.0%} and {figures['none_chunk']:.0%} at"
    f" {figures['none_bits']:.3f} ({STEPS} steps each). A layer of 48 experts"
    f" of width 64 runs {figures['speed']:.2f} times as fast as dense where 8"
    f" tokens use {figures['union']:.0%} of them"
  )
  holds = figures["losses_token"] > 0.8 and figures["losses_chunk"] > 0.7
  return Headline(words, figures, holds)


def _build(weights, rngs: nnx.Rngs) -> DecoderLM:
  def layer(rngs):
    features = beds.MODEL.features
    mlp = BlockFFN(features, HIDDEN, EXPERTS, rngs=rngs, **weights)
    return decoder_block(beds.MODEL, rngs, mlp)

  return DecoderLM(beds.MODEL, layer=layer, rngs=rngs)


def _config(name: str, weights) -> TrainConfig:
  return TrainConfig(
    name=f"headlines/block_ffn_{name}",
    build=functools.partial(_build, weights),
    loss=language_modeling,
    data=beds.DATA,
    optimizer=beds.OPTIMIZER,
    steps=STEPS,
    eval_every=STEPS,
    checkpoint_every=STEPS,
    log_every=50,
    keep=1,
  )


@jax.jit
def _left_out(model, text):
  """Share of the experts that a byte leaves out, and that a chunk does."""
  x = model.embed(text[:, : text.shape[1] // CHUNK * CHUNK])
  place = jnp.broadcast_to(jnp.arange(x.shape[1], dtype=jnp.int32), x.shape[:2])
  token, chunk = [], []
  for i in range(layer_count(model.layers)):
    block = layer_at(model.layers, i)
    middle = block.attend(x, place)[0]
    logits = block.mlp.gate(block.norm_mlp(middle))
    active = block.mlp.route(logits)[0].reshape(-1, EXPERTS)
    token.append(1 - active.mean())
    chunk.append(1 - chunk_union(active, CHUNK).mean())
    x = block.feed(middle)[0]
  return jnp.stack(token).mean(), jnp.stack(chunk).mean()


def _speed(union: float, seconds: float) -> dict[str, float]:
  """A layer against its dense form, on tokens that use this share of it."""
  layer = BlockFFN(**LAYER, rngs=nnx.Rngs(0))
  one, noise = jax.random.normal(jax.random.key(0), (2, CHUNK, 768))
  x = one[:1] + 0.2 * noise
  used = lambda level: float(
    adjust(layer, level).route(layer.gate(x))[0].any(0).mean()
  )
  level = min(np.linspace(0, 4, 81), key=lambda level: abs(used(level) - union))
  layer = adjust(layer, float(level))
  run = jax.jit(lambda m, x, key: m(x, None, key)[0])
  both = (lambda _: run(layer, x, None)), (lambda _: run(layer, x, KEY))
  sparse, dense = interleave(both, seconds=seconds)
  ratios = [b / a for a, b in zip(sparse, dense)]
  return {"speed": statistics.median(ratios), "union": used(float(level))}


KEY = jax.random.key(0)
