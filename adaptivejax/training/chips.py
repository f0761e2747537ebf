# SPDX-License-Identifier: Apache-2.0
"""Accelerators by name, as their makers publish them; devices without hardware.

A topology is `chip:shape`: `v5e:16x16`, `v5p:8x8x8`, `h100:8`, and `cpu:8` for
fake devices of this machine.
"""

import importlib.util
import os
from dataclasses import dataclass

import jax
from jax.experimental import topologies

GB = 1e9
GIB = 2**30


@dataclass(frozen=True)
class Chip:
  """One accelerator.

  Attributes:
    platform: of JAX.
    flops: dense bf16 FLOPs in a second, at most.
    memory: bytes of HBM.
    bandwidth: bytes of HBM in a second.
    network: bytes that leave it in a second, over all its links.
  """

  platform: str
  flops: float
  memory: float
  bandwidth: float
  network: float


CHIPS = {
  "v4": Chip("tpu", 275e12, 32 * GIB, 1228 * GB, 300 * GB),
  "v5e": Chip("tpu", 197e12, 16 * GIB, 819 * GB, 200 * GB),
  "v5p": Chip("tpu", 459e12, 95 * GIB, 2765 * GB, 600 * GB),
  "v6e": Chip("tpu", 918e12, 32 * GIB, 1640 * GB, 448 * GB),
  "h100": Chip("cuda", 989e12, 80 * GB, 3352 * GB, 450 * GB),
  "cpu": Chip("cpu", 1e11, 8 * GIB, 20 * GB, 10 * GB),
}
"""Peaks of data sheets, as published at
https://cloud.google.com/tpu/docs/v4 (and v5e, v5p, v6e) and
https://www.nvidia.com/en-us/data-center/h100/ (SXM, without sparsity; NVLink in
one direction); those of `cpu` are of no particular machine."""


def devices_of(topology: str) -> tuple[Chip, list[jax.Device]]:
  """The chip, and the devices to compile for: none of them need be here.

  Raises:
    ValueError: there is no such topology, or no compiler for it is installed.
  """
  name, _, shape = topology.partition(":")
  if name not in CHIPS or not shape:
    raise ValueError(
      f"topology {topology!r} must be CHIP:SHAPE, such as v5e:4x4, with a chip"
      f" of {', '.join(CHIPS)}"
    )
  chip = CHIPS[name]
  make = {"tpu": _tpu, "cuda": _h100, "cpu": _cpu}[chip.platform]
  return chip, make(topology, shape)


def _tpu(topology: str, shape: str) -> list[jax.Device]:
  if importlib.util.find_spec("libtpu") is None:
    raise ValueError(
      "the compiler of TPUs is not installed: pip install 'adaptivejax[tpu]'"
      " (700 MB)"
    )
  os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
  os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
  try:
    found = topologies.get_topology_desc(platform="tpu", topology_name=topology)
  except Exception as error:
    reason = str(error).splitlines()[0]
    if "not installed" in reason:
      reason += ": pip install 'adaptivejax[tpu]'"
    raise ValueError(f"there is no topology {topology!r}: {reason}") from None
  return list(found.devices)


def _h100(topology: str, shape: str) -> list[jax.Device]:
  if not shape.isdigit() or not 1 <= int(shape) <= 8:
    raise ValueError(f"topology {topology!r}: one machine has 1 to 8 H100s")
  plugins = "jax_cuda13_plugin", "jax_cuda12_plugin"
  if not any(map(importlib.util.find_spec, plugins)):
    raise ValueError(
      "the compiler of GPUs is not installed: pip install 'adaptivejax[cuda]'"
      " (3 GB)"
    )
  os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
  try:
    found = topologies.get_topology_desc(
      "", platform="cuda", target_config=H100, topology=f"1x1x{shape}"
    )
  except Exception as error:
    raise ValueError(
      f"the compiler of GPUs does not start: {str(error).splitlines()[0]}"
    ) from None
  return list(found.devices)


def _cpu(topology: str, shape: str) -> list[jax.Device]:
  if not shape.isdigit() or int(shape) < 1:
    raise ValueError(f"topology {topology!r} must be cpu:COUNT")
  have = jax.devices("cpu")
  if int(shape) > len(have):
    raise ValueError(
      f"there are {len(have)} CPU devices, not {shape}: set"
      f" JAX_NUM_CPU_DEVICES={shape} before"
    )
  return have[: int(shape)]


H100 = """
gpu_device_info {
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472
  threads_per_core_limit: 2048
  core_count: 132
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000
  l2_cache_size: 52428800
  clock_rate_ghz: 1.98
  device_memory_size: 84929347584
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  cuda_compute_capability { major: 9 }
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 7 }
runtime_version { major: 12 minor: 8 patch: 0 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""
