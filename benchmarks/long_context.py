# SPDX-License-Identifier: Apache-2.0
"""How looks do with few keys of a long context: two beds, a curve for each.

    python -m benchmarks.long_context    and see runs/long_context/report.html

`accuracy`: needles.  A text of 4096 tokens holds 32 pairs of a key and a value
among fillers, and ends in a key: which value was it?  Which pair is asked for,
nobody knows before (multi-query associative recall, Arora et al., 2023,
https://arxiv.org/abs/2312.04927).  The model is a `DecoderLM` of one layer, of
the library's own attention, without positions: a token is told which one came
before it, so one look suffices.  It is trained on short texts, in seconds.

`perplexity`: bytes of a real document of 100 thousand or more, held out, by a
language model of Python's standard library.  A window is scored at once, its
second half counted, where the context is long, token by token if the look takes
tokens that come alone otherwise, and piece by piece, through its cache, if it
evicts: all are asked for the same bytes.

A look is made for a budget of keys by `LookFactory` and put into the trained
model by `with_look`.  Models are kept in runs/headlines.

Axes: B texts, T tokens, K pairs.
"""

import functools
import io
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import lax
from jaxtyping import Array, Float, Int

from adaptivejax.core.losses import cross_entropy
from adaptivejax.decode import score
from adaptivejax.files import write_atomically
from adaptivejax.methods.attention import DELTA, Kinetics, Quest, TokenSelect
from adaptivejax.methods.kv import H2O, SnapKV, StreamingLLM
from adaptivejax.models import DecoderConfig, DecoderLM, decoder_block
from adaptivejax.nn import Look, with_look
from adaptivejax.nn.attention import Attention
from adaptivejax.report.data import BudgetCurve, Report
from adaptivejax.report.environment import environment
from adaptivejax.report.store import write_report
from adaptivejax.training import (
  DataConfig,
  OptimizerConfig,
  TrainConfig,
  load_corpus,
)
from adaptivejax.training.tasks import language_modeling
from benchmarks.harness import Options, Row, main
from benchmarks.headlines.beds import fit

LookFactory = Callable[[int], Look]
"""`factory(budget)`: a look that lets a query see about so many keys."""


def h2o(budget: int) -> H2O:
  """Half of them heavy hitters; one slot is for the new key."""
  recent = budget // 2
  return H2O(budget - 1 - recent, recent, normalise=True)


