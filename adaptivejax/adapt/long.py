# SPDX-License-Identifier: Apache-2.0
"""Recipes for long prompts: fewer keys looked at, or kept; none trains.

Axes: S tokens of a prompt.
"""

from collections.abc import Callable, Iterator

from adaptivejax.adapt.bench import Bench
from adaptivejax.adapt.measure import Trial
from adaptivejax.methods.attention import (
  DELTA,
  Budgets,
  FlexPrefill,
  Kinetics,
  MInference,
  Quest,
  TokenSelect,
  XAttention,
  assign,
)
from adaptivejax.methods.kv import SnapKV, StreamingLLM
from adaptivejax.nn import with_look

CALIBRATION = 2048
"""Tokens of training text by which heads are told apart."""
PAGE = 16
"""Tokens of a page."""


def long_decode(bench: Bench) -> Iterator[Trial]:
  """Tokens behind a long prompt look at a part of it, or keep a part."""
  every = bench.long_probe.shape[1] + 8 * PAGE
  for name, setting, look, shares in decoders(bench):
    exact = bench.exact_after(with_look(bench.fast, look(every)))
    for few in (part(bench, share) for share in shares):
      made = look(few)
      yield Trial(
        name,
        setting.format(few),
        with_look(bench.fast, made),
        adopts=made.keeps_all,
        regimes=("long decode",),
        exact=exact,
      )


def decoders(bench: Bench) -> Iterator[tuple[str, str, Callable, tuple]]:
  """`(method, setting, keys -> look, shares)` of looks for decoding."""
  heads, context = bench.model.config.heads, bench.config.context
  pages = lambda n, ends=0: max(n // PAGE - ends, 1)
  full = tuple(sorted({0, 1, *range(2, bench.layers, 4)}))
  delta = lambda n: DELTA(full, pages=pages(n), recent=min(8, pages(n)))
  voted = lambda n: TokenSelect(
    n // 2, initial=n // 8, local=n - n * 5 // 8, heads=heads
  )
  snap = lambda n: SnapKV(n, window=min(32, n), extra=context)
  few, quarter, both = "{} keys", (1 / 4,), (3 / 8, 1 / 4)
  yield "StreamingLLM", few, lambda n: StreamingLLM(4, n - 4), quarter
  yield "SnapKV", few, snap, quarter
  yield "TokenSelect", few, voted, quarter
  quest = lambda n: Quest(pages(n))
  yield "Quest", f"{few}, all in 2 layers", quest, both
  kinetics = lambda n: Kinetics(pages(n, 6))
  yield "Kinetics, blocks", few, kinetics, both
  setting = f"{few}, all in {len(full)} layers"
  yield "DELTA", setting, delta, both


def long_prompts(bench: Bench) -> Iterator[Trial]:
  """Looks that read a prompt sparsely."""
  blocks = bench.blocks
  shapes = minference(bench, 1 / 4)
  least = max(bench.config.long // 24, 1)
  looks = (
    (
      f"{part(bench, 1 / 4)} keys",
      shapes,
      minference(bench, 4, shapes.patterns),
    ),
    ("0.95 of the mass", XAttention(0.95, **blocks), None),
    ("0.9 of the mass", FlexPrefill(0.9, min_budget=least, **blocks), None),
  )
  for setting, look, whole in looks:
    made = with_look(bench.fast, look)
    full = made if whole is None else with_look(bench.fast, whole)
    yield Trial(
      type(look).__name__,
      setting,
      made,
      regimes=("long prompt",),
      exact=bench.exact(full, probe=bench.long_probe),
    )


def part(bench: Bench, share: float, size: int | None = None) -> int:
  """A share of a long prompt, or of `size` tokens, in whole blocks."""
  block = bench.blocks["block_kv"]
  tokens = share * (bench.config.long if size is None else size)
  return max(int(tokens) // block, 1) * block


def minference(bench: Bench, share: float, patterns=None) -> MInference:
  """A look at this share of a long prompt: in each head at the last keys and
  the first block, or at the blocks that promise most; `patterns`, or as keeps
  more of the attention on training text.
  """
  shapes, block = ("a_shape", "block_sparse"), bench.blocks["block_q"]

  def look(size: int, patterns) -> MInference:
    few = max(part(bench, share, size) - 2 * block, block)  # first and own
    budgets = Budgets(sinks=block, window=few, blocks=few // block)
    return MInference(patterns, budgets, **bench.blocks)

  if patterns is None:
    text = bench.before(min(bench.config.long, CALIBRATION))
    calibrated = look(text.shape[1], shapes[:1] * bench.model.config.heads)
    since = text.shape[1] // 2
    patterns = assign(bench.fast, text, calibrated, since=since, among=shapes)
  return look(bench.config.long, patterns)
