# SPDX-License-Identifier: Apache-2.0
"""FlexPrefill: budgets by head and text, beside fixed ones as dense."""

from adaptivejax.methods.attention import Budgets, FlexPrefill, MInference
from benchmarks.headlines import Headline, prefill

PAPER = (
  "better than fixed patterns (MInference) in both speed and accuracy"
  " (unverified)"
)
SHARES = (0.3, 0.4, 0.5, 0.6, 0.9)
FIXED = (4, 8, 16, 24)


def measure(quick: bool) -> Headline:
  looks = {
    f"gamma_{g}": FlexPrefill(g, min_budget=1, **prefill.SIZES) for g in SHARES
  }
  looks |= {f"fixed_{n}": fixed(n) for n in FIXED}
  found = prefill.kept(looks, quick)
  name, other = (prefill.densest(found, s) for s in ("gamma_", "fixed_"))
  dense, sparse, same, paper = (
    prefill.bits(look, quick)
    for look in (None, looks[name], looks[other], looks["gamma_0.9"])
  )
  one, base = found[name], found[other]
  text = (
    f"{name.replace('_', ' = ')}: {one.density:.0%} of pairs keep"
    f" {one.recall:.1%} of attention, {sparse:.3f} bits per byte against"
    f" {dense:.3f} dense; fixed columns and slashes, {base.density:.0%}, keep"
    f" {base.recall:.1%}, {same:.3f} bits; gamma = 0.9, as in the"
    f" paper, {found['gamma_0.9'].density:.0%} of pairs, {paper:.3f} bits"
  )
  numbers = {"dense_bits": dense, "bits": sparse, "fixed_bits": same}
  numbers |= {"paper_bits": paper}
  better = sparse <= same and one.density <= base.density + 0.02
  return Headline(text, {**prefill.figures(found), **numbers}, better)


def fixed(size: int) -> MInference:
  """So many columns and slashes in every head."""
  budgets = Budgets(verticals=size, slashes=size, first=1, recent=1, probe=8)
  heads = ("vertical_slash",) * prefill.HEADS
  return MInference(heads, budgets, **prefill.SIZES)
