# SPDX-License-Identifier: Apache-2.0
"""ACM: half of the feed-forward work, chosen byte by byte or the same for all.

A dense model's feed-forward layers are split into four learners, and it is
trained on for a target of half of them.  Beside it, for as many steps: the
dense model itself, and the dense model with half of its neurons left.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from flax import nnx

from adaptivejax.core.losses import accuracy, cross_entropy
from adaptivejax.methods.width import AdaptiveComputationModule
from adaptivejax.models import DecoderLM, decoder_block
from adaptivejax.nn import Mlp, adjust, split_mlp
from adaptivejax.training import OptimizerConfig, TrainConfig
from adaptivejax.training.schedules import cosine
from adaptivejax.training.tasks import language_modeling
from benchmarks.headlines import Headline, beds

PAPER = (
  "Substituting layers with ACMs significantly reduces inference costs without"
  " degrading accuracy for a wide interval of budgets"
)
LEARNERS, TARGET, STEPS = 4, 0.5, 400
TILTS = (-3.0, 0.0, 1.5, 3.0)
HALF = dataclasses.replace(beds.MODEL, hidden=beds.MODEL.hidden // 2)


def measure(quick: bool) -> Headline:
  dense = beds.byte_lm("dense", quick)
  text = beds.texts(20 if quick else 400)
  builds = {
    "dense": lambda rngs: _copy(dense),
    "half": functools.partial(_half, dense),
    "modules": functools.partial(_modules, dense),
  }
  models = {
    name: beds.fit(_config(name, build), quick)
    for name, build in builds.items()
  }
  figures = {}
  for name, model in models.items():
    at = {"": model}
    if name == "modules":
      at = {f"_{tilt}": adjust(model, tilt) for tilt in TILTS}
    for tilt, one in at.items():
      made = {key: float(a) for key, a in _read(one, text).items()}
      figures |= {f"{name}{tilt}_{key}": value for key, value in made.items()}
  lost = lambda name: figures["dense_accuracy"] - figures[f"{name}_accuracy"]
  drop, fixed, share = lost("modules_0.0"), lost("half"), "modules_0.0_share"
  rest = ", ".join(
    f"{100 * lost(f'modules_{x}'):.1f} at {figures[f'modules_{x}_share']:.0%}"
    for x in TILTS
    if x
  )
  words = (
    f"asked for {TARGET:.0%} of the learners it uses {figures[share]:.0%} and"
    f" loses {100 * drop:.1f} points of accuracy"
    f" ({figures['dense_accuracy']:.3f} dense); half of the neurons for every"
    f" byte lose {100 * fixed:.1f}. The same model moved without training"
    f" loses {rest}. Trained end to end in {STEPS} steps, without the paper's"
    " distillation"
  )
  near = abs(figures[share] - TARGET) <= 0.05
  return Headline(words, figures, bool(near and drop <= 0.01 and drop < fixed))


@jax.jit
def _read(model, text):
  out = model(text[:, :-1])
  nats = cross_entropy(out.logits, text[:, 1:]).mean()
  return {
    "share": out.signals.share,  # of the learners
    "flops": out.cost.share,
    "accuracy": accuracy(out.logits, text[:, 1:]),
    "bits": nats / jnp.log(2),
  }


def _config(name: str, build) -> TrainConfig:
  adaptive = name == "modules"
  return TrainConfig(
    name=f"headlines/modules_{name}",
    build=build,
    loss=functools.partial(language_modeling, budget_weight=1.0)
    if adaptive
    else language_modeling,
    budget=cosine(TARGET, steps=STEPS // 2) if adaptive else None,
    data=beds.DATA,
    optimizer=OptimizerConfig(learning_rate=1e-3, weight_decay=0.0),
    steps=STEPS,
    eval_every=STEPS,
    checkpoint_every=STEPS,
    log_every=50,
    keep=1,
  )


def _modules(dense: DecoderLM, rngs: nnx.Rngs) -> DecoderLM:
  """The dense model with its feed-forward layers split; the gates are new."""

  def layer(rngs):
    mlp = Mlp(beds.MODEL.features, beds.MODEL.hidden, rngs=rngs)
    module = AdaptiveComputationModule(
      split_mlp(mlp, LEARNERS), beds.MODEL.features, rngs=rngs
    )
    return decoder_block(beds.MODEL, rngs, module)

  model = DecoderLM(beds.MODEL, layer=layer, rngs=rngs)
  model = _but_mlp(model, dense)
  split = jax.vmap(lambda mlp: split_mlp(mlp, LEARNERS))(dense.layers.mlp)
  model.layers.mlp.learners = split
  return model


def _half(dense: DecoderLM, rngs: nnx.Rngs) -> DecoderLM:
  """The dense model with the first half of its neurons."""
  model = _but_mlp(DecoderLM(HALF, rngs=rngs), dense)
  up, down = dense.layers.mlp.up.kernel, dense.layers.mlp.down.kernel
  model.layers.mlp.up.kernel.set_value(up.get_value()[..., : HALF.hidden])
  model.layers.mlp.down.kernel.set_value(down.get_value()[:, : HALF.hidden])
  return model


def _but_mlp(model: DecoderLM, dense: DecoderLM) -> DecoderLM:
  """Takes over everything but the feed-forward layers."""
  dense = _copy(dense)
  model.embedding, model.norm = dense.embedding, dense.norm
  for name in ("norm_attention", "attention", "norm_mlp"):
    setattr(model.layers, name, getattr(dense.layers, name))
  return model


def _copy(model: DecoderLM) -> DecoderLM:
  """Arrays of its own: training takes them over."""
  return jax.tree.map(jnp.copy, model)
