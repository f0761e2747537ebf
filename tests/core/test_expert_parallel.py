# SPDX-License-Identifier: Apache-2.0
"""Law: experts spread over devices give the values and gradients of one.

However devices are split, however routing is skewed, however the exchange is
cut.  A bug here is a hang, so every program runs in a process of its own.
"""

import functools

import pytest

from tests import program

PREAMBLE = """
import jax
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_compilation_cache_dir", ".cache/jax")
import functools
import chex
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from adaptivejax import core
from adaptivejax.core import NOBODY, coins, expert_apply_parallel, ladder, tiles

N, K, E, D, F = 64, 3, 8, 4, 8
draw = lambda i, *shape: jax.random.normal(jax.random.key(i), shape)
x, weights = draw(0, N, D), draw(1, N, K)
params = {"up": draw(2, E, D, F), "down": draw(3, E, F, D)}
cover = tiles(4)
expert = lambda rows, p: jnp.tanh(rows @ p["up"]) @ p["down"]

def some(seed, absent=0.2):
  rng = np.random.default_rng(seed)
  picks = np.stack([rng.permutation(E)[:K] for _ in range(N)])
  return np.where(rng.random((N, K)) < absent, NOBODY, picks)

first = np.arange(N)[:, None] < N // 4
ROUTES = {
  "some": some(0),
  "all": some(1, 0.0),
  "one": np.tile([5, NOBODY, NOBODY], (N, 1)),
  "nobody": np.full((N, K), NOBODY),
  "uneven": np.where(first, some(2, 0.0), NOBODY),  # some devices have nothing
  "last": np.tile([NOBODY, 7, 6], (N, 1)),  # all rows go to the last device
  "beyond": np.where(some(3) == 2, E + 1, some(3)),  # no such expert
}
ROUTES = {name: jnp.asarray(route) for name, route in ROUTES.items()}

def mesh(**axes):
  kinds = (AxisType.Auto,) * len(axes)
  return jax.make_mesh(tuple(axes.values()), tuple(axes), axis_types=kinds)

def one_device(x, weights, params, route):
  plan = core.dispatch(route, weights, E)
  return core.expert_apply(expert, x, plan, params, cover=cover)

def parallel(mesh, check_vma=True, tokens=("data", "expert"), f=expert, **how):
  width = "model" if "model" in mesh.axis_names else None
  how = {"width": width, "cover": cover, "axis": "expert", **how}
  spec = {
    "up": P(how["axis"], None, width), "down": P(how["axis"], width)
  }

  def run(x, weights, params, route):
    y, cost = expert_apply_parallel(f, x, route, weights, params, **how)
    return y, jax.lax.psum(cost, tokens)

  rows = P(tokens)
  return jax.shard_map(
    run,
    mesh=mesh,
    in_specs=(rows, rows, spec, rows),
    out_specs=(rows, P()),
    check_vma=check_vma,
  )

def gradients(run):
  def loss(x, weights, params, route):
    y, cost = run(x, weights, params, route)
    return jnp.sin(y).sum(), (y, cost)

  return jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True))

close = functools.partial(chex.assert_trees_all_close, rtol=1e-5, atol=2e-5)
want = gradients(one_device)
values = lambda *args: jax.jit(one_device)(*args)[0]

def agree(run, names=ROUTES):
  got = gradients(run)
  for name in names:
    args = x, weights, params, ROUTES[name]
    grads, (y, cost) = got(*args)
    wanted, (wanted_y, wanted_cost) = want(*args)
    close((y, grads), (wanted_y, wanted))
    assert cost.items == wanted_cost.items, (name, cost)
    assert cost.full == wanted_cost.full, (name, cost)
    assert cost.spent * E * N == cost.full * cost.capacity, (name, cost)
    padding = cost.capacity - cost.items  # 3 rows by expert and device
    assert 0 <= padding <= 3 * E * 4, (name, cost)
"""

run = functools.partial(program.run_in_subprocess, PREAMBLE)


