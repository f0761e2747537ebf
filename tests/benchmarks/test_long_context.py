# SPDX-License-Identifier: Apache-2.0
"""Law: the beds tell looks apart, as the looks below, known by construction.

The looks are masks, here only: what methods do cheaply, done in the open.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from adaptivejax.nn import Look, look_cost
from adaptivejax.nn.look import Looked
from adaptivejax.report.data import BudgetCurve, Report
from adaptivejax.report.store import load_report, write_report
from benchmarks import long_context as bed

BLOCK = 16


class Masked(Look):
  """Attention to the visible keys among those that `chosen` names."""

  def __init__(self, budget):
    self.budget = budget

  def __call__(self, q, keys, positions, layer=0, *, live=None, **rest):
    seen = (keys.pos >= 0) & (keys.pos <= positions[:, :, None])
    seen = seen[:, None]  # [B, 1, T, S]
    scores = jnp.einsum("bthw,bhsw->bhts", q, keys.k) * q.shape[-1] ** -0.5
    scores = jnp.where(seen, scores, -1e30)
    scores = jnp.where(self.chosen(scores, q, keys, positions), scores, -1e30)
    weights = jnp.where(seen, jax.nn.softmax(scores, -1), 0)
    out = jnp.einsum("bhts,bhsw->bthw", weights, keys.v)
    return Looked(out, look_cost(q, keys.k.shape[2], live))

  def chosen(self, scores, q, keys, positions):
    return True


def largest(scores, count):
  least = jax.lax.top_k(scores, min(count, scores.shape[-1]))[0][..., -1:]
  return scores >= least


class Oracle(Masked):
  """The keys of the largest scores."""

  def chosen(self, scores, q, keys, positions):
    return largest(scores, self.budget)


class Window(Masked):
  """The first four and the last ones."""

  def chosen(self, scores, q, keys, positions):
    pos, at = keys.pos[:, :, None], positions[:, None, :, None]
    return (pos < 4) | (pos > at - (self.budget - 4))


class MeanBlocks(Masked):
  """Whole blocks of keys, by the query's score with their mean."""

  def chosen(self, scores, q, keys, positions):
    blocks = -(-scores.shape[-1] // BLOCK)
    pad = (*scores.shape[:-1], blocks * BLOCK - scores.shape[-1])
    wide = jnp.concatenate([scores, jnp.full(pad, -1e30)], -1)
    wide = wide.reshape(*scores.shape[:-1], blocks, BLOCK)
    real = wide > -1e29
    count = real.sum(-1)
    mean = jnp.where(real, wide, 0).sum(-1) / jnp.maximum(count, 1)
    mean = jnp.where(count > 0, mean, -1e30)
    picked = jnp.repeat(largest(mean, self.budget // BLOCK), BLOCK, axis=-1)
    return picked[..., : scores.shape[-1]]


class Recent(Masked):
  """As `Window` without sinks, but it holds no other keys: it evicts."""

  evicts = True

  def slots(self, slots):
    return self.budget

  def step(self, q, keys, positions, cache, layer=0, *, live=None, **rest):
    held = cache.read(layer)
    both = jax.tree.map(lambda a, b: jnp.concatenate([a, b], 2), held, keys)
    looked = Masked(self.budget)(q, both, positions, live=live)
    last = lambda a: a[:, :, -self.budget :]
    put = lambda old, new: old.at[:, layer].set(last(new))
    return looked, cache._replace(
      k=put(cache.k, both.k),
      v=put(cache.v, both.v),
      pos=put(cache.pos, both.pos),
    )


def test_a_text_of_needles_is_what_it_says():
  given = bed.needles(9, 128, 16, seed=1)
  now, before = given.tokens % bed.VOCAB, given.tokens // bed.VOCAB
  np.testing.assert_array_equal(before[:, 1:], now[:, :-1])
  for row in range(9):
    text, asked = now[row], now[row, -1]
    assert asked < bed.KEYS
    places = np.flatnonzero(text[:-1] < bed.KEYS)
    assert len(places) == len(np.unique(text[places])) == 16
    [at] = [i for i in places if text[i] == asked]
    assert at + 1 == given.place[row]
    assert text[at + 1] == given.answer[row]
    values = (text >= bed.KEYS) & (text < bed.KEYS + bed.VALUES)
    np.testing.assert_array_equal(np.flatnonzero(values), places + 1)


def test_needles_tell_looks_apart():
  """Needs the trained model, half a minute if it is not kept."""
  find = lambda look, *budgets: bed.accuracy(look, budgets, count=48)
  dense = find(bed.LOOKS["all keys"], 1)[1]
  oracle, blocks, window = (
    find(look, 64, 256) for look in (Oracle, MeanBlocks, Window)
  )
  assert dense > 0.9
  assert oracle[64] > 0.9 and oracle[256] > 0.9
  assert window[64] < 0.2 and window[256] < 0.3
  assert window[256] + 0.1 < blocks[256] < oracle[256]
  assert blocks[64] <= blocks[256]


def test_a_budget_of_all_keys_is_dense():
  """Whatever way the keys got into the cache."""
  settings = {"length": 96, "pairs": 8, "count": 16, "quick": True}
  dense = bed.accuracy(bed.LOOKS["all keys"], [96], **settings)
  for look in (Oracle, Window, Recent):
    assert bed.accuracy(look, [96], **settings) == dense


def test_a_document_is_long_and_held_out():
  name, text = bed.document()
  assert len(text) >= 100_000 and text.min() >= 0 and text.max() < 256
  train = bed.load_corpus(bed._data()).train
  assert not set(name.split(" + ")) & set(train)


def test_perplexity_is_that_of_the_bytes():
  """A model hardly trained; by hand for one window, and through a cache."""
  model = bed.byte_model(True)
  text = bed.document()[1]
  found = bed.perplexity(bed.LOOKS["all keys"], [1], count=1, quick=True)
  window = jnp.asarray(text[None, : bed.CONTEXT + 1])
  odds = jax.nn.log_softmax(model(window[:, :-1]).logits, -1)[0]
  nats = -odds[np.arange(bed.CONTEXT), window[0, 1:]]
  want = np.exp(float(nats[bed.CONTEXT // 2 :].mean()))
  assert found[1] == pytest.approx(want, rel=1e-4)
  stream = bed.perplexity(Recent, [bed.CONTEXT], count=1, quick=True)
  assert stream[bed.CONTEXT] == pytest.approx(want, rel=1e-4)


def test_curves_make_a_report(tmp_path):
  curves = (
    BudgetCurve("all", "accuracy", (64, 128), (1.0, 1.0)),
    BudgetCurve("window <4>", "accuracy", (64, 128), (0.1, None)),
    BudgetCurve("all", "perplexity", (64,), (3.5,)),
  )
  report = Report("long", "me", {}, budgets=curves)
  html = write_report(report, tmp_path).read_text()
  assert html.count("<figure>") == 2 and "What a budget of keys buys" in html
  assert "window &lt;4&gt;" in html and "<4>" not in html
  assert load_report(tmp_path).budgets == curves
  with pytest.raises(ValueError, match="2 budgets"):
    BudgetCurve("all", "accuracy", (1, 2), (1.0,))
