# SPDX-License-Identifier: Apache-2.0
r"""ADED: a tri-gram table that learns while it decodes drafts a tree of tokens.

Liu et al., 2024, https://arxiv.org/abs/2407.12021

A table of a corpus says how likely token c follows tokens a, b.  In every step
each tri-gram among a row's last W tokens adds `rate` to its entry, up to `cap`,
for that row.  The table drafts a tree of N nodes, which one forward pass of the
model verifies (`tree_verify`); the keys of the accepted path stay.  The text is
that of plain decoding, greedy or sampled, whatever the table says: it decides
the number of steps only.

Primitive: `tree_verify`, `commit_path`; `draft` of `core.trigrams`.
Departs: the tree holds the N - 1 likeliest continuations of up to D tokens; the
published code searches by 150 iterations of PUCT with random roll-outs.  One
draw per node; the published code draws once per path, which is biased, and
takes the best as the token after it.  What a row learns, it keeps (the
published code changes the table), so that it does not depend on its batch.
Axes: B batch, N nodes, D depth, W tokens, M tri-grams of a row.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool

from adaptivejax.core.cache import commit_path
from adaptivejax.core.trees import ABSENT, ancestors, tree_verify
from adaptivejax.core.trigrams import Recent, TrigramTable, draft
from adaptivejax.nn.looks import refuse_drafts
from adaptivejax.nn.policy import Policy, Step, static
from adaptivejax.nn.setting import refuse_nan


class Memory(NamedTuple):
  """A row's own tri-grams; its last W - 1 tokens but the newest, -1: none."""

  recent: Recent
  window: Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ADED(Policy):
  """Exact decoding by drafts of a table: `ADED(TrigramTable.build(texts))`."""

  table: TrigramTable
  """Of a corpus, shared by the rows; may be empty."""
  rate: Any = 0.04
  """What a step adds to each recent tri-gram (dynamic)."""
  cap: Any = 3.0
  """The most that an entry can reach (dynamic)."""
  nodes: int = static(24)
  """N, the last token included (static)."""
  depth: int = static(4)
  """D, the most tokens drafted in a line (static)."""
  window: int = static(16)
  """W, the tokens that count as recent (static)."""
  size: int = static(256)
  """M, tri-grams that a row can add to the table (static)."""

  @property
  def reach(self) -> int:
    return self.nodes

  def check(self, model) -> None:
    refuse_drafts(model, "ADED")
    if not 1 <= self.depth < self.nodes:
      raise ValueError(
        f"depth={self.depth} must lie in 1..{self.nodes - 1}, of {self.nodes=}."
      )
    if not 3 <= self.window <= self.size + 2:
      raise ValueError(
        f"window={self.window} must lie in 3..{self.size + 2}: a tri-gram, and"
        f" no more of them than {self.size=}."
      )
    refuse_nan(rate=self.rate, cap=self.cap)
    tokens, vocab = self.table.tokens, model.config.vocab
    traced = isinstance(tokens, jax.core.Tracer)
    if not traced and (most := np.asarray(tokens).max()) >= vocab:
      raise ValueError(
        f"the table holds token {most}, but the model's vocabulary ends at"
        f" {vocab - 1}: build it with the model's tokens."
      )

  def start(self, model, prompt, lengths, slots, logits):
    del model, slots
    empty = jax.vmap(lambda _: Recent.empty(self.size))(lengths)
    at = lengths[:, None] + jnp.arange(1 - self.window, 0)
    tokens = jnp.take_along_axis(prompt, jnp.maximum(at, 0), axis=1)
    return Memory(empty, jnp.where(at >= 0, tokens, -1)), logits

  def step(self, model, last, cache, memory, draw, live: Bool[Array, " B"]):
    text = jnp.concatenate([memory.window, last[:, None]], 1)
    update = jax.vmap(lambda row, text: row.update(text, self.rate, self.cap))
    recent = update(memory.recent, text)
    grow = lambda row, context: draft(
      self.table, row, context, self.rate, self.cap, self.nodes, self.depth
    )
    tree = jax.vmap(grow)(recent, text[:, -2:])
    tree = tree._replace(parent=jnp.where(live[:, None], tree.parent, ABSENT))
    out = model(tree.tokens, cache, tree=ancestors(tree))
    log = draw.log_probs(out.logits)
    path = tree_verify(tree, log, draw, cache.length + 1, depth=self.depth)
    count = jnp.where(live, path.count, 0)
    text = jnp.concatenate([text, path.tokens], 1)
    at = count[:, None] + jnp.arange(self.window - 1)
    memory = Memory(recent, jnp.take_along_axis(text, at, axis=1))
    cache = commit_path(out.cache, path.nodes, count)
    depth, ends = out.depth[:, 0], jnp.zeros_like(live)
    return Step(path.tokens, count, cache, memory, depth, out.cost, ends)
