# SPDX-License-Identifier: Apache-2.0
"""What surgery promises: at its full budget the model says what it said.

Axes: B batch, T tokens.
"""

from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Int

from adaptivejax.nn.setting import Setting, adjust
from adaptivejax.nn.stack import FULL

M = TypeVar("M", bound=nnx.Module)
MOST = -1e3
"""A `Setting` at which everything runs."""


def full_budget(model: M) -> M:
  """The model with every `Setting` at its most generous; itself if none."""
  return adjust(model, MOST) if nnx.state(model, Setting) else model


def exactness(
  before, after, tokens: Int[Array | np.ndarray, "B T"], *, stack=FULL
) -> float:
  """The largest change of a logit by surgery, at its full budget.

  Args:
    before: the model as it was trained.
    after: made from it.
    tokens: a text to compare on.
    stack: how the layers of `after` run, at its own full budget.
  """
  return float(_gap(before, full_budget(after), jnp.asarray(tokens), stack))


@jax.jit
def _gap(before, after, tokens, stack):
  gap = before(tokens).logits - after(tokens, stack=stack).logits
  return jnp.abs(gap).max()
