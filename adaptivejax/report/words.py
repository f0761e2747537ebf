# SPDX-License-Identifier: Apache-2.0
"""Numbers and bytes as people read them."""

import codecs
from collections.abc import Sequence

from adaptivejax.report.data import Number, Point, real

NONE = "–"


def number(x: Number, digits: int = 3) -> str:
  """`x` to so many significant digits, thousands apart; a dash if not real."""
  if not real(x):
    return NONE
  if abs(x) >= 10 ** (digits - 1):
    return f"{x:,.0f}".replace(",", "\u202f")
  return f"{x:#.{digits}g}"


def percent(x: Number, signed: bool = False) -> str:
  """A share in percent; `signed` for a difference."""
  if not real(x):
    return NONE
  text = f"{100 * x:+.1f}" if signed else f"{100 * x:.0f}"
  return text.replace("-", "−") + " %"


def times(x: Number) -> str:
  """A ratio, such as 1.52×."""
  return f"{x:.2f}×" if real(x) else NONE


def verdict(point: Point) -> str:
  """What the clock says about a point."""
  if point.dense:
    return "dense twin"
  if not real(point.speedup):
    return "not timed"
  return "slower than dense" if point.slower else "faster"


def characters(
  text: bytes, lengths: Sequence[int]
) -> list[tuple[str, list[int]]]:
  """Splits text into characters, each with the tokens that make it up.

  One character of UTF-8 may take several byte tokens and one token may hold
  several characters.  What is not UTF-8 shows as the replacement character.
  """
  owner = [t for t, length in enumerate(lengths) for _ in range(length)]
  decoder = codecs.getincrementaldecoder("utf-8")("replace")
  cells, waiting = [], []
  for i, byte in enumerate(text):
    waiting.append(owner[i])
    shown = decoder.decode(bytes([byte]), final=i == len(text) - 1)
    if shown:
      cells.append((shown, sorted(set(waiting))))
      waiting = []
  return cells


def visible(char: str) -> str:
  """A control character as its picture; newline and tab stay."""
  if char in "\n\t":
    return char
  if ord(char) < 32:
    return chr(0x2400 + ord(char))
  return "\u2421" if char == "\x7f" else char


def readable(text: bytes) -> str:
  """Bytes of a model as text that is safe to show."""
  return "".join(map(visible, text.decode("utf-8", "replace")))
