"""Law: the TPU compiler takes the kernels, and schedules them as fast as said.

The reader of its schedules is tested on a schedule that can be run by hand.
"""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from adaptivejax.training.tpu_schedule import CORES, Schedule
from benchmarks import tpu_schedule as schedule
from benchmarks import tpu_simulator as simulator
from benchmarks.harness import from_json

ROOT = Path(__file__).parents[2]
needs_compiler = pytest.mark.skipif(
  importlib.util.find_spec("libtpu") is None,
  reason="needs the compiler of TPUs: pip install 'adaptivejax[aot-tpu]'",
)
UTILIZATION = "== UTILIZATION:\n" + "0 0 0 0 0 0 0 0 2 0\n" * 16
LOOP = """
     0   : { %s9_s0 = inlined_call_operand.<no memory space> [shape: s32[], index: 0, kind: input]  ;;  %s8_s1 = inlined_call_operand.vmem [shape: s32[4], index: 1, kind: input] }
  0x1   : { %s1_s2 = smov [#allocation1] /* a list %s5
of: 2 lines */ ;;  %s2_s3 = sshll.u32 %s8_s1, 4 }
  0x2   : { %3 = dma.vmem_to_smem /*vmem=*/%s2_s3, /*size_in_granules=*/16, /*smem=*/%s1_s2, /*flag=*/[#allocation9] }
  0x3   : { %4 = dma.done.wait [#allocation9], 16 ;; %s5_s4 = smov 0 }
  0x4 LB: > { %s6_s5 = sld [smem:[#allocation1 + %s7_s4]] ;; %s7_s4 = sphi %s5_s4, %s10_s4 }
  0x5   : > { %p11_p1 = scmp.gt.s32.totalorder %s6_s5, 0 ;; %s12_s6 = sadd.s32 4294967295, %s6_s5 }
  0x6   : > { %13 = dma.hbm_to_vmem (%p11_p1), %s2_s3, 1000, %s1_s2, [#allocation8] }
  0x7   : > { %14 = vmatmul.bf16.gmra.mxu0 %v1 ;; %15 = vmatmul.bf16.gmra.mxu1 %v1 }
  0x8   : > { %16 = dma.done.wait (%p11_p1), [#allocation8], 1000 ;; %s10_s4 = sadd.s32 1, %s7_s4 ;; %21_s7 = scalar_lea.sflag %s7_s4, 1 [#allocation8] ;; %19 = sst [smem:[#allocation2]] (!%p11_p1), %s7_s4 }
  0x9   : > { %p17_p2 = scmp.lt.s32.totalorder %s10_s4, %s9_s0 }
  0xa   : > { %18 = sbr.rel (%p17_p2) target bundleno = 4 (0x4), region = 1 }
  0xb   : > { %s20_s4 = sld [smem:[#allocation2]] (!%p17_p2) }
  0xc   : > { }
  0xd   : > { }
  0xe   : > { }
  0xf   : { }
"""  # noqa: E501


@pytest.fixture
def program():
  return schedule.Program.of(Schedule.parse(CORES["v5e"], LOOP, UTILIZATION))


def test_a_loop_runs_as_often_as_its_operand_says(program):
  assert program.schedule.blocks == [(0, 4), (4, 15), (15, 16)]
  for count in (1, 3):
    run = simulator.simulate(program, [count, np.zeros(4, np.int32)])
    assert run.visits == [1, count, 1] and run.unknown == 0
    assert run.cycles - run.stall == pytest.approx(5 + 11 * count)
    assert run.main == (4, 15) and run.spills == 11 * 2
    assert run.hbm == 0
  assert program.schedule.macs.sum() == 2 * 16 * 128**2


def test_transfers_take_latency_and_bandwidth(program):
  core = CORES["v5e"]
  idle = simulator.simulate(program, [3, np.array([0, 0, 0, 0])])
  run = simulator.simulate(program, [3, np.array([0, 5, 0, 7])])
  assert run.hbm == 1000 * simulator.GRANULE
  each = simulator.LATENCY * core.clock + run.hbm / core.bandwidth
  assert run.stall - idle.stall == pytest.approx(each - 2)  # from 0x6 to 0x8


def test_what_is_not_known_is_counted(program):
  run = simulator.simulate(program)
  assert run.unknown == 1 and run.visits == [1, 1, 1]


def test_a_program_without_end_is_refused(program):
  with pytest.raises(RuntimeError, match="no end after 5 blocks"):
    simulator.simulate(program, [100, np.zeros(4, np.int32)], most=5)


CHIPS = "v5e", "v5p", "v6e"
FEW = {"v5e balanced", "v6e skewed", "v5p rows", "v6e dw"}


def every(*kinds):
  return {f"{chip} {kind}" for chip in CHIPS for kind in kinds}


