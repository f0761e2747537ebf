# SPDX-License-Identifier: Apache-2.0
"""XAttention: recall and loss at a quarter of the pairs, beside a window."""

from adaptivejax.methods.attention import XAttention
from benchmarks.headlines import Headline, prefill

PAPER = (
  "accuracy comparable to full attention at up to 13.5x faster attention"
  " (unverified)"
)
SHARES = (0.5, 0.6, 0.7, 0.8, 0.9)


def measure(quick: bool) -> Headline:
  looks = {f"p_{p}": XAttention(p, stride=2, **prefill.SIZES) for p in SHARES}
  looks |= {f"window_{w}": prefill.a_shape(w) for w in prefill.WINDOWS}
  found = prefill.kept(looks, quick)
  name, other = (prefill.densest(found, start) for start in ("p_", "window_"))
  dense, sparse, near, paper = (
    prefill.bits(look, quick)
    for look in (None, looks[name], looks[other], looks["p_0.9"])
  )
  one, base = found[name], found[other]
  text = (
    f"{name.replace('_', ' = ')}: {one.density:.0%} of pairs keep"
    f" {one.recall:.1%} of attention, {sparse:.3f} bits per byte against"
    f" {dense:.3f} dense; a window of {base.density:.0%} keeps"
    f" {base.recall:.1%}, {near:.3f} bits; p = 0.9, as in the paper,"
    f" {found['p_0.9'].density:.0%} of pairs, {paper:.3f} bits"
  )
  numbers = {"dense_bits": dense, "bits": sparse, "window_bits": near}
  numbers |= {"paper_bits": paper}
  holds = sparse <= 1.01 * dense
  return Headline(text, {**prefill.figures(found), **numbers}, holds)
