# SPDX-License-Identifier: Apache-2.0
"""Tutel: capacity that follows the load, a byte language model that routes.

What a layer needs in order to drop nothing, batch by batch; what a static
capacity that never drops would execute and take, as padded batched products;
and what too little capacity costs, by position and by priority.  The claim
holds here if the static layer, of the same results, is slower in three quarters
of the rounds over all layers.  How much faster many GPUs get cannot be measured
on one device, which has no all-to-all.
"""

import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np

from adaptivejax.core import dispatch, expert_apply
from adaptivejax.methods.experts import TutelRouter, tutel_capacity
from adaptivejax.nn import Setting
from adaptivejax.nn.expert_sharding import mixtures
from benchmarks.headlines import Headline
from benchmarks.headlines.beds import DATA, bits_per_byte, texts
from benchmarks.headlines.routed import (
  EXPERTS,
  HIDDEN,
  MODEL,
  routed_lm,
  trace_of,
)

PAPER = (
  "Adapting to the load speeds a mixture layer up 4.96x on 16 GPUs and 5.75x"
  " on 2048, over a static one, without mathematical inequivalence"
)
BATCHES, ROUNDS = 24, 5


def measure(quick: bool) -> Headline:
  model, batch = routed_lm(quick), DATA.batch
  batches = 2 if quick else BATCHES
  trace = trace_of(model, texts(batches * batch))
  trace = trace.reshape(batches, -1, MODEL.layers)
  tokens = trace.shape[1]
  fullest = lambda chosen: tutel_capacity(chosen[:, None], EXPERTS, 0.0)
  every = jax.vmap(jax.vmap(fullest, 1))(jnp.asarray(trace))  # [batches, L]
  needed = np.asarray(every) * EXPERTS / tokens
  most = int(every.max())
  figures = {
    "least_factor": float(needed.min()),
    "mean_factor": float(needed.mean()),
    "most_factor": float(needed.max()),
  } | _static_against_adaptive(trace[0], most, 2 if quick else ROUNDS)

  text = texts(8 if quick else 200)
  figures["bits_dropless"] = float(bits_per_byte(model, text))
  for factor in (1.0, 0.5):
    for name, prioritized in (("position", False), ("priority", True)):
      capped = _capped(model, factor, prioritized)
      figures[f"bits_{factor}_{name}"] = float(bits_per_byte(capped, text))
  f = figures
  said = (
    f"capacity factor needed to drop nothing: {f['least_factor']:.1f} to"
    f" {f['most_factor']:.1f} by layer and batch, {f['mean_factor']:.1f} on"
    f" average; a static {f['most_factor']:.1f} executes {f['slots']:.1f}x the"
    f" slots and takes {f['time']:.2f}x the time of the load (CPU; quartile"
    f" {f['time_low']:.2f}), for the same results;"
    f" bits per byte {f['bits_dropless']:.2f} dropless, at factor 1"
    f" {f['bits_1.0_position']:.2f} by position and"
    f" {f['bits_1.0_priority']:.2f} by priority, at 0.5"
    f" {f['bits_0.5_position']:.2f} and {f['bits_0.5_priority']:.2f}. One CPU"
    " device: the paper's factors are of many GPUs, and are not reached"
  )
  return Headline(said, figures, f["time_low"] > 1)


def _capped(model, factor: float, prioritized: bool):
  """The model with a capacity in every layer."""
  model = jax.tree.map(lambda a: a, model)  # a copy
  (mixture,) = mixtures(model)
  mixture.router = TutelRouter(
    mixture.router, EXPERTS, factor=factor, prioritized=prioritized
  )
  mixture.router.refused = Setting(jnp.zeros(MODEL.layers))
  return model


def _static_against_adaptive(chosen, most: int, rounds: int):
  """Slots and time of a layer that pads each expert to `most`, over ours.

  Args:
    chosen: the expert of every byte of a batch in every layer.
    most: slots of each expert.
    rounds: for each layer.
  """
  draw = lambda i, *shape: jax.random.normal(jax.random.key(i), shape)
  x = draw(0, len(chosen), MODEL.features)
  up = draw(1, EXPERTS, MODEL.features, HIDDEN)
  down = draw(2, EXPERTS, HIDDEN, MODEL.features)
  ffn = lambda rows, p: jax.nn.gelu(rows @ p[0]) @ p[1]

  @jax.jit
  def adaptive(x, chosen):
    weights = jnp.ones(chosen.shape)
    plan = dispatch(chosen, weights, EXPERTS)
    y, cost = expert_apply(ffn, x, plan, (up, down))
    return y, cost.capacity

  @jax.jit
  def static(x, chosen):
    plan = dispatch(chosen, jnp.ones(chosen.shape), EXPERTS)
    first = jnp.cumsum(plan.sizes) - plan.sizes
    place = jnp.arange(len(x)) - first[plan.expert]
    rows = jnp.zeros((EXPERTS, most, x.shape[1]))
    rows = rows.at[plan.expert, place].set(x[plan.item])
    rows = jax.vmap(ffn)(rows, (up, down))
    made = rows[plan.expert, place]
    return jnp.zeros_like(x).at[plan.item].set(made), EXPERTS * most

  ratios, slots = [], []
  for layer in chosen.T:
    layer = jnp.asarray(layer)[:, None]
    (y, ours), (want, padded) = adaptive(x, layer), static(x, layer)
    np.testing.assert_allclose(y, want, rtol=1e-4, atol=1e-3)
    slots.append(float(padded / ours))
    for _ in range(rounds):
      took = []
      for run in (static, adaptive):
        start = time.perf_counter()
        jax.block_until_ready(run(x, layer))
        took.append(time.perf_counter() - start)
      ratios.append(took[0] / took[1])
  return {
    "slots": statistics.mean(slots),
    "time": statistics.median(ratios),
    "time_low": float(np.quantile(ratios, 0.25)),
  }
