# SPDX-License-Identifier: Apache-2.0
"""Where the compute went: a text tinted by what each token was given.

Plain HTML for the text; for each layer a strip of SVG, one cell a token.
"""

from collections.abc import Sequence
from html import escape
from itertools import groupby

from adaptivejax.report.data import Mixture, Snippet
from adaptivejax.report.words import characters, percent, times, visible

SHADES = 10


def heat_map(snippet: Snippet) -> str:
  """The tinted text, its legend, and the strips of its layers."""
  low, high = _range(snippet.share)
  spans = (
    _span(text, [snippet.share[t] for t in tokens], low, high)
    for text, tokens in characters(snippet.text, snippet.token_lengths)
  )
  return (
    f'<pre class="heat" tabindex="0">{"".join(spans)}</pre>'
    f'<p class="scale">{percent(low)}<i></i>{percent(high)}'
    f"<span>share of {escape(snippet.whole)} of a token</span></p>"
    + (_strips(snippet) if snippet.matrix else "")
  )


def load_map(mixture: Mixture) -> str:
  """The load of every expert, a strip for each layer, a cell for each expert.

  An even load is half as strong as the strongest tint, which is twice even.
  """
  rows = "".join(
    _load_strip(layer, load, mixture.imbalance(layer))
    for layer, load in reversed(list(enumerate(mixture.load)))
  )
  return (
    f'<div class="strips" role="img" aria-label="load of the experts">{rows}'
    '</div><p class="scale">0<i></i>2×<span>load of an expert, even = 1×;'
    " right: the fullest of its layer</span></p>"
  )


def _load_strip(layer: int, load: Sequence[float], imbalance: float) -> str:
  total = sum(load) or 1
  cells = ""
  for e, share in enumerate(share / total for share in load):
    tint = min(share * len(load) / 2, 1)
    title = f"layer {layer + 1}, expert {e + 1}: {percent(share)}"
    cells += (
      f'<path opacity="{tint:.2f}" d="M{e} 0h1v1h-1z">'
      f"<title>{title} of the choices</title></path>"
    )
  return (
    f'<b>layer {layer + 1}</b><svg viewBox="0 0 {len(load)} 1"'
    f' preserveAspectRatio="none">{cells}</svg><b>{times(imbalance)}</b>'
  )


def _range(share: Sequence[float]) -> tuple[float, float]:
  """The ends of the colour scale; 0 and 1 where all tokens got the same."""
  low, high = min(share, default=0.0), max(share, default=1.0)
  return (0.0, 1.0) if high - low < 0.005 else (low, high)


def _span(text: str, share: list[float], low: float, high: float) -> str:
  mean = sum(share) / len(share)
  tint = f"{(mean - low) / (high - low):.2f}"
  shown = "".join(map(visible, text))
  end = "\n" if shown.endswith("\n") else ""
  body = escape(shown.removesuffix("\n") or " ")
  return (
    f'<span style="--c:{tint}" title="{escape(repr(text))}: {percent(mean)}">'
    f"{body}</span>{end}"
  )


def _strips(snippet: Snippet) -> str:
  """The layers, the last on top; tokens from left to right."""
  layers = list(enumerate(snippet.matrix, start=1))[::-1]
  whole = escape(snippet.whole)
  rows = "".join(_strip(layer, row, whole) for layer, row in layers)
  return (
    f'<div class="strips" role="img" aria-label="compute by layer">{rows}</div>'
  )


def _strip(layer: int, row: Sequence[float], whole: str) -> str:
  mean = sum(row) / max(len(row), 1)
  paths: dict[int, str] = {}
  at = 0
  for shade, run in groupby(round(SHADES * share) for share in row):
    width = len(list(run))
    if shade:
      paths[shade] = paths.get(shade, "") + f"M{at} 0h{width}v1h-{width}z"
    at += width
  cells = "".join(
    f'<path opacity="{shade / SHADES:.1f}" d="{d}"/>'
    for shade, d in sorted(paths.items())
  )
  title = f"layer {layer}: {percent(mean)} of {whole}"
  return (
    f'<b>layer {layer}</b><svg viewBox="0 0 {max(at, 1)} 1"'
    f' preserveAspectRatio="none"><title>{title}</title>{cells}</svg>'
    f"<b>{percent(mean)}</b>"
  )
