# SPDX-License-Identifier: Apache-2.0
"""Self-speculation: tokens per step of the first layers' drafts, and seconds.

Two models of one size and one number of steps, trained as LayerSkip says and on
the loss of the last layer only; prompts are of held-out files.  What is written
must be what plain decoding writes.
"""

import jax
import jax.numpy as jnp

from adaptivejax.decode import generate
from adaptivejax.methods.decode import SelfSpeculation
from adaptivejax.nn import every_layer
from adaptivejax.report.clock import interleave, quartiles
from benchmarks.headlines import Headline, beds

PAPER = (
  "With LayerSkip training up to 2.16 times as fast on summarisation, 1.82 on"
  " coding and 2.0 on semantic parsing, the text unchanged (unverified)"
)
ROWS, PROMPT, NEW, DRAFT = 16, 24, 40, 3
HALF = beds.MODEL.layers // 2
EXITS = (HALF, 1)


def measure(quick: bool) -> Headline:
  prompt, new = beds.texts(ROWS, PROMPT), 8 if quick else NEW
  held, figures, same = beds.texts(20 if quick else 300), {}, True
  for kind in ("layer_skip", "dense"):
    model = beds.byte_lm(kind, quick)
    plain = generate(model, prompt, steps=new)
    figures[f"{kind}_agreement"] = float(_agreement(model, held))
    for exit in EXITS:
      policy = SelfSpeculation(exit, DRAFT)
      made = generate(model, prompt, steps=new, policy=policy)
      same &= bool((made.tokens == plain.tokens).all())
      rate = float(made.tokens_per_step)
      figures |= {
        f"{kind}_tokens_per_step_{exit}": rate,
        f"{kind}_accepted_{exit}": (rate - 1) / DRAFT,
        f"{kind}_layers_per_token_{exit}": float(made.mean_depth),
      }
  model, one = beds.byte_lm("layer_skip", quick), prompt[:1]
  ways = [None, *(SelfSpeculation(exit, DRAFT) for exit in EXITS)]
  run = lambda policy: (
    lambda i: generate(
      model, one, steps=new, **({} if policy is None else {"policy": policy})
    )
  )
  times = interleave([run(way) for way in ways], seconds=2 if quick else 15)
  for exit, mine in zip(EXITS, times[1:]):
    ratios = [a / b for a, b in zip(times[0], mine)]
    figures[f"speed_{exit}"] = quartiles(ratios)[1]
  get = lambda name, kind="layer_skip": figures[f"{kind}_{name}"]
  mine, other = get(f"accepted_{HALF}"), get(f"accepted_{HALF}", "dense")
  depth = get(f"layers_per_token_{HALF}")
  speed = max(figures[f"speed_{exit}"] for exit in EXITS)
  speeds = ", ".join(
    f"{figures[f'speed_{exit}']:.2f} with {exit} drafting" for exit in EXITS
  )
  words = (
    f"of {DRAFT} tokens drafted by {HALF} of {beds.MODEL.layers} layers"
    f" {mine:.0%} stay, {other:.0%} without LayerSkip training:"
    f" {get(f'tokens_per_step_{HALF}'):.2f} tokens per step and {depth:.2f}"
    f" layers in a row per token (one layer drafting:"
    f" {get('layers_per_token_1'):.2f}), the text"
    f" {'unchanged' if same else 'CHANGED'}; of the plain speed on this"
    f" machine, one row: {speeds}"
  )
  saves = same and mine > other and depth < beds.MODEL.layers
  return Headline(words, figures, bool(saves and speed > 1))


@jax.jit
def _agreement(model, text):
  """Share of bytes where half of the layers say what all layers say."""
  out = model(text[:, :-1], stack=every_layer)
  half = model.readout(out.hidden[HALF - 1])
  return jnp.mean(half.argmax(-1) == out.logits.argmax(-1))
