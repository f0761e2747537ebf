# SPDX-License-Identifier: Apache-2.0
"""Law: a sequence over devices attends as it does on one, and none holds it.

A bug here is a hang, so every program runs in a process of its own with a time
limit.
"""

import functools

import jax
import jax.numpy as jnp
import pytest

from adaptivejax import core
from adaptivejax.core.attention import Keys
from tests import program

PREAMBLE = """
import jax
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_compilation_cache_dir", ".cache/jax")
import re
import chex
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, PartitionSpec as P
from adaptivejax import core
from adaptivejax.core import ring
from adaptivejax.core.attention import Keys, attend

def ambient(**axes):
  kinds = (AxisType.Auto,) * len(axes)
  devices = jax.devices()[: np.prod(list(axes.values()))]
  return jax.make_mesh(
    tuple(axes.values()), tuple(axes), axis_types=kinds, devices=devices
  )

close = lambda a, b: chex.assert_trees_all_close(a, b, rtol=1e-5, atol=1e-5)
draw = lambda i, *shape: jax.random.normal(jax.random.key(i), shape)

def bodies(hlo, kind):
  "The computations of a program in which an operation is."
  names, name = [], None
  for line in hlo.splitlines():
    if line and not line[0].isspace() and "{" in line:
      name = line.removeprefix("ENTRY ").split()[0].strip("%")
    names += [name] * (f" {kind}(" in line or f" {kind}-start(" in line)
  return names

def branches(hlo):
  "The computations that conditionals may enter, and those called from there."
  of = lambda text: set(re.findall(r"%([\\w.-]+)", text))
  start = set()
  for line in hlo.splitlines():
    if " conditional(" in line:
      start |= of(line.split("computation", 1)[1])
  calls, name = {}, None
  for line in hlo.splitlines():
    if line and not line[0].isspace() and "{" in line:
      name = line.removeprefix("ENTRY ").split()[0].strip("%")
      calls[name] = set()
    elif name:
      calls[name] |= of(line)
  found, new = set(), start & set(calls)
  while new:
    found |= new
    new = {c for n in new for c in calls[n] if c in calls} - found
  return found
"""

run = functools.partial(program.run_in_subprocess, PREAMBLE, timeout=300)


def test_lists_over_devices_are_those_of_one():
  """Values and gradients, whatever queries and keys carry."""
  run("""
    B, T, H, G, D, E, block = 2, 64, 4, 2, 8, 4, 4
    q, k, v = draw(0, B, T, H, D), draw(1, B, G, T, D), draw(2, B, G, T, E)
    k = k.at[0, 1, 40].set(jnp.nan)  # whoever sees it gets NaN
    bias, sinks, weight = draw(3, B, G, T), draw(4, H), draw(5, B, T, H, E)
    place = jnp.arange(T) - jnp.array([[0], [5]])  # some rows are padded
    place = jnp.where(place >= 0, place, -1)
    segment = jnp.where(jnp.arange(T) < 25, 0, 1) * jnp.ones((B, 1), jnp.int32)

    sizes = {"block_q": block, "block_kv": block}
    causal = core.causal_blocks(T, T, **sizes)
    some = jax.random.uniform(jax.random.key(6), (B, H, 16, 16)) < 0.2
    some = (some & causal).at[:, :, 3].set(False)  # a tile looks at nothing
    rows = jax.random.uniform(jax.random.key(7), (B, G, T, 16)) < 0.2
    of_tiles = core.lists_from_mask(some, **sizes)
    of_rows = core.lists_from_rows(rows, **sizes)
    shared = core.lists_from_mask(causal, **sizes)  # B = L = 1

    moving, both = {"sinks": sinks, "bias": bias}, {"data": 2, "seq": 2}
    for axes, lists, moving, given in (
      ({**both, "model": 2}, of_tiles, moving, {"segments": (segment,) * 2}),
      ({"seq": 4}, of_rows, {"bias": bias[:1]}, {"window": 13, "softcap": 2.0}),
      (both, shared, {}, {"causal": False}),
    ):
      def loss(q, k, v, moving):
        keys = Keys(k, v, place[:, None])
        found, cost = core.attend_blocks(
          q, keys, lists, place, **moving, **given
        )
        out = jnp.where(jnp.isnan(found.out), 7, found.out)
        fine = jnp.where(jnp.isfinite(found.lse), found.lse, 0)
        return (out * weight).sum() + (fine ** 2).sum(), (found, cost)

      args = q, k, v, moving
      step = jax.value_and_grad(loss, (0, 1, 2, 3), True)
      want = jax.jit(step)(*args)
      assert np.isnan(want[0][1][0].lse).any()
      with jax.set_mesh(ambient(**axes)):
        program = jax.jit(step).lower(*args).compile()
        close(program(*args), want)
      hlo = program.as_text()
      assert not bodies(hlo, "all-gather"), bodies(hlo, "all-gather")
      moves = bodies(hlo, "collective-permute")
      assert moves and not set(moves) & branches(hlo)
      assert " conditional(" in hlo
  """)


