# SPDX-License-Identifier: Apache-2.0
"""Law: on every split of eight devices a model is that of one device.

Its loss, its gradients, and what it decides: the tokens and experts of every
layer, the key blocks of every query.  A bug here is a hang, so every program
runs in a process of its own with a time limit.
"""

import functools

from tests import program

PREAMBLE = """
import jax
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_compilation_cache_dir", ".cache/jax")
import chex
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from adaptivejax import core
from adaptivejax.core.losses import cross_entropy
from adaptivejax.core.per_device import BATCH_AXES
from adaptivejax.methods.attention import MoBA
from adaptivejax.methods.depth import MixtureOfDepths
from adaptivejax.methods.experts import MixtralRouter
from adaptivejax.models import DecoderConfig, DecoderLM, decoder_block
from adaptivejax.nn import (
  Attention, Look, MixtureOfExperts, Mlp, apply_masked_experts, routing_trace,
  stacked,
)
from adaptivejax.nn.experts import mlp_specs
from adaptivejax.training.mesh import MeshConfig, make_mesh, shardings
from adaptivejax.training.step import split

def ambient(**axes):
  kinds = (AxisType.Auto,) * len(axes)
  return jax.make_mesh(tuple(axes.values()), tuple(axes), axis_types=kinds)

close = lambda a, b: chex.assert_trees_all_close(a, b, rtol=1e-5, atol=1e-5)
draw = lambda i, *shape: jax.random.normal(jax.random.key(i), shape)

def on(mesh, tree, *spec):
  return jax.device_put(tree, NamedSharding(mesh, P(*spec)))

def rows_of(axes):
  return tuple(name for name in axes if name in BATCH_AXES)

D, E, B, T, block = 16, 8, 8, 32, 4
config = DecoderConfig(
  vocab=16, layers=2, features=D, hidden=32, heads=4, kv_heads=2
)
tokens = jax.random.randint(jax.random.key(2), (B, T), 0, 16)
"""

run = functools.partial(program.run_in_subprocess, PREAMBLE)

SPLITS = [
  {"data": 8},
  {"fsdp": 8},
  {"expert": 8},
  {"model": 8},  # more than there are heads
  {"seq": 8},
  {"data": 2, "seq": 2, "model": 2},
  {"fsdp": 4, "expert": 2},
  {"expert": 2, "seq": 2, "model": 2},
]


def test_every_split_is_one_device():
  """Experts, skipped tokens and chosen blocks, in one decoder.

  Parameters lie where the rules of training put them.
  """
  run(
    f"""
    class Told(MoBA):
      "Says by its penalty, in whole numbers, which blocks it chose."
      def find(self, q, keys, summaries, positions, slots, x=None):
        looked = super().find(q, keys, summaries, positions, slots, x)
        chosen = self.choose(q, summaries, slots)  # [B, H, T, N]
        h, t, n = (jnp.arange(size) for size in chosen.shape[1:])
        place = 31 * h[:, None, None] + 17 * t[:, None] + 7 * n
        mark = ((chosen + 1) * (place % 61)).sum((1, 2, 3))
        return looked._replace(penalty=mark.astype(jnp.float32).mean())

    def layer(rngs):
      one = lambda r: Mlp(D, 32, gated=True, rngs=r)
      router = MixtralRouter(D, E, rngs=rngs)
      mixture = MixtureOfExperts(router, stacked(one, E, rngs))
      block_of = decoder_block(config, rngs, mixture, look=Told(block, 3))
      return MixtureOfDepths(block_of, D, rngs=rngs)

    model = DecoderLM(config, layer=layer, rngs=nnx.Rngs(0))
    join, params = split(model)

    def loss(params, tokens):
      def of(params):
        out = join(params)(tokens, stack=routing_trace)
        told = {{
          "experts": out.notes,  # NOBODY where a token is skipped
          "blocks": out.signals.penalty,
          "items": out.cost.items,
        }}
        nats = cross_entropy(out.logits, tokens).mean()
        return nats, (told, out.logits, out.cost)
      return jax.value_and_grad(of, has_aux=True)(params)

    (want, (told, logits, price)), slopes = jax.jit(loss)(params, tokens)
    skipped = (told["experts"] < 0).all(-1).mean()
    assert 0.1 < skipped < 0.9, skipped

    for axes in {SPLITS}:
      print(axes, flush=True)
      plan = MeshConfig(**axes)
      mesh = make_mesh(plan)
      where = shardings({{"params": params}}, plan, mesh)["params"]
      args = jax.device_put(params, where), on(mesh, tokens, BATCH_AXES)
      with jax.set_mesh(mesh):
        step = jax.jit(loss, out_shardings=(None, where)).lower(*args).compile()
        (got, (found, values, cost)), d = step(*args)
      chex.assert_trees_all_equal(found, told)
      close((got, values, d), (want, logits, slopes))
      assert abs(cost.full / price.full - 1) < 1e-5 and cost.dropped == 0
      hlo = step.as_text()
      gathers = [l for l in hlo.splitlines() if " all-gather(" in l]
      if axes.get("expert", 1) > 1:
        assert " all-to-all(" in hlo
      if "seq" in axes:
        assert " collective-permute(" in hlo
      # no token goes to a device that need not have it
      wide = [f"[{{B // n}},{{T}},{{D}}]" for n in (1, 2, 4, 8)]
      assert not any(w in line for w in wide for line in gathers), gathers
  """,
    timeout=500,
  )


