# SPDX-License-Identifier: Apache-2.0
"""The plots, by matplotlib, as inline SVG that takes its colours from the page.

A colour in the drawing code is a stand-in; in the SVG it becomes a variable of
the page's style sheet, so one drawing serves light and dark.  Text stays text,
in the page's font.  Nothing that a user wrote is given to matplotlib.
"""

import html
import io
import math
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from adaptivejax.report.data import (
  BudgetCurve,
  Curve,
  Mixture,
  Number,
  Point,
  real,
)
from adaptivejax.report.words import number, percent, times, verdict

INK, FAINT, PAPER, BAND, LOSS = (f"#0000{i:02x}" for i in range(1, 6))
MEASURE = "what is measured"
"""Stands in for the name of it, which a user gave."""
NAMED = {INK: "ink", FAINT: "faint", PAPER: "paper", BAND: "good", LOSS: "bad"}
SERIES = [f"#0001{i:02x}" for i in range(8)]
VARIABLES = NAMED | {hue: f"s{i}" for i, hue in enumerate(SERIES)}
MARKERS = "osD^vPX*"
GLYPHS = "●■◆▲▼✚✖★"
STYLE = {
  "svg.fonttype": "none",
  "svg.hashsalt": "adaptivejax",
  "font.size": 9.0,
  "text.color": INK,
  "axes.edgecolor": FAINT,
  "axes.labelcolor": INK,
  "axes.spines.top": False,
  "axes.spines.right": False,
  "xtick.color": FAINT,
  "ytick.color": FAINT,
  "xtick.labelcolor": INK,
  "ytick.labelcolor": INK,
  "axes.grid": True,
  "grid.color": FAINT,
  "grid.alpha": 0.25,
  "grid.linewidth": 0.6,
  "lines.linewidth": 1.4,
}
Styles = Mapping[str, int]


def styles(names: Sequence[str]) -> dict[str, int]:
  """Gives each method the colour and mark that it has in every plot."""
  return {name: i for i, name in enumerate(dict.fromkeys(names))}


def quality_against_speed(points: Sequence[Point], style: Styles) -> str:
  """Bits per byte against tokens per second, relative to the dense twin."""

  def draw(axes) -> dict[str, str]:
    axes.axvline(1, color=INK, linewidth=0.9, dashes=(4, 3))
    titles = _scatter(axes, points, style, lambda p: p.speedup)
    low, high = axes.get_xlim()
    axes.set_xlim(min(low, 0.9), max(high, 1.1))
    axes.axvspan(axes.get_xlim()[0], 1, color=LOSS, alpha=0.08, linewidth=0)
    axes.xaxis.set_major_formatter(lambda x, _: f"{x:.3g}×")
    _corner(axes, "red: slower than dense", "left")
    _corner(axes, "better: right and down ↘", "right")
    return titles

  label = f"Quality against measured speed, {points[0].regime}"
  return _plot(
    label, "tokens per second, dense twin = 1", "bits per byte", draw
  )


def quality_against_flops(points: Sequence[Point], style: Styles) -> str:
  """Bits per byte against the share of the dense twin's FLOPs."""

  def draw(axes) -> dict[str, str]:
    titles = _scatter(axes, points, style, lambda p: p.flops_share)
    axes.set_xlim(left=0)
    axes.xaxis.set_major_formatter(lambda x, _: f"{100 * x:.0f} %")
    _corner(axes, "↙ better: left and down", "left")
    return titles

  label = f"Quality against FLOPs, {points[0].regime}"
  return _plot(label, "FLOPs spent, dense twin = 100 %", "bits per byte", draw)


def loss_curves(curves: Sequence[Curve], style: Styles) -> str:
  """Training loss against steps."""

  def draw(axes) -> dict[str, str]:
    for curve in curves:
      _line(axes, curve.steps, curve.loss, style[curve.name], "")
    return {}

  return _plot("Training loss", "step", "training loss", draw)


def validation_curves(curves: Sequence[Curve], style: Styles) -> str:
  """Validation bits per byte against the clock, or steps if it is missing."""
  timed = all(any(map(real, curve.seconds)) for curve in curves)

  def draw(axes) -> dict[str, str]:
    for curve in curves:
      x = curve.seconds if timed else curve.steps
      _line(axes, x, curve.val_bits_per_byte, style[curve.name], "o")
    return {}

  xlabel = "seconds of training" if timed else "step"
  return _plot("Validation", xlabel, "validation bits per byte", draw)


def imbalance_curves(curves: Sequence[Curve], style: Styles) -> str:
  """Load of the fullest expert over the mean against steps."""

  def draw(axes) -> dict[str, str]:
    axes.axhline(1, color=INK, linewidth=0.9, dashes=(4, 3))
    for curve in curves:
      if curve.imbalance:
        _line(axes, curve.steps, curve.imbalance, style[curve.name], "")
    _corner(axes, "1: all experts alike", "left")
    return {}

  return _plot("Load imbalance", "step", "fullest expert / mean", draw)


def experts_against_difficulty(
  mixtures: Sequence[Mixture], style: Styles
) -> str:
  """Experts that a token ran in a layer against how hard it was to predict."""

  def draw(axes) -> dict[str, str]:
    for mixture in mixtures:
      _line(axes, mixture.nats, mixture.experts, style[mixture.method], "o")
    axes.set_ylim(bottom=0)
    return {}

  label = "Experts per token against difficulty"
  return _plot(label, "nats of the token", "experts in a layer", draw)


