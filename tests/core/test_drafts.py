# SPDX-License-Identifier: Apache-2.0
"""Law: text that keeps parts of a draft has the odds of the target's own."""

import functools

import chex
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from adaptivejax.core.drafts import draft_verify
from adaptivejax.core.sampling import ACCEPT, DRAFT, TOKEN, Draw, Sampling
from tests.core import chain
from tests.core.chain import V

P, Q = jnp.asarray(chain.log(chain.P)), jnp.asarray(chain.log(chain.Q))
ROWS = 20_000
verify = jax.jit(draft_verify)
uniform = jax.jit(Draw.uniform, static_argnums=2)
token = jax.jit(Draw.token)
categorical = jax.jit(Draw.categorical, static_argnums=3)


def draws(rows, temperature=1.0, seed=0):
  keys = jax.random.split(jax.random.key(seed), rows)
  return Draw(Sampling.of(temperature), keys)


@functools.partial(jax.jit, static_argnums=4)
def drafted(draw, q, last, at, d):
  """`d` tokens of the chain `q` after `last`, and their distributions."""
  tokens, logs = [], []
  for i in range(d):
    logs.append(q[last])
    last = draw.categorical(q[last], at + i, DRAFT)
    tokens.append(last)
  empty = jnp.zeros((len(at), 0), jnp.int32), jnp.zeros((len(at), 0, V))
  return (jnp.stack(tokens, 1), jnp.stack(logs, 1)) if d else empty


def speculate(draw, d, q=Q, live=None):
  def step(last, at):
    draft, log = drafted(draw, q, last, at, d)
    before = jnp.concatenate([last[:, None], draft], 1)
    return verify(draft, log, P[before], draw, at, live)

  return step


GREEDY = draws(8, 0.0)


def one_hot(shift):
  """A chain that always adds `shift` to the token."""
  return jnp.asarray(chain.log(np.roll(np.eye(V), shift, 1).astype(np.float32)))


DRAFTS = {
  "one token": (Q, 1),
  "three": (Q, 3),
  "given": (one_hot(1), 2),
  "of the target": (P, 2),
}


@pytest.mark.parametrize("q, d", DRAFTS.values(), ids=DRAFTS)
def test_text_has_the_odds_of_the_target(q, d):
  chain.agree(chain.write(speculate(draws(ROWS), d, q), ROWS, 3))


def test_text_of_drafts_of_many_lengths_has_the_odds_of_the_target():
  length = np.arange(ROWS) % 3
  live = jnp.asarray(np.arange(2) < length[:, None])
  chain.agree(chain.write(speculate(draws(ROWS), 2, live=live), ROWS, 3))


def test_share_kept_is_the_overlap():
  """Leviathan et al., theorem 3.5: sum_x min(p(x), q(x))."""
  zero = jnp.zeros(ROWS, jnp.int32)
  out = speculate(draws(ROWS), 1)(zero, zero)
  want = np.minimum(chain.P[0], chain.Q[0]).sum()
  assert abs((out.count == 2).mean() - want) < 4 * 0.5 / np.sqrt(ROWS)


def test_rows_one_by_one():
  """The published algorithm in f64 with the same random numbers."""
  n, d = 300, 3
  draw, at = draws(n, seed=1), jnp.arange(n) % 7
  last = jnp.arange(n) % V
  draft, log = drafted(draw, Q, last, at, d)
  before = np.concatenate([last[:, None], draft], 1)
  out = verify(draft, log, P[before], draw, at)
  coins = np.stack([uniform(draw, at + i, ACCEPT) for i in range(d)], 1)
  p, q = np.float64(chain.P)[before], np.float64(chain.Q)[before]
  rest, kept = np.zeros((n, V)), np.zeros(n, np.int32)
  for b in range(n):
    rest[b] = p[b, d]
    kept[b] = d
    for i in range(d):
      x = draft[b, i]
      if coins[b, i] >= p[b, i, x] / q[b, i, x]:
        rest[b], kept[b] = np.maximum(p[b, i] - q[b, i], 0), i
        break
  log = jnp.asarray(chain.log(rest), jnp.float32)
  more = categorical(draw, log, at + kept, TOKEN)
  want = np.pad(draft, ((0, 0), (0, 1))) * (np.arange(d + 1) < kept[:, None])
  want[np.arange(n), kept] = more
  np.testing.assert_array_equal(out.count, kept + 1)
  np.testing.assert_array_equal(out.tokens, want)
  assert set(np.unique(kept)) == set(range(d + 1))


