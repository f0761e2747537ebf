# SPDX-License-Identifier: Apache-2.0
"""How what a device does grows as the job grows.

Weak scaling: as many devices as there are times the batch.  No figure is a
time.  `devices` compiles the train step of a small model for 1, 2, 4 and 8 fake
CPU devices, split by one mesh axis: FLOPs and bytes received by a device, its
collectives, and what the model's own `Cost` says a device spent when it ran.
FLOPs are those of one device for all, or a device does another's work.

`pods` compiles a model for slices of TPU pods, of 8 to 1024 chips and more, by
the real compiler (`pip install 'adaptivejax[aot-tpu]'`; left out without).
Parameters are split over at most 16 devices, the batch over all.  FLOPs again
are the same on every slice, and no loop is of unknown length.

    python -m benchmarks.scaling --cases 'devices *' --json out.json
"""

import dataclasses
import functools
import importlib.util
import sys
from collections.abc import Iterator
from typing import Any

import jax
from flax import nnx
from jax.sharding import NamedSharding

from adaptivejax.methods.depth import MixtureOfDepths
from adaptivejax.methods.experts import MixtralRouter
from adaptivejax.models import DecoderConfig, DecoderLM, decoder_block
from adaptivejax.nn import Block, Group, MixtureOfExperts, Mlp, stacked
from adaptivejax.training import DataConfig, TrainConfig, aot
from adaptivejax.training.mesh import MeshConfig, batch_spec, make_mesh
from adaptivejax.training.tasks import language_modeling
from benchmarks.harness import Options, Row, main

DEVICES = (1, 2, 4, 8)
TOPOLOGIES = ("v5e:2x4", "v5e:8x8", "v5e:16x16", "v5p:8x8x16", "v5p:16x16x16")
SMALL = DecoderConfig(layers=2, features=64, hidden=256, heads=4, kv_heads=4)
LARGE = DecoderConfig(
  vocab=32_768,
  layers=16,
  features=1024,
  hidden=4096,
  heads=8,
  kv_heads=8,
  gated=True,
  tied=False,
)
EVEN = 1.02
"""Work of a device, against that of one alone, at most."""


def depths(model: DecoderConfig, rngs: nnx.Rngs) -> Group:
  """Two layers, the second on an eighth of the tokens."""
  first, second = decoder_block(model, rngs), decoder_block(model, rngs)
  second = MixtureOfDepths(second, model.features, capacity=0.125, rngs=rngs)
  return Group([first, second])


def experts(model: DecoderConfig, rngs: nnx.Rngs) -> Block:
  """A layer of eight experts, of which a token runs two."""
  make = lambda rngs: Mlp(model.features, model.hidden // 2, rngs=rngs)
  router = MixtralRouter(model.features, 8, rngs=rngs)
  mixture = MixtureOfExperts(router, stacked(make, 8, rngs))
  return decoder_block(model, rngs, mixture)


LAYERS = {"data": depths, "fsdp": depths, "expert": experts}
"""The layer that each axis is tried with."""


def config(
  model: DecoderConfig, layer, batch: int, context: int, mesh: MeshConfig
) -> TrainConfig:
  make = functools.partial(layer, model)
  return TrainConfig(
    name="scaling",
    build=lambda rngs: DecoderLM(model, layer=make, rngs=rngs),
    loss=language_modeling,
    data=DataConfig(context=context, batch=batch),
    mesh=mesh,
  )


def spent(run: TrainConfig, devices: int) -> float:
  """FLOPs of a device, by the cost that the model returns."""
  mesh = make_mesh(run.mesh, jax.devices("cpu")[:devices])
  model = run.build(nnx.Rngs(run.seed))
  shape = run.data.batch, run.data.context
  tokens = jax.random.randint(jax.random.key(0), shape, 0, 256)
  with jax.set_mesh(mesh):
    placed = jax.device_put(tokens, NamedSharding(mesh, batch_spec()))
    ask = lambda model, tokens: model(tokens, key=jax.random.key(1)).cost
    return float(jax.jit(ask)(model, placed).spent) / devices


def device_rows(axis: str, sizes: tuple[int, ...]) -> Iterator[Row]:
  """One mesh axis of 1 to 8 devices, a batch of four rows on each."""
  alone: dict[str, float] = {}
  for count in sizes:
    split: dict[str, Any] = {axis: count}
    mesh = MeshConfig(**split)
    run = config(SMALL, LAYERS[axis], 4 * count, 64, mesh)
    found = aot.compile_step(run, f"cpu:{count}")
    work = {"compiled": found.flops, "Cost": spent(run, count)}
    case = f"devices {axis} {count}"
    for name, flops in work.items():
      alone.setdefault(name, flops)
      yield figure(case, f"MFLOPs of one, {name}", flops / 1e6)
      if count > 1:
        ratio = flops / alone[name]
        yield figure(case, f"to one alone, {name}", ratio, EVEN)
    yield from sent_rows(case, found)


def sent_rows(case: str, found: aot.Compiled) -> Iterator[Row]:
  """What a device receives in a step."""
  total = sum(c.bytes for c in found.collectives)
  yield figure(case, "MB received by one", total / 1e6)
  count = sum(c.count for c in found.collectives)
  yield figure(case, "collectives of a step", count)
  sites = sum(c.sites for c in found.collectives)
  yield figure(case, "collectives in the text", sites)


def pod_rows(layer: str, topologies: tuple[str, ...]) -> Iterator[Row]:
  """A model for slices of pods, two sequences of 1024 on each chip."""
  from adaptivejax.training.chips import devices_of

  first = 0.0
  for topology in topologies:
    count = len(devices_of(topology)[1])
    split: dict[str, Any] = {layer: min(count, 16) if layer == "fsdp" else 8}
    mesh = MeshConfig(data=-1, **split)
    run = config(LARGE, LAYERS[layer], 2 * count, 1024, mesh)
    run = dataclasses.replace(run, precision="bfloat16")
    found = aot.compile_step(run, topology)
    case = f"pods {layer} {topology}"
    yield Row.of(case, "chips", [count])
    yield figure(case, "GFLOPs of one", found.flops / 1e9)
    if first:
      ratio = found.flops / first
      yield figure(case, "off the first slice", max(ratio, 1 / ratio), EVEN)
    first = first or found.flops
    yield figure(case, "loops of unknown length", found.work.unknown, 0)
    yield figure(case, "GB held by one", found.held / 1e9)
    yield from sent_rows(case, found)
    yield figure(case, "compiled in, s", found.compile_seconds)


def figure(
  case: str, metric: str, value: float, target: float | None = None
) -> Row:
  return Row.of(case, metric, [value], target=target, better="lower")


CASES = {
  f"devices {axis}": functools.partial(device_rows, axis, DEVICES)
  for axis in LAYERS
} | {
  f"pods {layer}": functools.partial(pod_rows, layer, TOPOLOGIES)
  for layer in ("fsdp", "expert")
}


def rows(options: Options) -> Iterator[Row]:
  """`--quick`: one and two devices, one axis."""
  jax.config.update("jax_num_cpu_devices", max(DEVICES))
  jax.config.update("jax_platforms", "cpu")
  names = options.select(CASES)
  if options.quick:
    yield from device_rows("fsdp", (1, 2))
    return
  have = importlib.util.find_spec("libtpu") is not None
  for name in names:
    if name.startswith("pods") and not have:
      print(
        f"{name}: no libtpu: pip install 'adaptivejax[aot-tpu]'",
        file=sys.stderr,
      )
      continue
    yield from CASES[name]()


if __name__ == "__main__":
  main(__doc__, rows)
