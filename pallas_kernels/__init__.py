# SPDX-License-Identifier: Apache-2.0
"""Pallas kernels for TPU and GPU; stands alone on jax.

One folder for each operation: `reference.py` is its meaning in plain jax.numpy,
`tpu.py` and `gpu.py` are the kernels, `specs.py` lists the shapes that tests,
benchmarks and tuning share, `tuned.py` holds the tuned tiles.  Nothing here
imports flax or adaptivejax; adaptivejax reaches a kernel through its core only,
where `jax.lax.platform_dependent` chooses between kernel and reference.
"""
