# SPDX-License-Identifier: Apache-2.0
"""Law: losses are their definitions, also where exponentials overflow."""

import jax
import jax.numpy as jnp
import numpy as np
from scipy import special

from adaptivejax.core.losses import (
  accuracy,
  binary_cross_entropy,
  cross_entropy,
  excess_load,
  expert_use,
  load_balance,
  router_entropy,
  router_z,
)

ROUTER = np.random.default_rng(2).normal(size=(3, 4, 5)) * 2
CHOICES = np.argsort(-ROUTER, -1)[..., :2]
LIVE = np.array([[1, 1, 0, 1], [0, 0, 0, 0], [1, 0, 1, 1]], bool)


def test_cross_entropy():
  logits = np.random.default_rng(0).normal(size=(3, 4, 5)) * 200
  targets = np.random.default_rng(1).integers(5, size=(3, 4))
  want = -np.take_along_axis(
    special.log_softmax(logits, -1), targets[..., None], -1
  )[..., 0]
  got = cross_entropy(jnp.float32(logits), jnp.asarray(targets))
  np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-4)


def test_binary_cross_entropy():
  logits = np.array([-500.0, -2, 0, 3, 500])
  for truth in (True, False):
    side = logits if truth else -logits
    got = binary_cross_entropy(jnp.float32(logits), jnp.full(5, truth))
    np.testing.assert_allclose(
      got, -special.log_expit(side), rtol=1e-5, atol=1e-30
    )
  assert np.isfinite(
    jax.grad(lambda x: binary_cross_entropy(x, x > 0).sum())(jnp.zeros(2))
  ).all()


def test_accuracy_ties_go_to_the_lower_class():
  logits = jnp.array([[1.0, 1.0], [0.0, 2.0]])
  assert accuracy(logits, jnp.array([0, 1])) == 1
  assert accuracy(logits, jnp.array([1, 1])) == 0.5


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
