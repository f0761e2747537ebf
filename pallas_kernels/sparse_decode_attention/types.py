# SPDX-License-Identifier: Apache-2.0
"""What sparse decode attention is told besides queries, keys and values.

Axes: B batch, L heads that own a list (1, G or H), K entries of a list.
"""

import functools
from dataclasses import dataclass
from typing import Any

import jax


@functools.partial(
  jax.tree_util.register_dataclass,
  data_fields=("index", "count"),
  meta_fields=("unit",),
)
@dataclass(frozen=True)
class Units:
  """Which units of a cache each head looks at; what they are is data.

  Unit i is slots i * unit .. (i + 1) * unit - 1.  An entry past `count` is
  ignored, whatever it is; no unit is listed twice.  Lists may name more than is
  visible: `Marks` and `Rule` decide which keys are seen.

  Attributes:
    index: units of each head, in any order, i32[B, L, K]; B may be 1.
    count: entries of each list, i32[B, L].
    unit: slots in a unit (static): 1 is a token, more a page.  The last unit of
      a contiguous cache may be cut off.
  """

  index: Any  # not `jax.Array`: JAX also puts marks in places of arrays
  count: Any
  unit: int = 1