def quality_against_budget(curves: Sequence[BudgetCurve], style: Styles) -> str:
  """What methods reach with a budget of keys; curves of one measure."""

  def draw(axes) -> dict[str, str]:
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
    for curve in curves:
      i = style[curve.method]
      _line(axes, curve.budgets, curve.values, i, _look(i)[1])
    return {}

  what = curves[0].measure
  return _plot(
    what.capitalize(), "keys that a query sees", MEASURE, draw, measure=what
  )


def _scatter(axes, points, style, position) -> dict[str, str]:
  """One mark a point, a line through each method; hover titles by SVG id."""
  shown = [p for p in points if real(position(p)) and real(p.bits_per_byte)]
  titles = {}
  top = _guides(axes, [p.bits_per_byte for p in shown if p.dense])
  for method in dict.fromkeys(p.method for p in shown):
    line = sorted((p for p in shown if p.method == method), key=position)
    hue, marker = _look(style[method])
    xy = [position(p) for p in line], [min(p.bits_per_byte, top) for p in line]
    axes.plot(*xy, color=hue, alpha=0.45, zorder=2)
    for p, x, y in zip(line, *xy):
      name = f"mark-{len(titles)}"
      titles[name] = _title(p)
      if p.bits_per_byte > top:
        _above(axes, x, y, p.bits_per_byte)
      axes.plot(
        x,
        y,
        gid=name,
        marker="o" if p.dense else marker,
        markersize=9 if p.dense else 6.5,
        markeredgecolor=INK if p.dense else hue,
        markeredgewidth=1.6,
        markerfacecolor=PAPER if p.slower or p.dense else hue,
        zorder=3,
      )
  return titles


def _guides(axes, twin: Sequence[float]) -> float:
  """Lines of the dense twin, and where the scale ends lest it be squashed."""
  if not twin:
    return math.inf
  axes.axhline(twin[0], color=INK, linewidth=0.9, dashes=(4, 3))
  axes.axhspan(twin[0], 1.01 * twin[0], color=BAND, alpha=0.16, linewidth=0)
  return 1.15 * twin[0]


def _above(axes, x: float, y: float, value: float) -> None:
  """Writes the value of a point that lies beyond the scale."""
  place = {"xytext": (7, 0), "textcoords": "offset points", "va": "center"}
  axes.annotate(f"↑ {value:.2f}", (x, y), color=INK, fontsize=8, **place)


def _title(point: Point) -> str:
  return (
    f"{point.method}, {point.setting}: {number(point.bits_per_byte, 4)} bits"
    f" per byte, {times(point.speedup)} the tokens/s of dense,"
    f" {percent(point.flops_share)} of its FLOPs ({verdict(point)})"
  )


def _line(axes, x: Sequence[Number], y: Sequence[Number], i: int, marker: str):
  both = [(a, b) for a, b in zip(x, y) if real(a) and real(b)]
  if both:
    hue, _ = _look(i)
    axes.plot(*zip(*both), color=hue, marker=marker, markersize=3.5)


def _look(i: int) -> tuple[str, str]:
  """Colour and mark; after eight the marks shift against the colours."""
  return SERIES[i % 8], MARKERS[(i + i // 8) % 8]


def glyph(i: int) -> str:
  """The mark of series `i` as a character, for a legend."""
  return GLYPHS[(i + i // 8) % 8]


def _corner(axes, text: str, side: str) -> None:
  x = {"left": 0.02, "right": 0.98}[side]
  where = {"transform": axes.transAxes, "ha": side, "va": "bottom"}
  axes.text(x, 1.01, text, color=INK, alpha=0.65, fontsize=8, **where)


def _plot(
  label: str,
  xlabel: str,
  ylabel: str,
  draw: Callable[[Any], dict[str, str]],
  *,
  measure: str = "",
) -> str:
  """Draws on fresh axes; `draw` returns the hover titles by SVG id.

  `measure` takes the place of `MEASURE`.
  """
  try:
    import matplotlib
    from matplotlib.figure import Figure
  except ImportError as error:
    raise ImportError(
      "the plots of a report need matplotlib: pip install 'adaptivejax[viz]'"
    ) from error
  out = io.StringIO()
  with matplotlib.rc_context(STYLE), warnings.catch_warnings():
    warnings.simplefilter("ignore")  # about fonts, which are the browser's
    figure = Figure(figsize=(4.7, 3.4), layout="constrained")
    axes = figure.add_subplot(xlabel=xlabel, ylabel=ylabel)
    axes.set_axisbelow(True)
    titles = draw(axes)
    figure.savefig(out, format="svg", transparent=True, metadata={"Date": None})
  svg = _inline(out.getvalue(), label, titles)
  return svg.replace(f"{MEASURE}<", f"{html.escape(measure)}<")


def _inline(svg: str, label: str, titles: Mapping[str, str]) -> str:
  """A file of matplotlib made part of a page: its colours, fonts and ids."""
  svg = svg[svg.index("<svg") :]
  svg = re.sub(r"<(metadata|style).*?</\1>", "", svg, flags=re.DOTALL)
  svg = re.sub(r' id="[\w.]+_\d+"', "", svg)  # names that nothing refers to
  svg = re.sub(r"font-family: [^;\"]*;?|(?<=<svg ).*?(?=viewBox)", "", svg)
  for stand_in, name in VARIABLES.items():
    svg = svg.replace(stand_in, f"var(--{name})")
  for name, title in titles.items():
    mark = f'<g id="{name}">'
    svg = svg.replace(mark, f"{mark}<title>{html.escape(title)}</title>", 1)
  slug = re.sub(r"\W+", "-", label.lower())
  svg = re.sub(r'( id="|url\(#|href="#)', rf"\g<1>{slug}-", svg)
  name = html.escape(label)
  return svg.replace("<svg ", f'<svg role="img" aria-label="{name}" ', 1)
