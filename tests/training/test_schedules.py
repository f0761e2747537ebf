# SPDX-License-Identifier: Apache-2.0
"""Law: a budget starts dense, comes down, and stays where it was told to."""

import jax
import pytest

from adaptivejax.training import schedules


@pytest.mark.parametrize("kind", [schedules.linear, schedules.cosine])
def test_goes_from_start_to_end_and_stays(kind):
  share = kind(0.25, steps=100, begin=10)
  assert share(0) == share(10) == 1.0
  assert share(60) == pytest.approx(0.625)
  assert share(110) == share(10_000) == 0.25
  values = jax.vmap(share)(jax.numpy.arange(120))
  assert (values[1:] <= values[:-1]).all()


def test_constant_is_constant_under_jit():
  share = jax.jit(schedules.constant(0.5))
  assert share(0) == share(1000) == 0.5


@pytest.mark.parametrize(
  ("make", "named"),
  [
    (lambda: schedules.constant(0.0), "share=0.0"),
    (lambda: schedules.linear(1.5, steps=3), "end=1.5"),
    (lambda: schedules.cosine(0.5, start=-1.0, steps=3), "start=-1.0"),
    (lambda: schedules.cosine(0.5, steps=0), "steps=0"),
    (lambda: schedules.linear(0.5, steps=3, begin=-2), "begin=-2"),
  ],
)
def test_refuses_what_is_no_share(make, named):
  with pytest.raises(ValueError, match=named):
    make()
