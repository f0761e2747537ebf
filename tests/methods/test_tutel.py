# SPDX-License-Identifier: Apache-2.0
"""Law: who is served is what a queue says, for every sign of the factor; and
how devices share the experts changes nothing.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from adaptivejax.core.dispatch import NOBODY, dispatch
from adaptivejax.core.experts import expert_apply
from adaptivejax.methods.experts import TutelRouter, tutel_capacity
from adaptivejax.nn import (
  MixtureOfExperts,
  Mlp,
  Routing,
  adjust,
  fastest_program,
  stacked,
)
from tests import program, reference

T, E, K, D = 23, 4, 2, 6
FACTORS = (2.0, 0.7, 0.1, 0.0, -0.7, -9.0)


class Given(nnx.Module):
  """A router that says what it was told."""

  def __init__(self, experts, weights):
    self.experts = nnx.Variable(jnp.asarray(experts))
    self.weights = nnx.Param(jnp.asarray(weights, jnp.float32))

  def __call__(self, x, live, key):
    experts, weights = self.experts.get_value(), self.weights.get_value()
    return Routing(experts, weights, jnp.float32(3), jnp.float32(0))


def choices(seed, ties=False):
  """Top-K of softmax gates, some choices missing."""
  rng = np.random.default_rng(seed)
  gates = rng.random((T, E)) ** 3 + np.arange(E) / 9  # some experts are liked
  gates = np.round(gates, 1) if ties else gates
  experts = np.argsort(-gates, axis=1, kind="stable")[:, :K].astype(np.int32)
  weights = np.take_along_axis(gates, experts, 1)
  experts[rng.random((T, K)) < 0.1] = NOBODY
  return experts, np.where(experts == NOBODY, 0, weights).astype(np.float32)


def capacity_of(experts, *args, **kwargs):
  return tutel_capacity(jnp.asarray(experts), *args, **kwargs)


def needed(experts):
  return max(int((experts == e).sum()) for e in range(E))


def room(experts, factor, alignment):
  """The rule, number by number."""
  share = (len(experts) + E - 1) // E
  bound = experts.shape[1] * int(abs(factor) * share)
  if factor > 0:
    capacity = bound
  else:
    capacity = needed(experts)
    if factor < 0:
      capacity = min(capacity, bound)
  while capacity % alignment:
    capacity += 1
  return capacity


def queue(experts, weights, capacity, prioritized):
  """All first choices, then all second ones; the surest item first, or not."""
  order = list(range(len(experts)))
  if prioritized:
    order.sort(key=lambda n: -weights[n].max())  # stable
  taken, served = [0] * E, np.full_like(experts, NOBODY)
  for k in range(experts.shape[1]):
    for n in order:
      e = experts[n, k]
      if e != NOBODY and taken[e] < capacity:
        served[n, k], taken[e] = e, taken[e] + 1
  return served


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("prioritized", [False, True])
@pytest.mark.parametrize("alignment", [1, 4])
def test_who_is_served(alignment, prioritized, ties):
  experts, weights = choices(0, ties)
  x = jnp.zeros((T, D))
  for factor in FACTORS:
    router = TutelRouter(
      Given(experts, weights),
      E,
      factor=factor,
      prioritized=prioritized,
      alignment=alignment,
    )
    capacity = room(experts, factor, alignment)
    assert capacity_of(experts, E, factor, alignment=alignment) == capacity
    served = queue(experts, weights, capacity, prioritized)
    routing = router(x)
    np.testing.assert_array_equal(routing.experts, served)
    lost = (experts != NOBODY).sum() - (served != NOBODY).sum()
    assert routing.dropped == lost and routing.penalty == 3
    assert (lost == 0) == (capacity >= needed(experts))
    total = np.maximum(weights.sum(1, keepdims=True), 1e-7)
    np.testing.assert_allclose(routing.weights, weights / total, rtol=1e-6)


def test_the_factors_do_different_things():
  experts, _ = choices(0)
  rooms = [int(capacity_of(experts, E, f)) for f in FACTORS]
  assert rooms[2] == 0 and rooms[3] == rooms[5] == needed(experts)
  assert rooms[0] > rooms[3] > rooms[1] == rooms[4] > 0


def test_the_factor_is_data():
  experts, _ = choices(0)
  run = jax.jit(lambda f: capacity_of(experts, E, f))
  assert [int(run(f)) for f in FACTORS] == [
    room(experts, f, 1) for f in FACTORS
  ]
  assert run._cache_size() == 1


def test_a_bound_of_decimals():
  """0.57 * 100 is 56.99.. in floating point, and 57 to whoever wrote it."""
  experts, percent = np.zeros((100, 1), np.int32), np.arange(1, 200)
  rooms = jax.vmap(lambda f: capacity_of(experts, 1, f))(percent / 100)
  np.testing.assert_array_equal(rooms, percent)


def test_priority_drops_the_least_sure():
  """Of one expert's items, those of the largest gates are served."""
  gates = np.random.default_rng(1).permutation(T)[:, None] / T
  router = TutelRouter(
    Given(np.zeros((T, 1), np.int32), gates), E, factor=1.0, prioritized=True
  )
  served = np.asarray(router(jnp.zeros((T, D))).experts[:, 0]) == 0
  assert served.sum() == 6
  assert gates[served].min() > gates[~served].max()
  # one choice: its gate stays what it is
  np.testing.assert_allclose(router(jnp.zeros((T, D))).weights, gates)


