# SPDX-License-Identifier: Apache-2.0
"""MoE++: feed-forward experts that bytes run, and how fast the experts are.

The vanilla mixture has the same eight feed-forward experts and top-2.  The
throughput is that of the feed-forward half, router and dispatch included, of a
layer of the size that `LAYER` says, its share of rows being the one that the
byte model has.
"""

import statistics

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from adaptivejax.core import NOBODY, dispatch, expert_apply
from adaptivejax.methods.experts import MoEPlusPlus
from adaptivejax.nn import Mlp, stacked
from adaptivejax.report.clock import interleave
from benchmarks.headlines import Headline, beds
from benchmarks.headlines.mixtures import (
  EXPERTS,
  FEATURES,
  HIDDEN,
  TOP_K,
  byte_lm,
  read,
  top_two,
)

PAPER = (
  "Better performance at 1.1 to 2.1 times the expert forward throughput of a"
  " vanilla mixture of the same size"
)
LAYER = {"tokens": 2048, "features": 256, "hidden": 512}


def measure(quick: bool) -> Headline:
  text = beds.texts(20 if quick else 400)
  model = byte_lm("moe_plus_plus", _mlp, quick)
  ours, vanilla = read(model, text), read(top_two(quick), text)
  gain, error = ours.gain(vanilla)
  per_layer = ours.choices.mean((1, 2))
  figures = {
    "bits": ours.bits,
    "vanilla_bits": vanilla.bits,
    "gain": gain,
    "standard_error": error,
    "experts": float(per_layer.mean()),
    "fewest": float(per_layer.min()),
    "most": float(per_layer.max()),
    "flops": ours.spent / vanilla.spent,
  }
  figures["throughput"] = _throughput(
    figures["experts"] / TOP_K, 0.2 if quick else 6
  )
  words = (
    f"a byte runs {figures['experts']:.2f} feed-forward experts instead of"
    f" {TOP_K} ({figures['fewest']:.2f} to {figures['most']:.2f} by layer):"
    f" {figures['throughput']:.2f} times the expert throughput (CPU) and"
    f" {figures['flops']:.0%} of the model's FLOPs, at {figures['bits']:.3f}"
    f" bits per byte against {figures['vanilla_bits']:.3f} (gain {gain:.3f} ±"
    f" {error:.3f}), after as many steps"
  )
  return Headline(words, figures, gain > -error and figures["throughput"] > 1.1)


def _mlp(rngs: nnx.Rngs) -> MoEPlusPlus:
  experts = stacked(lambda r: Mlp(FEATURES, HIDDEN, rngs=r), EXPERTS, rngs)
  return MoEPlusPlus(experts, FEATURES, top_k=TOP_K, rngs=rngs)


def _throughput(share: float, seconds: float) -> float:
  """Time of all choices over that of this share of them."""
  tokens, features, hidden = LAYER.values()
  rngs = nnx.Rngs(0)
  experts = stacked(lambda r: Mlp(features, hidden, rngs=r), EXPERTS, rngs)
  x = jax.random.normal(jax.random.key(0), (tokens, features))
  rng = np.random.default_rng(0)
  first = rng.integers(EXPERTS, size=tokens)
  second = (first + rng.integers(1, EXPERTS, size=tokens)) % EXPERTS
  chosen = jnp.asarray(np.stack([first, second], 1), jnp.int32)
  some = jnp.where(rng.random(chosen.shape) < share, chosen, NOBODY)

  @jax.jit
  def run(x, chosen):
    plan = dispatch(chosen, jnp.full(chosen.shape, 0.5), EXPERTS)
    return expert_apply(lambda r, m: m.rows(r), x, plan, experts)[0]

  vanilla, ours = interleave(
    [lambda _: run(x, chosen), lambda _: run(x, some)], seconds=seconds
  )
  return statistics.median(a / b for a, b in zip(vanilla, ours))
