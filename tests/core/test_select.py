# SPDX-License-Identifier: Apache-2.0
"""Law: every selector is its brute force, for ties, NaN, inf and any dtype."""

import chex
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from adaptivejax.core import select

N = 7
SCORES = st.lists(
  st.sampled_from([-np.inf, -2, -1, -0.0, 0, 0, 1, 1, 2, np.inf, np.nan]),
  min_size=N,
  max_size=N,
)
"""Few distinct values: ties are common."""

given = lambda **kwargs: (
  lambda test: hypothesis.settings(max_examples=60)(
    hypothesis.given(**kwargs)(test)
  )
)
jitted = {
  name: jax.jit(getattr(select, name))
  for name in ("compact", "threshold", "top_k", "top_p", "expert_choice")
}


def best(scores, k):
  """The k best by sorting: higher first, then lower index; NaN never."""
  items = [i for i, score in enumerate(scores) if not np.isnan(score)]
  chosen = sorted(items, key=lambda i: (-scores[i], i))[: max(k, 0)]
  return np.isin(np.arange(len(scores)), chosen)


def nucleus(weights, p):
  """Takes the heaviest until they hold `p` of the total; at least one."""
  mass = [0 if np.isnan(w) or w < 0 else w for w in weights]
  mask, held = np.zeros(len(weights), bool), 0.0
  for i in sorted(range(len(mass)), key=lambda i: (-mass[i], i)):
    if np.isnan(weights[i]):
      continue
    if mask.any() and (held >= p * sum(mass) or mass[i] == 0):
      break
    mask[i], held = True, held + mass[i]
  return mask


def check(name, want, *args):
  np.testing.assert_array_equal(jitted[name](*args), want)


@given(mask=st.lists(st.booleans(), min_size=N, max_size=N))
def test_compact(mask):
  chosen = [i for i, flag in enumerate(mask) if flag]
  padding = [chosen[-1] if chosen else 0] * (N - len(chosen))
  order, count = jitted["compact"](jnp.asarray(mask))
  assert count == len(chosen)
  np.testing.assert_array_equal(order, chosen + padding)


@given(scores=SCORES, level=st.sampled_from([-1.0, 0.0, 1.5, np.inf, np.nan]))
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_threshold(dtype, scores, level):
  want = [score > level for score in scores]
  check("threshold", want, jnp.asarray(scores, dtype), level)


@given(scores=SCORES, k=st.integers(-1, N + 2))
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_top_k(dtype, scores, k):
  check("top_k", best(scores, k), jnp.asarray(scores, dtype), k)


@given(scores=SCORES, k=st.integers(1, N))
def test_best_lists_the_top_k_in_order(scores, k):
  value = lambda i: -np.inf if np.isnan(scores[i]) else scores[i]
  falling = sorted(range(N), key=lambda i: (-value(i), i))
  got = select.best(jnp.asarray([scores, scores[::-1]]), k)
  assert got[0].tolist() == falling[:k]
  assert got.shape == (2, k) and got.dtype == jnp.int32


@pytest.mark.parametrize("k", [0, N + 1])
def test_best_refuses_a_list_longer_than_the_items(k):
  with pytest.raises(ValueError, match=rf"k={k}.*{N} items"):
    select.best(jnp.zeros(N), k)


@given(
  # Whole weights and eighths are exact in f32, so the boundary is sharp.
  weights=st.lists(
    st.sampled_from([np.nan, -3, 0, 0, 1, 1, 2, 8]), min_size=N, max_size=N
  ),
  p=st.integers(-1, 9).map(lambda i: i / 8),
)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_top_p(dtype, weights, p):
  check("top_p", nucleus(weights, p), jnp.asarray(weights, dtype), p)


def test_top_p_of_one_takes_the_smallest_weight_too():
  """Full budget is dense, though 1 + 1e-12 is 1 in f32."""
  weights = jnp.asarray([1.0, 1e-12, 0.0, 1e-30])
  check("top_p", [True, True, False, True], weights, 1.0)


