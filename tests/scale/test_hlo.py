# SPDX-License-Identifier: Apache-2.0
"""Law: what is read from the text of a program is what the program does.

Loops count with all their rounds, whichever compiler wrote them down, products
as often as they run, and what is sent by the mesh axes that it goes over.
"""

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from adaptivejax import core
from adaptivejax.training.collectives import branches, collectives
from adaptivejax.training.hlo import Module
from adaptivejax.training.hlo_cost import largest, work
from adaptivejax.training.kernels import Kernel, kernels
from adaptivejax.training.tpu_schedule import CORES, Schedule

HLO = """
HloModule jit_step, entry_computation_layout={(f32[8])->f32[8]}

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %s = f32[] add(%a, %b)
}

%body.1 (p: (s32[], f32[16,4])) -> (s32[], f32[16,4]) {
  %p = (s32[], f32[16,4]) parameter(0)
  %x = f32[4,4] get-tuple-element(%p), index=1
  %g = f32[16,4]{1,0} all-gather(%x), replica_groups=[4,2]<=[8]
  ROOT %t = (s32[], f32[16,4]) tuple(%i, %g)
}

%cond.1 (p: (s32[], f32[16,4])) -> pred[] {
  ROOT %lt = pred[] compare(%i, %n), direction=LT
}

%dear (p: f32[8,4]) -> f32[8,8] {
  %p = f32[8,4] parameter(0)
  %d = f32[8,8] dot(%p, %p), lhs_contracting_dims={1}, rhs_contracting_dims={1}
  ROOT %r = f32[8,8] all-reduce(%d), replica_groups=[1,8]<=[8], to_apply=%add
}

%cheap (p: f32[8,4]) -> f32[8,8] {
  %p = f32[8,4] parameter(0)
  ROOT %q = f32[8,8] all-reduce(%z), replica_groups=[1,8]<=[8], to_apply=%add
}

ENTRY %main (a: f32[8]) -> f32[8] {
  %a = f32[8,4] parameter(0)
  %t = (s32[], f32[16,4]) tuple(%zero, %a)
  %w = (s32[], f32[16,4]) while(%t), condition=%cond.1, body=%body.1, CONFIG
  %r = f32[10]{0} all-reduce(%a), replica_groups={{0,2,4,6},{1,3,5,7}}
  %s = bf16[8]{0} all-reduce(%a), replica_groups=[1,8]<=[8], to_apply=%add
  %c = f32[8,8] conditional(%p, %a, %a), branch_computations={%cheap, %dear}
  %k = f32[8]{0} custom-call(%a), custom_call_target="tpu_custom_call", metadata={op_name="jit(f)/rows_8/asked_2/blocks"}, backend_config={"cost_estimate":{"flops":400}}
  ROOT %p2 = f32[4]{0} collective-permute(%a), source_target_pairs={{0,1},{1,0}}
}
""".replace("CONFIG", 'backend_config={"known_trip_count":{"n":"6"}}')  # noqa: E501


MAIN = "\n".join(
  f"  {n:#x} {'LB' if n == 1 else '  '}: > {{ {body} }}"
  for n, body in enumerate([
    "%v1 = vmatmul.bf16.gmra.mxu0 %v1",
    "%v2 = vmatmul.bf16.gmra.mxu0 %v1 ;; %v3 = vmatmul.bf16.gmra.mxu1 %v1",
    *10 * [""],
    "%18 = sbr.rel (%p17_p2) target bundleno = 1 (0x1), region = 1",
    *5 * [""],
  ])
)  # fmt: skip
SPILLS = "0 0 0 0 0 0 0 0 3 0\n0 0 0 0 0 0 0 0 4 0\n"


def test_what_a_program_sends():
  found = collectives(Module.parse(HLO), {"data": 4, "model": 2})
  assert [tuple(c) for c in found] == [
    ("all-gather", "model", 6, 1, 6 * 16 * 4 * 4, "f32[16,4]"),
    ("all-reduce", "data+model", 2, 3, 16 + 256, "f32[8,8]"),
    ("all-reduce", "data", 1, 1, 40, "f32[10]"),
    ("collective-permute", "model", 1, 1, 16, "f32[4]"),
  ]


