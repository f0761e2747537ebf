# SPDX-License-Identifier: Apache-2.0
"""How each method is made of a pretrained model: surgery, a lesson, budgets.

A recipe is a function `recipe(bench) -> trials`.  What is learned is learned
from the training side of the text only; budgets are settled there, too.

Axes: N windows, S tokens of a window, L layers.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.tree_util import Partial

from adaptivejax import decode, surgery
from adaptivejax.adapt.config import AdaptConfig
from adaptivejax.adapt.exits import confidences, fit_lens, margin_for
from adaptivejax.adapt.measure import Trial
from adaptivejax.adapt.text import Text
from adaptivejax.core.budget import solve_setting
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
from adaptivejax.methods.depth import (
  calm,
  divergence,
  evolve,
  ffn_skip,
  kept_layers,
  unified_skip,
)
from adaptivejax.methods.kv import SnapKV, StreamingLLM
from adaptivejax.methods.width import core_of
from adaptivejax.nn import (
  ByBlocks,
  ByPhase,
  Lens,
  Through,
  adjust,
  by_neurons,
  by_plan,
  out_major,
  through_lens,
  with_look,
)
from adaptivejax.nn.stack import layer_count
from adaptivejax.training.distill import (
  at_budget,
  distill,
  end_to_end,
  gates,
  layerwise,
)

CALIBRATION = 2048
"""Tokens of training text by which heads are told apart."""
PAGE = 16
"""Tokens of a page."""
PROBE = 256
"""Tokens of training text on which exactness and budgets are looked at."""


@dataclasses.dataclass
class Bench:
  """What recipes work with.

  Attributes:
    model: as it was trained; distillation starts from it.
    fast: the same, its kernels out-major: what is timed.
    text: to learn from.
    config: how much of everything.
    say: called with a line of what is being done.
    tick: called after every update of a lesson.
  """

  model: Any
  fast: Any
  text: Text
  config: AdaptConfig
  say: Callable[[str], Any] = lambda line: None
  tick: Callable[..., Any] = lambda *args: None
  lens: Lens | None = None

  @property
  def layers(self) -> int:
    return layer_count(self.model.layers)

  def some(self, share: float, size: int | None = None) -> int:
    """A share of a long prompt, or of `size` tokens, in whole blocks."""
    block = self.blocks["block_kv"]
    tokens = share * (self.config.long if size is None else size)
    return max(int(tokens) // block, 1) * block

  @property
  def blocks(self) -> dict[str, int]:
    """Sizes of blocks for prompts."""
    size = 64 if self.config.long >= 1024 else 8
    return {"block_q": size, "block_kv": size}

  def minference(self, share: float, patterns=None) -> MInference:
    """A look at this share of a long prompt: in each head at the last keys and
    the first block, or at the blocks that promise most; `patterns`, or as keeps
    more of the attention on training text.
    """
    shapes, block = ("a_shape", "block_sparse"), self.blocks["block_q"]

    def look(size: int, patterns) -> MInference:
      few = max(self.some(share, size) - 2 * block, block)  # first and own
      budgets = Budgets(sinks=block, window=few, blocks=few // block)
      return MInference(patterns, budgets, **self.blocks)

    if patterns is None:
      text = self.before(min(self.config.long, CALIBRATION))
      some = look(text.shape[1], shapes[:1] * self.model.config.heads)
      since = text.shape[1] // 2
      patterns = assign(self.fast, text, some, since=since, among=shapes)
    return look(self.config.long, patterns)

  def before(self, size: int) -> jax.Array:
    """The beginning of the training text, i32[1, size]."""
    return jnp.asarray(self.text.train.reshape(1, -1)[:, :size])

  @functools.cached_property
  def dense(self) -> Any:
    """The model, reading prompts by blocks.

    Much faster than plain attention, and so what methods have to beat there.
    """
    return self.by_blocks(self.fast)

  def by_blocks(self, model) -> Any:
    """Reads prompts by blocks: all keys, but not the future."""
    return with_look(model, ByBlocks(**self.blocks))

  @functools.cached_property
  def probe(self) -> jax.Array:
    """A few windows of training text, i32[N, S]."""
    rows = max(PROBE // self.config.context, 1)
    return jnp.asarray(self.text.train[:rows])

  @functools.cached_property
  def long_probe(self) -> jax.Array:
    """Some blocks of training text, i32[1, S]."""
    return self.before(8 * self.blocks["block_q"] + 1)

  def exact(self, changed, stack=decode.FULL, probe=None) -> float:
    """The largest change of a logit at the full budget."""
    probe = self.probe if probe is None else probe
    return surgery.exactness(self.model, changed, probe, stack=stack)

  def exact_after(self, changed, prime=lambda model, prompt: decode.FULL):
    """The same for a token behind a prompt that `prime` makes a stack of.

    The cache has room for more, so that what is kept of it is a list.
    """
    stack = prime(changed, self.long_probe[:, :-1])
    gap = _next(changed, stack, self.long_probe) - self.next_logits
    return float(jnp.abs(gap).max())

  @functools.cached_property
  def next_logits(self) -> jax.Array:
    return _next(self.dense, decode.FULL, self.long_probe)

  def teach(self, student, loss, rates, share: float = 1.0):
    """The student after a lesson of `share` of the configured steps."""
    return distill(
      student,
      self.model,
      self.text.train,
      loss,
      rates=rates,
      steps=max(int(self.config.steps * share), 1),
      batch=self.config.batch,
      seed=self.config.seed,
      progress=self.tick,
    )

  def settled(self, model, share: float, span: float):
    """The model with its settings at `share` of the FLOPs, on the probe."""
    read = jax.jit(lambda m, s: adjust(m, s)(self.probe).cost.share)
    spent = lambda setting: float(read(model, jnp.float32(setting)))
    try:
      found = solve_setting(spent, share, low=-span, high=span)
    except ValueError:  # even the least is more
      found = span
    return adjust(model, jnp.float32(found))


@jax.jit
def _next(model, stack, tokens):
  """Logits behind the last of `tokens`, which comes alone."""
  cache = model.empty_cache(1, 2 * tokens.shape[1])
  cache = model(tokens[:, :-1], cache).cache
  return model(tokens[:, -1:], cache, stack=stack).logits


Recipe = Callable[[Bench], Iterator[Trial]]


def in_both(bench: Bench, trial: Trial) -> Iterator[Trial]:
  """In decoding, and in reading prompts: by blocks, as `Bench.dense` does."""
  model = bench.by_blocks(trial.model)
  yield dataclasses.replace(trial, model=model, regimes=("prompt",))
  yield trial


def exits(bench: Bench) -> Iterator[Trial]:
  """CALM: by the model's own confidence; then by a lens, calibrated."""
  first, last = bench.layers * 2 // 3, bench.layers
  plain = bench.exact(bench.fast, Partial(calm, threshold=jnp.float32(2)))
  raw = Partial(calm, threshold=jnp.float32(0.8), min_depth=jnp.int32(first))
  yield Trial("CALM, untrained", "margin 0.8", bench.fast, raw, exact=plain)
  bench.say("training the lens of the exits")
  bench.lens = lens = fit_lens(bench)
  sure = confidences(bench, lens)
  for promise in (0.95, 0.85):
    level = margin_for(sure, first, promise)
    leave = Partial(
      calm,
      threshold=jnp.float32(level),
      measure=Through(lens),
      min_depth=jnp.int32(first),
      every=jnp.int32(max((last - first) // 3, 1)),
    )
    yield Trial(
      "CALM, lens",
      f"{promise:.0%} agree",
      bench.fast,
      Partial(through_lens, stack=leave, lens=lens),
      exact=plain,
    )


def plans(bench: Bench) -> Iterator[Trial]:
  """Layers left out for all tokens: evenly, and as evolution finds them."""
  total = bench.layers
  everything = Partial(unified_skip, kept=jnp.arange(total))
  exact = bench.exact(bench.fast, everything)
  kept = kept_layers(total, total / (total - max(total // 10, 1)), rounded=True)
  stack = Partial(unified_skip, kept=jnp.asarray(kept))
  setting = f"{len(kept)} of {total} layers"
  yield Trial("Unified skipping", setting, bench.fast, stack, exact=exact)
  bench.say("evolving plans")
  drops = max(total // 10, 1), max(total // 30, 1)
  found = evolve(
    divergence(bench.model, jnp.asarray(bench.text.train[:8])),
    total,
    drops,
    generations=max(bench.config.steps // 8, 1),
    offspring=6,
    stages=((2, 1), (1, 3)),
    progress=bench.tick,
  )
  whole = Partial(by_plan, plan=jnp.ones((total, 2), bool))
  trial = Trial(
    "EvoPress",
    f"{drops[0]} attention, {drops[1]} feed-forward dropped",
    bench.fast,
    Partial(by_plan, plan=jnp.asarray(found.plan)),
    exact=bench.exact(bench.fast, whole),
  )
  yield from in_both(bench, trial)


def skips(bench: Bench) -> Iterator[Trial]:
  """FFN-SkipLLM: feed-forward layers that no longer move the token."""
  cold = bench.layers // 3
  skip = lambda level: Partial(
    ffn_skip,
    threshold=jnp.float32(level),
    cold_first=jnp.int32(cold),
    cold_last=jnp.int32(2),
    budget=jnp.float32(0.15),
  )
  exact = bench.exact(bench.fast, skip(2.0))
  for level in (0.99, 0.97):
    setting = f"cosine {level}"
    yield Trial("FFN-SkipLLM", setting, bench.fast, skip(level), exact=exact)


def neurons(bench: Bench) -> Iterator[Trial]:
  """CoreInfer: the neurons that the prompt used most."""
  cold = bench.layers // 5

  def prime(model, prompt, share):
    core = core_of(
      model,
      prompt,
      share=share,
      cold_first=cold,
      cold_last=max(cold // 2, 1),
    )
    return Partial(by_neurons, neurons=core, first=jnp.int32(cold))

  exact = bench.exact_after(bench.fast, functools.partial(prime, share=1.0))
  for share in (0.8, 0.6):
    yield Trial(
      "CoreInfer",
      f"{share:.0%} of the neurons",
      bench.fast,
      prime=functools.partial(prime, share=share),
      exact=exact,
    )


def modules(bench: Bench) -> Iterator[Trial]:
  """Adaptive Computation Modules: cut, distilled, gated, adapted."""
  student = surgery.to_acm(bench.model, 4, tokens=bench.text.train[:4])
  exact = bench.exact(student)
  bench.say("ACM: distilling the learners, layer by layer")
  student = bench.teach(student, layerwise, {"learners": 2e-4}, 0.5)
  bench.say("ACM: training the gates")
  careful = functools.partial(gates, gain=math.inf, tolerance=0.1)
  student = bench.teach(student, careful, {"mlp/gate": 3e-3})
  bench.say("ACM: end to end, to 80 % of the learners")
  rates = {"mlp/gate": 3e-4, "learners|norm": 5e-5}
  student = bench.teach(student, at_budget(0.8, 0.3), rates)
  for share in (0.9, 0.8):
    made = bench.settled(student, share, 8.0)
    setting = f"{share:.0%} of FLOPs"
    trial = Trial("ACM", setting, out_major(made), exact=exact)
    yield from in_both(bench, trial)


def experts(bench: Bench) -> Iterator[Trial]:
  """FactorLLM: experts of alike neurons, and a router that is taught."""
  student = surgery.to_experts(bench.model, 4, 3)
  exact = bench.exact(student)
  bench.say("FactorLLM: training the routers")
  student = bench.teach(student, layerwise, {"router": 3e-3}, 0.5)
  bench.say("FactorLLM: end to end")
  rates = {"router": 3e-4, "experts|norm": 5e-5}
  student = bench.teach(student, end_to_end, rates)
  made = out_major(student)
  yield from in_both(
    bench, Trial("FactorLLM", "3 of 4 experts", made, exact=exact)
  )


def depths(bench: Bench) -> Iterator[Trial]:
  """Mixture-of-Depths: every fifth layer behind a router."""
  every = next(n for n in (5, 4, 3, 2, 1) if bench.layers % n == 0)
  student = surgery.to_mixture_of_depths(bench.model, 0.7, every=every)
  exact = bench.exact(student)
  bench.say("Mixture-of-Depths: end to end")
  rates = {"router|predictor": 1e-3, "norm|mlp|attention": 5e-5}
  student = bench.teach(student, end_to_end, rates)
  setting = f"70 % of the tokens in every {every}th layer"
  trial = Trial("Mixture-of-Depths", setting, out_major(student), exact=exact)
  yield from in_both(bench, trial)


def long(bench: Bench) -> Iterator[Trial]:
  """Long prompts: fewer keys looked at, or kept; nothing is trained."""
  yield from long_prompts(bench)
  for name, setting, look, shares in decoders(bench):
    every = bench.long_probe.shape[1] + 8 * PAGE
    exact = bench.exact_after(with_look(bench.fast, look(every)))
    for few in map(bench.some, shares):
      yield Trial(
        name,
        setting.format(few),
        with_look(bench.fast, look(few)),
        regimes=("long decode",),
        exact=exact,
      )


def decoders(bench: Bench) -> Iterator[tuple[str, str, Callable, tuple]]:
  """`(method, setting, keys -> look, shares)` of looks for decoding."""
  heads, context = bench.model.config.heads, bench.config.context
  after = lambda look: ByPhase(ByBlocks(**bench.blocks), look)
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
  yield "TokenSelect", few, lambda n: after(voted(n)), quarter
  quest = lambda n: after(Quest(pages(n)))
  yield "Quest", f"{few}, all in 2 layers", quest, both
  kinetics = lambda n: after(Kinetics(pages(n, 6)))
  yield "Kinetics, blocks", few, kinetics, both
  setting = f"{few}, all in {len(full)} layers"
  yield "DELTA", setting, lambda n: after(delta(n)), both


def long_prompts(bench: Bench) -> Iterator[Trial]:
  """Looks that read a prompt sparsely."""
  blocks = bench.blocks
  shapes = bench.minference(1 / 4)
  least = max(bench.config.long // 24, 1)
  looks = (
    (f"{bench.some(1 / 4)} keys", shapes, bench.minference(4, shapes.patterns)),
    ("0.96 of the mass", XAttention(0.96, **blocks), None),
    ("0.94 of the mass", XAttention(0.94, **blocks), None),
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


RECIPES: dict[str, Recipe] = {
  make.__name__: make
  for make in (exits, plans, skips, neurons, modules, experts, depths, long)
}
"""Name -> recipe; `drafts` are policies, see `adapt.drafts`."""
