# SPDX-License-Identifier: Apache-2.0
"""Law: TokenSelect reads both ends, and what all heads vote for between them.

The oracle counts votes by NumPy; with a selection cache it keeps the last
query and its choice, row by row.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from adaptivejax.core.votes import cosine, soft_votes
from adaptivejax.decode import generate
from adaptivejax.methods.attention import TokenSelect
from adaptivejax.nn import adjust, with_look
from tests.methods import choices, host, kv
from tests.methods.kv import H, T


def votes(q, k, middle, kernel=1):
  """Of the positions in `middle`."""
  total = np.zeros(len(middle))
  for h in range(len(q)):
    total += kv.softmax(k[middle, h // choices.R] @ q[h])
  half = kernel // 2
  wide = [
    total[max(i - half, 0) : i + half + 1].max() for i in range(len(total))
  ]
  return np.array(wide)


def rule(top, initial, local, kernel=1, similarity=2.0, history=None):
  last = {}

  def chosen(q, k, t):
    everything = list(range(t + 1))
    if len(everything) <= initial + top + local:
      return [everything] * kv.G
    row = k[0].tobytes()  # of the batch
    old, middle = last.get(row), everything[initial : t + 1 - local]
    alike = -np.inf
    if old is not None:
      a, b = q.ravel(), old[0].ravel()
      alike = a @ b / np.sqrt((a @ a) * (b @ b))
    if alike < similarity:
      score = votes(q, k, middle, kernel)
      last[row] = q, [middle[i] for i in choices.best(score, top)]
    if history is not None:
      history.append(alike >= similarity)
    some = set(everything[:initial]) | set(last[row][1])
    return [sorted(some | set(everything[t + 1 - local :]))] * kv.G

  return chosen


@pytest.mark.parametrize(
  ("top", "initial", "local", "kernel"),
  [(4, 2, 3, 1), (5, 0, 1, 3), (1, 1, 2, 1), (40, 2, 3, 1)],
)
def test_reads_what_the_heads_vote_for(top, initial, local, kernel):
  look = TokenSelect(top, initial=initial, local=local, kernel=kernel)
  _, gap = choices.check(look, rule(top, initial, local, kernel))
  assert gap > 0.01 or top == 40, "the choice matters"


@pytest.mark.parametrize("similarity", [-2.0, 0.1, 2.0])
def test_queries_that_are_alike_share_a_choice(similarity):
  look = TokenSelect(3, initial=1, local=2, similarity=similarity, heads=H)
  history = []
  expected = rule(3, 1, 2, similarity=similarity, history=history)
  choices.check(look, expected)
  again = np.mean(history)
  assert (again == 0) if similarity > 1 else (again > 0.9) == (similarity < -1)
  assert again < 1, "the first one is always voted on"


def test_the_setting_takes_votes_away():
  step = jax.jit(lambda *args: TokenSelect.step(*args))
  look = TokenSelect(4, initial=1, local=2)
  choices.check(adjust(look, 0.5), rule(2, 1, 2), step=step)
  choices.check(adjust(look, 1.0), rule(0, 1, 2), step=step)
  assert step._cache_size() == 2, "one for the prompt, one for a token"


def test_a_shared_choice_costs_no_votes():
  """All rows share theirs, or the votes of all are counted."""
  spent = {}
  for similarity in (2.0, -2.0):
    look = TokenSelect(1, initial=0, local=1, similarity=similarity, heads=2)
    model = with_look(host.model(), look)
    spent[similarity] = float(host.decode(model, host.TOKENS)[2].spent)
  a_vote = 2 * host.CONFIG.features * host.T * host.B * host.CONFIG.layers
  later = host.T - host.PROMPT - 1
  np.testing.assert_allclose(spent[2.0] - spent[-2.0], a_vote * later)


def test_what_is_not_read_goes_nowhere():
  """NaN in empty slots; and in tokens that never win."""
  choices.check(
    TokenSelect(4, initial=2, local=3), rule(4, 2, 3), spoil=kv.poisoned
  )
  q, k, v = choices.placed()
  want, _ = kv.read(TokenSelect(3, initial=1, local=2), q, k, v)
  asked = choices.sets(rule(3, 1, 2), q, k)

  def spoil(cache):
    bad = np.zeros((kv.B, cache.slots), bool)
    for b in range(kv.B):
      read = [
        s for (row, _, _), some in asked.items() if row == b for s in some
      ]
      bad[b] = ~np.isin(np.arange(cache.slots), read)
    bad = jnp.asarray(bad & (np.arange(cache.slots) < kv.LENGTHS[:, None]))
    hide = lambda a: jnp.where(bad[:, None, None, :, None], jnp.nan, a)
    return cache._replace(k=hide(cache.k), v=hide(cache.v))

  got, _ = kv.read(TokenSelect(3, initial=1, local=2), q, k, v, spoil=spoil)
  np.testing.assert_allclose(got, want, atol=2e-5)


def test_ties_go_to_the_first():
  score = soft_votes(
    jnp.ones((1, 4, 8)), jnp.ones((1, 2, 6, 8)), jnp.ones((1, 1, 6), bool)
  )
  np.testing.assert_allclose(score, 4 / 6, rtol=1e-6)
  q, k, v = choices.placed()
  same = np.broadcast_to(k[:, :1], k.shape).copy()
  out, _ = kv.read(TokenSelect(3, initial=1, local=2), q, same, v)
  chosen = {
    (b, t, g): [0, 1, 2, 3, t - 1, t] if t > 5 else range(t + 1)
    for b in range(kv.B)
    for t in range(kv.LENGTHS[b], T)
    for g in range(kv.G)
  }
  want = choices.attended(chosen, q, same, v)
  np.testing.assert_allclose(out, want, atol=2e-5)


def test_heads_on_several_devices_vote_together():
  draw = lambda *shape: jax.random.normal(jax.random.key(len(shape)), shape)
  q, k, old = draw(2, 4, 8), draw(2, 2, 12, 8), draw(2, 4, 8) + 1
  middle = jnp.broadcast_to(
    (jnp.arange(12) > 1) & (jnp.arange(12) < 9), (2, 1, 12)
  )

  def ask(axis_name=None):
    def f(q, k, old):
      voted = soft_votes(q, k, middle, kernel=3, axis_name=axis_name)
      return voted, cosine(q, old, axis_name)

    return f

  mesh = jax.make_mesh((2,), ("heads",), axis_types=(AxisType.Auto,))
  heads = PartitionSpec(None, "heads")
  many = jax.shard_map(
    ask("heads"), mesh=mesh, in_specs=heads, out_specs=PartitionSpec()
  )
  for got, want in zip(jax.jit(many)(q, k, old), ask()(q, k, old)):
    np.testing.assert_allclose(got, want, rtol=1e-5)


def test_a_sharded_look_finds_what_one_device_does():
  """Through `step`, with its cache of choices."""
  draw = lambda *shape: jax.random.normal(jax.random.key(len(shape)), shape)
  q, k = draw(1, 1, 4, 8), draw(1, 2, 12, 8)
  place = jnp.arange(12)[None, None]

  def run(look, q, k):
    cache = look.empty_cache(1, 1, k.shape[1], 13, 8, jnp.float32)
    old = kv.Keys(k, k, place)
    cache = look.append(cache, 0, old).advance(12)
    new = kv.Keys(k[:, :, :1], k[:, :, :1], jnp.full((1, 1, 1), 12))
    looked, cache = look.step(q, new, jnp.full((1, 1), 12), cache, 0)
    return looked.out, cache.memory.chosen

  make = lambda heads, axis: TokenSelect(
    3, initial=1, local=2, heads=heads, axis_name=axis
  )
  mesh = jax.make_mesh((2,), ("heads",), axis_types=(AxisType.Auto,))
  spec = PartitionSpec
  many = jax.shard_map(
    lambda q, k: run(make(2, "heads"), q, k),
    mesh=mesh,
    in_specs=(spec(None, None, "heads"), spec(None, "heads")),
    out_specs=(spec(None, None, "heads"), spec()),
    check_vma=False,
  )
  out, chosen = jax.jit(many)(q, k)
  want, same = run(make(4, None), q, k)
  np.testing.assert_array_equal(chosen, same)
  np.testing.assert_allclose(out, want, atol=1e-5)
  assert chosen.sum() == 3


def test_generates_as_before_if_all_tokens_fit():
  want = generate(host.model(), host.TOKENS, steps=6, lengths=[10, 3, 7])
  model = with_look(host.model(), TokenSelect(12, initial=1, local=3, heads=2))
  got = generate(model, host.TOKENS, steps=6, lengths=[10, 3, 7])
  np.testing.assert_array_equal(got.tokens, want.tokens)
  few = with_look(host.model(), TokenSelect(1, initial=0, local=1))
  few = generate(few, host.TOKENS, steps=6, lengths=[10, 3, 7])
  assert (few.tokens != want.tokens).any()


@pytest.mark.parametrize(
  "how",
  [{"top_k": 0}, {"initial": -1}, {"local": 0}, {"kernel": 2}, {"kernel": 0}],
)
def test_bad_input(how):
  with pytest.raises(ValueError, match="must not be negative"):
    TokenSelect(**how)
