# SPDX-License-Identifier: Apache-2.0
"""The promises of the library, each over every method and primitive.

Tolerance is relative to the largest value: 1e-5 in f32, 2e-2 in bf16.
"""

import functools
import subprocess
import sys
from pathlib import Path
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from adaptivejax.core import covers
from adaptivejax.linen import ToLinen, variables_of
from tests.laws import (
  ATTENTION,
  BLOCKS,
  CASES,
  CONTEXTS,
  DECODING_ATTENTION,
  EXITS,
  EXPERTS,
  KV,
  LAWS,
  LAYERS,
  MODELS,
  PARALLEL,
  POLICIES,
  PRIMITIVES,
  RECURRENT,
  TOKENS,
  TRAINED_ATTENTION,
  Case,
  close,
  compiled,
  dense_twin,
  gradient,
  no_writes,
  parameters,
)

B = 2


def law(name):
  """Runs a test over the cases that the law applies to."""
  cases = [case for case in CASES if name not in case.unless]
  return pytest.mark.parametrize("case", cases, ids=lambda case: case.name)


def given(case: Case, batch: int = B):
  return parameters(case), case.inputs(batch)


@functools.cache
def result(case: Case, which: str, batch: int = B):
  """`(y, cost)` of the compiled call at a named budget."""
  return compiled(case)(*given(case, batch), getattr(case, which))


@functools.cache
def gradients(case: Case):
  f = lambda params, x, budget, ignore: gradient(
    case, params, x, budget, ignore
  )
  return jax.jit(f, static_argnums=2 if case.static else None)


@functools.cache
def poisoned(case: Case):
  """`(params, x, budget, ignore)`, planted; nothing to ignore is all False."""
  params, x, budget, ignore = case.poison(*given(case))
  return params, x, budget, jnp.asarray(False if ignore is None else ignore)


def nothing_ignored(case: Case):
  """In the shape of `poisoned`: both laws of gradients share a program."""
  return (
    jnp.zeros_like(poisoned(case)[3]) if case.poison else jnp.zeros((), bool)
  )


@functools.cache
def twin(case: Case):
  """`(y, gradients)` of the masked-dense twin; no gradients if none are due."""
  if "gradient" in case.unless:
    f = lambda params, x: (case.run(params, x, case.some)[0], None)
  else:
    f = lambda params, x: gradient(case, params, x, case.some)
  with dense_twin():
    traced = jax.jit(f).trace(*given(case))
  return traced.lower().compile()(*given(case))


def fresh(f, params, x, budget):
  """Traced anew, as after a patch."""
  return jax.jit(lambda params, x: f(params, x, budget))(params, x)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_what_does_not_apply_is_said_in_words(case):
  assert set(case.unless) <= set(LAWS)
  assert all(len(reason.split()) > 2 for reason in case.unless.values())


def oracle(f, case):
  """What `f` makes of the case; compiled, unless it is written in NumPy."""
  try:
    return jax.jit(f)(*given(case))
  except jax.errors.TracerArrayConversionError:
    return f(*given(case))


@law("full")
def test_full_budget_is_dense(case):
  close(result(case, "full")[0], oracle(case.dense, case))


@law("none")
def test_no_budget_is_the_least(case):
  close(result(case, "none")[0], oracle(case.least, case))


@law("oracle")
def test_equals_the_masked_dense_twin(case):
  with dense_twin():
    run = lambda params, x: case.run(params, x, case.some)[0]
    jaxpr = jax.make_jaxpr(run)(*given(case))
  assert "cond[" not in str(jaxpr), "the twin skips nothing"
  close(result(case, "some")[0], twin(case)[0])


@law("gradient")
def test_gradients_equal_the_masked_dense_twin(case):
  got = gradients(case)(*given(case), case.some, nothing_ignored(case))
  close(got, twin(case))


@law("cover")
@pytest.mark.parametrize(
  "cover", [covers.tiles(3), covers.ladder(1, 5, 8)], ids=["tiles", "ladder"]
)
def test_no_cover_changes_the_result(case, cover):
  smaller = lambda n: cover if n >= 8 else covers.tiles(1)
  with (
    mock.patch("adaptivejax.core.buckets.default_cover", smaller),
    mock.patch("adaptivejax.core.experts.expert_cover", smaller),
  ):
    y, cost = fresh(case.run, *given(case), case.some)
  close(y, result(case, "some")[0])
  close(cost.items, result(case, "some")[1].items)


@law("row")
@pytest.mark.parametrize("which", ["some", "none"])
def test_a_row_alone_is_the_row_in_a_batch(case, which):
  params, x = given(case)
  together, _ = result(case, which)
  for i in range(B):
    alone = jax.tree.map(lambda a: a[i : i + 1], x)  # noqa: B023
    y, _ = compiled(case)(params, alone, getattr(case, which))
    close(y[0], together[i], scale=together)
  swapped = jax.tree.map(lambda a: a[::-1], x)
  y, _ = compiled(case)(params, swapped, getattr(case, which))
  close(y[::-1], together)


@law("poison")
def test_nan_in_what_is_not_selected_goes_nowhere(case):
  bad_params, bad_x, budget, ignore = poisoned(case)
  clean = lambda y: jnp.where(ignore, 0, y)
  got = clean(compiled(case)(bad_params, bad_x, budget)[0])
  close(got, clean(compiled(case)(*given(case), budget)[0]))


@law("poison_gradient")
def test_nan_in_what_is_not_selected_reaches_no_gradient(case):
  bad_params, bad_x, budget, ignore = poisoned(case)
  got = gradients(case)(bad_params, bad_x, budget, ignore)
  close(got, gradients(case)(*given(case), budget, ignore))


