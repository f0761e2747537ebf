"""Law: scores are those of pairs, added up one by one; budgets are held."""

import jax.numpy as jnp
import numpy as np
import pytest
from scipy.spatial.distance import jensenshannon

from adaptivejax.core import (
  antidiagonal_mass,
  attention_weights,
  fewest_of_mass,
  jensen_shannon,
  last_queries,
  line_mass,
  pooled_scores,
  slash_blocks,
)
from tests.methods import prompts
from tests.methods.prompts import BLOCK, PROMPTS, B, H

SIZES = {"block_q": BLOCK, "block_kv": BLOCK}


@pytest.mark.parametrize("name", PROMPTS)
@pytest.mark.parametrize("count", [3, 50])
def test_lines_are_sums_over_pairs(name, count):
  """More queries asked for than there are: all of them."""
  p = PROMPTS[name]
  q, keys, at = p.arrays()
  probe, last = last_queries(q, at, count)
  got = line_mass(attention_weights(probe, keys, last), last, keys)
  for a, b in zip(got, prompts.lines(p, count)):
    np.testing.assert_allclose(a, b, atol=1e-5)


def test_lines_of_slots_in_any_order():
  p = PROMPTS["continued"]
  order = np.random.default_rng(0).permutation(p.k.shape[2])
  mixed = p._replace(
    k=p.k[:, :, order], v=p.v[:, :, order], pos=p.pos[:, order]
  )
  q, keys, at = mixed.arrays()
  probe, last = last_queries(q, at, 4)
  columns, slashes = line_mass(attention_weights(probe, keys, last), last, keys)
  want, offsets = prompts.lines(p, 4)
  np.testing.assert_allclose(columns, want[..., order], atol=1e-5)
  np.testing.assert_allclose(slashes, offsets, atol=1e-5)


@pytest.mark.parametrize("name", PROMPTS)
def test_pooled_scores_are_means_of_what_is_there(name):
  p = PROMPTS[name]
  got = pooled_scores(*p.arrays(), **SIZES)
  np.testing.assert_allclose(got, prompts.pooled(p), atol=1e-5)


def test_antidiagonals_add_up_to_the_groups_that_see():
  p = PROMPTS["text"]
  mass = np.asarray(antidiagonal_mass(*p.arrays(), stride=2, **SIZES)).sum(-1)
  groups = np.ceil((p.at >= 0).reshape(B, -1, 2).any(-1).sum(-1))
  np.testing.assert_allclose(
    mass.sum(-1), np.tile(groups[:, None], H), rtol=1e-5
  )
  with pytest.raises(ValueError, match="stride=3 must divide"):
    antidiagonal_mass(*p.arrays(), stride=3, **SIZES)


@pytest.mark.parametrize("name", PROMPTS)
def test_slashes_name_the_blocks_of_their_pairs(name):
  p = PROMPTS[name]
  _, keys, at = p.arrays()
  rng = np.random.default_rng(0)
  for share in (0.0, 0.08, 1.0):
    chosen = rng.random((B, H, p.k.shape[2])) < share
    got = slash_blocks(jnp.asarray(chosen), at, keys, **SIZES)
    np.testing.assert_array_equal(got, prompts.slashed(p, chosen))


def test_the_fewest_that_hold_a_share():
  rng = np.random.default_rng(0)
  mass = rng.random((40, 9)).astype(np.float32) ** 4
  forced, allowed = rng.random((2, 40, 9)) < np.array([0.2, 0.8])[:, None, None]
  for p in (-1.0, 0.0, 0.3, 0.9, 1.0):
    got = fewest_of_mass(*map(jnp.asarray, (mass, p, forced, allowed)))
    np.testing.assert_array_equal(
      got, prompts.fewest(mass, p, forced & allowed, allowed)
    )
  one = jnp.ones((1, 4))
  nothing = fewest_of_mass(one, 0.5, one < 0, one < 0)
  assert not nothing.any()


def test_distance_of_distributions_is_that_of_scipy():
  rng = np.random.default_rng(0)
  p, q = rng.dirichlet(np.full(6, 0.3), (2, 5)).astype(np.float32)
  p[0, 1:] = q[0, :1] = 0  # disjoint parts
  p /= p.sum(-1, keepdims=True)
  q /= q.sum(-1, keepdims=True)
  got = jensen_shannon(jnp.asarray(p), jnp.asarray(q))
  np.testing.assert_allclose(got, jensenshannon(p, q, axis=-1), atol=1e-5)
  assert jensen_shannon(jnp.asarray(p), jnp.asarray(p)).max() < 1e-3
