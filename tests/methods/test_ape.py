# SPDX-License-Identifier: Apache-2.0
"""Law: APE reads contexts apart and looks at them together.

The oracle goes through the model token by token, in NumPy.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from adaptivejax.core.attention import Keys
from adaptivejax.core.contexts import Contexts, attend_apart
from adaptivejax.methods.attention import APE, parallel_context
from adaptivejax.methods.kv import H2O
from adaptivejax.nn import with_look
from tests import reference
from tests.methods import host, kv

B, P, N, M, T = 2, 3, 3, 4, 3
DRAW = np.random.default_rng(5)
PREFIX, CONTEXTS, TEXT = (
  jnp.asarray(DRAW.integers(0, 12, (B, *shape)), jnp.int32)
  for shape in ((P,), (N, M), (T,))
)
LENGTHS = np.array([[4, 2, 3], [0, 3, 1]])


def model(count=N, length=M, temperature=1.0, scale=1.0):
  look = APE(count, length, temperature=temperature, scale=scale)
  return with_look(host.model(), look)


def read(model, prefix, contexts, text, lengths=None):
  cache = parallel_context(model, prefix, contexts, 16, lengths=lengths)
  return model(text, cache).logits


said = jax.jit(read)


@jax.jit
def one_by_one(model, prefix, contexts, text, lengths=None):
  """The same, each token of the text alone."""
  cache = parallel_context(model, prefix, contexts, 16, lengths=lengths)
  logits = []
  for token in text.T:
    out = model(token[:, None], cache)
    cache = out.cache
    logits.append(out.logits)
  return jnp.concatenate(logits, 1)


def oracle(b, temperature, scale, lengths):
  """Logits after each token of row b's text."""
  base = host.model()
  weights = [jax.tree.map(np.asarray, m) for m in reference.layers_of(base)]
  real = [np.asarray(CONTEXTS[b, n, : lengths[n]]) for n in range(N)]
  start = P + max(map(len, real))
  token = [*np.asarray(PREFIX[b]), *np.concatenate(real), *np.asarray(TEXT[b])]
  place = [*range(P)]
  part = [-1] * P  # which context a token is of; -1 the prefix, N the text
  for n, some in enumerate(real):
    place += range(P, P + len(some))
    part += [n] * len(some)
  place, part = place + [*range(start, start + T)], part + [N] * T
  x = np.asarray(base.embedding.get_value())[np.array(token, int)]
  turn = lambda a: np.asarray(reference.rotate(a[None], np.array([place])))[0]
  for w in weights:
    att = w.attention
    h = np.asarray(reference.norm(w.norm_attention, x))
    heads = lambda a, wide=att.width: a.reshape(len(a), -1, wide)
    q = turn(heads(h @ att.query.kernel.get_value()))
    k, v = np.split(heads(h @ att.key_value.kernel.get_value()), 2, 1)
    k, mixed = turn(k), np.zeros(q.shape)
    for i, head in np.ndindex(q.shape[:2]):
      g = head * k.shape[1] // q.shape[1]
      near, far = [], []
      for j in range(i + 1):
        if part[i] == N and 0 <= part[j] < N:
          far.append(j)
        elif part[j] in (-1, part[i]):
          near.append(j)
      sums, found = [], []
      for some, t, s in ((near, 1.0, 1.0), (far, temperature, scale)):
        if some:
          odds = np.exp(k[some, g] @ q[i, head] / t / np.sqrt(att.width))
          found.append(odds @ v[some, g] / odds.sum())
          sums.append(odds.sum() ** (s * t))
      mixed[i, head] = np.array(sums) @ np.array(found) / np.sum(sums)
    x = x + mixed.reshape(len(x), -1) @ att.out.kernel.get_value()
    x = x + np.asarray(reference.mlp(w.mlp, reference.norm(w.norm_mlp, x)))
  return np.asarray(reference.readout(base, x[-T:]))


@pytest.mark.parametrize(("temperature", "scale"), [(1, 1), (0.8, 0.7)])
@pytest.mark.parametrize("run", [said, one_by_one])
def test_is_what_the_tokens_say(temperature, scale, run):
  """Contexts of different lengths, one of them empty."""
  got = run(model(N, M, temperature, scale), PREFIX, CONTEXTS, TEXT, LENGTHS)
  for b in range(B):
    want = oracle(b, temperature, scale, LENGTHS[b])
    np.testing.assert_allclose(got[b], want, rtol=1e-4, atol=1e-4)


def test_one_context_is_read_as_in_sequence():
  one = CONTEXTS[:, :1]
  got = said(model(1), PREFIX, one, TEXT)
  whole = jnp.concatenate([PREFIX, one[:, 0], TEXT], 1)
  want = reference.decoder(host.model(), whole)[:, -T:]
  np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)
  sharp = said(model(1, M, 0.5, 1.0), PREFIX, one, TEXT)
  assert np.abs(sharp - want).max() > 1e-3


