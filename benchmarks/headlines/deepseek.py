# SPDX-License-Identifier: Apache-2.0
"""DeepSeek-V3: experts balanced by a bias, against two weights of a loss.

The three models differ in nothing else.  The violation is that of the paper,
`max load / mean load - 1` over all held-out text, mean over layers.  The loss
is the sequence-wise one of the method's file, its weight divided by the layers.
"""

import dataclasses

from adaptivejax.methods.experts import DeepSeekRouter
from benchmarks.headlines import Headline, beds
from benchmarks.headlines.mixtures import (
  EXPERTS,
  FEATURES,
  TOP_K,
  byte_lm,
  mixture,
  read,
)

PAPER = (
  "Loss-free balancing has both the lower loss (perplexity 9.50 against 9.56"
  " at 1B) and the lower MaxVio (0.04 against 0.72) (unverified)"
)
FREE = "free"
WEIGHTS = {FREE: 0.0, "loss": 0.01, "strong_loss": 0.1}


def measure(quick: bool) -> Headline:
  text, found, figures = beds.texts(20 if quick else 400), {}, {}
  for name, weight in WEIGHTS.items():
    router = lambda rngs, weight=weight: DeepSeekRouter(
      FEATURES, EXPERTS, top_k=TOP_K, scale=1.0, balance=weight, rngs=rngs
    )
    rate = beds.OPTIMIZER.balance_rate if name == FREE else 0.0
    optimizer = dataclasses.replace(beds.OPTIMIZER, balance_rate=rate)
    run = f"deepseek_{name}"
    model = byte_lm(run, mixture(router), quick, optimizer=optimizer)
    found[name] = read(model, text)
    figures |= {
      f"{name}_bits": found[name].bits,
      f"{name}_violation": found[name].violation,
    }
  better = []
  for name in list(WEIGHTS)[1:]:
    gain, error = found[FREE].gain(found[name])
    figures |= {f"gain_over_{name}": gain, f"error_over_{name}": error}
    calmer = found[FREE].violation < found[name].violation
    better.append(calmer and gain > -error)
  rivals = " and ".join(
    f"{figures[f'{name}_violation']:.2f} at {figures[f'{name}_bits']:.3f} with"
    f" a loss of weight {WEIGHTS[name]} (gain"
    f" {figures[f'gain_over_{name}']:.3f} ± {figures[f'error_over_{name}']:.3f}"
    " bits)"
    for name in list(WEIGHTS)[1:]
  )
  words = (
    f"maximal violation {figures['free_violation']:.2f} at"
    f" {figures['free_bits']:.3f} bits per byte with the bias alone, {rivals};"
    f" {EXPERTS} experts, top-{TOP_K}, equal steps"
  )
  return Headline(words, figures, all(better))