def test_the_setting_takes_room_away():
  experts, weights = choices(2)
  router = TutelRouter(Given(experts, weights), E, factor=0.0)
  x = jnp.zeros((T, D))
  most = needed(experts)
  for refused, left in ((0.5, most // 2), (1.0, 0), (5.0, 0), (-3.0, most)):
    got = adjust(router, refused)(x).experts
    np.testing.assert_array_equal(got, queue(experts, weights, left, False))


def test_the_layer_and_items_that_are_not_live():
  """They take no room, and NaN in them goes nowhere."""
  experts, weights = choices(3)
  mlps = stacked(lambda r: Mlp(D, 8, rngs=r), E, nnx.Rngs(0))
  router = TutelRouter(Given(experts, weights), E, factor=0.8)
  layer = MixtureOfExperts(router, mlps)
  x = jax.random.normal(jax.random.key(0), (T, D))
  live = np.arange(T) % 3 != 0
  y, cost, _ = layer(jnp.where(live[:, None], x, jnp.nan), jnp.asarray(live))
  wanted = np.where(live[:, None], experts, NOBODY)
  served = queue(wanted, weights, room(experts, 0.8, 1), False)
  total = np.where(live[:, None], weights, 0).sum(1, keepdims=True)
  want = np.zeros((T, D))
  for n, k in itertools.product(range(T), range(K)):
    if (e := served[n, k]) != NOBODY:
      one = jax.tree.map(lambda a, e=e: a[e], mlps)
      want[n] += weights[n, k] / total[n] * np.asarray(reference.mlp(one, x[n]))
  np.testing.assert_allclose(y, want, rtol=1e-4, atol=1e-5)
  assert cost.dropped == (wanted != NOBODY).sum() - (served != NOBODY).sum()


def test_gradients_pass_to_the_gates():
  experts, weights = choices(4)
  router = TutelRouter(Given(experts, weights), E, factor=0.8)
  f = lambda rows, w: jnp.tanh(rows @ w)
  x, w = jax.random.normal(jax.random.key(0), (2, T, D)), jnp.ones((E, D, D))

  def loss(router):
    routing = router(x[0])
    plan = dispatch(routing.experts, routing.weights, E)
    return (expert_apply(f, x[1], plan, w)[0] ** 2).sum()

  grad = jax.grad(loss, allow_int=True)(router).router.weights.get_value()
  assert np.isfinite(grad).all() and np.abs(grad).sum() > 0


def test_bad_settings_are_refused():
  experts, _ = choices(0)
  with pytest.raises(ValueError, match="count=0"):
    capacity_of(experts, 0, 1.0)
  with pytest.raises(ValueError, match="alignment=0"):
    capacity_of(experts, E, 1.0, alignment=0)


def test_the_fastest_program_by_the_clock():
  now, log = [0.0], []

  def program(name, seconds):
    times = itertools.chain([9.0], itertools.cycle(seconds))  # first: compiles

    def run(x):
      log.append(name)
      now[0] += next(times)
      return x

    return run

  programs = {"a": program("a", [3, 2]), "b": program("b", [1, 5])}
  pick = functools.partial(fastest_program, programs, 0, clock=lambda: now[0])
  assert pick(rounds=2) == "b"
  assert log == ["a", "b"] * 3  # in turns
  with pytest.raises(ValueError, match="nothing to compare"):
    fastest_program({}, 0)
  with pytest.raises(ValueError, match="rounds=0"):
    pick(rounds=0)


def test_parallelism_changes_no_result():
  """Data, expert, width and expert-and-width parallel, chunks and all."""
  program.run_in_subprocess(
    """
import jax
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_compilation_cache_dir", ".cache/jax")
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import AxisType, PartitionSpec as P
from adaptivejax.methods.experts import TutelRouter, tutel_capacity
from adaptivejax.nn import (
  MixtureOfExperts, Mlp, Router, Routing, expert_specs, shard_experts, stacked
)

E, D, F, T = 8, 4, 8, 32

class TopTwo(nnx.Module):
  def __init__(self, rngs):
    self.scorer = Router(D, E, rngs=rngs)

  def __call__(self, x, live, key):
    gates, experts = jax.lax.top_k(jax.nn.softmax(self.scorer(x)), 2)
    zero = 0 * gates.sum()
    return Routing(experts, gates, zero, zero)

x = jax.random.normal(jax.random.key(0), (T, D))
""",
    """
    rngs = nnx.Rngs(0)
    experts = stacked(lambda r: Mlp(D, F, rngs=r), E, rngs)
    router = TutelRouter(TopTwo(rngs), E, factor=0.0)
    layer = MixtureOfExperts(router, experts)
    want, cost, _ = jax.jit(lambda m, x: m(x))(layer, x)

    kinds = (AxisType.Auto,) * 3
    names = ("data", "expert", "model")
    for r, shape, model in (
      ("data", (8, 1, 1), layer),
      ("expert", (1, 8, 1), shard_experts(layer, "expert")),
      ("pipelined", (2, 4, 1), shard_experts(layer, "expert", chunks=2)),
      ("width", (2, 1, 4), shard_experts(layer, None, width="model")),
      ("both", (1, 4, 2), shard_experts(layer, "expert", width="model")),
    ):
      mesh = jax.make_mesh(shape, names, axis_types=kinds)
      rows = P(("data", "expert"))

      def call(model, x):
        y, cost, _ = model(x)
        room = tutel_capacity(
          model.router(x).experts, E, 0.0, axis=("data", "expert")
        )
        return y, jax.lax.psum(cost, ("data", "expert")), room

      y, spent, room = jax.jit(jax.shard_map(
        call,
        mesh=mesh,
        in_specs=(expert_specs(model, mesh), rows),
        out_specs=(rows, P(), P()),
      ))(model, x)
      np.testing.assert_allclose(y, want, rtol=1e-5, atol=1e-5, err_msg=r)
      if r == "width":  # of the others see test_spread
        out = jax.shard_map(
          lambda m, x: m(x)[0],
          mesh=mesh,
          in_specs=(expert_specs(model, mesh), rows),
          out_specs=rows,
        )
        grad = lambda f: jax.tree.leaves(jax.jit(jax.grad(
          lambda m, x: jnp.sin(f(m, x)).sum(), (0, 1)
        ))(model, x))
        wanted = grad(lambda m, x: MixtureOfExperts(m.router, m.experts)(x)[0])
        for a, b in zip(grad(out), wanted, strict=True):
          np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
      assert spent.items == cost.items == 2 * T, r
      np.testing.assert_allclose(spent.full, cost.full, rtol=0.1)
      parts = router(x).experts.reshape(shape[0] * shape[1], -1)
      fullest = max(np.bincount(part, minlength=E).max() for part in parts)
      assert room == fullest, (r, room, fullest)
    """,
  )
