"""Law: the mass of keys equals brute force, however the pairs are tiled."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.attention_mass import attention_mass, reference, xla
from pallas_kernels.block_sparse_attention.types import CAUSAL, Marks, Rule

B, H, T, S, D = 2, 4, 13, 19, 8
TILES = {"one": (1 << 22, 256, 128), "many": (1, 4, 5)}


def arrays(groups, heads, seed=0):
  rng = np.random.default_rng(seed)
  normal = lambda *shape: rng.normal(size=shape).astype(np.float32)
  marks = Marks(
    q_pos=rng.integers(-1, S, (B, T)),
    kv_pos=rng.integers(-1, S, (B, heads, S)),
    q_segment=rng.integers(0, 2, (B, T)),
    kv_segment=rng.integers(0, 2, (B, S)),
    kv_bias=normal(B, heads, S),
    sinks=normal(H),
  )
  made = normal(B, H, T, D), normal(B, groups, S, D), marks
  return jax.tree.map(jnp.asarray, made)


def brute(q, k, *, lse, marks, rule, reduce_q, block, block_q, q_weight):
  """Query by query, key by key, in f64."""
  q, k = np.asarray(q, np.float64), np.asarray(k, np.float64)
  groups, tiles = k.shape[1], -(-T // (block_q or T))
  given = np.zeros((B, H, T, -(-S // block)))
  for b, h, t in np.ndindex(B, H, T):
    g = h * groups // H
    at = t if marks.q_pos is None else marks.q_pos[b, t]
    odds = np.zeros(S)
    for s in range(S):
      pos, bias = s, 0.0
      if marks.kv_pos is not None:
        p = g if marks.kv_pos.shape[1] > 1 else 0
        pos, bias = marks.kv_pos[b, p, s], marks.kv_bias[b, p, s]
      seen = at >= 0 and pos >= 0 and (not rule.causal or pos <= at)
      seen &= rule.window is None or pos > at - rule.window
      if marks.q_segment is not None:
        seen &= marks.q_segment[b, t] == marks.kv_segment[b, s]
      if seen:
        score = q[b, h, t] @ k[b, g, s] / np.sqrt(D)
        if rule.softcap:
          score = rule.softcap * np.tanh(score / rule.softcap)
        odds[s] = np.exp(score + bias)
    total = odds.sum()
    if marks.sinks is not None:
      total += np.exp(marks.sinks[h])
    if lse is not None:
      total = np.exp(lse[b, h, t])
    weight = 1 if q_weight is None else q_weight[b, ..., t].reshape(-1)
    weight = weight if np.ndim(weight) == 0 else weight[h % len(weight)]
    share = odds / total * weight if total else odds
    for s in range(S):
      given[b, h, t, s // block] += share[s]
  reduce = np.sum if reduce_q == "sum" else np.max
  tile = block_q or T
  out = [
    reduce(given[:, :, n * tile : n * tile + tile], 2) for n in range(tiles)
  ]
  return np.stack(out, 2) if block_q else out[0]


CASES = {
  "sum": {},
  "maximum": {"reduce_q": "max", "groups": H},
  "blocks": {"block": 4, "groups": 1, "rule": Rule(window=6)},
  "tiles": {"block_q": 5, "block": 3, "rule": Rule(causal=False)},
  "maxima of tiles": {
    "block_q": 2,
    "reduce_q": "max",
    "rule": Rule(softcap=1.0),
  },
  "weights": {"weights": (B, T)},
  "weights of heads": {"weights": (B, H, T), "reduce_q": "max"},
  "given lse": {"lse": True, "block": 7},
  "unmarked": {"marked": False, "block": 4},
  "marks of heads": {"heads": 2},
}


def case(
  *, reduce_q="sum", groups=2, heads=1, block=1, block_q=None, rule=CAUSAL,
  weights=None, lse=False, marked=True,
):  # fmt: skip
  q, k, marks = arrays(groups, heads)
  rng = np.random.default_rng(1)
  draw = lambda *shape: jnp.asarray(rng.uniform(0, 2, shape), jnp.float32)
  how = {
    "lse": draw(B, H, T).at[0, 0, 0].set(-jnp.inf) + 3 if lse else None,
    "marks": marks if marked else Marks(),
    "q_weight": None
    if weights is None
    else draw(*weights).at[0, ..., 2].set(0),
  }
  if lse:  # -inf is what attention says of a query that sees nothing
    how["marks"] = marks._replace(q_pos=marks.q_pos.at[0, 0].set(-1))
  how |= {"rule": rule, "reduce_q": reduce_q, "block": block}
  return q, k, how | {"block_q": block_q}


@pytest.mark.parametrize("tiles", TILES.values(), ids=TILES)
@pytest.mark.parametrize("name", CASES)
def test_equals_brute_force(name, tiles, monkeypatch):
  for constant, value in zip(("SCORES", "MOST_QUERIES", "LEAST_KEYS"), tiles):
    monkeypatch.setattr(xla, constant, value)
  q, k, how = case(**CASES[name])
  moving = {n: how.pop(n) for n in ("lse", "marks", "q_weight")}
  f = lambda q, k, moving: attention_mass(q, k, **moving, **how)
  got = jax.jit(f)(q, k, moving)
  want = brute(q, k, **jax.tree.map(np.asarray, moving), **how)
  np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["tiles", "maxima of tiles", "given lse"])
def test_reference_equals_brute_force(name):
  q, k, how = case(**CASES[name])
  np.testing.assert_allclose(
    reference.attention_mass(q, k, **how), brute(q, k, **how), atol=1e-5
  )


def test_nothing_leaks_and_nothing_flows_back(monkeypatch):
  monkeypatch.setattr(xla, "SCORES", 1)
  monkeypatch.setattr(xla, "LEAST_KEYS", 8)
  q, k, marks = arrays(2, 1)
  hidden = (marks.kv_pos < 0)[..., None]
  f = lambda q, k: attention_mass(q, k, marks=marks)
  got = f(q, jnp.where(hidden, jnp.nan, k))
  np.testing.assert_array_equal(got, f(q, k))
  slope = jax.grad(lambda q, k: f(q, k).sum(), (0, 1))(q, k)
  assert not any(np.asarray(a).any() for a in slope)


def test_memory_is_not_that_of_all_pairs():
  """32k keys and queries: 4 GB of f32 scores."""
  spec = jax.ShapeDtypeStruct((1, 1, 32768, 16), jnp.float32)
  for how in ({}, {"reduce_q": "max", "block": 64, "block_q": 4096}):
    f = jax.jit(functools.partial(attention_mass, **how))
    memory = f.lower(spec, spec).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 100e6


@pytest.mark.parametrize(
  "change, message",
  [
    ({"reduce_q": "mean"}, "reduce_q"),
    ({"block": 0}, "block"),
    ({"lse": jnp.zeros((B, T))}, "lse"),
    ({"marks": Marks(kv_pos=jnp.zeros((B, S), int))}, "kv_pos"),
    ({"marks": Marks(kv_segment=jnp.zeros((B, S), int))}, "both"),
    ({"k": jnp.zeros((B, 3, S, D))}, "divisor"),
  ],
)
def test_bad_input_is_refused(change, message):
  q, k, _ = arrays(2, 1)
  k = change.pop("k", k) if "k" in change else k
  with pytest.raises(ValueError, match=message):
    attention_mass(q, k, **change)
