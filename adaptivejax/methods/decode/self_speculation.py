# SPDX-License-Identifier: Apache-2.0
r"""Self-speculative decoding: the first layers draft, all layers verify.

Elhoushi et al., 2024 (LayerSkip), https://arxiv.org/abs/2404.16710
Leviathan et al., 2023 (speculative sampling), https://arxiv.org/abs/2211.17192

The first E layers and the shared readout draft d tokens; the other layers read
all d + 1 at once, from the hidden states and behind the keys that the draft
left, so that nothing is computed twice (LayerSkip, sec. 4.3).  A drafted token
stays with probability min(1, p / q), the first that does not is drawn anew
(`draft_verify`): the text is that of all layers, greedy or sampled, whatever
the first layers say.  Rows keep drafts of different lengths; what they do not
keep is forgotten (`crop`).

Works on any model; LayerSkip or sorted fine-tuning make its drafts good.
Primitive: `run_layers` over a part of the layers; `draft_verify`.
Axes: L layers, B batch, d draft tokens, D features, V vocabulary.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool

from adaptivejax.core.cache import crop
from adaptivejax.core.cost import Cost, flops
from adaptivejax.core.drafts import draft_verify
from adaptivejax.core.sampling import DRAFT
from adaptivejax.nn.looks import refuse_drafts
from adaptivejax.nn.policy import ByStack, Policy, Step, static
from adaptivejax.nn.stack import FULL, layer_count, run_layers


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SelfSpeculation(Policy):
  """Decoding that is exact: the model's own first layers make the draft.

  `Step.depth` counts layers that run one after the other.
  """

  exit: int = dataclasses.field(metadata={"static": True})
  """E, the layers that draft, in 1..L-1 (static)."""

  draft: int = static(4)
  """d, tokens per draft (static); 0 decodes plainly."""

  @property
  def reach(self) -> int:
    return self.draft + 1

  def check(self, model) -> None:
    layers = layer_count(model.layers)
    if self.exit not in range(1, layers):
      raise ValueError(
        f"exit={self.exit} must leave layers on both sides: a whole number in"
        f" 1..{layers - 1}."
      )
    if self.draft < 0 or self.draft != int(self.draft):
      raise ValueError(f"draft={self.draft} must be a number of tokens, or 0.")
    if self.draft:
      refuse_drafts(model, "self-speculation")

  def step(self, model, last, cache, memory, draw, live: Bool[Array, " B"]):
    if not self.draft:
      return ByStack(FULL).step(model, last, cache, memory, draw, live)
    layers, total = model.layers, layer_count(model.layers)
    start = cache.length
    place = lambda t: jnp.where(live[:, None], t, -1)

    def first(token, cache):
      x, cache, cost, _ = run_layers(
        layers,
        model.embed(token)[:, None],
        place(cache.positions(1)),
        cache,
        jnp.arange(self.exit),
      )
      return x, cache.advance(1), cost.total()

    def propose(carry, _):
      x, cache, cost = first(*carry)
      log = draw.log_probs(model.readout(x[:, 0]))
      token = draw.categorical(log, cache.length, DRAFT)
      return (token, cache), (x[:, 0], token, log, cost)

    (token, cache), (x, draft, log, spent) = lax.scan(
      propose, (last, cache), length=self.draft
    )
    newest, cache, cost = first(token, cache)
    x, draft, log = (jnp.moveaxis(a, 0, 1) for a in (x, draft, log))
    x, spent = jnp.concatenate([x, newest], 1), spent.total() + cost
    cache = cache._replace(length=start)
    x, cache, cost, _ = run_layers(
      layers,
      x,
      place(cache.positions(self.reach)),
      cache,
      jnp.arange(self.exit, total),
    )
    target = draw.log_probs(model.readout(x))
    kept = draft_verify(draft, log, target, draw, start + 1)
    count = jnp.where(live, kept.count, 0)
    ahead = self.reach * self.exit + total - self.exit
    depth = jnp.full(last.shape, layers.depth * ahead, jnp.float32)
    read = flops(model.readout, x)
    asked = read * self.draft / self.reach  # the readouts of the draft
    cost = spent + cost.total() + Cost.dense(read, x[..., 0].size)
    cost = cost.with_overhead(asked)
    return Step(
      kept.tokens,
      count,
      crop(cache, start + count),
      memory,
      depth,
      cost,
      jnp.zeros_like(live),
    )
