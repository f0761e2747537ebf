"""Law: chunks, the recurrence and the sum over all pairs are one function."""

import functools
import importlib.util
import subprocess
import sys
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from benchmarks.harness import from_json
from pallas_kernels.linear_attention import (
  linear_attention,
  linear_attention_step,
  reference,
)
from pallas_kernels.linear_attention.specs import TINY

B, H, T, D, E = TINY[1:6]


def arrays(spec=TINY, dtype=jnp.float32, seed=0):
  """q, k, v and a state."""
  keys = jax.random.split(jax.random.key(seed), 4)
  lead = spec.batch, spec.heads
  normal = lambda key, *shape: 0.5 * jax.random.normal(key, (*lead, *shape))
  wide = spec.tokens, spec.width
  q, k = normal(keys[0], *wide), normal(keys[1], *wide)
  v = normal(keys[2], spec.tokens, spec.out_width)
  state = normal(keys[3], spec.width, spec.out_width)
  return (*(a.astype(dtype) for a in (q, k, v)), state)


def uniform(key, *shape, most):
  return -most * jax.random.uniform(jax.random.key(key), shape)


SEGMENT = np.repeat([[0, 1, 2, 1], [5, 5, 7, 8]], [16, 13, 3, T - 32], axis=1)
SEGMENT = jnp.asarray(SEGMENT)
MIXED = jnp.where(
  jax.random.bernoulli(jax.random.key(9), 0.2, (B, H, T)), -500.0, -0.02
)
DECAYS = {
  "none": (None, None),
  "one for all": (jnp.full((1, 1, 1), -0.1), None),
  "by head": (uniform(1, 1, H, 1, most=0.5), None),
  "by row and head": (uniform(1, B, H, 1, most=0.5), None),
  "by token": (uniform(2, B, 1, T, most=0.3), None),
  "by token and head": (uniform(3, B, H, T, most=0.3), None),
  "zero": (jnp.zeros((1, H, 1)), None),
  "near zero": (jnp.full((1, H, 1), -1e-6), None),
  "strong": (jnp.array([-29.0, -40.0])[None, :, None], None),
  "infinite": (jnp.array([-jnp.inf, -3.0])[None, :, None], None),
  "strong at times": (MIXED, None),
  "segments": (None, SEGMENT),
  "by head, segments": (uniform(4, 1, H, 1, most=0.5), SEGMENT),
  "by token, segments": (uniform(5, 1, H, T, most=0.5), SEGMENT),
}


def values_and_gradients(f):
  """(q, k, v, log_decay, segment, state) -> results, and what moves them."""

  def run(q, k, v, log_decay, segment, state):
    moving = {"q": q, "k": k, "v": v, "state": state}
    if log_decay is not None:
      moving["log_decay"] = log_decay

    def both(moving):
      given = {"log_decay": None} | moving
      return f(segment=segment, **given)

    results, pull = jax.vjp(both, moving)

    def weight(a):  # varies as `a` does, in `shard_map`
      waves = jnp.cos(jnp.arange(a.size, dtype=jnp.float32))
      return waves.reshape(a.shape).astype(a.dtype) + 0 * a

    return results, pull(jax.tree.map(weight, results))[0]

  return jax.jit(run)


def close(got, want, tolerance=1e-5):
  """Relative to the largest of each array, of those that are not all tiny."""
  flat = lambda tree: jax.tree_util.tree_leaves_with_path(tree)
  for (path, a), (_, b) in zip(flat(got), flat(want), strict=True):
    a, b = (np.asarray(x, np.float64) for x in (a, b))
    assert np.isfinite(a).all(), path
    scale = max(np.abs(b).max(), 0.1)
    np.testing.assert_allclose(a, b, atol=tolerance * scale, err_msg=str(path))


@functools.cache
def chunks(interpret=None, chunk=TINY.chunk):
  run = functools.partial(linear_attention, chunk=chunk, interpret=interpret)
  return jax.jit(run)


recurrent = jax.jit(reference.recurrent)


@pytest.mark.parametrize("case", DECAYS.values(), ids=DECAYS)
def test_three_forms_agree(case):
  """Values and gradients, by every input, of both results."""
  q, k, v, state = arrays()
  decay, segment = case
  given = q, k, v, decay, segment, state
  want = values_and_gradients(recurrent)(*given)
  close(values_and_gradients(reference.quadratic)(*given)[0], want[0])
  close(values_and_gradients(chunks())(*given), want, 2e-5)


@pytest.mark.parametrize(
  "name",
  ["none", "by head", "strong", "by token and head", "by token, segments"],
)
def test_the_kernels_agree(name):
  q, k, v, state = arrays()
  given = q, k, v, *DECAYS[name], state
  want = values_and_gradients(recurrent)(*given)
  got = values_and_gradients(chunks(interpret=True))(*given)
  close(got, want, 2e-5)


