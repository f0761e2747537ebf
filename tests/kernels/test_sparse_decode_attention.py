"""Law: a few queries over listed units of a cache equal brute force."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from pallas_kernels.block_sparse_attention.types import CAUSAL
from pallas_kernels.sparse_decode_attention import (
  Marks,
  Rule,
  Units,
  reference,
  sparse_decode_attention,
  tpu,
  tuned,
  xla,
)
from pallas_kernels.sparse_decode_attention.tuned import Blocks

B, H, D, E = 2, 4, 8, 6
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


@dataclasses.dataclass(frozen=True)
class Form:
  """A way to ask; `lists` is 1, "G" or "H"."""

  groups: int = 2
  lists: int | str = 1
  queries: int = 1
  unit: int | None = 4
  slots: int = 37
  page: int | None = None
  quantised: bool = False
  marked: bool = True
  rule: Rule = CAUSAL
  wide: int = E

  def arguments(self, seed=0):
    """q, k, v, units, marks, rule; and the rest by name."""
    rng = np.random.default_rng(seed)
    normal = lambda *shape: rng.normal(size=shape).astype(np.float32)
    g, s, t = self.groups, self.slots, self.queries
    lists = {"G": g, "H": H}.get(self.lists, self.lists)
    more, lead, inner = {}, B, s
    if self.page:
      lead, inner = 2 * B * s // self.page, self.page
      pages = rng.permutation(lead)[: B * s // self.page].reshape(B, -1)
      pages[0, 1] = -1
      more["page_table"] = pages
    shape = (lead, g, inner)
    k, v = normal(*shape, D), normal(*shape, self.wide)
    if self.quantised:
      k, v = (rng.integers(-127, 128, a.shape).astype(np.int8) for a in (k, v))
      more |= {n: np.abs(normal(*shape)) / 60 for n in ("k_scale", "v_scale")}
    units = None
    if self.unit:
      count = -(-s // self.unit)
      most = max(count // 2, 1)
      index = np.stack(
        [rng.permutation(count)[:most] for _ in range(B * lists)]
      )
      index = index.reshape(B, lists, most)
      asked = rng.integers(0, most + 1, (B, lists))
      asked[0, 0] = most
      index[np.arange(most) >= asked[..., None]] = 10**6  # is not read
      units = Units(index.astype(np.int32), asked.astype(np.int32), self.unit)
    marks = Marks()
    if self.marked:
      heads = g if t > 1 else 1
      marks = Marks(
        q_pos=rng.integers(s // 2, s + 3, (B, t)),
        kv_pos=rng.integers(-1, s, (B, heads, s)),
        q_segment=rng.integers(0, 2, (B, t)),
        kv_segment=rng.integers(0, 2, (B, s)),
        kv_bias=normal(B, heads, s),
        sinks=normal(H),
      )
    tree = normal(B, H, t, D), k, v, units, marks
    return (
      *jax.tree.map(jnp.asarray, tree),
      self.rule,
      jax.tree.map(jnp.asarray, more),
    )

  def run(self, f, seed=0, **how):
    q, k, v, units, marks, rule, more = self.arguments(seed)
    call = lambda q, k, v, units, marks, more: f(
      q, k, v, units, marks, rule, mass=True, **more, **how
    )
    call = call if f is brute else jax.jit(call)
    return call(q, k, v, units, marks, more)


def brute(q, k, v, units, marks, rule, *, mass, page_table=None, **scales):
  """Query by query and key by key, in f64."""
  array = lambda a: None if a is None else np.asarray(a)
  q, k, v, table = map(array, (q, k, v, page_table))
  marks = Marks(*map(array, marks))
  groups, inner = k.shape[1:3]
  s = inner if table is None else inner * table.shape[1]
  unit = 1 if units is None else units.unit
  entries = s if units is None else units.index.shape[2]
  out = np.zeros((*q.shape[:3], v.shape[3]))
  lse = np.full(q.shape[:3], -np.inf)
  given = np.zeros((B, H, entries))

  def at(a, name, b, g, slot):
    lead, place = b, slot
    if table is not None:
      lead, place = table[b, slot // inner], slot % inner
    scale = scales.get(name)
    return a[lead, g, place] * (1.0 if scale is None else scale[lead, g, place])

  for b, h, t in np.ndindex(*q.shape[:3]):
    g = h * groups // H
    if units is None:
      chosen = list(range(s))
    else:
      n = h * units.index.shape[1] // H
      chosen = np.asarray(units.index)[b, n, : int(units.count[b, n])]
    at_ = s - q.shape[2] + t if marks.q_pos is None else marks.q_pos[b, t]
    scores, values, owner = [], [], []
    for entry, u in enumerate(chosen):
      for slot in range(u * unit, min((u + 1) * unit, s)):
        pos, bias = slot, 0.0
        if marks.kv_pos is not None:
          p = g if marks.kv_pos.shape[1] > 1 else 0
          pos, bias = marks.kv_pos[b, p, slot], marks.kv_bias[b, p, slot]
        seen = pos >= 0 and pos <= at_
        seen &= rule.window is None or pos > at_ - rule.window
        if marks.q_segment is not None:
          seen &= marks.q_segment[b, t] == marks.kv_segment[b, slot]
        if table is not None:
          seen &= table[b, slot // inner] >= 0
        if not seen:
          continue
        score = q[b, h, t] @ at(k, "k_scale", b, g, slot) / np.sqrt(D)
        if rule.softcap:
          score = rule.softcap * np.tanh(score / rule.softcap)
        scores.append(score + bias)
        values.append(at(v, "v_scale", b, g, slot))
        owner.append(entry)
    odds = np.exp(scores)
    total = odds.sum()
    if marks.sinks is not None:
      total += np.exp(marks.sinks[h])
    if total:
      lse[b, h, t] = np.log(total)
    if scores:
      out[b, h, t] = odds / total @ np.stack(values)
      np.add.at(given[b, h], owner, odds / total)
  return out, lse, given


def same(got, want, **close):
  assert not np.isnan(np.asarray(got.out)).any()
  for a, b in zip(got, want):
    np.testing.assert_allclose(a, b, **(close or CLOSE))


FORMS = {
  "one list": Form(),
  "a list for each key head": Form(groups=2, lists="G", queries=3),
  "a list for each query head": Form(lists="H", rule=Rule(softcap=2.0)),
  "one key head": Form(groups=1, queries=2, rule=Rule(window=9)),
  "a key head each": Form(groups=H, lists="G", unit=5),
  "tokens": Form(unit=1, lists="G", queries=2),
  "the whole cache": Form(unit=None, queries=2),
  "the whole cache, unmarked": Form(unit=None, marked=False, queries=3),
  "int8": Form(quantised=True, lists="G"),
  "int8, the whole cache": Form(quantised=True, unit=None),
  "pages": Form(page=4, slots=36),
  "parts of pages": Form(page=6, unit=2, slots=36, lists="G"),
  "several pages": Form(page=2, unit=6, slots=36, quantised=True),
  "a whole pool": Form(page=6, unit=None, slots=36),
  "a unit longer than the cache": Form(unit=64),
}


@pytest.mark.parametrize("chunk", ["one", "many"])
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_xla_equals_brute_force(form, chunk, monkeypatch):
  if chunk == "many":
    monkeypatch.setattr(xla, "CHUNK_BYTES", 64)
    monkeypatch.setattr(xla, "LEAST_SLOTS", 5)
  same(form.run(sparse_decode_attention), form.run(brute))


def test_reference_equals_brute_force():
  for form in (FORMS["parts of pages"], FORMS["int8"], FORMS["one list"]):
    same(form.run(reference.sparse_decode_attention), form.run(brute))


KERNEL = {
  "one list": (
    Form(unit=8, slots=64, queries=2, wide=D),
    Blocks(32, 8, heads=2, depth=2, items=2),
  ),
  "lists of heads, two cores": (
    Form(lists="G", unit=8, slots=64, wide=D, rule=Rule(window=40)),
    Blocks(16, 8, heads=2, cores=2),
  ),
  "lists of query heads": (
    Form(lists="H", unit=16, slots=64, wide=D, rule=Rule(softcap=2.0)),
    Blocks(32, 16, heads=2, items=4),
  ),
  "the whole cache": (
    Form(unit=None, slots=64, wide=D, marked=False),
    Blocks(32, 16, heads=2),
  ),
  "a pool": (
    Form(lists="G", unit=16, page=8, slots=64, queries=3, wide=D),
    Blocks(32, 8, heads=2, items=2),
  ),
  "int8": (
    Form(unit=8, slots=64, quantised=True, wide=D),
    Blocks(32, 8, heads=1, items=4),
  ),
}


def kernel(cut, q, k, v, units, marks, rule, *, interpret=True, **more):
  names = "page_table", "k_scale", "v_scale"
  more = dict.fromkeys(names) | more
  return tpu.forward(
    q, k, v, units, marks, rule, cut=cut, interpret=interpret, debug=True,
    **more,
  )  # fmt: skip


@pytest.mark.parametrize("form, cut", KERNEL.values(), ids=KERNEL)
def test_kernel_equals_brute_force(form, cut):
  f = functools.partial(kernel, cut)
  same(form.run(f), form.run(brute))


def test_kernel_has_no_race():
  form, cut = KERNEL["lists of heads, two cores"]
  params = pltpu.InterpretParams(detect_races=True)
  f = functools.partial(kernel, dataclasses.replace(cut, cores=1))
  same(form.run(f, interpret=params), form.run(brute))
  assert not pltpu_races()


def pltpu_races():
  from jax._src.pallas.mosaic.interpret import interpret_pallas_call

  return interpret_pallas_call.races.races_found


def test_kernel_takes_a_batch_in_parts(monkeypatch):
  form, cut = KERNEL["lists of heads, two cores"]
  monkeypatch.setattr(tpu, "MOST_SCALARS", 1)
  f = functools.partial(kernel, cut)
  same(form.run(f), form.run(brute))


@pytest.mark.parametrize("form", ["xla", "in place", "kernel"])
def test_nothing_leaks(form):
  """Units not listed, empty slots, scales and what no query sees are NaN."""
  shape, cut = KERNEL["lists of heads, two cores"]
  if form == "in place":
    shape = dataclasses.replace(shape, unit=None)
  q, k, v, units, marks, rule, _ = shape.arguments()
  marks = marks._replace(q_segment=None, kv_segment=None)
  want = brute(q, k, v, units, marks, rule, mass=True)
  bad = (marks.kv_pos < 0) | (marks.kv_pos > marks.q_pos[:, :, None])
  if units is not None:
    listed = np.zeros((B, 2, 64 // 8), bool)
    for b, n in np.ndindex(B, 2):
      listed[b, n, units.index[b, n, : int(units.count[b, n])]] = True
    bad |= ~np.repeat(listed, 8, axis=2)
  k, v = (jnp.where(bad[..., None], jnp.nan, a) for a in (k, v))
  run = functools.partial(kernel, cut)
  run = run if form == "kernel" else sparse_decode_attention
  same(run(q, k, v, units, marks, rule, mass=True), want)
  if form == "kernel":
    return
  f = lambda *a: (run(*a, units, marks, rule).out ** 2).sum()
  for gradient in jax.jit(jax.grad(f, (0, 1, 2)))(q, k, v):
    assert np.isfinite(gradient).all()


@pytest.mark.parametrize("name", ["a list for each key head", "int8"])
def test_gradients_are_those_of_the_reference(name):
  form = FORMS[name]
  q, k, v, units, marks, rule, more = form.arguments()
  moving = {"q": q, "bias": marks.kv_bias, "sinks": marks.sinks, **more}
  if not form.quantised:
    moving |= {"k": k, "v": v}

  def loss(f, moving):
    m = {"k": k, "v": v} | moving
    told = marks._replace(kv_bias=m["bias"], sinks=m["sinks"])
    scales = {n: m[n] for n in more}
    got = f(m["q"], m["k"], m["v"], units, told, rule, **scales)
    some = jnp.isfinite(got.lse)
    return (got.out**2).sum() + jnp.sin(jnp.where(some, got.lse, 0)).sum()

  got, want = (
    jax.jit(jax.grad(functools.partial(loss, f)))(moving)
    for f in (sparse_decode_attention, reference.sparse_decode_attention)
  )
  jax.tree.map(
    functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4),
    got,
    want,
  )


def test_vmap_and_bf16():
  form = Form(unit=16, slots=64, wide=D)
  q, k, v, units, marks, rule, _ = form.arguments()
  f = lambda q: sparse_decode_attention(q, k, v, units, marks, rule).out
  many = jnp.stack([q, 2 * q])
  np.testing.assert_allclose(
    jax.vmap(f)(many), jnp.stack([f(q), f(2 * q)]), **CLOSE
  )
  q, k, v = (a.astype(jnp.bfloat16) for a in (q, k, v))
  got = sparse_decode_attention(q, k, v, units, marks, rule)
  want = reference.sparse_decode_attention(q, k, v, units, marks, rule)
  assert got.out.dtype == jnp.bfloat16
  np.testing.assert_allclose(
    *(np.asarray(a.out, np.float32) for a in (got, want)), atol=2e-2
  )


def test_a_tpu_runs_the_kernel_where_pages_are_tiles():
  """And nothing of the size of the cache is made elsewhere."""
  spec = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
  q, k = spec(1, 8, 1, 128), spec(1, 4, 8192, 128)
  index = jax.ShapeDtypeStruct((1, 4, 8), jnp.int32)
  count = jax.ShapeDtypeStruct((1, 4), jnp.int32)

  def f(unit, q, k, v, index, count):
    return sparse_decode_attention(q, k, v, Units(index, count, unit))

  for unit, there in ((16, True), (1, False)):
    g = jax.jit(functools.partial(f, unit))
    text = jax.export.export(g, platforms=["tpu"])(q, k, k, index, count)
    assert ("tpu_custom_call" in text.mlir_module()) == there
    memory = g.lower(q, k, k, index, count).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 1e6
  mesh = jax.make_mesh((1,), ("data",), axis_types=(AxisType.Auto,))
  local = jax.shard_map(
    lambda *a: f(16, *a).out,
    mesh=mesh,
    in_specs=P("data"),
    out_specs=P("data"),
  )
  text = jax.export.export(jax.jit(local), platforms=["tpu"])
  text = text(q, k, k, index, count).mlir_module()
  assert "tpu_custom_call" in text, "in `shard_map` too"
  whole = jax.jit(lambda q, k, v: sparse_decode_attention(q, k, v, None))
  memory = whole.lower(q, k, k).compile().memory_analysis()
  assert memory.temp_size_in_bytes < 2.5 * xla.CHUNK_BYTES


def test_blocks_fit_chips():
  bf16 = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.bfloat16)
  q, k = bf16(8, 32, 1, 128), bf16(8, 8, 32768, 128)
  for version, cores in (
    (pltpu.ChipVersion.TPU_V5E, 1), (pltpu.ChipVersion.TPU_V5P, 2),
  ):  # fmt: skip
    info = pltpu.get_tpu_info_for_chip(version, cores)
    cut = tuned.blocks(q, k, k, None, None, info)
    assert cut.slots % 128 == 0 and cut.slots >= 512 and cut.cores == cores
    assert cut.vmem_limit_bytes <= info.vmem_capacity_bytes
    one = tuned.blocks(bf16(1, 32, 1, 128), bf16(1, 8, 512, 128), *(
      bf16(1, 8, 512, 128), None, None, info))  # fmt: skip
    assert one.cores == cores  # heads are shared out where rows are one
  odd = Units(jax.ShapeDtypeStruct((8, 1, 4), jnp.int32), bf16(8, 1), unit=8)
  assert tuned.blocks(q, k, k, odd, None) is None


@pytest.mark.parametrize(
  "change, message",
  [
    ({"q": jnp.zeros((B, H, 17, D))}, "17 queries"),
    ({"q": jnp.zeros((B, 3, 1, D))}, "do not share"),
    ({"q": jnp.zeros((B + 1, H, 1, D))}, "page_table"),
    ({"k": jnp.zeros((B, 2, 37, D), jnp.int8)}, "k_scale"),
    ({"v": jnp.zeros((B, 2, 36, D))}, "must agree"),
    ({"k_scale": jnp.zeros((B, 2, 37))}, "k_scale"),
    ({"units": Units(jnp.zeros((B, 3, 1), int), jnp.zeros((B, 3), int))}, "L"),
    ({"marks": Marks(kv_pos=jnp.zeros((B, 37), int))}, "marks.kv_pos"),
    ({"marks": Marks(q_segment=jnp.zeros((B, 1), int))}, "both"),
    ({"page_table": jnp.zeros((B, 2), int)}, "multiple"),
  ],
)
def test_bad_input_is_refused(change, message):
  q, k, v, units, *_ = Form().arguments()
  given = {"q": q, "k": k, "v": v, "units": units} | change
  with pytest.raises(ValueError, match=message):
    sparse_decode_attention(**given)
