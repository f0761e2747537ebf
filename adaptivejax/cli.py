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
import time
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
    adaptivejax generate runs/NAME --prompt "def main(" --compare \\
        --policy self_speculation --set exit=2 draft=4
  """

  run: tyro.conf.Positional[Path]
  """Folder of the run."""

  prompt: str
  """Text to continue."""

  policy: str = "full"
  """How tokens are made; see the list above."""

  set: tuple[str, ...] = ()
  """Settings of the policy, as in `threshold=0.8 measure=state`."""

  large: Path | None = None
  """Run of the large model, for `entropy_adaptive`."""

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
  from adaptivejax import decode

  listed = f"policies and their settings:\n{decode.describe()}"
  if set(args) & {"-h", "--help"}:
    print(listed, end="\n\n")
  options = _parse(Generate, args, "generate")
  settings = _settings(options)  # before anything is loaded
  import jax
  import jax.numpy as jnp
  from rich.console import Console

  from adaptivejax import training

  console = Console(stderr=True)
  config, model = training.load_run(options.run)
  with console.status(f"{options.policy}: preparing") as status:
    if options.large:
      settings["large"] = training.load_run(options.large)[1]
    settings |= _learned(options.policy, settings, config, model, status)
    policies = {options.policy: decode.make_policy(
      options.policy, model, **settings
    )}  # fmt: skip
    if options.compare and options.policy != "full":
      policies["full"] = decode.make_policy("full", model)
    prompt = jnp.asarray([list(options.prompt.encode())], jnp.int32)
    made, seconds = {}, {}
    for name, policy in policies.items():
      for words in ("compiling", "decoding"):  # the second time counts
        status.update(f"{name}: {words}")
        begin = time.perf_counter()
        made[name] = decode.generate(
          model,
          prompt,
          steps=options.steps,
          policy=policy,
          temperature=options.temperature,
          top_k=options.top_k,
          top_p=options.top_p,
          key=jax.random.key(options.seed),
        )
        jax.block_until_ready(made[name].tokens)
        seconds[name] = time.perf_counter() - begin
  first = made[options.policy]
  count = int(first.count[0])
  text = bytes(first.tokens[0, :count].tolist()).decode(errors="replace")
  print(options.prompt + text)
  for name, out in made.items():
    speed = int(out.count[0]) / seconds[name]
    console.print(
      f"{name}: {speed:,.0f} tokens/s, {float(out.mean_depth):.1f} layers"
      f" in a row and {float(out.cost.share):.0%} of the compute per token,"
      f" {float(out.tokens_per_step):.2f} tokens per step",
      highlight=False,
    )
  if len(made) > 1:
    same = int((first.tokens == made["full"].tokens)[0, :count].sum())
    console.print(
      f"{seconds['full'] / seconds[options.policy]:.2f}x the speed of full;"
      f" {same} of {count} bytes are the same",
      highlight=False,
    )
  return 0


def _settings(options: Generate) -> dict[str, Any]:
  """`--set` as numbers and words; unknown names are refused."""
  from adaptivejax import decode

  kinds, found = decode.plain_settings(options.policy), {}
  for item in options.set:
    name, equals, value = item.partition("=")
    if not equals:
      raise ValueError(f"--set {item!r} must be NAME=VALUE")
    if name not in kinds:
      raise ValueError(
        f"no setting {name!r} of {options.policy}{_suggestion(name, kinds)}"
      )
    try:
      found[name] = kinds[name](value)
    except ValueError:
      words = "a whole number" if kinds[name] is int else "a number"
      raise ValueError(f"--set {name}={value!r} must be {words}") from None
  return found


def _learned(
  policy: str, settings: dict[str, Any], config, model, status
) -> dict[str, Any]:
  """What some policies learn from the text that the run was trained on."""
  import functools

  import numpy as np
  from flax import nnx

  from adaptivejax import decode, training
  from adaptivejax.methods.depth import controller_loss
  from adaptivejax.nn.linear import linear
  from adaptivejax.training.data import windows

  wanted = decode.settings_of(policy)
  if "corpus" in wanted:
    status.update(f"{policy}: counting the training text")
    text = b"\n".join(training.load_corpus(config.data).train.values())
    return {"corpus": np.frombuffer(text, np.uint8).astype(np.int32)}
  if "controller" in wanted:
    status.update(f"{policy}: training its controller")
    cut = windows(training.load_corpus(config.data).train, 64)
    head = linear(model.config.features, 3, rngs=nnx.Rngs(0))
    every = settings.get("every", 1)  # the exits that it will be asked at
    loss = functools.partial(controller_loss, every=every)
    tokens = np.asarray(cut, np.int32)
    return {"controller": training.fit_head(head, loss, model, tokens)}
  return {}


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
