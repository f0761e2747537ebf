"""Law: the static figures of a kernel are those of its main loop."""

import pytest

from benchmarks import gpu_static
from benchmarks.gpu_static import Code
from benchmarks.harness import Options

WGMMA = "HGMMA.64x256x16.F32.BF16 R24, gdesc[UR20].tnspB, R24"
LINES = [
  "S2R R0, SR_TID.X",
  ".L_x_0:",  # the outer loop
  "MOV R1, R2",
  ".L_x_1:",  # the loop that loads, two steps of two operands a turn
  *["@UP0 UTMALDG.4D [UR24], [UR8]"] * 4,
  "@P1 BRA `(.L_x_1)",
  ".L_x_2:",  # the loop that multiplies
  "SYNCS.PHASECHK.TRANS64.TRYWAIT P1, [UR16], R4",
  "@!P1 BRA `(.L_x_6)",
  ".L_x_3:",
  "@!P2 BRA `(.L_x_4)",  # over the mask
  *["LDSM.16.M88.4 R12, [R155]"] * 5,
  ".L_x_4:",
  *[WGMMA] * 4,
  "@!P3 BRA `(.L_x_5)",  # over a release
  "SYNCS.ARRIVE.TRANS64.A1T0 RZ, [UR16], RZ",
  ".L_x_5:",
  "@P1 BRA `(.L_x_2)",
  "@P4 BRA `(.L_x_0)",
  "EXIT",
  ".L_x_6:",  # a wait, which jumps back into the loop
  "@!P1 BRA `(.L_x_6)",
  "BRA `(.L_x_3)",
]


def code():
  """As the compilers write it."""
  ctrl = "   -:-:-:Y:01        /*{:04x}*/                   {} "
  sass = [
    line if line.endswith(":") else ctrl.format(16 * i, line)
    for i, line in enumerate(LINES)
  ]
  ptxas = (
    "ptxas  . 8 bytes stack frame, 4 bytes spill stores, 12 bytes spill loads\n"
    "ptxas info    : Used 154 registers, used 16 barriers, 17 bytes smem"
  )
  resources = "Resources(smem_scratch_bytes=229376, tmem_scratch_cols=0)"
  return Code(ptxas, resources, "\n".join(sass))


def test_figures_of_the_main_loop():
  found = gpu_static.figures(code(), 2, masks=True)
  assert found["registers"] == 154
  assert found["bytes spilled"] == 16
  assert found["shared memory, bytes"] == 229376
  assert found["step: tensor"] == 4 * 128
  assert found["step: issue"] == 10  # all but the five that mask
  assert found["masking step: issue"] == 15
  assert found["step: issue of the loading warp group"] == 2.5
  assert found["step: issue / tensor"] == (10 + 1.25) / 512
  assert found["masking step: issue / tensor"] == (15 + 1.25) / 512


def test_one_warp_group_loads_for_itself():
  found = gpu_static.figures(code(), 1, masks=False)
  assert found["step: issue of the loading warp group"] == 0
  assert found["step: issue / tensor"] == 10 / 512
  assert "masking step: issue" not in found


def test_says_what_to_install(monkeypatch, capsys):
  monkeypatch.setattr(gpu_static, "_cuda", lambda: iter(()))
  assert list(gpu_static.rows(Options())) == []
  says = capsys.readouterr().err
  assert "aot-gpu" in says or "Python 3.12" in says


@pytest.mark.parametrize("kind", gpu_static.KINDS)
def test_arrays_fit_the_kernels(kind):
  shape = gpu_static.Shape(m=5, k=2, n=3, e=4)
  a, b, sizes = gpu_static.arrays(kind, shape)
  assert sizes.shape == (4,)
  want = {
    "forward": ((5, 2), (4, 2, 3)),
    "transposed": ((5, 3), (4, 2, 3)),
    "dw": ((5, 2), (5, 3)),
  }
  assert (a.shape, b.shape) == want[kind]
