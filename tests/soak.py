# SPDX-License-Identifier: Apache-2.0
"""Thousands of drawn cases of the laws, over every method and primitive.

    make soak MINUTES=20 SEED=0
    python -m tests.soak --seed 0 --cases calm 'expert*'

A program is compiled once for a case, or for a drawn shape of a primitive, and
run on parameters, inputs and budgets that hypothesis draws.  What is counted
is one law held to one draw.  The draws follow from the seed and the name of the
case alone, so that a failure is found again by the line that it prints.
"""

import argparse
import contextlib
import fnmatch
import itertools
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import strategies as st

import tests.conftest  # noqa: F401  its hook comes before the library
from adaptivejax.core import append, attend_blocks, bucketed, masked
from adaptivejax.core.attention import Keys
from adaptivejax.core.cost import Cost
from adaptivejax.core.sparse_attention import attend_blocks_dense
from tests import strategies
from tests.laws import CASES, Case, close, compiled, dense_twin, parameters
from tests.laws.case import Vacuous

CHUNK = 20
"""Draws between looks at the clock."""

NOISE = 0.3
ROUNDING = 1e-3


class Broken(AssertionError):
  """A law that a draw breaks."""


class Bench(NamedTuple):
  """What is ready to be soaked: `check(drawn)` says how many laws it held."""

  draws: Any
  check: Callable[[Any], int]


def bench_of(case: Case) -> Bench:
  """A case of the matrix, compiled."""
  params, x = parameters(case), case.inputs(2)
  run, twin = compiled(case), _twin(case)
  overhead = case.overhead(params, x)
  bound = float(run(params, x, case.some)[1].bound) if _priced(case) else 0.0
  swap = lambda tree: jax.tree.map(lambda a: a[::-1], tree)

  def cost(spent):
    ok = 0 <= spent.items <= spent.capacity and spent.dropped == 0
    ok = ok and spent.spent <= spent.bound and float(spent.bound) == bound
    assert ok and spent.spent <= (spent.full + overhead) * (1 + 1e-6), spent

  def bounded(spent):
    assert spent.spent <= spent.bound, spent

  def laws(params, x, budget) -> Iterator[tuple[str, Callable[[], Any]]]:
    y, spent = run(params, x, budget)
    finite = lambda: np.isfinite(y).all()
    assert finite(), "finite"
    if _priced(case):
      yield "cost", lambda: cost(spent)
    elif isinstance(spent, Cost):
      yield "bound", lambda: bounded(spent)
    if twin is not None:
      yield "oracle", lambda: near(y, twin(params, x, budget), params, x)
    if "row" not in case.unless:
      other = lambda: run(params, swap(x), budget)[0]
      yield "row", lambda: near(y, other()[::-1], params, x)
    if case.poison is not None and "poison" not in case.unless:
      yield "poison", lambda: poisoned(params, x)

  def near(got, want, params, x):
    del params, x
    close(got, want, tolerance=3e-5)

  def poisoned(params, x):
    bad, spoilt, budget, ignore = case.poison(params, x)
    ignore = jnp.asarray(False if ignore is None else ignore)
    clean = lambda *args: jnp.where(ignore, 0, run(*args, budget)[0])
    close(clean(bad, spoilt), clean(params, x), tolerance=3e-5)

  def held(params, x, budget):
    count = 0
    for name, law in laws(params, x, budget):
      try:
        law()
      except Vacuous:
        continue
      except AssertionError as error:
        raise Broken(f"{name}: {error}") from error
      count += 1
    return count

  def check(drawn):
    params, x, budget = drawn
    try:
      return held(params, x, budget)
    except Broken as broken:
      if not str(broken).startswith(("oracle", "row")):
        raise
      # A number within rounding of its threshold may fall on either side; one
      # that is moved a little does not.
      moved = jax.tree.map(_nudge, params)
      return held(moved, jax.tree.map(_nudge, x), budget)

  if case.static:
    budgets = st.just(case.some)
  else:
    named = case.traced
    budgets = (
      strategies.budgets(case.none, case.some, case.full)
      if not case.same_shape
      else st.sampled_from(list(named))
    )
  like = lambda tree: strategies.like(tree, noise=NOISE)
  return Bench(st.tuples(like(params), like(x), budgets), check)


