# SPDX-License-Identifier: Apache-2.0
"""Law: what `compile` says of the configs of a pod holds, at any size.

The models are those of configs/scale made narrow, on eight fake devices; what
the compiler of TPUs makes of them is in tests/kernels/test_tpu_cycles.py.
"""

import dataclasses
import importlib
import importlib.util
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from rich.console import Console

from adaptivejax import cli
from adaptivejax.cli import compile as compile_command
from adaptivejax.core.attention import Keys
from adaptivejax.core.block_lists import lists_from_mask
from adaptivejax.core.cost import flops
from adaptivejax.core.sparse_attention import attend_blocks
from adaptivejax.training import aot, chips
from adaptivejax.training.data import DataConfig
from adaptivejax.training.kernels import Kernel
from adaptivejax.training.mesh import MeshConfig, make_mesh

NARROW = {"vocab": 64, "features": 32, "hidden": 64, "heads": 4, "kv_heads": 2}
ROOT = Path(__file__).parents[2]


@pytest.fixture
def narrow(monkeypatch):
  """`narrow(name, layers, mesh, ...)`: a config module with a small model."""

  def make(name, layers, mesh, context=32, batch=8, **more):
    module = importlib.import_module(f"configs.scale.{name}")
    model = dataclasses.replace(module.MODEL, layers=layers, **NARROW)
    data = DataConfig(context=context, batch=batch)
    for key, value in {"MODEL": model, "DATA": data, "MESH": mesh}.items():
      monkeypatch.setattr(module, key, value)
    for key, value in more.items():
      monkeypatch.setattr(module, key, value)
    return module

  return make


def traced(config):
  """FLOPs of a step on one device, as `Cost` counts them."""
  model = jax.eval_shape(lambda: config.build(nnx.Rngs(0)))
  definition, params, rest = nnx.split(model, nnx.Param, ...)
  rest = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), rest)
  shape = config.data.batch, config.data.context + 1
  batch = jax.ShapeDtypeStruct(shape, jnp.int32)

  def loss(params, batch):
    model = nnx.merge(definition, params, rest)
    return config.loss(model, batch, jax.random.key(0))[0]

  return flops(jax.grad(loss), params, batch)


def sites(found):
  return {(c.kind, c.axes): c.sites for c in found.collectives}


def counts(found):
  return sum(c.count for c in found.collectives)


def test_layers_and_budget_of_depths(narrow):
  mesh, exits = MeshConfig(fsdp=4, model=2), (1, 2)
  module = narrow("depths_8b", 4, mesh, EXITS=exits)
  shallow = aot.compile_step(module.config(0.25), "cpu:8")
  dense = aot.compile_step(module.config(1.0), "cpu:8")
  module = narrow("depths_8b", 8, mesh, EXITS=exits)
  deep = aot.compile_step(module.config(0.25), "cpu:8")
  assert shallow.fits and deep.fits
  assert sites(deep) == sites(shallow)  # a scan: the text is the same
  assert counts(deep) > counts(shallow)
  assert deep.work.unknown == 0
  # the work is that of the traced program, and the budget moves both alike
  found = shallow.flops / dense.flops
  module = narrow("depths_8b", 4, mesh, EXITS=exits)
  wanted = traced(module.config(0.25)) / traced(module.config(1.0))
  assert found == pytest.approx(wanted, rel=0.02) and found < 0.7
  # keys and values are computed on both devices of an axis of heads
  whole = traced(module.config(1.0))
  assert whole < 8 * dense.flops < 1.1 * whole


def test_tokens_are_sent_to_experts_not_to_all(narrow):
  mesh = MeshConfig(fsdp=2, expert=4)
  module = narrow("experts_100b", 2, mesh, EXPERTS=8)
  found = aot.compile_step(module.config(0.25), "cpu:8")
  kinds = {(c.kind, c.axes) for c in found.collectives}
  assert ("all-to-all", "expert") in kinds
  # what is gathered are weights: nothing of a whole batch of tokens, 8 x 32
  gathered = [c for c in found.collectives if c.kind == "all-gather"]
  assert {c.axes for c in gathered} == {"fsdp"}, gathered
  assert "32,64]" in max(gathered, key=lambda c: c.bytes).largest
  # a token runs two of eight experts, of three products each, beside the rest;
  # a step computes a product, again for the gradient, and twice in it
  rows, layers = 8 * 32 // 8, 2
  experts = 4 * layers * rows * 2 * (3 * 2 * 32 * 64)
  assert found.work.data_flops == pytest.approx(experts, rel=0.01)


PROGRAM = """
import jax
import jax.numpy as jnp
from adaptivejax.models import DecoderConfig, DecoderLM
from adaptivejax.training import DataConfig, TrainConfig
from adaptivejax.training.decoding import Decoding
from adaptivejax.training.tasks import language_modeling

MODEL = DecoderConfig(layers=2, features=16, hidden=32, heads=2, kv_heads=2)

def config():
  return TrainConfig(
    name="x",
    build=lambda rngs: DecoderLM(MODEL, rngs=rngs),
    loss=language_modeling,
    data=DataConfig(context=16, batch=2),
  )

def decoding():
  return Decoding(rows=2, slots=24)
"""


@pytest.fixture
def file(tmp_path, monkeypatch):
  monkeypatch.delenv("ADAPTIVEJAX_DEBUG", raising=False)
  path = tmp_path / "config.py"
  path.write_text(PROGRAM)
  return path


