# SPDX-License-Identifier: Apache-2.0
r"""Trees of draft tokens: whom a node sees, and the path the target takes.

A tree holds several guesses at the next tokens; the target reads all nodes in
one forward pass, each node seeing its ancestors only (Miao et al., 2024,
https://arxiv.org/abs/2305.09781).  Verification is one draw per node: at a
node, draw t from the target's distribution there; go on in its child with token
t, or emit t and stop.  (A draw for each path, or each child, would be biased: a
token would get as many chances as there are paths.)

The draw at a position of the text uses the random numbers of plain decoding at
that position.  So the text is that of plain decoding under the same keys, token
for token and whatever the tree; a draft made with the same numbers is only a
better guess.

Axes: B batch, N nodes, D tokens emitted at most (depth + 1), V vocabulary.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from adaptivejax.core.sampling import TOKEN, Draw
from adaptivejax.core.varying import vary, varying_axes

ABSENT = -2
"""The parent of a node that does not exist."""


class Tree(NamedTuple):
  """Draft tokens and what each would follow; data, not structure.

  Attributes:
    tokens: i32[B, N]; node 0 is the root, the last token emitted.
    parent: of each node, a lower index; -1 of the root, `ABSENT` where there
      is no node, i32[B, N].
  """

  tokens: Array
  parent: Array


class Path(NamedTuple):
  """From the root to where the draft ends.

  Attributes:
    nodes: the root and the nodes kept, whose keys and values stay; 0 past
      `count`, i32[B, D].
    tokens: emitted, those of `nodes[:, 1:]` and one more; 0 past `count`,
      i32[B, D].
    count: how many of each, in 1..D, i32[B].
  """

  nodes: Array
  tokens: Array
  count: Array


def ancestors(tree: Tree) -> Bool[Array, "B N N"]:
  """`[b, n, m]`: node n sees node m, an ancestor or itself.

  A node that does not exist sees nothing and is not seen.  As many steps as the
  deepest tree has levels.
  """
  nodes = jnp.arange(tree.parent.shape[1])

  def climb(carry):
    sees, node = carry
    sees |= node[..., None] == nodes
    up = jnp.take_along_axis(tree.parent, jnp.maximum(node, 0), axis=1)
    return sees, jnp.minimum(up, node - 1)  # ends, even on a broken tree

  nothing = jnp.zeros((*tree.parent.shape, nodes.size), bool)
  itself = jnp.where(tree.parent == ABSENT, -1, nodes)
  start = vary((nothing, itself), varying_axes(tree))
  return lax.while_loop(lambda carry: (carry[1] >= 0).any(), climb, start)[0]


def depths(tree: Tree) -> Int[Array, "B N"]:
  """Steps from the root, whose depth is 0; -1 where there is no node."""
  return ancestors(tree).sum(-1, dtype=jnp.int32) - 1


def tree_verify(
  tree: Tree,
  target_log: Float[Array, "B N V"],
  draw: Draw,
  at: Int[Array, " B"],
  *,
  depth: int,
) -> Path:
  """The path that the target's draws take through the tree.

  Args:
    tree: the drafts; of children with equal tokens the first counts.
    target_log: log p of the token after each node, at the settings of `draw`.
    draw: the random numbers.
    at: position in the text of the first token emitted, the root's plus one
      (dynamic).
    depth: most nodes to keep beside the root; deeper ones are not reached
      (static).

  Raises:
    ValueError: `depth` is negative, or shapes do not fit one another.
  """
  if depth < 0:
    raise ValueError(f"{depth=} must be 0 (the root alone) or above.")
  if target_log.shape[:2] != tree.tokens.shape:
    raise ValueError(
      f"the target needs a distribution at every node: {tree.tokens.shape=} but"
      f" {target_log.shape=}; absent nodes have one too."
    )
  rows = jnp.arange(tree.tokens.shape[0])

  def unfinished(carry):
    level, _, _, walking = carry
    return (level <= depth) & walking.any()

  def step(carry):
    level, path, node, walking = carry
    token = draw.categorical(target_log[rows, node], at + level, TOKEN)
    keep = lambda old, new: old.at[:, level].set(jnp.where(walking, new, 0))
    path = Path(
      keep(path.nodes, node),
      keep(path.tokens, token),
      path.count + walking,
    )
    match = (tree.parent == node[:, None]) & (tree.tokens == token[:, None])
    walking &= match.any(1)
    return level + 1, path, match.argmax(1).astype(jnp.int32), walking

  none = jnp.zeros((rows.size, depth + 1), jnp.int32)
  root = jnp.zeros(rows.size, jnp.int32)
  start = Path(none, none, root), root, jnp.ones(rows.size, bool)
  start = vary(start, varying_axes(tree, target_log, draw, at))
  return lax.while_loop(unfinished, step, (jnp.int32(0), *start))[1]
