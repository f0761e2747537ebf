# SPDX-License-Identifier: Apache-2.0
"""Law: a query attends to its own block and the best of those before it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from adaptivejax.core import chosen_blocks
from adaptivejax.core.attention import Keys
from adaptivejax.core.cache import crop
from adaptivejax.methods.attention import MoBA
from adaptivejax.nn import adjust, with_look
from tests.methods import blocks, host
from tests.methods.blocks import AT, B, G, H, T

BLOCK, BLOCKS = 4, 3


def chosen_by(q, k, t, h, block, many):
  """Blocks of one query, by a sort of a list."""
  own, g = t // block, h * k.shape[1] // q.shape[1]
  mean = lambda i: k[i * block : (i + 1) * block, g].mean(0)
  ranked = sorted(range(own), key=lambda i: (-(q[t, h] @ mean(i)), i))
  return {own, *ranked[: many - 1]}


def pairs(q, k, block, many):
  """Which query sees which key, bool[B, H, T, T]."""
  seen = np.zeros((B, H, T, T), bool)
  for b, t, h in np.ndindex(B, T, H):
    for i in chosen_by(q[b], k[b], t, h, block, many):
      seen[b, h, t, i * block : (i + 1) * block] = True
  return seen & np.tri(T, dtype=bool)


def oracle(q, k, v, block=BLOCK, many=BLOCKS):
  seen, out = pairs(q, k, block, many), np.zeros(q.shape)
  for b, t, h in np.ndindex(B, T, H):
    g = h * G // H
    there = np.flatnonzero(seen[b, h, t])
    out[b, t, h] = blocks.mixed(q[b, t, h], k[b, :, g], v[b, :, g], there)
  return out


def found(look, q, k, v):
  return blocks.looked(look, jnp.asarray(q), blocks.keys_of(k, v), AT).out


@pytest.mark.parametrize(
  ("block", "many"), [(4, 3), (4, 1), (5, 2), (1, 4), (40, 3)]
)
def test_finds_what_sorting_finds(block, many):
  """The last block is cut off; a block may be one key, or all of them."""
  q, k, v = blocks.drawn()
  got = found(MoBA(block, many), q, k, v)
  np.testing.assert_allclose(got, oracle(q, k, v, block, many), atol=2e-5)


def test_the_whole_budget_is_dense():
  q, k, v = blocks.drawn()
  got = found(MoBA(BLOCK, 6), q, k, v)
  np.testing.assert_allclose(got, blocks.dense(q, k, v), atol=2e-5)


def test_the_setting_is_the_share_of_the_others_left_out():
  q, k, v = blocks.drawn()
  for level, many in ((0.5, 3), (1.0, 1), (0.0, 5)):
    got = found(adjust(MoBA(BLOCK, 5), level), q, k, v)
    np.testing.assert_allclose(got, oracle(q, k, v, BLOCK, many), atol=2e-5)


def test_one_block_may_be_chosen_by_all():
  """A hot block, as long as the text is: nothing has a capacity."""
  q, k, v = blocks.drawn()
  q, k = np.abs(q), np.abs(k)
  k[:, BLOCK : 2 * BLOCK] *= 9
  seen = pairs(q, k, BLOCK, 2)
  assert seen[:, :, 2 * BLOCK :, BLOCK : 2 * BLOCK].all()
  got = found(MoBA(BLOCK, 2), q, k, v)
  np.testing.assert_allclose(got, oracle(q, k, v, BLOCK, 2), atol=2e-5)


def test_ties_go_to_the_earlier_block():
  q, k, v = blocks.drawn()
  k[:] = 1
  got = found(MoBA(BLOCK, 2), q, k, v)
  want = [
    v[:, [j for j in range(t + 1) if j < BLOCK or j >= t // BLOCK * BLOCK]]
    for t in range(T)
  ]
  want = np.stack([a.mean(1) for a in want], 1)
  np.testing.assert_allclose(got, np.repeat(want, H // G, 2), atol=2e-5)


def test_nothing_of_what_is_to_come_is_seen():
  """Not even in a mean: bitwise."""
  q, k, v = blocks.drawn()
  before = found(MoBA(BLOCK, BLOCKS), q, k, v)
  for t in (2, 7, 8, 20):
    for a in (q, k, v):
      a[:, t + 1 :] = 100 * a[:, t + 1 :] + 7
    got = found(MoBA(BLOCK, BLOCKS), q, k, v)
    np.testing.assert_array_equal(got[:, : t + 1], before[:, : t + 1])
    q, k, v = blocks.drawn()


def test_gradients_are_those_of_a_mask():
  q, k, v = map(jnp.asarray, blocks.drawn(scale=1.0))
  seen = jnp.asarray(pairs(np.array(q), np.array(k), BLOCK, BLOCKS))
  look = MoBA(BLOCK, BLOCKS)
  ours = lambda q, k, v: jnp.sin(look(q, blocks.keys_of(k, v), AT).out).sum()
  mask = lambda q, k, v: jnp.sin(blocks.masked(q, k, v, seen)).sum()
  got = jax.jit(jax.grad(ours, (0, 1, 2)))(q, k, v)
  for a, b in zip(got, jax.grad(mask, (0, 1, 2))(q, k, v)):
    np.testing.assert_allclose(a, b, atol=1e-4)


@pytest.mark.parametrize("cuts", [(1,) * T, (10, 1, 1, 5, *(1,) * 6)])
def test_it_does_not_matter_how_a_text_is_cut(cuts):
  """Prompts, tokens and drafts: means of blocks stay in the cache."""
  q, k, v = blocks.drawn()
  got, _ = blocks.stepwise(MoBA(BLOCK, BLOCKS), q, k, v, cuts)
  np.testing.assert_allclose(got, oracle(q, k, v), atol=2e-5)


def test_rejected_drafts_leave_no_trace_in_the_means():
  """Six wrong tokens are read, past a block's end, and taken back."""
  q, k, v = blocks.drawn()
  look = MoBA(BLOCK, BLOCKS)
  _, cache = blocks.stepwise(look, q, k, v, (6,))
  at = AT[:, 6:12]
  wrong = blocks.keys_of(50 + k[:, 6:12], v[:, 6:12], at)
  _, drafted = blocks.step(look, jnp.asarray(q[:, 6:12]), wrong, at, cache)
  cache, out = crop(drafted, cache.length), []
  for t in range(6, T):
    part, at = slice(t, t + 1), AT[:, t : t + 1]
    keys = blocks.keys_of(k[:, part], v[:, part], at)
    looked, cache = blocks.step(look, jnp.asarray(q[:, part]), keys, at, cache)
    cache = cache.advance(1)
    out.append(looked.out)
  want = oracle(q, k, v)[:, 6:]
  np.testing.assert_allclose(jnp.concatenate(out, 1), want, atol=2e-5)


