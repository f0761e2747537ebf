# SPDX-License-Identifier: Apache-2.0
"""Block-sparse attention in XLA against loops over pairs in NumPy."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.block_sparse_attention import (
  BlockLists,
  Marks,
  Rule,
  block_sparse_attention,
  merge_lse,
  reference,
  steps,
)
from tests.kernels import brute_attention as brute


@dataclasses.dataclass(frozen=True)
class Shape:
  heads: int = 2
  groups: int = 1
  owning: int = 1
  queries: int = 37
  keys: int = 45
  value: int = 8
  block: tuple[int, int] = (8, 8)
  batch: int = 2
  lists: int = 2


def random_lists(rng, s, chance, rows=False):
  """Shuffled junk past the count; every tile may have none."""
  tiles, blocks = -(-s.queries // s.block[0]), -(-s.keys // s.block[1])
  mask = rng.random((s.lists, s.owning, tiles, blocks)) < chance
  count = mask.sum(-1).astype(np.int32)
  index = rng.integers(-3, 99, mask.shape).astype(np.int32)
  for at in np.ndindex(count.shape):
    index[at][: count[at]] = np.flatnonzero(mask[at])
  of_row = rng.random((*mask.shape, s.block[0])) < 0.6 if rows else None
  arrays = map(jnp.asarray, (index, count))
  return BlockLists(
    *arrays, None if of_row is None else jnp.asarray(of_row), *s.block
  )


def random_arrays(rng, s, width=8):
  make = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
  return (
    make(s.batch, s.heads, s.queries, width),
    make(s.batch, s.groups, s.keys, width),
    make(s.batch, s.groups, s.keys, s.value),
  )


def random_marks(rng, s, names, owners=1):
  """Positions permuted, some of them none."""

  def positions(*shape):
    flat = [rng.permutation(shape[-1]) for _ in range(np.prod(shape[:-1]))]
    pos = np.reshape(flat, shape)
    return np.where(rng.random(shape) < 0.1, -1, pos).astype(np.int32)

  q, k = (s.batch, s.queries), (s.batch, owners, s.keys)
  made = {
    "q_pos": positions(*q),
    "kv_pos": positions(*k),
    "q_segment": rng.integers(0, 2, q).astype(np.int32),
    "kv_segment": rng.integers(0, 2, (s.batch, s.keys)).astype(np.int32),
    "kv_bias": rng.normal(size=k).astype(np.float32),
    "sinks": rng.normal(size=s.heads).astype(np.float32),
  }
  return Marks(**{name: jnp.asarray(made[name]) for name in names})


POSITIONS = ("q_pos", "kv_pos")
SEGMENTS = ("q_segment", "kv_segment")
FULL = Rule(causal=False)
CASES = {
  "plain": (Shape(), (), Rule(), 0.5, False),
  "every": (Shape(), (), FULL, 1, False),
  "few": (Shape(lists=1), (), FULL, 0.15, False),
  "aligned": (Shape(queries=32, keys=48), (), FULL, 0.5, False),
  "permuted": (Shape(value=12), POSITIONS, Rule(window=9), 0.7, False),
  "uncausal": (
    Shape(heads=4, groups=2, owning=4),
    (*POSITIONS, "kv_bias", "sinks"),
    FULL,
    0.6,
    False,
  ),
  "groups": (
    Shape(heads=8, groups=1, block=(16, 8)),
    ("kv_pos", "kv_bias", "sinks", *SEGMENTS),
    Rule(softcap=1.5),
    0.6,
    False,
  ),
  "rows": (
    Shape(heads=4, groups=2, owning=2, block=(8, 16)),
    ("q_pos", "kv_bias"),
    Rule(causal=False, softcap=2.0, scale=0.5, window=20),
    0.6,
    True,
  ),
}


@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients_are_those_of_all_pairs(name):
  shape, names, rule, chance, rows = CASES[name]
  rng = np.random.default_rng(len(name))
  lists = random_lists(rng, shape, chance, rows)
  q, k, v = random_arrays(rng, shape)
  marks = random_marks(rng, shape, names, owners=shape.groups)
  dout = jnp.asarray(rng.normal(size=(*q.shape[:3], shape.value)), jnp.float32)
  dlse = jnp.asarray(rng.normal(size=q.shape[:3]), jnp.float32)
  moving = [a for a in (marks.kv_bias, marks.sinks) if a is not None]

  def loss(q, k, v, *moving):
    rest = iter(moving)
    fill = lambda a: None if a is None else next(rest)
    given = marks._replace(kv_bias=fill(marks.kv_bias), sinks=fill(marks.sinks))
    found = block_sparse_attention(q, k, v, lists, given, rule, mass=True)
    lse = jnp.where(jnp.isfinite(found.lse), found.lse, 0)
    return (found.out * dout).sum() + (lse * dlse).sum(), found

  args = (q, k, v, *moving)
  step = jax.grad(loss, tuple(range(len(args))), has_aux=True)
  grads, found = jax.jit(step)(*args)
  want = brute.attention(q, k, v, lists, marks, rule, dout, dlse)
  for got, key in zip(found, ("out", "lse", "mass"), strict=True):
    np.testing.assert_allclose(got, want[key], atol=2e-5)
  keys = ["dq", "dk", "dv"]
  keys += [key for key in ("dbias", "dsinks") if key in want]
  for got, key in zip(grads, keys, strict=True):
    assert np.abs(want[key]).max() > 0.1
    np.testing.assert_allclose(got, want[key], atol=1e-4)
  if name == "few":
    assert np.isneginf(want["lse"]).any(), "a row that sees nothing"


@pytest.mark.parametrize("name", ["permuted", "groups", "rows"])
def test_the_reference_means_the_same(name):
  shape, names, rule, chance, rows = CASES[name]
  rng = np.random.default_rng(7)
  lists = random_lists(rng, shape, chance, rows)
  arrays = random_arrays(rng, shape)
  marks = random_marks(rng, shape, names, owners=shape.groups)
  found = reference.block_sparse_attention(
    *arrays, lists, marks, rule, mass=True
  )
  want = brute.attention(*arrays, lists, marks, rule)
  for got, key in zip(found, ("out", "lse", "mass"), strict=True):
    np.testing.assert_allclose(got, want[key], atol=2e-5)


@functools.partial(jax.jit, static_argnums=(5,))
def loss_and_gradient(q, k, v, lists, marks, rule):
  """Of the rows that are finite."""

  def loss(q, k, v):
    out, lse, _ = block_sparse_attention(q, k, v, lists, marks, rule)
    out = jnp.where(jnp.isfinite(out), out, 0)
    return jnp.sin(out).sum() + jnp.where(jnp.isfinite(lse), lse, 0).sum()

  found = block_sparse_attention(q, k, v, lists, marks, rule)
  return found, jax.grad(loss, (0, 1, 2))(q, k, v)


def test_what_nobody_sees_reaches_nothing():
  """Unlisted, no key, no query, after the last query, past the count."""
  rng = np.random.default_rng(0)
  shape = Shape(lists=1)
  lists = random_lists(rng, shape, 1)
  blocks = lists.index.shape[-1]
  lists = dataclasses.replace(
    lists, count=jnp.full_like(lists.count, blocks - 1)
  )
  q, k, v = random_arrays(rng, shape)
  q_pos = jnp.arange(shape.queries).at[3].set(-1)
  kv_pos = jnp.arange(shape.keys).at[5].set(-1)
  kv_pos = kv_pos.at[6].set(99)  # hidden by causality alone
  marks = Marks(
    jnp.tile(q_pos, (2, 1)),
    jnp.tile(kv_pos, (2, 1, 1)),
    sinks=jnp.zeros(shape.heads),
  )
  clean = loss_and_gradient(q, k, v, lists, marks, Rule())
  gone = jnp.array([5, 6, *range(40, shape.keys)])
  for value in (np.nan, np.inf):
    bad_k, bad_v = k.at[:, :, gone].set(value), v.at[:, :, gone].set(value)
    bad = loss_and_gradient(
      q.at[:, :, 3].set(value), bad_k, bad_v, lists, marks, Rule()
    )
    jax.tree.map(np.testing.assert_array_equal, bad, clean)


@pytest.mark.parametrize("where", ["key", "value"])
def test_nan_reaches_those_who_see_it_and_no_gradient(where):
  rng = np.random.default_rng(1)
  shape = Shape()
  lists = random_lists(rng, shape, 0.5)
  q, k, v = random_arrays(rng, shape)
  seen = brute.visible((2, 2, 37, 45), lists, Marks(), Rule())[..., 8]
  assert seen.any() and not seen.all()
  if where == "key":
    k = k.at[:, :, 8, 1].set(jnp.nan)
  else:
    v = v.at[:, :, 8, 1].set(jnp.inf)
  found, grads = loss_and_gradient(q, k, v, lists, Marks(), Rule())
  np.testing.assert_array_equal(np.isnan(found.out).all(-1), seen)
  np.testing.assert_array_equal(np.isnan(found.out).any(-1), seen)
  np.testing.assert_array_equal(np.isnan(found.lse), seen)
  assert all(np.isfinite(g).all() for g in grads)


def test_vmap_is_a_loop_and_none_is_left():
  rng = np.random.default_rng(2)
  shape = Shape()
  some = [random_lists(rng, shape, c) for c in (0.3, 0.8, 0.5)]
  lists = jax.tree.map(lambda *a: jnp.stack(a), *some)
  q, k, v = random_arrays(rng, shape)
  qs = jnp.stack([q, q + 1, q - 1])
  bias = jnp.asarray(rng.normal(size=(2, 1, 45)), jnp.float32)
  sinks = jnp.asarray(rng.normal(size=2), jnp.float32)

  def one(q, lists, k, v, bias, sinks):
    def loss(q, k, v, bias, sinks):
      marks = Marks(kv_bias=bias, sinks=sinks)
      found = block_sparse_attention(q, k, v, lists, marks)
      return jnp.sin(found.out).sum() + found.lse.sum(), found.out

    return jax.grad(loss, range(5), has_aux=True)(q, k, v, bias, sinks)

  together = jax.vmap(one, (0, 0, None, None, None, None))
  got = jax.jit(together)(qs, lists, k, v, bias, sinks)
  each = jax.jit(one)
  want = [each(x, own, k, v, bias, sinks) for x, own in zip(qs, some)]
  want = jax.tree.map(lambda *a: jnp.stack(a), *want)
  for a, b in zip(*map(jax.tree.leaves, (got, want)), strict=True):
    np.testing.assert_allclose(a, b, atol=2e-5)
  lowered = lambda f, *args: jax.jit(f).lower(*args).as_text()
  loops = lambda *call: lowered(*call).count("stablehlo.while")
  assert loops(together, qs, lists, k, v, bias, sinks) == loops(
    one, q, some[0], k, v, bias, sinks
  )


def test_vmap_of_shared_lists_and_of_sinks():
  rng = np.random.default_rng(3)
  shape = Shape(lists=1)
  lists = random_lists(rng, shape, 0.5)
  q, k, v = random_arrays(rng, shape)
  sinks = jnp.asarray(rng.normal(size=(2, 2)), jnp.float32)
  run = jax.jit(
    lambda k, s: block_sparse_attention(q, k, v, lists, Marks(sinks=s)).out
  )
  ks = jnp.stack([k, -k])
  got = jax.jit(jax.vmap(run))(ks, sinks)
  shared = jax.jit(jax.vmap(run, (0, None)))(ks, sinks[0])
  for i in range(2):
    np.testing.assert_allclose(got[i], run(ks[i], sinks[i]), atol=1e-5)
    np.testing.assert_allclose(shared[i], run(ks[i], sinks[0]), atol=1e-5)


def test_one_trace_serves_all_lists():
  rng = np.random.default_rng(4)
  shape = Shape()
  arrays = random_arrays(rng, shape)
  run = jax.jit(lambda lists: block_sparse_attention(*arrays, lists).out)
  for chance in (0, 0.2, 1):
    run(random_lists(rng, shape, chance))
  assert run._cache_size() == 1


def test_inside_scan_and_remat():
  rng = np.random.default_rng(5)
  shape = Shape(queries=24, keys=24)
  lists = random_lists(rng, shape, 0.7)
  q, k, v = random_arrays(rng, shape)

  def layers(wrap, q):
    layer = lambda x: x + block_sparse_attention(x, k, v, lists).out
    step = lambda x, _: (wrap(layer)(x), None)
    return jnp.sin(jax.lax.scan(step, q, None, length=2)[0]).sum()

  def unrolled(q):
    for _ in range(2):
      q = q + reference.block_sparse_attention(q, k, v, lists).out
    return jnp.sin(q).sum()

  want = jax.grad(unrolled)(q)
  got = jax.jit(jax.grad(functools.partial(layers, jax.checkpoint)))(q)
  np.testing.assert_allclose(got, want, atol=1e-4)


def test_sixteen_bits_come_close():
  rng = np.random.default_rng(6)
  shape = Shape()
  lists = random_lists(rng, shape, 0.5)
  narrow = [a.astype(jnp.bfloat16) for a in random_arrays(rng, shape)]
  wide = [a.astype(jnp.float32) for a in narrow]
  out, lse, _ = block_sparse_attention(*narrow, lists)
  assert out.dtype == jnp.bfloat16 and lse.dtype == jnp.float32
  want = brute.attention(*wide, lists, Marks(), Rule())
  np.testing.assert_allclose(out.astype(jnp.float32), want["out"], atol=2e-2)


@pytest.mark.parametrize("capacity", [1, 2, 3, 5, 8, 13])
def test_every_entry_has_one_turn(capacity):
  """Whatever the counts: by adding up who was stepped on."""
  cut = steps.Cut(1, 1, 1, 1, 8 * 40, 512 * 20, 8, 512)
  assert cut.widths(capacity)[0] <= 2, "so that lists take several steps"
  count = np.random.default_rng(capacity).integers(0, capacity + 1, 40)

  def step(part, seen):
    row = jnp.where(part.live, part.item[:, None], cut.items)
    return seen.at[row, part.entry].add(1, mode="drop")

  seen = steps.sweep(
    cut, jnp.asarray(count), capacity, step, jnp.zeros((40, capacity), int)
  )
  want = np.arange(capacity) < count[:, None]
  np.testing.assert_array_equal(seen, want)


@pytest.mark.parametrize("kind", ["forward", "backward"])
def test_memory_does_not_grow_with_the_pairs(kind):
  tokens, heads, width = 32_768, 4, 64
  tiles = tokens // 128
  of = jax.ShapeDtypeStruct
  arrays = [of((1, heads, tokens, width), jnp.float32)] * 3
  capacity = round(0.05 * tiles)
  lists = BlockLists(
    of((1, heads, tiles, capacity), jnp.int32),
    of((1, heads, tiles), jnp.int32),
  )

  def run(q, k, v, lists):
    return block_sparse_attention(q, k, v, lists).out.sum()

  f = run if kind == "forward" else jax.grad(run, (0, 1, 2))
  stats = jax.jit(f).lower(*arrays, lists).compile().memory_analysis()
  times = {"forward": 6, "backward": 14}[kind]
  assert stats.temp_size_in_bytes < times * 4 * heads * tokens * width
  assert stats.temp_size_in_bytes < 4 * heads * tokens * tokens / 40


def test_parts_merge_into_the_whole():
  rng = np.random.default_rng(8)
  shape = Shape(queries=16, keys=32)
  q, k, v = random_arrays(rng, shape)
  index = jnp.broadcast_to(jnp.arange(4), (1, 1, 2, 4))
  lists = lambda index, count: BlockLists(
    index, jnp.asarray(count).reshape(1, 1, 2), None, 8, 8
  )
  whole = lists(index, [4, 2])
  rest = index.at[..., 0, :].set(jnp.array([2, 3, 0, 0]))
  parts = lists(index, [2, 0]), lists(rest, [2, 2])

  def merged(q, k, v):
    found = [block_sparse_attention(q, k, v, p, Marks(), FULL) for p in parts]
    outs, lses, _ = zip(*found)
    return merge_lse(jnp.stack(outs), jnp.stack(lses))

  def want(q, k, v):
    return block_sparse_attention(q, k, v, whole, Marks(), FULL)[:2]

  def run(f):
    loss = lambda *a: (sum(jnp.sin(x).sum() for x in f(*a)), f(*a))
    return jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True))(q, k, v)

  for got, right in zip(*map(jax.tree.leaves, map(run, (merged, want)))):
    np.testing.assert_allclose(got, right, atol=5e-5)


def test_merging_nothing_is_nothing():
  outs = jnp.array([[[jnp.nan]], [[2.0]]])
  lses = jnp.array([[-jnp.inf], [0.0]])
  np.testing.assert_array_equal(merge_lse(outs, lses)[0], [[2.0]])
  none = jnp.full_like(lses, -jnp.inf)
  out, lse = merge_lse(outs, none)
  assert out == 0 and lse == -jnp.inf
  grads = jax.grad(lambda o, l: merge_lse(o, l)[0].sum(), (0, 1))(outs, none)
  assert all((g == 0).all() for g in grads)
  with pytest.raises(ValueError, match="outs is"):
    merge_lse(outs, lses[0])


def bad(**changes):
  shape = Shape()
  rng = np.random.default_rng(9)
  q, k, v = random_arrays(rng, shape)
  given = {"q": q, "k": k, "v": v, "lists": random_lists(rng, shape, 0.5)}
  return given | {
    name: change(given[name]) if callable(change) else change
    for name, change in changes.items()
  }


def change(**fields):
  return lambda lists: dataclasses.replace(
    lists, **{n: f(getattr(lists, n)) for n, f in fields.items()}
  )


ONES = jnp.ones((2, 37), jnp.int32)


@pytest.mark.parametrize(
  ("given", "words"),
  [
    (bad(q=lambda q: q[0]), "q is"),
    (bad(k=lambda k: k[:, :, :, :4]), "must agree"),
    (bad(v=lambda v: v[:, :, :9]), "must agree"),
    (
      bad(
        q=lambda q: q[:, [0, 1, 1]],
        k=lambda k: k[:, [0, 0]],
        v=lambda v: v[:, [0, 0]],
      ),
      "must divide",
    ),
    (bad(k=lambda k: k.astype(int)), "k must be floating"),
    (bad(lists=change(index=lambda i: i[:, :, 1:])), "Q = 5 tiles of 8"),
    (bad(lists=change(index=lambda i: i[..., :0])), "lists.index"),
    (bad(lists=change(count=lambda c: c[..., 1:])), "lists.count"),
    (bad(lists=change(count=lambda c: c * 1.0)), "integers"),
    (bad(lists=change(rows=lambda r: ONES)), "lists.rows"),
    (bad(lists=change(block_kv=lambda b: 0)), "at least 1"),
    (bad(marks=Marks(q_pos=ONES[:, 1:])), "q_pos"),
    (bad(marks=Marks(kv_bias=ONES)), "kv_bias"),
    (bad(marks=Marks(q_segment=ONES)), "give both"),
    (bad(rule=Rule(window=0)), "window"),
    (bad(rule=Rule(softcap=0.0)), "softcap"),
  ],
)
def test_bad_input_is_named(given, words):
  with pytest.raises(ValueError, match=words):
    block_sparse_attention(**given)
