# SPDX-License-Identifier: Apache-2.0
"""Device-varying types inside `jax.shard_map`.

A predicate that differs between devices must not enclose a collective: some
devices would never arrive.  The transpose of using a replicated weight *is* a
collective (a `psum`), so differentiating such a conditional deadlocks, unless
every operand is made device-varying before it.  Then the `psum` lands outside.
"""

from typing import Any

import jax
from jax import lax


def varying_axes(*trees: Any) -> frozenset[str]:
  """The mesh axes over which any array or aval differs (static)."""
  axes: frozenset[str] = frozenset()
  for leaf in jax.tree.leaves(trees):
    aval = leaf if isinstance(leaf, jax.core.ShapedArray) else jax.typeof(leaf)
    manual = getattr(aval, "manual_axis_type", None)
    axes |= frozenset(getattr(manual, "varying", None) or ())
  return axes


def vary(tree: Any, axes: frozenset[str]) -> Any:
  """Marks every leaf as differing over `axes`; a no-op outside `shard_map`."""

  def mark(leaf):
    missing = tuple(sorted(axes - varying_axes(leaf)))
    return lax.pcast(leaf, missing, to="varying") if missing else leaf

  return jax.tree.map(mark, tree) if axes else tree