def test_dense_attention_over_devices_is_that_of_one():
  """With and without a window, in order and striped; positions are data."""
  run("""
    B, T, H, G, D = 1, 64, 4, 2, 8
    q, k, v = draw(0, B, T, H, D), draw(1, B, G, T, D), draw(2, B, G, T, D)
    place, weight = jnp.arange(T)[None], draw(3, B, T, H, D)
    stripe = lambda a: core.striped(a, 4)
    heads = lambda f, a: jnp.swapaxes(f(jnp.swapaxes(a, 1, 2)), 1, 2)
    close(core.unstriped(stripe(q), 4), q)

    def loss(order, window=None):
      def of(q, k, v, bias):
        keys = Keys(
          heads(order, k), heads(order, v), order(place)[:, None],
          order(bias)[:, None],
        )
        out = attend(order(q), keys, order(place), window=window)
        return (out * order(weight)).sum(), out
      return jax.value_and_grad(of, (0, 1, 2, 3), has_aux=True)

    same, bias = lambda a: a, draw(4, B, T)
    args = q, k, v, bias
    for order, window in ((same, 20), (stripe, None)):
      (want, out), slopes = jax.jit(loss(same, window))(*args)
      with jax.set_mesh(ambient(seq=4)):
        (got, found), d = jax.jit(loss(order, window))(*args)
      close((got, found, d), (want, order(out), slopes))

    # a sequence that the devices do not divide is whole on each
    short = Keys(k[:, :, :9], v[:, :, :9], place[:, None, :9])
    with jax.set_mesh(ambient(seq=4)):
      close(
        jax.jit(attend)(q[:, :9], short, place[:, :9]),
        attend(q[:, :9], short, place[:, :9]),
      )
  """)


def test_only_visits_with_something_to_see_are_computed():
  """Counted as they run: device i of a text in order sees i + 1 of them."""
  run("""
    B, T, H, G, D, n = 1, 64, 2, 1, 8, 8
    q, k, v = draw(0, B, T, H, D), draw(1, B, G, T, D), draw(2, B, G, T, D)
    place, visits, blocks = jnp.arange(T)[None], [], []
    ring.BLOCK = 4
    plain = ring.block_sparse_attention

    def counted(q, k, v, lists, *rest):
      def note(device, count):
        visits.append(int(device)), blocks.append(int(count))
      device = jax.lax.axis_index("seq")
      jax.debug.callback(note, device, lists.count.sum())
      return plain(q, k, v, lists, *rest)

    ring.block_sparse_attention = counted
    by_device = lambda a: np.bincount(visits, a, minlength=n)

    def work(run, *args):
      visits.clear(), blocks.clear()
      with jax.set_mesh(ambient(seq=n)):
        jax.block_until_ready(jax.jit(run)(*args))
      jax.effects_barrier()
      return by_device(np.ones(len(visits))), by_device(blocks)

    seen, done = work(attend, q, Keys(k, v, place[:, None]), place)
    assert (seen == np.arange(1, n + 1)).all(), seen
    assert done.max() / done.mean() > 1.7, done
    stripe = lambda a: core.striped(a, n)
    keys = [jnp.swapaxes(stripe(jnp.swapaxes(a, 1, 2)), 1, 2) for a in (k, v)]
    keys = Keys(*keys, stripe(place)[:, None])
    seen, done = work(attend, stripe(q), keys, stripe(place))
    assert (seen == n).all() and done.max() / done.mean() < 1.01, done

    # what lists leave out is not visited: all look at block 0 and their own
    own = jnp.eye(16, dtype=bool)[None, None].at[..., 0].set(True)
    lists = core.lists_from_mask(own, block_q=4, block_kv=4)
    run = lambda *a: core.attend_blocks(*a)[0].out
    seen, done = work(run, q, Keys(k, v, place[:, None]), lists, place)
    assert list(seen) == [1] + [2] * (n - 1), seen
    assert done.sum() == own.sum(), (done, own.sum())
  """)