def test_no_context_is_prefix_and_text():
  got = said(model(), PREFIX, CONTEXTS, TEXT, np.zeros((B, N), int))
  whole = jnp.concatenate([PREFIX, TEXT], 1)
  want = reference.decoder(host.model(), whole)[:, -T:]
  np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


def test_the_order_of_contexts_says_nothing():
  order = np.array([2, 0, 1])
  parallel = model(N, M, 0.9, 0.9)
  want = said(parallel, PREFIX, CONTEXTS, TEXT, LENGTHS)
  got = said(parallel, PREFIX, CONTEXTS[:, order], TEXT, LENGTHS[:, order])
  np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
  other = said(parallel, PREFIX, CONTEXTS, TEXT, LENGTHS[:, order])
  assert np.abs(other - want).max() > 1e-3, "contexts are read"


def test_padding_goes_nowhere():
  """NaN in tokens past the end of a context, and in the keys of none."""
  bad = model(N, M, 0.9, 0.9)
  table = bad.embedding.get_value()
  bad.embedding.set_value(table.at[12].set(jnp.nan))
  past = np.arange(M) >= LENGTHS[..., None]
  spoilt = jnp.where(past, 12, CONTEXTS)
  want = said(bad, PREFIX, CONTEXTS, TEXT, LENGTHS)
  got = said(bad, PREFIX, spoilt, TEXT, LENGTHS)
  assert np.isfinite(want).all()
  np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("tokens", [2, 20])
def test_few_and_many_queries(tokens):
  """Of decoding and of prompts, against all keys in one softmax at T = 1."""
  draw = lambda *shape: jnp.asarray(DRAW.normal(size=shape), jnp.float32)
  q, k, v = draw(B, tokens, kv.H, 8), draw(B, kv.G, 30, 8), draw(B, kv.G, 30, 8)
  pos = jnp.broadcast_to(jnp.arange(20), (B, 1, 20)).at[0, 0, 3].set(-1)
  place = jnp.broadcast_to(jnp.arange(tokens), (B, tokens)).at[1, -1].set(-1)
  far_pos = jnp.where(jnp.arange(10) < 7, 90, -1) * jnp.ones((B, 1, 1), int)
  far = Contexts(k[:, :, 20:], v[:, :, 20:], far_pos)
  near = Keys(k[:, :, :20], v[:, :, :20], pos)
  got = attend_apart(q, far, near, place, 0.5, 0.8)
  for b, t, h in np.ndindex(B, tokens, kv.H):
    g = h * kv.G // kv.H
    if place[b, t] < 0:
      np.testing.assert_array_equal(got[b, t, h], 0)
      continue
    here = [j for j in range(20) if 0 <= pos[b, 0, j] <= place[b, t]]
    score = np.asarray(k[b, g] @ q[b, t, h]) / np.sqrt(8)
    a, c = np.exp(score[here]), np.exp(score[20:27] / 0.5)
    c = c * c.sum() ** (0.5 * 0.8 - 1)
    v_b = np.asarray(v[b, g])
    want = (a @ v_b[here] + c @ v_b[20:27]) / (a.sum() + c.sum())
    np.testing.assert_allclose(got[b, t, h], want, atol=2e-5)


def test_temperatures_share_a_trace():
  run = jax.jit(lambda *args: read(*args))
  for t, s in ((1.0, 1.0), (0.5, 0.9)):
    run(model(N, M, t, s), PREFIX, CONTEXTS, TEXT, LENGTHS)
  assert run._cache_size() == 1


def test_refusals_in_words():
  for bad in ({"contexts": 0}, {"length": 0}):
    with pytest.raises(ValueError, match="at least 1"):
      APE(**{"contexts": 1, "length": 1, **bad})
  for bad in ({"temperature": 0.0}, {"scale": -1.0}, {"scale": float("nan")}):
    with pytest.raises(ValueError, match="above 0"):
      APE(1, 1, **bad)
  with pytest.raises(ValueError, match="with_look"):
    parallel_context(with_look(host.model(), H2O(2, 2)), PREFIX, CONTEXTS, 16)
  with pytest.raises(ValueError, match="contexts.shape"):
    parallel_context(model(), PREFIX, CONTEXTS[:, :2], 16)
  with pytest.raises(ValueError, match="slots=7"):
    parallel_context(model(), PREFIX, CONTEXTS, P + M)
  cache = parallel_context(model(), PREFIX, CONTEXTS, 16)
  tree = jnp.tril(jnp.ones((B, T, T), bool))
  with pytest.raises(ValueError, match="tree"):
    model()(TEXT, cache, tree=tree)
