# SPDX-License-Identifier: Apache-2.0
"""What headlines on needles share; see `benchmarks.long_context`.

All tokens that a query reads count as its budget, those that it reads whatever
happens included.
"""

from adaptivejax.nn import Look
from benchmarks.long_context import LookFactory, accuracy

BUDGETS = 64, 256
LENGTH = 4096


def found(name: str, factory: LookFactory, quick: bool) -> dict[str, float]:
  """Accuracy at each budget, by `name_budget`; and with all keys."""
  few = {"length": 512, "count": 8} if quick else {"length": LENGTH}
  right = accuracy(factory, BUDGETS, quick=quick, **few)
  figures = {f"{name}_{budget}": share for budget, share in right.items()}
  whole = accuracy(lambda budget: Look(), (LENGTH,), quick=quick, **few)
  return {**figures, "all": whole[LENGTH]}
