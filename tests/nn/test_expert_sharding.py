# SPDX-License-Identifier: Apache-2.0
"""Law: a model whose experts are spread over eight devices is the model."""

import functools

import jax
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AbstractMesh

from adaptivejax.nn import (
  MixtureOfExperts,
  Mlp,
  Router,
  expert_specs,
  shard_experts,
  stacked,
)
from tests import program

PREAMBLE = """
import jax
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_compilation_cache_dir", ".cache/jax")
import functools
import chex
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from adaptivejax import core
from adaptivejax.models import DecoderConfig, DecoderLM, decoder_block
from adaptivejax.nn import (
  MixtureOfExperts, Mlp, Router, Routing, expert_specs, shard_experts, stacked
)

E, D, F, B, T = 8, 8, 16, 8, 4

class TopTwo(nnx.Module):
  def __init__(self, rngs):
    self.scorer = Router(D, E, rngs=rngs)

  def __call__(self, x, live, key):
    weights, experts = jax.lax.top_k(jax.nn.softmax(self.scorer(x)), 2)
    zero = 0 * weights.sum()
    return Routing(experts, weights, zero, zero)

def mixture(rngs):
  experts = stacked(lambda r: Mlp(D, F, gated=True, rngs=r), E, rngs)
  return MixtureOfExperts(TopTwo(rngs), experts, Mlp(D, F, rngs=rngs))

names = ("data", "expert", "model")
mesh = jax.make_mesh((2, 2, 2), names, axis_types=(AxisType.Auto,) * 3)
rows = P(("data", "expert"))
close = functools.partial(chex.assert_trees_all_close, rtol=1e-5, atol=1e-5)
x = jax.random.normal(jax.random.key(0), (B, T, D))
live = jax.random.uniform(jax.random.key(1), (B, T)) < 0.7
tokens = jax.random.randint(jax.random.key(2), (B, T), 0, 13)
"""

run = functools.partial(program.run_in_subprocess, PREAMBLE)


def layer():
  experts = stacked(lambda r: Mlp(4, 6, rngs=r), 6, nnx.Rngs(0))
  return MixtureOfExperts(Router(4, 6, rngs=nnx.Rngs(1)), experts)


def test_a_layer_and_a_stacked_model_inside_shard_map():
  run("""
    whole = mixture(nnx.Rngs(0))
    local = shard_experts(whole, "expert", width="model", chunks=2)

    def spread_call(model, x, live):
      y, cost, signals = model(x, live)
      over = ("data", "expert")
      return y, jax.lax.psum((cost, signals.load), over), signals.choices

    y, (cost, loads), choices = jax.jit(jax.shard_map(
      spread_call,
      mesh=mesh,
      in_specs=(expert_specs(local, mesh), rows, rows),
      out_specs=(rows, P(), rows),
    ))(local, x, live)
    wanted, want, signals = jax.jit(lambda m, *a: m(*a))(whole, x, live)
    close(y, wanted)
    close((loads, choices), (signals.load, signals.choices))
    assert cost.items == want.items

    config = DecoderConfig(
      vocab=13, layers=2, features=D, hidden=F, heads=2, kv_heads=2
    )
    layer = lambda rngs: decoder_block(config, rngs, mixture(rngs))
    model = DecoderLM(config, layer=layer, rngs=nnx.Rngs(0))
    local = shard_experts(model, "expert", width="model")

    def loss(model, tokens, axes=()):
      out = (jnp.sin(model(tokens).logits)).sum()
      return jax.lax.psum(out, axes) if axes else out

    over = jax.shard_map(
      functools.partial(loss, axes=("data", "expert")),
      mesh=mesh,
      in_specs=(expert_specs(local, mesh), rows),
      out_specs=P(),
    )
    got = jax.jit(jax.value_and_grad(over))(local, tokens)
    want = jax.jit(jax.value_and_grad(loss))(model, tokens)
    leaves = lambda pair: jax.tree.leaves(pair)
    close(leaves(got), leaves(want))
  """)


def test_the_compiler_spreads_a_layer_that_is_not():
  """`jit` with the same layout: right, if dear."""
  run("""
    whole = mixture(nnx.Rngs(0))
    specs = expert_specs(shard_experts(whole, "expert", width="model"), mesh)
    place = lambda spec: NamedSharding(mesh, spec)
    over = [place(s) for s in jax.tree.leaves(specs)]
    over = jax.tree.unflatten(jax.tree.structure(whole), over)
    loss = lambda m, x: jnp.sin(m(x, live)[0]).sum()
    step = jax.value_and_grad(loss, (0, 1))
    sharded = jax.jit(step, in_shardings=(over, place(rows)))
    close(sharded(whole, x), jax.jit(step)(whole, x))
  """)


def test_what_cannot_be_spread_is_refused_before_tracing():
  mesh = AbstractMesh((2, 4), ("data", "expert"))
  specs = lambda *args, **kwargs: expert_specs(
    shard_experts(*args, **kwargs), mesh
  )
  with pytest.raises(ValueError, match="6 experts .* 4 devices .*'expert'"):
    specs(layer(), "expert")
  with pytest.raises(ValueError, match="6 hidden features .* 4 devices"):
    specs(layer(), "data", width="expert")
  with pytest.raises(ValueError, match=r"no axes \['model'\]"):
    specs(layer(), "data", width="model")
  with pytest.raises(ValueError, match="no `MixtureOfExperts` in this Router"):
    shard_experts(layer().router, "expert")


def test_the_layer_itself_is_left_as_it_was():
  whole = layer()
  local = shard_experts(whole, ("data", "expert"), chunks=2)
  assert whole.over is None
  assert local.over is not None and local.over.chunks == 2
  chosen = zip(jax.tree.leaves(whole), jax.tree.leaves(local), strict=True)
  assert all(np.array_equal(a, b) for a, b in chosen)
