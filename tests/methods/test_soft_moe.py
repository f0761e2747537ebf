# SPDX-License-Identifier: Apache-2.0
"""Law: slots are means of tokens, tokens are means of slots."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from scipy import special

from adaptivejax.methods.experts import SoftMoE
from adaptivejax.models import DecoderLM, decoder_block
from tests.methods.host import CONFIG, shaken
from tests.methods.mixtures import (
  LIVE,
  B,
  D,
  E,
  F,
  T,
  X,
  call,
  copy,
  experts,
  run_expert,
)

P = 3


@functools.cache
def soft(count=E, slots=P):
  made = SoftMoE(experts(count), D, slots=slots, rngs=nnx.Rngs(1))
  made = shaken(made)
  made.scale.set_value(jnp.float32(4.0))  # of sharp means
  return made


def by_hand(moe, x, slots):
  """One sequence [T, D], slot by slot, in f64."""
  x = np.asarray(x, np.float64)
  mu = np.asarray(moe.mu.get_value(), np.float64)
  unit = lambda v, axis: v / np.sqrt((v * v).sum(axis, keepdims=True) + 1e-6)
  scale = float(moe.scale.get_value())
  match = scale * np.einsum("td,dep->tep", unit(x, 1), unit(mu, 0))
  match = match[..., :slots]
  to_slot = special.softmax(match, axis=0)
  to_token = special.softmax(match, axis=(1, 2))
  y = np.zeros_like(x)
  for e in range(moe.count):
    for p in range(slots):
      slot = (to_slot[:, e, p, None] * x).sum(0)
      y += to_token[:, e, p, None] * run_expert(moe.experts, e, slot)
  return y


def close(got, want):
  np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("slots", [1, 2, P])
def test_equals_the_formula(slots):
  moe = copy(soft())
  moe.slots = slots
  y, cost, signals = call(moe, X)
  close(y, np.stack([by_hand(moe, x, slots) for x in X]))
  rows = B * E * slots
  assert cost.items == cost.capacity == rows and cost.dropped == 0
  one = 6.0 * D * F  # FLOPs of an expert on a row
  mixing = B * T * E * slots * D * 2.0 * 3  # match, gather, spread
  np.testing.assert_allclose(cost.spent, rows * one + mixing, rtol=1e-6)
  np.testing.assert_allclose(cost.full, B * T * E * one, rtol=1e-6)
  assert signals.penalty == 0


def test_tokens_that_are_not_live_are_not_there():
  nan = jnp.where(LIVE[..., None], X, jnp.nan)
  y = call(soft(), nan, LIVE)[0]
  assert not np.any(y[~LIVE])
  for b, n in enumerate(LIVE.sum(1).tolist()):
    close(y[b, :n], by_hand(soft(), X[b, :n], P))
  nobody = call(soft(), nan, jnp.zeros((B, T), bool))[0]
  assert not np.any(nobody)


def test_the_order_of_tokens_and_of_experts_does_not_matter():
  rng = np.random.default_rng(0)
  tokens, order = rng.permutation(T), rng.permutation(E)
  y = call(soft(), X)[0]
  close(call(soft(), X[:, tokens])[0], y[:, tokens])
  other = jax.tree.map(lambda a: a, soft())
  other.mu.set_value(soft().mu.get_value()[:, order])
  other.experts = jax.tree.map(lambda a: a[order], soft().experts)
  close(call(other, X)[0], y)


def test_one_slot_gives_every_token_the_same():
  y = call(soft(1, 1), X)[0]
  close(y, np.broadcast_to(y[:, :1], y.shape))
  assert not np.allclose(y[0], y[1], atol=1e-3)


def test_everything_has_a_gradient():
  run = lambda m, x: jnp.sin(m(x)[0]).sum()
  grads, dx = jax.jit(jax.grad(run, argnums=(0, 1)))(soft(), X)
  assert all(np.any(leaf) for leaf in jax.tree.leaves(grads))
  assert np.all(np.any(dx, axis=-1))
  zero = jax.grad(run, argnums=1)(soft(), jnp.zeros((1, T, D)))
  assert np.isfinite(zero).all()


def test_refuses_no_slots_and_causal_models():
  with pytest.raises(ValueError, match="slot"):
    SoftMoE(experts(), D, slots=0, rngs=nnx.Rngs(0))
  layer = lambda rngs: decoder_block(CONFIG, rngs, soft())
  with pytest.raises(ValueError, match="SoftMoE looks at the tokens to come"):
    DecoderLM(CONFIG, layer=layer, rngs=nnx.Rngs(0))
  told = SoftMoE(experts(), D, allow_noncausal=True, rngs=nnx.Rngs(0))
  layer = lambda rngs: decoder_block(CONFIG, rngs, told)
  assert DecoderLM(CONFIG, layer=layer, rngs=nnx.Rngs(0))
