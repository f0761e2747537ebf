# SPDX-License-Identifier: Apache-2.0
"""CoreInfer: the byte model goes on with a text by 40 % of its neurons.

The core of a text against as many neurons drawn at random, and against the core
of another text: what the next byte is, as the whole model says.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from adaptivejax.methods.width import core_of
from adaptivejax.nn import by_neurons, gather_neurons, plain
from benchmarks.headlines import Headline, beds

PAPER = (
  "40 % of the neurons of OPT and Llama 2 keep the quality of a text's"
  " continuation, and it is up to 10 times as fast (unverified)"
)
PROMPT, SHARE = 48, 0.4


def measure(quick: bool) -> Headline:
  model = beds.byte_lm("dense", quick)
  text = beds.texts(8 if quick else 64, 96)
  prompt = text[:, :PROMPT]
  core = jax.jit(functools.partial(core_of, share=SHARE))(model, prompt)
  draw = np.random.default_rng(0)
  hidden, kept = model.config.hidden, core.chosen.shape[-1]
  drawn = draw.permuted(
    np.broadcast_to(np.arange(hidden), (*core.chosen.shape[:2], hidden)), axis=2
  )
  middle = jax.tree.map(lambda a: a[1:-1], model.layers.mlp)
  random = gather_neurons(middle, jnp.asarray(drawn[..., :kept]))
  other = jax.tree.map(lambda a: jnp.roll(a, 1, axis=0), core)
  whole = _said(model, text, Partial(plain))
  found = {}
  for name, neurons in (("core", core), ("random", random), ("other", other)):
    said = _said(model, text, Partial(by_neurons, neurons=neurons, first=1))
    found[name] = float((said == whole).mean())
  words = (
    f"with {SHARE:.0%} of the neurons of {middle.down.kernel.shape[0]} of"
    f" {model.config.layers} layers, chosen by a prompt of {PROMPT} bytes,"
    f" {found['core']:.1%} of the next bytes are those of the whole model; with"
    f" as many of another text {found['other']:.1%}, drawn at random"
    f" {found['random']:.1%}"
  )
  holds = found["core"] >= 0.97 and found["core"] > found["random"]
  return Headline(words, found, bool(holds))


@jax.jit
def _said(model, text, stack):
  """The likeliest next byte at each place behind the prompt."""
  cache = model.empty_cache(*text.shape)
  cache = model(text[:, :PROMPT], cache).cache

  def step(cache, byte):
    out = model(byte[:, None], cache, stack=stack)
    return out.cache, out.logits[:, 0].argmax(-1)

  return jax.lax.scan(step, cache, text[:, PROMPT:].T)[1]