def test_what_a_program_holds_and_computes():
  module = Module.parse(HLO)
  assert branches(module) == (1, 1)
  assert kernels(module) == [Kernel("blocks", 1, 1, 400 * 2 / 8)]
  # a round of 16 cycles feeds 16 rows to two of four matrix units
  core = CORES["v5e"]
  schedule = Schedule.parse(core, MAIN, SPILLS)
  (found,) = kernels(module, {"k": schedule})
  assert found[:4] == ("blocks", 1, 1, 100)
  assert found.pace == pytest.approx(2 / 4)
  assert found.cycles == pytest.approx(50 / (found.pace * core.macs))
  assert found.spills == 7
  twice = HLO.replace(
    "  %k = ", "  %k2 = f32[8]{0} custom-call(%a), KERNEL\n  %k = ", 1
  ).replace("KERNEL", HLO.split("custom-call(%a), ")[1].split("\n")[0])
  twice = twice.replace('{"flops":400}', '{"flops":400},"body":"same"')
  (both,) = kernels(Module.parse(twice), {"k": schedule})
  assert both[:4] == ("blocks", 2, 2, 200) and both.pace == found.pace
  (both,) = kernels(
    Module.parse(twice.replace("same", "other", 1)), {"k": schedule}
  )
  assert both.pace is None
  idle = Schedule.parse(core, MAIN.replace("vmatmul", "vadd"), SPILLS)
  assert kernels(module, {"k": idle}) == [Kernel("blocks", 1, 1, 100, None, 7)]
  # the dearest branch, and of the kernel what is asked for
  found = work(module)
  assert (found.flops, found.data_flops) == (2 * 8 * 8 * 4, 400 * 2 / 8)
  assert [a[:2] for a in largest(module, 2)] == [
    (256, "f32[16,4]"),
    (256, "f32[8,8]"),
  ]


def compiled(f, *shapes):
  specs = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
  return Module.parse(jax.jit(f).lower(*specs).compile().as_text() or "")


def layers(x, w):
  return lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0]


def test_a_scan_counts_every_layer():
  x, w = (8, 16), (5, 16, 16)
  once = 2 * 8 * 16 * 16
  assert work(compiled(layers, x, w)).flops == 5 * once
  loss = lambda x, w: layers(x, w).sum()
  both = work(compiled(jax.grad(loss, (0, 1)), x, w))
  assert both.flops == 3 * 5 * once and both.unknown == 0
  twice = lambda x, w: lax.scan(lambda x, _: (layers(x, w), None), x, length=3)
  assert work(compiled(twice, x, w)).flops == 3 * 5 * once


def test_a_loop_that_may_end_early_counts_the_most_apart():
  def early(x, w, limit):
    more = lambda state: (state[0] < 5) & (state[1].max() < limit[0])
    step = lambda state: (state[0] + 1, jnp.tanh(state[1] @ w[0]))
    return lax.while_loop(more, step, (jnp.int32(0), x))

  found = work(compiled(early, (8, 16), (5, 16, 16), (1,)))
  assert (found.flops, found.data_flops) == (0, 5 * 2 * 8 * 16 * 16)
  assert found.at(0.4)[0] == 2 * 2 * 8 * 16 * 16

  def endless(x, w):
    return lax.while_loop(lambda x: x.max() < 9, lambda x: x @ w[0], x)

  assert work(compiled(endless, (8, 16), (5, 16, 16))).unknown == 1


def test_chosen_rows_count_as_many_as_there_are():
  def chosen(x, w, score):
    return core.bucketed(lambda r: r @ w, x, score > 0)[0]

  found = work(compiled(chosen, (256, 16), (16, 16), (256,)))
  assert (found.flops, found.data_flops) == (0, 2 * 256 * 16 * 16)


