# SPDX-License-Identifier: Apache-2.0
"""The laws' cases of looks that give keys up: a decoder with a small cache."""

import jax
import jax.numpy as jnp
import numpy as np

from adaptivejax.methods.kv import H2O, SnapKV, StreamingLLM
from adaptivejax.models import DecoderLM, decoder_block
from adaptivejax.nn import adjust
from tests import reference
from tests.laws.case import CONFIG, PROMPT, Case, T, V
from tests.laws.models import _dense, _plain
from tests.laws.primitives import no_rows

FULL, HALF, NONE = np.float32(0), np.float32(0.5), np.float32(1)
STRANGER = V - 1  # a token that is in no text


def _looking(look):
  def build(rngs):
    layer = lambda rngs: decoder_block(CONFIG, rngs, look=look())
    return DecoderLM(CONFIG, layer=layer, rngs=rngs)

  return build


def _some_text(batch):
  draw = np.random.default_rng(0).integers(0, STRANGER, (batch, T))
  return jnp.asarray(draw, jnp.int32)


def _seen(rule):
  """The dense model in which query i sees key j by rule(i, j)."""
  pairs = np.array([[rule(i, j) for j in range(T)] for i in range(T)])

  def run(model, tokens):
    return reference.decoder(model, tokens, pairs=pairs)[:, PROMPT:]

  return run


def _poisoned_stranger(model, tokens):
  """NaN in a token that nobody who speaks sees: the first, by itself."""
  model = jax.tree.map(lambda a: a, model)  # a copy
  table = model.embedding.get_value()
  model.embedding.set_value(table.at[STRANGER].set(jnp.nan))
  return model, tokens.at[:, 0].set(STRANGER), NONE, None


_by_slot = "replayed key by key, by dictionaries, in tests/methods"
_whole_prompt = (
  "a prompt sees all of itself; slots are poisoned in tests/methods"
)
_capacity = "the capacity is what it costs; the level empties slots"
_UNLESS = {
  "oracle": _by_slot,
  "gradient": _by_slot,
  "poison_gradient": "a cache is written, and trained through by nobody",
  "cover": no_rows,
  "cost": _capacity,
}


def _case(name, look, least, poison=None):
  unless = {} if poison else {"poison": _whole_prompt}
  return Case(
    name,
    f"kv.{name}",
    _looking(look),
    _some_text,
    _plain,
    full=FULL,
    some=HALF,
    none=NONE,
    place=adjust,
    dense=_dense,
    least=_seen(least),
    poison=poison,
    unless={**_UNLESS, **unless},
  )


KV = [
  _case(
    "h2o",
    lambda: H2O(4, 4),
    lambda i, j: i < PROMPT or j >= i - 1,
  ),
  _case(
    "snap_kv",
    lambda: SnapKV(8, window=1, kernel=3, extra=4),
    lambda i, j: i < PROMPT or j >= PROMPT - 1,
  ),
  _case(
    "streaming_llm",
    lambda: StreamingLLM(0, 8),
    lambda i, j: j == i,
    poison=_poisoned_stranger,
  ),
]
