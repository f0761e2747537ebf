# SPDX-License-Identifier: Apache-2.0
"""Law: eight devices give the values and gradients of one.

Each device selects its own rows, some none and some all.  A bug here is a hang
(a collective inside a conditional that only some devices enter), so every
program runs in a process of its own with a time limit.
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

N, D, H = 64, 4, 8
draw = lambda i, *shape: jax.random.normal(jax.random.key(i), shape)
x, w1, w2, dy = draw(0, N, D), draw(1, D, H), draw(2, H, D), draw(3, N, D)
share = jnp.repeat(jnp.linspace(0, 1, 8), N // 8)  # of rows, by device
mask = draw(4, N) < (share * 8 - 4)
assert not mask[:8].any() and mask[-8:].all()
bucketed = functools.partial(core.bucketed, cover=core.coins(4, 2))
ffn = lambda rows, w1, w2: jnp.tanh(rows @ w1) @ w2

def mesh(**axes):
  kinds = (AxisType.Auto,) * len(axes)
  return jax.make_mesh(tuple(axes.values()), tuple(axes), axis_types=kinds)

def loss(apply):
  def f(x, w1, w2):
    y = apply(x, mask, w1, w2)
    return (y * dy[:, :1]).sum() + (y ** 2).sum()
  return f

def gradients(apply):
  return jax.jit(jax.value_and_grad(loss(apply), (0, 1, 2)))(x, w1, w2)

def agree(apply, f=ffn, keep=True):
  dense = lambda *args: core.masked(f, *args, keep=keep)[0]
  chex.assert_trees_all_close(
    gradients(apply), gradients(dense), rtol=1e-5, atol=1e-5
  )
"""


run_in_subprocess = functools.partial(program.run_in_subprocess, PREAMBLE)


@pytest.mark.parametrize("check_vma", [True, False])
def test_rows_over_devices(check_vma):
  """Data parallel: each device has its own count; weights are replicated."""
  run_in_subprocess(f"""
    shard = functools.partial(
      jax.shard_map, mesh=mesh(data=8), check_vma={check_vma}
    )
    specs = (P("data"), P("data"), P(), P())

    one = lambda *args: bucketed(ffn, *args)[0]
    agree(shard(one, in_specs=specs, out_specs=P("data")))

    def batch(x, mask, w1, w2):  # folded into the rows, on each device
      fold = lambda a: a.reshape(2, -1, *a.shape[1:])
      y = jax.vmap(one, (0, 0, None, None))(fold(x), fold(mask), w1, w2)
      return y.reshape(x.shape)

    agree(shard(batch, in_specs=specs, out_specs=P("data")))

    constant = lambda rows, w1, w2: jnp.ones((len(rows), D))
    for f, keep in ((ffn, False), (constant, True)):
      zero = lambda *args: bucketed(f, *args, keep=keep)[0]
      agree(shard(zero, in_specs=specs, out_specs=P("data")), f, keep)

    def layers(op):  # scanned, with a new decision on each layer
      def run(x, mask, w1, w2):
        body = lambda x, _: (op(ffn, x, mask & (x[:, 0] > -1), w1, w2)[0], None)
        return jax.lax.scan(jax.checkpoint(body), x, length=2)[0]
      return run

    deep = shard(layers(bucketed), in_specs=specs, out_specs=P("data"))
    got = gradients(deep)
    want = gradients(layers(core.masked))
    chex.assert_trees_all_close(got, want, rtol=1e-5, atol=1e-5)

    def costs(*args):  # shards psum
      return jax.lax.psum(bucketed(ffn, *args)[1], "data")

    cost = shard(costs, in_specs=specs, out_specs=P())(x, mask, w1, w2)
    assert cost.items == mask.sum() <= cost.capacity < N
    assert cost.full == N * 2 * D * H * 2
  """)


@pytest.mark.parametrize("check_vma", [True, False])
def test_tensor_parallel_rows(check_vma):
  """A `psum` inside the rung, over an axis on which the decision agrees."""
  run_in_subprocess(f"""
    def split(rows, w1, w2):
      return jax.lax.psum(ffn(rows, w1, w2), "model")

    shard = functools.partial(
      jax.shard_map,
      mesh=mesh(data=4, model=2),
      in_specs=(P("data"), P("data"), P(None, "model"), P("model")),
      check_vma={check_vma},
    )
    rows = lambda *args: bucketed(split, *args)[0]
    agree(shard(rows, out_specs=P("data")))

    up = lambda rows, w1, w2: jnp.tanh(rows @ w1)  # each has its columns of y
    columns = lambda *args: bucketed(up, *args, keep=False)[0]
    agree(shard(columns, out_specs=P("data", "model")), up, False)
  """)


def test_replicated_rows_with_a_decision_per_device():
  """Each device computes its own choice of the same rows."""
  run_in_subprocess("""
    masks = jnp.arange(8 * N).reshape(8, N) % 9 < jnp.arange(8)[:, None]
    each = lambda op: lambda x, m, w1, w2: op(ffn, x, m[0], w1, w2)[0][None]

    def run(apply):
      loss = lambda *args: (apply(args[0], masks, *args[1:]) ** 2).sum()
      return jax.jit(jax.value_and_grad(loss, (0, 1, 2)))(x, w1, w2)

    sharded = jax.shard_map(
      each(bucketed),
      mesh=mesh(data=8),
      in_specs=(P(), P("data"), P(), P()),
      out_specs=P("data"),
    )
    looped = lambda x, m, *w: jnp.stack(
      [core.masked(ffn, x, row, *w)[0] for row in m]
    )
    chex.assert_trees_all_close(run(sharded), run(looped), rtol=1e-5, atol=1e-5)
  """)


