# SPDX-License-Identifier: Apache-2.0
"""The shapes that benchmarks and tuning share."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Spec:
  """One new token in each of `batch` sequences of `slots` keys."""

  name: str
  batch: int
  heads: int
  key_heads: int
  slots: int
  width: int

  def bytes(self, listed: int, itemsize: int = 2) -> int:
    """Of the keys and values of `listed` slots of each key head."""
    return 2 * self.batch * self.key_heads * listed * self.width * itemsize


SERVING = Spec("serving", 8, 32, 8, 4096, 128)
"""Eight sequences of a model of the size of Llama 3 8B."""
