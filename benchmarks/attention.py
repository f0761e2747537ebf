# SPDX-License-Identifier: Apache-2.0
"""Does block-sparse attention cost what its lists name?

Efficiency is time(dense) x density / time(sparse): 1 if a quarter of the blocks
takes a quarter of the time.  Dense is the fastest of the same round: full lists
of our own, `jax.nn.dot_product_attention` (where its scores fit in memory), XLA
over chunks of queries, torch SDPA where torch is installed.  4 heads of 64
features in f32, not causal, each head and tile of 128 queries with a random
list of 128-key blocks of its own; `varied` lists have 1 to 24 % of the blocks.
Forward + backward is the gradient for q, k and v.  A case is the tokens.

A decode step is one query of each head, over a cache of so many tokens: time of
the faster dense attention / ours, which reads 64, 256 or 1024 random tokens of
each head, one by one or in pages of 16.  Below 1 a dense step is the better.

    python -m benchmarks.attention --json out.json
    python -m benchmarks.attention --cases 8192
"""

import functools
import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from adaptivejax.report.clock import interleave
from benchmarks.harness import Options, Row, main
from pallas_kernels.block_sparse_attention import (
  BlockLists,
  Marks,
  Rule,
  block_sparse_attention,
)
from pallas_kernels.sparse_decode_attention import (
  Units,
  sparse_decode_attention,
)

HEADS, WIDTH, BLOCK = 4, 64, 128
DENSITIES = (0.015, 0.03, 0.06, 0.12, 0.25, 0.5, 1.0)
FEW, MORE, FULL = DENSITIES[:2], DENSITIES[2:5], 0.95
TARGETS = {
  "forward": dict.fromkeys(FEW, 0.6) | dict.fromkeys(MORE, 0.8),
  "forward+backward": dict.fromkeys(FEW, 0.5) | dict.fromkeys(MORE, 0.7),
}
TARGETED = 8192
BUDGETS, PAGES = (64, 256, 1024), (1, 16)
"""Tokens that a decode step reads of each head, and those of a page."""
MOST_SCORES = 2**33
"""Bytes of scores that a dense attention may write out."""

Arrays = tuple[jax.Array, ...]


def arrays(tokens: int) -> Arrays:
  """Queries, keys, values and a cotangent, [1, H, T, D]."""
  keys = jax.random.split(jax.random.key(0), 4)
  return tuple(jax.random.normal(k, (1, HEADS, tokens, WIDTH)) for k in keys)


