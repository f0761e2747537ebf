# SPDX-License-Identifier: Apache-2.0
"""How much attention keys get, without the matrix of all pairs."""

from pallas_kernels.attention_mass.ops import attention_mass

__all__ = ["attention_mass"]
