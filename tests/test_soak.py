# SPDX-License-Identifier: Apache-2.0
"""Law: the soak holds drawn cases to the laws, and says what breaks them."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from tests import soak
from tests.laws import no_writes


class Forgetful(nnx.Module):
  def __call__(self, x):
    self.seen = x
    return x


def test_a_write_is_seen_though_it_is_to_a_copy():
  copy = lambda module: jax.tree.map(lambda a: a, module)
  with (
    no_writes(),
    pytest.raises(AssertionError, match="Forgetful writes seen"),
  ):
    jax.eval_shape(lambda x: copy(Forgetful())(x), jnp.ones(2))


CASES = ["bucketed", "soft_moe", "dynamic_top_p", "shapes of append"]


def test_a_small_soak(capsys):
  assert soak.main(["--minutes", "0", "--cases", "bucketed"]) == 0
  said = capsys.readouterr().out
  assert "0 failures" in said


@pytest.mark.parametrize("name", CASES)
def test_drawn_cases_hold(name):
  draws, held, failures = soak.soak(name, seed=1, seconds=0)
  assert not failures
  assert draws == soak.CHUNK and held >= draws


def test_a_broken_law_is_told_with_its_seed(monkeypatch):
  def wrong(case):
    bench = soak_bench(case)
    return bench._replace(check=lambda drawn: 1 / 0)

  soak_bench = soak.bench_of
  monkeypatch.setattr(soak, "bench_of", wrong)
  draws, held, (said,) = soak.soak("bucketed", seed=3, seconds=9)
  assert (draws, held) == (1, 0)
  assert said.startswith("bucketed, draw 1 of seed 3: ZeroDivisionError")


def test_the_same_seed_draws_the_same(monkeypatch):
  seen = []

  def record(case):
    bench = soak_bench(case)
    note = lambda drawn: seen.append(jax.tree.leaves(drawn)) or 1
    return bench._replace(check=note)

  soak_bench = soak.bench_of
  monkeypatch.setattr(soak, "bench_of", record)
  for _ in range(2):
    soak.soak("bucketed", seed=5, seconds=0)
  first, second = seen[: len(seen) // 2], seen[len(seen) // 2 :]
  assert len(first) == len(second) == soak.CHUNK
  for a, b in zip(first, second):
    assert all((x == y).all() for x, y in zip(a, b, strict=True))