@needs_compiler
@pytest.mark.parametrize(
  "benchmark, wanted, targets",
  [
    pytest.param("tpu_cycles", FEW, 4, id="few-experts"),
    pytest.param("tpu_attention", {"v6e fine"}, 1, id="few-attention"),
    pytest.param(
      "tpu_cycles",
      every("balanced", "skewed", "rows", "dw") - FEW,
      8,
      id="experts",
    ),
    pytest.param(
      "tpu_attention",
      every("coarse", "fine", "shared", "dense", "long") - {"v6e fine"},
      9,
      id="attention",
    ),
    pytest.param("tpu_decode", None, 18, id="decode"),
    pytest.param("tpu_linear_attention", None, 4, id="linear_attention"),
  ],
)
def test_kernels_compile_and_reach_their_targets(
  tmp_path, benchmark, wanted, targets
):
  """In a process of its own: the compiler reads its flags once."""
  out = tmp_path / "cycles.json"
  done = subprocess.run(
    [sys.executable, "-m", f"benchmarks.{benchmark}", "--json", out]
    + (["--cases", *wanted] if wanted else []),
    cwd=ROOT, capture_output=True, text=True, timeout=1800,
  )  # fmt: skip
  assert done.returncode == 0, done.stderr
  rows = from_json(out.read_text())
  cases = {row.case for row in rows}
  assert cases == wanted or wanted is None
  assert {case.split()[0] for case in cases} <= set(CHIPS)
  assert sum(row.target is not None for row in rows) == targets
  if not jax.__version__.startswith("0.10."):
    pytest.skip("it compiles; the targets are for the compiler of jax 0.10")
  missed = [f"{r.case}: {r.metric} {r.value}" for r in rows if r.met is False]
  assert not missed, missed


@needs_compiler
def test_few_layers_or_many_are_one_program(tmp_path):
  """The text of a train step is the same; what it computes is not."""
  found = []
  for layers in (4, 8):
    out = tmp_path / f"{layers}.json"
    program = SCALE.format(layers=layers, out=str(out))
    done = subprocess.run(
      [sys.executable, "-c", program],
      cwd=ROOT, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found += json.loads(out.read_text())
  few, many = found
  assert few["work"]["unknown"] == many["work"]["unknown"] == 0
  sites = lambda run: [(c["kind"], c["sites"]) for c in run["collectives"]]
  assert sorted(sites(few)) == sorted(sites(many))
  # twice the layers: between one and two times the work, with the readout
  assert 1.2 < many["work"]["flops"] / few["work"]["flops"] < 2


@needs_compiler
def test_a_step_tells_how_near_the_peak_its_kernels_come(tmp_path):
  out = tmp_path / "experts.json"
  done = subprocess.run(
    [sys.executable, "-c", EXPERTS.format(out=str(out))],
    cwd=ROOT, capture_output=True, text=True, timeout=600,
  )  # fmt: skip
  assert done.returncode == 0, done.stderr
  found = json.loads(out.read_text())
  assert any("matmul" in kernel["name"] for kernel in found)
  for kernel in found:
    assert 0 < kernel["pace"] <= 1 and kernel["spills"] >= 0, kernel
    peak = 2 * CORES["v5e"].macs * kernel["pace"]
    assert kernel["cycles"] == pytest.approx(kernel["flops"] / peak)


EXPERTS = """
import dataclasses, json, os, pathlib
os.environ["JAX_PLATFORMS"] = "cpu"
from adaptivejax.training import DataConfig, aot, tpu_schedule
from adaptivejax.training.mesh import MeshConfig
from configs.scale import experts_100b as scale
folder = tpu_schedule.ask()
scale.MODEL = dataclasses.replace(
  scale.MODEL, vocab=512, layers=2, features=256, hidden=256, heads=2,
  kv_heads=1,
)
scale.DATA = DataConfig(context=256, batch=16)
scale.EXPERTS, scale.MESH = 16, MeshConfig(fsdp=2, expert=2)
found = aot.compile_step(scale.config(1 / 8), "v5e:2x2", folder)
kernels = [kernel._asdict() for kernel in found.kernels]
pathlib.Path("{out}").write_text(json.dumps(kernels))
"""
SCALE = """
import dataclasses, json, os, pathlib
os.environ["JAX_PLATFORMS"] = "cpu"
from adaptivejax.training import DataConfig, aot
from adaptivejax.training.mesh import MeshConfig
from configs.scale import depths_8b as scale
scale.MODEL = dataclasses.replace(
  scale.MODEL, vocab=512, layers={layers}, features=256, hidden=512, heads=4,
  kv_heads=4,
)
scale.DATA, scale.EXITS = DataConfig(context=128, batch=8), (1, 2)
scale.MESH = MeshConfig(fsdp=2, model=2)
found = aot.compile_step(scale.config(), "v5e:2x2")
pathlib.Path("{out}").write_text(json.dumps([found.as_json()]))
"""
