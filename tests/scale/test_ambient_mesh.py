# SPDX-License-Identifier: Apache-2.0
"""Law: under an ambient mesh a model is the model, and devices decide alone.

A bug here is a hang, so every program runs in a process of its own with a time
limit.
"""

import functools

from tests import program

PREAMBLE = """
import jax
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_compilation_cache_dir", ".cache/jax")
import re
import chex
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from adaptivejax import core

def ambient(**axes):
  kinds = (AxisType.Auto,) * len(axes)
  return jax.make_mesh(tuple(axes.values()), tuple(axes), axis_types=kinds)

close = lambda a, b: chex.assert_trees_all_close(a, b, rtol=1e-5, atol=1e-5)
"""

run = functools.partial(program.run_in_subprocess, PREAMBLE, timeout=400)


def test_each_device_computes_its_own_rows():
  """Some none, some all; the compiler shards inside of the branches."""
  run("""
    B, T, D, H = 8, 16, 8, 16
    draw = lambda i, *shape: jax.random.normal(jax.random.key(i), shape)
    x, w1, w2 = draw(0, B, T, D), draw(1, D, H), draw(2, H, D)
    share = jnp.linspace(0, 1, B)[:, None]
    mask = jax.random.uniform(jax.random.key(3), (B, T)) < share
    mask = mask.at[0].set(False).at[-1].set(True)
    f = lambda rows, w1, w2: jnp.tanh(rows @ w1) @ w2

    def loss(op):
      def of(x, mask, w1, w2):
        y, cost = op(f, x, mask, w1, w2)
        return (y ** 2).mean(), (y, cost)
      return jax.jit(jax.value_and_grad(of, (0, 2, 3), has_aux=True))

    (want, (y, price)), slopes = loss(core.masked)(x, mask, w1, w2)
    mesh = ambient(data=4, model=2)
    place = lambda a, *spec: jax.device_put(a, NamedSharding(mesh, P(*spec)))
    args = (place(x, "data"), place(mask, "data"), place(w1, None, "model"),
            place(w2, "model"))
    with jax.set_mesh(mesh):
      program = loss(core.bucketed)
      (got, (z, cost)), found = program(*args)
      hlo = program.lower(*args).compile().as_text()
    close((got, z, found), (want, y, slopes))
    assert cost.items == price.items and cost.full == price.full
    assert cost.capacity < 0.8 * B * T
    assert "conditional(" in hlo and " all-gather(" not in hlo
    # by hand, each device alone: the slots are the sum of theirs
    slots = sum(
      core.default_cover(2 * T).slots(part.sum()) for part in
      np.split(np.asarray(mask).reshape(4, -1), 4)
    )
    assert cost.capacity == slots

    flat, row = x[..., 0].reshape(-1), mask.reshape(-1)  # of one axis
    with jax.set_mesh(mesh):
      found = jax.jit(lambda a, m: core.bucketed(jnp.tanh, a, m)[0])(flat, row)
    close(found, core.masked(jnp.tanh, flat, row)[0])

    user = jax.shard_map(  # over another axis only: as it is written
      lambda *args: loss(core.bucketed)(*args)[1][0],
      in_specs=P(), out_specs=P(), axis_names={"model"}, check_vma=False,
    )
    with jax.set_mesh(mesh):
      close(jax.jit(user)(x, mask, w1, w2), slopes[0])

    try:
      with jax.set_mesh(jax.make_mesh((8,), ("data",))):
        core.bucketed(jnp.tanh, x, mask)
    except ValueError as error:
      assert "AxisType.Auto" in str(error), error
    else:
      raise AssertionError("explicit axes are not refused")

    alone = jax.jit(lambda x, mask: core.bucketed(jnp.tanh, x, mask)[0])
    with jax.set_mesh(mesh):  # three rows are not split over four devices
      close(alone(x[:3], mask[:3]), core.masked(jnp.tanh, x[:3], mask[:3])[0])
  """)


def test_sparse_prefill_and_decoding():
  """Gradients through lists that a look makes, and text from a cache."""
  run("""
    from adaptivejax import decode
    from adaptivejax.core.losses import cross_entropy
    from adaptivejax.methods.attention import Quest, XAttention
    from adaptivejax.models import DecoderConfig, DecoderLM
    from adaptivejax.nn import with_look

    config = DecoderConfig(
      vocab=13, layers=1, features=16, hidden=32, heads=4, kv_heads=4
    )
    model = DecoderLM(config, rngs=nnx.Rngs(0))
    tokens = jax.random.randint(jax.random.key(2), (8, 32), 0, 13)
    look = XAttention(0.6, stride=2, block_q=8, block_kv=8)
    sparse = with_look(model, look)

    def loss(model, tokens):
      logits = model(tokens).logits
      return cross_entropy(logits, tokens).mean()

    step = jax.jit(jax.value_and_grad(loss))
    want = step(sparse, tokens)
    paged = with_look(model, Quest(2, page=4, dense_layers=0))
    text = decode.generate(paged, tokens[:, :9], steps=6).tokens
    for axes in ({"data": 2, "model": 2, "seq": 2}, {"data": 4, "fsdp": 2}):
      with jax.set_mesh(ambient(**axes)):
        close(step(sparse, tokens), want)
        got = decode.generate(paged, tokens[:, :9], steps=6).tokens
      chex.assert_trees_all_equal(got, text)
  """)
