# SPDX-License-Identifier: Apache-2.0
"""FactorLLM: a dense model cut into four experts a layer, of which two run.

Adapted for few steps, with the Prior-Approximate loss and without it: then
nothing teaches the router, and the experts follow it as it happens to be.
"""

import functools

import jax
import jax.numpy as jnp
from flax import nnx

from adaptivejax.core.losses import accuracy, cross_entropy
from adaptivejax.methods.experts import FactorLLM
from adaptivejax.models import DecoderLM
from adaptivejax.nn import adjust
from adaptivejax.nn.stack import layer_at, layer_count
from adaptivejax.training import OptimizerConfig, TrainConfig
from adaptivejax.training.tasks import language_modeling
from benchmarks.headlines import Headline, beds

PAPER = (
  "up to 85 % of the source model's performance at over 30 % more inference"
  " speed, adapted on 0.03 % of its training data (unverified)"
)
EXPERTS, TOP_K, STEPS = 4, 2, 200
PRIORS = {"taught": 0.05, "untaught": 0.0}


def measure(quick: bool) -> Headline:
  dense, text = beds.byte_lm("dense", quick), beds.texts(20 if quick else 400)
  figures = {"accuracy": float(_read(dense, text)["accuracy"])}
  cut = jax.jit(functools.partial(factored, prior=0.05))(dense)
  read = {"cut": _read(cut, text), "all": _read(adjust(cut, -TOP_K), text)}
  for name, prior in PRIORS.items():
    build = lambda rngs, prior=prior: factored(_copy(dense), prior)
    read[name] = _read(beds.fit(_config(name, build), quick), text)
  for name, found in read.items():
    figures |= {f"{name}_{key}": float(a) for key, a in found.items()}
  kept = lambda name: figures[f"{name}_accuracy"] / figures["accuracy"]
  words = (
    f"{TOP_K} of {EXPERTS} experts ({figures['taught_flops']:.0%} of the FLOPs)"
    f" keep {kept('cut'):.0%} of the dense accuracy ({figures['accuracy']:.3f})"
    f" when cut, and {kept('taught'):.1%} after {STEPS} steps; without the"
    f" Prior-Approximate loss {kept('untaught'):.1%}, so that it"
    f" {'pays' if kept('taught') > kept('untaught') else 'does not pay'} here."
    f" All {EXPERTS} are the dense model ({kept('all'):.1%}). Not timed: the"
    " FLOPs are those of layers and readout"
  )
  holds = kept("taught") >= 0.85 and figures["taught_flops"] <= 1 / 1.3
  return Headline(words, figures, bool(holds))


def factored(dense: DecoderLM, prior: float) -> DecoderLM:
  """The model with its feed-forward layers cut, the routers new."""
  rngs = nnx.Rngs(0)
  layers = [
    FactorLLM(
      layer_at(dense.layers.mlp, i),
      EXPERTS,
      top_k=TOP_K,
      prior=prior,
      rngs=rngs,
    )
    for i in range(layer_count(dense.layers))
  ]
  model = jax.tree.map(lambda a: a, dense)  # a copy
  model.layers.mlp = jax.tree.map(lambda *a: jnp.stack(a), *layers)
  return model


@jax.jit
def _read(model, text):
  out = model(text[:, :-1])
  return {
    "accuracy": accuracy(out.logits, text[:, 1:]),
    "bits": cross_entropy(out.logits, text[:, 1:]).mean() / jnp.log(2),
    "flops": out.cost.share,
  }


def _config(name: str, build) -> TrainConfig:
  return TrainConfig(
    name=f"headlines/factor_llm_{name}",
    build=build,
    loss=language_modeling,
    data=beds.DATA,
    optimizer=OptimizerConfig(learning_rate=1e-3, weight_decay=0.0),
    steps=STEPS,
    eval_every=STEPS,
    checkpoint_every=STEPS,
    log_every=50,
    keep=1,
  )


def _copy(model: DecoderLM) -> DecoderLM:
  """Arrays of its own: training takes them over."""
  return jax.tree.map(jnp.copy, model)
