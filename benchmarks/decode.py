# SPDX-License-Identifier: Apache-2.0
"""Decoding: tokens per second of every policy against plain decoding.

`POLICY, batch B` decodes from a prompt of 32 tokens with a model of 12 layers
and 19 M parameters (8 layers and 3 M at batch 64), greedily, all rows to the
same length; `x plain` is the speed against running all layers token by token,
in the same rounds.  The weights are random, so confidences mean nothing: early
exits are made to leave at a given depth, but ask the readout after every layer
they run.  For self-speculation the layers above the exit are damped, which
makes the first ones draft well; `tokens per step` says how well.  `tuned` tries
some drafts and keeps the fastest.

`staged`: 64 rows whose lengths are geometric (mean 51, at most 256) on 4
layers of width 256; rows that end leave the batch at the rungs of a ladder, or
at every step, or never.  A ladder cannot win more than its bound, all row-steps
over those it runs.  `compile`: seconds to trace, lower and compile `generate`.

    python -m benchmarks.decode --json out.json
    python -m benchmarks.decode --cases 'calm*' 'staged'
"""

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jax.tree_util import Partial

from adaptivejax import decode
from adaptivejax.core.halting import margin
from adaptivejax.core.select import compact
from adaptivejax.core.trigrams import TrigramTable
from adaptivejax.methods.decode import ADED, EntropyAdaptive, SelfSpeculation
from adaptivejax.methods.depth import (
  calm,
  ffn_skip,
  kept_layers,
  prefix,
  unified_skip,
)
from adaptivejax.models import DecoderConfig, DecoderLM
from adaptivejax.report.clock import interleave
from benchmarks.harness import Options, Row, main
from benchmarks.measure import no_compilation_cache

PROMPT = 32
DRAFTS = ((1, 0), (1, 1), (2, 1), (2, 2), (2, 4), (3, 4))
"""(exit, draft) that `tuned` tries; the first is plain decoding."""


@dataclasses.dataclass(frozen=True)
class Bed:
  """A model and how much of it to decode."""

  model: DecoderLM
  batch: int
  steps: int
  seconds: float

  @property
  def layers(self) -> int:
    return self.model.config.layers

  @functools.cached_property
  def prompt(self) -> jax.Array:
    vocab = self.model.config.vocab
    shape = (self.batch, PROMPT)
    return jax.random.randint(jax.random.key(1), shape, 0, vocab)

  def run(self, policy, model=None) -> decode.Generation:
    """All rows to the same length, no ladder."""
    return decode.generate(
      model or self.model,
      self.prompt,
      steps=self.steps,
      policy=policy,
      rungs=(self.batch,),
    )


def lm(layers: int, features: int, heads: int, kv_heads: int) -> DecoderLM:
  config = DecoderConfig(
    layers=layers,
    features=features,
    hidden=4 * features,
    heads=heads,
    kv_heads=kv_heads,
  )
  return DecoderLM(config, rngs=nnx.Rngs(0))


def damped(model: DecoderLM, above: int, by: float) -> DecoderLM:
  """The model whose layers from `above` on add `by` of what they would."""
  scale = jnp.where(jnp.arange(model.config.layers) < above, 1.0, by)
  model = jax.tree.map(lambda a: a, model)  # a copy
  for linear in (model.layers.attention.out, model.layers.mlp.down):
    kernel = linear.kernel.get_value()
    linear.kernel.set_value(kernel * scale[:, None, None])
  return model


def leave_at(depth: int, every: int = 1) -> Partial:
  """Every token leaves after `depth` layers, having asked each `every`-th."""
  measure = Partial(_sure_at, jnp.int32(depth))
  return Partial(
    calm, threshold=jnp.float32(1.5), measure=measure, every=jnp.int32(every)
  )


def _sure_at(depth, l, before, after, readout):
  """The margin, at most 1, that counts from `depth` layers on."""
  del before
  return margin(readout(after)) + 2 * (l + 1 >= depth)


