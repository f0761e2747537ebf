# SPDX-License-Identifier: Apache-2.0
"""Rotary positions as configs say them.

Version 4 of transformers writes `rope_theta` and `rope_scaling`, version 5 both
in `rope_parameters`.
"""

from adaptivejax.core.rope import Ramp, Rope
from adaptivejax.io.fields import Fields


def read_rope(fields: Fields) -> Rope:
  """The rotary positions of a config; a rate of 10,000 if it does not say."""
  old, new = fields.inner("rope_scaling"), fields.inner("rope_parameters")
  fields.one_of("partial_rotary_factor", [None, 1, 1.0], None)
  if old is not None and new is not None and old.values != new.values:
    raise fields.refused("rope_scaling", "differs from `rope_parameters`")
  inner = old if new is None else new
  said = [f for f in (fields, inner) if f is not None and "rope_theta" in f]
  bases = {f.number("rope_theta") for f in said} or {10_000.0}
  if len(bases) > 1:
    raise fields.refused("rope_theta", "differs from that in rope_parameters")
  (base,) = bases
  if inner is None:
    return Rope(base)
  inner.one_of("partial_rotary_factor", [None, 1, 1.0], None)
  kinds, default = ["default", "linear", "llama3"], "default"
  if "type" in inner:  # its name before `rope_type`
    default = inner.one_of("type", kinds)
  kind = inner.one_of("rope_type", kinds, default)
  rope = Rope(base) if kind == "default" else _slower(inner, kind, base)
  inner.done()
  return rope


def _slower(inner: Fields, kind: str, base: float) -> Rope:
  factor = inner.number("factor")
  if kind == "linear":
    return Rope(base, factor)
  low, high = (inner.number(f"{end}_freq_factor") for end in ("low", "high"))
  if low >= high:
    raise inner.refused("low_freq_factor", "must be under high_freq_factor")
  length = inner.count("original_max_position_embeddings")
  return Rope(base, factor, Ramp(low, high, length))
