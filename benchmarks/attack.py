# SPDX-License-Identifier: Apache-2.0
"""Slowdown attacks: can an input make an adaptive model spend more than bound?

Three small classifiers of digits decide by their input how much to compute: by
exits (depth), by a router's mass (experts), by attention (tokens).  An attacker
who knows the weights moves every pixel by up to 0.1 (projected gradient
descent, L-infinity) to make them spend as much as can be; `keeping the answer`
it also holds on to the label.  Costs are shares of the bound, which is told
before anything runs (`core.worst_case`), and never exceeded: that is asserted.
`capped` sets a hard limit (3 exits, 2 experts), whose price is accuracy and not
time.  `robust accuracy` is that under an attack on the label itself.

    python -m benchmarks.attack --json out.json

Hong et al., 2021 (DeepSloth), https://arxiv.org/abs/2010.02432; Madry et al.,
2018 (PGD), https://arxiv.org/abs/1706.06083.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.tree_util import Partial

from adaptivejax.core import worst_case
from adaptivejax.core.cost import Cost
from adaptivejax.core.halting import max_prob
from adaptivejax.core.losses import cross_entropy
from adaptivejax.methods.depth.dynamic_perceiver import budgeted_exit
from adaptivejax.methods.experts import TopPRouter
from adaptivejax.methods.tokens import adaptive_token_sampling
from adaptivejax.methods.tokens.adaptive_token_sampling import significance
from adaptivejax.models import Encoder, EncoderConfig, ImageInput
from adaptivejax.nn import MixtureOfExperts, Mlp, stacked
from adaptivejax.nn.linear import linear
from adaptivejax.nn.stack import layer_at
from benchmarks.harness import Options, Row, main
from benchmarks.headlines import classifiers as bed

RADIUS, STEPS, SURE = 0.1, 40, 0.9
EXPERTS, MASS = 8, 0.5
SAMPLES = 12.0
CAPS = {"exits": 3, "experts": 2}
VIT = EncoderConfig(
  ImageInput(8, 2, 1), layers=3, features=32, heads=4, hidden=128
)


class Victim(NamedTuple):
  """A model to slow down.

  Attributes:
    answer: `inputs -> (logits, cost)`, as it is used.
    capped: the same under a hard limit, if it has one.
    slack: `inputs -> f32[B]`, differentiable: what an attacker lowers.
    logits: `inputs -> f32[B, C]`, differentiable, of all that it has.
    inputs, labels: held out.
  """

  answer: Callable[[jax.Array], tuple[jax.Array, Cost]]
  capped: Callable[[jax.Array], tuple[jax.Array, Cost]] | None
  slack: Callable[[jax.Array], jax.Array]
  logits: Callable[[jax.Array], jax.Array]
  inputs: jax.Array
  labels: jax.Array


def exits(quick: bool) -> Victim:
  """Six exits; a row leaves at the first that is sure."""
  data, total = bed.data(), bed.CONFIG.layers
  loss = lambda m, batch, key: bed.exit_losses(m, batch, key)[0].mean()
  model = bed.fit(bed.build(), loss, data.train, steps=_steps(quick))
  levels = jnp.full(total, SURE, jnp.float32)
  rule = Partial(budgeted_exit, thresholds=levels)

  def answer(x, most=None):
    out = model(x, rule, max_exit=most)
    return out.logits, out.cost

  def slack(x):
    sure = max_prob(model.every_exit(x).logits[:-1])
    return jax.nn.relu(sure - SURE + 0.1).sum(0)

  return Victim(
    answer,
    functools.partial(answer, most=CAPS["exits"]),
    slack,
    lambda x: model.every_exit(x).logits[-1],
    *data.test,
  )


def experts(quick: bool) -> Victim:
  """Eight experts, as many as hold half of the router's mass."""
  data, width = bed.data(), bed.CONFIG.features

  def mixture(rngs, most=None):
    one = lambda rngs: Mlp(width, bed.CONFIG.hidden // 4, rngs=rngs)
    router = TopPRouter(width, EXPERTS, p=MASS, most=most, rngs=rngs)
    return MixtureOfExperts(router, stacked(one, EXPERTS, rngs))

  def loss(model, batch, key):
    nats, out = bed.exit_losses(model, batch, key)
    return nats[-1].mean() + out.signals.penalty

  build = lambda **more: bed.with_mlp(
    bed.CONFIG, functools.partial(mixture, **more), seed=0
  )
  model = bed.fit(build(), loss, data.train, steps=_steps(quick))
  fewer = jax.tree.unflatten(
    jax.tree.structure(build(most=CAPS["experts"])), jax.tree.leaves(model)
  )
  alone = jax.tree.map(lambda a: a, model)  # a copy, of entropy for a penalty
  alone.layers.mlp.router.balance, alone.layers.mlp.router.entropy = 0.0, 1.0

  def answer(model, x):
    out = model.every_exit(x)
    return out.logits[-1], out.cost

  def slack(x):
    penalty = alone.every_exit(x, jax.random.key(0)).signals.penalty
    return jnp.full(len(x), -penalty)  # a mean over rows: each has its own part

  return Victim(
    functools.partial(answer, model),
    functools.partial(answer, fewer),
    slack,
    lambda x: model.every_exit(x).logits[-1],
    *data.test,
  )


def tokens(quick: bool) -> Victim:
  """A vision transformer that keeps the tokens it looks at (ATS)."""
  data, rngs = bed.data(), nnx.Rngs(0)
  start = Encoder(VIT, rngs=rngs), linear(32, 10, rngs=rngs, bias=True)

  def say(pair, x, **how):
    model, head = pair
    out = model(x[..., None], **how)
    return head(out.x[:, 0]), out.cost

  def loss(pair, batch, key):
    return cross_entropy(say(pair, batch.inputs)[0], batch.labels).mean()

  pair = bed.fit(start, loss, data.train, steps=_steps(quick))
  stack = Partial(adaptive_token_sampling, samples=jnp.float32(SAMPLES))

  def slack(x):
    """Entropy of what the class token looks at, layer by layer."""
    model, x = pair[0], pair[0].embedding(x[..., None])
    place, spread = jnp.zeros(x.shape[:2], jnp.int32), jnp.zeros(len(x))
    for l in range(VIT.layers):
      layer = layer_at(model.layers, l)
      x, seen, _ = layer.mix(x, place)
      p = jnp.maximum(significance(seen), 1e-9)
      spread, x = spread - (p * jnp.log(p)).sum(1), layer.feed(x)[0]
    return -spread

  return Victim(
    lambda x: say(pair, x, stack=stack),
    None,
    slack,
    lambda x: say(pair, x)[0],
    *data.test,
  )


VICTIMS = {"exits": exits, "experts": experts, "tokens": tokens}


def attack(victim: Victim, *, keep: float, wrong: bool = False) -> jax.Array:
  """Inputs within the ball that spend the most, or are wrong most often.

  Args:
    keep: weight of holding on to the label.
    wrong: attack the label and nothing else.
  """
  clean, labels = victim.inputs, victim.labels

  def loss(x):
    nats = cross_entropy(victim.logits(x), labels)
    return (-nats if wrong else victim.slack(x) + keep * nats).sum()

  def step(x, _):
    x = x - RADIUS / 10 * jnp.sign(jax.grad(loss)(x))
    return jnp.clip(jnp.clip(x, clean - RADIUS, clean + RADIUS), 0, 1), None

  run = jax.jit(lambda x: jax.lax.scan(step, x, length=STEPS)[0])
  return run(jnp.clip(clean, 0, 1))


def spend(answer, x, labels) -> tuple[float, float, float]:
  """`(cost over its bound, accuracy, bound)`; the bound holds, exactly."""
  told = worst_case(answer, jax.ShapeDtypeStruct(x.shape, x.dtype))
  logits, cost = jax.jit(answer)(x)
  assert cost.spent <= cost.bound == np.float32(told), (cost, told)
  return float(cost.spent) / told, bed.correct(logits, labels), told


def rows(options: Options) -> Iterator[Row]:
  for name in options.select(VICTIMS):
    victim = VICTIMS[name](options.quick)
    if options.quick:
      few = victim.inputs[:16], victim.labels[:16]
      victim = victim._replace(inputs=few[0], labels=few[1])
    labels = victim.labels
    row = functools.partial(_row, name)
    found = {
      "clean": victim.inputs,
      "attacked": attack(victim, keep=0),
      "attacked, keeping the answer": attack(victim, keep=1),
    }
    least, right, bound = spend(victim.answer, victim.inputs, labels)
    yield row("bound, MFLOPs", bound / 1e6)
    for what, x in found.items():
      share, right, _ = spend(victim.answer, x, labels)
      yield row(f"{what}: cost / bound", share, target=1.0, better="lower")
      if what != "clean":
        yield row(f"{what}: cost / clean", share / least)
      yield row(f"{what}: accuracy", right)
    if victim.capped is not None:
      share, right, less = spend(victim.capped, found["attacked"], labels)
      yield row("capped: bound / bound", less / bound)
      yield row("capped, attacked: cost / its bound", share, target=1.0,
                better="lower")  # fmt: skip
      yield row("capped, attacked: accuracy", right)
      right = spend(victim.capped, victim.inputs, labels)[1]
      yield row("capped, clean: accuracy", right)
    x = attack(victim, keep=0, wrong=True)
    yield row("robust accuracy", spend(victim.answer, x, labels)[1])


def _row(case: str, metric: str, value: float, **more: Any) -> Row:
  return Row(case, metric, value, (value, value), **more)


def _steps(quick: bool) -> int:
  return 4 if quick else bed.STEPS


if __name__ == "__main__":
  main(__doc__, rows)
