# SPDX-License-Identifier: Apache-2.0
"""What a program says of work whose amount is data, for who reads its text.

How many rows a loop visits, or a kernel is given, is not to be seen in a
compiled program.  So the names that XLA keeps for each instruction
(`jax.named_scope`) tell: what is marked here is read by `training.hlo_cost`.
"""

import contextlib
import re

import jax

MARK = re.compile(r"\b(rows|of|asked|once)_(\d+)\b")


def marked(
  *,
  rows: int | None = None,
  of: int | None = None,
  asked: int | None = None,
  once: bool | None = None,
) -> contextlib.AbstractContextManager:
  """Marks what is computed inside.

  Args:
    rows: there are at most, over all rounds of a loop or in all of a kernel.
    of: them, so many in a round.
    asked: so many of the rows do data ask for, at most.
    once: whether one round will do where the load is even.

  All are static; what is None is not said.
  """
  said = {"rows": rows, "of": of, "asked": asked, "once": once}
  names = [f"{k}_{int(v)}" for k, v in said.items() if v is not None]
  return jax.named_scope("/".join(names))


def marks(name: str) -> dict[str, int]:
  """What the name of an instruction says; of several, the innermost."""
  return {key: int(value) for key, value in MARK.findall(name)}
