# SPDX-License-Identifier: Apache-2.0
"""A file for each promise that is a number; `python -m benchmarks` runs all."""
