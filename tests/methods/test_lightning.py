# SPDX-License-Identifier: Apache-2.0
"""Law: a Lightning look is its recurrence, and the published code."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from adaptivejax.decode import generate
from adaptivejax.methods.attention import LightningAttention
from adaptivejax.models import DecoderLM, decoder_block
from adaptivejax.nn import Attention
from tests.methods.host import CONFIG, TOKENS, B, T, shaken

GOLDENS = Path(__file__).parents[1] / "goldens" / "lightning.npz"
PROMPT = 6


@functools.cache
def golden(layer):
  """`(module, arrays)` of one layer of the golden file."""
  with np.load(GOLDENS) as file:
    heads, layers = int(file["heads"]), int(file["layers"])
    named = [name for name in file.files if name.startswith(f"{layer}/")]
    g = {name.split("/")[1]: file[name] for name in named}
  features = g["x"].shape[-1]
  rngs = nnx.Rngs(0)
  look = LightningAttention(features, heads, layers, chunk=16, rngs=rngs)
  module = Attention(features, heads, look=look, rngs=rngs)
  module.query.kernel.set_value(g["query"])
  both = np.concatenate([g["key"], g["value"]], 1)
  module.key_value.kernel.set_value(both)
  module.out.kernel.set_value(g["out"])
  look.gate.kernel.set_value(g["gate"])
  look.norm.scale.set_value(g["norm"])
  return jax.tree.map(jnp.asarray, (module, g))


def places(x, start=0):
  return jnp.broadcast_to(jnp.arange(x.shape[1]) + start, x.shape[:2])


@pytest.mark.parametrize("layer", range(3))
def test_equals_the_published_code(layer):
  module, g = golden(layer)

  @jax.jit
  def run(module, x):
    y = module(x, places(x), layer=jnp.int32(layer))[0]
    return jnp.sin(y).sum(), y

  (_, y), (dmodule, dx) = jax.value_and_grad(run, (0, 1), has_aux=True)(
    module, g["x"]
  )
  kernel = lambda part: part.kernel.get_value()
  key_value = np.concatenate([g["dkey"], g["dvalue"]], 1)
  for got, want in [
    (y, g["y"]),
    (dx, g["dx"]),
    (kernel(dmodule.query), g["dquery"]),
    (kernel(dmodule.key_value), key_value),
    (kernel(dmodule.look.gate), g["dgate"]),
    (dmodule.look.norm.scale.get_value(), g["dnorm"]),
  ]:
    atol = 1e-5 * np.abs(want).max()
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=atol)


@pytest.mark.parametrize("layer", range(3))
def test_its_state_and_steps_are_the_published_ones(layer):
  module, g = golden(layer)
  x = g["x"]
  cache = module.look.empty_cache(
    3, len(x), module.look.heads, 99, module.width, x.dtype
  )
  _, cache, *_ = module(x, places(x), cache, layer)
  np.testing.assert_allclose(
    cache.memory[:, layer], g["state"], rtol=1e-4, atol=1e-5
  )
  others = np.delete(np.asarray(cache.memory), layer, axis=1)
  assert not others.any(), "a layer writes its own state only"
  for i in range(3):
    token = g["more"][:, i : i + 1]
    y, cache, *_ = module(token, places(token, x.shape[1] + i), cache, layer)
    np.testing.assert_allclose(y, g["ymore"][:, i : i + 1], atol=2e-5)


@functools.cache
def model():
  def layer(rngs):
    look = LightningAttention(
      CONFIG.features, CONFIG.heads, CONFIG.layers, chunk=16, rngs=rngs
    )
    return decoder_block(CONFIG, rngs, look=look)

  return shaken(DecoderLM(CONFIG, layer=layer, rngs=nnx.Rngs(0)))


def test_a_cache_of_one_slot_is_enough():
  """Prefill in one go, by halves, and token by token: like without a cache."""
  want = model()(TOKENS).logits
  for cuts in ([T], [4, T], range(1, T + 1)):
    cache, logits, start = model().empty_cache(B, 10_000), [], 0
    assert cache.slots == 1
    for end in cuts:
      out = model()(TOKENS[:, start:end], cache)
      cache, start = out.cache, end
      logits.append(out.logits)
    np.testing.assert_allclose(
      jnp.concatenate(logits, 1), want, rtol=1e-4, atol=2e-5
    )
    assert not cache.full(10**6).any()


def test_padding_changes_no_state():
  """Prompts of different lengths in one batch, and each alone."""
  lengths = jnp.array([3, 6, 1])
  cache = model().empty_cache(B, T)
  together = model()(TOKENS[:, :PROMPT], cache, lengths=lengths).cache
  for row, length in enumerate(lengths):
    alone = model().empty_cache(1, T)
    alone = model()(TOKENS[row : row + 1, : int(length)], alone).cache
    np.testing.assert_allclose(
      together.memory[row], alone.memory[0], rtol=1e-4, atol=2e-5
    )
  made = generate(model(), TOKENS[:, :PROMPT], steps=4, lengths=lengths)
  text = TOKENS[:1, :3]
  for t in range(4):  # row 0, greedy, without a cache
    token = model()(text).logits[:, -1].argmax(-1)
    assert token[0] == made.tokens[0, t]
    text = jnp.concatenate([text, token[:, None]], 1)


def test_tokens_that_are_not_live_are_as_if_not_there():
  module = shaken(golden(1)[0])
  x = golden(1)[1]["x"]
  live = jnp.arange(x.shape[1]) % 3 != 1
  spread = jnp.broadcast_to(live, x.shape[:2])
  y = module(x, places(x), live=spread)[0]
  few = x[:, live]
  want = module(few, places(few))[0]
  np.testing.assert_allclose(y[:, live], want, atol=1e-5)
  assert not y[:, ~live].any()


def test_no_chunk_changes_the_result():
  module, g = golden(2)
  for chunk in (32, 48):
    other = jax.tree.map(lambda a: a, module)
    other.look.chunk = chunk
    np.testing.assert_allclose(
      other(g["x"], places(g["x"]), layer=2)[0], g["y"], atol=2e-5
    )


def test_the_cost_of_a_token_does_not_grow():
  costs, small = [], model()
  for tokens in (64, 128, 256):
    text = jnp.zeros((1, tokens), jnp.int32)
    cost = jax.eval_shape(lambda text: small(text).cost, text)
    assert cost.spent.shape == ()
    costs.append(small(text).cost.spent / tokens)
  np.testing.assert_allclose(costs[1:], costs[1], rtol=1e-6)


def test_bad_input():
  rngs = nnx.Rngs(0)
  with pytest.raises(ValueError, match="must divide"):
    LightningAttention(10, 4, rngs=rngs)
  with pytest.raises(ValueError, match="at least 1"):
    LightningAttention(8, 4, 0, rngs=rngs)
  look = LightningAttention(16, 4, rngs=rngs)
  module = Attention(16, 2, look=look, rngs=rngs)
  x = jnp.ones((1, 4, 16))
  with pytest.raises(ValueError, match="as many heads"):
    module(x, places(x))
  with pytest.raises(ValueError, match="multiple of 16"):
    LightningAttention(16, 4, chunk=24, rngs=rngs)
  module = Attention(16, 4, look=LightningAttention(8, 4, rngs=rngs), rngs=rngs)
  with pytest.raises(ValueError, match="in an attention of 16"):
    module(x, places(x))
  draft = jnp.ones((B, 3, 3), bool)
  cache = model().empty_cache(B, T)
  with pytest.raises(ValueError, match="tree of tokens"):
    model()(TOKENS[:, :3], cache, tree=draft)
