"""Mixtures of experts on real text: which experts ran, and for which bytes.

  python -m examples.experts            about 5 minutes on 2 CPU cores
  python -m examples.experts --quick    the same path: figures mean nothing

Trains three byte-level decoders on the Python standard library: a dense one,
one that runs two experts of eight for every byte, and one that runs as many as
its router is unsure of.  Measures quality and speed on held-out files, and
writes the report, with the load of every expert.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console

from adaptivejax import report
from adaptivejax.report.frontier import Entry, measure_points
from adaptivejax.report.mixtures import experts_snippet, mixture
from adaptivejax.training import data
from configs.experts import dense, mixtral, top_p
from examples.common import folder_of, is_quick, trained, windows

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


def against_dense(points, entries: list[Entry], test) -> list:
  """The points, their FLOPs in shares of the dense model's."""
  spent = jax.jit(lambda model, text: model(text[:, :-1]).cost.spent)
  text = jnp.asarray(test, jnp.int32)
  each = [float(spent(entry.model, text)) for entry in entries]
  return [
    dataclasses.replace(point, flops_share=one / each[0])
    for point, one in zip(points, each, strict=True)
  ]


def main() -> None:
  """Trains, measures, reports."""
  quick, console = is_quick(__doc__), Console()
  twin, *routed = entries = [
    Entry(name, setting, trained(module, quick, console))
    for name, (module, setting) in MODELS.items()
  ]
  config = dense.config().data
  test = windows(data.load_corpus(config).validation, config, quick)
  console.rule("measuring")
  points, _ = measure_points(
    twin, routed, test, regime="score", seconds=0.1 if quick else 5.0
  )
  text = bytes(test[-1][1:].astype(np.uint8))
  mixtures = tuple(mixture(entry, test) for entry in routed)
  result = report.Report(
    title="Experts: which ran, and for which bytes",
    command="python -m examples.experts" + " --quick" * quick,
    environment=report.environment(),
    points=tuple(against_dense(points, entries, test)),
    curves=tuple(
      report.curve(folder_of(module.config().name, quick), name)
      for name, (module, _) in MODELS.items()
    ),
    mixtures=mixtures,
    snippets=tuple(experts_snippet(entry, text) for entry in routed[1:]),
    measured=MEASURED,
    notes=NOTES,
  )
  page = report.write_report(result, folder_of("experts", quick))
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
