# SPDX-License-Identifier: Apache-2.0
"""How the TPU kernels cut their work."""

KEYS = 512
MOST_MERGED = 8
def merge(block_kv, capacity):
  n = 1
  while 2 * n * block_kv <= KEYS and 2 * n <= MOST_MERGED and n < capacity:
    n *= 2
  return n
