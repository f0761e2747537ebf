# SPDX-License-Identifier: Apache-2.0
"""Law: each expert takes the tokens that score it best, all the same number."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from adaptivejax.methods.experts import ExpertChoiceRouter
from adaptivejax.models import DecoderLM, decoder_block
from adaptivejax.nn import Group, MixtureOfExperts, adjust
from tests.methods.host import CONFIG, TOKENS
from tests.methods.mixtures import (
  LIVE,
  B,
  D,
  E,
  T,
  X,
  brute_force,
  call,
  experts,
  gates_of,
  mixture,
  probabilities,
)


def rule(p, k, live=None):
  """By hand, expert by expert: gates [B, T, E]; `k` of each sequence."""
  gates = np.zeros_like(p)
  for b in range(len(p)):
    there = np.arange(T) if live is None else np.nonzero(live[b])[0]
    for e in range(E):
      for t in there[np.argsort(-p[b, there, e], kind="stable")][: k[b]]:
        gates[b, t, e] = p[b, t, e]
  return gates


@pytest.mark.parametrize("factor", [0.5, 2.0, 2.3, 8.0])
@pytest.mark.parametrize("live", [None, LIVE], ids=["all", "some"])
def test_an_expert_takes_its_best_tokens(factor, live):
  moe = mixture(ExpertChoiceRouter, capacity_factor=factor)
  there = [T] * B if live is None else LIVE.sum(1).tolist()
  k = [int(np.ceil(factor * n / E)) for n in there]
  gates = rule(probabilities(moe.router.gate, X), k, live)
  np.testing.assert_allclose(
    gates_of(moe.router(X, live)), gates, rtol=1e-4, atol=1e-6
  )
  loads = (gates > 0).sum((0, 1))
  assert (loads == sum(k)).all(), "an even load, always"


def test_the_output_is_the_sum_over_those_who_took_it():
  moe = mixture(ExpertChoiceRouter)
  gates = rule(probabilities(moe.router.gate, X), [3] * B)
  y, cost, signals = call(moe, X)
  want = brute_force(moe.experts, X, gates)
  np.testing.assert_allclose(y, want, rtol=1e-4, atol=1e-5)
  np.testing.assert_array_equal(signals.load[0], 3 * B)
  assert len(np.unique(signals.choices[0])) > 2 and cost.items == 3 * B * E


@pytest.mark.parametrize(("refused", "k"), [(-1e6, 12), (0.5, 2), (1e6, 0)])
def test_experts_may_refuse_a_share(refused, k):
  moe = adjust(mixture(ExpertChoiceRouter), refused)
  gates = rule(probabilities(moe.router.gate, X), [k] * B)
  got = gates_of(moe.router(X))
  np.testing.assert_allclose(got, gates, rtol=1e-4, atol=1e-6)
  assert not gates_of(moe.router(X, LIVE))[~LIVE].any()


def test_a_whole_number_of_tokens_is_not_rounded_up():
  """13 tokens times 7/13 is above 7 in f32."""
  router = mixture(ExpertChoiceRouter, capacity_factor=7 * E / 13).router
  taken = gates_of(router(jnp.concatenate([X, X[:, :1]], 1))) > 0
  assert (taken.sum(1) == 7).all()


def layer(**settings):
  def make(rngs):
    router = ExpertChoiceRouter(D, E, **settings, rngs=rngs)
    return decoder_block(CONFIG, rngs, MixtureOfExperts(router, experts()))

  return make


def test_a_causal_model_refuses_it():
  with pytest.raises(ValueError, match="ExpertChoiceRouter .*allow_noncausal"):
    DecoderLM(CONFIG, layer=layer(), rngs=nnx.Rngs(0))
  hidden = lambda rngs: Group([decoder_block(CONFIG, rngs), layer()(rngs)])
  with pytest.raises(ValueError, match="tokens to come"):
    DecoderLM(CONFIG, layer=hidden, rngs=nnx.Rngs(0))


def test_a_causal_model_takes_it_if_told_to():
  make = layer(allow_noncausal=True)
  model = DecoderLM(CONFIG, layer=make, rngs=nnx.Rngs(0))
  run = jax.jit(lambda model, tokens: model(tokens).logits)
  logits = run(model, TOKENS)
  assert np.isfinite(logits).all()
  later = run(model, TOKENS.at[:, -1].set((TOKENS[:, -1] + 1) % CONFIG.vocab))
  assert not np.allclose(logits[:, :-1], later[:, :-1], atol=1e-6)


@pytest.mark.parametrize("factor", [0, -1.0, 8.5, float("nan")])
def test_refuses_a_factor_out_of_range(factor):
  with pytest.raises(ValueError, match="capacity_factor"):
    ExpertChoiceRouter(D, E, capacity_factor=factor, rngs=nnx.Rngs(0))


def test_ties_go_to_the_earlier_token():
  router = mixture(ExpertChoiceRouter).router
  gates = gates_of(router(jnp.zeros_like(X)))
  assert (gates[:, :3] > 0).all() and not gates[:, 3:].any()
