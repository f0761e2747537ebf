# SPDX-License-Identifier: Apache-2.0
"""Law: a sequence that eight devices share is the sequence on one."""

import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from adaptivejax.core.attention import Keys
from adaptivejax.core.linear_attention import (
  attend_linear,
  linear_attention_sharded,
)
from pallas_kernels.linear_attention import linear_attention, reference

B, H, G, D, E = 2, 4, 2, 8, 6
DEVICES, EACH = 8, 24
T = DEVICES * EACH
CASES = ("plain", "by head", "by token", "segments", "segments at borders")


def arrays(case):
  keys = jax.random.split(jax.random.key(0), 5)
  normal = lambda key, *shape: jax.random.normal(key, shape)
  q, k = normal(keys[0], B, H, T, D), normal(keys[1], B, G, T, D)
  v, state = normal(keys[2], B, G, T, E), normal(keys[3], B, H, D, E)
  decay, segment = jnp.full((1, 1, T), -1e-3), jnp.zeros((B, T), jnp.int32)
  noise = jax.random.uniform(keys[4], (B, H, T))
  if case == "by head":
    decay = jnp.broadcast_to(-0.2 * noise[:1, :, :1], (1, H, T))
  if case == "by token":
    decay = jnp.where(noise > 0.97, -99.0, -0.1 * noise)
  if case == "segments":
    cuts = jnp.array([[5, 70, 71, T], [23, 25, 180, T]])
    segment = (jnp.arange(T) >= cuts[..., None]).sum(1)
  if case == "segments at borders":
    segment = jnp.arange(T)[None] // jnp.array([[EACH], [2 * EACH]]) % 2
  return q, k, v, decay, segment.astype(jnp.int32), state


def run(f, q, k, v, decay, segment, state):
  """Both results and the gradients of all that moves."""

  def loss(moving):
    q, k, v, decay, state = moving
    out, end = f(q, k, v, decay, segment, state)
    return jnp.sin(out).sum() + jnp.sin(end).sum(), (out, end)

  moving = q, k, v, decay, state
  (_, results), gradients = jax.value_and_grad(loss, has_aux=True)(moving)
  return results, gradients


def main():
  """On eight devices; prints which case it is at, for a deadlock."""
  mesh = jax.make_mesh((DEVICES,), ("time",), axis_types=(AxisType.Auto,))
  time, rows = P(None, None, "time"), P(None, "time")
  shared = jax.shard_map(
    lambda *a: linear_attention_sharded(*a, axis="time", chunk=16),
    mesh=mesh,
    in_specs=(time, time, time, time, rows, P()),
    out_specs=(time, P()),
  )
  for case in CASES:
    print(case, flush=True)
    given = arrays(case)
    got = jax.jit(lambda *a: run(shared, *a))(*given)
    want = jax.jit(lambda *a: run(linear_attention, *a))(*given)
    check = lambda a, b: np.testing.assert_allclose(
      a, b, atol=2e-5 * max(1, float(abs(b).max()))
    )
    jax.tree.map(check, got, want)
    out, end = reference.recurrent(*given)
    check(got[0][0], out)
    check(got[0][1], end)


def test_eight_devices_share_a_sequence():
  """In a process of its own: a mistake here is a deadlock."""
  command = [
    sys.executable,
    "-c",
    "import tests.conftest; from tests.core import test_linear_attention as t;"
    " t.main()",
  ]
  try:
    done = subprocess.run(
      command,
      cwd=Path(__file__).parents[2],
      timeout=300,
      capture_output=True,
      text=True,
    )
  except subprocess.TimeoutExpired as error:
    pytest.fail(f"deadlock, after these cases:\n{error.stdout}")
  assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]


@pytest.mark.parametrize("tokens", [1, 20])
def test_tokens_that_are_not_there_pass_the_state_on(tokens):
  """As if the others were alone; NaN in them goes nowhere."""
  key = jax.random.split(jax.random.key(1), 4)
  q = jax.random.normal(key[0], (1, tokens, H, D))
  k = jax.random.normal(key[1], (1, G, tokens, D))
  v = jax.random.normal(key[2], (1, G, tokens, E))
  state = jax.random.normal(key[3], (1, H, D, E))
  decay = jnp.full((1, 1, 1), -0.3)
  there = np.arange(tokens) % 4 == 2
  pos = jnp.where(there, jnp.arange(tokens), -1)[None, None]
  q = jnp.where(there[None, :, None, None], q, jnp.nan)
  k, v = (jnp.where(there[:, None], a, jnp.nan) for a in (k, v))
  out, end = attend_linear(q, Keys(k, v, pos), decay, state, chunk=16)
  few = jnp.moveaxis(q, 1, 2)[:, :, there], k[:, :, there], v[:, :, there]
  if there.any():
    want, last = reference.recurrent(*few, decay, None, state)
    np.testing.assert_allclose(
      out[:, there], jnp.moveaxis(want, 2, 1), atol=1e-5
    )
  else:
    last = state
  np.testing.assert_allclose(end, last, atol=1e-5)
  assert not out[:, ~there].any()
