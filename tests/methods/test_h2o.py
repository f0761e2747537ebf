# SPDX-License-Identifier: Apache-2.0
"""Law: H2O keeps the recent, and what got the most attention so far.

The oracle (`kv.replay`) is a dictionary of sums per row and head.
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from adaptivejax.core.attention import Keys
from adaptivejax.decode import generate, score
from adaptivejax.methods.decode import SelfSpeculation
from adaptivejax.methods.kv import H2O
from adaptivejax.nn import adjust, with_look
from tests import reference
from tests.methods import host, kv


def rule(heavy, recent, reduce="mean", normalise=False):
  """Heavy hitters by dictionaries, as `kv.replay` asks."""
  total, combine = {}, {"mean": np.mean, "max": np.max, "sum": np.sum}[reduce]

  def keep(held, weights, asked):
    heads = range(1 + max(r for r, *_ in weights)) if weights else ()
    for j in held:
      given = [sum(weights.get((r, i, j), 0) for i in asked) for r in heads]
      total[j] = total.get(j, 0) + (combine(given) if given else 0)
    now = max(held)
    last = [j for j in held if j > now - recent]
    worth = lambda j: total[j] / (now - j + 1 if normalise else 1)
    others = sorted(set(held) - set(last), key=worth, reverse=True)
    return last + others[: heavy + recent - len(last)]

  return keep


@pytest.mark.parametrize(
  ("heavy", "recent", "how"),
  [
    (4, 3, {}),
    (4, 3, {"group_reduce": "max"}),
    (4, 3, {"group_reduce": "sum", "normalise": True}),
    (5, 0, {"normalise": True}),
    (0, 4, {}),
    (1, 1, {}),
    (20, 10, {}),
  ],
)
def test_keeps_what_the_dictionaries_keep(heavy, recent, how):
  """After every step, in rows of different prompts and one batch."""
  reduce = how.get("group_reduce", "mean")
  normalise = how.get("normalise", False)
  look = H2O(heavy, recent, **how)
  kv.check(look, lambda: rule(heavy, recent, reduce, normalise))


def test_the_setting_shrinks_both():
  look = adjust(H2O(4, 4), 0.5)
  kv.check(look, lambda: rule(2, 2))
  kv.check(adjust(look, 1.0), lambda: rule(0, 1))


def test_settings_share_a_trace():
  q, k, v = kv.text()
  step = jax.jit(lambda *args: H2O.step(*args))
  for level in (0.0, 0.3, 1.0):
    kv.read(adjust(H2O(4, 3), level), q, k, v, step=step)
  assert step._cache_size() == 2, "one for the prompt, one for a token"


def test_what_was_given_up_goes_nowhere():
  q, k, v = kv.text()
  clean = kv.read(H2O(4, 3), q, k, v)
  bad = kv.read(H2O(4, 3), q, k, v, spoil=kv.poisoned)
  np.testing.assert_array_equal(bad[0], clean[0])
  assert bad[1] == clean[1]


def test_one_token_is_a_prompt_of_one():
  """Overwriting a slot is gathering what stays."""
  q, k, v = kv.text()

  def gathered(look, q, keys, positions, cache, layer):
    twice = lambda a, axis: jnp.concatenate([a, a], axis)
    gone = jnp.full_like(positions, -1)
    more = Keys(
      twice(keys.k, 2),
      twice(keys.v, 2),
      jnp.concatenate([keys.pos, gone[:, None]], 2),
    )
    place = jnp.concatenate([positions, gone], 1)
    looked, cache = look.step(twice(q, 1), more, place, cache, layer)
    return looked._replace(out=looked.out[:, : q.shape[1]]), cache

  got = kv.read(H2O(4, 3), q, k, v, step=jax.jit(gathered))
  want = kv.read(H2O(4, 3), q, k, v)
  np.testing.assert_allclose(got[0], want[0], atol=1e-5)
  assert got[1] == want[1]


def test_keeps_what_kvpress_keeps():
  golden = np.load(Path(__file__).parents[1] / "goldens" / "kv.npz")
  q, k, want = (jnp.asarray(golden[n]) for n in ("q", "k", "observed/kept"))
  batch, tokens = q.shape[:2]
  look = H2O(want.shape[-1], 0, normalise=True)
  place = jnp.broadcast_to(jnp.arange(tokens, dtype=jnp.int32), (batch, tokens))
  keys = Keys(k, k, place[:, None])
  worth = look.worth(q, keys, place, jnp.zeros(k.shape[:3]))
  scores = golden["observed/scores"]
  np.testing.assert_allclose(worth.priority, scores, rtol=1e-4, atol=1e-6)
  cache = look.empty_cache(1, batch, k.shape[1], tokens, k.shape[3], k.dtype)
  _, cache = look.step(q, keys, place, cache, 0)
  for b, g in np.ndindex(*want.shape[:2]):
    assert kv.kept(cache, 0)[b][g] == want[b, g].tolist()


def model(heavy, recent):
  return with_look(host.model(), H2O(heavy, recent))


def test_with_room_for_all_it_is_the_model():
  lengths, how = np.array([3, 5, 4]), {"steps": 6}
  prompts = host.TOKENS[:, : host.PROMPT]
  want = generate(host.model(), prompts, lengths=lengths, **how)
  got = generate(model(8, 8), prompts, lengths=lengths, **how)
  np.testing.assert_array_equal(got.tokens, want.tokens)


def test_a_prompt_longer_than_the_cache_is_read_whole():
  """The first token is the dense model's; a row is what it is alone."""
  small, prompts = model(2, 2), host.TOKENS
  made = generate(small, prompts, steps=5)
  want = reference.next_logits(host.model(), prompts).argmax(-1)
  np.testing.assert_array_equal(made.tokens[:, 0], want)
  full = generate(host.model(), prompts, steps=5).tokens
  lengths = np.array([host.T, 3, 6])[: host.B]
  ragged = generate(small, prompts, steps=5, lengths=lengths, rungs=(host.B, 1))
  for b, n in enumerate(lengths):
    alone = generate(small, prompts[b : b + 1], steps=5, lengths=[int(n)])
    np.testing.assert_array_equal(ragged.tokens[b], alone.tokens[0])
  assert (np.asarray(ragged.tokens) != np.asarray(full)).any(), "no eviction"


def test_no_row_ends_for_want_of_room():
  small = model(2, 1)
  cache = small.empty_cache(2, 100)
  assert cache.slots == 4 and not cache.full(50).any()
  out = score(small, host.TOKENS, prompt=2)
  assert np.isfinite(out.nats).all()


def test_refusals_in_words():
  with pytest.raises(ValueError, match="negative"):
    H2O(-1, 3)
  with pytest.raises(ValueError, match="at least 1 key"):
    H2O(0, 0)
  with pytest.raises(ValueError, match=r"drafts.*H2O"):
    generate(model(2, 2), host.TOKENS, steps=3, policy=SelfSpeculation(1, 2))


def test_attention_without_a_cache_is_dense():
  """A training-free method: nothing to give up where nothing is held."""
  got = model(1, 1)(host.TOKENS).logits
  np.testing.assert_allclose(
    got, host.model()(host.TOKENS).logits, rtol=1e-5, atol=1e-5
  )
  assert nnx.state(model(1, 1), nnx.Param), "still a model"