def test_every_split_of_the_devices():
  run("""
    for data, experts, model in ((2, 4, 1), (2, 2, 2), (1, 8, 1)):
      agree(parallel(mesh(data=data, expert=experts, model=model)))
  """)


def test_without_checked_types_and_over_two_axes():
  run("""
    agree(parallel(mesh(data=2, expert=2, model=2), check_vma=False))
    axis = ("data", "expert")
    agree(parallel(mesh(data=2, expert=4), axis=axis), ["some", "one"])
  """)


def test_however_the_exchange_is_cut():
  """Chunks that may overlap; a capacity that one exchange does not hold."""
  run("""
    spread = functools.partial(parallel, mesh(data=2, expert=4))
    agree(spread(capacity=tiles(6), chunks=2), ["some", "last", "nobody"])
    names = ["some", "one"]
    ways = [dict(chunks=c) for c in (1, 2, 4)]
    ways += [dict(capacity=c) for c in (ladder(2, 5), coins(4, 1))]
    for how in ways:
      y = jax.jit(spread(**how))
      for name in names:
        args = x, weights, params, ROUTES[name]
        close(y(*args)[0], values(*args))
  """)


def test_what_is_sent():
  """Rows by all-to-all only; sums over the model axis outside conditionals."""
  run("""
    import re
    spread = parallel(mesh(data=2, expert=2, model=2), capacity=ladder(16))
    args = x, weights, params, ROUTES["some"]
    count = lambda text, op: len(re.findall(rf" {op}(?:-start)?\\(", text))

    text = jax.jit(spread).lower(*args).compile().as_text()
    assert count(text, "all-to-all") == 4  # rows, choices, weights; and back
    for op in ("all-gather", "collective-permute", "reduce-scatter"):
      assert not count(text, op), op
    assert "all-gather" not in text
    text = gradients(spread).lower(*args).compile().as_text()
    assert count(text, "all-to-all") == 4 + 3 + 3  # and sent again, and back
    assert "all-gather" not in text
    inside = [c for c in text.split("\\n\\n") if "ENTRY" not in c]
    assert not any(count(c, "all-reduce") for c in inside)
    exported = jax.export.export(gradients(spread), platforms=["tpu"])(*args)
    assert "all_to_all" in exported.mlir_module()
  """)


def test_inside_other_transforms():
  """`vmap`, rematerialised layers in a `scan`, and 16 bits."""
  run("""
    spread = parallel(mesh(data=2, expert=4))
    routes = jnp.stack([ROUTES["some"], ROUTES["one"]])
    xs = jnp.stack([x, draw(9, N, D)])
    many = lambda run: lambda x, w, p, r: (
      jax.vmap(lambda x, r: run(x, w, p, r)[0])(x, r), None
    )
    got = gradients(many(spread))
    args = xs, weights, params, routes
    text = got.lower(*args).compile().as_text()
    assert " conditional(" in text  # not all sizes, always
    close(got(*args)[0], gradients(many(one_device))(*args)[0])

    def layers(run):
      def apply(x, weights, params, route):
        def body(x, _):
          return jnp.tanh(run(x, weights, params, route)[0]), None
        return jax.lax.scan(jax.checkpoint(body), x, length=2)
      return apply

    args = x, weights, params, ROUTES["some"]
    got, wanted = gradients(layers(spread)), gradients(layers(one_device))
    close(got(*args)[0], wanted(*args)[0])

    half = jax.tree.map(lambda a: a.astype(jnp.bfloat16), args[:3])
    y = jax.jit(spread)(*half, args[3])[0]
    assert y.dtype == jnp.bfloat16
    error = jnp.abs(y - values(*args)).max()
    assert error < 3e-2 * jnp.abs(y).max()
  """)


