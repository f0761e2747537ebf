# SPDX-License-Identifier: Apache-2.0
"""Law: block top-k reads both ends and the pages of the highest mean product.

And the cost law is the sum over all steps of what a step does.
"""

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from adaptivejax.decode import generate
from adaptivejax.methods.attention import Kinetics, kinetics_cost
from adaptivejax.nn import adjust, with_look
from tests.methods import choices, host, kv

JOIN = {"max": np.max, "mean": np.mean}


def rule(pages, page, sinks, local, how="mean"):
  def chosen(q, k, t):
    count = t // page + 1
    ends = {j // page for j in range(t + 1) if j < sinks or j > t - local}
    for g in range(kv.G):
      group = slice(g * choices.R, (g + 1) * choices.R)
      products = k[:, g] @ q[group].T  # [t + 1, R]
      each = [products[p * page : (p + 1) * page].mean(0) for p in range(count)]
      scores = [JOIN[how](one) for one in each]
      best = choices.best(scores, pages + len(ends), first=ends)
      yield choices.tokens_of(best, page, t)

  return chosen


@pytest.mark.parametrize(
  ("pages", "page", "sinks", "local", "how"),
  [
    (2, 3, 2, 4, "mean"),
    (1, 4, 0, 1, "max"),
    (3, 1, 1, 2, "mean"),
    (9, 4, 0, 1, "mean"),
  ],
)
def test_reads_what_the_means_say(pages, page, sinks, local, how):
  look = Kinetics(
    pages, page=page, sinks=sinks, local=local, dense_layers=0, group_reduce=how
  )
  _, gap = choices.check(look, rule(pages, page, sinks, local, how))
  assert gap > 0.01 or pages == 9, "the choice matters"


def test_the_setting_takes_pages_away():
  step = jax.jit(lambda *args: Kinetics.step(*args))
  look = Kinetics(
    4, page=2, sinks=1, local=2, dense_layers=1
  )  # layer 1 is read
  choices.check(adjust(look, 0.5), rule(2, 2, 1, 2), step=step)
  choices.check(adjust(look, 1.0), rule(0, 2, 1, 2), step=step)
  assert step._cache_size() == 2, "one for the prompt, one for a token"


def test_means_are_those_of_the_keys_that_are_there():
  """Step by step, in rows of different lengths; NaN in empty slots is none."""
  page, seen = 3, 0

  def compare(cache):
    nonlocal seen
    k, pos = np.asarray(cache.k[:, 1]), np.asarray(cache.pos[:, 1, 0])
    for b, p in np.ndindex(len(k), -(-pos.shape[1] // page)):
      at = range(p * page, min((p + 1) * page, pos.shape[1]))
      held = [s for s in at if pos[b, s] >= 0]
      want = k[b][:, held].mean(1) if held else 0
      got = cache.memory[b, 1, :, p]
      np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
      seen += 1
    return kv.poisoned(cache)

  look = Kinetics(2, page=page, sinks=2, local=4, dense_layers=0)
  choices.check(look, rule(2, page, 2, 4), spoil=compare)
  assert seen > 100


def test_the_first_layer_is_dense():
  model = with_look(host.model(), Kinetics(1, page=1, sinks=0, local=1))
  cost = host.decode(model, host.TOKENS)[2]
  full = host.decode(host.model(), host.TOKENS)[2]
  tokens = host.B * (host.T - host.PROMPT)
  a_key = 4 * host.CONFIG.features * tokens
  chosen = 3 * (host.T - 2) * a_key
  searched = 4 * host.T * a_key / 2
  np.testing.assert_allclose(full.spent - cost.spent, chosen - searched)


def test_generates_as_before_if_all_pages_fit():
  want = generate(host.model(), host.TOKENS, steps=6, lengths=[10, 3, 7])
  model = with_look(host.model(), Kinetics(8, page=2, local=1, dense_layers=0))
  got = generate(model, host.TOKENS, steps=6, lengths=[10, 3, 7])
  np.testing.assert_array_equal(got.tokens, want.tokens)


@settings(max_examples=60)
@given(
  st.integers(0, 40),
  st.integers(0, 30),
  st.integers(1, 5),
  st.none() | st.integers(1, 90),
  st.integers(1, 6),
)
def test_the_cost_law_is_the_sum_of_its_steps(c, l, n, budget, page):
  parameters, heads, kv_heads, width, intensity = 1000, 6, 2, 8, 50.0
  flops = reads = 0.0
  for t in range(1, l + 1):
    seen = c + t if budget is None else min(budget, c + t)
    flops += n * (2 * parameters + 4 * heads * width * seen)
    keys = c + n * t if budget is None else n * seen
    reads += 2 * 2 * kv_heads * width * keys  # 16 bits, keys and values
    if budget is not None:
      flops += n * 2 * heads * width * (c + t) / page
      reads += 2 * kv_heads * width * (c + n * t) / page
  cost = kinetics_cost(
    parameters, heads, kv_heads, width, c, l, n,
    budget=budget, page=page, intensity=intensity,
  )  # fmt: skip
  want = flops, reads, flops + intensity * reads
  np.testing.assert_allclose(cost, want, rtol=1e-9, atol=1e-6)


def test_sparse_is_cheaper_from_some_length_on():
  """A model of the size of Qwen3-0.6B."""
  law = lambda generated, budget=None: kinetics_cost(
    6e8, 28 * 16, 28 * 8, 128, 512, generated, 8, budget=budget
  )
  lengths = 2 ** np.arange(4, 16)
  ratio = [law(l, 1024).eflops / law(l).eflops for l in map(int, lengths)]
  cheaper = np.array(ratio) < 1
  assert not cheaper[0] and cheaper[-1]
  assert (np.diff(cheaper.astype(int)) >= 0).all(), "and it stays so"
  assert ratio[-1] < 0.25


@pytest.mark.parametrize(
  ("how", "words"),
  [
    ({"pages": 0}, "at least 1"),
    ({"local": 0}, "at least 1"),
    ({"sinks": -1}, "not negative"),
    ({"group_reduce": "none"}, "group_reduce='none'"),
  ],
)
def test_bad_input(how, words):
  with pytest.raises(ValueError, match=words):
    Kinetics(**how)
  with pytest.raises(ValueError, match="must not be negative"):
    kinetics_cost(1, 1, 1, 1, -1, 1)
  with pytest.raises(ValueError, match="at least 1 token"):
    kinetics_cost(1, 1, 1, 1, 1, 1, budget=0)
