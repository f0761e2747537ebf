"""The main job: adaptive language models on real text, beside a dense twin.

  make demo            about 8 minutes on 2 CPU cores
  make demo QUICK=1    the same path in about a minute: figures mean nothing

Trains four byte-level decoders of one size on the Python standard library: the
dense twin, one with four exits, one with Mixture-of-Depths, one
with Adaptive Computation Modules.  Sets each to several budgets on training
text, measures quality and speed on held-out files, and writes the report.
"""

import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial
from rich.console import Console
from rich.progress import Progress

from adaptivejax import decode, report
from adaptivejax.methods.depth import calm, unified_skip
from adaptivejax.report.frontier import (
  Entry,
  at_budget,
  exit_threshold,
  measure_points,
  samples,
  snippet,
)
from adaptivejax.training import data
from configs.quickstart import acm, dense, exits, mod
from configs.quickstart.common import EXITS
from examples.common import folder_of, is_quick, trained, windows

MODELS = {"dense": dense, "exits": exits, "mod": mod, "acm": acm}
PROMPT = b'''def load(path, encoding="utf-8"):
  """Return the '''
MEASURED = (
  "Each point was timed in turn with the dense twin, in one process, warm, on"
  " the same held-out text; the speed is the median ratio of a round, with its"
  " quartiles. Quality is that of the computation that was timed.",
  "decode: one byte after the other over the key/value cache, batch 1, each"
  " after its true past. score: all windows in one call.",
  "Budgets were set on text of the training files, not on the test text. FLOPs"
  " are those of matrix products really executed, padding included.",
)
ERROR = (
  "Quality is the mean over {} windows; the standard error of a difference"
  " from dense is at most {:.1%} of its bits per byte. The fastest point is"
  " chosen on this same text."
)
NOTES = (
  "Token by token means batch 1: what an exit saves there it saves in full. In"
  " a batch, a row that has left the layers waits for the slowest one.",
  "The models are small and trained for minutes, so bits per byte are far from"
  " what the text allows; read the differences, not the level. All had the same"
  " steps, not the same FLOPs.",
)


def entries(models: dict, calibration: np.ndarray, quick: bool):
  """The methods at their budgets: `(decode, score)`."""
  policy, layers = decode.make_policy, dense.MODEL.layers
  some = lambda *settings: settings[:1] if quick else sorted(settings)
  exits_, twin = models["exits"], models["dense"]
  by_token = [Entry("exits, all layers", f"{layers} of {layers}", exits_)]
  for depth in some(EXITS[1], EXITS[0]):
    first = Partial(unified_skip, kept=jnp.arange(depth))
    by_token.append(
      Entry("sorted sub-model", f"{depth} of {layers} layers", exits_, first)
    )
  for depth in some(7, 6, 9):
    level = exit_threshold(exits_, calibration, depth, EXITS[0])
    setting = f"mean {depth} of {layers} layers, λ={level:.2f}"
    leave = Partial(calm, threshold=jnp.float32(level), min_depth=EXITS[0])
    by_token.append(Entry("CALM", setting, exits_, leave))
  for speedup in some(1.5, 2):
    plan = policy("unified", twin, speedup=speedup)
    kept = f"{plan.keywords['kept'].size} of {layers} layers"
    by_token.append(Entry("unified skip", kept, twin, plan))
  at_once = []
  for level in some(0.99, 0.95):
    skip = policy("ffn_skip", exits_, threshold=level)
    at_once.append(Entry("FFN-SkipLLM", f"cosine {level}", exits_, skip))
  for name, label, span, shares in (
    ("mod", "Mixture-of-Depths", 16.0, (0.75, 0.65, 0.85)),
    ("acm", "ACM", 8.0, (0.7, 0.55, 0.85)),
  ):
    for share in some(*shares):
      model, _ = at_budget(models[name], calibration, share, span)
      at_once.append(Entry(label, f"{share:.0%} of FLOPs", model))
  return by_token + at_once, at_once


def main() -> None:
  """Trains, calibrates, measures, reports."""
  quick, console = is_quick(__doc__), Console()
  models = {n: trained(module, quick, console) for n, module in MODELS.items()}
  config = dense.config().data
  corpus = data.load_corpus(config)
  calibration = windows(corpus.train, config, quick)
  test = windows(corpus.validation, config, quick)
  console.rule("calibrating and measuring")
  twin = Entry("dense", "all layers", models["dense"])
  by_token, at_once = entries(models, calibration, quick)
  seconds = 0.1 if quick else 3.0
  points, errors = [], []
  with Progress(console=console, transient=True) as bar:
    task = bar.add_task("points", total=len(by_token) + len(at_once) + 2)
    for regime, those in (("decode", by_token), ("score", at_once)):
      made, error = measure_points(
        twin,
        those,
        test,
        regime=regime,
        seconds=seconds,
        progress=lambda: bar.advance(task),
      )
      points, errors = points + made, errors + error
  sure = next(e for e in by_token if e.method == "CALM")
  shown = [sure, *(e for e in at_once if e.method != "FFN-SkipLLM")]
  shown = list({entry.method: entry for entry in reversed(shown)}.values())
  text = bytes(test[-1][1:].astype(np.uint8))
  result = report.Report(
    title="Quickstart: where the compute went",
    command="make demo QUICK=1" if quick else "make demo",
    environment=report.environment(),
    points=tuple(points),
    curves=tuple(
      report.curve(folder_of(f"quickstart/{n}", quick), n) for n in MODELS
    ),
    snippets=tuple(snippet(entry, text) for entry in shown),
    samples=tuple(samples((twin, sure), PROMPT, 32 if quick else 128)),
    measured=(*MEASURED, ERROR.format(len(test), max(errors))),
    notes=NOTES,
  )
  page = report.write_report(result, folder_of("quickstart", quick))
  report.print_table(result, console)
  console.print(f"report: {page}")


if __name__ == "__main__":
  main()
