# SPDX-License-Identifier: Apache-2.0
"""Adaptive computation for JAX: spend compute only where it is worth it."""

__version__ = "0.1.0"
