# SPDX-License-Identifier: Apache-2.0
"""The machine code of attention is read loop by loop; needs no compiler."""

import pytest

from benchmarks import gpu_attention, gpu_static
from benchmarks.gpu_static import Code
from benchmarks.harness import Options

LOOP = """
.L_x_{n}:
        /*0010*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR4] ;
        /*0020*/                   FMUL R1, R2, R3 ;
{more}
        /*0040*/              @!P0 BRA `(.L_x_{n}) ;
"""
MORE = "        /*0030*/                   FADD R1, R2, R3 ;"


def code(*loops):
  """An outer loop around those given."""
  sass = "".join(LOOP.format(n=n + 1, more=x) for n, x in enumerate(loops))
  sass = f".L_x_0:\n{sass}\n        /*0050*/  @!P1 BRA `(.L_x_0) ;\n"
  ptxas = "Used 168 registers, 8 bytes spill stores, 4 bytes spill loads"
  return Code(ptxas, "smem_scratch_bytes=1024", sass)


def test_reads_both_loops():
  found = gpu_attention.figures(code("", MORE))
  assert found["registers"] == 168 and found["bytes spilled"] == 12
  assert found["unmasked step: tensor"] == 64 * 128 * 16 / 2048
  assert found["unmasked step: issue"] == 3
  assert found["masked step: issue / tensor"] == 4 / 64


def test_refuses_a_kernel_of_another_form():
  with pytest.raises(ValueError):
    gpu_attention.figures(code(""))


def test_says_what_is_missing(monkeypatch, capsys):
  monkeypatch.setattr(gpu_static, "missing", lambda: "no compiler")
  assert list(gpu_attention.rows(Options())) == []
  assert "no compiler" in capsys.readouterr().err
