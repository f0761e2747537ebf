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

import jax.numpy as jnp
from jax.tree_util import Partial

from adaptivejax import surgery
from adaptivejax.adapt.bench import Bench
from adaptivejax.adapt.exits import confidences, fit_lens, margin_for
from adaptivejax.adapt.long import long_decode, long_prompts
from adaptivejax.adapt.measure import Trial
from adaptivejax.methods.depth import (
  calm,
  divergence,
  evolve,
  ffn_skip,
  kept_layers,
  unified_skip,
)
from adaptivejax.methods.width import core_of
from adaptivejax.nn import (
  Through,
  by_neurons,
  by_plan,
  out_major,
  through_lens,
)
from adaptivejax.training.distill import (
  at_budget,
  end_to_end,
  gates,
  layerwise,
)

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


RECIPES: dict[str, Recipe] = {
  make.__name__: make
  for make in (
    exits,
    plans,
    skips,
    neurons,
    modules,
    experts,
    depths,
    long_decode,
    long_prompts,
  )
}
"""Name -> recipe; `drafts` are policies, see `adapt.drafts`."""
