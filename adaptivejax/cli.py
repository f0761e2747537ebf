# SPDX-License-Identifier: Apache-2.0
"""The command line: `adaptivejax train | generate | report`.

A mistake is one line and exit code 2, before anything is compiled; with
ADAPTIVEJAX_DEBUG=1 it is a traceback.  Heavy imports wait for their command, so
that `adaptivejax --help` is quick.
"""

import contextlib
import dataclasses
import difflib
import io
import itertools
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import tyro

HELP = """\
usage: adaptivejax COMMAND ...

Adaptive computation for JAX: train a model that spends compute where it is
worth it, sample from it at a budget, and see where the compute went.

  train CONFIG.py [--field value ...]   train, or go on with the run
  generate RUN --prompt TEXT            continue a text, adaptively
  report RUN                            write RUN/report.html

Examples:
  adaptivejax train configs/NAME.py --steps 500 --data.batch 8
  adaptivejax generate runs/NAME --prompt "def main(" --policy calm
  adaptivejax report runs/NAME

`adaptivejax COMMAND --help` tells more.
"""

TRAIN_HELP = """\
usage: adaptivejax train CONFIG.py [--field value ...]

Trains the run that CONFIG.py describes, in runs/NAME, or goes on with it from
its newest checkpoint.  Ctrl-C or SIGTERM stops after a step, with a checkpoint.
CONFIG.py is Python, with a function `config() -> TrainConfig`.

Example:
  adaptivejax train configs/NAME.py --steps 500 --optimizer.learning_rate 3e-4

`adaptivejax train CONFIG.py --help` lists the fields of that config.
"""


@dataclasses.dataclass(frozen=True)
class Generate:
  """Continues a text with the model of a run.

  The text goes to standard output, what it cost to standard error.  For example

    adaptivejax generate runs/NAME --prompt "def main(" --policy calm
  """

  run: tyro.conf.Positional[Path]
  """Folder of the run."""

  prompt: str
  """Text to continue."""

  policy: str = "full"
  """How the layers are run: full, calm, calm_max_prob, calm_state, unified,
  ffn_skip."""

  setting: float | None = None
  """Its threshold or speed-up: the confidence of calm, the cosine of calm_state
  and ffn_skip, the speed-up of unified."""

  steps: int = 256
  """Bytes to add."""

  temperature: float = 0.0
  """0 takes the likeliest byte, 1 draws from the model's distribution."""

  seed: int = 0
  """Seed of the draws."""

  def __post_init__(self):
    """Refuses settings outside their range."""
    if not self.prompt:
      raise ValueError("--prompt is empty: give at least one character")
    if self.steps < 1 or self.temperature < 0:
      raise ValueError(
        f"--steps {self.steps} must be at least 1 and --temperature"
        f" {self.temperature} at least 0"
      )


@dataclasses.dataclass(frozen=True)
class Report:
  """Writes RUN/report.html from what the run measured.

  For example

    adaptivejax report runs/NAME
  """

  run: tyro.conf.Positional[Path]
  """Folder of the run."""


def main(args: Sequence[str] | None = None) -> int:
  """Runs a command; the exit code is 0, or 2 after a mistake."""
  name, *rest = (sys.argv[1:] if args is None else args) or ["--help"]
  if name in ("-h", "--help"):
    print(HELP, end="")
    return 0
  sys.path.append(os.getcwd())  # a config may import its neighbours
  try:
    if name not in COMMANDS:
      raise ValueError(f"no command {name!r}{_suggestion(name, COMMANDS)}")
    return COMMANDS[name](rest)
  except SystemExit as exit:  # help was printed
    return int(exit.code or 0)
  except KeyboardInterrupt:
    return 130
  except (ValueError, OSError, ModuleNotFoundError) as error:
    if os.environ.get("ADAPTIVEJAX_DEBUG"):
      raise
    missing = isinstance(error, ModuleNotFoundError)
    hint = "; pip install 'adaptivejax[data]'" if missing else ""
    print(f"adaptivejax: {' '.join(str(error).split())}{hint}", file=sys.stderr)
    return 2


