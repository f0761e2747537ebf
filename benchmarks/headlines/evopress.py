# SPDX-License-Identifier: Apache-2.0
"""EvoPress: evolution against greedy choice and chance, byte language model.

All drop the same numbers of attention and feed-forward halves and are judged on
the same text of the training files; bits per byte are of held-out files.  There
are few enough plans to try them all.
"""

import itertools

import numpy as np
from jax.tree_util import Partial

from adaptivejax.methods.depth import divergence, evolve
from adaptivejax.nn import by_plan
from benchmarks.headlines import Headline
from benchmarks.headlines.beds import bits_per_byte, byte_lm, texts

PAPER = (
  "At 25-50 % of the blocks dropped evolution beats choosing them by single"
  " scores; errors do not add up over layers (unverified)"
)
DROPS = ((1, 2), (2, 2), (3, 3))
"""Of 6 attention and 6 feed-forward halves: 25, 33 and 50 %."""
GENERATIONS, OFFSPRING, SEEDS = 7, 8, 3


def measure(quick: bool) -> Headline:
  model = byte_lm("dense", quick)
  seen, held = texts(16, split="train"), texts(100)
  fitness, rng = divergence(model, seen), np.random.default_rng(0)
  judge = lambda plans: np.asarray(fitness(np.stack(plans), len(seen), rng))
  bits = lambda plan: float(
    bits_per_byte(model, held, Partial(by_plan, plan=plan))
  )
  layers, budget = model.config.layers, OFFSPRING * (GENERATIONS + 1)
  figures = {"dense_bits": bits(np.ones((layers, 2), bool))}
  wins, parts = [], []
  alone = _alone(judge, layers)
  for drops in DROPS[-1:] if quick else DROPS:
    found = [
      evolve(
        fitness,
        layers,
        drops,
        generations=1 if quick else GENERATIONS,
        offspring=OFFSPRING,
        stages=((2, len(seen) // 4), (1, len(seen))),
        seed=seed,
      ).plan
      for seed in range(1 if quick else SEEDS)
    ]
    every = _plans(layers, drops)
    worth = judge(every[:8] if quick else every)
    draws = rng.choice(worth, (200, min(budget, len(worth))))
    scores = np.array([(alone * ~plan).sum() for plan in every])
    greedy = _greedy(judge, layers, drops)
    kl = {
      "evolution": float(judge(found).mean()),
      "single_scores": float(judge([every[scores.argmin()]])[0]),
      "random": float(draws.min(1).mean()),
      "greedy": float(judge([greedy])[0]),
      "best": float(worth.min()),
    }
    share = sum(drops) / 2 / layers
    figures |= {f"kl_{name}_{share:.0%}": v for name, v in kl.items()}
    figures[f"bits_evolution_{share:.0%}"] = float(
      np.mean([bits(p) for p in found])
    )
    figures[f"bits_greedy_{share:.0%}"] = bits(greedy)
    wins.append(kl["evolution"] < min(kl["single_scores"], kl["random"]))
    values = " / ".join(f"{value:.3f}" for value in kl.values())
    parts.append(f"{share:.0%}: {values}")
  text = (
    f"nats from the dense model, evolution over {budget} plans / single scores"
    f" / best of {budget} random plans / greedy, half by half / best of all"
    f" plans: {'; '.join(parts)}. Stepwise greedy is hard to beat on 6 layers"
  )
  return Headline(text, figures, all(wins))


def _plans(layers: int, drops: tuple[int, int]) -> list[np.ndarray]:
  """All plans that drop so many halves of each kind."""
  kind = lambda n: itertools.combinations(range(layers), n)
  index = np.arange(layers)
  return [
    np.stack([~np.isin(index, a), ~np.isin(index, b)], axis=1)
    for a, b in itertools.product(kind(drops[0]), kind(drops[1]))
  ]


def _without(plan: np.ndarray, l: int, kind: int) -> np.ndarray:
  plan = plan.copy()
  plan[l, kind] = False
  return plan


def _alone(judge, layers: int) -> np.ndarray:
  """The loss of dropping each half by itself, [L, 2]."""
  whole = np.ones((layers, 2), bool)
  each = [_without(whole, l, k) for l in range(layers) for k in range(2)]
  return judge(each).reshape(layers, 2)


def _greedy(judge, layers: int, drops: tuple[int, int]) -> np.ndarray:
  """Drops one half after the other, each time the one that harms least."""
  plan = np.ones((layers, 2), bool)
  while tuple((~plan).sum(0)) != drops:
    left = [k for k in range(2) if (~plan[:, k]).sum() < drops[k]]
    rows = range(layers)
    tried = [_without(plan, l, k) for k in left for l in rows if plan[l, k]]
    plan = tried[judge(tried).argmin()]
  return plan