def test_a_replicated_closure_is_refused_in_words():
  run_in_subprocess("""
    def sharded(op):
      local = lambda x, m, w1, w2: op(lambda r: ffn(r, w1, w2), x, m)[0]
      return jax.shard_map(
        local,
        mesh=mesh(data=8),
        in_specs=(P("data"), P("data"), P(), P()),
        out_specs=P("data"),
      )

    try:
      gradients(sharded(bucketed))
    except ValueError as error:
      for word in ("closes over", "(4, 8)", "['data']", "operand"):
        assert word in str(error), error
    else:
      raise AssertionError("not refused")
  """)


def test_a_collective_that_would_hang_is_refused_in_words():
  run_in_subprocess("""
    def mixing(rows, w1, w2):
      return ffn(rows, w1, w2) + jax.jit(jax.lax.psum, static_argnums=1)(
        rows, "data"
      )

    sharded = jax.shard_map(
      lambda x, m, w1, w2: bucketed(mixing, x, m, w1, w2)[0],
      mesh=mesh(data=8),
      in_specs=(P("data"), P("data"), P(), P()),
      out_specs=P("data"),
    )
    try:
      jax.jit(sharded)(x, mask, w1, w2)
    except ValueError as error:
      for word in ("psum", "['data']", "outside"):
        assert word in str(error), error
    else:
      raise AssertionError("not refused")
  """)


def test_auto_sharded_jit():
  """Sharded arguments of `jit`: the compiler splits it, the result is same."""
  run_in_subprocess("""
    devices = mesh(data=4, model=2)
    place = lambda *spec: NamedSharding(devices, P(*spec))
    shardings = (place("data"), place(None, "model"), place("model"))
    step = lambda op: jax.jit(
      jax.value_and_grad(loss(lambda *args: op(ffn, *args)[0]), (0, 1, 2)),
      in_shardings=shardings,
      out_shardings=(place(), shardings),
    )
    args = jax.device_put((x, w1, w2), shardings)
    got, want = step(bucketed)(*args), step(core.masked)(*args)
    chex.assert_trees_all_close(got, want, rtol=1e-5, atol=1e-5)
    assert got[1][1].sharding == place(None, "model")
  """)


def test_decoding_rows_over_devices():
  """Each device walks its own trees, some longer; no collective."""
  run_in_subprocess("""
    keys = jax.random.split(jax.random.key(0), N)
    setting, place = core.Sampling.of(1.0, 3), jnp.arange(N)
    tokens = jax.random.randint(jax.random.key(1), (N, 5), 0, 4)
    parent = jnp.where(share[:, None] > 0.5, jnp.arange(5) - 1, -2)
    parent = parent.at[:, 0].set(-1)
    logits = draw(5, N, 5, 4)

    def decode(keys, tokens, parent, logits, place):
      rows = core.Draw(setting, keys)
      log, tree = rows.log_probs(logits), core.Tree(tokens, parent)
      path = core.tree_verify(tree, log, rows, place, depth=4)
      kept = core.draft_verify(tokens[:, :4], log[:, :4], log, rows, place)
      return core.ancestors(tree), path, kept

    args = keys, tokens, parent, logits, place
    sharded = jax.shard_map(
      decode, mesh=mesh(data=8), in_specs=P("data"), out_specs=P("data")
    )
    chex.assert_trees_all_equal(jax.jit(sharded)(*args), jax.jit(decode)(*args))
    text = jax.jit(sharded).lower(*args).compile().as_text()
    assert not any(word in text for word in ("all-reduce", "all-gather"))
  """)


def test_gradients_of_rows_that_finish_at_different_steps():
  """Some devices have nothing left while others step on; weights are shared."""
  run_in_subprocess("""
    length = jnp.where(share > 0.3, jnp.arange(N) % 9, 0)
    rows = {"step": jnp.zeros(N, jnp.int32), "length": length, "x": x}

    def total(w1, rows, axes=()):
      def step(row, live):
        new = jnp.tanh(row["x"] @ w1) @ w1.T
        return {**row, "step": row["step"] + 1, "x": new}, live.sum()

      alive = lambda row: row["step"] < row["length"]
      out, spent = core.masked_scan(step, rows, alive, steps=9, chunk=4)
      y = (out["x"] ** 2).sum()
      return (jax.lax.psum(y, axes) if axes else y)

    over = functools.partial(total, axes=("data",))
    sharded = jax.shard_map(
      over, mesh=mesh(data=8), in_specs=(P(), P("data")), out_specs=P()
    )
    got = jax.jit(jax.value_and_grad(sharded))(w1, rows)
    want = jax.jit(jax.value_and_grad(total))(w1, rows)
    chex.assert_trees_all_close(got, want, rtol=1e-5, atol=1e-5)
    assert jnp.abs(want[1]).max() > 0
  """)
