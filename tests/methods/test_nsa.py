# SPDX-License-Identifier: Apache-2.0
"""Law: summaries, chosen blocks and a window, gated; query by query, NumPy."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.tree_util import Partial

from adaptivejax.core.cache import crop
from adaptivejax.methods.attention import NSA
from adaptivejax.methods.depth import calm
from adaptivejax.models import decoder_block
from adaptivejax.nn import MARGIN, adjust
from adaptivejax.nn.stack import layer_at
from tests.methods import blocks, host
from tests.methods.blocks import AT, B, G, H, T, W

D = H * W
SIZES = {"size": 4, "stride": 2, "block": 4, "blocks": 4, "window": 5}
X = np.random.default_rng(9).normal(size=(B, T, D)).astype(np.float32)


@functools.cache
def look_of(**sizes):
  look = NSA(D, H, hidden=7, rngs=nnx.Rngs(0), **{**SIZES, **sizes})
  return host.shaken(look)


def gated(look, *view):
  """With gates that let one view through, whatever x is."""
  look = jax.tree.map(lambda a: a, look)
  look.gate.kernel.set_value(jnp.zeros((D, 3 * H)))
  bias = np.full((H, 3), -1e3, np.float32)
  bias[:, view] = 1e3
  look.gate.bias.set_value(jnp.asarray(bias.reshape(-1)))
  return look


def gelu(a):
  """The tanh form."""
  return a / 2 * (1 + np.tanh(math.sqrt(2 / np.pi) * (a + 0.044715 * a**3)))


def summary(part, window):
  """[C, W] -> [W]."""
  a = (window + np.asarray(part.place.get_value())).reshape(-1)
  kernel = lambda linear: np.asarray(linear.kernel.get_value())
  return gelu(a @ kernel(part.up)) @ kernel(part.down)


def chosen_by(look, weights, t, many):
  """Blocks of a query by eq. 9, written out; weights [R, N]."""
  own, d = t // look.block, look.stride
  worth = dict.fromkeys(range(own + 1), 0.0)
  for j in worth:
    for m in range(look.block // d):
      for n in range(look.size // d):
        i = j * look.block // d + m - n
        worth[j] += sum(w[i] for w in weights if 0 <= i < len(w))
  forced = {0, own - 1, own} & set(worth)
  rest = sorted(set(worth) - forced, key=lambda j: (-worth[j], j))
  return {*forced, *rest[: many - len(forced)]}


def oracle(look, q, k, v, x=X, many=None, chosen=None):
  """All three views; `chosen` collects pairs bool[B, H, T, T]."""
  many, out = many or look.blocks, np.zeros(q.shape)
  gate = x @ np.asarray(look.gate.kernel.get_value())
  gate = gate + np.asarray(look.gate.bias.get_value())
  gate = 1 / (1 + np.exp(-np.clip(gate.reshape(B, T, H, 3), -80, 80)))
  share = H // G
  for b, g in np.ndindex(B, G):
    windows = range(0, T - look.size + 1, look.stride)
    cut = lambda a: [a[b, i : i + look.size, g] for i in windows]  # noqa: B023
    ck = np.array([summary(look.key, a) for a in cut(k)]).reshape(-1, W)
    cv = np.array([summary(look.value, a) for a in cut(v)]).reshape(-1, W)
    for t in range(T):
      there = [n for n, i in enumerate(windows) if i + look.size - 1 <= t]
      heads = range(g * share, (g + 1) * share)
      weights = [
        blocks.softmax(ck[there] @ q[b, t, h] / np.sqrt(W)) if there else []
        for h in heads
      ]
      picked = chosen_by(look, weights, t, many)
      seen = [j for j in range(t + 1) if j // look.block in picked]
      near = range(max(0, t - look.window + 1), t + 1)
      for h in heads:
        if chosen is not None:
          chosen[b, h, t, seen] = True
        views = (
          blocks.mixed(q[b, t, h], ck, cv, there),
          blocks.mixed(q[b, t, h], k[b, :, g], v[b, :, g], seen),
          blocks.mixed(q[b, t, h], k[b, :, g], v[b, :, g], near),
        )
        out[b, t, h] = gate[b, t, h] @ np.array(views)
  return out


def found(look, q, k, v, x=X):
  keys = blocks.keys_of(k, v)
  return blocks.looked(look, jnp.asarray(q), keys, AT, jnp.asarray(x)).out


@pytest.mark.parametrize(
  "sizes",
  [
    {},
    {"size": 6, "stride": 2, "block": 8, "blocks": 3, "window": 9},
    {"size": 8, "stride": 4, "block": 4, "blocks": 5},
    {"size": 32, "stride": 16, "block": 16, "window": 64},
  ],
)
def test_finds_what_loops_find(sizes):
  """Blocks cut off, windows over several blocks, no complete summary at all."""
  q, k, v = blocks.drawn()
  look = look_of(**sizes)
  got = found(look, q, k, v)
  np.testing.assert_allclose(got, oracle(look, q, k, v), atol=3e-5)


def test_no_summary_gives_nothing_not_nan():
  q, k, v = blocks.drawn()
  got = found(gated(look_of(), 0), q, k, v)
  np.testing.assert_array_equal(got[:, : SIZES["size"] - 1], 0)
  assert (np.abs(np.asarray(got[:, SIZES["size"] - 1 :])).max((2, 3)) > 0).all()


def test_one_gate_and_its_whole_budget_is_dense():
  q, k, v = blocks.drawn()
  want = blocks.dense(q, k, v)
  got = found(gated(look_of(blocks=6), 1), q, k, v)
  np.testing.assert_allclose(got, want, atol=2e-5)
  got = found(gated(look_of(window=T), 2), q, k, v)
  np.testing.assert_allclose(got, want, atol=2e-5)


def test_the_setting_leaves_blocks_out_but_three():
  q, k, v = blocks.drawn()
  look = look_of(blocks=6)
  for level, many in ((0.0, 6), (1 / 3, 4), (1.0, 3)):
    got = found(adjust(look, level), q, k, v)
    want = oracle(look, q, k, v, many=many)
    np.testing.assert_allclose(got, want, atol=3e-5)


def test_all_queries_may_choose_one_block():
  """The one whose summaries they like, of all tiles."""
  q, k, v = blocks.drawn()
  look = look_of(window=1)
  hot = np.zeros((B, H, T, T), bool)
  q[:] = 5 * summary(look.key, k[0, 4:8, 0])
  k[:, 4:8] = k[0, 4:8, 0][:, None]
  want = oracle(look, q, k, v, chosen=hot)
  assert hot[:, :, 16:, 4:8].all()
  np.testing.assert_allclose(found(look, q, k, v), want, atol=3e-5)


def test_nothing_of_what_is_to_come_is_seen():
  """Bitwise: neither in summaries nor in the choice."""
  q, k, v = blocks.drawn()
  before = found(look_of(), q, k, v)
  for t in (1, 6, 7, 19):
    q, k, v = blocks.drawn()
    x = X.copy()
    for a in (q, k, v, x):
      a[:, t + 1 :] = 100 * a[:, t + 1 :] + 7
    got = found(look_of(), q, k, v, x)
    np.testing.assert_array_equal(got[:, : t + 1], before[:, : t + 1])


def test_gradients_are_those_of_masks():
  """Of queries, keys, values, x and all weights; the choice gives none."""
  q, k, v = blocks.drawn(scale=1.0)
  look, picked = look_of(), np.zeros((B, H, T, T), bool)
  oracle(look, q, k, v, chosen=picked)
  tri = np.tri(T, dtype=bool)
  near = tri & ~np.tri(T, k=-look.window, dtype=bool)
  starts = np.arange(0, T - look.size + 1, look.stride)
  done = starts + look.size - 1 <= np.arange(T)[:, None]

  def masks(look, q, k, v, x):
    cut = lambda a: jnp.stack([a[:, i : i + look.size] for i in starts], 1)
    cut_heads = lambda part, a: part(jnp.moveaxis(cut(a), 3, 2))
    ck, cv = cut_heads(look.key, k), cut_heads(look.value, v)
    gate = jax.nn.sigmoid(look.gate(x)).reshape(B, T, H, 3)
    views = (
      blocks.masked(q, ck, cv, jnp.asarray(done)),
      blocks.masked(q, k, v, jnp.asarray(picked & tri)),
      blocks.masked(q, k, v, jnp.asarray(near)),
    )
    return sum(gate[..., i, None] * view for i, view in enumerate(views))

  def ours(look, q, k, v, x):
    return look(q, blocks.keys_of(k, v), AT, x=x).out

  given = look, *map(jnp.asarray, (q, k, v, X))
  got, want = (
    jax.jit(jax.grad(lambda *a, f=f: jnp.sin(f(*a)).sum(), range(5)))(*given)
    for f in (ours, masks)
  )
  level = lambda tree: tree[0].level.set_value(jnp.zeros(()))
  level(got), level(want)
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    np.testing.assert_allclose(a, b, atol=2e-4)


@pytest.mark.parametrize("cuts", [(1,) * T, (10, 1, 1, 5, *(1,) * 6)])
def test_it_does_not_matter_how_a_text_is_cut(cuts):
  q, k, v = blocks.drawn()
  look = look_of()
  got, _ = blocks.stepwise(look, q, k, v, cuts, jnp.asarray(X))
  np.testing.assert_allclose(got, oracle(look, q, k, v), atol=3e-5)


def test_rejected_drafts_leave_no_trace_in_the_summaries():
  q, k, v = blocks.drawn()
  look, x = look_of(), jnp.asarray(X)
  _, cache = blocks.stepwise(look, q, k, v, (6,), x)
  part = slice(6, 12)
  wrong = blocks.keys_of(50 + k[:, part], v[:, part], AT[:, part])
  asked = jnp.asarray(q[:, part]), wrong, AT[:, part]
  _, drafted = blocks.step(look, *asked, cache, x[:, part])
  cache, out = crop(drafted, cache.length), []
  for t in range(6, T):
    part = slice(t, t + 1)
    keys = blocks.keys_of(k[:, part], v[:, part], AT[:, part])
    asked = jnp.asarray(q[:, part]), keys, AT[:, part]
    looked, cache = blocks.step(look, *asked, cache, x[:, part])
    cache = cache.advance(1)
    out.append(looked.out)
  want = oracle(look, q, k, v)[:, 6:]
  np.testing.assert_allclose(jnp.concatenate(out, 1), want, atol=3e-5)


def test_what_is_not_there_goes_nowhere():
  """A dead token, NaN or not, in keys, queries and x."""
  q, k, v = blocks.drawn()
  x, dead = X.copy(), jnp.where(AT == 5, -1, AT)
  keep, outs = [t for t in range(T) if t != 5], []
  for filler in (np.nan, 3.0):
    for a in (q, k, v, x):
      a[:, 5] = filler
    keys = blocks.keys_of(k, v, dead)
    got = blocks.looked(look_of(), jnp.asarray(q), keys, dead, jnp.asarray(x))
    outs.append(np.asarray(got.out)[:, keep])
  assert np.isfinite(outs[0]).all()
  np.testing.assert_array_equal(outs[0], outs[1])


def test_a_model_reads_on_as_it_reads_at_once():
  """With gates, MLPs and a memory for each layer."""
  model = host.model(_layer)
  want = model(host.TOKENS).logits[:, host.PROMPT :]
  got = host.decode(model, host.TOKENS)[0]
  np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


def test_layers_that_are_skipped_summarise_the_keys_they_are_given():
  """After early exits, with the weights of each layer."""
  model = host.model(_layer)
  leave = Partial(calm, threshold=0.0, measure=MARGIN)
  _, depth, _, cache = host.decode(model, host.TOKENS, leave)
  assert (depth < host.CONFIG.layers).all()
  count, first = host.T, jnp.zeros(host.B, jnp.int32)
  for l in range(host.CONFIG.layers):
    look = layer_at(model.layers, l).attention.look
    want = look._summaries(cache.read(l), first, count)
    for a, b in zip(cache.recollect(l), want, strict=True):
      np.testing.assert_allclose(a, b, atol=1e-5)


def _layer(rngs):
  c, small = host.CONFIG, {"size": 2, "stride": 1, "block": 2, "window": 2}
  look = NSA(c.features, c.heads, blocks=3, rngs=rngs, **small)
  return decoder_block(c, rngs, look=look)


@pytest.mark.parametrize(
  ("sizes", "words"),
  [
    ({"stride": 3}, "must divide"),
    ({"stride": 0}, "must divide"),
    ({"block": 5}, "must divide"),
    ({"blocks": 2}, "at least 3"),
    ({"window": 0}, "at least 1"),
  ],
)
def test_refuses_sizes_that_do_not_fit(sizes, words):
  with pytest.raises(ValueError, match=words):
    NSA(D, H, rngs=nnx.Rngs(0), **{**SIZES, **sizes})


def test_refuses_heads_that_do_not_fit_and_a_missing_x():
  with pytest.raises(ValueError, match="must divide"):
    NSA(D, 5, rngs=nnx.Rngs(0))
  q, k, v = blocks.drawn()
  with pytest.raises(ValueError, match="gates"):
    look_of()(jnp.asarray(q), blocks.keys_of(k, v), AT)
