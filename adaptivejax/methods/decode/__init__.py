# SPDX-License-Identifier: Apache-2.0
"""Methods that spend fewer steps on a text."""

from adaptivejax.methods.decode.aded import ADED
from adaptivejax.methods.decode.entropy_adaptive import EntropyAdaptive
from adaptivejax.methods.decode.self_speculation import SelfSpeculation

__all__ = ["ADED", "EntropyAdaptive", "SelfSpeculation"]
