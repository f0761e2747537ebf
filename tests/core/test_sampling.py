# SPDX-License-Identifier: Apache-2.0
"""Law: a draw has the right odds; key, position and use alone decide it."""

import chex
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from adaptivejax.core import sampling
from adaptivejax.core.cost import subjaxprs
from adaptivejax.core.sampling import DRAFT, TOKEN, Draw, Sampling, log_probs
from tests.core import chain

V = 6
# Logs of few whole numbers: ties are common, and no share is a `top_p` below.
LOGITS = st.lists(
  st.sampled_from([np.nan, -np.inf, 0, 0, *np.log([2, 3, 3, 7]), np.inf]),
  min_size=V,
  max_size=V,
)
run = jax.jit(log_probs)


def brute(logits, temperature, k, p):
  """The distribution by sorting, in f64."""
  x = np.nan_to_num(
    np.float64(logits), nan=-np.inf, posinf=1e30, neginf=-np.inf
  )
  if x.max() == -np.inf:
    return np.eye(V)[0]
  if temperature == 0:
    return np.eye(V)[x.argmax()]
  x = np.exp((x - x.max()) / temperature)
  order = sorted(range(V), key=lambda i: (-x[i], i))[:k]
  mass, held = sum(x[i] for i in order), 0.0
  kept = np.zeros(V)
  for i in order:
    if held >= p * mass:
      break
    kept[i], held = x[i], held + x[i]
  return kept / held


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@hypothesis.given(
  logits=LOGITS,
  temperature=st.sampled_from([0, 1e-30, 0.5, 1, 2]),
  k=st.sampled_from([None, 1, 2, V - 1, V, V + 5]),
  p=st.sampled_from([1, 0.001, 0.3141, 0.5772, 0.9123]),
)
def test_log_probs(dtype, logits, temperature, k, p):
  logits = jnp.asarray(logits, dtype)
  want = brute(np.asarray(logits, np.float64), temperature, k, p)
  got = run(logits, Sampling.of(temperature, k, p))
  chex.assert_trees_all_close(jnp.exp(got), want, atol=1e-6)
  np.testing.assert_array_equal(jnp.exp(got) > 0, want > 0)
  assert got.dtype == jnp.float32 and not jnp.isnan(got).any()


def test_greedy_is_exactly_one_hot():
  logits = jnp.asarray([[1.0, 3, 3, np.nan], [np.nan, -np.inf, -1e38, -np.inf]])
  want = np.full((2, 4), -np.inf)
  want[0, 1] = want[1, 2] = 0
  np.testing.assert_array_equal(run(logits, Sampling.of()), want)


@pytest.mark.parametrize("k", range(1, V + 2))
def test_top_k_keeps_exactly_k_of_equals(k):
  got = run(jnp.zeros(V), Sampling.of(1.0, k))
  np.testing.assert_array_equal(np.isfinite(got), np.arange(V) < k)


@pytest.mark.parametrize("nothing", [-np.inf, np.nan])
def test_token_0_where_nothing_is_left(nothing):
  for setting in [(0.0,), (1.0,), (1.0, 2, 0.5)]:
    got = run(jnp.full(3, nothing), Sampling.of(*setting))
    np.testing.assert_array_equal(got, [0, -np.inf, -np.inf])


def test_one_program_serves_every_setting():
  f = jax.jit(chex.assert_max_traces(lambda x, s: log_probs(x, s), n=1))
  for setting in [(), (0.7,), (1.0, 3), (1.0, None, 0.5), (2.0, 2, 0.1)]:
    f(jnp.arange(5.0), Sampling.of(*setting))


@pytest.mark.parametrize(
  "setting, cuts",
  [((0.0, 2, 0.5), 0), ((1.0, 9), 0), ((1.0, 2), 1), ((1.0, None, 0.5), 1)],
)
def test_sorts_only_where_a_cut_is_active(setting, cuts, monkeypatch):
  ran = lambda scaled, _: jnp.full_like(scaled, jnp.nan)
  monkeypatch.setattr(sampling, "_cut", ran)
  out = log_probs(jnp.arange(9.0), Sampling.of(*setting))
  assert jnp.isnan(out).any() == bool(cuts)


def always(jaxpr):
  """The primitives that run whatever the predicates are."""
  for eqn in jaxpr.eqns:
    yield eqn.primitive.name
    if eqn.primitive.name != "cond":
      for inner in subjaxprs(eqn.params):
        yield from always(inner)


