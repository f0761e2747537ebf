# SPDX-License-Identifier: Apache-2.0
"""Rows sorted by group, times the matrix of each group: experts.

`ops.py` is the public function with its derivatives, `reference.py` its
meaning, `tpu.py` the kernel of y and dx (with `ring.py` and `picking.py`),
`tpu_sums.py` that of dw, `work.py` the list that drives both, `tuned.py` their
tiles, `specs.py` the shapes that tests and benchmarks share.
"""

from pallas_kernels.grouped_matmul.ops import grouped_matmul
from pallas_kernels.grouped_matmul.tuned import Tiles

__all__ = ["Tiles", "grouped_matmul"]