def _priced(case: Case) -> bool:
  return "cost" not in case.unless


def _twin(case: Case):
  """The masked-dense twin, compiled for every budget at once."""
  if "oracle" in case.unless:
    return None
  static = 2 if case.static else None
  f = lambda params, x, budget: case.run(params, x, budget)[0]
  with dense_twin():
    traced = jax.jit(f, static_argnums=static).trace(
      parameters(case), case.inputs(2), case.some
    )
  run = traced.lower().compile()
  if case.static:
    return lambda params, x, budget: run(params, x)
  return run


def _nudge(a):
  if not jnp.issubdtype(a.dtype, jnp.floating):
    return a
  return a * (1 + ROUNDING)


def bucketed_of(rng: np.random.Generator) -> Bench:
  """Rows of a drawn number, width and type, under drawn masks."""
  n, d, e = (int(rng.integers(1, most)) for most in (200, 20, 20))
  dtype = [jnp.float32, jnp.bfloat16][int(rng.integers(2))]
  f = lambda rows, w: jnp.tanh(rows @ w)
  run, twin = (
    jax.jit(lambda x, mask, w, op=op: op(f, x, mask, w, keep=False))
    for op in (bucketed, masked)
  )
  bound = []

  def check(drawn):
    x, mask, w = drawn
    (y, cost), (want, full) = run(x, mask, w), twin(x, mask, w)
    tolerance = 3e-5 if dtype == jnp.float32 else 2e-2
    close(jnp.float32(y), jnp.float32(want), tolerance=tolerance)
    assert cost.items == mask.sum() and full.spent == cost.full
    bound.append(float(cost.bound))
    assert cost.spent <= cost.bound == bound[0]
    return 2

  arrays = strategies.arrays
  return Bench(
    st.tuples(
      arrays((n, d), dtype), strategies.selections(n), arrays((d, e), dtype)
    ),
    check,
  )


def lists_of(rng: np.random.Generator) -> Bench:
  """Attention over drawn lists, of drawn shapes."""
  batch, groups, share = (int(rng.integers(1, 3)) for _ in range(3))
  tiles, blocks, width = (int(rng.integers(1, 5)) for _ in range(3))
  block_q, block_kv = (int(rng.choice([4, 8])) for _ in range(2))
  heads, width = groups * share, 2 * width
  tokens, size = tiles * block_q, blocks * block_kv
  shape = {"block_q": block_q, "block_kv": block_kv}
  at = jnp.broadcast_to(
    jnp.arange(tokens) + max(size - tokens, 0), (batch, tokens)
  )
  pos = jnp.broadcast_to(jnp.arange(size), (batch, 1, size))

  def attention(op):
    return jax.jit(lambda q, k, v, lists: op(q, Keys(k, v, pos), lists, at))

  run, twin = attention(attend_blocks), attention(attend_blocks_dense)

  def check(drawn):
    (found, cost), (want, _) = run(*drawn), twin(*drawn)
    close(found.out, want.out, tolerance=3e-5)
    close(jnp.exp(found.lse), jnp.exp(want.lse), tolerance=3e-5)
    assert cost.spent <= cost.bound
    return 2

  normal = lambda *shape: strategies.arrays(shape, kinds=("normal", "ties"))
  return Bench(
    st.tuples(
      normal(batch, tokens, heads, width),
      normal(batch, groups, size, width),
      normal(batch, groups, size, width),
      strategies.lists(batch, groups, tiles, blocks, **shape),
    ),
    check,
  )


