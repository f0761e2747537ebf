# SPDX-License-Identifier: Apache-2.0
"""Stop&Exit: layers saved by the exits, and how well STOP foretells errors.

The controller is trained on training files, the model frozen; its exits are
measured on other files, read as if decoding them.  Its STOP is judged where it
is said: how often indeed no layer says the right byte.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.tree_util import Partial

from adaptivejax.core.losses import accuracy
from adaptivejax.methods.depth import controller_loss, stop_and_exit
from adaptivejax.nn import every_layer
from adaptivejax.nn.linear import linear
from adaptivejax.training import fit_head
from benchmarks.headlines import Headline, beds

PAPER = (
  "skips 1.7 of 16 layers on average, 11.2 % faster, for 1.1 % of ROUGE-L; 54.4"
  " % of tokens are right after layer 1, 14.5 % never"
)
EXITS, STOPS = (0.6, 0.8, 0.9, 0.95), (0.5, 0.6, 0.7, 0.8)


def measure(quick: bool) -> Headline:
  model, text = beds.byte_lm("exits", quick), beds.texts(20 if quick else 300)
  given = beds.texts(20 if quick else 2000, split="train")
  controller = fit_head(
    linear(beds.MODEL.features, 3, rngs=nnx.Rngs(0)),
    controller_loss,
    model,
    given,
    steps=4 if quick else 400,
  )
  out = model(text[:, :-1], stack=every_layer)
  said = jax.lax.map(lambda h: model.readout(h).argmax(-1), out.hidden)
  right = np.asarray(said == text[:, 1:])[:, :, 1:]
  figures = {"right_at_1": right[0].mean(), "never": 1 - right.any(0).mean()}
  full = right[-1].mean()
  figures["full_accuracy"] = full
  for level in EXITS:  # exits alone: never stop
    exits = _read(model, controller, text, 1.0, level)
    figures[f"exit_{level}_layers"] = exits["layers"]
    figures[f"exit_{level}_drop"] = full - exits["accuracy"]
  for level in STOPS:  # stops alone: the layers of all exits ask
    stops = np.asarray(_read(model, controller, text, level, 1.0)["stopped"])
    wrong = np.asarray(~right.any(0))
    figures[f"stop_{level}_share"] = stops.mean()
    figures[f"stop_{level}_precision"] = wrong[stops].mean()
  figures = {name: float(value) for name, value in figures.items()}
  layers = beds.MODEL.layers
  fit = [x for x in EXITS if figures[f"exit_{x}_drop"] <= 0.015] or [EXITS[-1]]
  saved = layers - figures[f"exit_{fit[0]}_layers"]
  figures["saved"] = saved
  drop, precise = figures[f"exit_{fit[0]}_drop"], figures["stop_0.6_precision"]
  words = (
    f"skips {saved:.2f} of {layers} layers for {100 * drop:.1f} points of"
    f" accuracy (exit above {fit[0]}); {figures['right_at_1']:.1%} of bytes are"
    f" right after layer 1, {figures['never']:.1%} never; STOP above 0.6 is"
    f" said of {figures['stop_0.6_share']:.1%}, rightly of {precise:.1%} of"
    " these"
  )
  holds = saved > 0 and drop <= 0.015 and precise > figures["never"]
  return Headline(words, figures, bool(holds))


@jax.jit
def _read(model, controller, text, stop, exit):
  """Reads the text as if decoding it, on past where the controller stops."""
  stack = Partial(stop_and_exit, controller=controller, stop=stop, exit=exit)
  cache = model(text[:, :1], model.empty_cache(*text.shape)).cache

  def step(cache, token):
    out = model(token[:, None], cache, stack=stack)
    return out.cache, (out.logits[:, 0], out.depth[:, 0], out.notes)

  _, made = jax.lax.scan(step, cache, text[:, 1:-1].T)
  logits, depth, stopped = (jnp.moveaxis(a, 0, 1) for a in made)
  return {
    "layers": depth.mean(),
    "accuracy": accuracy(logits, text[:, 2:]),
    "stopped": stopped,
  }
