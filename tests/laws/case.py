# SPDX-License-Identifier: Apache-2.0
"""The matrix: one `Case` per method and adaptive primitive.

A case says how to make the parameters, the inputs, and a call under a budget;
`test_laws.py` holds it to every promise of the library.  A law that cannot
apply is named in `unless`, with the reason in words.

Axes: B batch, T tokens, D features, F hidden, M learners, L layers,
V vocabulary.
"""

import contextlib
import functools
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from adaptivejax.core import (
  buckets,
  chosen_decode,
  depth,
  experts,
  plans,
  rungs,
  sparse_attention,
  token_merging,
)
from adaptivejax.models import DecoderConfig
from adaptivejax.nn import Setting, adjust

T, D, F, M, L, V = 8, 16, 32, 4, 4, 13
PROMPT = 5
NEVER = 1.1  # above every probability and cosine
CONFIG = DecoderConfig(
  vocab=V, layers=L, features=D, hidden=F, heads=2, kv_heads=1, tied=False
)
ALL, SOME, NO = np.float32(-1e6), np.float32(0.8), np.float32(1e6)  # a tax


LAWS = (
  "full",  # the whole budget equals the dense layer
  "none",  # no budget is the identity, or the least the method can do
  "oracle",  # any budget equals the masked-dense definition
  "gradient",  # so do the gradients
  "cover",  # however the rows are cut into chunks
  "row",  # whichever rows share the batch
  "poison",  # NaN in what is not selected goes nowhere
  "poison_gradient",  # nor into gradients
  "eager",  # with and without jit
  "trace",  # one trace for all budgets
  "vmap",  # vmap equals a loop
  "bf16",  # 16 bits come close
  "sharded",  # on eight devices, the compiler spreading the batch
  "shard_map",  # on eight devices, each with its rows
  "export",  # lowers for tpu and cuda
  "linen",  # as a Linen module
  "pure",  # the module is unchanged by a call
  "cost",  # the returned cost is that of the decision
)


class Vacuous(AssertionError):
  """A law that these numbers say nothing of."""


@dataclass(frozen=True)
class Case:
  """What the laws need to know.

  Attributes:
    name: of the test.
    method: dotted name of the module under `methods`, or of the primitive.
    build: makes the parameters, a module or a pytree.
    inputs: B -> arrays with B leading.
    call: `(parameters, inputs, budget) -> (y, cost)`, y with B leading.
    full, some, none: budgets; data unless `static`.
    dense: `(parameters, inputs) -> y` of the whole budget.
    least: the same of no budget.
    poison: plants NaN in what the budget it returns leaves out:
      `(parameters, inputs) -> (parameters, inputs, budget, ignore)`, `ignore`
      marking outputs that are NaN by right (or None).
    place: puts the budget into the parameters, where they hold it.
    overhead: FLOPs of deciding, at most: `(parameters, inputs) -> float`.
    static: why the budget is static, if it is.
    same_shape: budgets that share a trace, if not the three above.
    unless: law -> why it does not apply.
  """

  name: str
  method: str
  build: Callable[[nnx.Rngs], Any]
  inputs: Callable[[int], Any]
  call: Callable[[Any, Any, Any], tuple[Any, Any]]
  full: Any
  some: Any
  none: Any
  dense: Callable[[Any, Any], Any]
  least: Callable[[Any, Any], Any]
  poison: Callable[[Any, Any], tuple[Any, Any, Any, Any]] | None = None
  place: Callable[[Any, Any], Any] = lambda params, budget: params
  overhead: Callable[[Any, Any], float] = lambda params, x: 0.0
  static: str = ""
  same_shape: tuple[Any, ...] = ()
  unless: Mapping[str, str] = field(default_factory=dict)

  @property
  def traced(self):
    return self.same_shape or (self.some, self.full, self.none)

  def data(self, budget):
    """The budget as arrays, where it is data."""
    return budget if self.static else jax.tree.map(jnp.asarray, budget)

  def run(self, params, x, budget):
    """The call under a budget."""
    budget = self.data(budget)
    return self.call(self.place(params, budget), x, budget)

  def __hash__(self):
    return hash(self.name)


@functools.cache
def parameters(case: Case, seed: int = 0):
  """Parameters off their initial values, which hide mistakes (ones, zeros)."""
  params = case.build(nnx.Rngs(seed))
  leaves, tree = jax.tree.flatten(params)
  keys = jax.random.split(jax.random.key(seed + 1), len(leaves))
  shaken = [
    a + 0.1 * jax.random.normal(k, a.shape) for a, k in zip(leaves, keys)
  ]
  params = jax.tree.unflatten(tree, shaken)
  has_budget = isinstance(params, nnx.Module) and nnx.state(params, Setting)
  return adjust(params, 0.0) if has_budget else params


