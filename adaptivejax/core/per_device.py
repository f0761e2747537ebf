# SPDX-License-Identifier: Apache-2.0
"""Each device decides for the items it holds: what an ambient mesh changes.

Under `jit` with sharded arrays the compiler does not see that a selection of
rows is a selection on each device: every device would compute all selected
rows.  Where there is an ambient mesh (`jax.set_mesh`) with axes of these names,

    data, fsdp, expert    over which the batch lies
    seq                   over which the tokens of a sequence lie
    model                 over which heads and hidden features lie

adaptive operations run in a `jax.shard_map` of their own over the first four:
predicates are local, a device with few selected items is done early, and what
they cost is summed.  The compiler goes on to shard over `model`.  Without a
mesh, and inside of a `shard_map`, an operation runs as it is written.  Axes
that do not divide the batch are left out, the last first: then devices repeat
one another's work, which no cost counts; nor does a sequence lie over `seq`
that it does not divide.  What a row-wise `f` closes over must be given as an
operand, as inside of `shard_map`.

Where devices wait for one another.  A branch that some of them enter holds no
collective, so shards of very different budgets neither hang nor do one
another's work.  They are in step only where they exchange something:

    sums of costs       after an operation, outside of all its branches
    experts             the rounds of all-to-all are those of the fullest
                        destination, by `pmax` (`core.expert_parallel`)
    a sequence          n turns of a ring over n devices, whatever a device has
                        to look at in each (`core.ring`)

and where the compiler sums gradients and activations over the mesh.

Axis types must be `jax.sharding.AxisType.Auto`.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
from jax import lax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from jaxtyping import Array

EXPERT_AXIS = "expert"
BATCH_AXES = "data", "fsdp", EXPERT_AXIS
TOKEN_AXIS = "seq"
WIDTH_AXIS = "model"
OURS = *BATCH_AXES, TOKEN_AXIS, WIDTH_AXIS
WHOLE = P()


class Layout(NamedTuple):
  """Where the leading axes of items lie on the ambient mesh (static).

  Attributes:
    batch: mesh axes of the first axis.
    tokens: mesh axes of the second, () or (`seq`,).
  """

  batch: tuple[str, ...] = ()
  tokens: tuple[str, ...] = ()

  @property
  def axes(self) -> tuple[str, ...]:
    """All of them, none where an operation runs as it is written."""
    return self.batch + self.tokens

  @property
  def spec(self) -> P:
    """Of an array of items."""
    batch = self.batch or None
    return P(batch, self.tokens) if self.tokens else P(batch)


def layout_of(lead: Sequence[int]) -> Layout:
  """The layout of items with the leading axes `lead`, of which one or two."""
  batch = dividing(BATCH_AXES, lead[0])
  tokens = dividing((TOKEN_AXIS,), lead[1]) if len(lead) > 1 else ()
  return Layout(batch, tokens)


def auto_axes() -> dict[str, int]:
  """The ambient mesh: axes that the compiler shards over, and their sizes.

  None inside of a `jax.shard_map`, whatever axes that is over.

  Raises:
    ValueError: an axis of our names is `Explicit`.
  """
  mesh = jax.sharding.get_abstract_mesh()
  kinds = dict(zip(mesh.axis_names, mesh.axis_types))
  if AxisType.Manual in kinds.values():
    return {}
  explicit = [name for name in OURS if kinds.get(name) == AxisType.Explicit]
  if explicit:
    raise ValueError(
      f"mesh axes {explicit} are Explicit, as `jax.make_mesh` makes them: give"
      " it `axis_types=(jax.sharding.AxisType.Auto,) * n`."
    )
  return {
    n: mesh.shape[n] for n, kind in kinds.items() if kind == AxisType.Auto
  }


def on_each_device(
  f: Callable[[Any, Any], tuple[Any, Any]],
  items: Any,
  shared: Any,
  layout: Layout,
  *,
  specs: Any = WHOLE,
  axes: Iterable[str] = (),
) -> tuple[Any, Any]:
  """`f(items, shared) -> (y, cost)` of the items of each device.

  Args:
    f: closes over nothing that is traced.
    items: pytree of arrays that `layout` describes, as is that of `y`.
    shared: pytree of arrays that are laid out by `specs`: whole, if not given.
    layout: where items are.
    specs: of `shared`, a prefix of it.
    axes: more mesh axes that the compiler shall not shard over.

  Returns:
    `y`, and the sum of the costs over the devices of the layout.
  """

  def local(items, shared):
    y, cost = f(items, shared)
    return y, jax.tree.map(lambda a: lax.psum(a, layout.axes), cost)

  single = (name for name, size in auto_axes().items() if size == 1)
  return jax.shard_map(
    local,
    in_specs=(layout.spec, specs),
    out_specs=(layout.spec, P()),
    axis_names={*layout.axes, *axes, *single},
  )(items, shared)


def settled(x: Array) -> Array:
  """Activations [B, T, D] where their items are, the rest whole.

  It tells the compiler what it would else have to guess from the parameters.
  """
  layout = layout_of(x.shape[:2])
  return lax.with_sharding_constraint(x, layout.spec) if layout.axes else x


def dividing(names: Sequence[str], size: int) -> tuple[str, ...]:
  """Axes of the ambient mesh of these names: the first that divide `size`."""
  mesh = auto_axes()
  there = tuple(name for name in names if mesh.get(name, 1) > 1)
  while size % math.prod(mesh[name] for name in there):
    there = there[:-1]
  return there
