# SPDX-License-Identifier: Apache-2.0
"""Law: an adopted cache is the one that its look would have made."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from adaptivejax.core.cache import crop
from adaptivejax.methods.attention import (
  APE,
  DELTA,
  NSA,
  Kinetics,
  Quest,
  TokenSelect,
)
from adaptivejax.methods.kv import H2O, SnapKV, SpAtten, StreamingLLM
from adaptivejax.models import DecoderLM, decoder_block
from adaptivejax.nn import (
  ByBlocks,
  ByPhase,
  Coded,
  Group,
  Look,
  adopt_cache,
  with_look,
)
from tests.methods import host

C, H = host.CONFIG, host.CONFIG.heads
NSA_SIZES = {"size": 2, "stride": 1, "block": 2, "blocks": 3, "window": 2}
LOOKS = {
  "dense": Look(),
  "Quest": Quest(2, page=3, dense_layers=0),
  "Kinetics": Kinetics(2, page=3),
  "DELTA": DELTA((0,), pages=2, recent=1, page=3),
  "TokenSelect": TokenSelect(2, initial=1, local=1, heads=H),
  "ByPhase": ByPhase(ByBlocks(block_q=4, block_kv=4), Quest(2, page=3)),
}


def read(model, tokens=host.TOKENS):
  cache = model.empty_cache(len(tokens), host.T + 4)
  return model(tokens, cache).cache


@pytest.mark.parametrize("name", LOOKS)
def test_of_its_own_cache_it_makes_the_same(name):
  model = with_look(host.model(), LOOKS[name])
  cache = read(model)
  chex.assert_trees_all_equal(adopt_cache(model, cache), cache)


@pytest.mark.parametrize("layers", [1, 2])
def test_each_layer_adopts_by_its_own_weights(layers):
  def own(rngs):
    look = NSA(C.features, H, rngs=rngs, **NSA_SIZES)
    return decoder_block(C, rngs, look=look)

  group = lambda rngs: Group([own(rngs) for _ in range(layers)])
  model = host.shaken(DecoderLM(C, layer=group, rngs=nnx.Rngs(0)))
  cache = read(model)
  adopted = jax.jit(adopt_cache)(model, cache)
  whole = lambda a: a[:, :, :, : host.T - 1]  # summaries of two slots each
  for made in (cache.memory, adopted.memory):  # others are not looked at yet
    assert all(np.abs(whole(a)).min((0, 1, 2, 4)).all() for a in made)
  cut = lambda c: c._replace(memory=jax.tree.map(whole, c.memory))
  chex.assert_trees_all_close(cut(adopted), cut(cache), atol=1e-6)


def test_it_goes_on_behind_what_another_look_read():
  dense = host.model()
  every, few = (with_look(dense, Quest(n, page=2)) for n in (host.T, 1))
  # rows of different lengths, of which some is forgotten
  cache = crop(read(dense), jnp.array([10, 1, 6]))
  after = lambda model, cache: model(host.TOKENS[:, :1], cache).logits
  want = after(dense, cache)
  got = after(every, adopt_cache(every, cache))
  np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)
  assert np.abs(after(few, adopt_cache(few, cache)) - want).max() > 1e-3
  back = adopt_cache(dense, adopt_cache(few, cache))
  there = cache.pos[..., None] >= 0
  zeroed = cache._replace(k=cache.k * there, v=cache.v * there)
  chex.assert_trees_all_equal(back, zeroed)
  assert adopt_cache(with_look(dense, Coded()), cache).k.dtype == jnp.int8


def test_inside_shard_map_it_is_the_same():
  model = with_look(host.model(), Quest(2, page=3))
  cache = read(host.model())
  over = jax.shard_map(
    adopt_cache,
    mesh=jax.make_mesh((1,), ("data",), axis_types=(AxisType.Auto,)),
    in_specs=(P(), P("data")),
    out_specs=P("data"),
  )
  chex.assert_trees_all_equal(over(model, cache), adopt_cache(model, cache))


@pytest.mark.parametrize(
  "look",
  [
    SnapKV(4, window=2),
    StreamingLLM(1, 4),
    SpAtten(),
    H2O(2, 2),
    APE(1, 2),
  ],
)
def test_looks_that_do_not_keep_all_keys_are_refused(look):
  with pytest.raises(ValueError, match="let it read them itself"):
    adopt_cache(with_look(host.model(), look), read(host.model()))


def test_caches_without_all_keys_are_refused():
  for look in (H2O(2, 2), Coded()):
    cache = read(with_look(host.model(), look))
    with pytest.raises(ValueError, match="given keys up, merged them, stored"):
      adopt_cache(host.model(), cache)
  tree = jnp.ones((host.B, 2, 2), bool)
  with pytest.raises(ValueError, match="a tree of drafts"):
    adopt_cache(host.model(), read(host.model())._replace(tree=tree))
  cache = read(host.model()).take(jnp.arange(2))
  with pytest.raises(ValueError, match="has 2 layers, .* not those of Dec"):
    adopt_cache(host.model(), cache)
