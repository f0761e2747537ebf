# SPDX-License-Identifier: Apache-2.0
"""Law: the model is its reference; a cache changes how, not what."""

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from flax import nnx

from adaptivejax.models import DecoderConfig, DecoderLM, decoder_block
from adaptivejax.nn import Group, every_layer, functional
from tests import reference

V, T = 13, 9
TOKENS = jax.random.randint(jax.random.key(0), (2, T), 0, V)
SHAPE = {"vocab": V, "layers": 2, "features": 16, "hidden": 24, "heads": 4}
CONFIGS = {
  "tied": DecoderConfig(**SHAPE, kv_heads=4),
  "grouped": DecoderConfig(**SHAPE, kv_heads=2, tied=False),
  "gated": DecoderConfig(**SHAPE, kv_heads=1, gated=True),
}


@pytest.fixture(scope="module", params=CONFIGS)
def model(request):
  return DecoderLM(CONFIGS[request.param], rngs=nnx.Rngs(1))


def test_equals_the_reference(model):
  out = jax.jit(lambda m: m(TOKENS, stack=every_layer))(model)
  np.testing.assert_allclose(
    out.logits, reference.decoder(model, TOKENS), rtol=1e-4, atol=1e-5
  )
  for got, want in zip(out.hidden, reference.hidden(model, TOKENS)):
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("parts", [(9,), (1,) * 9, (4, 1, 1, 3)])
def test_any_way_of_feeding_the_tokens_is_the_same(model, parts):
  cache, begin, logits = model.empty_cache(2, T), 0, []
  step = jax.jit(lambda m, tokens, cache: m(tokens, cache))
  for part in parts:
    out = step(model, TOKENS[:, begin : begin + part], cache)
    cache, begin = out.cache, begin + part
    logits.append(out.logits)
  np.testing.assert_allclose(
    jnp.concatenate(logits, 1), model(TOKENS).logits, rtol=1e-4, atol=1e-5
  )
  np.testing.assert_array_equal(cache.length, T)


def test_logits_are_read_where_they_are_wanted(model):
  every = model(TOKENS).logits
  some = jnp.array([[0, 8, 3], [5, 5, 1]])
  want = np.take_along_axis(every, some[..., None], 1)
  np.testing.assert_array_equal(model(TOKENS, read_at=some).logits, want)
  one = model(TOKENS, read_at=some[:, 0]).logits
  np.testing.assert_array_equal(one, want[:, :1])


def test_rows_of_a_cache_may_differ_in_length(model):
  """Row 1 starts two tokens later than row 0 and reads the same text."""
  cache = model.empty_cache(2, T)
  late = model(TOKENS[:1, :2], model.empty_cache(1, T)).cache
  join = lambda a, b: a.at[:1].set(b)
  cache = cache._replace(
    k=join(cache.k, late.k),
    v=join(cache.v, late.v),
    pos=join(cache.pos, late.pos),
    length=jnp.array([2, 0], jnp.int32),
  )
  text = jnp.stack([TOKENS[0, 2:6], TOKENS[0, :4]])
  out = model(text, cache).logits
  full = model(TOKENS[:1]).logits[0]
  np.testing.assert_allclose(out[0], full[2:6], rtol=1e-4, atol=1e-5)
  np.testing.assert_allclose(out[1], full[:4], rtol=1e-4, atol=1e-5)


def test_padding_on_the_right_changes_nothing(model):
  """Rows of 5 and 3 real tokens, then 2 and 4, as each would be alone."""
  first, second = jnp.array([5, 3]), jnp.array([2, 4])
  out = model(TOKENS[:, :6], model.empty_cache(2, T + 4), lengths=first)
  more = jnp.stack([TOKENS[0, 5:9], TOKENS[1, 3:7]])
  then = model(more, out.cache, lengths=second)
  np.testing.assert_array_equal(then.cache.length, first + second)
  alone = model(TOKENS).logits
  for row, (a, b) in enumerate(zip(first, second)):
    np.testing.assert_allclose(
      out.logits[row, :a], alone[row, :a], rtol=1e-4, atol=1e-5
    )
    np.testing.assert_allclose(
      then.logits[row, :b], alone[row, a : a + b], rtol=1e-4, atol=1e-5
    )


def test_each_branch_of_a_tree_is_a_text(model):
  """Root, two children, and a child of the second, after three tokens."""
  past = model(TOKENS[:, :3], model.empty_cache(2, T)).cache
  sees = jnp.array([[1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0], [1, 0, 1, 1]])
  tree = jnp.broadcast_to(sees.astype(bool), (2, 4, 4))
  out = model(TOKENS[:, 3:7], past, tree=tree)
  np.testing.assert_array_equal(out.cache.length, 3)
  for node, path in enumerate([(0,), (0, 1), (0, 2), (0, 2, 3)]):
    branch = [TOKENS[:, 3 + n : 4 + n] for n in path]
    text = jnp.concatenate([TOKENS[:, :3], *branch], 1)
    np.testing.assert_allclose(
      out.logits[:, node], model(text).logits[:, -1], rtol=1e-4, atol=1e-5
    )


