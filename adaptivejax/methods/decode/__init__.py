# SPDX-License-Identifier: Apache-2.0
"""Methods that spend fewer steps on a text."""

from adaptivejax.methods.decode.aded import ADED

__all__ = ["ADED"]