def train(args: Sequence[str]) -> int:
  """`adaptivejax train`; after a signal the exit code is 128 + its number."""
  path, *rest = args or [""]
  if path in ("-h", "--help"):
    print(TRAIN_HELP, end="")
    return 0
  if not path:
    raise ValueError("name a config file; adaptivejax train --help shows how")
  from adaptivejax import training

  config = training.load_config(Path(path))
  config = _parse(type(config), rest, f"train {path}", default=config)
  out = Path("runs") / config.name
  result = training.train(config, out=out, source=Path(path))
  if result.stopped:
    print(f"stopped after step {result.step}; the same command goes on")
    return 128 + result.stopped
  print(f"{out}: {result.metrics['validation/bits_per_byte']:.3f} bits/byte")
  return 0


def generate(args: Sequence[str]) -> int:
  """`adaptivejax generate`."""
  options = _parse(Generate, args, "generate")
  import jax
  import jax.numpy as jnp

  from adaptivejax import decode, training

  name = options.policy
  if name not in decode.POLICIES:
    raise ValueError(f"no policy {name!r}{_suggestion(name, decode.POLICIES)}")
  _, model = training.load_run(options.run)
  prompt = jnp.asarray([list(options.prompt.encode())], jnp.int32)
  made = decode.generate(
    model,
    prompt,
    steps=options.steps,
    policy=decode.make_policy(name, model, options.setting),
    temperature=options.temperature,
    key=jax.random.key(options.seed),
  )
  text = bytes(made.tokens[0].tolist()).decode(errors="replace")
  print(options.prompt + text)
  share, depth = made.cost.spent / made.cost.full, made.depth.mean()
  print(f"compute {share:.0%}, mean depth {depth:.1f}", file=sys.stderr)
  return 0


def report(args: Sequence[str]) -> int:
  """`adaptivejax report`."""
  options = _parse(Report, args, "report")
  from adaptivejax.report import rebuild

  print(rebuild(options.run))
  return 0


COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {
  "train": train,
  "generate": generate,
  "report": report,
}


def _parse(kind: Any, args: Sequence[str], command: str, **options: Any) -> Any:
  """A dataclass from the command line; a mistake is a one-line ValueError."""
  errors = io.StringIO()
  try:
    with contextlib.redirect_stderr(errors):
      value, unknown = tyro.cli(
        kind,
        args=args,
        prog=f"adaptivejax {command}",
        use_underscores=True,
        return_unknown_args=True,
        config=(tyro.conf.SuppressFixed,),
        **options,
      )
  except SystemExit as exit:
    if exit.code:
      raise ValueError(_first_sentence(errors.getvalue())) from None
    raise
  if unknown:
    names = [f"--{name}" for name in _names(options.get("default", kind))]
    raise ValueError(f"no field {unknown[0]}{_suggestion(unknown[0], names)}")
  return value


def _names(config: Any) -> Iterator[str]:
  """The dotted names of the fields of a dataclass, or of an instance."""
  for field in dataclasses.fields(config):
    value = getattr(config, field.name, None)
    if dataclasses.is_dataclass(value):
      yield from (f"{field.name}.{name}" for name in _names(value))
    elif not callable(value):
      yield field.name


def _suggestion(word: str, names: Iterable[str]) -> str:
  """The name that is meant by `word`, whole or by its last part, as words."""
  word = word.partition("=")[0].replace("-", "_").lstrip("_")
  bare = {name.rpartition(".")[2].lstrip("-"): name for name in names}
  bare |= {name.lstrip("-"): name for name in names}
  close = difflib.get_close_matches(word, bare, n=1)
  if close:
    return f"; did you mean {bare[close[0]]}?"
  return "; --help lists them"


def _first_sentence(box: str) -> str:
  """What tyro says below its title, up to a rule or a blank line."""
  plain = re.sub(r"\x1b\[[0-9;]*m", "", box)
  lines = [line.strip(" │|") for line in plain.splitlines()[1:]]
  is_rule = lambda line: not line.strip("─-")
  body = itertools.dropwhile(is_rule, lines)
  return " ".join(itertools.takewhile(lambda line: not is_rule(line), body))
