"""Law: XAttention chooses by antidiagonals, as NumPy does it pair by pair."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from adaptivejax.methods.attention import XAttention
from adaptivejax.nn import adjust
from tests.methods import prompts
from tests.methods.prompts import BLOCK, PROMPTS, B, H, W

STRIDE = 2


def look(p=0.9, stride=STRIDE):
  return XAttention(p, stride=stride, block_q=BLOCK, block_kv=BLOCK)


def estimate(p, stride=STRIDE):
  """Algorithm 1, an antidiagonal at a time, f64[B, H, Q, K]."""
  tokens, slots = p.q.shape[1], p.k.shape[2]
  rows, columns = -(-tokens // BLOCK), -(-slots // BLOCK)
  many = rows * BLOCK // stride, columns * BLOCK // stride
  score, seen = np.zeros((B, H, *many)), np.zeros((B, 1, *many), bool)
  raw = prompts.scores(p)
  for b, u, n in np.ndindex(B, *many):
    t = [i for i in range(u * stride, (u + 1) * stride) if i < tokens]
    s = [j for j in range(n * stride, (n + 1) * stride) if j < slots]
    at = [p.at[b, i] for i in t if p.at[b, i] >= 0]
    pos = [p.pos[b, j] for j in s if p.pos[b, j] >= 0]
    seen[b, 0, u, n] = bool(at and pos) and min(pos) <= max(at)
    for i in t:
      j = n * stride + stride - 1 - (i - u * stride)
      if j < slots and p.at[b, i] >= 0 and p.pos[b, j] >= 0:
        score[b, :, u, n] += raw[b, :, i, j] / stride
  weights = prompts.softmax(score, seen)
  size = BLOCK // stride
  return weights.reshape(B, H, rows, size, columns, size).sum((3, 5))


@pytest.mark.parametrize("name", PROMPTS)
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("share", [0.0, 0.6, 0.9, 1.0])
def test_chooses_and_finds_as_numpy(name, stride, share):
  p = PROMPTS[name]
  mass = estimate(p, stride)
  full = lambda a: np.broadcast_to(a, mass.shape)
  allowed, forced = full(prompts.seen_blocks(p)), full(prompts.ends(p))
  want = prompts.fewest(mass, share, forced, allowed)
  looked, chosen = p.look(look(share, stride))
  np.testing.assert_array_equal(chosen.mask, want)
  assert share in (0, 1) or (forced.sum() < want.sum() < allowed.sum())
  out = prompts.masked(p, prompts.pairs(p, want))
  there = p.at >= 0
  np.testing.assert_allclose(looked.out[there], out[there], atol=1e-5)
  held = np.where(want, mass, 0).sum(-1)
  assert (held >= share * mass.sum(-1) - 1e-6).all()


def test_the_whole_budget_is_dense():
  p = PROMPTS["continued"]
  looked, _ = p.look(adjust(look(0.3), 0.0))
  np.testing.assert_allclose(looked.out, prompts.masked(p, True), atol=1e-5)


@pytest.mark.parametrize("kind", ["vertical", "slash", "block"])
def test_finds_what_was_planted(kind):
  p, pair = prompts.planted(kind)
  _, chosen = p.look(look(0.99))
  assert prompts.recall(p, chosen, pair) >= 0.99
  density = prompts.pairs(p, chosen.mask).mean() / prompts.visible(p).mean()
  assert density < 0.75, "it chose nearly all"


def test_an_even_stride_misses_even_slashes():
  """As the docstring says: antidiagonals pass them by."""
  p, pair = prompts.planted("slash", offsets=(10,))
  far = pair & (np.arange(64)[:, None] >= 40)
  for stride, least, most in ((2, 0, 0.5), (1, 0.99, 1)):
    _, chosen = p.look(look(0.5, stride))
    assert least <= prompts.recall(p, chosen, far) <= most


def test_uniform_attention_takes_its_share_of_blocks():
  """Nothing stands out: p of the blocks, and no list overflows."""
  p = prompts.text(24)
  p = p._replace(q=np.zeros_like(p.q))
  looked, chosen = p.look(look(0.8))
  count = np.asarray(chosen.mask[0].sum(-1))  # [H, Q]
  want = np.ceil(0.8 * np.arange(1, 7) - 0.5)
  assert (np.abs(count - want) <= 1).all() and count[0, -1] < 6
  out = prompts.masked(p, prompts.pairs(p, chosen.mask))
  np.testing.assert_allclose(looked.out[0], out[0], atol=1e-5)


def test_a_later_tile_has_no_part_in_an_earlier_one():
  p = prompts.text(24)
  bad = p._replace(q=p.q.copy(), k=p.k.copy(), v=p.v.copy())
  bad.q[:, 12:] *= -3
  bad.k[:, :, 12:] += 5
  bad.v[:, :, 12:] = 9
  run = jax.jit(lambda *a: look(0.7)(*a).out)
  one, two = run(*p.arrays()), run(*bad.arrays())
  np.testing.assert_array_equal(one[:, :12], two[:, :12])
  assert not np.allclose(one[0, 12:], two[0, 12:])


@pytest.mark.parametrize("name", PROMPTS)
def test_what_is_not_there_is_not_read(name):
  p = PROMPTS[name]
  hole = (p.pos < 0)[:, None, :, None]
  assert hole.any()
  bad = p._replace(
    q=np.where((p.at < 0)[..., None, None], np.nan, p.q),
    k=np.where(hole, np.nan, p.k),
    v=np.where(hole, np.nan, p.v),
  )
  there = p.at >= 0
  (one, a), (two, b) = p.look(look(0.7)), bad.look(look(0.7))
  np.testing.assert_array_equal(a.mask, b.mask)
  np.testing.assert_array_equal(one.out[there], two.out[there])


def test_one_trace_for_all_thresholds_and_a_price_that_falls():
  p = prompts.text(24)
  run = jax.jit(lambda look, *a: look(*a).cost)
  levels = (0.0, 0.1, 0.5, 1.0)
  spent = [float(run(adjust(look(), x), *p.arrays()).spent) for x in levels]
  assert run._cache_size() == 1
  assert spent == sorted(spent, reverse=True) and spent[-1] < 0.75 * spent[0]
  scoring = 2 * B * H * (24 // STRIDE) ** 2 * STRIDE * W
  _, chosen = p.look(adjust(look(), 1.0))
  listed = 4 * W * BLOCK * BLOCK * float(chosen.mask.sum())
  assert spent[-1] == scoring + listed


def test_decoding_and_drafts_are_dense():
  p = PROMPTS["continued"]
  q, keys, at = p.arrays()
  got = look(0.0)(q[:, -1:], keys, at[:, -1:]).out
  want = prompts.masked(p, True)[:, -1:]
  np.testing.assert_allclose(got, want, atol=1e-5)
  tree = jnp.ones((B, q.shape[1], keys.pos.shape[-1]), bool)
  got = look(0.0)(q, keys, at, mask=tree).out
  np.testing.assert_allclose(got, prompts.masked(p, True), atol=1e-5)


def test_refuses_what_does_not_fit():
  with pytest.raises(ValueError, match="stride=3 must divide"):
    look(stride=3)
  with pytest.raises(ValueError, match="NaN"):
    look(float("nan"))