@pytest.mark.parametrize("use", ["token", "categorical", "uniform"])
def test_greedy_pays_for_no_random_bits(use):
  calls = {
    "token": lambda d, x, at: d.token(x, at),
    "categorical": lambda d, x, at: d.categorical(x, at, TOKEN),
    "uniform": lambda d, x, at: d.uniform(at, TOKEN, x.shape[1:]),
  }
  args = draws(3), jnp.ones((3, 5)), jnp.arange(3)
  names = set(always(jax.make_jaxpr(calls[use])(*args).jaxpr))
  assert "cond" in names
  assert not [n for n in names if "random" in n or "sort" in n or "exp" in n]


def draws(rows, *setting, seed=0):
  keys = jax.random.split(jax.random.key(seed), rows)
  return Draw(Sampling.of(*setting), keys)


def test_plain_text_has_the_target_odds():
  draw, table = draws(20_000, 1.0), jnp.asarray(chain.log(chain.P))

  def step(last, at):
    return draw.token(table[last], at)[:, None], jnp.ones_like(at)

  chain.agree(chain.write(step, 20_000, 3))


def test_greedy_token_is_the_first_best():
  x = jnp.asarray([[0.0, 2, 2], [np.nan, -5, -9], [np.nan] * 3, [-np.inf] * 3])
  got = draws(4).token(x, jnp.arange(4))
  np.testing.assert_array_equal(got, [1, 1, 0, 0])
  log = draws(4).log_probs(x)
  np.testing.assert_array_equal(log.argmax(-1), got)


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_tokens_left_out_are_never_drawn(temperature):
  """Nor NaN, at any temperature."""
  x = jnp.asarray([np.nan, 1.0, -np.inf, 3.0, 0.0, np.nan])
  draw = draws(500, temperature, 2)
  got = draw.token(jnp.broadcast_to(x, (500, 6)), jnp.arange(500))
  assert set(np.unique(got)) == ({1, 3} if temperature else {3})


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_row_draws_the_same_alone(temperature):
  draw, at = draws(5, temperature, 7, 0.9), jnp.asarray([3, 0, 3, 9, 4])
  x = jax.random.normal(jax.random.key(1), (5, 11))
  all_rows = draw.token(x, at), draw.uniform(at, DRAFT, (2,))
  for b in range(5):
    one, row = draw._replace(keys=draw.keys[b, None]), at[b, None]
    alone = one.token(x[b, None], row), one.uniform(row, DRAFT, (2,))
    want = [a[b, None] for a in all_rows]
    chex.assert_trees_all_equal(list(alone), want)


def test_key_position_and_salt_all_matter():
  """Numbers of other keys, positions or uses are other, and uncorrelated."""
  n = 4000
  draw, at = draws(n, 1.0), jnp.full(n, 5)
  base = draw.uniform(at, TOKEN)
  np.testing.assert_array_equal(base, draw.uniform(at, TOKEN))
  assert base.min() >= 0 and base.max() < 1
  for other in [
    draws(n, 1.0, seed=1).uniform(at, TOKEN),
    draw.uniform(at + 1, TOKEN),
    draw.uniform(at, DRAFT),
    base[::-1],
  ]:
    assert abs(np.corrcoef(base, other)[0, 1]) < 4 / np.sqrt(n)


def test_greedy_coins_are_zero():
  np.testing.assert_array_equal(draws(3).uniform(jnp.arange(3), TOKEN), 0)
  assert draws(3).uniform(jnp.arange(3), TOKEN, (2, 4)).shape == (3, 2, 4)


BAD = {
  "temperature=-1": ({"temperature": -1}, "temperature=-1 must be 0"),
  "temperature=nan": ({"temperature": np.nan}, "temperature=nan"),
  "temperature=inf": ({"temperature": np.inf}, "finite"),
  "top_k=0": ({"top_k": 0}, "top_k=0 must keep at least 1 token; None"),
  "top_p=0": ({"top_p": 0}, "top_p=0 must be a share above 0"),
  "top_p=1.5": ({"top_p": 1.5}, "top_p=1.5"),
  "top_p=nan": ({"top_p": np.nan}, "top_p=nan"),
}


@pytest.mark.parametrize("settings, words", BAD.values(), ids=BAD)
def test_refused_settings(settings, words):
  with pytest.raises(ValueError, match=words):
    Sampling.of(**settings)


def test_settings_may_be_traced():
  f = jax.jit(lambda t, k, p: Sampling.of(t, k, p))
  got = f(jnp.float32(0.5), jnp.int32(3), jnp.float32(0.9))
  chex.assert_trees_all_equal(got, Sampling.of(0.5, 3, 0.9))
