# SPDX-License-Identifier: Apache-2.0
"""Methods that spend compute on fewer units of a layer."""

from adaptivejax.methods.width.adaptive_computation_modules import (
  AdaptiveComputationModule,
)
from adaptivejax.methods.width.core_infer import CoreInfer, core_of

__all__ = ["AdaptiveComputationModule", "CoreInfer", "core_of"]
