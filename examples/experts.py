"""Mixtures of experts on real text: which experts ran, and for which bytes.

  python -m examples.experts            about 5 minutes on 2 CPU cores
  python -m examples.experts --quick    the same path: figures mean nothing

Trains three byte-level decoders on the Python standard library: a dense one,
one that runs two experts of eight for every byte, and one that runs as many as
its router is unsure of.  Measures quality and speed on held-out files, and
writes the report, with the load of every expert.
"""

import argparse
import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

from adaptivejax import report
from adaptivejax.report.frontier import Entry, measure_points
from adaptivejax.report.mixtures import experts_snippet, mixture
from adaptivejax.training import data, train
from configs.experts import dense, mixtral, top_p

OUT = Path("runs/experts")
MODELS = {
  "dense": (dense, "one layer for all bytes"),
  "Mixtral": (mixtral, "the best 2 of 8 experts"),
  "dynamic top-p": (top_p, "half of the probability, of 8 experts"),
}
MEASURED = (
  "score: all windows of held-out text in one call, timed in turn with the"
  " dense model; the speed is the median ratio of a round, with its quartiles.",
  "FLOPs are those of matrix products really executed, padding included, in"
  " percent of the dense model's. Loads, drops and experts per byte are those"
  " of the same text.",
)
NOTES = (
  "The experts of Mixtral that run for a byte are together as wide as the dense"
  " layer; all of them are four times as wide. All models had the same steps.",
  "Difficulty is what a byte cost the model that chose the experts. A byte is"
  " predicted from the one before: the tint of a byte is that of the work that"
  " predicted it.",
)


def train_all(quick: bool, console: Console) -> list[Entry]:
  """Trains, or loads, the models."""
  made = []
  for name, (module, setting) in MODELS.items():
    config = module.config()
    if quick:
      config = dataclasses.replace(
        config, name=f"{config.name}-quick", steps=8, eval_batches=1
      )
    console.rule(f"training {config.name}")
    out, source = Path("runs") / config.name, Path(module.__file__)
    result = train(config, out=out, source=source)
    if result.stopped:
      raise SystemExit(128 + result.stopped)
    made.append(Entry(name, setting, result.model))
  return made


def against_dense(points, entries: list[Entry], windows) -> list:
  """The points, their FLOPs in shares of the dense model's."""
  spent = jax.jit(lambda model, text: model(text[:, :-1]).cost.spent)
  text = jnp.asarray(windows, jnp.int32)
  each = [float(spent(entry.model, text)) for entry in entries]
  return [
    dataclasses.replace(point, flops_share=one / each[0])
    for point, one in zip(points, each, strict=True)
  ]


def folder_of(module, quick: bool) -> Path:
  """Where a model's run lies."""
  name = module.config().name
  return Path("runs") / (f"{name}-quick" if quick else name)


def main() -> None:
  """Trains, measures, reports."""
  parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
  parser.add_argument("--quick", action="store_true", help="a minute, no sense")
  quick = parser.parse_args().quick
  console = Console()
  twin, *routed = entries = train_all(quick, console)
  config = dense.config().data
  corpus = data.load_corpus(config)
  windows = data.validation_batches(corpus.validation, config, 1)
  windows = windows.reshape(-1, windows.shape[-1])[: 2 if quick else None]
  console.rule("measuring")
  points, _ = measure_points(
    twin, routed, windows, regime="score", seconds=0.1 if quick else 5.0
  )
  text = bytes(windows[-1][1:].astype(np.uint8))
  mixtures = tuple(mixture(entry, windows) for entry in routed)
  result = report.Report(
    title="Experts: which ran, and for which bytes",
    command="python -m examples.experts" + " --quick" * quick,
    environment=report.environment(),
    points=tuple(against_dense(points, entries, windows)),
    curves=tuple(
      report.curve(folder_of(module, quick), name)
      for name, (module, _) in MODELS.items()
    ),
    mixtures=mixtures,
    snippets=tuple(experts_snippet(entry, text) for entry in routed[1:]),
    measured=MEASURED,
    notes=NOTES,
  )
  folder = OUT.with_name("experts-quick") if quick else OUT
  page = report.write_report(result, folder)
  report.print_table(result, console)
  for m in mixtures:
    console.print(
      f"{m.method}: the fullest expert has {m.mean_imbalance:.2f} times the"
      f" mean load; {m.experts[0]:.2f} experts in a layer for the easiest tenth"
      f" of bytes, {m.experts[-1]:.2f} for the hardest",
      highlight=False,
    )
  console.print(f"report: {page}")


if __name__ == "__main__":
  main()
