# SPDX-License-Identifier: Apache-2.0
"""Law: rows that finish early get what they would get alone, and cost less."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import AxisType, PartitionSpec

from adaptivejax.core.staged import (
  default_rungs,
  freeze,
  masked_scan,
  staged_while,
)

MOST = 9


def rows(lengths):
  count = len(lengths)
  return {
    "step": jnp.zeros(count, jnp.int32),
    "length": jnp.asarray(lengths, jnp.int32),
    "x": jnp.linspace(0.5, 1.5, count)[:, None] * jnp.array([1.0, -2.0]),
  }


def alive(row):
  return row["step"] < row["length"]


def step(row, live, rate=1.1):
  new = {
    "step": row["step"] + 1,
    "length": row["length"],
    "x": row["x"] * rate + row["step"][:, None],
  }
  return freeze(live, new, row), {
    "rows": jnp.int32(live.shape[0]),
    "live": live.sum(),
  }


def alone(row, rate=1.1):
  """Each row in a Python loop."""
  x = np.array(row["x"])
  for n, length in enumerate(np.asarray(row["length"])):
    for t in range(length):
      x[n] = x[n] * np.float32(rate) + t
  return x


def ladders(count):
  """All falling ladders from `count` would be many: some."""
  return [(count,), tuple(range(count, 0, -1)), default_rungs(count)]


@functools.cache
def program(rungs):
  return jax.jit(
    lambda r: staged_while(step, r, alive, result=lambda r: r["x"], rungs=rungs)
  )


@given(st.lists(st.integers(0, MOST), min_size=1, max_size=6), st.data())
def test_every_ladder_gives_what_a_loop_over_rows_gives(lengths, data):
  rungs = data.draw(st.sampled_from(ladders(len(lengths))))
  start = rows(lengths)
  out, tally = program(rungs)(start)
  np.testing.assert_allclose(out, alone(start), rtol=1e-5)
  assert tally["live"] == sum(lengths)


def test_a_rung_is_left_as_soon_as_the_next_holds_the_rest():
  lengths = [1, 9, 2, 2, 5, 5, 1, 9]
  _, tally = staged_while(step, rows(lengths), alive, rungs=(8, 4, 2))
  # 8 rows while more than 4 live, for 2 steps; 4 to step 5; then 2 to step 9
  assert tally["rows"] == 8 * 2 + 4 * 3 + 2 * 4


def test_nobody_alive_is_no_step():
  start = rows([0, 0, 0])
  out, tally = staged_while(step, start, alive, rungs=(3, 1))
  jax.tree.map(np.testing.assert_array_equal, out, start)
  assert tally["rows"] == 0


@pytest.mark.parametrize("steps", [3, 8, MOST, 20])
@pytest.mark.parametrize("chunk", [1, 4, 50])
def test_the_differentiable_twin_agrees(steps, chunk):
  lengths = [0, 3, 9, 1, 5]
  start = rows(lengths)
  out, tally = masked_scan(step, start, alive, steps=steps, chunk=chunk)
  cut = rows(np.minimum(lengths, steps))
  np.testing.assert_allclose(out["x"], alone(cut), rtol=1e-5)
  assert tally["live"] == np.minimum(lengths, steps).sum()


def test_the_gradient_is_that_of_a_loop_over_rows():
  start = rows([0, 3, 9, 1, 5])

  def staged(rate):
    go = lambda r, live: step(r, live, rate)
    return masked_scan(go, start, alive, steps=MOST)[0]["x"].sum()

  def plain(rate):
    total = 0.0
    for x, length in zip(start["x"], start["length"]):
      for t in range(int(length)):
        x = x * rate + t
      total += x.sum()
    return total

  got, want = jax.grad(staged)(1.1), jax.grad(plain)(1.1)
  np.testing.assert_allclose(got, want, rtol=1e-5)
  assert want != 0


def test_each_device_goes_down_its_own_ladder():
  mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
  lengths = [1, 1, 1, 1, 2, 9, 1, 1, 9, 9, 9, 9, 0, 0, 0, 0]
  start = rows(lengths)

  def local(row):
    out, tally = staged_while(step, row, alive, rungs=(4, 1))
    return out["x"], tally["rows"][None]

  run = jax.shard_map(
    local,
    mesh=mesh,
    in_specs=PartitionSpec("data"),
    out_specs=PartitionSpec("data"),
  )
  x, count = jax.jit(run)(start)
  np.testing.assert_allclose(x, alone(start), rtol=1e-5)
  np.testing.assert_array_equal(count, [4, 8 + 7, 36, 0])
  text = jax.jit(run).lower(start).compile().as_text()
  assert "all-reduce" not in text


@pytest.mark.parametrize("rungs", [(), (4,), (3, 3), (1, 3), (3, 0)])
def test_a_ladder_must_fall_from_all_rows(rungs):
  with pytest.raises(ValueError, match="rungs"):
    staged_while(step, rows([1, 2, 3]), alive, rungs=rungs)


@pytest.mark.parametrize("bad", [{"steps": 0}, {"steps": 2, "chunk": 0}])
def test_a_scan_needs_steps(bad):
  with pytest.raises(ValueError, match="at least 1"):
    masked_scan(step, rows([1, 2]), alive, **bad)


def test_rows_must_agree_on_their_number():
  ragged = rows([1, 2]) | {"x": jnp.zeros((3, 2))}
  with pytest.raises(ValueError, match="leading axis"):
    staged_while(step, ragged, alive)