def caches_of(rng: np.random.Generator) -> Bench:
  """A token is appended to caches of drawn shapes and lengths."""
  batch, layers, heads, slots = (int(rng.integers(1, 5)) for _ in range(4))
  width, layer = 2, int(rng.integers(layers))

  def put(cache, k, rows):
    new = Keys(k, -k, cache.positions(1)[:, None])
    return append(cache, layer, new, rows)

  run = jax.jit(put)

  def check(drawn):
    cache, k, rows = drawn
    got = run(cache, k, rows)
    want = jax.tree.map(np.array, (cache.k, cache.v, cache.pos))
    for b, length in enumerate(np.asarray(cache.length)):
      if rows[b]:
        want[0][b, layer, :, length] = np.asarray(k)[b, :, 0]
        want[1][b, layer, :, length] = -np.asarray(k)[b, :, 0]
        want[2][b, layer, :, length] = length
    for a, b in zip((got.k, got.v, got.pos), want):
      np.testing.assert_array_equal(a, b)
    return 1

  return Bench(
    st.tuples(
      strategies.caches(batch, layers, heads, slots, width),
      strategies.arrays((batch, heads, 1, width)),
      strategies.selections(batch),
    ),
    check,
  )


SHAPED = {
  "shapes of bucketed": bucketed_of,
  "shapes of attend_blocks": lists_of,
  "shapes of append": caches_of,
}


def run_chunk(bench: Bench, seed: int) -> tuple[int, int, str]:
  """`(draws, laws held, error)` of a chunk."""
  draws, held, first = 0, 0, 0

  @hypothesis.seed(seed)
  @hypothesis.settings(
    max_examples=CHUNK,
    deadline=None,
    database=None,
    derandomize=False,
    phases=[hypothesis.Phase.generate],
    suppress_health_check=list(hypothesis.HealthCheck),
    report_multiple_bugs=False,
  )
  @hypothesis.given(drawn=bench.draws)
  def test(drawn):
    nonlocal draws, held, first
    draws += not first  # what comes after a failure repeats it
    try:
      held += bench.check(drawn)
    except Exception:
      first = draws
      raise

  try:
    with contextlib.redirect_stdout(None):
      test()
  except Exception as error:
    return draws, held, f"{type(error).__name__}: {error}"
  return draws, held, ""


def soak(name: str, seed: int, seconds: float) -> tuple[int, int, list[str]]:
  """`(draws, laws held, failures)` of a case, for about so long."""
  begin, draws, held, failures = time.monotonic(), 0, 0, []
  bench = None
  for chunk in itertools.count():
    own = zlib.crc32(f"{seed} {name} {chunk}".encode())
    if name in SHAPED:
      bench = SHAPED[name](np.random.default_rng(own))
    elif bench is None:
      bench = bench_of(next(case for case in CASES if case.name == name))
    more, laws, error = run_chunk(bench, own)
    draws, held = draws + more, held + laws
    if error:
      failures.append(f"{name}, draw {draws} of seed {seed}: {error[:600]}")
    if error or time.monotonic() - begin > seconds:
      return draws, held, failures
  raise AssertionError


def main(argv=None) -> int:
  cli = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
  cli.add_argument("--minutes", type=float, default=20.0)
  cli.add_argument("--seed", type=int, default=0)
  cli.add_argument("--cases", nargs="+", default=["*"], metavar="GLOB")
  args = cli.parse_args(argv)
  names = [*SHAPED, *(case.name for case in CASES)]
  names = [n for n in names if any(fnmatch.fnmatch(n, p) for p in args.cases)]
  np.random.default_rng(args.seed).shuffle(names)
  end = time.monotonic() + 60 * args.minutes
  draws, held, failures, cases = 0, 0, [], 0
  for i, name in enumerate(names):
    left = end - time.monotonic()
    if left < 0:
      break
    more, laws, wrong = soak(name, args.seed, max(left / (len(names) - i), 1))
    draws, held, cases = draws + more, held + laws, cases + 1
    failures += wrong
    for failure in wrong:
      print(failure, file=sys.stderr, flush=True)
    print(f"{name}: {more} draws, {laws} laws held", flush=True)
    jax.clear_caches()
  print(
    f"{held} law cases held, of {draws} draws over {cases} of {len(names)}"
    f" cases, seed {args.seed}: {len(failures)} failures"
  )
  for failure in failures:
    print(f"  {failure}\n  again: make soak SEED={args.seed}"
          f" CASES='{failure.partition(',')[0]}'")  # fmt: skip
  return 1 if failures else 0


if __name__ == "__main__":
  sys.exit(main())