def said(capsys, *args):
  """The exit code, and all that is said."""
  code = cli.main(["compile", *map(str, args)])
  out, err = capsys.readouterr()
  return code, out + err


def test_both_programs_are_compiled_and_written(file, tmp_path, capsys):
  out = tmp_path / "found.json"
  code, text = said(capsys, file, "--topology", "cpu:2", "--mesh.data", 2,
                    "--json", out)  # fmt: skip
  train, decode = json.loads(out.read_text())
  assert code == 0 and "fits" in text
  assert (train["name"], decode["name"]) == ("train step", "decode step")
  # one token of each row, on each of two devices: products of weights, the
  # readout, scores and values over 24 slots
  layer = 16 * 16 * 4 + 2 * 16 * 32 + 2 * 24 * 16
  assert decode["work"]["flops"] == 2 * (2 * layer + 16 * 256)
  assert train["work"]["flops"] > 2.9 * 16 * decode["work"]["flops"]
  assert not decode["collectives"] and train["collectives"]


def test_kernels_are_shown_with_what_is_known_of_them(capsys):
  known = Kernel("gmm", 2, 64, 3e9, 0.5, 7, 1.25e6)
  unknown = Kernel("other", 1, 1, 0.0)
  made = compile_command._kernels([known, unknown])
  Console(width=120).print(made)
  rows = [line.split("│")[1:-1] for line in capsys.readouterr().out.split("\n")]
  rows = [[cell.strip() for cell in row] for row in rows if row]
  assert rows == [
    ["gmm", "64", "2", "3e+09", "50%", "7", "1.250"],
    ["other", "1", "1", "0", "–", "–", "–"],
  ]


def test_what_does_not_fit_says_by_how_much(file, capsys, monkeypatch):
  small = dataclasses.replace(chips.CHIPS["cpu"], memory=1e5)
  monkeypatch.setitem(chips.CHIPS, "cpu", small)
  monkeypatch.setenv("COLUMNS", "160")
  code, text = said(capsys, file, "--topology", "cpu:1", "--only", "train")
  assert code == 1 and "DOES NOT FIT" in text and "too much" in text
  assert "f32[2,16,256]" in text  # the logits


def test_what_the_compiler_of_tpus_says_of_no_room():
  told = """RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory
in memory space hbm. Used 25.59G of 15.75G hbm. Exceeded hbm capacity by 9.84G.

  Largest program allocations in hbm:

  1. Size: 2.00G
     Operator: op_type="dot" op_name="jit(step)/jvp()/dot_general" stack_frame_id=5
     Shape: f32[1,32,4096,4096]{3,2,1,0:T(8,128)}
     Unpadded size: 2.00G
     ==========================

  2. Size: 1.00G
     Shape: bf16[4096,128256]{1,0:T(8,128)(2,1)}
"""  # noqa: E501
  assert aot.no_room(told) == (
    "it needs 25.59G of 15.75G on a device, 9.84G too much; the largest arrays:"
    " f32[1,32,4096,4096] 2.00G (step)/jvp()/dot_general);"
    " bf16[4096,128256] 1.00G"
  )


MISTAKES = {
  "--topology v5e:2x2": "pip install 'adaptivejax[tpu]'",
  "--topology h100:8": "pip install 'adaptivejax[cuda]'",
  "--topology cpu:2 --mesh.model 3": "there are 2",
  "--topology cpu:2 --mesh.fsdp 2 --data.batch 3": "must be a multiple of 2",
  "--topology cpu:1 --budgets .5": "takes no budget",
  "--topology cpu:1 --budgets 2": "a share in (0, 1]",
  "--topology cpu:1 --only eval": "one of train, decode",
  "--topology cpu:1 --steps": "--steps",
}


@pytest.mark.parametrize("args", MISTAKES)
def test_a_mistake_is_one_line(file, capsys, monkeypatch, args):
  monkeypatch.setattr(jax, "jit", None)  # nothing may be compiled
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
  code, text = said(capsys, file, *args.split())
  assert code == 2 and MISTAKES[args] in text and text.count("\n") == 1


def test_a_mesh_that_does_not_divide_names_the_array(narrow):
  module = narrow("depths_8b", 4, MeshConfig(model=5), EXITS=(1,))
  with pytest.raises(ValueError, match="mesh.model=5 .* 64 of params/emb"):
    aot.compile_step(module.config(1.0), "cpu:5")


def test_long_gradients_trace_where_tokens_are_spread():
  """More keys than the kernel holds at once, in several passes."""
  tokens, block = 131_072, 512
  shape = jax.ShapeDtypeStruct
  q = shape((1, tokens, 2, 128), jnp.bfloat16)
  k = shape((1, 1, tokens, 128), jnp.bfloat16)
  at = shape((1, tokens), jnp.int32)
  mask = shape((1, 2, tokens // block, tokens // block), jnp.bool_)

  def loss(q, k, at, mask):
    keys = Keys(k, k, at[:, None])
    lists = lists_from_mask(mask, block_q=block, block_kv=block)
    return attend_blocks(q, keys, lists, at)[0].out.astype(jnp.float32).sum()

  mesh = make_mesh(MeshConfig(seq=8), jax.devices("cpu")[:8])
  with jax.set_mesh(mesh):
    dq, dk = jax.eval_shape(jax.grad(loss, (0, 1)), q, k, at, mask)
  assert (dq.shape, dk.shape) == (q.shape, k.shape)
