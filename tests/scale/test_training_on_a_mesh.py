# SPDX-License-Identifier: Apache-2.0
"""Law: a run on a mesh is that on one device, and goes on on another mesh."""

import functools

from tests import program

PREAMBLE = """
import jax
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_compilation_cache_dir", ".cache/jax")
import dataclasses
import pathlib
import tempfile
import numpy as np
from adaptivejax.methods.experts import MixtralRouter
from adaptivejax.models import DecoderConfig, DecoderLM, decoder_block
from adaptivejax.nn import MixtureOfExperts, Mlp, stacked
from adaptivejax.training import DataConfig, OptimizerConfig, TrainConfig, train
from adaptivejax.training.mesh import MeshConfig
from adaptivejax.training.run import read_metrics
from adaptivejax.training.tasks import language_modeling
from tests.training import tiny

D, E = 16, 4
shape = DecoderConfig(layers=2, features=D, hidden=32, heads=4, kv_heads=4)

def build(rngs):
  def layer(rngs):
    one = lambda r: Mlp(D, 32, gated=True, rngs=r)
    router = MixtralRouter(D, E, rngs=rngs)
    mixture = MixtureOfExperts(router, stacked(one, E, rngs))
    return decoder_block(shape, rngs, mixture)
  return DecoderLM(shape, layer=layer, rngs=rngs)

folder = pathlib.Path(tempfile.mkdtemp())
config = TrainConfig(
  name="x", build=build, loss=language_modeling,
  data=DataConfig(
    corpus=str(tiny.write_corpus(folder / "text")), context=16, batch=8,
    validation=0.2,
  ),
  optimizer=OptimizerConfig(warmup=2, accumulate=2), steps=6, log_every=1,
  eval_every=3, eval_batches=2, checkpoint_every=3,
)

def losses(name, **fields):
  out = folder / name
  result = train(
    dataclasses.replace(config, **fields), out=out, progress=False
  )
  lines = read_metrics(out)
  return result, [l.get("loss", l.get("bits_per_byte")) for l in lines]
"""

run = functools.partial(program.run_in_subprocess, PREAMBLE, timeout=500)


def test_the_same_losses_and_another_mesh_after_a_stop():
  run("""
    losses("one", steps=3)
    _, want = losses("one")  # goes on
    mesh = MeshConfig(data=2, expert=2, model=2)
    part, _ = losses("mesh", steps=3, mesh=mesh)
    assert part.step == 3
    kernel = part.model.layers.mlp.experts.up.kernel.get_value()
    spec = tuple(kernel.sharding.spec)
    assert spec == (None, "expert", None, "model"), spec
    _, got = losses("mesh", mesh=MeshConfig(fsdp=2, model=4))
    np.testing.assert_allclose(got, want, rtol=2e-5)
  """)
