# SPDX-License-Identifier: Apache-2.0
"""Law: the Linen form of a module is the module, with plain `params`.

That outputs agree is a law over all methods, see `test_laws.py`.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

from adaptivejax.linen import ToLinen, variables_of
from adaptivejax.methods.depth import MixtureOfDepths
from adaptivejax.models import DecoderConfig, DecoderLM, decoder_block
from adaptivejax.nn import Group, adjust

CONFIG = DecoderConfig(
  vocab=13, layers=4, features=16, hidden=32, heads=2, kv_heads=1
)
TOKENS = jnp.arange(6, dtype=jnp.int32).reshape(2, 3)


def layer(rngs):
  """A list of layers, and a setting."""
  block = decoder_block(CONFIG, rngs)
  mixture = MixtureOfDepths(block, CONFIG.features, capacity=0.5, rngs=rngs)
  return Group([decoder_block(CONFIG, rngs), mixture])


def make(rngs):
  return DecoderLM(CONFIG, layer=layer, rngs=rngs)


def plain(tree):
  """Whether it is made of dicts of strings and arrays, nothing else."""
  if isinstance(tree, dict):
    return all(isinstance(k, str) and plain(v) for k, v in tree.items())
  return isinstance(tree, jax.Array)


def test_variables_are_plain_dicts():
  variables = ToLinen(make).init(jax.random.key(0), TOKENS)
  assert set(variables) == {"params", "settings"}
  assert plain(variables)
  kernel = variables["params"]["layers"]["layers"]["1"]["router"]["outer"]
  assert kernel["kernel"].shape == (2, 16, 1)
  other = variables_of(make(nnx.Rngs(0)))
  shapes = lambda tree: jax.tree.map(lambda a: (a.shape, a.dtype), tree)
  assert shapes(variables) == shapes(other)


def test_another_key_makes_other_parameters():
  one, other = (
    ToLinen(make).init(jax.random.key(seed), TOKENS)["params"]["embedding"]
    for seed in (0, 1)
  )
  assert np.all(one != other)


def test_gradients_agree():
  model = make(nnx.Rngs(0))
  variables = variables_of(model)
  key = jax.random.key(0)

  def loss(params):
    variables_ = {**variables, "params": params}
    return ToLinen(make).apply(variables_, TOKENS, key=key).logits.std()

  got = jax.grad(loss)(variables["params"])
  want = jax.grad(lambda m: m(TOKENS, key=key).logits.std())(model)
  want = variables_of(want)["params"]
  jax.tree.map(
    lambda g, w: np.testing.assert_allclose(g, w, rtol=1e-5, atol=1e-6),
    got,
    want,
  )


def test_settings_are_data():
  variables = variables_of(adjust(make(nnx.Rngs(0)), 1e6))
  run = jax.jit(lambda v: ToLinen(make).apply(v, TOKENS).cost.share)
  cheap = run(variables)
  full = jax.tree.map(lambda a: a - 2e6, variables["settings"])
  assert run({**variables, "settings": full}) > cheap
  assert run._cache_size() == 1


def test_nests_in_a_linen_module():
  class Probe(linen.Module):
    @linen.compact
    def __call__(self, tokens):
      return linen.Dense(3)(ToLinen(make, name="model")(tokens).logits)

  probe = Probe()
  variables = probe.init(jax.random.key(0), TOKENS)
  assert probe.apply(variables, TOKENS).shape == (2, 3, 3)
  inner = {name: tree["model"] for name, tree in variables.items()}
  logits = ToLinen(make).apply(inner, TOKENS).logits
  dense = variables["params"]["Dense_0"]
  np.testing.assert_allclose(
    probe.apply(variables, TOKENS),
    logits @ dense["kernel"] + dense["bias"],
    rtol=1e-4,
    atol=1e-5,
  )


@pytest.mark.parametrize(
  ("change", "words"),
  [
    ({"embedding": jnp.zeros((5, 16))}, "embedding"),
    ({"other": jnp.zeros(2)}, "other"),
    ({}, "settings"),
  ],
)
def test_variables_of_another_module_are_refused(change, words):
  variables = variables_of(make(nnx.Rngs(0)))
  if change:
    variables["params"] |= change
  else:
    del variables["settings"]
  words = "level" if words == "settings" else words
  with pytest.raises(ValueError, match=f"not those of this module.*{words}"):
    ToLinen(make).apply(variables, TOKENS)
