# SPDX-License-Identifier: Apache-2.0
"""Law: at its full budget a changed model says what it said."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.tree_util import Partial

from adaptivejax import surgery
from adaptivejax.methods.depth import ffn_skip
from adaptivejax.methods.kv import StreamingLLM
from adaptivejax.models import DecoderConfig, DecoderLM
from adaptivejax.nn import adjust, by_plan, out_major, with_look
from tests.methods.host import shaken

CONFIG = DecoderConfig(
  vocab=13,
  layers=4,
  features=16,
  hidden=24,
  heads=4,
  kv_heads=2,
  gated=True,
)
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 13, (2, 12)))
CUTS = {
  "acm": surgery.to_acm,
  "acm, ordered": functools.partial(surgery.to_acm, tokens=TOKENS),
  "experts": surgery.to_experts,
  "experts, as they stand": functools.partial(
    surgery.to_experts, clusters=False, prior=0.0
  ),
  "mixture of depths": surgery.to_mixture_of_depths,
  "mixture of depths, all": functools.partial(
    surgery.to_mixture_of_depths, every=1
  ),
  "all layers kept": lambda model: surgery.keep_layers(model, range(4)),
  "out-major": out_major,
  "a window": lambda model: with_look(model, StreamingLLM(12)),
}


@functools.cache
def model():
  return shaken(DecoderLM(CONFIG, rngs=nnx.Rngs(0)))


@pytest.mark.parametrize("cut", CUTS.values(), ids=CUTS)
def test_a_full_budget_is_the_model(cut):
  before = jax.tree.map(np.array, model())
  changed = cut(model())
  assert surgery.exactness(model(), changed, TOKENS) < 1e-4
  for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(model())):
    np.testing.assert_array_equal(a, b)  # pure


def test_huge_states_are_no_other_matter():
  """Trained models have features of 25,000 between layers, which norms undo."""
  config = dataclasses.replace(CONFIG, tied=False)
  loud = shaken(DecoderLM(config, rngs=nnx.Rngs(0)))
  table = loud.embedding.get_value()
  loud.embedding.set_value(table.at[:, 3].set(25_000.0))
  for norm in (loud.norm, loud.layers.norm_attention, loud.layers.norm_mlp):
    scale = norm.scale.get_value()
    norm.scale.set_value((6_250 * scale).at[..., 3].set(0.0))
  changed = CUTS["mixture of depths"](loud)
  assert surgery.exactness(loud, changed, TOKENS) < 1e-4
  least = adjust(changed, 1e6)(TOKENS).logits
  assert np.abs(least - loud(TOKENS).logits).max() > 0.3  # layers do matter


@pytest.mark.parametrize(
  "stack",
  [
    Partial(ffn_skip, threshold=2.0),
    Partial(by_plan, plan=jnp.ones((4, 2), bool)),
  ],
)
def test_full_stacks_are_the_model(stack):
  assert surgery.exactness(model(), model(), TOKENS, stack=stack) < 1e-4


@pytest.mark.parametrize("name", ["acm", "experts", "mixture of depths"])
def test_a_small_budget_is_not(name):
  least = adjust(CUTS[name](model()), 1e6)
  out, whole = least(TOKENS), model()(TOKENS)
  assert np.abs(out.logits - whole.logits).max() > 1e-2
  assert out.cost.spent < 0.9 * whole.cost.spent


def test_exactness_is_the_largest_change():
  other = jax.tree.map(lambda a: a, model())
  table = other.embedding.get_value()
  other.embedding.set_value(table.at[3].add(1.0))
  want = np.abs(model()(TOKENS).logits - other(TOKENS).logits).max()
  assert surgery.exactness(model(), other, TOKENS) == pytest.approx(want)


def test_the_loudest_neurons_come_first():
  sizes = np.asarray(surgery.neuron_sizes(model(), TOKENS))
  first = jax.tree.map(lambda a: a[0], model().layers)
  x = model().embed(TOKENS)
  places = jnp.broadcast_to(jnp.arange(12), TOKENS.shape)
  h = first.norm_mlp(first.attend(x, places)[0])
  z = np.abs(np.asarray(first.mlp.hidden(h))).reshape(-1, 24).mean(0)
  down = np.asarray(first.mlp.down.kernel.get_value())
  want = z * np.sqrt((down**2).sum(1))
  np.testing.assert_allclose(sizes[0], want, rtol=1e-4)
  cut = surgery.to_acm(model(), 4, tokens=TOKENS).layers.mlp.learners
  loudest = np.argsort(-want, kind="stable")[:6]
  np.testing.assert_allclose(
    cut.down.kernel.get_value()[0, 0], down[loudest], rtol=1e-6
  )


def test_kept_layers_are_the_model_of_these():
  short = surgery.keep_layers(model(), (0, 2, 3))
  assert short.config.layers == 3
  run = jax.tree.map(lambda a: a, model())
  run.layers = jax.tree.map(lambda a: a[np.array([0, 2, 3])], run.layers)
  np.testing.assert_allclose(
    short(TOKENS).logits, run(TOKENS).logits, rtol=0, atol=1e-6
  )
  assert short.empty_cache(1, 4).k.shape[1] == 3


@pytest.mark.parametrize("name", ["acm, ordered", "experts"])
def test_joined_parts_are_the_layer_again(name):
  whole = surgery.to_dense(CUTS[name](model()))
  assert surgery.exactness(model(), whole, TOKENS) < 1e-5
  shapes = lambda m: jax.tree.map(jnp.shape, jax.tree.leaves(m))
  assert shapes(whole) == shapes(model())


def test_half_precision():
  half = jax.tree.map(lambda a: a.astype(jnp.bfloat16), model())
  routed = surgery.to_mixture_of_depths(half)
  assert np.isfinite(np.asarray(routed(TOKENS).logits)).all()


def test_kernels_stored_otherwise_are_not_cut():
  with pytest.raises(ValueError, match="out_major"):
    surgery.to_acm(out_major(model()), 2)


def test_bad_input():
  with pytest.raises(ValueError, match="layer 0 is no ACM"):
    surgery.to_dense(model())
  with pytest.raises(ValueError, match="neurons"):
    surgery.to_acm(model(), 5)
  with pytest.raises(ValueError, match="divide"):
    surgery.to_mixture_of_depths(model(), every=3)
  with pytest.raises(ValueError, match="layers"):
    surgery.keep_layers(model(), (0, 4))
  routed = surgery.to_mixture_of_depths(model())
  with pytest.raises(ValueError, match="Block"):
    surgery.to_acm(routed)