@law("eager")
def test_jit_changes_nothing(case):
  close(case.run(*given(case), case.some), result(case, "some"))


@law("trace")
def test_one_trace_serves_all_budgets(case):
  run = jax.jit(case.run)
  for budget in case.traced:
    run(*given(case), budget)
  assert run._cache_size() == 1


@law("vmap")
def test_vmap_is_a_loop(case):
  params, x = given(case)
  xs = [x, jax.tree.map(lambda a: a[::-1], x)]
  budgets = case.traced[:2]
  stack = lambda trees: jax.tree.map(lambda *a: jnp.stack(a), *trees)
  if case.static:
    run = lambda x: case.run(params, x, case.some)[0]
    got = jax.jit(jax.vmap(run))(stack(xs))
    budgets = (case.some, case.some)
  else:
    run = lambda x, budget: case.run(params, x, budget)[0]
    got = jax.jit(jax.vmap(run))(stack(xs), stack(budgets))
  for i, (x, budget) in enumerate(zip(xs, budgets)):
    close(got[i], compiled(case)(params, x, budget)[0])


@law("bf16")
@pytest.mark.parametrize("which", ["full", "none"])
def test_sixteen_bits_come_close(case, which):
  """Where rounding cannot turn a decision."""
  floating = lambda a: jnp.issubdtype(a.dtype, jnp.floating)
  cast = lambda tree, dtype: jax.tree.map(
    lambda a: a.astype(dtype) if floating(a) else a, tree
  )
  # Random layers amplify rounding: a seed where the reference does not.
  narrow = cast((parameters(case, 3), case.inputs(B)), jnp.bfloat16)
  budget = getattr(case, which)
  y, _ = compiled(case)(*narrow, budget)
  want, _ = compiled(case)(*cast(narrow, jnp.float32), budget)
  close(cast(y, jnp.float32), want, tolerance=2e-2)


@law("export")
@pytest.mark.parametrize("platform", ["tpu", "cuda"])
def test_lowers_for_accelerators(case, platform):
  if "gradient" in case.unless:
    f, args = compiled(case), (*given(case), case.some)
  else:
    f = gradients(case)
    args = (*given(case), case.some, nothing_ignored(case))
  exported = jax.export.export(f, platforms=[platform])(*args)
  assert exported.platforms == (platform,)


class _Twin:
  """The Linen form of a module where a case calls the module."""

  def __init__(self, case, module):
    self._linen = ToLinen(case.build)
    self._variables = variables_of(module)
    self._module = module

  def __call__(self, *args, **kwargs):
    return self._linen.apply(self._variables, *args, **kwargs)

  def __getattr__(self, name):
    return getattr(self._module, name)


@law("linen")
def test_linen_agrees(case):
  params, x = given(case)
  budget = case.data(case.some)
  module = case.place(params, budget)
  run = jax.jit(lambda x: case.call(_Twin(case, module), x, budget))
  close(run(x), result(case, "some"))


@law("pure")
def test_a_call_leaves_the_module_unchanged(case):
  """What a call writes, it writes as it is traced."""
  params, x = given(case)
  budget = case.data(case.some)
  module = case.place(params, budget)
  before, tree = jax.tree.flatten(module)
  before = [np.array(a) for a in before]
  with no_writes():
    jax.eval_shape(lambda x: case.call(module, x, budget), x)
  after, tree_after = jax.tree.flatten(module)
  assert tree == tree_after
  for a, b in zip(before, after):
    np.testing.assert_array_equal(a, b)


@law("cost")
def test_the_cost_is_that_of_the_decision(case):
  params, x = given(case)
  overhead = case.overhead(params, x)
  costs = [result(case, which)[1] for which in ("none", "some", "full")]
  for cost in costs:
    assert 0 <= cost.items <= cost.capacity
    assert cost.dropped == 0
    assert cost.spent <= (cost.full + overhead) * (1 + 1e-6)
    assert cost.spent <= cost.bound <= 2 * (cost.full + overhead)
    if not case.static and not case.same_shape:  # shapes alone bound it
      assert cost.bound == costs[-1].bound
    np.testing.assert_allclose(cost.full, costs[-1].full, rtol=1e-6)
  none, some, full = (float(cost.spent) for cost in costs)
  assert none < some < full, "the three budgets decide differently"
  assert full >= float(costs[-1].full) * (1 - 1e-6)


@pytest.mark.parametrize(
  "cases",
  [
    PRIMITIVES,
    [*LAYERS, *RECURRENT, *TRAINED_ATTENTION],
    [*EXPERTS, *BLOCKS, *PARALLEL],
    MODELS,
    EXITS,
    POLICIES,
    [*KV, *CONTEXTS],
    [*ATTENTION, *DECODING_ATTENTION],
    TOKENS,
  ],
  ids=[
    "primitives",
    "layers",
    "experts",
    "models",
    "exits",
    "policies",
    "kv",
    "attention",
    "tokens",
  ],
)
def test_eight_devices_agree_with_one(cases):
  """In a process of its own: a mistake here is a deadlock."""
  names = [case.name for case in cases]
  command = [sys.executable, "-m", "tests.devices", *names]
  root = Path(__file__).parents[1]
  try:
    done = subprocess.run(
      command, cwd=root, timeout=600, capture_output=True, text=True
    )
  except subprocess.TimeoutExpired as error:
    pytest.fail(f"deadlock, after these cases:\n{error.stdout}")
  assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
