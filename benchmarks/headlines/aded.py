# SPDX-License-Identifier: Apache-2.0
"""ADED: tokens per forward pass on a byte language model.

The table counts the bytes of the training files; prompts are of held-out files.
The same texts are written with the table alone, by learning alone (an empty
table), and by both: what learning adds is to grow as a text goes on.  They run
past the context that the model was trained on, where it departs from the table.
"""

import functools
import time

import jax
import numpy as np

from adaptivejax.core import TrigramTable
from adaptivejax.decode import generate
from adaptivejax.methods.decode import ADED
from adaptivejax.training import load_corpus
from benchmarks.headlines import Headline
from benchmarks.headlines.beds import DATA, byte_lm, texts

PAPER = (
  "Decodes up to 2.5 times as fast, losing nothing, and better the longer it"
  " goes on (unverified)"
)
ROWS, PROMPT, NEW, HEATS = 8, 48, 192, (0.0, 0.8)


def measure(quick: bool) -> Headline:
  model, new = byte_lm("dense", quick), 16 if quick else NEW
  files = load_corpus(DATA).train.values()
  table = TrigramTable.build(np.frombuffer(file, np.uint8) for file in files)
  policies = {
    "both": ADED(table),
    "table": ADED(table, rate=0.0),
    "learning": ADED(TrigramTable.build([])),
  }
  write = functools.partial(
    generate,
    model,
    texts(ROWS, PROMPT),
    steps=new,
    rungs=(ROWS,),
    key=jax.random.key(0),
  )
  figures, same = {}, True
  for heat in HEATS:
    plain = write(temperature=heat)
    for name, policy in policies.items():
      use = functools.partial(write, policy=policy, temperature=heat)
      made, half = use(), use(limits=np.full(ROWS, new // 2))
      late = ROWS * (new - new // 2) / (made.steps - half.steps).sum()
      same &= bool((made.tokens == plain.tokens).all())
      figures[f"{name}_at_{heat}"] = float(made.tokens_per_step)
      figures[f"{name}_early_at_{heat}"] = float(half.tokens_per_step)
      figures[f"{name}_late_at_{heat}"] = float(late)
  figures["speed"] = _seconds(write) / _seconds(write, policies["both"])
  gain = lambda part: (
    figures[f"both_{part}_at_0.0"] / (figures[f"table_{part}_at_0.0"])
  )
  early, late = gain("early"), gain("late")
  greedy, warm = (figures[f"both_at_{heat}"] for heat in HEATS)
  text = (
    f"{greedy:.2f} tokens per pass greedy, {warm:.2f} at temperature 0.8, the"
    f" text {'unchanged' if same else 'CHANGED'}; over the table alone learning"
    f" gains {early - 1:.0%} in the first half, {late - 1:.0%} in the second."
    f" {figures['speed']:.2f} of the plain speed on this machine, where a pass"
    f" over {policies['both'].nodes} tokens costs more than one over 1"
  )
  right = same and min(greedy, warm) > 1.5 and late > max(early, 1)
  fast = True if figures["speed"] > 1 else None  # no GPU's pass is this slow
  return Headline(text, figures, fast if right else False)


def _seconds(write, policy=None) -> float:
  """The best of three runs, warm."""
  options = {} if policy is None else {"policy": policy}
  best = float("inf")
  for _ in range(3):
    start = time.perf_counter()
    jax.block_until_ready(write(**options))
    best = min(best, time.perf_counter() - start)
  return best
