# SPDX-License-Identifier: Apache-2.0
"""Law: no placement is better than the best of all, the search finds it where
they can be tried, and whatever the placement, the model computes the same.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from adaptivejax.methods.experts import (
  apply_placement,
  expert_affinity,
  in_order,
  mean_hops,
  place_experts,
)
from adaptivejax.models import decoder_block
from adaptivejax.nn import (
  MixtureOfExperts,
  Mlp,
  Router,
  Routing,
  reorder_experts,
  routing_trace,
  stacked,
)
from tests.methods.host import CONFIG, TOKENS, model

E, G = 4, 2
NODES = np.array([[0, 1, 2, 2], [1, 0, 2, 2], [2, 2, 0, 1], [2, 2, 1, 0]])


def some_trace(seed, tokens=200, layers=3, experts=E):
  """Tokens whose next expert depends on the one before."""
  rng = np.random.default_rng(seed)
  step = rng.dirichlet(np.full(experts, 0.5), (layers, experts))
  trace = [rng.integers(0, experts, tokens)]
  for l in range(layers - 1):
    trace.append(
      np.array([rng.choice(experts, p=step[l, i]) for i in trace[-1]])
    )
  return np.stack(trace, 1)


def paid(trace, place, distance=None):
  """Token by token."""
  price = 0
  for token in trace:
    way = [place[l][e] for l, e in enumerate(token) if e >= 0]
    full = len(way) == len(token)
    assert full, "without gaps only"
    for a, b in itertools.pairwise(way):
      price += (a != b) if distance is None else distance[a][b]
  return price / len(trace)


def every_placement(layers, experts, devices):
  slots = tuple(np.arange(experts) * devices // experts)
  one = sorted(set(itertools.permutations(slots)))
  return (np.array(p) for p in itertools.product(one, repeat=layers))


def test_affinity_counts_pairs():
  trace = np.array([[0, 1, 1], [0, 1, 2], [3, -1, 2], [-1, 0, 2]])
  want = np.zeros((2, E, E), int)
  want[0, 0, 1] = 2
  want[1, 1, 1] = want[1, 1, 2] = want[1, 0, 2] = 1
  np.testing.assert_array_equal(expert_affinity(trace, E), want)


def test_hops_are_those_of_each_token():
  rng = np.random.default_rng(0)
  for seed in range(3):
    trace = some_trace(seed)
    place = rng.permuted(in_order(3, E, G), axis=1)
    assert mean_hops(trace, place) == pytest.approx(paid(trace, place))
    place = rng.permuted(in_order(3, E, 4), axis=1)
    got = mean_hops(trace, place, NODES.astype(float))
    assert got == pytest.approx(paid(trace, place, NODES))


@pytest.mark.parametrize("seed", range(6))
def test_the_search_finds_the_best_of_all(seed):
  trace = some_trace(seed)
  place = place_experts(expert_affinity(trace, E), G)
  best = min(mean_hops(trace, p) for p in every_placement(3, E, G))
  assert mean_hops(trace, place) == pytest.approx(best)
  assert best <= mean_hops(trace, in_order(3, E, G))


def test_nodes_are_farther_than_devices():
  trace, far = some_trace(1, layers=2), NODES.astype(float)
  place = place_experts(expert_affinity(trace, E), 4, distance=far)
  best = min(mean_hops(trace, p, far) for p in every_placement(2, E, 4))
  assert mean_hops(trace, place, far) == pytest.approx(best)


@pytest.mark.parametrize("experts,devices", [(8, 2), (16, 4), (6, 6), (6, 1)])
def test_a_placement_is_even_and_never_worse_than_none(experts, devices):
  trace = some_trace(7, layers=5, experts=experts)
  place = place_experts(expert_affinity(trace, experts), devices)
  assert place.shape == (5, experts)
  for layer in place:
    counts = np.bincount(layer, minlength=devices)
    assert (counts == experts // devices).all()
  assert mean_hops(trace, place) <= mean_hops(
    trace, in_order(5, experts, devices)
  )
  again = place_experts(expert_affinity(trace, experts), devices)
  np.testing.assert_array_equal(place, again)


def test_planted_affinity_is_recovered():
  """Tokens that keep to a group of experts, whatever they are called."""
  rng = np.random.default_rng(0)
  layers, experts, devices = 6, 16, 4
  group = rng.permuted(in_order(layers, experts, devices), axis=1)
  mine = rng.integers(0, devices, 500)
  trace = np.stack(
    [
      np.array([rng.choice(np.flatnonzero(g == m)) for m in mine])
      for g in group
    ],
    axis=1,
  )
  place = place_experts(expert_affinity(trace, experts), devices)
  assert mean_hops(trace, place) == 0
  assert mean_hops(trace, in_order(layers, experts, devices)) > 3


class TopTwo(nnx.Module):
  def __init__(self, rngs):
    self.scorer = Router(CONFIG.features, E, rngs=rngs)

  def __call__(self, x, live, key):
    scores = jnp.round(self.scorer(x))  # many ties
    weights, experts = jax.lax.top_k(jax.nn.softmax(scores), 2)
    experts = jnp.where(weights > 0.15, experts, -1)
    return Routing(experts, weights, jnp.float32(0), jnp.float32(0))


def layer(rngs):
  mlp = lambda r: Mlp(CONFIG.features, 8, rngs=r)
  return decoder_block(
    CONFIG, rngs, MixtureOfExperts(TopTwo(rngs), stacked(mlp, E, rngs))
  )


def test_the_model_computes_what_it_did_and_stays_where_it_should():
  """From trace to placement, and the trace of the placed model."""
  whole = model(layer)
  read = jax.jit(lambda m: m(TOKENS, stack=routing_trace))
  before = read(whole)
  plain = jax.jit(lambda m: m(TOKENS))(whole)
  np.testing.assert_allclose(before.logits, plain.logits, rtol=1e-6)
  notes = np.asarray(before.notes)
  assert notes.shape == (CONFIG.layers, *TOKENS.shape, 2)
  loads = np.asarray(plain.signals.load[0])  # [L, E], counted by the layers
  for seen, load in zip(notes, loads):
    counted = np.bincount(seen[seen >= 0], minlength=E)
    np.testing.assert_array_equal(counted, load)

  trace = notes[..., 0].reshape(CONFIG.layers, -1).T
  place = place_experts(expert_affinity(trace, E), G)
  placed = apply_placement(whole, place)
  after = read(placed)
  np.testing.assert_array_equal(after.logits, before.logits)
  moved = np.asarray(after.notes)[..., 0].reshape(CONFIG.layers, -1).T
  way = in_order(CONFIG.layers, E, G)  # by number, now
  assert mean_hops(moved, way) == pytest.approx(mean_hops(trace, place))
  assert mean_hops(moved, way) < mean_hops(trace, way)


def test_one_layer_and_any_order():
  mlp = lambda r: Mlp(CONFIG.features, 8, rngs=r)
  experts = stacked(mlp, E, nnx.Rngs(0))
  mixture = MixtureOfExperts(TopTwo(nnx.Rngs(1)), experts)
  x = jax.random.normal(jax.random.key(0), (9, CONFIG.features))
  order = np.array([2, 0, 3, 1])

  @jax.jit
  def both(mixture):
    return mixture(x), reorder_experts(mixture, order)(x)

  (y, _, signals), (moved, _, after) = both(mixture)
  np.testing.assert_allclose(moved, y, rtol=1e-6, atol=1e-6)
  assert len(set(np.asarray(signals.load[0]))) > 1
  np.testing.assert_array_equal(after.load[0], signals.load[0][order])


def test_what_does_not_fit_is_refused():
  trace, counts = some_trace(0), expert_affinity(some_trace(0), E)
  with pytest.raises(ValueError, match="4 experts .* devices=3"):
    place_experts(counts, 3)
  with pytest.raises(ValueError, match="starts=0"):
    place_experts(counts, G, starts=0)
  for bad in (trace[:, :1], trace[:0], trace + 1):
    with pytest.raises(ValueError, match="one of 4 experts"):
      expert_affinity(bad, E)
  whole = model(layer)
  with pytest.raises(ValueError, match=r"\(4, 4\).*\(4,\)"):
    apply_placement(whole, np.array([0, 0, 1, 1]))
  with pytest.raises(ValueError, match="permute"):
    reorder_experts(whole, np.zeros((CONFIG.layers, E), int))
  with pytest.raises(ValueError, match="one mixture; it has 0"):
    apply_placement(model(), np.zeros((CONFIG.layers, E), int))
  with pytest.raises(ValueError, match="no `MixtureOfExperts`"):
    model()(TOKENS, stack=routing_trace)