@pytest.mark.parametrize("interpret", [None, True], ids=["xla", "kernel"])
def test_sixteen_bits(interpret):
  q, k, v, state = arrays(dtype=jnp.bfloat16)
  wide = (a.astype(jnp.float32) for a in (q, k, v))
  decay = DECAYS["by token and head"][0]
  got = values_and_gradients(chunks(interpret=interpret))(
    q, k, v, decay, None, state
  )
  assert {a.dtype for a in (got[0][0], *(got[1][n] for n in "qkv"))} == {
    q.dtype
  }
  assert got[0][1].dtype == got[1]["log_decay"].dtype == jnp.float32
  want = values_and_gradients(recurrent)(*wide, decay, None, state)
  close(got, want, 2e-2)


def test_no_chunk_changes_the_result():
  spec = TINY._replace(tokens=96)
  q, k, v, state = arrays(spec)
  decay = uniform(1, B, H, 96, most=0.5)
  given = q, k, v, decay, None, state
  want = values_and_gradients(chunks(chunk=32))(*given)
  for chunk in (48, 128):
    close(values_and_gradients(chunks(chunk=chunk))(*given), want)
    few = q, k, v, decay[..., :1], None, state
    close(chunks(chunk=chunk)(*few), chunks()(*few))


@pytest.mark.parametrize("tokens", [1, 15, 16, 17, 32])
@pytest.mark.parametrize("interpret", [None, True], ids=["xla", "kernel"])
def test_any_length(tokens, interpret):
  """Padding decays nothing, and the state is that after the last token."""
  q, k, v, state = arrays(TINY._replace(tokens=tokens))
  decay = DECAYS["by head"][0]
  got = chunks(interpret=interpret)(q, k, v, decay, None, state)
  close(got, recurrent(q, k, v, decay, None, state))


def test_wide_heads_are_not_split():
  spec = TINY._replace(width=136, out_width=260, tokens=40)
  q, k, v, state = arrays(spec)
  given = q, k, v, DECAYS["by head"][0], None, state
  want = values_and_gradients(recurrent)(*given)
  for interpret in (None, True):
    close(values_and_gradients(chunks(interpret=interpret))(*given), want, 2e-5)


def test_heads_share_keys():
  q, k, v, _ = arrays(TINY._replace(heads=4))
  few = k[:, :2], v[:, :2]
  each = (jnp.repeat(a, 2, axis=1) for a in few)
  decay = uniform(1, 1, 4, 1, most=0.5)
  close(chunks()(q, *few, decay), chunks()(q, *each, decay))
  close(recurrent(q, *few, decay), chunks()(q, *few, decay))


def test_a_state_goes_on():
  """In two pieces as in one; segments too, where the border is inside."""
  q, k, v, state = arrays()
  decay = DECAYS["by token and head"][0]
  cut = 23
  first = lambda a: a[:, :, :cut]
  rest = lambda a: a[:, :, cut:]
  whole = chunks()(q, k, v, decay, SEGMENT, state)
  out, middle = chunks()(*map(first, (q, k, v, decay)), SEGMENT[:, :cut], state)
  more, end = chunks()(*map(rest, (q, k, v, decay)), SEGMENT[:, cut:], middle)
  close((jnp.concatenate([out, more], 2), end), whole)


@pytest.mark.parametrize("name", ["none", "by head", "strong", "infinite"])
def test_steps_are_the_prefill(name):
  q, k, v, state = arrays()
  decay = DECAYS[name][0]
  want = chunks()(q, k, v, decay, None, state)
  each = None if decay is None else decay[..., 0]
  outs = []
  for t in range(T):
    out, state = linear_attention_step(
      q[:, :, t], k[:, :, t], v[:, :, t], state, each
    )
    outs.append(out)
  close((jnp.stack(outs, 2), state), want)


def test_nothing_overflows_at_any_decay():
  """Half of the tokens keep all, half nothing; values are large."""
  q, k, v, state = (1e4 * a for a in arrays())
  for decay in (-1e30, -1e4, -30.0, -29.9, -1e-30):
    decay = jnp.where(jnp.arange(T) % 2, 0.0, decay)[None, None]
    got = values_and_gradients(chunks())(q, k, v, decay, None, state)
    want = recurrent(q, k, v, decay, None, state)
    close(got[0], want)
    chex.assert_tree_all_finite(got)


def test_forgotten_tokens_reach_nothing():
  """A border: no gradient crosses it, nor enters its own decay."""
  q, k, v, state = arrays()
  decay = DECAYS["by token and head"][0]
  _, made = values_and_gradients(chunks())(q, k, v, decay, SEGMENT, state)
  border = np.pad(SEGMENT[:, 1:] != SEGMENT[:, :-1], ((0, 0), (1, 0)))
  there = np.broadcast_to(border[:, None], decay.shape)
  assert not np.asarray(made["log_decay"])[there].any()
  late = lambda state: chunks()(q, k, v, decay, SEGMENT, state)[0][:, :, 29:]
  assert not jax.vjp(late, state)[1](jnp.ones((B, H, T - 29, E)))[0].any()


