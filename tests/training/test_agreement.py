# SPDX-License-Identifier: Apache-2.0
"""Law: processes go on alike, or all of them refuse.

Here the others are made up; `tests/scale/test_two_processes.py` has real ones.
"""

import numpy as np
import pytest

from adaptivejax.training import agreement

FACTS = {"the text": b"abc", "the config": {"steps": 3}}


@pytest.mark.parametrize("column", [0, 1])
def test_a_fact_that_differs_is_named(monkeypatch, column):
  def gather(ours):
    other = ours.copy()
    other[column] += 1
    return np.stack([ours, ours, other])

  monkeypatch.setattr(agreement, "everyone", gather)
  said = f"{[*FACTS][column]} of process 2 is not that of process 0"
  with pytest.raises(ValueError, match=said):
    agreement.check_same(FACTS)


def test_what_process_0_refuses_all_refuse(monkeypatch):
  def act():
    raise OSError("no space")

  with pytest.raises(OSError, match="no space"):
    agreement.by_writer(act)
  monkeypatch.setattr(agreement, "is_writer", lambda: False)
  agreement.by_writer(act)  # not here
  failed = lambda ours: np.stack([~ours, ours])
  monkeypatch.setattr(agreement, "everyone", failed)
  with pytest.raises(ValueError, match="process 0 cannot go on"):
    agreement.by_writer(act)


def test_alone_one_agrees():
  agreement.check_same(FACTS)
  assert agreement.is_writer()
  assert agreement.Agreement(None)(15) == 15
