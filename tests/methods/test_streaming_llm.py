# SPDX-License-Identifier: Apache-2.0
"""Law: each token sees sinks and window, at their places in the cache.

The oracle turns un-rotated keys by the rank of each among those it sees.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from adaptivejax.core.attention import Keys
from adaptivejax.core.eviction import compacted_positions
from adaptivejax.decode import generate, score
from adaptivejax.methods.kv import StreamingLLM
from adaptivejax.nn import adjust, with_look
from tests import reference
from tests.methods import host, kv


def turned(x, position):
  """x [W] as complex numbers."""
  half = len(x) // 2
  z = x[:half] + 1j * x[half:]
  z = z * np.exp(1j * position * 10_000.0 ** (-np.arange(half) / half))
  return np.concatenate([z.real, z.imag])


def oracle(q, k, v, sinks, window):
  """Query by query, head by head; ranks are those in its own cache."""
  out = np.zeros(q.shape)
  share = q.shape[2] // k.shape[2]
  for b, t, h in np.ndindex(*q.shape[:3]):
    seen = [j for j in range(t + 1) if j < sinks or j > t - window]
    keys = [turned(k[b, j, h // share], n) for n, j in enumerate(seen)]
    query = turned(q[b, t, h], len(seen) - 1)
    odds = kv.softmax(np.array(keys) @ query / np.sqrt(q.shape[-1]))
    out[b, t, h] = odds @ v[b, seen, h // share]
  return out


@pytest.mark.parametrize("chunk", [256, 5, 2])
@pytest.mark.parametrize(("sinks", "window"), [(2, 5), (4, 1), (0, 6), (30, 9)])
def test_a_token_sees_sinks_and_window(sinks, window, chunk):
  """Prompt, in chunks or whole, and decoding alike; rows of other lengths."""
  q, k, v = kv.text()
  look = StreamingLLM(sinks, window, chunk=chunk)
  out, held = kv.read(look, q, k, v)
  want = oracle(q, k, v, sinks, window)
  np.testing.assert_allclose(out, want, atol=2e-5)
  for i, step in enumerate(held):
    for b, (row,) in enumerate(step):
      last = min(kv.LENGTHS[b] + i, kv.T) - 1
      seen = [j for j in range(last + 1) if j < sinks or j > last - window]
      assert row == seen


def test_without_a_cache_it_is_the_same():
  q, k, v = kv.text()
  keys = Keys(
    *(jnp.moveaxis(jnp.asarray(a), 2, 1) for a in (k, v)), AT[:, None]
  )
  for sinks, window in ((2, 5), (0, 3)):
    got = StreamingLLM(sinks, window)(jnp.asarray(q), keys, AT).out
    want = oracle(q, k, v, sinks, window)
    np.testing.assert_allclose(got, want, atol=2e-5)


AT = jnp.broadcast_to(jnp.arange(kv.T, dtype=jnp.int32), (kv.B, kv.T))


def test_the_rank_is_that_among_those_kept():
  """What the look computes from positions is what counting gives."""
  look = StreamingLLM(2, 5)
  k = jnp.broadcast_to(jnp.eye(8)[0], (1, 1, 7, 8))
  pos = jnp.array([[[0, 1, 12, 8, 9, 10, 11]]])
  _, keys = look.placed(
    jnp.ones((1, 1, 1, 8)), Keys(k, k, pos), jnp.array([[12]])
  )
  rank = compacted_positions(pos)[0, 0]
  want = [turned(np.eye(8)[0], float(n)) for n in rank]
  np.testing.assert_allclose(keys.k[0, 0], want, atol=1e-6)


def test_far_in_a_text_it_counts_as_exactly_as_near():
  """Positions do not grow: four million tokens on, nothing is rounded."""
  q, k, v = (jnp.asarray(a[:1, :8]) for a in kv.text())
  head_major = lambda a: jnp.moveaxis(a, 2, 1)
  look = StreamingLLM(0, 8)

  def read(start):
    at = start + jnp.arange(8, dtype=jnp.int32)[None]
    keys = Keys(head_major(k), head_major(v), at[:, None])
    one = look(q[:, -1:], keys, at[:, -1:]).out
    return one, look(q, keys, at).out

  for near, far in zip(read(8), read(4_000_000)):
    np.testing.assert_allclose(near, far, atol=1e-6)


def test_the_setting_shrinks_the_window():
  q, k, v = kv.text()
  look = adjust(StreamingLLM(2, 8), 0.5)
  out, _ = kv.read(look, q, k, v)
  np.testing.assert_allclose(out, oracle(q, k, v, 2, 4), atol=2e-5)


def test_empty_slots_and_what_is_out_of_the_window_go_nowhere():
  q, k, v = kv.text()
  look = adjust(StreamingLLM(1, 8), 0.5)

  def spoil(cache):
    now = cache.length[:, None, None, None]
    out = (cache.pos >= 1) & (cache.pos < now - 4)  # nor is it seen again
    return kv.poisoned(cache._replace(pos=jnp.where(out, -1, cache.pos)))

  clean, _ = kv.read(look, q, k, v)
  bad, _ = kv.read(look, q, k, v, spoil=spoil)
  np.testing.assert_allclose(bad, clean, atol=1e-6)


def model(sinks, window):
  return with_look(host.model(), StreamingLLM(sinks, window))


def test_with_room_for_all_it_is_the_model():
  want = host.model()(host.TOKENS).logits
  got = model(4, 20)(host.TOKENS).logits
  np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("prompt", [1, 2, 7])
def test_it_does_not_matter_how_a_text_is_cut(prompt):
  """A forward pass, a prompt and tokens: the same losses."""
  small = model(1, 3)
  logits = jax.nn.log_softmax(small(host.TOKENS[:, :-1]).logits)
  nats = -jnp.take_along_axis(logits, host.TOKENS[:, 1:, None], -1)[..., 0]
  out = score(small, host.TOKENS, prompt=prompt)
  np.testing.assert_allclose(
    out.nats, nats[:, prompt - 1 :], rtol=1e-4, atol=1e-4
  )


def test_generates_what_each_row_does_alone():
  """For longer than the cache; sampled, too."""
  small, lengths = model(1, 3), np.array([host.T, 1, 6])[: host.B]
  heat = {
    "temperature": 1.0,
    "key": jax.random.split(jax.random.key(0), host.B),
  }
  made = generate(small, host.TOKENS, steps=9, lengths=lengths, **heat)
  for b, n in enumerate(lengths):
    heat["key"] = jax.random.split(jax.random.key(0), host.B)[b : b + 1]
    row = host.TOKENS[b : b + 1]
    alone = generate(small, row, steps=9, lengths=[int(n)], **heat)
    np.testing.assert_array_equal(made.tokens[b], alone.tokens[0])


def test_a_window_of_one_leaves_every_token_to_itself():
  alone = reference.decoder(host.model(), host.TOKENS.reshape(-1, 1))
  got = model(0, 1)(host.TOKENS).logits.reshape(alone.shape)
  np.testing.assert_allclose(got, alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("sinks", "window"), [(-1, 4), (2, 0)])
def test_refusals_in_words(sinks, window):
  with pytest.raises(ValueError, match="at least 1"):
    StreamingLLM(sinks, window)
