# SPDX-License-Identifier: Apache-2.0
"""`adaptivejax adapt`: everything once, into one report.

Axes: W held-out windows, P prompt tokens, T tokens, L layers.
"""

import dataclasses
import math
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial
from rich.console import Console

from adaptivejax import decode, report
from adaptivejax.adapt import drafts
from adaptivejax.adapt.bench import Bench
from adaptivejax.adapt.config import AdaptConfig
from adaptivejax.adapt.exits import overconfidence
from adaptivejax.adapt.measure import JUDGED, Reading, Starts, Trial, measure
from adaptivejax.adapt.recipes import RECIPES
from adaptivejax.adapt.text import read_text
from adaptivejax.nn import out_major
from adaptivejax.report.data import Grid, Point, Report, Sample, Snippet, real

RISE = 0.03
SPEED = 1.3
MEASURED = (
  "Each method was timed in turn with the model as it was, text by text, in one"
  " process; the speed is the median ratio of a round, with its quartiles. All"
  " is warm, but for long prompts: these are read once or more, without a run"
  " before. Both have their kernels stored out-major, as decoding wants.",
  "decode: one token after the other at batch 1, each after its true past,"
  " behind a short prompt; long decode: behind a long one, which the model as"
  " it was has read, or, if it gives keys up, the method itself; prompt and"
  f" long prompt: reading a text at once, judged by its last {JUDGED} tokens."
  " There the model as it was reads by blocks and leaves out the future, which"
  " is much faster than plain attention. Looks at prompts"
  " choose keys for many tokens at once, the later ones among them, which"
  " decoding cannot."
  " Drafts are timed on greedy texts, the prompt included.",
  "Perplexity is per token, on documents from which nothing was learned, over"
  " all windows. All budgets that are measured are shown. FLOPs are those of"
  " matrix products really executed, by what ran on the clock.",
)


class Run:
  """One run: what was measured so far, and what measures."""

  def __init__(self, bench: Bench, console: Console):
    self.bench, self.console = bench, console
    self.dense = Trial("as it was", "all of it", bench.fast)
    self.by_blocks = Trial("as it was", "all keys, by blocks", bench.dense)
    self.points: list[Point] = []
    self.errors: list[float] = []
    self.exact: dict[str, float] = {}
    self.drafted: list[drafts.Drafted] = []
    self.trials: dict[str, Trial] = {}
    self._twins: dict[str, tuple[Point, Reading]] = {}
    self._starts: Starts = {}

  def twin(self, regime: str) -> Point:
    """The model as it was; measured when it is first asked for."""
    if regime not in self._twins:
      point, _, out = self._measure(self._dense(regime), regime, None)
      self._twins[regime] = point, out
      self._note(point)
    return self._twins[regime][0]

  def _dense(self, regime: str) -> Trial:
    return self.dense if regime == "decode" else self.by_blocks

  def add(self, trial: Trial) -> None:
    """Measures a trial in each of its regimes."""
    if trial.exact is not None:
      self.exact[trial.method] = trial.exact
    self.trials[trial.method] = trial  # the last, which is the cheapest
    for regime in trial.regimes:
      self.twin(regime)
      twin = self._twins[regime][1]
      point, error, _ = self._measure(trial, regime, twin)
      self.errors.append(error)
      self._note(point)

  def draft(self) -> None:
    """Measures the policies that draft."""
    for made in drafts.measured(self.bench, self.twin("decode")):
      self.drafted.append(made)
      self._note(made.point)

  def _measure(self, trial, regime, twin):
    config, text = self.bench.config, self.bench.text
    texts = text.test if regime == "decode" else text.long
    size = {"prompt": config.read, "long prompt": config.long}.get(regime)
    texts = texts[:, :size]
    return measure(
      self._dense(regime),
      trial,
      texts,
      regime=regime,
      prompt=config.prompt if regime == "decode" else config.long,
      seconds=config.seconds,
      bytes_per_token=text.bytes_per_token,
      twin=twin,
      starts=self._starts,
    )

  def _note(self, point: Point) -> None:
    self.points.append(point)
    dense = self._twins[point.regime][0]
    rise = (point.perplexity or math.nan) / (dense.perplexity or math.nan) - 1
    self.console.print(
      f"{point.regime:12}{point.method}, {point.setting}:"
      f" {point.speedup:.2f}x at {rise:+.1%} perplexity",
      highlight=False,
    )


def adapt(
  config: AdaptConfig, out: Path, console: Console | None = None
) -> Report:
  """Does what `config` says, and writes `report.html` and `report.json`."""
  console = console or Console()
  console.rule(f"adapting {config.name}")
  loaded = config.load()
  text = read_text(config, loaded.tokenizer())
  bench = Bench(
    loaded.model,
    out_major(loaded.model),
    text,
    config,
    say=lambda line: console.print(line, style="dim", highlight=False),
  )
  run = Run(bench, console)
  for name in config.recipes:
    begin = time.perf_counter()
    if name == "drafts":
      run.draft()
    else:
      for trial in RECIPES[name](bench):
        run.add(trial)
    bench.say(f"{name}: {time.perf_counter() - begin:.0f} s")
    jax.clear_caches()  # for their memory: few programs serve two recipes
  made = _report(run)
  page = report.write_report(made, out)
  report.print_table(made, console)
  console.print(_reached(made), highlight=False)
  console.print(f"report: {page}")
  return made


