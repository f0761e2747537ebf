# SPDX-License-Identifier: Apache-2.0
"""Law: of a prompt stay its window and what the window looks at.

The oracle (`kv.replay`) votes by dictionaries, row by row and head by head.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from adaptivejax.core.attention import Keys, attend
from adaptivejax.decode import generate
from adaptivejax.methods.kv import SnapKV, snap_kv
from adaptivejax.nn import adjust, with_look
from tests.methods import host, kv


def rule(capacity, window, kernel=1, pooling="mean", extra=64, reduce="mean"):
  """Votes by loops, as `kv.replay` asks."""
  worth, combine = {}, {"mean": np.mean, "max": np.max, "sum": np.sum}[reduce]

  def keep(held, weights, asked):
    if len(asked) == 1 and asked[0]:  # generated: the least makes way
      worth[asked[0]] = np.inf
      room = capacity + extra
      return sorted(held, key=lambda j: (worth[j], j))[-room:]
    last = list(asked)[-window:]
    before = [j for j in held if j < last[0]]
    heads = range(1 + max(r for r, *_ in weights))
    mean = [
      [np.mean([weights[r, i, j] for i in last]) for j in before] for r in heads
    ]
    for n, j in enumerate(before):
      near = range(n - kernel // 2, n + kernel // 2 + 1)
      by_head = [
        [m[i] if 0 <= i < len(before) else 0 for i in near] for m in mean
      ]
      pool = np.max if pooling == "max" else np.mean
      worth[j] = combine([pool(values) for values in by_head])
    worth.update(dict.fromkeys(last, np.inf))
    best = sorted(before, key=worth.get, reverse=True)
    return last + best[: capacity - len(last)]

  return keep


@pytest.mark.parametrize(
  ("capacity", "window", "how"),
  [
    (6, 3, {"kernel": 1}),
    (8, 2, {"kernel": 3}),
    (8, 4, {"kernel": 5, "group_reduce": "sum"}),
    (6, 2, {"kernel": 1, "group_reduce": "max", "extra": 4}),
    (20, 2, {"kernel": 3, "pooling": "max"}),
    (3, 3, {"kernel": 1}),
  ],
)
def test_keeps_what_the_dictionaries_keep(capacity, window, how):
  """Prompts of three lengths in one batch, one of them below the capacity."""
  told = {"reduce" if n == "group_reduce" else n: v for n, v in how.items()}
  look = SnapKV(capacity, window=window, **how)
  kv.check(look, lambda: rule(capacity, window, **told))


def test_the_setting_shrinks_the_capacity():
  look = adjust(SnapKV(8, window=2, kernel=1), 0.5)
  kv.check(look, lambda: rule(4, 2))


def test_what_was_given_up_goes_nowhere():
  q, k, v = kv.text()
  look = SnapKV(6, window=2, kernel=3, extra=3)
  clean = kv.read(look, q, k, v)
  bad = kv.read(look, q, k, v, spoil=kv.poisoned)
  np.testing.assert_array_equal(bad[0], clean[0])
  assert bad[1] == clean[1]


def test_max_pooling_keeps_whole_neighbourhoods():
  """Ties go to the earlier: one look at token 5 keeps 4, 5 and 6."""
  look = SnapKV(4, window=1, kernel=3, pooling="max")
  k = jnp.zeros((1, 1, 12, 2)).at[0, 0, 5, 0].set(30.0)
  q = jnp.ones((1, 12, 1, 2))
  place = jnp.arange(12, dtype=jnp.int32)[None]
  cache = look.empty_cache(1, 1, 1, 99, 2, jnp.float32)
  _, cache = look.step(q, Keys(k, k, place[:, None]), place, cache, 0)
  assert kv.kept(cache, 0) == [[[4, 5, 6, 11]]]


def test_keeps_what_kvpress_keeps():
  golden = np.load(Path(__file__).parents[1] / "goldens" / "kv.npz")
  q, k, want = (jnp.asarray(golden[n]) for n in ("q", "k", "snap/kept"))
  batch, tokens = q.shape[:2]
  window, kernel = int(golden["snap/window"]), int(golden["snap/kernel"])
  look = SnapKV(want.shape[-1], window=window, kernel=kernel)
  place = jnp.broadcast_to(jnp.arange(tokens, dtype=jnp.int32), (batch, tokens))
  keys = Keys(k, k, place[:, None])
  votes = look.votes(q, keys, place)[0][..., :-window]
  scores = golden["snap/scores"][..., :-window]
  np.testing.assert_allclose(votes, scores, rtol=1e-4, atol=1e-6)
  cache = look.empty_cache(1, batch, k.shape[1], tokens, k.shape[3], k.dtype)
  _, cache = look.step(q, keys, place, cache, 0)
  for b, g in np.ndindex(*want.shape[:2]):
    assert kv.kept(cache, 0)[b][g] == want[b, g].tolist()


def test_generates_what_each_row_does_alone():
  small = with_look(host.model(), SnapKV(3, window=2, kernel=1, extra=8))
  lengths = np.array([host.T, 3, 6])[: host.B]
  made = generate(small, host.TOKENS, steps=6, lengths=lengths)
  for b, n in enumerate(lengths):
    alone = generate(small, host.TOKENS[b : b + 1], steps=6, lengths=[int(n)])
    np.testing.assert_array_equal(made.tokens[b], alone.tokens[0])
  full = generate(host.model(), host.TOKENS, steps=6, lengths=lengths).tokens
  np.testing.assert_array_equal(made.tokens[1], full[1])  # all of it fits
  large = with_look(host.model(), SnapKV(host.T, window=2))
  all_of_it = generate(large, host.TOKENS, steps=6, lengths=lengths).tokens
  np.testing.assert_array_equal(all_of_it, full)


def test_long_prompts_are_read_by_blocks(monkeypatch):
  """What is found, kept and voted is that of plain attention; at less cost."""
  rng = np.random.default_rng(5)
  draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
  tokens, look = 300, SnapKV(20, window=4)
  q, k, v = draw(2, tokens, 4, 8), draw(2, 2, tokens, 8), draw(2, 2, tokens, 8)
  at = jnp.arange(tokens) - jnp.array([[0], [99]])  # a row is shorter
  at = jnp.maximum(jnp.where(at < 150, at, at - 20), -1)

  def read():
    cache = look.empty_cache(1, 2, 2, tokens, 8, jnp.float32)
    step = jax.jit(lambda *a: look.step(*a))
    return step(q, Keys(k, v, at[:, None]), at, cache, 0)

  looked, cache = read()
  cost = []
  plain = lambda q, keys, at: (attend(q, keys, at), cost[0])
  cost.append(looked.cost._replace(spent=looked.cost.bound))
  monkeypatch.setattr(snap_kv, "attend_visible", plain)
  want, kept = read()
  np.testing.assert_allclose(looked.out, want.out, atol=2e-5)
  np.testing.assert_array_equal(cache.pos, kept.pos)
  np.testing.assert_allclose(cache.memory, kept.memory, atol=1e-5)
  assert looked.cost.spent < 0.8 * looked.cost.bound
  assert looked.cost.spent <= looked.cost.bound


def test_settings_share_a_trace():
  q, k, v = kv.text()
  step = jax.jit(lambda *args: SnapKV.step(*args))
  for level in (0.0, 0.3, 1.0):
    kv.read(adjust(SnapKV(8, window=2), level), q, k, v, step=step)
  assert step._cache_size() == 2, "one for the prompt, one for a token"


@pytest.mark.parametrize(
  ("how", "words"),
  [
    ({"window": 9}, "window=9 must lie"),
    ({"window": 2, "kernel": 4}, "be odd"),
    ({"window": 2, "extra": -1}, "at least 0"),
  ],
)
def test_refusals_in_words(how, words):
  with pytest.raises(ValueError, match=words):
    SnapKV(8, **how)
