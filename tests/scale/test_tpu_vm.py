# SPDX-License-Identifier: Apache-2.0
"""Law: what the page on TPU VMs tells to type, the program takes."""

import math
import re
import shlex
import subprocess

import pytest

from adaptivejax import cli, training
from adaptivejax.cli import parsing
from adaptivejax.cli import train as train_command
from adaptivejax.training import hosts, profile
from adaptivejax.training.mesh import AXES
from tests.program import ROOT

FOLDER = ROOT / "examples" / "tpu_vm"
PAGE = (FOLDER / "README.md").read_text()
CHIPS = {"v5e:2x4": 8, "v5e:4x8": 32}


def commands(name):
  """The arguments of each `adaptivejax name`, also inside of quotes."""
  lines = re.findall(rf"adaptivejax {name} ([^'\n`]+?)(?='|$)", PAGE, re.M)
  lines = [line for line in lines if "..." not in line]
  if name == "train":
    lines += re.findall(r"^examples/tpu_vm/\w+\.sh (\S.*)$", PAGE, re.M)
  assert lines
  return [shlex.split(line) for line in lines]


@pytest.mark.parametrize("args", commands("train"), ids=" ".join)
def test_train(args, monkeypatch):
  monkeypatch.chdir(ROOT)
  command = train_command.read(args)
  hosts.peers(hosts.Peers(*command.peers), {}, on_tpu=False)
  if command.profile is not None:
    profile.parse(command.profile)
  mesh = train_command.configured(command).mesh
  if mesh.data != -1:
    assert math.prod(getattr(mesh, axis) for axis in AXES) in CHIPS.values()


@pytest.mark.parametrize("args", commands("compile"), ids=" ".join)
def test_compile(args, monkeypatch):
  monkeypatch.chdir(ROOT)
  (path, *rest) = args
  topology, fields = parsing.take(rest, "--topology")
  config = training.load_config(ROOT / path)
  config = parsing.parse(type(config), fields, "compile", default=config)
  config.mesh.sizes(CHIPS[topology])


def test_report():
  for (folder,) in commands("report"):
    assert folder == "runs/experts/mixtral"


def test_only_commands_that_exist():
  found = re.findall(r"(?:^|&& )adaptivejax (\w+)", PAGE, re.M)
  assert {*found} <= {*cli.COMMANDS}


@pytest.mark.parametrize("path", [*FOLDER.glob("*.sh")], ids=lambda p: p.name)
def test_scripts_are_shell(path):
  subprocess.run(["bash", "-n", path], check=True)
