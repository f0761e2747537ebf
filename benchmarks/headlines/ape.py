# SPDX-License-Identifier: Apache-2.0
"""APE: pieces of a file read apart, against the same pieces in sequence.

Four pieces of a held-out file are contexts, and what counts is how well the
bytes after them are foretold; read apart, no piece knows the one before it.
Temperature and scale are those that are best on training text, as in the paper.
"""

import functools
import itertools

import jax
import jax.numpy as jnp

from adaptivejax.core.losses import cross_entropy
from adaptivejax.methods.attention import APE, parallel_context
from adaptivejax.nn import with_look
from benchmarks.headlines import Headline, beds, prefill

PAPER = (
  "keeps 98% of the accuracy of reading in sequence with the same retrieved"
  " texts, and 93% with the same examples; 4.5x as fast end to end (unverified)"
)
PREFIX, PIECE, COUNT = 16, 40, 4
START = PREFIX + COUNT * PIECE
GRID = (0.6, 0.7, 0.8, 0.9, 1.0)


def measure(quick: bool) -> Headline:
  model, many = prefill.model(quick), 4 if quick else 100
  grid = GRID[-2:] if quick else GRID
  given = beds.texts(4 if quick else 30, prefill.CONTEXT, split="train")
  tried = {
    pair: float(_read_apart(_with(model, *pair), given))
    for pair in itertools.product(grid, grid)
  }
  temperature, scale = min(tried, key=lambda pair: tried[pair])
  text = beds.texts(many, prefill.CONTEXT)
  figures = {
    "alone": _read(model, text, 0),
    "sequence": _read(model, text, COUNT),
    "parallel": _read_apart(_with(model, 1.0, 1.0), text),
    "ape": _read_apart(_with(model, temperature, scale), text),
  }
  figures = {name: float(value) for name, value in figures.items()}
  gain = figures["alone"] - figures["sequence"]
  kept = (figures["alone"] - figures["ape"]) / gain
  words = (
    f"bits per byte: {figures['alone']:.3f} without contexts,"
    f" {figures['sequence']:.3f} with {COUNT} in sequence,"
    f" {figures['parallel']:.3f} with them apart, {figures['ape']:.3f} at T ="
    f" {temperature}, S = {scale}: {kept:.0%} of the gain"
  )
  holds = figures["ape"] <= figures["parallel"] and kept >= 0.93
  figures |= {"temperature": temperature, "scale": scale}
  return Headline(words, figures, holds)


def _with(model, temperature, scale):
  return with_look(
    model, APE(COUNT, PIECE, temperature=temperature, scale=scale)
  )


def _pieces(text):
  """Prefix [B, P], contexts [B, N, M] and text [B, T]."""
  pieces = text[:, PREFIX:START].reshape(len(text), COUNT, PIECE)
  return text[:, :PREFIX], pieces, text[:, START:]


def _bits(logits, text):
  """Per byte of the text, but for the first."""
  return cross_entropy(logits[:, :-1], text[:, 1:]).mean() / jnp.log(2)


@jax.jit
def _read_apart(model, text):
  prefix, contexts, rest = _pieces(text)
  cache = parallel_context(model, prefix, contexts, prefill.CONTEXT)
  return _bits(model(rest, cache).logits, rest)


@functools.partial(jax.jit, static_argnums=2)
def _read(model, text, count):
  """In sequence, the first `count` contexts of them."""
  prefix, contexts, rest = _pieces(text)
  read = contexts[:, :count].reshape(len(text), -1)
  whole = jnp.concatenate([prefix, read, rest], 1)
  return _bits(model(whole).logits[:, -rest.shape[1] :], rest)
