"""Law: MInference's patterns choose as NumPy does, and heads get theirs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from adaptivejax.core import coverage
from adaptivejax.methods.attention.minference import (
  PATTERNS,
  Budgets,
  MInference,
  assign,
)
from adaptivejax.models import DecoderConfig, DecoderLM
from adaptivejax.nn import adjust, coverage_of, with_look
from tests.methods import host, prompts
from tests.methods.prompts import BLOCK, PROMPTS, B, H

A, VS, BS = PATTERNS
SMALL = {
  "sinks": 2, "window": 5, "verticals": 4, "slashes": 3, "first": 1,
  "recent": 1, "blocks": 2, "probe": 6,
}  # fmt: skip
LARGE = dict.fromkeys(
  ("sinks", "window", "verticals", "slashes", "blocks"), 1000
)


def look(patterns=(A, VS, BS, VS), **sizes):
  budgets = Budgets(**{**SMALL, **sizes})
  return MInference(patterns, budgets, block_q=BLOCK, block_kv=BLOCK)


def choice(p, pattern, level=0.0):
  """`(mask, columns)` of one pattern in all heads."""
  left = lambda name, least=1: max(round(SMALL[name] * (1 - level)), least)
  size = p.k.shape[2]
  there = np.broadcast_to((p.pos >= 0)[:, None], (B, H, size))
  none = np.zeros((B, H, size), bool)
  if pattern == BS:
    seen = prompts.seen_blocks(p)
    score = np.where(seen, prompts.pooled(p), -np.inf)
    best = prompts.best(score, left("blocks")) & seen
    return best | prompts.ends(p), none
  near = np.broadcast_to(np.arange(size), none.shape)
  if pattern == A:
    columns = (p.pos < left("sinks"))[:, None] & there
    return prompts.slashed(p, near < left("window")), columns
  by_column, by_slash = prompts.lines(p, SMALL["probe"])
  early = (p.pos < SMALL["first"])[:, None] & there
  score = np.where(early, np.inf, np.where(there, by_column, -1))
  columns = prompts.best(score, left("verticals", SMALL["first"])) & there
  score = np.where(near < SMALL["recent"], np.inf, by_slash)
  slashes = prompts.best(score, left("slashes", SMALL["recent"]))
  return prompts.slashed(p, slashes), columns


@pytest.mark.parametrize("name", PROMPTS)
@pytest.mark.parametrize("level", [0.0, 0.5, 1.0])
def test_chooses_and_finds_as_numpy(name, level):
  """Each head by its pattern, all in one call."""
  p, own = PROMPTS[name], (A, VS, BS, VS)
  by = {name: choice(p, name, level) for name in PATTERNS}
  full = np.zeros((B, H, *by[VS][0].shape[2:]), bool)
  mask = np.stack([(full | by[n][0])[:, h] for h, n in enumerate(own)], 1)
  columns = np.stack([by[n][1][:, h] for h, n in enumerate(own)], 1)
  looked, chosen = p.look(adjust(look(own), level))
  np.testing.assert_array_equal(chosen.mask, mask)
  np.testing.assert_array_equal(chosen.columns & (p.pos >= 0)[:, None], columns)
  out = prompts.masked(p, prompts.pairs(p, mask, columns))
  there = p.at >= 0
  np.testing.assert_allclose(looked.out[there], out[there], atol=1e-5)


def test_the_whole_budget_is_dense():
  p = PROMPTS["continued"]
  looked, _ = p.look(look(**LARGE))
  np.testing.assert_allclose(looked.out, prompts.masked(p, True), atol=1e-5)


def test_gradients_of_blocks_and_columns_are_those_of_masked_attention():
  p = PROMPTS["text"]
  q, keys, at = p.arrays()
  some = look((VS,) * H)
  _, chosen = p.look(some)
  allowed = jnp.asarray(prompts.pairs(p, *chosen))

  def masked(q, k, v):
    k, v = (jnp.repeat(a, 2, axis=1) for a in (k, v))
    s = jnp.einsum("bthw,bhsw->bhts", q, k) / jnp.sqrt(1.0 * q.shape[-1])
    weights = jax.nn.softmax(jnp.where(allowed, s, -1e30), axis=-1)
    weights = jnp.where(allowed, weights, 0)
    return jnp.sin(jnp.einsum("bhts,bhsw->bthw", weights, v)).sum()

  def sparse(q, k, v):
    out = some(q, keys._replace(k=k, v=v), at).out
    return jnp.sin(jnp.where((at >= 0)[..., None, None], out, 0)).sum()

  got = jax.grad(sparse, (0, 1, 2))(q, keys.k, keys.v)
  for a, b in zip(got, jax.grad(masked, (0, 1, 2))(q, keys.k, keys.v)):
    np.testing.assert_allclose(a, b, atol=1e-4)


@pytest.mark.parametrize(
  ("kind", "pattern"), [("vertical", VS), ("slash", VS), ("block", BS)]
)
def test_finds_what_was_planted(kind, pattern):
  p, pair = prompts.planted(kind)
  _, chosen = p.look(look((pattern,) * H, probe=16))
  assert prompts.recall(p, chosen, pair) >= 0.99
  got = prompts.pairs(p, chosen.mask, chosen.columns)
  assert got.mean() < 0.6 * prompts.visible(p).mean(), "it chose nearly all"


def test_columns_are_not_rounded_to_blocks():
  """A column a block: as blocks they would be all of them."""
  p = prompts.text(64)
  p = p._replace(q=1e-3 * p.q)
  k = p.k.copy()
  k[:, :, ::BLOCK] += 40 * np.sign(p.q[:1, -1, ::2].mean(0))[None, :, None]
  many = look((VS,) * H, verticals=16, slashes=1)
  (_, cost, _), chosen = p._replace(k=k).look(many)
  assert int(chosen.columns.sum(-1).min()) == 16
  assert cost.spent < 0.6 * cost.full


def test_values_to_come_are_never_seen():
  p = prompts.text(24)
  bad = p._replace(v=p.v.copy())
  bad.v[:, :, 13:] = np.nan
  run = jax.jit(lambda *a: look()(*a).out)
  one, two = run(*p.arrays()), run(*bad.arrays())
  np.testing.assert_array_equal(one[:, :13], two[:, :13])
  assert np.isnan(two[0, 13:]).any()


def test_a_shape_and_blocks_depend_on_no_later_tile():
  p = prompts.text(24)
  bad = p._replace(q=p.q.copy(), k=p.k.copy())
  bad.q[:, 12:] *= -3
  bad.k[:, :, 12:] += 5
  run = jax.jit(lambda *a: look((A, BS, A, BS))(*a).out)
  one, two = run(*p.arrays()), run(*bad.arrays())
  np.testing.assert_array_equal(one[:, :12], two[:, :12])


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
  (one, a), (two, b) = p.look(look()), bad.look(look())
  np.testing.assert_array_equal(a.mask, b.mask)
  np.testing.assert_array_equal(one.out[there], two.out[there])


def test_one_trace_for_all_budgets_and_a_price_that_falls():
  p = prompts.text(24)
  run = jax.jit(lambda look, *a: look(*a).cost)
  spent = [
    float(run(adjust(look(), level), *p.arrays()).spent)
    for level in (0.0, 0.5, 1.0)
  ]
  assert run._cache_size() == 1 and spent[0] > spent[1] > spent[2]


CONFIG = DecoderConfig(
  vocab=13, layers=2, features=16, hidden=16, heads=H, kv_heads=2
)
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 13, (2, 20)))


def model():
  return host.shaken(DecoderLM(CONFIG, rngs=nnx.Rngs(0)))


def test_coverage_is_the_mass_of_the_chosen_pairs():
  p, some = PROMPTS["text"], look((VS,) * H)
  q, keys, at = p.arrays()
  _, chosen = p.look(some)
  mass, pairs = coverage(q, keys, *chosen, at, **some.blocks, since=3)
  got = prompts.pairs(p, *chosen)
  weights = prompts.attention(p) * (p.at >= 3)[:, None, :, None]
  want = np.where(got, weights, 0).sum((2, 3)) / weights.sum((2, 3))
  np.testing.assert_allclose(mass, want, atol=1e-5)
  assert (pairs > 0).all() and (pairs < 1).all()


def test_heads_are_assigned_by_the_mass_they_keep():
  """As many patterns as NumPy finds best; the model then runs by them."""
  candidates = [look((name,) * H) for name in PATTERNS]
  mass, _ = coverage_of(model(), TOKENS, candidates, H, since=4)
  table = assign(model(), TOKENS, look(), since=4)
  assert np.shape(table) == (CONFIG.layers, H)
  best = np.asarray(mass).argmax(-1)
  assert [[PATTERNS.index(n) for n in row] for row in table] == best.tolist()
  assert len({name for row in table for name in row}) > 1
  with_look(model(), look(table))(TOKENS)
  two = assign(model(), TOKENS, look(), since=4, among=PATTERNS[:2])
  assert [[PATTERNS.index(n) for n in row] for row in two] == (
    np.asarray(mass)[..., :2].argmax(-1).tolist()
  )


def test_a_head_of_slashes_is_assigned_slashes():
  """Planted attention, pattern against pattern at the same budgets."""
  for kind, want in (("slash", VS), ("vertical", VS), ("block", BS)):
    p, _ = prompts.planted(kind)
    q, keys, at = p.arrays()
    kept = []
    for name in PATTERNS:
      one = look((name,) * H, probe=16)
      _, chosen = p.look(one)
      kept.append(coverage(q, keys, *chosen, at, **one.blocks)[0].min())
    assert PATTERNS[int(np.argmax(kept))] == want


def test_a_model_reads_prompts_in_pieces_and_decodes():
  """With the whole budget it is the dense model, padding and all."""
  dense = model()
  sparse = with_look(dense, look(**LARGE))
  lengths = jnp.array([16, 13])

  @jax.jit
  def read(model):
    cache = model.empty_cache(2, 20)
    out = model(TOKENS[:, :8], cache)
    cache = model(TOKENS[:, 8:16], out.cache, lengths=lengths - 8).cache
    return model(TOKENS[:, 16:17], cache).logits

  np.testing.assert_allclose(read(sparse), read(dense), atol=1e-4)


def test_refuses_what_does_not_fit():
  with pytest.raises(ValueError, match="patterns are"):
    look(("slash",) * H)
  with pytest.raises(ValueError, match="of one length"):
    look(((A,), (A, A)))
  with pytest.raises(ValueError, match="at least 1"):
    look(window=0)
  q, keys, at = PROMPTS["text"].arrays()
  with pytest.raises(ValueError, match="1 patterns for 4 heads"):
    look((A,))(q, keys, at)
  per_head = keys._replace(pos=jnp.repeat(keys.pos, 2, axis=1))
  with pytest.raises(ValueError, match="the same keys"):
    look()(q, per_head, at)
