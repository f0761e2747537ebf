# SPDX-License-Identifier: Apache-2.0
"""One headline for each method: the paper's main claim, measured at our size.

A headline is a module named after the method's file.  It holds `PAPER`, the
claim and its number in one line, and

    def measure(quick: bool) -> Headline: ...

`quick` is a smoke run: the same path in seconds, its figures mean nothing.
Models that several headlines share are in `benchmarks.headlines.beds`.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Headline:
  """What became of a paper's claim here."""

  text: str
  """The finding in one line, with its numbers."""

  figures: dict[str, float]
  """The numbers by name."""

  holds: bool | None
  """Whether the claim reproduces at this size; None if that cannot be said."""
