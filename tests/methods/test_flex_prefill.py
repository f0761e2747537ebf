"""Law: FlexPrefill chooses head by head, as NumPy does it item by item."""

import jax
import numpy as np
import pytest
from scipy.spatial.distance import jensenshannon

from adaptivejax.methods.attention import FlexPrefill
from adaptivejax.nn import adjust
from tests.methods import prompts
from tests.methods.prompts import BLOCK, PROMPTS, B, H


def look(gamma=0.9, tau=0.3, budget=1):
  return FlexPrefill(
    gamma, tau, min_budget=budget, block_q=BLOCK, block_kv=BLOCK
  )


def distances(p):
  """Between the probe's attention by block and what means guess, [B, H]."""
  last = [np.argsort(-p.at[b], kind="stable")[:BLOCK] for b in range(B)]
  columns, _ = prompts.lines(p, BLOCK)
  _, blocks = prompts.tiles(p)
  true = np.stack([columns[..., s].sum(-1) for s in blocks], -1)
  there = np.array([[(p.pos[b, s] >= 0).any() for s in blocks] for b in [0, 1]])
  guess = prompts.pooled(p, [last])[:, :, 0]
  guess = prompts.softmax(guess, there[:, None])
  return jensenshannon(true, guess, axis=-1)  # scipy's, natural logarithm


def choice(p, gamma, tau, budget):
  """`(mask, columns, aware)` by algorithms 2 to 4."""
  aware = distances(p) < tau
  by_column, by_slash = prompts.lines(p, BLOCK)
  there = np.broadcast_to((p.pos >= 0)[:, None], by_column.shape)
  every = np.ones(by_slash.shape, bool)
  chosen = []
  for mass, allowed in ((by_column, there), (by_slash, every)):
    least = prompts.best(mass, budget) & allowed
    enough = prompts.fewest(mass, gamma, least, allowed)
    chosen.append(np.where(aware[..., None], least, enough))
  seen = prompts.seen_blocks(p)
  guess = prompts.softmax(prompts.pooled(p), seen)
  flat = lambda a: np.broadcast_to(a, guess.shape).reshape(B, H, -1)
  best = prompts.fewest(flat(guess), gamma, flat(prompts.ends(p)), flat(seen))
  best = best.reshape(guess.shape) & aware[..., None, None]
  mask = best | prompts.slashed(p, chosen[1]) | prompts.ends(p)
  return mask, chosen[0], aware


@pytest.mark.parametrize("name", PROMPTS)
@pytest.mark.parametrize("gamma", [0.5, 0.8])
@pytest.mark.parametrize("tau", [0.0, 0.3, 1.0])
def test_chooses_and_finds_as_numpy(name, gamma, tau):
  p = PROMPTS[name]
  if tau == 0.3:  # some heads each way, none on the edge
    tau = float(np.median(distances(p)))
    assert np.abs(distances(p) - tau).min() > 1e-4
  mask, columns, aware = choice(p, gamma, tau, 2)
  assert aware.mean() == {0.0: 0, 1.0: 1}.get(tau, 0.5)
  looked, chosen = p.look(look(gamma, tau, 2))
  np.testing.assert_array_equal(chosen.mask, mask)
  np.testing.assert_array_equal(chosen.columns, columns)
  out = prompts.masked(p, prompts.pairs(p, mask, columns))
  there = p.at >= 0
  np.testing.assert_allclose(looked.out[there], out[there], atol=1e-5)


@pytest.mark.parametrize("tau", [0.0, 1.0])
def test_holds_the_share_it_promises(tau):
  """Of the guess over the map, or of the probe's attention by column."""
  p = PROMPTS["text"]
  _, chosen = p.look(look(0.7, tau, 0))
  if tau:
    mass = prompts.softmax(prompts.pooled(p), prompts.seen_blocks(p))
    held = np.where(chosen.mask, mass, 0).sum((2, 3)) / mass.sum((2, 3))
  else:
    mass, _ = prompts.lines(p, BLOCK)
    held = np.where(chosen.columns, mass, 0).sum(-1) / mass.sum(-1)
  assert (held >= 0.7 - 1e-6).all() and (held < 0.95).all()


def test_the_whole_budget_is_dense():
  p = PROMPTS["continued"]
  looked, _ = p.look(adjust(look(0.3), 0.0))
  np.testing.assert_allclose(looked.out, prompts.masked(p, True), atol=1e-5)


@pytest.mark.parametrize(
  ("kind", "tau"), [("vertical", 0.0), ("slash", 0.0), ("block", 1.0)]
)
def test_finds_what_was_planted(kind, tau):
  p, pair = prompts.planted(kind)
  _, chosen = p.look(look(0.98, tau))
  assert prompts.recall(p, chosen, pair) >= 0.99
  got = prompts.pairs(p, chosen.mask, chosen.columns)
  assert got.mean() < 0.75 * prompts.visible(p).mean(), "it chose nearly all"


@pytest.mark.parametrize("tau", [0.0, 1.0])
def test_uniform_attention_takes_its_share(tau):
  p = prompts.text(24)
  p = p._replace(q=np.zeros_like(p.q))
  looked, chosen = p.look(look(0.75, tau))
  out = prompts.masked(p, prompts.pairs(p, *chosen))
  np.testing.assert_allclose(looked.out[0], out[0], atol=1e-5)
  if tau:
    seen = np.tri(6, dtype=bool)
    guess = seen / seen.sum(-1, keepdims=True)
    held = np.where(chosen.mask[0], guess, 0).sum((1, 2)) / 6
    assert (held >= 0.75 - 1e-6).all() and (held < 1).all()
  else:
    count = np.asarray(chosen.columns[0]).sum(-1)
    assert (np.abs(count - 0.75 * 24) <= 2).all()


def test_values_to_come_are_never_seen():
  p = prompts.text(24)
  bad = p._replace(v=p.v.copy())
  bad.v[:, :, 13:] = np.nan
  run = jax.jit(lambda *a: look(0.7)(*a).out)
  one, two = run(*p.arrays()), run(*bad.arrays())
  np.testing.assert_array_equal(one[:, :13], two[:, :13])
  assert np.isnan(two[0, 13:]).any()


@pytest.mark.parametrize("name", PROMPTS)
def test_what_is_not_there_is_not_read(name):
  p = PROMPTS[name]
  hole = (p.pos < 0)[:, None, :, None]
  bad = p._replace(
    q=np.where((p.at < 0)[..., None, None], np.nan, p.q),
    k=np.where(hole, np.nan, p.k),
    v=np.where(hole, np.nan, p.v),
  )
  there = p.at >= 0
  (one, a), (two, b) = p.look(look(0.7)), bad.look(look(0.7))
  np.testing.assert_array_equal(a.mask, b.mask)
  np.testing.assert_array_equal(a.columns, b.columns)
  np.testing.assert_array_equal(one.out[there], two.out[there])


def test_one_trace_for_all_thresholds_and_a_price_that_falls():
  p = prompts.text(24)
  run = jax.jit(lambda look, *a: look(*a).cost)
  spent = [
    float(run(look(gamma, tau), *p.arrays()).spent)
    for gamma, tau in ((1.0, 0.3), (0.8, 0.0), (0.3, 0.0), (0.0, 1.0))
  ]
  assert run._cache_size() == 1
  assert spent[0] > spent[2] > spent[3]


def test_refuses_what_does_not_fit():
  with pytest.raises(ValueError, match="min_budget=-1"):
    look(budget=-1)
  with pytest.raises(ValueError, match="`tau` is NaN"):
    look(tau=float("nan"))