def test_top_p_takes_one_item_even_where_none_has_weight():
  """The first that is not NaN."""
  check("top_p", [False, True, False], jnp.asarray([np.nan, -1.0, 0.0]), 0.5)


@given(scores=st.tuples(SCORES, SCORES, SCORES), k=st.integers(0, N + 1))
def test_expert_choice(scores, k):
  want = np.stack([best(column, k) for column in scores], axis=1)
  check("expert_choice", want, jnp.asarray(scores).T, k)


def test_one_setting_per_leading_axis():
  scores = jnp.asarray([[3.0, 1, 2, 2], [0, 5, 4, 1]])
  for name, setting in [
    ("threshold", jnp.asarray([1.5, 4.0])),
    ("top_k", jnp.asarray([3, 1])),
    ("top_p", jnp.asarray([0.5, 1.0])),
  ]:
    selector = getattr(select, name)
    want = jnp.stack([selector(s, v) for s, v in zip(scores, setting)])
    check(name, want, scores, setting)


@pytest.mark.parametrize("chunk", [1, 2, 3, 6, 7, 9])
def test_chunk_union(chunk):
  mask = np.random.default_rng(0).random((N, 4)) < 0.3
  want = [mask[i : i + chunk].any(0) for i in range(0, N, chunk)]
  got = select.chunk_union(jnp.asarray(mask), chunk)
  np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_straight_through_has_exactly_the_hard_value(dtype):
  soft = jnp.linspace(0, 1, 101, dtype=dtype)
  hard = jnp.linspace(-3, 0.1, 101, dtype=dtype)
  run = lambda h, s: (select.straight_through(h, s) * soft).sum()
  np.testing.assert_array_equal(select.straight_through(hard, soft), hard)
  by_hard, by_soft = jax.grad(run, (0, 1))(hard, soft)
  np.testing.assert_array_equal(by_hard, 0)
  np.testing.assert_array_equal(by_soft, soft)


def test_gumbel_softmax_gradient_is_that_of_the_soft_sample():
  key, t = jax.random.key(3), 0.7
  logits, g = jnp.asarray([0.5, -1.0, 2.0]), np.asarray([1.0, -2.0, 0.5])
  noise = np.asarray(jax.random.gumbel(key, (3,)))
  soft = np.exp((np.asarray(logits) + noise) / t)
  soft /= soft.sum()
  want = (np.diag(soft) - np.outer(soft, soft)) @ g / t
  run = lambda x: (select.gumbel_softmax(x, key, t) * g).sum()
  np.testing.assert_allclose(jax.grad(run)(logits), want, rtol=1e-5)


def test_gumbel_sigmoid_gradient_is_that_of_the_soft_sample():
  key, t = jax.random.key(4), jnp.float32(0.5)  # a temperature may be data
  logits = jnp.asarray([0.5, -1.0, 2.0])
  noise = np.asarray(jax.random.logistic(key, (3,)))
  soft = 1 / (1 + np.exp(-(np.asarray(logits) + noise) / 0.5))
  run = lambda x: select.gumbel_sigmoid(x, key, t).sum()
  want = soft * (1 - soft) / 0.5
  np.testing.assert_allclose(jax.grad(run)(logits), want, rtol=1e-5)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_gumbel_samples_are_hard_and_follow_the_odds(dtype):
  logits = jnp.asarray([0.0, 1.0, -1.0, 0.5], dtype)
  keys = jax.random.split(jax.random.key(0), 4000)
  one_hot = jax.vmap(lambda k: select.gumbel_softmax(logits, k))(keys)
  bits = jax.vmap(lambda k: select.gumbel_sigmoid(logits, k))(keys)
  assert set(np.unique(one_hot)) == set(np.unique(bits)) == {0, 1}
  np.testing.assert_array_equal(one_hot.sum(-1), 1)
  f32 = logits.astype(jnp.float32)
  # Four standard deviations of a share of 4000.
  chex.assert_trees_all_close(one_hot.mean(0), jax.nn.softmax(f32), atol=0.032)
  chex.assert_trees_all_close(bits.mean(0), jax.nn.sigmoid(f32), atol=0.032)
