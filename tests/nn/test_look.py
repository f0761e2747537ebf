# SPDX-License-Identifier: Apache-2.0
"""Law: attention asks its look, wherever attention runs."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.tree_util import Partial

from adaptivejax.core.attention import rotary
from adaptivejax.core.trigrams import TrigramTable
from adaptivejax.decode import generate
from adaptivejax.methods.attention import DELTA, Kinetics, Quest
from adaptivejax.methods.decode import ADED, SelfSpeculation
from adaptivejax.methods.depth import MixtureOfRecursions, calm, ffn_skip
from adaptivejax.methods.kv import H2O, SnapKV, StreamingLLM
from adaptivejax.models import DecoderLM, decoder_block
from adaptivejax.nn import (
  Coded,
  Group,
  Look,
  Looked,
  Setting,
  adjust,
  by_plan,
  looks_of,
  with_look,
)
from tests.methods import host


class Counting(Look):
  """Remembers how many keys each layer was given; asks for a penalty."""

  def memory(self, batch, heads, slots, width, dtype):
    return {"count": jnp.zeros(batch, jnp.int32)}

  def append(self, cache, layer, keys, rows=None):
    cache = super().append(cache, layer, keys, rows)
    new = (keys.pos >= 0).sum((1, 2))
    new = new if rows is None else jnp.where(rows, new, 0)
    count = cache.recollect(layer)["count"] + new
    return cache.remember(layer, {"count": count})

  def __call__(self, *args, key=None, **how) -> Looked:
    return (
      super()
      .__call__(*args, **how)
      ._replace(penalty=0.0 if key is None else 1.0)
    )


class Turning(Look):
  """Applies the rotary positions itself, to keys from a cache without."""

  rotated = False

  def __call__(self, q, keys, positions, layer=0, **how):
    at = jnp.broadcast_to(keys.pos, keys.k.shape[:3])
    k = rotary(keys.k[..., None, :], at)[..., 0, :]
    q = rotary(q, positions)
    return super().__call__(q, keys._replace(k=k), positions, layer, **how)


def test_a_look_may_apply_positions_itself():
  want = generate(host.model(), host.TOKENS, steps=5, lengths=[10, 3, 7])
  turning = with_look(host.model(), Turning())
  got = generate(turning, host.TOKENS, steps=5, lengths=[10, 3, 7])
  np.testing.assert_array_equal(got.tokens, want.tokens)
  cache = turning(host.TOKENS, turning.empty_cache(host.B, host.T)).cache
  whole = host.model()(
    host.TOKENS, host.model().empty_cache(host.B, host.T)
  ).cache
  np.testing.assert_allclose(cache.k[:, 0, :, 0], whole.k[:, 0, :, 0])
  assert np.abs(cache.k[:, 0, :, 5] - whole.k[:, 0, :, 5]).max() > 1e-2


def test_memory_follows_the_keys():
  """Through prompts, holes, finished rows and keys filled in."""
  model = with_look(host.model(), Counting())
  lengths = jnp.array([5, 2, 4])
  cache = model(
    host.TOKENS[:, :5], model.empty_cache(host.B, 9), lengths=lengths
  ).cache
  np.testing.assert_array_equal(
    cache.memory["count"], [[5] * 4, [2] * 4, [4] * 4]
  )
  leave = Partial(calm, threshold=jnp.float32(0))
  reads = jnp.array([1, 0, 1])
  cache = model(host.TOKENS[:, :1], cache, lengths=reads, stack=leave).cache
  np.testing.assert_array_equal(
    cache.memory["count"], [[6] * 4, [2] * 4, [5] * 4]
  )


def test_penalties_reach_the_signals():
  model, key = with_look(host.model(), Counting()), jax.random.key(0)
  assert model(host.TOKENS).signals.penalty == 0
  np.testing.assert_allclose(model(host.TOKENS, key=key).signals.penalty, 1)
  plan = jnp.array([[True, True], [False, True], [True, False], [False] * 2])
  planned = Partial(by_plan, plan=plan)
  out = model(host.TOKENS, stack=planned, key=key)
  np.testing.assert_allclose(out.signals.penalty, 0.5)
  skip = Partial(ffn_skip, threshold=jnp.float32(0.5))
  out = model(host.TOKENS, stack=skip, key=key)
  np.testing.assert_allclose(out.signals.penalty, 1)


def test_a_model_takes_another_look_and_stays_as_it_was():
  model = host.model()
  before = jax.tree.structure(model)
  other = with_look(model, H2O(2, 2))
  assert jax.tree.structure(model) == before
  assert type(looks_of(model)[0]) is Look and len(looks_of(other)) == 1
  levels = jax.tree.leaves(nnx.state(other, Setting))
  assert [a.shape for a in levels] == [(host.CONFIG.layers,)]
  moved = looks_of(adjust(other, 0.5))[0].level.get_value()
  np.testing.assert_array_equal(moved, 0.5)
  assert type(looks_of(with_look(other, Look()))[0]) is Look
  with pytest.raises(ValueError, match="no `Attention`"):
    with_look(nnx.Linear(2, 2, rngs=nnx.Rngs(0)), Look())


def grouped(*looks):
  def layer(rngs):
    return Group(
      [decoder_block(host.CONFIG, rngs, look=look) for look in looks]
    )

  return DecoderLM(host.CONFIG, layer=layer, rngs=nnx.Rngs(0))


def test_looks_of_one_cache_must_agree():
  agreed = grouped(H2O(3, 2), H2O(4, 1))
  assert agreed.empty_cache(2, 99).slots == 6
  for other in (Look(), H2O(3, 3), SnapKV(5, window=2, extra=0)):
    model = grouped(H2O(3, 2), other)
    if isinstance(other, SnapKV):  # another method, the same cache
      assert model.empty_cache(2, 99).slots == 6
      continue
    with pytest.raises(ValueError, match="share one cache"):
      model.empty_cache(2, 99)


def test_eight_bits_say_nearly_the_same():
  model = with_look(host.model(), Coded())
  cache = model.empty_cache(host.B, host.T)
  assert cache.k.dtype == jnp.int8
  out = model(host.TOKENS, cache)
  want = host.model()(host.TOKENS).logits
  off = np.abs(out.logits - want).max()
  assert 0 < off < 0.05 * np.abs(want).max()
  again = model(host.TOKENS[:, :1], cache).cache
  assert again.k.dtype == jnp.int8


def test_a_cache_of_another_look_is_refused():
  cache = host.model().empty_cache(host.B, 5)
  with pytest.raises(ValueError, match="not of this model"):
    with_look(host.model(), H2O(3, 3))(host.TOKENS[:, :1], cache)
  with pytest.raises(ValueError, match="not of this model"):
    with_look(host.model(), Coded())(host.TOKENS[:, :1], cache)


def test_what_cannot_evict_says_so():
  """Layers that are recalled, and keys that are filled in."""

  def layer(rngs):
    block = decoder_block(host.CONFIG, rngs, look=H2O(2, 2))
    return MixtureOfRecursions(block, 16, recursions=2, sharing=True, rngs=rngs)

  model = host.model(layer)
  with pytest.raises(ValueError, match="cannot be looked at again"):
    model(host.TOKENS)
  policy = Partial(calm, threshold=jnp.float32(0.5))
  with pytest.raises(ValueError, match="does not keep every key"):
    generate(
      with_look(host.model(), H2O(2, 2)), host.TOKENS, steps=3, policy=policy
    )


def test_drafts_refuse_it_before_anything_is_traced():
  model = with_look(host.model(), StreamingLLM(1, 3))
  table = TrigramTable.build([])
  for policy in (SelfSpeculation(1, 2), ADED(table)):
    with pytest.raises(ValueError, match=r"drafts.*StreamingLLM"):
      policy.check(model)
  SelfSpeculation(1, 0).check(model)  # without a draft it is plain decoding
  tree = jnp.ones((host.B, 1, 1), bool)
  cache = model.empty_cache(host.B, 5)
  with pytest.raises(ValueError, match=r"tree.*StreamingLLM"):
    model(host.TOKENS[:, :1], cache, tree=tree)


LOOKS = {
  "plain": Look(),
  "h2o": H2O(40, 23),
  "snap_kv": SnapKV(40, window=4, extra=23),
  "streaming_llm": StreamingLLM(4, 60),
  "coded": Coded(),
  "quest": Quest(4, page=4),
  "kinetics": Kinetics(2, page=4, local=8),
  "delta": DELTA((0, 2), pages=4, page=4, recent=2),
}


@pytest.mark.parametrize("name", LOOKS)
def test_a_step_does_not_copy_the_cache(name):
  """Slots and memory are overwritten in place, whichever look writes them."""
  model = with_look(host.model(), LOOKS[name])
  cache = model.empty_cache(2, 96)

  def steps(model, token, cache):
    def body(carry, _):
      token, cache = carry
      out = model(token, cache)
      return (out.logits.argmax(-1).astype(jnp.int32), out.cache), None

    return jax.lax.scan(body, (token, cache), None, length=5)[0]

  token = jnp.zeros((2, 1), jnp.int32)
  text = jax.jit(steps).lower(model, token, cache).compile().as_text()
  vectors = [a for a in jax.tree.leaves(cache.memory) if a.ndim == 5]
  for a in (cache.k, *vectors):
    shape = ",".join(map(str, a.shape))
    copies = re.findall(rf"[fs]\d+\[{shape}\]\S* copy\(", text)
    assert len(copies) <= 2, "at most the two on the way in, outside the loops"