def test_what_is_not_chosen_or_not_there_goes_nowhere():
  """NaN in the keys of a block is no score; in a dead token it is nothing."""
  q, k, v = blocks.drawn()
  look = MoBA(BLOCK, 1)
  bad_k, bad_v = k.copy(), v.copy()
  bad_k[:, 4:8], bad_v[:, 4:8] = np.nan, np.nan
  got = np.asarray(found(look, q, bad_k, bad_v))
  clean = np.asarray(found(look, q, k, v))
  np.testing.assert_array_equal(got[:, 8:], clean[:, 8:])
  dead = jnp.where(AT == 5, -1, AT)
  look = MoBA(BLOCK, BLOCKS)
  keep = [t for t in range(T) if t != 5]
  outs = []
  for filler in (np.nan, 3.0):
    for a in (q, k, v):
      a[:, 5] = filler
    keys = blocks.keys_of(k, v, dead)
    got = blocks.looked(look, jnp.asarray(q), keys, dead).out
    outs.append(np.asarray(got)[:, keep])
  assert np.isfinite(outs[0]).all()
  np.testing.assert_array_equal(outs[0], outs[1])


def test_work_is_that_of_the_choices():
  """4 of 64 blocks at random: a sixteenth of the pairs, and part tiles."""
  rng = np.random.default_rng(0)
  q, k = (
    jnp.asarray(rng.normal(size=s), jnp.float32)
    for s in ((1, 512, 2, 4), (1, 2, 512, 4))
  )
  at = jnp.arange(512)[None]
  keys = Keys(k, k, at[:, None])
  cost = blocks.looked(MoBA(8, 4), q, keys, at).cost
  assert 0.06 < float(cost.share) < 0.2
  assert 0 < float(cost.items) <= float(cost.capacity)
  less = blocks.looked(adjust(MoBA(8, 4), 0.7), q, keys, at).cost
  assert float(less.spent) < float(cost.spent)
  assert float(less.full) == float(cost.full) == 4 * 512 * 512 * 2 * 4


def test_many_queries_choose_as_few_do(monkeypatch):
  q, k, v = blocks.drawn()
  want = found(MoBA(BLOCK, BLOCKS), q, k, v)
  chunked = lambda f, a: _over_queries(f, a, chunk=5)
  monkeypatch.setattr(
    "adaptivejax.methods.attention.moba.over_queries", chunked
  )
  look, keys = MoBA(BLOCK, BLOCKS), blocks.keys_of(k, v)
  got = jax.jit(lambda q: look(q, keys, AT).out)(jnp.asarray(q))
  np.testing.assert_allclose(got, want, atol=1e-6)


_over_queries = chosen_blocks.over_queries


def test_a_model_reads_on_as_it_reads_at_once():
  """Through layers, by the engine's way: logits of decoded tokens."""
  model = with_look(host.model(), MoBA(2, 2))
  want = model(host.TOKENS).logits[:, host.PROMPT :]
  got = host.decode(model, host.TOKENS)[0]
  np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("sizes", [(0, 3), (4, 0)])
def test_refuses_nothing_to_look_at(sizes):
  with pytest.raises(ValueError, match="at least 1"):
    MoBA(*sizes)


def test_refuses_trees_and_strange_keys():
  q, k, v = blocks.drawn()
  look, q = MoBA(BLOCK, BLOCKS), jnp.asarray(q)
  keys = blocks.keys_of(k, v)
  with pytest.raises(ValueError, match="chains"):
    look(q, keys, AT, mask=jnp.ones((B, T, T), bool))
  with pytest.raises(ValueError, match="without a cache"):
    look(q[:, :3], keys, AT[:, :3])