@pytest.mark.parametrize(
  ("dims", "padding"),
  [((1, 1), "SAME"), ((2, 1), "VALID"), ((2, 3), "SAME")],
)
def test_convolutions_count_as_the_compiler_counts(dims, padding):
  x = jax.ShapeDtypeStruct((2, 9, 8, 4), jnp.float32)
  k = jax.ShapeDtypeStruct((3, 3, 4, 6), jnp.float32)
  numbers = ("NHWC", "HWIO", "NHWC")
  f = lambda x, k: lax.conv_general_dilated(
    x, k, dims, padding, dimension_numbers=numbers
  )
  text = jax.jit(f).lower(x, k).compiler_ir("hlo").as_hlo_text()
  told = jax.jit(f).lower(x, k).cost_analysis()["flops"]
  assert work(Module.parse(text)).flops == told


TPU = """
%body.1 (wide.param.263: (s32[], bf16[8,16], s32[], bf16[5,16,16])) -> (s32[], bf16[8,16], s32[], bf16[5,16,16]) {
  %wide.param.263 = (s32[]{:T(128)}, bf16[8,16]{1,0:T(8,128)(2,1)S(1)}, s32[]{:T(128)}, /*index=3*/bf16[5,16,16]{2,1,0:T(8,128)(2,1)}) parameter(0)
  %get-tuple-element.1 = s32[]{:T(128)} get-tuple-element(%wide.param.263), index=0
  %copy.691 = s32[]{:T(128)} copy(%get-tuple-element.1)
  %constant.36 = s32[]{:T(128)} constant(1)
  %add.2694 = s32[]{:T(128)} add(%copy.691, %constant.36), metadata={op_name="jit(step)/jvp()/while/body/add" stack_frame_id=234}
  %get-tuple-element.2 = bf16[8,16]{1,0:T(8,128)(2,1)S(1)} get-tuple-element(%wide.param.263), index=1
  %get-tuple-element.3 = s32[]{:T(128)} get-tuple-element(%wide.param.263), index=2
  %get-tuple-element.4 = bf16[5,16,16]{2,1,0:T(8,128)(2,1)} get-tuple-element(%wide.param.263), index=3
  %fusion.7 = bf16[8,16]{1,0:T(8,128)(2,1)S(1)} fusion(%get-tuple-element.2, %get-tuple-element.4, %get-tuple-element.1), kind=kOutput, calls=%fused_computation.7
  ROOT %tuple.1418 = (s32[]{:T(128)}, bf16[8,16]{1,0:T(8,128)(2,1)S(1)}, s32[]{:T(128)}, /*index=3*/bf16[5,16,16]{2,1,0:T(8,128)(2,1)}) tuple(%add.2694, %fusion.7, %get-tuple-element.3, %get-tuple-element.4)
}

%fused_computation.7 (p.0: bf16[8,16], p.1: bf16[5,16,16], p.2: s32[]) -> bf16[8,16] {
  %p.0 = bf16[8,16]{1,0:T(8,128)(2,1)S(1)} parameter(0)
  %p.1 = bf16[5,16,16]{2,1,0:T(8,128)(2,1)} parameter(1)
  %p.2 = s32[]{:T(128)} parameter(2)
  %constant.9 = s32[]{:T(128)} constant(0)
  %dynamic-slice.3 = bf16[1,16,16]{2,1,0:T(8,128)(2,1)} dynamic-slice(%p.1, %p.2, %constant.9, %constant.9), dynamic_slice_sizes={1,16,16}
  %bitcast.4 = bf16[16,16]{1,0:T(8,128)(2,1)} bitcast(%dynamic-slice.3)
  ROOT %convolution.5 = bf16[8,16]{1,0:T(8,128)(2,1)S(1)} convolution(%p.0, %bitcast.4), dim_labels=bf_io->bf
}

%cond.fused (p.0: s32[], p.1: s32[]) -> pred[] {
  %p.0 = s32[]{:T(128)} parameter(0)
  %p.1 = s32[]{:T(128)} parameter(1)
  ROOT %lt.439 = pred[]{:T(512)} compare(%p.0, %p.1), direction=LT
}

%cond.1 (wide.param.264: (s32[], bf16[8,16], s32[], bf16[5,16,16])) -> pred[] {
  %wide.param.264 = (s32[]{:T(128)}, bf16[8,16]{1,0:T(8,128)(2,1)S(1)}, s32[]{:T(128)}, /*index=3*/bf16[5,16,16]{2,1,0:T(8,128)(2,1)}) parameter(0)
  %get-tuple-element.8 = s32[]{:T(128)} get-tuple-element(%wide.param.264), index=0
  LIMIT
  ROOT %fusion.8 = pred[]{:T(512)} fusion(%get-tuple-element.8, %limit), kind=kLoop, calls=%cond.fused
}

ENTRY %main.1 (x.1: bf16[8,16], w.1: bf16[5,16,16]) -> bf16[8,16] {
  %x.1 = bf16[8,16]{1,0:T(8,128)(2,1)} parameter(0)
  %w.1 = bf16[5,16,16]{2,1,0:T(8,128)(2,1)} parameter(1)
  %constant.2 = s32[]{:T(128)} constant(0)
  %constant.3 = s32[]{:T(128)} constant(5)
  %copy.2 = s32[]{:T(128)} copy(%constant.2)
  %copy.3 = bf16[8,16]{1,0:T(8,128)(2,1)S(1)} copy(%x.1)
  %tuple.1361 = (s32[]{:T(128)}, bf16[8,16]{1,0:T(8,128)(2,1)S(1)}, s32[]{:T(128)}, /*index=3*/bf16[5,16,16]{2,1,0:T(8,128)(2,1)}) tuple(%copy.2, %copy.3, %constant.3, %w.1)
  %while.256 = (s32[]{:T(128)}, bf16[8,16]{1,0:T(8,128)(2,1)S(1)}, s32[]{:T(128)}, /*index=3*/bf16[5,16,16]{2,1,0:T(8,128)(2,1)}) while(%tuple.1361), condition=%cond.1, body=%body.1, metadata={op_name="jit(step)/jvp()/while" stack_frame_id=227}
  ROOT %get-tuple-element.9 = bf16[8,16]{1,0:T(8,128)(2,1)S(1)} get-tuple-element(%while.256), index=1
}
"""  # noqa: E501
LIMITS = {
  "%limit = s32[]{:T(128)} constant(5)": 5,
  "%limit = s32[]{:T(128)} get-tuple-element(%wide.param.264), index=2": 5,
  "%limit = s32[]{:T(128)} get-tuple-element(%wide.param.264), index=0": None,
}
"""Where the end of a loop may be: there, or carried along."""


@pytest.mark.parametrize("limit", LIMITS)
def test_loops_of_the_tpu_compiler_whose_rounds_nobody_tells(limit):
  rounds = LIMITS[limit]
  found = work(Module.parse(TPU.replace("LIMIT", limit)))
  assert found.unknown == (rounds is None)
  assert found.flops == (rounds or 1) * 2 * 8 * 16 * 16
  # the weights of one layer a round, from large memory; once the input
  moved = (rounds or 1) * 16 * 16 * 2 + 8 * 16 * 2
  assert moved <= found.bytes < moved + 50 * (rounds or 1)  # and counters


@pytest.mark.parametrize(
  ("step", "rounds"), [(1, 5), (2, 3), (4, 2), (0, None)]
)
def test_a_loop_may_count_by_more_than_one(step, rounds):
  """As products do that go round a ring, two parts in a round."""
  text = TPU.replace("LIMIT", next(iter(LIMITS)))
  assert text.count("constant(1)") == 1
  found = work(Module.parse(text.replace("constant(1)", f"constant({step})")))
  assert found.unknown == (rounds is None)
  assert found.flops == (rounds or 1) * 2 * 8 * 16 * 16