def test_a_row_set_back_forgets_what_came_after(model):
  """Moving `length` back is enough to continue elsewhere, NaN or not."""
  cache = model(TOKENS, model.empty_cache(2, T + 3)).cache
  stale = (cache.pos >= 4)[..., None]
  cache = cache._replace(
    k=jnp.where(stale, jnp.nan, cache.k),
    v=jnp.where(stale, jnp.nan, cache.v),
    length=jnp.full(2, 4, jnp.int32),
  )
  want = model(TOKENS).logits[:, 4:6]
  np.testing.assert_allclose(
    model(TOKENS[:, 4:6], cache).logits, want, rtol=1e-4, atol=1e-5
  )
  np.testing.assert_allclose(
    model(TOKENS[:, 4:5], cache).logits, want[:, :1], rtol=1e-4, atol=1e-5
  )


def test_later_tokens_change_nothing_before_them(model):
  other = TOKENS.at[:, 5:].set((TOKENS[:, 5:] + 1) % V)
  a, b = model(TOKENS).logits, model(other).logits
  np.testing.assert_array_equal(a[:, :5], b[:, :5])
  assert (a[:, 5:] != b[:, 5:]).any()


def test_cost_is_that_of_its_matrix_products():
  model = DecoderLM(CONFIGS["tied"], rngs=nnx.Rngs(0))
  d, f, n = 16, 24, TOKENS.size
  layer = 2 * n * (4 * d * d + 2 * d * f) + 4 * n * T * d
  cost = model(TOKENS).cost
  np.testing.assert_allclose(cost.spent, 2 * layer + 2 * n * d * V)
  np.testing.assert_array_equal(cost.full, cost.spent)


def test_functional_pair(model):
  apply, params = functional(model)
  np.testing.assert_array_equal(
    apply(params, TOKENS).logits, model(TOKENS).logits
  )
  twice = jax.tree.map(lambda a: 2 * a, params)
  assert (apply(twice, TOKENS).logits != model(TOKENS).logits).any()


def test_a_group_is_its_layers_in_turn():
  config = CONFIGS["tied"]
  block = lambda rngs: decoder_block(config, rngs)
  plain = DecoderLM(config, rngs=nnx.Rngs(3))
  grouped = DecoderLM(
    config, layer=lambda r: Group([block(r), block(r)]), rngs=nnx.Rngs(3)
  )
  np.testing.assert_allclose(
    grouped(TOKENS).logits,
    reference.decoder(grouped, TOKENS),
    rtol=1e-4,
    atol=1e-5,
  )
  np.testing.assert_allclose(
    grouped(TOKENS).logits, plain(TOKENS).logits, rtol=1e-4, atol=1e-5
  )


def fed(tokens, layers=2):
  """A call, types unchecked, with a cache for two rows and so many layers."""
  config = DecoderConfig(**(SHAPE | {"layers": layers}), kv_heads=4)
  cache = DecoderLM(config, rngs=nnx.Rngs(0)).empty_cache(2, T)
  model = DecoderLM(CONFIGS["tied"], rngs=nnx.Rngs(0))
  jaxtyping.config.update("jaxtyping_disable", True)
  try:
    return model(tokens, cache)
  finally:
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.mark.parametrize(
  ("call", "words"),
  [
    (lambda: DecoderConfig(layers=0), "layers"),
    (
      lambda: DecoderLM(DecoderConfig(features=10, heads=3), rngs=nnx.Rngs(0)),
      "heads",
    ),
    (
      lambda: DecoderLM(
        DecoderConfig(**(SHAPE | {"layers": 3}), kv_heads=4),
        layer=lambda r: Group([decoder_block(CONFIGS["tied"], r)] * 2),
        rngs=nnx.Rngs(0),
      ),
      "multiple",
    ),
    (lambda: Group([]), "at least one layer"),
    (lambda: fed(TOKENS[0]), "batch, length"),
    (lambda: fed(TOKENS[:0]), "batch, length"),
    (lambda: fed(TOKENS * 1.0), "integers"),
    (lambda: fed(TOKENS, layers=1), "not of this model"),
    (lambda: fed(TOKENS[:1], layers=2), "not of this model"),
  ],
)
def test_bad_input_is_refused_in_words(call, words):
  with pytest.raises(ValueError, match=words):
    call()