def test_nothing_leaks_and_what_experts_share_has_a_gradient():
  run("""
    devices = mesh(data=2, expert=4)
    route = jnp.where(ROUTES["some"] == 2, NOBODY, ROUTES["some"])
    route = route.at[5].set(NOBODY)
    bad = (
      x.at[5].set(jnp.nan),
      jnp.where(route == NOBODY, jnp.nan, weights),
      jax.tree.map(lambda a: a.at[2].set(jnp.nan), params),
    )
    grads, (y, _) = gradients(parallel(devices))(*bad, route)
    chex.assert_tree_all_finite((y, grads))
    close(y, values(x, weights, params, route))

    def scaled(run):
      def apply(x, weights, params, scale):
        f = lambda rows, p: expert(rows * scale, p)
        return run(f, x, weights, params)
      return apply

    def local(f, x, weights, params):
      route = ROUTES["one"][: len(x)]
      return expert_apply_parallel(f, x, route, weights, params, cover=cover)

    def whole(f, x, weights, params):
      plan = core.dispatch(ROUTES["one"], weights, E)
      return core.expert_apply(f, x, plan, params, cover=cover)

    def spread(x, weights, params, scale):
      inner = jax.lax.pcast(scale, ("data", "expert"), to="varying")
      return scaled(local)(x, weights, params, inner)[0]

    rows = P(("data", "expert"))
    run = jax.shard_map(
      spread,
      mesh=devices,
      in_specs=(rows, rows, P("expert"), P()),
      out_specs=rows,
    )
    grad = lambda f: jax.jit(
      jax.grad(lambda *a: jnp.sin(f(*a)).sum(), (0, 1, 2, 3))
    )(x, weights, params, jnp.float32(0.7))
    close(grad(run), grad(lambda *a: scaled(whole)(*a)[0]))
  """)


def test_what_does_not_fit_is_refused_in_words():
  run("""
    devices = mesh(data=2, expert=4)
    rows = P(("data", "expert"))

    def refused(words, specs=(rows, rows, P("expert"), rows), cut=None, **how):
      def local(x, weights, params, route):
        args = x, route, weights, params
        args = cut(*args) if cut else args
        return expert_apply_parallel(expert, *args, **how)[0]

      try:
        jax.jit(jax.shard_map(
          local, mesh=devices, in_specs=specs, out_specs=rows
        ))(x, weights, params, ROUTES["some"])
      except ValueError as error:
        for word in words:
          assert word in str(error), error
      else:
        raise AssertionError(words)

    data = P("data")
    refused(["`x`", "['expert']", "in_specs"], (data, data, P("expert"), data))
    refused(["`params`", "['expert']"], (rows, rows, P(), rows))
    refused(["chunks=3", "(8,)"], chunks=3, capacity=tiles(8))
    refused(["chunks"], chunks=0)
    short = lambda x, r, w, p: (x, r, w[:, :1], p)
    refused(["[items, choices]", "(8, 1)"], cut=short)
    refused(["8 items"], cut=lambda x, r, w, p: (x[:3], r, w, p))
    cut = lambda x, r, w, p: (x, r, w, {**p, "up": p["up"][:1]})
    refused(["leading axis", "[1, 2]"], cut=cut)
  """)


@pytest.mark.parametrize(
  ("bad", "word"),
  [((0, 1, 1), "items=0"), ((4, 0, 1), "choices=0"), ((4, 1, 0), "groups=0")],
)
def test_a_capacity_for_nothing_is_refused(bad, word):
  from adaptivejax.core import exchange_cover

  with pytest.raises(ValueError, match=word):
    exchange_cover(*bad)


def test_the_default_capacity():
  """Around the balanced load, in whole chunks, never more than all items."""
  from adaptivejax.core import exchange_cover

  assert exchange_cover(1024, 1, 8).sizes == (160,)
  assert exchange_cover(1024, 2, 8, 4).sizes == (304,)
  assert exchange_cover(100, 8, 2).sizes == (104,)
  assert exchange_cover(3, 1, 1).sizes == (8,)
  assert all(s % 3 == 0 for s in exchange_cover(100, 2, 4, 3).sizes)
