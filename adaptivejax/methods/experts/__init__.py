# SPDX-License-Identifier: Apache-2.0
"""Methods that spend compute on some experts of many."""

from adaptivejax.methods.experts.tutel import TutelRouter, tutel_capacity

__all__ = ["TutelRouter", "tutel_capacity"]