def snap_kv(budget: int) -> SnapKV:
  """Every piece of a text is its prompt, of which half the window votes."""
  return SnapKV(budget - 1, window=min(32, budget // 2), extra=0)


def streaming_llm(budget: int) -> StreamingLLM:
  """Four sinks, and a window."""
  return StreamingLLM(4, budget - 4)


def delta(budget: int) -> DELTA:
  """Pages as for Quest, in all layers but the first two, which see all."""
  page = min(16, budget // 4)
  return DELTA((0, 1), pages=budget // page, page=page, recent=1)


def quest(budget: int) -> Quest:
  """Pages, of 16 tokens if there are four; the one being filled is one."""
  page = min(16, budget // 4)
  return Quest(budget // page, page=page, dense_layers=0)


def block_top_k(budget: int) -> Kinetics:
  """The same, by mean keys."""
  page = min(16, budget // 4)
  pages = budget // page - 1
  return Kinetics(pages, page=page, sinks=0, local=1, dense_layers=0)


def token_select(budget: int) -> TokenSelect:
  """Tokens, shared out as in the paper: 128 first, 512 last, 2048 between."""
  initial, local = round(budget * 128 / 2688), round(budget * 512 / 2688)
  top_k = budget - initial - local
  return TokenSelect(top_k, initial=initial, local=local)


LOOKS: dict[str, LookFactory] = {
  "all keys": lambda budget: Look(),
  "H2O": h2o,
  "SnapKV": snap_kv,
  "StreamingLLM": streaming_llm,
  "DELTA": delta,
  "Quest": quest,
  "block top-k": block_top_k,
  "TokenSelect": token_select,
}
"""What is measured; a method adds a line."""

NO_NEEDLES = "StreamingLLM", "DELTA"
"""It gives keys positions, which needles have not; it takes several layers."""

ACCURACY = "accuracy on needles"
PERPLEXITY = "perplexity of a long document"

NEEDLE_BUDGETS = 64, 128, 256, 512
TEXT_BUDGETS = 16, 32, 64, 128, 256
KEYS = VALUES = FILLERS = 64
VOCAB = KEYS + VALUES + FILLERS
CONTEXT = 1024
PIECE = 64
"""Tokens that a look that evicts reads at once."""
NEEDLES = DecoderConfig(
  vocab=VOCAB,
  layers=1,
  features=64,
  hidden=64,
  heads=4,
  kv_heads=4,
  tied=False,
)
BYTES = DecoderConfig(layers=4, features=64, hidden=256, heads=4, kv_heads=4)
LESSONS = ((64, 64, 8), (64, 64, 16), (32, 128, 24), (8, 512, 32))
"""Texts in a batch, tokens and pairs, one after the other."""
STEPS = {"needles": 600, "bytes": 1200}
EVALUATION = 1 << 16
"""Seed of the texts that are asked about; below it are those of training."""
OUT = Path("runs/headlines")


class Needles(NamedTuple):
  """Texts and what is asked of them.

  Attributes:
    tokens: i32[B, T], each token with the one before: `token + VOCAB * before`.
    answer: the value asked for, a token, i32[B].
    place: where it is, i32[B].
  """

  tokens: np.ndarray
  answer: np.ndarray
  place: np.ndarray


def needles(count: int, length: int, pairs: int, seed: int) -> Needles:
  """Texts of `length` with `pairs` pairs each, the last token a key of one."""
  rng = np.random.default_rng(seed)
  text = rng.integers(KEYS + VALUES, VOCAB, (count, length))
  order = lambda n: rng.permuted(np.tile(np.arange(n), (count, 1)), axis=1)
  at = 2 * order((length - 2) // 2)[:, :pairs]
  key = order(KEYS)[:, :pairs]
  value = KEYS + rng.integers(0, VALUES, (count, pairs))
  row = np.arange(count)
  text[row[:, None], at], text[row[:, None], at + 1] = key, value
  asked = rng.integers(0, pairs, count)
  text[:, -1] = key[row, asked]
  before = np.pad(text, ((0, 0), (1, 0)), constant_values=VOCAB - 1)[:, :-1]
  return Needles(
    (text + VOCAB * before).astype(np.int32),
    value[row, asked].astype(np.int32),
    at[row, asked] + 1,
  )


class Unplaced(Attention):
  """Attention without positions."""

  def _placed(self, x, positions):
    return x


class NeedleLM(DecoderLM):
  """One layer; a token comes with the one before it, see `Needles`."""

  def __init__(self, *, rngs: nnx.Rngs):
    super().__init__(NEEDLES, layer=_unplaced, rngs=rngs)
    init = jax.nn.initializers.normal(NEEDLES.features**-0.5)
    shape = VOCAB, NEEDLES.features
    self.before = nnx.Param(init(rngs.params(), shape))

  def embed(self, tokens):
    now = self.embedding.get_value()[tokens % VOCAB]
    return now + self.before.get_value()[tokens // VOCAB]


def _unplaced(rngs):
  block = decoder_block(NEEDLES, rngs)
  c = NEEDLES
  block.attention = Unplaced(c.features, c.heads, c.kv_heads, rngs=rngs)
  return block


@functools.cache
def needle_model(quick: bool = False) -> NeedleLM:
  """Trained now, or found in runs/headlines; `quick` trains 4 steps."""
  return trained(NeedleLM(rngs=nnx.Rngs(0)), "needles", quick)


def trained(
  model: NeedleLM,
  name: str,
  quick: bool,
  on: Callable[[NeedleLM, int], NeedleLM] = lambda model, length: model,
) -> NeedleLM:
  """The model after all lessons, kept in runs/headlines under `name`.

  Args:
    model: to begin with.
    name: of the file.
    quick: 4 steps.
    on: the model that runs texts of so many tokens, of the same parameters.
  """
  path = OUT / f"{name}{'-quick' if quick else ''}.npz"
  params, tree = jax.tree.flatten(model)
  if path.is_file():
    with np.load(path) as kept:
      found = [jnp.asarray(kept[key]) for key in kept.files]
    if [a.shape for a in found] == [a.shape for a in params]:
      return jax.tree.unflatten(tree, found)
  steps = 4 if quick else STEPS["needles"]
  optimizer = optax.adam(optax.cosine_decay_schedule(3e-3, steps))

  def loss(params, tokens, answer):
    model = on(jax.tree.unflatten(tree, params), tokens.shape[1])
    last = jnp.full(len(tokens), tokens.shape[1] - 1)
    logits = model(tokens, read_at=last).logits[:, 0]
    return cross_entropy(logits, answer).mean()

  @jax.jit
  def step(params, state, tokens, answer):
    gradient = jax.grad(loss)(params, tokens, answer)
    change, state = optimizer.update(gradient, state)
    return optax.apply_updates(params, change), state

  state = optimizer.init(params)
  for i in range(steps):
    batch = needles(*LESSONS[len(LESSONS) * i // steps], seed=i)
    params, state = step(params, state, batch.tokens, batch.answer)
  path.parent.mkdir(parents=True, exist_ok=True)
  packed = io.BytesIO()
  np.savez(packed, *map(np.asarray, params))
  write_atomically({path: packed.getvalue()})
  return jax.tree.unflatten(tree, params)


def accuracy(
  factory: LookFactory,
  budgets: Sequence[int] = NEEDLE_BUDGETS,
  *,
  length: int = 4096,
  pairs: int = 32,
  count: int = 64,
  quick: bool = False,
) -> dict[int, float]:
  """Share of questions answered right, by budget; a guess is 1 / 64.

  Only the question looks: the keys of what comes before it are written, and a
  look that evicts reads them piece by piece.

  Args:
    factory: of the look.
    budgets: keys that a query may see.
    length, pairs, count: of the texts.
    quick: a model hardly trained, for smoke runs.
  """
  model = needle_model(quick)
  given = needles(count, length, pairs, seed=EVALUATION)
  tokens, answer = jnp.asarray(given.tokens), jnp.asarray(given.answer)
  right = {}
  for budget in budgets:
    looking = with_look(model, factory(budget))
    right[budget] = float(_right(looking, tokens, answer))
  return right


@jax.jit
def _right(model, tokens, answer):
  batch, length = tokens.shape
  cache = model.empty_cache(batch, length)
  cache = _read(model, tokens[:, :-1], cache)
  logits = model(tokens[:, -1:], cache).logits[:, 0]
  return (logits.argmax(-1) == answer).mean()


def _read(model, tokens, cache):
  """The cache after these tokens."""
  block = jax.tree.map(lambda a: a[0], model.layers)
  look, count = block.attention.look, tokens.shape[1]
  if not look.evicts:  # one layer: keys do not depend on what looks find
    positions = jnp.broadcast_to(jnp.arange(count), tokens.shape)
    keys = block.project_keys(model.embed(tokens), positions)
    return look.append(cache, 0, keys).advance(count)
  batch, size = len(tokens), min(PIECE, cache.slots)
  pieces, rest = jnp.split(tokens, [count - count % size], axis=1)
  pieces = jnp.moveaxis(pieces.reshape(batch, -1, size), 1, 0)
  read = lambda cache, piece: (model(piece, cache).cache, None)
  cache, _ = lax.scan(read, cache, pieces)
  return model(rest, cache).cache if rest.shape[1] else cache


@functools.cache
def byte_model(quick: bool = False) -> DecoderLM:
  """A language model of bytes with a context of `CONTEXT`, trained or found."""
  return fit(
    TrainConfig(
      name="headlines/long_context",
      build=lambda rngs: DecoderLM(BYTES, rngs=rngs),
      loss=language_modeling,
      data=_data(),
      optimizer=OptimizerConfig(learning_rate=3e-3, weight_decay=0.0),
      steps=STEPS["bytes"],
      eval_every=STEPS["bytes"],
      checkpoint_every=400,
      log_every=50,
      keep=1,
    ),
    quick,
  )


def _data() -> DataConfig:
  return DataConfig(context=CONTEXT, batch=2)


@functools.cache
def document(least: int = 100_000) -> tuple[str, np.ndarray]:
  """The longest held-out document of the corpus, and the next if it is short.

  Returns:
    `(names, bytes i32[T])`, T at least `least`.
  """
  held = load_corpus(_data()).validation
  names, text = [], b""
  for name in sorted(held, key=lambda n: (-len(held[n]), n)):
    if len(text) >= least:
      break
    names.append(name)
    text += held[name] + b"\n"
  return " + ".join(names), np.frombuffer(text, np.uint8).astype(np.int32)


def perplexity(
  factory: LookFactory,
  budgets: Sequence[int] = TEXT_BUDGETS,
  *,
  count: int = 12,
  quick: bool = False,
) -> dict[int, float]:
  """Of the next byte of a long document, by budget.

  Args:
    factory: of the look.
    budgets: keys that a query may see.
    count: windows of `CONTEXT` bytes, spread over the document.
    quick: a model hardly trained, for smoke runs.
  """
  model, (_, text) = byte_model(quick), document()
  starts = np.linspace(0, len(text) - CONTEXT - 1, count).astype(int)
  cut = np.stack([text[i : i + CONTEXT + 1] for i in starts])
  windows = jnp.asarray(cut).reshape(count, 1, -1)
  found = {}
  for budget in budgets:
    looking = with_look(model, factory(budget))
    if looking.layers.attention.look.evicts:
      nats = _stream(looking, windows[:, 0], budget)
    elif looking.layers.attention.look.alone:
      nats = score(looking, windows[:, 0], prompt=CONTEXT // 2).nats.mean()
    else:
      nats = _windows(looking, windows)
    found[budget] = float(jnp.exp(nats))
  return found


@jax.jit
def _windows(
  model: DecoderLM, windows: Int[Array, "N 1 T"]
) -> Float[Array, ""]:
  """Nats per byte of the second halves."""

  def one(text):
    logits = model(text[:, :-1]).logits
    return cross_entropy(logits, text[:, 1:])[:, CONTEXT // 2 :].mean()

  return lax.map(one, windows).mean()


@functools.partial(jax.jit, static_argnums=2)
def _stream(
  model: DecoderLM, windows: Int[Array, "N T"], budget: int
) -> Float[Array, ""]:
  """Nats per byte of the second halves, windows being read through a cache."""
  cache = model.empty_cache(len(windows), budget)
  size = min(PIECE, cache.slots)
  cut = lambda a: jnp.moveaxis(a.reshape(len(a), -1, size), 1, 0)

  def read(cache, piece):
    text, following = piece
    out = model(text, cache)
    return out.cache, cross_entropy(out.logits, following).mean()

  pieces = cut(windows[:, :-1]), cut(windows[:, 1:])
  _, nats = lax.scan(read, cache, pieces)
  return nats[len(nats) // 2 :].mean()


def curves(name: str, factory: LookFactory, quick: bool) -> list[BudgetCurve]:
  """The beds that a look fits."""
  needle: dict[str, Any] = {}
  text: dict[str, Any] = {}
  if quick:
    needle = {"budgets": (64,), "length": 256, "count": 8, "quick": True}
    text = {"budgets": (64,), "count": 1, "quick": True}
  found = {}
  if name not in NO_NEEDLES:
    found[ACCURACY] = accuracy(factory, **needle)
  found[PERPLEXITY] = perplexity(factory, **text)
  return [
    BudgetCurve(name, measure, tuple(values), tuple(values.values()))
    for measure, values in found.items()
  ]


def rows(options: Options) -> Iterator[Row]:
  """A figure for each look, bed and budget; the plots, where all ran."""
  made = []
  for name in options.select(LOOKS):
    for curve in curves(name, LOOKS[name], options.quick):
      made.append(curve)
      better = "higher" if curve.measure == ACCURACY else "lower"
      for budget, value in zip(curve.budgets, curve.values):
        metric = f"{curve.measure}, {budget} keys"
        yield Row.of(name, metric, [value or math.nan], better=better)
  if not options.quick:
    print(write_report(report(made), Path("runs/long_context")))


def report(made: Sequence[BudgetCurve]) -> Report:
  """The page with the plots."""
  _, _, needle, text, *_ = (__doc__ or "").split("\n\n")
  return Report(
    "Long contexts with few keys",
    "python -m benchmarks.long_context",
    environment(),
    budgets=tuple(made),
    measured=(needle, text),
    notes=(f"The document: {document()[0]}.",),
  )


if __name__ == "__main__":
  main(__doc__, rows)
