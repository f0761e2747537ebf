# SPDX-License-Identifier: Apache-2.0
"""Mixtures of experts: a router, stacked feed-forward layers, one dispatch.

A *router* is a module called as `router(x, live, key)` that returns a
`Routing`; a method of this family is such a rule and its losses.  Items that
are not live reach it as zeros, and whatever it says of them is ignored.
Experts may be spread over devices: see `nn.shard_experts`.

Axes: D features, E experts, K choices per item.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Key

from adaptivejax.core.cost import Cost, Signals, flops
from adaptivejax.core.covers import Cover
from adaptivejax.core.dispatch import NOBODY, dispatch, dispatch_mask
from adaptivejax.core.expert_parallel import expert_apply_parallel
from adaptivejax.core.experts import expert_apply
from adaptivejax.core.per_device import (
  EXPERT_AXIS,
  WIDTH_AXIS,
  auto_axes,
  dividing,
  layout_of,
  on_each_device,
)
from adaptivejax.core.varying import vary, varying_axes
from adaptivejax.nn.block import only
from adaptivejax.nn.mlp import Mlp, join_mlp
from adaptivejax.nn.routing import Routing, only_live

Here = Callable[[Mlp, Array, Array, Array], tuple[Array, Cost]]
"""`(experts, x [N, D], chosen i32[N, K], weights [N, K]) -> (y, cost)`."""


@dataclasses.dataclass(frozen=True)
class ExpertSharding:
  """Where the experts of a layer are, which then runs inside `shard_map`."""

  axis: str | tuple[str, ...] | None
  """Mesh axes that experts and items are spread over; None: all are here."""
  width: str | None = None
  """Mesh axis over which the hidden features of each expert are split."""
  chunks: int = 1
  """Parts of an exchange, so that one may travel while another is computed."""


class MixtureOfExperts(nnx.Module):
  """A feed-forward module of routed experts; called like `nn.Mlp`.

  Args:
    router: the rule.
    experts: an `Mlp` whose parameters are stacked over E (`stacked`).
    shared: runs on every item besides, if given.
    over: where the experts are, if not all here (static; `shard_experts`).
      What the layer says of itself, cost, penalty and load, is then of the
      items of this device.
  """

  def __init__(
    self,
    router: nnx.Module,
    experts: Mlp,
    shared: Mlp | None = None,
    *,
    over: ExpertSharding | None = None,
  ):
    self.router = router
    self.experts = experts
    self.shared = shared
    self.over = over
    among = getattr(router, "count", self.count)
    if among != self.count:
      raise ValueError(
        f"the router chooses among {among} experts, but there are"
        f" {self.count}: give both the same number."
      )

  @property
  def count(self) -> int:
    """E, the experts; inside `shard_map` those of this device."""
    return self.experts.down.kernel.shape[0]

  def __call__(
    self,
    x: Float[Array, "*N D"],
    live: Bool[Array, "*N"] | None = None,
    key: Key[Array, ""] | None = None,
  ) -> tuple[Float[Array, "*N D"], Cost, Signals]:
    x = only(live, x)
    routing = self.router(x, live, key)
    y, cost, signals = apply_experts(
      self.experts, x, routing, live, key, self.over
    )
    asked = flops(lambda r, x: r(x, live, key), self.router, x)
    cost = cost.with_overhead(asked)
    if self.shared is not None:
      more, spent, _ = self.shared(x, live)
      y, cost = y + more, cost + spent
    return y, cost, signals


def apply_experts(
  experts: Mlp,
  x: Float[Array, "*N D"],
  routing: Routing,
  live: Bool[Array, "*N"] | None,
  key: Key[Array, ""] | None = None,
  over: ExpertSharding | None = None,
) -> tuple[Float[Array, "*N D"], Cost, Signals]:
  """What the experts make of each item, weighted; zero for items without.

  The penalty of the routing counts in training, where there is a `key`.
  """
  count = experts.down.kernel.shape[0]
  if over is not None and over.axis is not None:
    count *= lax.axis_size(over.axis)
  chosen = only_live(routing.experts, live)
  items = x, chosen, routing.weights
  if over is None and (mesh := auto_axes()):
    y, cost = _over_mesh(mesh, experts, items, _here)
  else:
    y, cost = _run(over, _here, items, experts)
  cost = cost._replace(dropped=cost.dropped + routing.dropped)
  mask = (chosen[..., None] == jnp.arange(count)).any(-2)
  penalty = jnp.float32(0) if key is None else routing.penalty
  return y, cost, expert_signals(mask, penalty)


def apply_masked_experts(
  experts: Mlp,
  x: Float[Array, "*N D"],
  mask: Bool[Array, "*N E"],
  weights: Float[Array, "*N E"],
  *,
  cover: Cover | None = None,
) -> tuple[Float[Array, "*N D"], Cost]:
  """The same of a matrix of choices, for rules that choose any number.

  Args:
    experts: E of them.
    x: the items.
    mask: who runs what (dynamic).
    weights: of the choices; those of others are not read.
    cover: chunk sizes for the items of one expert, where all are on one device.
  """

  def here(experts, x, chosen, weights):
    plan = dispatch_mask(chosen >= 0, weights)
    f = lambda r, m: m.rows(r)
    return expert_apply(f, x, plan, experts, cover=None if mesh else cover)

  mesh = auto_axes()
  each = jnp.arange(mask.shape[-1], dtype=jnp.int32)
  items = x, jnp.where(mask, each, NOBODY), weights
  if mesh:
    return _over_mesh(mesh, experts, items, here)
  return _run(None, here, items, experts)


def apply_all_experts(
  experts: Mlp, x: Float[Array, "*N D"], weights: Float[Array, "*N E"]
) -> tuple[Float[Array, "*N D"], Cost]:
  """All experts on all items: one wide layer, its neurons scaled in blocks."""
  if experts.down.bias is not None:
    raise ValueError("one wide layer has one bias: make experts without.")

  def run(experts, x, weights):
    wide = join_mlp(experts)
    h = wide.hidden(x)
    scale = jnp.repeat(weights, experts.down.kernel.shape[1], axis=-1)
    return wide.down(h * scale.astype(h.dtype))

  cost = Cost.dense(flops(run, experts, x, weights), weights.size)
  return run(experts, x, weights), cost


def expert_signals(
  mask: Bool[Array, "*N E"], penalty: Float[Array, ""] | float = 0.0
) -> Signals:
  """What a mixture tells: how many experts ran, which, and of which items.

  The share is realised: it has no gradient, so a budget loss cannot move it.
  """
  used = mask.astype(jnp.float32)
  load = used.reshape(-1, used.shape[-1]).sum(0)
  return Signals(used.mean(), jnp.float32(penalty), (load,), (used.sum(-1),))


def _over_mesh(
  mesh: dict[str, int], experts: Mlp, items: tuple[Array, ...], here: Here
) -> tuple[Array, Cost]:
  """Under an ambient mesh: items, experts and widths lie where it says.

  Kernels cannot be sharded by the compiler, so all is told here.
  """
  layout = layout_of(items[0].shape[:-1])
  count, hidden, _ = experts.down.kernel.shape
  axis = EXPERT_AXIS if EXPERT_AXIS in layout.batch else None
  if axis is not None and count % mesh[axis]:
    axis = None
  bare = experts.down.bias is None
  width = WIDTH_AXIS if bare and dividing((WIDTH_AXIS,), hidden) else None
  over = ExpertSharding(axis, width)
  return on_each_device(
    functools.partial(_run, over, here),
    items,
    experts,
    layout,
    specs=mlp_specs(experts, axis, width),
    axes=mesh,
  )


def mlp_specs(
  experts: Mlp, axis: str | tuple[str, ...] | None, width: str | None
) -> Mlp:
  """`PartitionSpec`s of stacked experts, over mesh axes; see `ExpertSharding`.

  Axes of layers may come before that of the experts.

  Raises:
    ValueError: every slice of an expert would add its output's bias.
  """
  if width is not None and experts.down.bias is not None:
    raise ValueError(
      f"experts whose output has a bias are not split over mesh axis `{width}`:"
      " make them without, or split their number only."
    )
  rank = experts.down.kernel.ndim
  lead = *[None] * (rank - 3), axis

  def of(kernel, bias):
    return lambda a: kernel if a.ndim == rank else bias

  into = of(P(*lead, None, width), P(*lead, width))
  specs = jax.tree.map(into, experts)
  specs.down = jax.tree.map(of(P(*lead, width), P(*lead)), experts.down)
  return specs


def _run(
  over: ExpertSharding | None,
  here: Here,
  items: tuple[Array, ...],
  experts: Mlp,
) -> tuple[Array, Cost]:
  """Of items and their choices, `here` being how those of one device run."""
  flat = [a.reshape(-1, a.shape[-1]) for a in items]
  run = here if over is None else functools.partial(_there, over, here)
  y, cost = run(experts, *flat)
  return y.reshape(items[0].shape), cost


def _here(experts: Mlp, x, chosen, weights) -> tuple[Array, Cost]:
  """All experts are on this device."""
  plan = dispatch(chosen, weights, experts.down.kernel.shape[0])
  return expert_apply(
    lambda r, m: m.rows(r),
    x,
    plan,
    experts,
    together=lambda r, m, product: m.rows(r, product),
  )


def _there(
  over: ExpertSharding, here: Here, experts: Mlp, x, chosen, weights
) -> tuple[Array, Cost]:
  """Experts, or slices of them, are on several devices."""
  if over.axis is not None:
    return expert_apply_parallel(
      lambda r, m: m.rows(r),
      x,
      chosen,
      weights,
      experts,
      axis=over.axis,
      width=over.width,
      chunks=over.chunks,
      together=lambda r, m, product: m.rows(r, product),
    )
  # what is the same on all slices is summed over them outside of the loops
  x, weights = vary((x, weights), varying_axes(experts))
  y, cost = here(experts, x, chosen, weights)
  if over.width is None:
    return y, cost
  slices = lax.axis_size(over.width)
  cost = cost._replace(
    spent=cost.spent * slices,
    full=cost.full * slices,
    bound=cost.bound * slices,
  )
  return lax.psum(y, over.width), cost
