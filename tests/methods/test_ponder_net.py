# SPDX-License-Identifier: Apache-2.0
"""Law: the exit is drawn from p, or is where the running sum of p passes q."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.tree_util import Partial
from scipy import stats

from adaptivejax.methods.depth import ponder_net
from tests.methods.host import (
  ENCODER,
  INPUTS,
  ROWS,
  encoder,
  every_exit,
  leave,
  shaken,
)

K, D = ENCODER.layers, ENCODER.features


@functools.cache
def head():
  return shaken(ponder_net.Lambda(D, 8, rngs=nnx.Rngs(3)), 3)


def lambdas():
  """Of every exit and row, in NumPy."""
  _, pooled = every_exit()
  before = np.concatenate([np.zeros_like(pooled[:1]), pooled[:-1]])
  x = np.concatenate([pooled, before], -1)
  for part in (head().inner, head().middle, head().outer):
    x = x @ np.array(part.kernel.get_value()) + np.array(part.bias.get_value())
    x = np.tanh(x) if part is not head().outer else x
  return 1 / (1 + np.exp(-x[..., 0]))


def distribution():
  lam, left, p = lambdas(), 1.0, []
  for i, now in enumerate(lam):
    p.append(left * (now if i < K - 1 else 1))
    left = left * (1 - now)
  return np.array(p)


def answer(q):
  rule = Partial(ponder_net.q_exit, head=head(), q=jnp.asarray(q, jnp.float32))
  return leave(rule, ponder_net.Pondering.start(ROWS, D))


def test_exit_probabilities():
  _, pooled = every_exit()
  p = ponder_net.exit_probabilities(head(), jnp.asarray(pooled))
  np.testing.assert_allclose(p, distribution(), rtol=1e-4, atol=1e-6)
  np.testing.assert_allclose(p.sum(0), 1, rtol=1e-6)


@pytest.mark.parametrize("q", [0.55, 0.7, 0.85])
def test_q_exit_is_the_quantile(q):
  want = (np.cumsum(distribution(), 0) > q).argmax(0) + 1
  got = answer(q)
  assert len(np.unique(want)) > 1, "the case decides nothing"
  np.testing.assert_array_equal(got.exit, want)
  logits, _ = every_exit()
  taken = logits[want - 1, np.arange(ROWS)]
  np.testing.assert_allclose(got.logits, taken, rtol=1e-4, atol=1e-5)


def test_the_ends_of_q():
  np.testing.assert_array_equal(answer(0.0).exit, 1)
  np.testing.assert_array_equal(answer(1.0).exit, K)


def test_a_uniform_q_draws_the_exit_from_p():
  p, draws = distribution()[:, 0].astype(np.float64), 4000
  rule = lambda q: Partial(ponder_net.q_exit, head=head(), q=q)

  @jax.jit
  def drawn(u):
    rows = jnp.repeat(INPUTS[:1], draws, 0)
    return encoder()(rows, rule(u), ponder_net.Pondering.start(draws, D)).exit

  exits = drawn(jax.random.uniform(jax.random.key(0), (draws,)))
  seen = np.bincount(exits, minlength=K + 1)[1:]
  assert stats.chisquare(seen, draws * p / p.sum()).pvalue > 0.01


def test_the_prior_is_geometric_and_truncated():
  prior = np.array(ponder_net.geometric_prior(0.3, 5))
  want = [0.3, 0.21, 0.147, 0.1029, 0.7**4]
  np.testing.assert_allclose(prior, want, rtol=1e-5)


@pytest.mark.parametrize("direction", ["p||prior", "prior||p"])
def test_the_loss(direction):
  rng = np.random.default_rng(0)
  losses = rng.random((K, ROWS)).astype(np.float32)
  p, prior = distribution(), np.array(ponder_net.geometric_prior(0.2, K))
  pairs = [(row, prior) for row in p.T]
  pairs = pairs if direction == "p||prior" else [(b, a) for a, b in pairs]
  divergence = np.mean([stats.entropy(a, b) for a, b in pairs])
  want = (p * losses).sum(0).mean() + 0.5 * divergence
  given = jnp.asarray(losses), jnp.asarray(p, jnp.float32), jnp.asarray(prior)
  loss = functools.partial(ponder_net.ponder_loss, direction=direction)
  np.testing.assert_allclose(loss(*given, 0.5), want, rtol=1e-4)


def test_certain_exits_have_finite_losses_and_slopes():
  p = jnp.asarray(np.eye(K, ROWS).clip(0, 1), jnp.float32)
  p = p.at[0].set(1 - p[1:].sum(0))
  prior = ponder_net.geometric_prior(0.2, K)
  for direction in ("p||prior", "prior||p"):
    loss = functools.partial(ponder_net.ponder_loss, direction=direction)
    value, slope = jax.value_and_grad(loss, 1)(jnp.ones((K, ROWS)), p, prior)
    assert np.isfinite(value)
    assert np.isfinite(slope).all()


def test_unknown_directions_are_refused():
  one = jnp.ones((K, 1))
  with pytest.raises((ValueError, TypeError), match="direction"):
    ponder_net.ponder_loss(one, one, one[:, 0], direction="both")