def _asked_always(due, halt):
  """The twin of `only_after`."""

  def rule(l, before, after, memory):
    stop, seen = halt(l, before, after, memory)
    keep = lambda new, old: jnp.where(due(l), new, old)
    return stop & due(l), jax.tree.map(keep, seen, memory)

  return rule


EXECUTORS = {
  "attend_blocks": (
    sparse_attention.attend_blocks,
    sparse_attention.attend_blocks_dense,
  ),
  "expert_apply": (experts.expert_apply, experts.expert_apply_dense),
  "bucketed": (buckets.bucketed, buckets.masked),
  "depth_loop": (depth.depth_loop, depth.depth_scan),
  "only_after": (depth.only_after, _asked_always),
  "on_rung": (rungs.on_rung, rungs.on_all),
  "run_if": (plans.run_if, plans.run_anyway),
  "settle": (token_merging.settle, token_merging.settle_masked),
  "decode_chosen": (
    chosen_decode.decode_chosen,
    chosen_decode.decode_chosen_masked,
  ),
}


@contextlib.contextmanager
def dense_twin():
  """Every executor replaced by its masked-dense twin, wherever it is used."""
  with contextlib.ExitStack() as stack:
    for name, module in list(sys.modules.items()):
      for attribute, (executor, twin) in EXECUTORS.items():
        uses = getattr(module, attribute, None) is executor
        if name.startswith("adaptivejax.") and uses:
          stack.enter_context(mock.patch.object(module, attribute, twin))
    yield


@functools.cache
def compiled(case: Case):
  """The call, compiled; one for all laws."""
  return jax.jit(case.run, static_argnums=2 if case.static else None)


def loss(case: Case, params, x, budget, ignore=False):
  """`(loss, y)`: the loss tells outputs apart, but for those to `ignore`."""
  y = jnp.where(ignore, 0, case.run(params, x, budget)[0])
  return jnp.sin(y).sum(), y


def differentiate(f, params, x):
  """`(y, gradients)` by the parameters and the floating-point inputs."""
  leaves, tree = jax.tree.flatten((params, x))
  moving = [jnp.issubdtype(a.dtype, jnp.floating) for a in leaves]

  def g(floats):
    rest = iter(floats)
    filled = [next(rest) if m else a for m, a in zip(moving, leaves)]
    return f(*jax.tree.unflatten(tree, filled))

  floats = [a for m, a in zip(moving, leaves) if m]
  grads, y = jax.grad(g, has_aux=True)(floats)
  return y, grads


def gradient(case: Case, params, x, budget, ignore=False):
  """`(y, gradients of the loss)`."""
  f = lambda params, x: loss(case, params, x, budget, ignore)
  return differentiate(f, params, x)


def close(got, want, *, tolerance=1e-5, scale=None):
  """Equal within `tolerance` of the largest value."""
  got, want = jax.tree.leaves(got), jax.tree.leaves(want)
  scales = want if scale is None else [scale] * len(want)
  for g, w, s in zip(got, want, scales, strict=True):
    assert g.shape == w.shape
    size = float(np.abs(np.asarray(s)).max(initial=1e-3))
    np.testing.assert_allclose(g, w, rtol=0, atol=tolerance * size)


@contextlib.contextmanager
def no_writes():
  """Refuses that a module writes to itself once it is made.

  A case may call a copy of what it is given, so that to compare what was given
  before and after would show nothing.
  """
  writes = nnx.Module.__setattr__

  def refuse(self, name, value):
    frame, own = sys._getframe(1), []
    while frame is not None:
      if frame.f_locals.get("self") is self:
        own.append(frame.f_code.co_name)
      frame = frame.f_back
    direct = sys._getframe(1).f_locals.get("self") is self
    if direct and "__init__" not in own:
      raise AssertionError(f"{type(self).__name__} writes {name} in {own[0]}")
    writes(self, name, value)

  with mock.patch.object(nnx.Module, "__setattr__", refuse):
    yield


def gaussian(*shape, seed=0):
  return jax.random.normal(jax.random.key(seed), shape)


def some_rows(batch):
  """Rows, and their scores: distinct, known, and exact in bf16."""
  ranks = np.random.default_rng(1).permuted(
    np.tile(np.arange(T), (batch, 1)), axis=1
  )
  score = (ranks.astype(np.float32) + 0.5) / T
  return {"rows": gaussian(batch, T, D), "score": jnp.asarray(score)}


def poisoned_items(selected, budget):
  def poison(params, x):
    out = ~selected(x["score"], budget)[..., None]
    return (
      params,
      {**x, "rows": jnp.where(out, jnp.nan, x["rows"])},
      budget,
      out,
    )

  return poison
