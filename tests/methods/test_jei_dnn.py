# SPDX-License-Identifier: Apache-2.0
"""Law: gates, probabilities and exits are those of a walk through the exits."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial
from scipy import special, stats

from adaptivejax.methods.depth import jei_dnn
from tests.methods.host import ENCODER, ROWS, every_exit, leave, shaken

K = ENCODER.layers
LOSSES = np.random.default_rng(0).random((K, ROWS)).astype(np.float32)


@functools.cache
def gates():
  return shaken(shaken(jei_dnn.Gates(K), 1), 2)


def gate_values():
  """Of every gate and row, in NumPy: sigmoid of four features."""
  logits, _ = every_exit()
  p = special.softmax(logits[:-1].astype(np.float64), -1)
  square = p**2 / (p**2).sum(-1, keepdims=True)
  ranked = np.sort(p, -1)
  features = [
    ranked[..., -1],
    stats.entropy(p, axis=-1),
    ranked[..., -1] - ranked[..., -2],
    stats.entropy(square, axis=-1),
  ]
  kernel = np.array(gates().kernel.get_value())
  scores = np.einsum("fgb,gf->gb", features, kernel)
  return special.expit(scores + np.array(gates().bias.get_value())[:, None])


def probabilities(g):
  p = []
  for l in range(K - 1):
    p.append(np.maximum(0, np.minimum(g[l], 1 - g[:l].sum(0))))
  return np.array([*p, 1 - sum(p)])


def test_gates_read_their_exit():
  logits, _ = every_exit()
  got = jax.nn.sigmoid(gates().every(jnp.asarray(logits)))
  np.testing.assert_allclose(got, gate_values(), rtol=1e-4, atol=1e-5)
  one = jax.nn.sigmoid(gates()(1, jnp.asarray(logits[1])))
  np.testing.assert_allclose(one, gate_values()[1], rtol=1e-4, atol=1e-5)
  slope = jax.grad(lambda z: gates().every(z).sum())(jnp.asarray(logits))
  np.testing.assert_array_equal(slope, 0)


def test_exit_probabilities_sum_to_one():
  rng = np.random.default_rng(1)
  scores = 3 * rng.normal(size=(K - 1, 20)) - 1
  got = jei_dnn.exit_probabilities(jnp.asarray(scores, jnp.float32))
  want = probabilities(special.expit(scores))
  np.testing.assert_allclose(got, want, atol=1e-6)
  np.testing.assert_allclose(got.sum(0), 1, rtol=1e-6)
  assert got.min() >= 0


def test_rows_leave_at_an_even_chance():
  g = gate_values()
  p = probabilities(g)
  left = 1 - np.cumsum(np.vstack([np.zeros(ROWS), p]), 0)[:-1]
  taken = set()
  for level in (0.0, 0.45, 0.5, 0.65, 1.1):
    due = p / np.maximum(left, 1e-12) >= level
    due[-1] = True
    rule = Partial(jei_dnn.gated_exit, gates=gates(), level=jnp.float32(level))
    got = leave(rule, jnp.ones(ROWS))
    np.testing.assert_array_equal(got.exit, due.argmax(0) + 1)
    taken |= set(np.asarray(got.exit).tolist())
  assert len(taken) > 2, "the cases decide little"


def test_the_exits_learn_the_rows_they_answer():
  p = probabilities(np.random.default_rng(2).random((K - 1, ROWS)))
  given = jnp.asarray(LOSSES), jnp.asarray(p, jnp.float32)
  want = (p * LOSSES).sum(0)
  np.testing.assert_allclose(jei_dnn.exit_loss(*given), want.mean(), rtol=1e-5)
  slope, none = jax.grad(jei_dnn.exit_loss, (0, 1))(*given)
  np.testing.assert_allclose(slope, p / ROWS, rtol=1e-4, atol=1e-7)
  np.testing.assert_array_equal(none, 0)


def test_with_one_exit_forced_it_is_the_plain_loss():
  p = jnp.zeros((K, ROWS)).at[2].set(1)
  got = jei_dnn.exit_loss(jnp.asarray(LOSSES), p)
  np.testing.assert_allclose(got, LOSSES[2].mean(), rtol=1e-6)


@pytest.mark.parametrize("tradeoff", [0.0, 0.5, 1e6])
def test_gates_should_let_go_from_the_best_exit_on(tradeoff):
  cost = np.arange(1, K + 1) / K
  best = (LOSSES + tradeoff * cost[:, None]).argmin(0)
  if tradeoff == 1e6:
    assert (best == 0).all()
  got = jei_dnn.gate_labels(
    jnp.asarray(LOSSES), jnp.asarray(cost, jnp.float32), tradeoff
  )
  want = [[l >= b for b in best] for l in range(K - 1)]
  np.testing.assert_array_equal(got, want)


def test_the_gate_loss_weighs_those_that_should_leave():
  rng = np.random.default_rng(3)
  scores, labels = (
    rng.normal(size=(K - 1, ROWS)),
    rng.random((K - 1, ROWS)) > 0.5,
  )
  positive = np.array([1.0, 2.0, 5.0])
  p = special.expit(scores)
  nats = np.where(labels, -positive[:, None] * np.log(p), -np.log(1 - p))
  got = jei_dnn.gate_loss(
    jnp.asarray(scores, jnp.float32),
    jnp.asarray(labels),
    jnp.asarray(positive, jnp.float32),
  )
  np.testing.assert_allclose(got, nats.mean(), rtol=1e-5)


def test_one_exit_needs_no_gate():
  with pytest.raises(ValueError, match="two or more exits"):
    jei_dnn.Gates(1)
