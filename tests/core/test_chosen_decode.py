# SPDX-License-Identifier: Apache-2.0
"""Law: `decode_chosen` is attention to the chosen keys, however many."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from adaptivejax.core.attention import Keys
from adaptivejax.core.chosen_decode import (
  decode_chosen,
  decode_chosen_masked,
  list_capacities,
)

B, T, H, G, S, D = 2, 2, 4, 2, 11, 8
POS = np.array([[*range(9), -1, -1], [3, 0, -1, 2, 1, 5, 6, 4, 7, -1, 8]])
AT = np.array([[7, 8], [8, -1]])


def given(unit, lists, share, seed=0):
  """`(q, keys, chosen, positions)`, a share of the units being chosen."""
  rng = np.random.default_rng(seed)
  draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
  keys = Keys(draw(B, G, S, D), draw(B, G, S, D), jnp.asarray(POS[:, None]))
  units = -(-S // unit)
  chosen = jnp.asarray(rng.random((B, lists, units)) < share)
  return draw(B, T, H, D), keys, chosen, jnp.asarray(AT)


def brute(q, keys, chosen, positions, unit):
  """`(out [B, T, H, D], mass [B, H, S])` pair by pair."""
  q, k, v = (np.asarray(a, np.float64) for a in (q, keys.k, keys.v))
  out, mass = np.zeros(q.shape), np.zeros((B, H, S))
  for b, t, h in np.ndindex(B, T, H):
    g = h // (H // G)
    mine = np.asarray(chosen)[b, g % chosen.shape[1]]
    some = [
      s for s in range(S) if 0 <= POS[b, s] <= AT[b, t] and mine[s // unit]
    ]
    if some:
      odds = np.exp(k[b, g, some] @ q[b, t, h] / np.sqrt(D))
      out[b, t, h] = odds / odds.sum() @ v[b, g, some]
      mass[b, h, some] += odds / odds.sum()
  return out, mass


@pytest.mark.parametrize("f", [decode_chosen, decode_chosen_masked])
@pytest.mark.parametrize(("unit", "lists"), [(1, 1), (2, G), (4, 1), (20, 1)])
def test_any_choice_is_exact(f, unit, lists):
  """Of none, few and all units, whichever list they take; one trace."""
  run = jax.jit(lambda *args: f(*args, unit=unit, capacity=4))
  for seed, share in enumerate((0.0, 0.1, 0.3, 0.6, 0.9, 2.0)):
    args = given(unit, lists, share, seed)
    got, cost = run(*args)
    np.testing.assert_allclose(got.out, brute(*args, unit)[0], atol=1e-5)
    assert 0 <= cost.items <= cost.capacity
  assert run._cache_size() == 1


@pytest.mark.parametrize("f", [decode_chosen, decode_chosen_masked])
def test_mass_is_that_of_rows_that_choose_all(f):
  args = given(2, 1, 2.0)
  q, keys, chosen, positions = args
  chosen = chosen.at[1, 0, 3].set(False)
  args = q, keys, chosen, positions
  got, _ = jax.jit(lambda *a: f(*a, unit=2, capacity=3, mass=True))(*args)
  want = brute(*args, 2)
  np.testing.assert_allclose(got.out, want[0], atol=1e-5)
  np.testing.assert_allclose(got.mass[0], want[1][0], atol=1e-5)
  assert (got.mass[1] == 0).all()


def test_it_costs_the_shortest_list_that_fits():
  """Of the row that needs most."""
  assert list_capacities(8, 11) == (2, 4, 8)
  assert list_capacities(40, 11) == (10,)
  assert list_capacities(1, 1) == ()
  key = 2 * T * H * 2 * D * B
  run = jax.jit(lambda *args: decode_chosen(*args, capacity=8)[1])
  q, keys, chosen, positions = given(1, 1, 0.0)
  for count, read in ((0, 2), (2, 2), (3, 4), (5, 8), (8, 8), (9, S), (S, S)):
    mine = chosen.at[1, 0, :count].set(True)
    cost = run(q, keys, mine, positions)
    assert cost.spent == key * read
    assert cost.full == key * S
    assert cost.items == count


@pytest.mark.parametrize("unit", [1, 2, 11])
@pytest.mark.parametrize("f", [decode_chosen, decode_chosen_masked])
def test_a_layer_is_read_where_it_lies(f, unit):
  """Whether or not units are parts of a row."""
  q, keys, chosen, positions = given(unit, 1, 0.3)
  other = jax.tree.map(lambda a: jnp.full_like(a, 3), keys)
  layers = jax.tree.map(lambda *a: jnp.stack(a, 1), other, keys, other)
  run = jax.jit(
    lambda i: f(q, layers, chosen, positions, unit=unit, layer=i)[0]
  )
  want = brute(q, keys, chosen, positions, unit)[0]
  np.testing.assert_allclose(run(1).out, want, atol=1e-5)
  assert np.abs(run(0).out - want).max() > 0.1


def test_poison_stays_where_it_is_not_chosen():
  for share in (0.3, 0.9):
    q, keys, chosen, positions = given(1, 1, share)
    bad = ~chosen[..., None]
    hide = lambda a: jnp.where(bad, jnp.nan, a)  # noqa: B023
    spoiled = keys._replace(k=hide(keys.k), v=hide(keys.v))
    run = jax.jit(lambda *args: decode_chosen(*args, capacity=6)[0].out)
    want = run(q, keys, chosen, positions)
    got = run(q, spoiled, chosen, positions)
    np.testing.assert_allclose(got, want, atol=1e-6)


def test_gradients_and_vmap():
  q, keys, chosen, positions = given(1, 1, 0.3)

  def loss(f):
    def of(q, k, v, chosen):
      some = keys._replace(k=k, v=v)
      return jnp.sin(f(q, some, chosen, positions, capacity=6)[0].out).sum()

    return of

  got, want = (
    jax.jit(jax.grad(loss(f), (0, 1, 2)))(q, keys.k, keys.v, chosen)
    for f in (decode_chosen, decode_chosen_masked)
  )
  for a, b in zip(got, want):
    np.testing.assert_allclose(a, b, atol=1e-5)
  many = jnp.stack([chosen, ~chosen, chosen | True])
  run = lambda chosen: decode_chosen(q, keys, chosen, positions, capacity=6)
  together, cost = jax.jit(jax.vmap(run))(many)
  for i in range(3):
    alone, own = run(many[i])
    np.testing.assert_allclose(together.out[i], alone.out, atol=1e-5)
    assert cost.spent[i] == own.spent, "each pays for its own list"


def test_bad_input():
  q, keys, chosen, positions = given(2, 1, 0.5)
  for unit, capacity, mask in (
    (2, 3, chosen[..., 1:]),
    (1, 3, chosen),
    (2, 3, jnp.repeat(chosen, H, 1)),
    (0, 3, chosen),
    (2, 0, chosen),
  ):
    with pytest.raises(ValueError, match=r"group_reduce|at least 1"):
      decode_chosen(q, keys, mask, positions, unit=unit, capacity=capacity)
