# SPDX-License-Identifier: Apache-2.0
"""Law: DELTA's sparse layers read the pages of most mass in a full one before.

The layers of these tests have the same queries and keys, so that the oracle
needs one table of attention: page mass by NumPy, of all heads, token by token.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from adaptivejax.decode import generate
from adaptivejax.methods.attention import DELTA
from adaptivejax.nn import adjust, with_look
from tests.methods import choices, host, kv
from tests.methods.kv import H


def rule(pages, page, recent):
  def chosen(q, k, t):
    each = [
      kv.softmax(k[:, h // choices.R] @ q[h] / np.sqrt(8)) for h in range(H)
    ]
    most, now = np.max(each, 0), t // page
    mass = [most[p * page : (p + 1) * page].sum() for p in range(now + 1)]
    first = [p for p in range(now + 1) if p > now - recent]
    best = choices.best(mass, pages, first)
    return [choices.tokens_of(best, page, t)] * kv.G

  return chosen


def through(*layers):
  """`look.step` in these layers, one after the other; the last one is read."""

  def step(look, q, keys, place, cache, layer):
    del layer
    for i in layers:
      looked, cache = look.step(q, keys, place, cache, jnp.int32(i))
    return looked, cache

  return jax.jit(step)


@pytest.mark.parametrize(
  ("pages", "page", "recent"), [(3, 4, 1), (4, 3, 2), (2, 1, 2), (9, 4, 1)]
)
def test_reads_the_pages_of_most_mass(pages, page, recent):
  look = DELTA((0,), pages=pages, page=page, recent=recent)
  expected = rule(pages, page, recent)
  _, gap = choices.check(look, expected, step=through(0, 1))
  assert gap > 0.01 or pages == 9, "the choice matters"


def test_full_layers_see_all():
  everything = lambda q, k, t: [range(t + 1)] * kv.G
  look = DELTA((0, 1), pages=2, page=2, recent=1)
  choices.check(look, everything, step=through(0, 1))
  choices.check(look, everything, step=through(0))


def test_the_choice_goes_from_layer_to_layer(monkeypatch):
  """Until another full layer makes its own."""
  monkeypatch.setattr(kv, "LAYERS", 4)
  look = DELTA((0, 2), pages=3, page=4, recent=1)
  choices.check(look, rule(3, 4, 1), step=through(0, 1, 2, 3))
  far = DELTA((0,), pages=3, page=4, recent=1)
  choices.check(far, rule(3, 4, 1), step=through(0, 1, 2, 3))
  q, k, v = choices.placed()
  ones = lambda i, q: jnp.where(i < 2, q, jnp.ones_like(q))  # other queries

  def step(look, q, keys, place, cache, layer):
    for i in range(4):
      looked, cache = look.step(ones(i, q), keys, place, cache, jnp.int32(i))
    return looked, cache

  out, _ = kv.read(look, q, k, v, step=jax.jit(step))
  same = np.ones_like(q)
  chosen = choices.sets(rule(3, 4, 1), same, k)
  np.testing.assert_allclose(
    out, choices.attended(chosen, same, k, v), atol=2e-5
  )


def test_the_setting_takes_pages_away():
  step, look = through(0, 1), DELTA((0,), pages=4, page=3, recent=1)
  choices.check(adjust(look, 0.5), rule(2, 3, 1), step=step)
  choices.check(adjust(look, 1.0), rule(1, 3, 1), step=step)
  assert step._cache_size() == 2, "one for the prompt, one for a token"


def test_empty_slots_and_unread_values_go_nowhere():
  look, step = DELTA((0,), pages=2, page=4, recent=1), through(0, 1)
  choices.check(look, rule(2, 4, 1), spoil=kv.poisoned, step=step)
  look, expected = DELTA((0,), pages=1, page=4, recent=1), rule(1, 4, 1)

  def spoil(cache):
    old = jnp.arange(cache.slots) < cache.length[:, None, None] // 4 * 4
    bad = (
      old[:, None, :, :, None]
      & (jnp.arange(kv.LAYERS) == 1)[:, None, None, None]
    )  # of the sparse layer, all pages but the last
    hide = lambda a: jnp.where(bad, jnp.nan, a)
    return cache._replace(k=hide(cache.k), v=hide(cache.v))

  choices.check(look, expected, spoil=spoil, step=step)


def test_it_costs_what_it_reads():
  """Of 4 layers two are sparse, at 2 pages of 2 tokens where there are 5."""
  look = DELTA((0, 2), pages=2, page=2, recent=1)
  cost = host.decode(with_look(host.model(), look), host.TOKENS)[2]
  full = host.decode(host.model(), host.TOKENS)[2]
  tokens = host.B * (host.T - host.PROMPT)
  saved = 2 * tokens * 4 * host.CONFIG.features * (host.T - 4)
  np.testing.assert_allclose(full.spent - cost.spent, saved)
  np.testing.assert_allclose(full.full, cost.full)


def test_generates_as_before_if_all_pages_fit():
  want = generate(host.model(), host.TOKENS, steps=6, lengths=[10, 3, 7])
  fits = DELTA((0, 2), pages=8, page=2, recent=1)
  got = generate(
    with_look(host.model(), fits), host.TOKENS, steps=6, lengths=[10, 3, 7]
  )
  np.testing.assert_array_equal(got.tokens, want.tokens)
  few = with_look(host.model(), DELTA((0,), pages=1, page=1, recent=1))
  few = generate(few, host.TOKENS, steps=6, lengths=[10, 3, 7])
  assert (few.tokens != want.tokens).any()


@pytest.mark.parametrize(
  ("how", "words"),
  [
    ({"full": (1, 2)}, "layer 0 among them"),
    ({"full": (0, -1)}, "layer 0 among them"),
    ({"recent": 0}, "recent=0"),
    ({"pages": 4, "recent": 5}, "recent=5"),
    ({"page": 0}, "at least 1"),
  ],
)
def test_bad_input(how, words):
  with pytest.raises(ValueError, match=words):
    DELTA(**how)
