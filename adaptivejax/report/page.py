# SPDX-License-Identifier: Apache-2.0
"""`report.html`: one page, no script, nothing from the network."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from html import escape
from importlib import resources

from adaptivejax.report import plots
from adaptivejax.report.data import (
  Grid,
  Mixture,
  Point,
  Report,
  Sample,
  Snippet,
  real,
)
from adaptivejax.report.heat import heat_map, load_map
from adaptivejax.report.words import number, percent, readable, times, verdict

REGIMES = {
  "decode": "Decoding, token by token",
  "long decode": "Decoding after a long prompt",
  "prompt": "Reading a prompt",
  "long prompt": "Reading a long prompt",
  "score": "Scoring whole sequences",
}
POLICY = "default-src 'none'; style-src 'unsafe-inline'"


def page(report: Report) -> str:
  """The whole document; sections without data are left out."""
  css = (
    resources.files("adaptivejax.report")
    .joinpath("style.css")
    .read_text("utf-8")
  )
  style = plots.styles(
    [p.method for p in report.points]
    + [c.name for c in report.curves]
    + [m.method for m in report.mixtures]
    + [c.method for c in report.budgets]
  )
  sections = [
    *(_regime(report, regime, style) for regime in report.regimes()),
    _budgets(report, style),
    *(_grid(grid) for grid in report.grids),
    _mixtures(report.mixtures, style),
    _snippets(report.snippets),
    _samples(report.samples),
    _curves(report, style),
    _paragraphs("How it was measured", report.measured),
    _paragraphs("What to keep in mind", report.notes),
    _environment(report),
  ]
  title = escape(report.title)
  return (
    '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
    '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
    f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
    f"<title>{title}</title>\n<style>\n{css}</style>\n</head>\n<body>\n"
    f"<main>\n{_header(report)}{''.join(sections)}</main>\n</body>\n</html>\n"
  )


def _section(title: str, body: str) -> str:
  return f"<section>\n<h2>{escape(title)}</h2>\n{body}\n</section>\n"


def _header(report: Report) -> str:
  cards = "".join(
    f'<li class="{kind}"><strong>{escape(figure)}</strong>'
    f"<span>{escape(text)}</span></li>"
    for kind, figure, text in _cards(report)
  )
  return (
    f"<header>\n<h1>{escape(report.title)}</h1>\n"
    f"<p><code>{escape(report.command)}</code></p>\n</header>\n"
    + (f'<ul class="cards">{cards}</ul>\n' if cards else "")
  )


def _cards(report: Report) -> Iterator[tuple[str, str, str]]:
  """The headlines: the best point of each regime, and what lost to dense."""
  for regime in report.regimes():
    best = report.best(regime)
    if best:
      yield (
        "bad" if best.slower else "good",
        times(best.speedup),
        f"the dense twin's tokens per second ({regime}) at"
        f" {percent(report.loss_of_quality(best), signed=True)} bits per byte:"
        f" {best.method}, {best.setting}",
      )
  adaptive = [p for p in report.points if not p.dense]
  if adaptive:
    slower = len(report.slower())
    yield (
      "bad" if slower else "good",
      f"{slower} of {len(adaptive)}",
      "adaptive points are slower than dense by the clock",
    )


def _regime(report: Report, regime: str, style: plots.Styles) -> str:
  points = [p for p in report.points if p.regime == regime]
  glyphs = {p.method: plots.glyph(style[p.method]) for p in points}
  glyphs |= {p.method: "○" for p in points if p.dense}
  key = "ring: dense twin"
  if any(p.slower for p in points):
    key += " · hollow mark: slower than dense"
  figures = _figures(
    plots.quality_against_speed(points, style),
    plots.quality_against_flops(points, style),
  )
  caption = (
    f'<p class="caption">{key} · green band: within 1 % of the dense twin\'s'
    " bits per byte · hover over a mark for its figures</p>"
  )
  body = _legend(glyphs, style) + figures + caption + _table(report, points)
  return _section(REGIMES[regime], body)


def _legend(glyphs: Mapping[str, str], style: plots.Styles) -> str:
  items = "".join(
    f'<li><i style="color:var(--s{style[name] % 8})">{glyph}</i>'
    f"{escape(name)}</li>"
    for name, glyph in glyphs.items()
  )
  return f'<ul class="legend">{items}</ul>'


def _figures(*svgs: str) -> str:
  inner = "".join(f"<figure>{svg}</figure>" for svg in svgs)
  return f'<div class="figures">{inner}</div>'


HEADS = (
  "method",
  "setting",
  "speed",
  "quartiles",
  "",
  "bits/byte",
  "vs dense",
  "FLOPs",
  "depth",
  "tokens/s",
)
PERPLEXITY = ("perplexity", "rise")


def _table(report: Report, points: list[Point]) -> str:
  by_token = any(real(p.perplexity) for p in points)
  rows = "".join(
    _row(
      report,
      point,
      first=i == 0 or points[i - 1].method != point.method,
      by_token=by_token,
    )
    for i, point in enumerate(points)
  )
  return _rows(HEADS + PERPLEXITY if by_token else HEADS, rows)


def _rows(heads: Iterable[str], rows: str) -> str:
  head = "".join(f"<th>{escape(head)}</th>" for head in heads)
  return (
    f'<div class="scroll" tabindex="0"><table><thead><tr>{head}</tr></thead>'
    f"<tbody>{rows}</tbody></table></div>"
  )


def _grid(grid: Grid) -> str:
  rows = "".join(
    f'<tr class="first"><th>{escape(first)}</th>'
    + "".join(f"<td>{escape(cell)}</td>" for cell in rest)
    + "</tr>"
    for first, *rest in grid.rows
  )
  caption = f'<p class="caption">{escape(grid.caption)}</p>'
  return _section(grid.title, caption + _rows(grid.heads, rows))


def _row(report: Report, p: Point, first: bool, by_token: bool) -> str:
  low, high = p.spread
  known = real(low) and real(high) and not p.dense
  cells = (
    times(p.speedup),
    f"{low:.2f} – {high:.2f}" if known else "",
    f"<mark>{verdict(p)}</mark>",
    number(p.bits_per_byte, 4),
    "" if p.dense else percent(report.loss_of_quality(p), signed=True),
    percent(p.flops_share),
    number(p.mean_depth),
    number(p.tokens_per_second),
  )
  if by_token:
    rise = "" if p.dense else percent(report.rise(p), signed=True)
    cells += (number(p.perplexity, 4), rise)
  kind = "twin" if p.dense else "slow" if p.slower else "fast"
  return (
    f'<tr class="{kind} {"first" if first else "again"}">'
    f"<th>{escape(p.method)}</th><td>{escape(p.setting)}</td>"
    + "".join(f"<td>{cell}</td>" for cell in cells)
    + "</tr>"
  )


def _mixtures(mixtures: Sequence[Mixture], style: plots.Styles) -> str:
  if not mixtures:
    return ""
  body = "".join(
    f"<h3>{escape(m.method)} <small>{escape(m.setting)} · fullest expert"
    f" {times(m.mean_imbalance)} the mean · {percent(m.dropped)} of the choices"
    f" dropped</small></h3>{load_map(m)}"
    for m in mixtures
  )
  shown = [m for m in mixtures if m.nats]
  if shown:
    legend = _legend({m.method: "━" for m in shown}, style)
    plot = plots.experts_against_difficulty(shown, style)
    body += legend + _figures(plot)
  return _section("Which experts ran", body)


def _snippets(snippets: Iterable[Snippet]) -> str:
  body = "".join(
    f"<h3>{escape(s.method)} <small>{escape(s.setting)}</small></h3>"
    + heat_map(s)
    for s in snippets
  )
  lead = (
    '<p class="caption">The stronger its tint, the more compute a character'
    " was given. Below are the layers, the last on top, a column a token.</p>"
  )
  return _section("Where the compute went", lead + body) if body else ""


def _samples(samples: Iterable[Sample]) -> str:
  body = "".join(
    f"<h3>{escape(s.method)} <small>{escape(s.setting)} ·"
    f" {number(s.tokens_per_second)} tokens/s"
    + (f" · mean depth {number(s.mean_depth)}" if real(s.mean_depth) else "")
    + f'</small></h3><pre class="sample" tabindex="0"><i>'
    f"{escape(readable(s.prompt))}</i>{escape(readable(s.continuation))}</pre>"
    for s in samples
  )
  return _section("What it writes", body) if body else ""


def _curves(report: Report, style: plots.Styles) -> str:
  curves = report.curves
  if not curves:
    return ""
  figures = [plots.loss_curves(curves, style)]
  if any(real(x) for c in curves for x in c.val_bits_per_byte):
    figures.append(plots.validation_curves(curves, style))
  if any(c.imbalance for c in curves):
    figures.append(plots.imbalance_curves(curves, style))
  legend = _legend({c.name: "━" for c in curves}, style)
  return _section("Training", legend + _figures(*figures))


def _budgets(report: Report, style: plots.Styles) -> str:
  curves = report.budgets
  if not curves:
    return ""
  glyphs = {c.method: plots.glyph(style[c.method]) for c in curves}
  figures = [
    plots.quality_against_budget(
      [c for c in curves if c.measure == measure], style
    )
    for measure in dict.fromkeys(c.measure for c in curves)
  ]
  body = _legend(glyphs, style) + _figures(*figures)
  return _section("What a budget of keys buys", body)


def _paragraphs(title: str, texts: Iterable[str]) -> str:
  body = "".join(f"<p>{escape(text)}</p>" for text in texts)
  return _section(title, body) if body else ""


def _environment(report: Report) -> str:
  facts = "".join(
    f"<dt>{escape(key)}</dt><dd>{escape(str(value))}</dd>"
    for key, value in report.environment.items()
  )
  return _section("Environment", f"<dl>{facts}</dl>") if facts else ""