def test_no_device_holds_the_sequence():
  """Forward and backward, temporaries are less than all keys and values."""
  run("""
    T, D, mesh = 2**17, 64, ambient(seq=8)
    at = lambda *spec: jax.sharding.NamedSharding(mesh, P(*spec))
    where = at(None, "seq"), at(None, None, "seq"), at(None, None, "seq")
    like = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
    q, k = like(1, T, 1, D), like(1, 1, T, D)

    def loss(q, k, v):
      place = jnp.arange(T)[None]
      return (attend(q, Keys(k, v, place[:, None]), place) ** 2).sum()

    with jax.set_mesh(mesh):
      step = jax.jit(
        jax.grad(loss, (0, 1, 2)), in_shardings=where, out_shardings=where
      )
      program = step.lower(q, k, k).compile()
    assert not bodies(program.as_text(), "all-gather")
    held = program.memory_analysis().temp_size_in_bytes
    assert held < 2 * 4 * T * D, held
  """)


def test_looks_choose_where_their_queries_are():
  """What is brought together is less than the keys: block means and masks."""
  run("""
    from adaptivejax.methods.attention import MoBA, XAttention

    T, G, H, D, mesh = 4096, 1, 2, 32, ambient(seq=8)
    at = lambda *spec: jax.sharding.NamedSharding(mesh, P(*spec))
    where = at(None, "seq"), at(None, None, "seq"), at(None, None, "seq")
    like = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
    args = like(1, T, H, D), like(1, G, T, D), like(1, G, T, D)
    sizes = {"stride": 8, "block_q": 64, "block_kv": 64}
    for look in (MoBA(64, 3), XAttention(0.6, **sizes)):
      def loss(q, k, v):
        place = jnp.arange(T)[None]
        return (look(q, Keys(k, v, place[:, None]), place).out ** 2).sum()

      with jax.set_mesh(mesh):
        step = jax.jit(loss, in_shardings=where).lower(*args).compile()
      found = [
        re.search(r"\\w+\\[([\\d,]*)\\]", line.split("=", 1)[1])[1]
        for line in step.as_text().splitlines() if " all-gather(" in line
      ]
      sizes = [np.prod([int(n) for n in s.split(",") if n]) for s in found]
      assert max(sizes) < T * D / 2, (look, found)
  """)


@functools.cache
def mesh(**axes):
  kinds = (jax.sharding.AxisType.Auto,) * len(axes)
  sizes = tuple(axes.values())
  devices = jax.devices()[: sizes[0]]
  return jax.make_mesh(sizes, tuple(axes), axis_types=kinds, devices=devices)


@pytest.mark.parametrize(
  ("tokens", "block", "says"),
  [(32, 16, "leaves 8 of 32 tokens"), (24, 8, "leaves 6 of 24 tokens")],
)
def test_blocks_that_do_not_fit_a_device_are_refused(tokens, block, says):
  q, k = jnp.ones((1, tokens, 1, 2)), jnp.ones((1, 1, tokens, 2))
  place = jnp.arange(tokens)[None]
  lists = core.full_lists(tokens, tokens, block_q=block, block_kv=block)
  run = lambda q: core.attend_blocks(
    q, Keys(k, k, place[:, None]), lists, place
  )
  with (
    jax.set_mesh(mesh(seq=4)),
    pytest.raises(ValueError, match=f"`seq` of 4 devices {says}.*take smaller"),
  ):
    jax.eval_shape(run, q)


def test_what_a_ring_cannot_do_is_refused():
  q = jnp.ones((1, 1, 12, 2))
  lists = core.full_lists(8, 8, block_q=8, block_kv=8)
  rule, bare = core.sparse_attention.Rule(), core.sparse_attention.Marks()
  with pytest.raises(ValueError, match="positions of queries and keys"):
    core.ring_attention(q, q, q, lists, bare, rule, axis="seq")
  place = jnp.arange(12)[None]
  marks = bare._replace(q_pos=place, kv_pos=place[:, None])
  with pytest.raises(ValueError, match="`seq` holds 12 queries.*blocks of 8"):
    core.ring_attention(q, q, q, lists, marks, rule, axis="seq")
  with pytest.raises(ValueError, match="devices=5 must divide the tokens"):
    core.striped(jnp.ones((1, 12)), 5)
  keys = Keys(q, q, place[:, None])
  with pytest.raises(ValueError, match="`mass` needs all keys"):
    core.attend_blocks(
      jnp.ones((1, 12, 1, 2)), keys, lists, place, mass=True, axis="seq"
    )
