# SPDX-License-Identifier: Apache-2.0
"""Switch Transformer: steps that eight experts save over one dense layer.

Each expert is as large as the dense layer, so a byte costs the same but for the
router.  The learning rate is constant after its warm-up: so every step of a run
is the end of a shorter one, and two curves may be compared anywhere.  The claim
holds here if at most half of the steps are needed.
"""

import dataclasses
import json

import numpy as np

from adaptivejax.methods.experts import SwitchRouter
from benchmarks.headlines import Headline, beds
from benchmarks.headlines.mixtures import (
  EXPERTS,
  FEATURES,
  byte_lm,
  mixture,
  read,
)

PAPER = (
  "Up to 7 times the pre-training speed of T5 with the same computational"
  " resources"
)
STEPS, EVERY = 500, 25
OPTIMIZER = dataclasses.replace(beds.OPTIMIZER, floor=1.0)


def measure(quick: bool) -> Headline:
  text = beds.texts(20 if quick else 400)
  router = lambda rngs: SwitchRouter(FEATURES, EXPERTS, rngs=rngs)
  halves = {
    "dense": None,
    "switch": mixture(router, beds.MODEL.hidden),
  }
  found, curves = {}, {}
  for name, mlp in halves.items():
    run = f"switch_{name}"
    model = byte_lm(
      run, mlp, quick, steps=STEPS, optimizer=OPTIMIZER, eval_every=EVERY
    )
    found[name] = read(model, text)
    curves[name] = _curve(f"{run}-quick" if quick else run)
  reached = found_at(curves["switch"], curves["dense"][-1, 1])
  gain, error = found["switch"].gain(found["dense"])
  log = _lines("switch_switch-quick" if quick else "switch_switch")
  dropped = [line["dropped"] for line in log if line["split"] == "train"]
  figures = {
    "bits": found["switch"].bits,
    "dense_bits": found["dense"].bits,
    "gain": gain,
    "standard_error": error,
    "flops": found["switch"].spent / found["dense"].spent,
    "steps_saved": float(curves["dense"][-1, 0] / reached),
    "dropped": dropped[-1] if dropped else 0.0,
    "violation": found["switch"].violation,
  }
  words = (
    f"{figures['bits']:.3f} bits per byte against {figures['dense_bits']:.3f}"
    f" (gain {gain:.3f} ± {error:.3f}) after {STEPS} steps at"
    f" {figures['flops']:.0%} of the FLOPs; what the dense model has reached by"
    f" then, {EXPERTS} experts reach {figures['steps_saved']:.2f} times sooner,"
    f" counted in steps, not seconds. In training {figures['dropped']:.1%} of"
    " the bytes find no room at capacity factor 1.25"
  )
  return Headline(words, figures, figures["steps_saved"] >= 2)


def found_at(curve: np.ndarray, bits: float) -> float:
  """The step at which a falling curve is at `bits`, or its last step."""
  steps, values = curve.T
  return float(np.interp(-bits, np.maximum.accumulate(-values), steps))


def _lines(run: str) -> list[dict]:
  path = beds.OUT / run / "metrics.jsonl"
  return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def _curve(run: str) -> np.ndarray:
  """`(step, bits per byte)` of every evaluation."""
  return np.array(
    [
      (line["step"], line["bits_per_byte"])
      for line in _lines(run)
      if line["split"] == "validation"
    ]
  )
