# SPDX-License-Identifier: Apache-2.0
"""Law: modules made one by one or in a scan are the same modules."""

import chex
import jax
import pytest
from flax import nnx

from adaptivejax.methods.experts import DeepSeekRouter
from adaptivejax.models import DecoderConfig, DecoderLM, decoder_block
from adaptivejax.nn import Group, MixtureOfExperts, Mlp, stacked

D, E = 8, 3
MODEL = DecoderConfig(
  vocab=11, layers=4, features=D, hidden=12, heads=2, kv_heads=1
)


def layer(rngs):
  expert = lambda rngs: Mlp(D, 6, gated=True, rngs=rngs)
  router = DeepSeekRouter(D, E, top_k=2, rngs=rngs)
  mixture = MixtureOfExperts(router, stacked(expert, E, rngs))
  return Group(
    [decoder_block(MODEL, rngs), decoder_block(MODEL, rngs, mixture)]
  )


def build():
  return DecoderLM(MODEL, layer=layer, rngs=nnx.Rngs(7))


def test_a_traced_model_has_the_numbers_of_an_eager_one():
  """Layers, experts in them, and what is made after them."""
  eager, traced = build(), jax.jit(build)()
  assert jax.tree.structure(eager) == jax.tree.structure(traced)
  chex.assert_trees_all_close(eager, traced, rtol=1e-6, atol=1e-7)
  first, second = eager.layers.layers[1].mlp.experts.up.kernel.get_value()
  assert abs(first - second).min() > 0 and abs(first[0] - first[1]).min() > 0


def test_a_traced_model_is_one_program_whatever_there_are():
  def size(count):
    make = lambda rngs: Mlp(D, 6, rngs=rngs)
    made = jax.make_jaxpr(lambda: stacked(make, count, nnx.Rngs(0)))()
    return len(str(made).splitlines())

  assert size(3) == size(300)


def test_none_of_them_is_refused():
  for run in (lambda f: f(), jax.eval_shape):
    with pytest.raises(ValueError, match="at least 1"):
      run(lambda: stacked(lambda rngs: Mlp(D, 6, rngs=rngs), 0, nnx.Rngs(0)))
