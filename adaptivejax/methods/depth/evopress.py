# SPDX-License-Identifier: Apache-2.0
r"""EvoPress: evolution finds which halves of the layers the model can spare.

Sieberling et al., 2024, https://arxiv.org/abs/2410.14649

A plan drops so many attention and so many feed-forward halves of the layers.
From the best plan so far, (1 + lambda) evolution makes lambda offspring by
min(u, v) swaps of a kept and a dropped half of one kind, u and v drawn from
1..3, and sieves them in stages, fewer plans on more text each time; the parent
competes in the last.  The fitness, KL(p_dense || p_plan) per token, sees what
layers do for each other, which scores of single layers do not.

Primitive: `nn.by_plan` (`run_if`), plans being data: one program per stage.
Departs: drops only, no levels of sparsity or bit-width.
Axes: P plans, U units, K kinds of them, L layers, N windows, S tokens of each.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial
from jaxtyping import Array, Bool, Float, Int

from adaptivejax.nn.plan import by_plan

Fitness = Callable[[np.ndarray, int, np.random.Generator], Array | np.ndarray]
"""`(plans bool[P, U, K], samples, rng) -> f[P]`, the lower the better, each on
the same samples, so many, which `rng` may draw."""


class Evolution(NamedTuple):
  """The best plan, bool[U, K], and its fitness in every generation."""

  plan: np.ndarray
  history: list[float]


def evolve(
  fitness: Fitness,
  units: int,
  drops: tuple[int, ...],
  *,
  generations: int,
  offspring: int = 16,
  stages: tuple[tuple[int, int], ...] = ((4, 1), (1, 8)),
  seed: int = 0,
  progress: Callable[[int, float], None] = lambda generation, fitness: None,
) -> Evolution:
  """Searches for the plan of lowest fitness, on the host; all is static.

  Args:
    units: U, such as the layers.
    drops: units to drop of each kind.
    generations: rounds of offspring, after a first one drawn at random.
    stages: of selection, `(survivors, samples)`; the last leaves one plan.
    progress: called after each generation.
  """
  if not drops or not all(0 <= n <= units for n in drops):
    raise ValueError(f"{drops=} must drop 0..{units} of {units=}, by kind.")
  left = [offspring, *(survivors for survivors, _ in stages)]
  if left != sorted(left, reverse=True) or left[-1] != 1 or len(left) < 2:
    raise ValueError(
      f"{stages=} must leave fewer and fewer of {offspring=}, and one at last."
    )
  rng = np.random.default_rng(seed)
  first = np.arange(units)[:, None] >= np.array(drops)
  plans = [rng.permuted(first, axis=0) for _ in range(offspring)]
  parent, history = [], []
  for generation in range(generations + 1):
    for survivors, samples in stages[:-1]:
      plans = _sieve(fitness, plans, samples, rng)[0][:survivors]
    plans = parent + plans  # elitism; the parent wins ties
    plans, worth = _sieve(fitness, plans, stages[-1][1], rng)
    parent, history = plans[:1], [*history, worth]
    progress(generation, worth)
    plans = [mutate(parent[0], rng) for _ in range(offspring)]
  return Evolution(parent[0], history)


def _sieve(fitness, plans, samples, rng) -> tuple[list[np.ndarray], float]:
  """The plans, the best first, and its fitness."""
  worth = np.asarray(fitness(np.stack(plans), samples, rng))
  order = np.argsort(worth, kind="stable")
  return [plans[i] for i in order], float(worth[order[0]])


def mutate(
  plan: Bool[np.ndarray, "U K"], rng: np.random.Generator
) -> Bool[np.ndarray, "U K"]:
  """The plan after 1 to 3 swaps; each kind drops as many as before."""
  plan = plan.copy()
  mixed = [k for k, kind in enumerate(plan.T) if kind.any() and not kind.all()]
  for _ in range(rng.integers(1, 4, 2).min() if mixed else 0):
    kind = plan[:, rng.choice(mixed)]  # a view
    swap = rng.choice(np.flatnonzero(kind)), rng.choice(np.flatnonzero(~kind))
    kind[list(swap)] = False, True
  return plan


def divergence(model, text: Int[Array, "N S"]) -> Fitness:
  """KL from the whole model to the model under a plan, on rows of `text`."""

  @jax.jit
  def kl(model, text, plans: Bool[Array, "P L 2"]) -> Float[Array, " P"]:
    dense = jax.nn.log_softmax(model(text).logits)

    def one(plan):
      out = model(text, stack=Partial(by_plan, plan=plan))
      gap = dense - jax.nn.log_softmax(out.logits)
      return (jnp.exp(dense) * gap).sum(-1).mean()

    return jax.lax.map(one, plans)

  def fitness(plans, samples, rng):
    drawn = rng.permutation(len(text))[:samples]
    return kl(model, text[np.sort(drawn)], jnp.asarray(plans))

  return fitness