def test_shards_of_different_budgets_do_their_own_work_only():
  """Rows counted as they run, on each device: those of its own cover."""
  run("""
    x, w = draw(0, 8, 64, D), draw(1, D, D)
    share = jnp.array([0, 0, 0.02, 0.1, 0.25, 0.5, 0.9, 1])[:, None]
    mask = jax.random.uniform(jax.random.key(3), (8, 64)) < share
    done = np.zeros(8, int)

    def note(device, rows):
      done[int(device)] += int(rows)

    def f(rows, w):
      jax.debug.callback(note, jax.lax.axis_index("data"), rows.shape[0])
      return jnp.tanh(rows @ w)

    def loss(x, w):
      y, cost = core.bucketed(f, x, mask, w)
      return (y ** 2).sum(), cost

    with jax.set_mesh(ambient(data=8)):
      (_, cost), _ = jax.jit(
        jax.value_and_grad(loss, (0, 1), has_aux=True)
      )(x, w)
    jax.effects_barrier()
    cover = core.default_cover(64)
    own = np.array([cover.slots(row.sum()) for row in mask])
    assert cost.capacity == own.sum()
    assert (done == 2 * own).all(), (done, own)  # forward and backward
    assert done[0] == done[1] == 0 and done[7] == 2 * 64
  """)


def test_penalties_of_looks_are_means_over_rows():
  """Values and gradients, however many devices share the rows."""
  run("""
    class Owing(Look):
      "Each row owes what its queries are large; all owe 3 besides."
      def __call__(self, q, *args, **asked):
        looked = super().__call__(q, *args, **asked)
        return looked._replace(penalty=(q ** 2).sum((1, 2, 3)).mean() + 3)

    class Fined(Look):
      def __call__(self, *args, **asked):
        return super().__call__(*args, **asked)._replace(penalty=3.0)

    place = jnp.broadcast_to(jnp.arange(T), (B, T))
    x = draw(0, B, T, D) * jnp.arange(1, 1 + B)[:, None, None] / B
    for look in (Owing(), Fined()):
      attention = Attention(D, 4, look=look, rngs=nnx.Rngs(0))

      def owed(attention, x):
        return attention(x, place[: len(x)])[3]

      step = jax.jit(jax.value_and_grad(owed, (0, 1)))
      for rows, axes in (
        (B, {"data": 8}),
        (B, {"data": 2, "fsdp": 2, "expert": 2}),
        (B, {"data": 4, "seq": 2}),
        (6, {"data": 2, "fsdp": 4}),  # does not divide them
      ):
        want = step(attention, x[:rows])
        with jax.set_mesh(ambient(**axes)):
          close(step(attention, x[:rows]), want)
      assert want[0] >= 3
  """)


def test_masked_experts_are_where_they_lie():
  """Any number of experts of an item; their weights do not travel."""
  run("""
    x, weights = draw(0, B, 6, D), draw(1, B, 6, E)
    mask = jax.random.uniform(jax.random.key(2), (B, 6, E)) < 0.3
    mask = mask.at[0].set(False).at[1].set(True)

    def loss(experts, x, weights):
      y, cost = apply_masked_experts(
        experts, x, mask, weights, cover=core.tiles(48)
      )
      return (y ** 2).mean(), (y, cost)

    step = jax.value_and_grad(loss, (0, 1, 2), has_aux=True)
    for axes, bias in (
      ({"data": 2, "expert": 4}, True),
      ({"expert": 2, "seq": 2, "model": 2}, False),
      ({"data": 4, "model": 2}, True),
    ):
      one = lambda r: Mlp(D, 32, gated=True, bias=bias, rngs=r)
      experts, mesh = stacked(one, E, nnx.Rngs(0)), ambient(**axes)
      (want, (y, price)), slopes = jax.jit(step)(experts, x, weights)
      specs = mlp_specs(
        experts, "expert" if "expert" in axes else None,
        "model" if "model" in axes and not bias else None,
      )
      place = lambda a, spec: jax.device_put(a, NamedSharding(mesh, spec))
      held = jax.tree.map(place, experts, specs)
      args = held, *on(mesh, (x, weights), rows_of(axes))
      with jax.set_mesh(mesh):
        program = jax.jit(step).lower(*args).compile()
        (got, (found, cost)), d = program(*args)
      close((got, found, d), (want, y, slopes))
      assert cost.items == price.items == mask.sum() and cost.dropped == 0
      assert abs(cost.full / price.full - 1) < 1e-5
      hlo = program.as_text()
      if "expert" in axes:
        assert " all-to-all(" in hlo
        gathers = [l for l in hlo.splitlines() if " all-gather(" in l]
        assert not any(f"f32[{E}," in line for line in gathers), gathers
  """)
