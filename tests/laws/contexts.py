# SPDX-License-Identifier: Apache-2.0
"""The laws' case of a context read apart; its tokens are the budget."""

import jax
import jax.numpy as jnp
import numpy as np

from adaptivejax.methods.attention import APE, parallel_context
from adaptivejax.nn import with_look
from tests import reference
from tests.laws.case import Case, T
from tests.laws.kv import STRANGER, _looking, _some_text
from tests.laws.primitives import no_rows

P, M = 2, 4  # prefix and context; the rest is the text
END = P + M


def _apart():
  return APE(1, M, temperature=1.0, scale=1.0)


def _call(model, tokens, budget):
  """Logits of the text, after so many tokens of the context."""
  lengths = jnp.broadcast_to(budget, (len(tokens), 1))
  prefix, context = tokens[:, :P], tokens[:, None, P:END]
  cache = parallel_context(model, prefix, context, T, lengths=lengths)
  out = model(tokens[:, END:], cache)
  return out.logits, out.cost


def _sequence(model, tokens):
  return reference.decoder(model, tokens)[:, END:]


def _without(model, tokens):
  left = jnp.concatenate([tokens[:, :P], tokens[:, END:]], 1)
  return reference.decoder(model, left)[:, P:]


def _poisoned(model, tokens):
  """NaN in the context's second half."""
  model = jax.tree.map(lambda a: a, model)  # a copy
  table = model.embedding.get_value()
  model.embedding.set_value(table.at[STRANGER].set(jnp.nan))
  return model, tokens.at[:, P + 2 : END].set(STRANGER), np.int32(2), None


CONTEXTS = [
  Case(
    "ape",
    "attention.ape",
    _looking(_apart),
    _some_text,
    _call,
    full=np.int32(M),
    some=np.int32(2),
    none=np.int32(0),
    dense=_sequence,
    least=_without,
    poison=_poisoned,
    place=lambda model, _: with_look(model, _apart()),  # both at 1 again
    unless={
      "oracle": "token by token, by NumPy, in tests/methods",
      "gradient": "a cache is written, and trained through by nobody",
      "poison_gradient": "a cache is written, and trained through by nobody",
      "cover": no_rows,
      "linen": "contexts are read by the model with another look",
      "cost": "nothing is chosen: all slots are looked at, padding too",
    },
  )
]
