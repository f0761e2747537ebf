# SPDX-License-Identifier: Apache-2.0
"""The laws' cases of policies: the text that is generated."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from adaptivejax.core.trigrams import TrigramTable
from adaptivejax.decode import generate
from adaptivejax.methods.decode import ADED, EntropyAdaptive, SelfSpeculation
from adaptivejax.models import DecoderLM
from tests import reference
from tests.laws.case import CONFIG, Case, V
from tests.laws.models import decoder_of, of_model, some_text
from tests.laws.primitives import no_rows

STEPS = 4
ALWAYS, AT_TIMES, NEVER_LARGE = map(np.float32, (-np.inf, 2.1, np.inf))


def _prompt(batch):
  return some_text(batch)[:, :3]


def _text(model, prompt, policy):
  """The tokens of `STEPS` steps as numbers, and their cost."""
  out = generate(model, prompt, steps=STEPS, policy=policy)
  return out.tokens.astype(jnp.float32), out.cost


def _greedy(model, prompt):
  """The likeliest tokens, one by one, each read with all those before."""
  text = np.asarray(prompt)
  for _ in range(STEPS):
    best = reference.next_logits(model, text).argmax(-1)
    text = np.append(text, best[:, None], axis=1)
  return jnp.asarray(text[:, -STEPS:], jnp.float32)


def _speculation(model, prompt, budget):
  return _text(model, prompt, SelfSpeculation(*budget))


TRIGRAMS = TrigramTable.build([np.arange(V), np.tile([1, 5, 2], 3)])


def _table_draft(model, prompt, rate):
  return _text(model, prompt, ADED(TRIGRAMS, rate, nodes=6, depth=2))


def _two_models(rngs):
  small = dataclasses.replace(CONFIG, layers=1)
  return {"small": DecoderLM(small, rngs=rngs), "model": decoder_of()(rngs)}


def _two_voices(params, prompt, threshold):
  policy = EntropyAdaptive(params["model"], threshold, dwell=1)
  return _text(params["small"], prompt, policy)


def _poisoned_large(params, prompt):
  spoil = lambda a: a * jnp.nan
  large = jax.tree.map(spoil, params["model"])
  return {**params, "model": large}, prompt, NEVER_LARGE, None


_choice = "a choice of tokens has no gradient"
_asks = "drawing a token asks whether to be greedy; see the law of full budgets"
_beside = "a policy takes its model as a pytree, which the twin is not"
_POLICY = {
  "oracle": _asks,
  "gradient": _choice,
  "poison_gradient": _choice,
  "cover": no_rows,
  "linen": _beside,
}

POLICIES = [
  Case(
    "self_speculation",
    "decode.self_speculation",
    decoder_of(),
    _prompt,
    _speculation,
    full=(3, 3),
    some=(2, 2),
    none=(1, 1),
    dense=_greedy,
    least=_greedy,
    static="how many layers draft how many tokens is static",
    unless={
      **_POLICY,
      "poison": "all layers verify every draft",
      "cost": "longer drafts need a longer cache, which is priced, too",
      "trace": "how many layers draft how many tokens is static",
    },
  ),
  Case(
    "aded",
    "decode.aded",
    decoder_of(),
    _prompt,
    _table_draft,
    full=np.float32(1),
    some=np.float32(0.04),
    none=np.float32(0),
    dense=_greedy,
    least=_greedy,
    unless={
      **_POLICY,
      "poison": "a draft leaves out nothing that is in the model",
      "cost": "the rate changes the number of steps, not what one costs",
    },
  ),
  Case(
    "entropy_adaptive",
    "decode.entropy_adaptive",
    _two_models,
    _prompt,
    _two_voices,
    full=ALWAYS,
    some=AT_TIMES,
    none=NEVER_LARGE,
    dense=of_model(_greedy),
    least=lambda params, x: _greedy(params["small"], x),
    poison=_poisoned_large,
    unless={
      **_POLICY,
      "cost": "asked late, the large model reads the prompt then, too",
    },
  ),
]
