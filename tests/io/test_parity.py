# SPDX-License-Identifier: Apache-2.0
"""Law: a loaded model says what transformers said with the same weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import adaptivejax as aj
from adaptivejax.nn import every_layer
from tests.io import folders
from tests.io.folders import CASES, GOLDENS


@pytest.mark.parametrize("name", CASES)
def test_equals_transformers(name):
  want = folders.golden(name)
  model = aj.load(GOLDENS / name, dtype="float32").model
  tokens = want["tokens"].astype(np.int32)
  out = jax.jit(lambda m, t: m(t, stack=every_layer))(model, tokens)
  near = {"rtol": 1e-4, "atol": 1e-4}
  np.testing.assert_allclose(out.logits, want["logits"], **near)
  np.testing.assert_allclose(out.hidden, want["hidden"], **near)
  np.testing.assert_allclose(model.norm(out.hidden[-1]), want["final"], **near)


@pytest.mark.parametrize("name", CASES)
def test_a_cache_changes_nothing(name):
  want = folders.golden(name)
  model = aj.load(GOLDENS / name, dtype="float32").model
  tokens = want["tokens"].astype(np.int32)
  cache, begin, logits = model.empty_cache(2, 12), 0, []
  step = jax.jit(lambda m, tokens, cache: m(tokens, cache))
  for count in (8, 1, 1, 1, 1):
    out = step(model, tokens[:, begin : begin + count], cache)
    cache, begin = out.cache, begin + count
    logits.append(out.logits)
  np.testing.assert_allclose(
    jnp.concatenate(logits, 1), want["logits"], rtol=1e-4, atol=1e-4
  )