def reached(made: Report) -> dict[str, Point]:
  """The fastest point of each method that keeps perplexity and is fast."""
  found: dict[str, Point] = {}
  for point in made.points:
    rise, speed = made.rise(point), point.speedup
    known = not point.dense and real(rise) and real(speed)
    if known and rise <= RISE and speed >= SPEED:
      best = found.setdefault(point.method, point)
      if real(best.speedup) and speed > best.speedup:
        found[point.method] = point
  return found


def _reached(made: Report) -> str:
  fast = reached(made)
  names = ", ".join(
    f"{p.method} ({p.regime}, {p.speedup:.2f}x)" for p in fast.values()
  )
  return (
    f"{len(fast)} methods are {SPEED}x as fast or more at {RISE:.0%} perplexity"
    f" or less: {names or 'none'}"
  )


def _report(run: Run) -> Report:
  bench, config = run.bench, run.bench.config
  order = sorted(run.points, key=lambda p: not p.dense)  # the twins first
  grids = [_exactness(run)]
  if run.drafted:
    grids.append(_drafts(run))
  if bench.lens is not None:
    grids.append(overconfidence(bench, bench.lens, bench.text.test))
  errors = [e for e in run.errors if real(e)] or [math.nan]
  notes = [
    f"{config.windows} windows of {config.context - config.prompt} tokens are"
    f" judged in decoding, {config.long_windows} long ones in the rest: the"
    " standard error of a rise in perplexity is, for most,"
    f" {np.median(errors):.1%} or less, and {max(errors):.1%} for one.",
    f"Lessons are {config.steps} updates of {config.batch} windows of"
    f" {config.context} tokens, on the model's own words: minutes, where papers"
    " take days. A model this small has little to spare.",
  ]
  result = Report(
    title=f"{config.name}: adaptive in many ways",
    command=f"adaptivejax adapt configs/{config.name}.py",
    environment=report.environment(),
    points=tuple(order),
    snippets=tuple(_snippets(run)),
    samples=tuple(_samples(run)),
    grids=tuple(grids),
    measured=MEASURED,
  )
  told = (_reached(result) + ".", *notes)
  return dataclasses.replace(result, notes=told)


def _exactness(run: Run) -> Grid:
  rows = tuple((name, f"{gap:.1e}") for name, gap in run.exact.items())
  return Grid(
    "Exact at the full budget",
    ("surgery or policy", "largest change of a logit"),
    rows,
    "Before anything is learned, with its whole budget, a changed model says"
    " what the model said.",
  )


def _drafts(run: Run) -> Grid:
  rows = tuple(
    (d.point.method, d.point.setting, f"{d.steps:.2f}", f"{d.same:.0%}")
    for d in run.drafted
  )
  return Grid(
    "Drafts: the same text in fewer steps",
    ("policy", "setting", "tokens per step", "prompts with the same text"),
    rows,
    f"Greedy texts of {run.bench.config.sample} tokens, beside plain decoding.",
  )


def _shown(run: Run) -> list[Trial]:
  """Trials whose text and depth are shown."""
  return [t for t in run.trials.values() if "decode" in t.regimes]


def _stack(trial: Trial, prompt):
  return (
    trial.stack if trial.prime is None else trial.prime(trial.model, prompt)
  )


def _snippets(run: Run):
  text, many = run.bench.text, 48
  window = run.bench.text.test[0][: many + 1]
  pieces = text.pieces(window)[1:]
  for name in ("CALM, lens", "ACM", "Mixture-of-Depths", "FFN-SkipLLM"):
    if name not in run.trials:
      continue
    trial = run.trials[name]
    out = decode.score(
      trial.model, jnp.asarray(window[None]), policy=_policy(trial.stack)
    )
    shares = np.asarray(out.shares)
    yield Snippet(
      text=b"".join(pieces),
      share=tuple(map(float, shares.mean(1))),
      matrix=tuple(tuple(map(float, row)) for row in shares.T),
      method=trial.method,
      setting=trial.setting,
      lengths=tuple(map(len, pieces)),
    )


def _policy(stack):
  return stack if isinstance(stack, Partial) else Partial(stack)


def _samples(run: Run):
  config, text = run.bench.config, run.bench.text
  prompt = jnp.asarray(text.test[:1, : config.prompt])
  said = text.tokenizer.decode(list(map(int, prompt[0]))).encode()
  for trial in (run.dense, *_shown(run)):
    out = decode.generate(
      trial.model,
      prompt,
      steps=config.sample,
      policy=_policy(_stack(trial, prompt)),
    )
    whole = np.concatenate([prompt[0], out.tokens[0]]).tolist()
    speeds = [
      p.tokens_per_second
      for p in run.points
      if (p.method, p.setting, p.regime)
      == (trial.method, trial.setting, "decode")
    ]
    yield Sample(
      prompt=said,
      continuation=text.tokenizer.decode(whole).encode()[len(said) :],
      method=trial.method,
      setting=trial.setting,
      tokens_per_second=speeds[0] if speeds else None,
      mean_depth=float(out.mean_depth),
    )
