# SPDX-License-Identifier: Apache-2.0
"""The laws' cases of looks that choose keys for each decoded token."""

import numpy as np

from adaptivejax.methods.attention import DELTA, Kinetics, Quest, TokenSelect
from adaptivejax.methods.kv import SpAtten
from adaptivejax.nn import adjust
from tests import reference
from tests.laws.case import PROMPT, Case, L, T
from tests.laws.kv import FULL, HALF, NONE, _looking, _some_text
from tests.laws.models import _dense, _plain
from tests.laws.primitives import no_rows

_UNLESS = {
  "gradient": "a cache is written, and trained through by nobody",
  "poison_gradient": "a cache is written, and trained through by nobody",
  "cover": no_rows,
  "poison": "a prompt sees all of itself; pages are poisoned in tests/methods",
}
FULL_LAYERS = (0, 2)


def _seen(rule):
  """The dense model in which, at layer l, query i sees key j by a rule."""
  places = range(T)
  pairs = [[[rule(l, i, j) for j in places] for i in places] for l in range(L)]

  def run(model, tokens):
    return reference.decoder(model, tokens, pairs=np.array(pairs))[:, PROMPT:]

  return run


def _own_page(l, i, j):
  del l
  return i < PROMPT or j // 2 == i // 2


def _choosing(
  name,
  look,
  least,
  overhead=lambda m, x: 0.0,
  full=FULL,
  some=HALF,
  axis="attention",
):
  return Case(
    name,
    f"{axis}.{name}",
    _looking(look),
    _some_text,
    _plain,
    full=full,
    some=some,
    none=NONE,
    place=adjust,
    dense=_dense,
    least=_seen(least),
    overhead=overhead,
    unless=_UNLESS,
  )


def _scored(a_page, page=1):
  """So many products of a query with each page, in each layer and step."""

  def flops(model, tokens):
    queries = model.config.features * len(tokens) * (T - PROMPT)
    return 2.0 * a_page * queries * -(-T // page) * model.config.layers

  return flops


DECODING_ATTENTION = [
  _choosing(
    "quest",
    lambda: Quest(4, page=2, dense_layers=0),
    _own_page,
    _scored(2, page=2),
  ),
  _choosing(
    "token_select",
    lambda: TokenSelect(3, initial=0, local=1, similarity=2.0, heads=2),
    lambda l, i, j: i < PROMPT or i == j,
    _scored(1),
    full=np.float32(-2),  # thrice the tokens: all
    some=np.float32(0.67),
  ),
  _choosing(
    "delta",
    lambda: DELTA(FULL_LAYERS, pages=4, page=2, recent=1),
    lambda l, i, j: l in FULL_LAYERS or _own_page(l, i, j),
  ),
  _choosing(
    "kinetics",
    lambda: Kinetics(4, page=2, sinks=0, local=1, dense_layers=0),
    _own_page,
    _scored(1, page=2),
  ),
  _choosing(
    "spatten",
    SpAtten,
    lambda l, i, j: l == 0 or i == j,
    axis="kv",
  ),
]