def policies(bed: Bed) -> dict[str, tuple[Any, DecoderLM, float | None]]:
  """Name -> policy, model, and the depth that sets its target."""
  model, layers = bed.model, bed.layers
  half, third = layers // 2, layers // 3
  kept = jnp.asarray(kept_layers(layers, 2), jnp.int32)
  never = Partial(calm, threshold=jnp.float32(2))
  skip = Partial(ffn_skip, threshold=jnp.float32(-1), budget=jnp.float32(0.3))
  small = lm(2, model.config.features // 2, 2, 1)
  texts = [np.asarray(row) for row in bed.run(decode.FULL).tokens]
  table = TrigramTable.build(texts)
  return {
    f"calm, {half} of {layers} layers": (leave_at(half), model, half),
    f"calm, {half} of {layers} layers, asked at each other": (
      leave_at(half, 2),
      model,
      half,
    ),
    f"calm, {third} of {layers} layers": (leave_at(third), model, third),
    "calm, never leaves": (never, model, None),
    f"prefix, {half} of {layers} layers": (
      Partial(prefix, depth=jnp.int32(half)),
      model,
      None,
    ),
    f"unified, {half} of {layers} layers": (
      Partial(unified_skip, kept=kept),
      model,
      None,
    ),
    "ffn_skip, 30 % of them": (skip, model, None),
    "aded, knows the text": (ADED(table), model, None),
    "aded, knows nothing": (ADED(TrigramTable.build([])), model, None),
    "entropy_adaptive, large": (
      EntropyAdaptive(model, jnp.float32(-jnp.inf)),
      small,
      None,
    ),
    "entropy_adaptive, small": (
      EntropyAdaptive(model, jnp.float32(jnp.inf)),
      small,
      None,
    ),
  }


def against_plain(bed: Bed, name: str, policy, model, depth) -> Iterator[Row]:
  """Speed of one policy, what it ran, and its target at batch 1."""
  case = f"{name}, batch {bed.batch}"
  made = bed.run(policy, model)
  plain, ours = interleave(
    [
      lambda _: bed.run(decode.FULL).tokens,
      lambda _: bed.run(policy, model).tokens,
    ],
    seconds=bed.seconds,
    least=3,
  )
  ratios = [a / b for a, b in zip(plain, ours)]
  target = 0.85 * bed.layers / depth if depth and bed.batch == 1 else None
  yield Row.of(case, "x plain", ratios, target=target)
  yield from _facts(case, bed, made, ours)


def _facts(case, bed, made, times) -> Iterator[Row]:
  tokens = bed.batch * bed.steps
  yield Row.of(case, "tokens/s", [tokens / t for t in times])
  yield Row.of(case, "layers per token", [float(made.mean_depth)])
  yield Row.of(case, "tokens per step", [float(made.tokens_per_step)])


def speculation(bed: Bed, by: float) -> Iterator[Row]:
  """Self-speculation at the fastest of some drafts, on damped layers."""
  model = damped(bed.model, 2, by)
  calls = [lambda _: bed.run(decode.FULL, model).tokens]
  choices = [c for c in DRAFTS if c[0] < bed.layers]
  for choice in choices:
    policy = SelfSpeculation(*choice)
    calls.append(lambda _, p=policy: bed.run(p, model).tokens)
  plain, *each = interleave(calls, seconds=2 * bed.seconds, least=3)
  rates = [[a / b for a, b in zip(plain, times)] for times in each]
  best = int(np.argmax([np.median(rate) for rate in rates]))
  exit, draft = choices[best]
  policy = SelfSpeculation(exit, draft)
  made = bed.run(policy, model)
  plain, ours = interleave(  # again: the best of several looks too good
    [calls[0], lambda _: bed.run(policy, model).tokens],
    seconds=bed.seconds,
    least=3,
  )
  name = f"self_speculation tuned, upper layers x {by:g}, batch {bed.batch}"
  per_step = float(made.tokens_per_step)
  target = 1.2 if per_step > 2 and bed.batch == 1 else 0.9
  speed = [a / b for a, b in zip(plain, ours)]
  yield Row.of(name, "x plain", speed, target=target)
  yield from _facts(name, bed, made, ours)
  yield Row.of(name, "exit chosen", [exit])
  yield Row.of(name, "draft chosen", [draft])


def gather_each_step(model, prompt, limits, rungs, steps) -> jax.Array:
  """What not to do: at every step the live rows move to a smaller batch."""
  batch = prompt.shape[0]
  first = model(prompt, model.empty_cache(batch, prompt.shape[1] + steps))
  token = first.logits[:, -1].argmax(-1).astype(jnp.int32)
  text = jnp.zeros((batch, steps), jnp.int32).at[:, 0].set(token)
  ladder = jnp.array(rungs[::-1])

  def body(carry):
    n, token, cache, text = carry
    order, count = compact(n < limits)

    def on(size):
      def go(_):
        rows = order[:size]
        some = jax.tree.map(lambda a: a[rows], cache)
        out = model(token[rows][:, None], some)
        new = out.logits[:, -1].argmax(-1).astype(jnp.int32)
        put = lambda a, b: a.at[rows].set(b)
        return put(token, new), jax.tree.map(put, cache, out.cache)

      return go

    branches = [on(size) for size in rungs[::-1]]
    token, cache = lax.switch(jnp.searchsorted(ladder, count), branches, None)
    written = jnp.where(n < limits, token, text[:, n])
    return n + 1, token, cache, text.at[:, n].set(written)

  start = jnp.int32(1), token, first.cache, text
  more = lambda carry: (carry[0] < limits).any()
  return lax.while_loop(more, body, start)[3]


def staged(model, batch: int, steps: int, seconds: float) -> Iterator[Row]:
  """A ladder of rungs against none, and against moving rows at every step."""
  rng = np.random.default_rng(0)
  limits = jnp.asarray(np.minimum(rng.geometric(5 / steps, batch), steps))
  prompt = jnp.zeros((batch, 1), jnp.int32)
  rungs = tuple(batch // 2**n for n in range(4) if batch // 2**n)

  def ladder(rungs):
    return lambda _: (
      decode.generate(
        model, prompt, steps=steps, limits=limits, rungs=rungs
      ).tokens
    )

  each = jax.jit(gather_each_step, static_argnums=(3, 4))
  deep = tuple(batch // 2**n for n in range(int(math.log2(batch)) + 1))
  calls = {
    "four rungs": ladder(rungs),
    "rungs to one row": ladder(deep),
    "rows moved at every step": lambda _: each(
      model, prompt, limits, rungs, steps
    ),
  }
  whole, *others = interleave(
    [ladder((batch,)), *calls.values()], seconds=seconds, least=3
  )
  ideal = float(limits.max() * batch / limits.sum())
  yield Row.of("staged", "ideal by row-steps", [ideal])
  bound = float(limits.max() * batch) / _row_steps(np.asarray(limits), rungs)
  yield Row.of("staged", "bound of four rungs", [bound])
  yield Row.of("staged", "whole batch, ms per step", [
    1e3 * t / float(limits.max()) for t in whole
  ], better="lower")  # fmt: skip
  for name, times in zip(calls, others):
    ratios = [a / b for a, b in zip(whole, times)]
    target = 5.0 if name == "four rungs" else None
    yield Row.of("staged", f"{name}, x whole batch", ratios, target=target)


def _row_steps(limits: np.ndarray, rungs: tuple[int, ...]) -> int:
  """Rows times steps that a ladder runs."""
  alive = (np.arange(limits.max())[:, None] < limits).sum(1)
  return sum(min(rung for rung in rungs if rung >= n) for n in alive)


def compile_time(layers: int, policy: Callable, name: str) -> Iterator[Row]:
  """Seconds from nothing to a compiled `generate`."""
  model = lm(layers, 64, 4, 2)
  prompt = jnp.zeros((1, 8), jnp.int32)
  jax.clear_caches()
  with no_compilation_cache():
    begin = time.perf_counter()
    decode.generate(model, prompt, steps=8, policy=policy(layers))
    spent = time.perf_counter() - begin
  target = 20.0 if layers == 48 else None
  case = f"compile, {layers} layers"
  yield Row.of(case, f"{name}, s", [spent], target=target, better="lower")


def rows(options: Options) -> Iterator[Row]:
  quick = options.quick
  if quick:
    beds = [Bed(lm(4, 32, 2, 1), 2, 4, 0.0)]
    depths, bed4, stage = (4,), lm(2, 32, 2, 1), (8, 16, 0.0)
  else:
    large, small = lm(12, 384, 6, 2), lm(8, 192, 6, 2)
    beds = [Bed(large, 1, 64, 3.0), Bed(large, 8, 32, 4.0)]
    beds.append(Bed(small, 64, 32, 4.0))
    depths, bed4, stage = (12, 24, 48), lm(4, 256, 4, 4), (64, 256, 30.0)
  parts: dict[str, Callable[[], Iterator[Row]]] = {}
  for bed in beds:
    for name, found in policies(bed).items():
      run = functools.partial(against_plain, bed, name, *found)
      parts[f"{name}, batch {bed.batch}"] = run
    for by in (0.03,) if quick else (0.0, 0.03, 1.0):
      name = f"self_speculation tuned, upper layers x {by:g}"
      run = functools.partial(speculation, bed, by)
      parts[f"{name}, batch {bed.batch}"] = run
  parts["staged"] = functools.partial(staged, bed4, *stage)
  compiled = {
    "plain": lambda layers: decode.FULL,
    "calm": lambda layers: leave_at(layers // 2),
    "self_speculation": lambda layers: SelfSpeculation(layers // 3, 4),
  }
  for layers in depths:
    for name, policy in compiled.items():
      run = functools.partial(compile_time, layers, policy, name)
      parts[f"compile, {layers} layers, {name}"] = run
  for name in options.select(parts):
    yield from parts[name]()


if __name__ == "__main__":
  main(__doc__, rows)