@hypothesis.given(seed=st.integers(0, 2**32 - 1))
def test_greedy_is_exact_matching(seed):
  rng, rows, d = np.random.default_rng(seed), 8, 3
  best = rng.integers(0, 3, (rows, d + 1))
  draft = rng.integers(0, 3, (rows, d))
  live = np.arange(d) < rng.integers(0, d + 1, rows)[:, None]
  log = lambda tokens: chain.log(np.eye(3, dtype=np.float32)[tokens])
  at = np.zeros(rows, np.int32)
  out = verify(np.int32(draft), log(draft), log(best), GREEDY, at, live)
  tokens, count = map(np.asarray, out)
  for b in range(rows):
    n = 0
    while n < d and live[b, n] and draft[b, n] == best[b, n]:
      n += 1
    want = [*best[b, : n + 1], *[0] * (d - n)]
    assert count[b] == n + 1
    np.testing.assert_array_equal(tokens[b], want)


def test_a_draft_of_the_target_itself_is_kept():
  zero = jnp.zeros(ROWS, jnp.int32)
  out = speculate(draws(ROWS), 3, P)(zero, zero)
  np.testing.assert_array_equal(out.count, 4)


def test_nothing_left_to_draw_from_draws_from_the_target():
  """q >= p everywhere: the shape of a rounding error, made large."""
  n = 1000
  draw, zero = draws(n), jnp.zeros(n, jnp.int32)
  rows = lambda log: jnp.broadcast_to(log, (n, 1, V))
  target = jnp.concatenate([rows(P[2]), rows(P[0])], 1)
  draft = jnp.full((n, 1), 3, jnp.int32)
  out = verify(draft, rows(P[2] + np.log(4)), target, draw, zero)
  refused = out.tokens[out.count == 1, 0]
  assert set(np.unique(refused)) == {2, 3} and len(refused) > n / 2


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_an_empty_draft_is_plain_decoding(temperature):
  draw, at = draws(64, temperature), jnp.arange(64) % 5
  last = jnp.arange(64) % V
  want = token(draw, P[last], at)
  target = P[last][:, None]
  draft, log = drafted(draw, Q, last, at, 0)
  out = verify(draft, log, target, draw, at)
  np.testing.assert_array_equal(out.tokens[:, 0], want)
  np.testing.assert_array_equal(out.count, 1)
  # nor do drafts that do not exist leak: not even NaN and wild tokens
  draft, log = jnp.full((64, 2), 99, jnp.int32), jnp.full((64, 2, V), jnp.nan)
  target = jnp.concatenate([target, jnp.full((64, 2, V), jnp.nan)], 1)
  out = verify(draft, log, target, draw, at, jnp.zeros((64, 2), bool))
  np.testing.assert_array_equal(out.tokens[:, 0], want)
  np.testing.assert_array_equal(out.count, 1)


def test_a_row_is_verified_the_same_alone():
  draw, at = draws(6), jnp.asarray([0, 3, 1, 7, 3, 2])
  last = jnp.arange(6) % V
  draft, log = drafted(draw, Q, last, at, 2)
  target = P[jnp.concatenate([last[:, None], draft], 1)]
  out = verify(draft, log, target, draw, at)
  for b in range(6):
    one = draw._replace(keys=draw.keys[b, None])
    row = [a[b, None] for a in (draft, log, target)]
    alone = verify(*row, one, at[b, None])
    chex.assert_trees_all_equal(list(alone), [a[b, None] for a in out])
