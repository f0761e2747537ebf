# SPDX-License-Identifier: Apache-2.0
"""Sliding-window attention: a query sees the last tokens only.

Beltagy et al., 2020, https://arxiv.org/abs/2004.05150, sec. 3.1; and for
texts Jiang et al., 2023, https://arxiv.org/abs/2310.06825, sec. 2 (Mistral 7B).

It belongs to the model, which was trained with it, and not to a budget: see
`nn.with_look`.  Exact, and it saves nothing: all scores are computed.

Axes: B batch, T tokens, S keys, H query heads, W head width, D features.
"""

from jaxtyping import Array, Bool, Float, Int

from adaptivejax.core.attention import Keys, attend
from adaptivejax.nn.look import Look, Looked, look_cost


class Window(Look):
  """Looks at keys fewer than `span` positions back, its own included (static).

  Raises:
    ValueError: a span that does not hold the token itself.
  """

  def __init__(self, span: int):
    if span < 1:
      raise ValueError(f"a window holds the token itself; got {span=}.")
    self.span = span

  def __call__(
    self,
    q: Float[Array, "B T H W"],
    keys: Keys,
    positions: Int[Array, "B T"],
    layer: Int[Array, ""] | int = 0,
    *,
    x: Float[Array, "B T D"] | None = None,
    live: Bool[Array, "B T"] | None = None,
    mask: Bool[Array, "B T S"] | None = None,
    key: Array | None = None,
  ) -> Looked:
    del layer, x, key
    out = attend(q, keys, positions, window=self.span, mask=mask)
    return Looked(out, look_cost(q, keys.k.shape[2], live))