def random_lists(tokens: int, counts: np.ndarray, seed: int) -> BlockLists:
  """Lists of the given lengths, i32[Q] of each head, for `tokens` tokens."""
  blocks = -(-tokens // BLOCK)
  rng = np.random.default_rng(seed)
  ranks = rng.random((1, HEADS, blocks, blocks)).argsort(-1)
  index = np.where(np.arange(blocks) < counts[..., None], ranks, blocks)
  index = jnp.asarray(np.sort(index, -1), jnp.int32)
  count = np.broadcast_to(counts, index.shape[:-1])
  return BlockLists(index, jnp.asarray(count, jnp.int32))


def sparse(lists: BlockLists, q, k, v) -> jax.Array:
  rule = Rule(causal=False)
  return block_sparse_attention(q, k, v, lists, Marks(), rule).out


def chunked(lists, q, k, v, chunk: int = 64) -> jax.Array:
  """Dense, `chunk` queries at a time."""
  del lists

  @jax.checkpoint
  def step(_, q):
    scores = jnp.einsum("bhtd,bhsd->bhts", q, k) * WIDTH**-0.5
    weights = jax.nn.softmax(scores, axis=-1)
    return None, jnp.einsum("bhts,bhsd->bhtd", weights, v)

  parts = q.reshape(1, HEADS, -1, chunk, WIDTH)
  _, out = jax.lax.scan(step, None, jnp.moveaxis(parts, 2, 0))
  return jnp.moveaxis(out, 0, 2).reshape(q.shape)


def whole(lists, q, k, v) -> jax.Array:
  """`jax.nn.dot_product_attention`."""
  del lists
  q, k, v = (jnp.swapaxes(a, 1, 2) for a in (q, k, v))
  return jnp.swapaxes(jax.nn.dot_product_attention(q, k, v), 1, 2)


def step(kind: str, f: Callable[..., jax.Array]) -> Callable[..., Any]:
  """`(lists, q, k, v, cotangent)`, compiled."""
  if kind == "forward":
    return jax.jit(lambda lists, q, k, v, g: f(lists, q, k, v))
  loss = lambda q, k, v, lists, g: jnp.vdot(f(lists, q, k, v), g)
  gradient = jax.grad(loss, (0, 1, 2))
  return jax.jit(lambda lists, q, k, v, g: gradient(q, k, v, lists, g))


def dense_calls(
  kind: str, tokens: int, given: Arrays
) -> dict[str, Callable[[int], Any]]:
  """Name -> call of each dense attention that runs here."""
  jitted: dict[str, Callable[..., jax.Array]] = {"chunked XLA": chunked}
  if HEADS * tokens**2 * 4 <= MOST_SCORES:
    jitted["jax.nn"] = whole
  else:
    _say(f"jax.nn.dot_product_attention left out: scores of {tokens}^2")
  calls: dict[str, Callable[[int], Any]] = {}
  for name, f in jitted.items():
    run = step(kind, f)
    calls[name] = lambda _, run=run: run(None, *given)
  missing = why_no_torch()
  if missing:
    _say(f"torch SDPA and FlexAttention left out: {missing}")
  else:
    calls["torch SDPA"] = torch_call(kind, given)
  return calls


def why_no_torch() -> str | None:
  """Why torch is not compared; None if it is."""
  if jax.default_backend() != "cpu":
    return "they would run on a CPU, and JAX does not"
  if not importlib.util.find_spec("torch"):
    return "torch is not installed"
  return None


def torch_call(
  kind: str, given: Arrays, lists: BlockLists | None = None
) -> Callable[[int], Any]:
  """SDPA, or with lists FlexAttention, of the same arrays."""
  torch: Any = importlib.import_module("torch")
  q, k, v, g = (torch.from_numpy(np.array(a)) for a in given)
  attend = torch.nn.functional.scaled_dot_product_attention
  if lists is not None:
    flex: Any = importlib.import_module("torch.nn.attention.flex_attention")
    tensor = lambda a: torch.from_numpy(np.array(a))
    index = lists.index.clip(max=lists.index.shape[-1] - 1)
    mask = flex.BlockMask.from_kv_blocks(
      torch.zeros_like(tensor(lists.count)),
      torch.zeros_like(tensor(index)),
      tensor(lists.count),
      tensor(index),
      BLOCK_SIZE=BLOCK,
    )
    compiled = torch.compile(flex.flex_attention)
    attend = functools.partial(compiled, block_mask=mask)

  def run(_):
    with torch.set_grad_enabled(kind != "forward"):
      moving = [a.detach().requires_grad_(kind != "forward") for a in (q, k, v)]
      out = attend(*moving)
      if kind != "forward":
        out.backward(g)

  return run


def flex_calls(kind: str, given: Arrays, lists: list[BlockLists]) -> list[Any]:
  """FlexAttention of the lists, none where it does not run."""
  if why_no_torch() or kind != "forward":
    return []  # torch has no gradient of it on a CPU
  try:
    calls = [torch_call(kind, given, one) for one in lists]
    calls[0](0)
  except Exception as error:  # its compiler needs a C++ compiler, among others
    _say(f"FlexAttention left out: {str(error).splitlines()[0]}")
    return []
  return calls


def prefill(tokens: int, kind: str, seconds: float) -> Iterator[Row]:
  """Efficiency at each density, and full lists against the fastest dense."""
  given, case = arrays(tokens), str(tokens)
  blocks = -(-tokens // BLOCK)
  counts = {p: max(1, round(p * blocks)) for p in DENSITIES}
  first = {n: p for p, n in counts.items()}  # few blocks: the last of several
  names = [f"{p:.3g}" for p in first.values()]
  lists = [random_lists(tokens, np.full(blocks, n), seed=n) for n in first]
  rng = np.random.default_rng(0)
  varied = rng.integers(1, max(2, blocks // 4), (1, HEADS, blocks))
  lists.append(random_lists(tokens, varied, seed=0))
  names.append("varied")
  shares = [n / blocks for n in first] + [varied.mean() / blocks]

  run = step(kind, sparse)
  ours = [lambda _, one=one: run(one, *given) for one in lists]
  dense = dense_calls(kind, tokens, given)
  flex = flex_calls(kind, given, lists)
  calls = [*dense.values(), *ours, *flex]
  times = interleave(calls, seconds=seconds, least=3)
  of_dense, rest = times[: len(dense)], times[len(dense) :]
  of_ours, of_flex = rest[: len(ours)], rest[len(ours) :]
  full = of_ours[names.index("1")]
  fastest = [min(round) for round in zip(full, *of_dense)]

  targeted = tokens == TARGETED
  target = {f"{p:.3g}": t for p, t in TARGETS[kind].items() if targeted}
  for name, share, spent in zip(names, shares, of_ours):
    label = f"{kind} efficiency, {_words(name)}"
    rates = [d * share / t for d, t in zip(fastest, spent)]
    if name != "1":
      yield Row.of(case, label, rates, target=target.get(name))
  for name, spent in zip(dense, of_dense):
    rates = [d / t for d, t in zip(fastest, spent)]
    yield Row.of(case, f"{kind}, fastest dense / {name}", rates)
  goal = FULL if targeted else None
  rates = [d / t for d, t in zip(fastest, full)]
  yield Row.of(case, f"{kind}, fastest dense / full lists", rates, target=goal)
  for name, theirs, spent in zip(names, of_flex, of_ours):
    rates = [a / b for a, b in zip(theirs, spent)]
    yield Row.of(case, f"{kind}, FlexAttention / ours, {_words(name)}", rates)


def decode(tokens: int, seconds: float) -> Iterator[Row]:
  """One step over a cache, against reading all of it."""
  case, (q, k, v, _) = str(tokens), arrays(tokens)
  q = q[:, :, -1:]
  attend = jax.jit(lambda units, q, k, v: sparse_decode_attention(
    q, k, v, units
  ).out)  # fmt: skip
  dense = jax.jit(functools.partial(whole, None))
  calls = [lambda _: attend(None, q, k, v), lambda _: dense(q, k, v)]
  names, rng = [], np.random.default_rng(0)
  for budget in (n for n in BUDGETS if n < tokens):
    for page in PAGES:
      ranks = rng.random((1, HEADS, tokens // page)).argsort(-1)
      index = jnp.asarray(ranks[..., : budget // page], jnp.int32)
      count = jnp.full(index.shape[:2], index.shape[2], jnp.int32)
      units = Units(index, count, page)
      calls.append(lambda _, units=units: attend(units, q, k, v))
      names.append(f"{budget} " + ("tokens" if page == 1 else "in pages"))
  ours, theirs, *times = interleave(calls, seconds=seconds, least=5)
  fastest = [min(pair) for pair in zip(ours, theirs)]
  milliseconds = [1e3 * t for t in fastest]
  yield Row.of(case, "decode, dense, ms", milliseconds, better="lower")
  for name, spent in zip(names, times):
    rates = [d / t for d, t in zip(fastest, spent)]
    yield Row.of(case, f"decode, dense / {name}", rates)
    milliseconds = [1e3 * t for t in spent]
    yield Row.of(case, f"decode, {name}, ms", milliseconds, better="lower")


def _words(name: str) -> str:
  return name if name == "varied" else f"{float(name):.3g} of all blocks"


def _say(reason: str) -> None:
  print(reason, file=sys.stderr)


def rows(options: Options) -> Iterator[Row]:
  sizes = [256] if options.quick else [2048, 8192, 32_768]
  if jax.default_backend() == "cpu":
    _say("splash left out: on a CPU it runs in interpret mode only")
  chosen = options.select(map(str, sizes))
  for tokens in (n for n in sizes if str(n) in chosen):
    for kind in TARGETS:
      seconds = 0.0 if options.quick else 60.0
      yield from prefill(tokens, kind, seconds)
    yield from decode(tokens, seconds / 6)


if __name__ == "__main__":
  main(__doc__, rows)
