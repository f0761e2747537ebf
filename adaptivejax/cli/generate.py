# SPDX-License-Identifier: Apache-2.0
"""`adaptivejax generate`."""

import dataclasses
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import tyro
from rich.console import Console

from adaptivejax import decode, training
from adaptivejax.cli.parsing import parse
from adaptivejax.cli.settings import learned, plain


@dataclasses.dataclass(frozen=True)
class Generate:
  """Continues a text with the model of a run.

  The text goes to standard output, what it cost to standard error.  For example

    adaptivejax generate runs/NAME/config.py --prompt "def main("
    adaptivejax generate runs/NAME/config.py --prompt "def main(" --compare \\
        --policy self_speculation --set exit=2 draft=4
  """

  run: tyro.conf.Positional[Path]
  """Config in the folder of the run: code, which is run."""

  prompt: str
  """Text to continue."""

  policy: str = "full"
  """How tokens are made; see the list above."""

  set: tuple[str, ...] = ()
  """Settings of the policy, as in `threshold=0.8 measure=state`."""

  large: Path | None = None
  """Config in the run of the large model, for `entropy_adaptive`."""

  steps: int = 256
  """Bytes to add."""

  temperature: float = 0.0
  """0 takes the likeliest byte, 1 draws from the model's distribution."""

  top_k: int | None = None
  """Draw from the k likeliest bytes only."""

  top_p: float = 1.0
  """Draw from the likeliest bytes that hold this probability together."""

  seed: int = 0
  """Seed of the draws."""

  compare: bool = False
  """Also decode with all layers, and say how the two compare."""

  def __post_init__(self):
    """Refuses settings outside their range."""
    if not self.prompt:
      raise ValueError("--prompt is empty: give at least one character")
    if self.steps < 1 or self.temperature < 0:
      raise ValueError(
        f"--steps {self.steps} must be at least 1 and --temperature"
        f" {self.temperature} at least 0"
      )


def run(args: Sequence[str]) -> int:
  """Prints the text, and beside it what each policy took."""
  if set(args) & {"-h", "--help"}:
    print(f"policies and their settings:\n{decode.describe()}", end="\n\n")
  options = parse(Generate, args, "generate")
  settings = plain(options.policy, options.set)  # before anything is loaded
  config, model = training.load_run(options.run)
  console, made, seconds = Console(stderr=True), {}, {}
  with console.status(f"{options.policy}: preparing") as status:
    if options.large:
      settings["large"] = training.load_run(options.large)[1]
    settings |= learned(options.policy, settings, config, model, status.update)
    asked = {options.policy: settings}
    if options.compare:
      asked.setdefault("full", {})
    for name, given in asked.items():
      policy = decode.make_policy(name, model, **given)
      for words in ("compiling", "decoding"):  # the second time counts
        status.update(f"{name}: {words}")
        begin = time.perf_counter()
        made[name] = _continue(model, policy, options)
        seconds[name] = time.perf_counter() - begin
  first = made[options.policy]
  text = bytes(first.tokens[0, : first.count[0]].tolist())
  print(options.prompt + text.decode(errors="replace"))
  for line in _costs(options.policy, made, seconds):
    console.print(line, highlight=False)
  return 0


def _continue(model: Any, policy: Any, options: Generate) -> decode.Generation:
  out = decode.generate(
    model,
    jnp.asarray([list(options.prompt.encode())], jnp.int32),
    steps=options.steps,
    policy=policy,
    temperature=options.temperature,
    top_k=options.top_k,
    top_p=options.top_p,
    key=jax.random.key(options.seed),
  )
  return jax.block_until_ready(out)


def _costs(
  asked: str, made: dict[str, decode.Generation], seconds: dict[str, float]
) -> Iterator[str]:
  """A line per policy, and one that compares the one asked for with `full`."""
  for name, out in made.items():
    speed = int(out.count[0]) / seconds[name]
    yield (
      f"{name}: {speed:,.0f} tokens/s, {float(out.mean_depth):.1f} layers"
      f" in a row and {float(out.cost.share):.0%} of the compute per token,"
      f" {float(out.tokens_per_step):.2f} tokens per step"
    )
  if len(made) > 1:
    count = int(made[asked].count[0])
    same = (made[asked].tokens == made["full"].tokens)[0, :count].sum()
    yield (
      f"{seconds['full'] / seconds[asked]:.2f}x the speed of full;"
      f" {int(same)} of {count} bytes are the same"
    )
