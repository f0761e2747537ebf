# SPDX-License-Identifier: Apache-2.0
"""Law: a plan is the model without those halves; evolution keeps its budget,
never gets worse, and finds what exhaustive search finds.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial

from adaptivejax.core.plans import specialize
from adaptivejax.methods.depth import MixtureOfDepths, divergence, evolve
from adaptivejax.methods.depth.evopress import mutate
from adaptivejax.models import decoder_block
from adaptivejax.nn import by_plan
from tests import reference
from tests.methods.host import CONFIG, PROMPT, TOKENS, decode, model

L = CONFIG.layers
PLANS = ["11 10 01 11", "01 11 00 10", "00 00 11 11", "00 00 00 00"]


def halves(text):
  return np.array([[c == "1" for c in layer] for layer in text.split()])


def without(model, tokens, plan):
  """Logits of the model from which the halves are cut out."""
  x = model.embedding.get_value()[tokens]
  for layer, (attends, feeds) in zip(reference.layers_of(model), plan):
    if attends:
      h = reference.norm(layer.norm_attention, x)
      x = x + reference.attention(layer.attention, h)
    if feeds:
      x = x + reference.mlp(layer.mlp, reference.norm(layer.norm_mlp, x))
  return reference.readout(model, x)


def policy(plan):
  return Partial(by_plan, plan=jnp.asarray(plan))


@pytest.mark.parametrize("text", PLANS)
def test_a_plan_is_the_model_without_those_halves(text):
  plan = halves(text)
  want = without(model(), TOKENS, plan)
  out = model()(TOKENS, stack=policy(plan))
  np.testing.assert_allclose(out.logits, want, rtol=1e-4, atol=1e-5)
  np.testing.assert_array_equal(out.depth, plan.sum() / 2)
  logits, depth, _, cache = decode(
    model(), TOKENS, policy(plan), prefill=policy(plan)
  )
  np.testing.assert_allclose(logits, want[:, PROMPT:], rtol=1e-4, atol=1e-5)
  np.testing.assert_array_equal(depth, plan.sum() / 2)
  for i in range(L):
    written = np.asarray(cache.read(i).pos) >= 0
    assert written.all() if plan[i, 0] else not written.any()


def test_the_whole_plan_is_the_plain_model_bit_by_bit():
  whole = policy(np.ones((L, 2), bool))
  want = jax.jit(lambda m: m(TOKENS))(model())
  got = jax.jit(lambda m: m(TOKENS, stack=whole))(model())
  jax.tree.map(np.testing.assert_array_equal, got, want)
  want = decode(model(), TOKENS)
  got = decode(model(), TOKENS, whole, prefill=whole)
  jax.tree.map(np.testing.assert_array_equal, got, want)


def test_a_plan_of_whole_layers_is_the_specialized_model():
  kept = (0, 3)
  plan = np.isin(np.arange(L), kept)[:, None].repeat(2, 1)
  small = jax.tree.map(lambda a: a, model())  # a copy
  small.layers = specialize(small.layers, kept)
  got = model()(TOKENS, stack=policy(plan)).logits
  np.testing.assert_allclose(got, small(TOKENS).logits, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("text", PLANS)
def test_costs_the_halves_that_are_left(text):
  """FLOPs by hand."""
  d, f, t, b = CONFIG.features, CONFIG.hidden, TOKENS.shape[1], len(TOKENS)
  readout = 2 * b * t * d * CONFIG.vocab
  attention = b * t * (2 * d * d + 2 * d * 2 * 8 + 2 * d * d + 4 * d * t)
  feed = b * t * 4 * d * f
  plan = halves(text)
  cost = model()(TOKENS, stack=policy(plan)).cost
  spent = plan.sum(0) @ np.array([attention, feed]) + readout
  np.testing.assert_allclose(cost.spent, spent, rtol=1e-6)
  np.testing.assert_allclose(
    cost.full, L * (attention + feed) + readout, rtol=1e-6
  )


@pytest.mark.parametrize("drops", [(3, 1), (0, 4), (2, 7), (7, 0)])
def test_a_mutation_keeps_the_budget_and_swaps_at_most_three(drops):
  rng = np.random.default_rng(0)
  plan = np.arange(7)[:, None] >= np.array(drops)
  before, sizes = plan.copy(), set()
  for _ in range(300):
    child = mutate(plan, rng)
    np.testing.assert_array_equal((~child).sum(0), drops)
    sizes.add(int((child != plan).sum()) // 2)
  np.testing.assert_array_equal(plan, before)
  assert sizes == {(3, 1): {0, 1, 2, 3}, (7, 0): {0}}.get(drops, sizes)
  assert sizes <= {0, 1, 2, 3}


def test_the_number_of_swaps_is_the_lesser_of_two_dice():
  """1, 2, 3 swaps with odds 5, 3, 1; many units, so few swaps undo another."""
  rng = np.random.default_rng(0)
  plan = np.arange(400)[:, None] >= 200
  swaps = [(mutate(plan, rng) != plan).sum() // 2 for _ in range(900)]
  counts = np.bincount(swaps, minlength=4)[1:4]
  np.testing.assert_allclose(counts, [500, 300, 100], atol=60)


SCORES = np.random.default_rng(3).normal(size=(10, 1))


def linear(plans, samples, rng):
  del samples, rng
  return (SCORES * ~plans).sum((1, 2))


def test_reaches_the_optimum_of_a_linear_fitness():
  subsets = itertools.combinations(range(10), 3)
  best = min(SCORES[list(s)].sum() for s in subsets)
  for seed in range(5):
    found = evolve(linear, 10, (3,), generations=60, offspring=8, seed=seed)
    np.testing.assert_allclose(found.history[-1], best)
    np.testing.assert_allclose(linear(found.plan[None], 0, 0)[0], best)
    assert found.history[0] > best, "the first draw was lucky"
    assert np.all(np.diff(found.history) <= 0), "elitism"


def test_the_same_seed_finds_the_same_plan():
  runs = [evolve(linear, 10, (3,), generations=3, seed=s) for s in (1, 1, 2)]
  np.testing.assert_array_equal(runs[0].plan, runs[1].plan)
  assert runs[0].history == runs[1].history != runs[2].history


def test_stages_sieve_and_the_parent_joins_the_last():
  asked, seen = [], []

  def fitness(plans, samples, rng):
    asked.append((len(plans), samples))
    return linear(plans, samples, rng)

  evolve(
    fitness,
    10,
    (3,),
    generations=2,
    offspring=6,
    stages=((3, 1), (2, 2), (1, 8)),
    progress=lambda *args: seen.append(args[0]),
  )
  assert asked == [(6, 1), (3, 2), (2, 8)] + 2 * [(6, 1), (3, 2), (3, 8)]
  assert seen == [0, 1, 2]


def test_divergence_is_that_of_the_cut_model():
  fitness = divergence(model(), TOKENS)
  plans = np.stack([halves(text) for text in PLANS] + [np.ones((L, 2), bool)])
  got = fitness(plans, len(TOKENS), np.random.default_rng(0))
  dense = jax.nn.log_softmax(reference.decoder(model(), TOKENS))
  for plan, kl in zip(plans, got):
    cut = jax.nn.log_softmax(without(model(), TOKENS, plan))
    want = (np.exp(dense) * (dense - cut)).sum(-1).mean()
    np.testing.assert_allclose(kl, want, rtol=1e-3, atol=1e-6)
  few = [fitness(plans, 1, np.random.default_rng(seed)) for seed in range(30)]
  assert len({round(float(kl[0]), 5) for kl in few}) == len(TOKENS)


@pytest.mark.parametrize("drops", [(), (-1,), (3, 11)])
def test_refuses_a_budget_that_cannot_be(drops):
  with pytest.raises(ValueError, match="drops"):
    evolve(linear, 10, drops, generations=1)


@pytest.mark.parametrize("stages", [(), ((2, 1),), ((32, 1), (1, 1))])
def test_refuses_stages_that_do_not_sieve(stages):
  with pytest.raises(ValueError, match="stages"):
    evolve(linear, 10, (3,), generations=1, stages=stages)


def test_refuses_plans_and_layers_that_do_not_fit():
  with pytest.raises(ValueError, match=r"plan.*halves"):
    model()(TOKENS, stack=policy(np.ones((L + 1, 2), bool)))

  def layer(rngs):
    block = decoder_block(CONFIG, rngs)
    return MixtureOfDepths(block, CONFIG.features, rngs=rngs)

  with pytest.raises(ValueError, match=r"by_plan.*Block"):
    model(layer)(TOKENS, stack=policy(np.ones((L, 2), bool)))