def test_vmap_is_a_loop():
  q, k, v, state = arrays()
  decay = DECAYS["by head"][0]
  more = jnp.stack([q, 2 * q, -q])
  for interpret in (None, True):
    run = chunks(interpret=interpret)
    f = lambda q: values_and_gradients(run)(q, k, v, decay, None, state)  # noqa: B023
    got = jax.vmap(f)(more)
    for n, one in enumerate(more):
      close(jax.tree.map(lambda a: a[n], got), f(one))  # noqa: B023


def test_inside_shard_map():
  """Over a mesh axis of one device; `tests/devices` has eight."""
  mesh = jax.make_mesh((1,), ("data",), axis_types=(AxisType.Auto,))
  q, k, v, state = arrays()
  decay = DECAYS["by token and head"][0]

  def part(q, k, v, decay, state):
    run = values_and_gradients(chunks())
    return run(q, k, v, decay, None, state)

  spread = jax.shard_map(
    part, mesh=mesh, in_specs=P("data"), out_specs=P("data")
  )
  want = values_and_gradients(chunks())(q, k, v, decay, None, state)
  close(spread(q, k, v, decay, state), want)


@pytest.mark.parametrize("platform", ["tpu", "cuda", "cpu"])
def test_lowers_for_every_platform(platform):
  """The kernel on TPU only, in `shard_map` too."""
  q, k, v, state = arrays(TINY._replace(tokens=256, width=128, out_width=128))
  decay = DECAYS["by head"][0]
  mesh = jax.make_mesh((1,), ("data",), axis_types=(AxisType.Auto,))

  def run(q, k, v, state):
    f = values_and_gradients(linear_attention)
    return f(q, k, v, decay, None, state)

  spread = jax.shard_map(
    lambda *a: run(*a)[0], mesh=mesh, in_specs=P("data"), out_specs=P("data")
  )
  for f in (run, spread):
    made = jax.export.export(jax.jit(f), platforms=[platform])(q, k, v, state)
    assert ("tpu_custom_call" in made.mlir_module()) == (platform == "tpu")


@pytest.mark.parametrize("name", ["by head", "by token, segments"])
def test_no_races(name):
  params = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")
  q, k, v, state = arrays()
  given = q, k, v, *DECAYS[name], state
  got = values_and_gradients(chunks(interpret=params))(*given)
  from jax._src.pallas.mosaic.interpret import interpret_pallas_call as module

  assert not module.races.races_found
  close(got, values_and_gradients(recurrent)(*given), 2e-5)


BAD = {
  "one dtype": ({"k": jnp.zeros((B, H, T, D), jnp.bfloat16)}, "cast them"),
  "sizes": ({"v": jnp.zeros((B, H, T - 1, E))}, "none of them empty"),
  "dimensions": ({"q": jnp.zeros((B, T, D))}, "are \\[batch"),
  "heads": ({"k": jnp.zeros((B, 3, T, D)), "v": jnp.zeros((B, 3, T, E))}, "3"),
  "decay": ({"log_decay": jnp.zeros((B, T))}, "each axis or 1"),
  "decay dtype": ({"log_decay": jnp.zeros((1, 1, 1), jnp.bfloat16)}, "float32"),
  "segment": ({"segment": jnp.zeros((B, T))}, "integers"),
  "state": ({"state": jnp.zeros((B, H, E, D))}, "state is"),
  "chunk": ({"chunk": 100}, "multiple of 16"),
}


@pytest.mark.parametrize(("wrong", "words"), BAD.values(), ids=BAD)
def test_refuses(wrong, words):
  q, k, v, _ = arrays()
  with pytest.raises(ValueError, match=words):
    linear_attention(**{"q": q, "k": k, "v": v} | wrong)


@pytest.mark.skipif(
  importlib.util.find_spec("libtpu") is None,
  reason="needs the compiler of TPUs: pip install 'adaptivejax[aot-tpu]'",
)
def test_the_tpu_compiler_takes_it(tmp_path):
  """In a process of its own: the compiler reads its flags once."""
  out = tmp_path / "cycles.json"
  done = subprocess.run(
    [sys.executable, "-m", "benchmarks.tpu_linear_attention", "--json", out],
    cwd=Path(__file__).parents[2],
    capture_output=True,
    text=True,
    timeout=900,
  )
  assert done.returncode == 0, done.stderr
  rows = from_json(out.read_text())
  chips = {row.case.split()[0] for row in rows}
  assert chips == {"v5e", "v5p", "v6e"}
  assert sum(row.target is not None for row in rows) == 4
  if not jax.__version__.startswith("0.10."):
    pytest.skip("it compiles; the targets are for the compiler of jax 0.10")
  assert not [f"{r.case}: {r.metric}" for r in rows if r.met is False]
