# SPDX-License-Identifier: Apache-2.0
"""One look for the prompt, another for what is generated after it.

Axes: B batch, T tokens, S keys, H query heads, W head width, D features.
"""

from adaptivejax.nn.look import Look, Looked
from adaptivejax.nn.sparse_prefill import SparsePrefill


class ByPhase(Look):
  """Reads prompts as `prefill` does, and single tokens as `decode` does.

  Args:
    prefill: chooses the keys of several tokens at once.
    decode: keeps all keys, and what it remembers of them.

  The `Setting`s of both are set together.  A prompt of one token is decoded.

  Raises:
    ValueError: `decode` gives keys up, merges them, wants them without their
      rotary positions or remembers more than follows from them; or `prefill`
      is no `SparsePrefill`, or remembers something.
  """

  def __init__(self, prefill: Look, decode: Look):
    if not isinstance(prefill, SparsePrefill):
      raise ValueError(
        f"prefill={type(prefill).__name__} must be a SparsePrefill, such as"
        " ByBlocks or XAttention."
      )
    if type(prefill).memory is not Look.memory:
      raise ValueError(
        f"prefill={type(prefill).__name__} remembers something, for which there"
        " is no room beside what `decode` remembers."
      )
    if not decode.keeps_all:
      raise ValueError(
        f"decode={type(decode).__name__} does not keep all keys as they are, or"
        " remembers more than follows from them, so no other look can read"
        " these: take one such as Quest."
      )
    self.prefill, self.decode = prefill, decode
    self.per_head, self.coded = decode.per_head, decode.coded
    self.alone = True

  def turning(self, rope):
    if rope == self.rope:
      return self
    look = ByPhase(self.prefill.turning(rope), self.decode.turning(rope))
    look.rope = rope
    return look

  def slots(self, slots: int) -> int:
    return self.decode.slots(slots)

  def memory(self, batch, heads, slots, width, dtype):
    return self.decode.memory(batch, heads, slots, width, dtype)

  def append(self, cache, layer, keys, rows=None):
    return self.decode.append(cache, layer, keys, rows)

  def __call__(self, q, keys, positions, layer=0, **asked) -> Looked:
    return self.prefill(q, keys, positions, layer, **asked)

  def step(self, q, keys, positions, cache, layer=0, **asked):
    if q.shape[1] == 1:
      return self.decode.step(q, keys, positions, cache, layer, **asked)
    cache = self.append(cache, layer, keys)
    return self.recall(q, positions, cache, layer, **asked), cache

  def recall(self, q, positions, cache, layer=0, **asked) -> Looked:
    look = self.decode if q.shape[1] == 1 else self.prefill
    return look.recall(q, positions, cache, layer, **asked)
