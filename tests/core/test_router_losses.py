# SPDX-License-Identifier: Apache-2.0
"""Law: losses of routers are their definitions, over live items alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special

from adaptivejax.core.router_losses import (
  activation_locality,
  chunk_sparsification,
  excess_load,
  expert_use,
  load_balance,
  router_divergence,
  router_entropy,
  router_z,
  sequence_load_balance,
)

ROUTER = np.random.default_rng(2).normal(size=(3, 4, 5)) * 2
CHOICES = np.argsort(-ROUTER, -1)[..., :2]
LIVE = np.array([[1, 1, 0, 1], [0, 0, 0, 0], [1, 0, 1, 1]], bool)
B, T, E = 2, 11, 6
SCORES = np.random.default_rng(3).normal(size=(B, T, E)) + 0.3


def masks():
  return [(None, np.ones_like(LIVE)), (jnp.asarray(LIVE), LIVE)]


def test_use_and_balance_of_experts():
  p = special.softmax(ROUTER, -1)
  for live, there in masks():
    used = np.bincount(CHOICES[there].reshape(-1), minlength=5) / there.sum()
    wanted = p[there].mean(0)
    args = jnp.float32(p), jnp.asarray(CHOICES), live
    f, mean = expert_use(*args)
    np.testing.assert_allclose(f, used, rtol=1e-6)
    np.testing.assert_allclose(mean, wanted, rtol=1e-5)
    want = 5 * (used * wanted).sum()
    np.testing.assert_allclose(load_balance(*args), want, rtol=1e-5)


def test_balance_is_one_if_even_and_e_if_all_go_to_one():
  even = jnp.eye(4)[jnp.arange(8) % 4]
  np.testing.assert_allclose(load_balance(even, even.argmax(-1)[:, None]), 1)
  one = jnp.eye(4)[jnp.zeros(8, int)]
  np.testing.assert_allclose(load_balance(one, one.argmax(-1)[:, None]), 4)
  nobody = jnp.full((8, 1), -1)
  assert load_balance(one, nobody) == 0


def test_z_and_entropy_of_a_router():
  for live, there in masks():
    logits = ROUTER[there]
    z = special.logsumexp(logits, -1) ** 2
    np.testing.assert_allclose(
      router_z(jnp.float32(ROUTER), live), z.mean(), rtol=1e-5
    )
    entropy = special.entr(special.softmax(logits, -1)).sum(-1)
    np.testing.assert_allclose(
      router_entropy(jnp.float32(ROUTER), live), entropy.mean(), rtol=1e-5
    )


def test_losses_of_routers_without_live_items_are_zero():
  nobody = jnp.zeros(LIVE.shape, bool)
  logits, chosen = jnp.float32(ROUTER), jnp.asarray(CHOICES)

  def total(logits):
    balance = load_balance(jax.nn.softmax(logits), chosen, nobody)
    return balance + router_z(logits, nobody) + router_entropy(logits, nobody)

  value, slope = jax.value_and_grad(total)(logits)
  assert value == 0 and not np.any(slope)


def test_losses_of_routers_do_not_see_what_is_not_live():
  nan = jnp.where(LIVE[..., None], jnp.float32(ROUTER), jnp.nan)
  live, chosen = jnp.asarray(LIVE), jnp.asarray(CHOICES)

  def total(logits):
    balance = load_balance(jax.nn.softmax(logits), chosen, live)
    return balance + router_z(logits, live) + router_entropy(logits, live)

  np.testing.assert_allclose(total(nan), total(jnp.float32(ROUTER)))


def test_excess_load_is_zero_with_the_load_as_its_gradient():
  bias, load = jnp.array([0.3, -0.1, 2.0]), jnp.array([4.0, 0.0, 1.0])
  excess = lambda bias, load: excess_load(bias, load - load.mean())
  value, slopes = jax.value_and_grad(excess, argnums=(0, 1))(bias, load)
  assert value == 0 and not np.any(slopes[1])
  np.testing.assert_allclose(slopes[0], load - load.mean(), rtol=1e-6)


def test_the_divergence_is_from_the_wanted_distribution():
  wanted = np.random.default_rng(4).normal(size=ROUTER.shape)
  for live, there in masks():
    p, q = (special.softmax(a[there], -1) for a in (ROUTER, wanted))
    got = router_divergence(jnp.float32(ROUTER), jnp.float32(wanted), live)
    want = special.rel_entr(p, q).sum(-1).mean()
    np.testing.assert_allclose(got, want, rtol=1e-5)


def test_sequences_are_balanced_one_by_one():
  p = jnp.float32(special.softmax(ROUTER, -1))
  for live, there in masks():
    there = np.ones(LIVE.shape, bool) if live is None else LIVE
    each = [
      load_balance(p[b], jnp.asarray(CHOICES[b]), jnp.asarray(there[b]))
      for b in range(len(LIVE))
    ]
    got = sequence_load_balance(p, jnp.asarray(CHOICES), live)
    np.testing.assert_allclose(
      got, np.mean([e for e, t in zip(each, there) if t.any()]), rtol=1e-6
    )


@pytest.mark.parametrize(
  "loss",
  [
    router_z,
    router_entropy,
    activation_locality,
    lambda logits, live: router_divergence(logits, logits[::-1], live),
    lambda logits, live: router_divergence(-logits, logits, live),
  ],
)
def test_what_is_not_there_reaches_no_gradient(loss):
  live = jnp.asarray(LIVE) & jnp.asarray(LIVE)[::-1]
  logits = jnp.where(live[..., None], jnp.float32(ROUTER), jnp.nan)
  got = jax.grad(lambda a: loss(a, live))(logits)
  want = jax.grad(lambda a: loss(a, live))(jnp.float32(ROUTER))
  np.testing.assert_allclose(got, want, atol=1e-6)


def test_an_expert_that_is_ruled_out_has_no_entropy():
  logits = jnp.array([[0.0, -jnp.inf, 1.0]])
  got, slope = jax.value_and_grad(router_entropy)(logits)
  p = special.softmax([0.0, 1.0])
  np.testing.assert_allclose(got, special.entr(p).sum(), rtol=1e-6)
  assert np.isfinite(slope).all()


@pytest.mark.parametrize("chunk", [1, 4, T, 64])
def test_the_chunk_loss_is_the_chance_that_a_chunk_uses_an_expert(chunk):
  s = np.maximum(SCORES, 0)
  p = s / s.sum(-1, keepdims=True)
  terms = []
  for row in p:
    for begin in range(0, T, chunk):
      terms.append(1 - np.prod(1 - row[begin : begin + chunk], axis=0))
  got = chunk_sparsification(jnp.asarray(s, jnp.float32), chunk)
  np.testing.assert_allclose(got, np.mean(terms), rtol=1e-5)
  if chunk == 1:
    np.testing.assert_allclose(got, 1 / E, rtol=1e-5)


def test_the_chunk_loss_is_least_where_tokens_share_their_experts():
  same = jnp.tile(jax.nn.one_hot(2, E), (1, 8, 1))
  each = jax.nn.one_hot(jnp.arange(8) % E, E)[None]
  np.testing.assert_allclose(chunk_sparsification(same, 8), 1 / E, rtol=1e-6)
  np.testing.assert_allclose(chunk_sparsification(each, 8), 1, rtol=1e-6)
  for s in (same, each, jnp.zeros((1, 8, E))):
    slope = jax.grad(chunk_sparsification)(s, 8)
    assert np.isfinite(slope).all()


def test_the_locality_loss_is_that_of_neighbours():
  logits = np.random.default_rng(0).normal(size=(B, T, E))
  live = np.ones((B, T), bool)
  live[0, 3] = live[1, 7:] = False
  sigmoid = lambda a: 1 / (1 + np.exp(-a))
  terms = []
  for b in range(B):
    for t in range(1, T):
      if live[b, t] and live[b, t - 1]:
        q, p = sigmoid(logits[b, t - 1]), sigmoid(logits[b, t])
        terms.append(-(p * np.log(q) + (1 - p) * np.log(1 - q)))
  got = activation_locality(jnp.asarray(logits, jnp.float32), jnp.asarray(live))
  np.testing.assert_allclose(got, np.mean(terms), rtol=1e-5)
  assert activation_locality(jnp.ones((B, 1, E))) == 0
