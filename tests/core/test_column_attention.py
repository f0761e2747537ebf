"""Law: blocks and columns are masked attention over their union."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from adaptivejax.core import attend_columns
from tests.methods import prompts
from tests.methods.prompts import BLOCK, PROMPTS, B, H

SIZES = {"block_q": BLOCK, "block_kv": BLOCK}
run = jax.jit(
  lambda *a, room: attend_columns(*a, **SIZES, room=room),
  static_argnames="room",
)


@pytest.mark.parametrize("name", PROMPTS)
@pytest.mark.parametrize("share", [(0.4, 0.3), (0, 0.3), (0.4, 0), (0, 0)])
def test_is_masked_attention_over_the_union(name, share):
  """Columns in listed blocks count once; who sees nothing gets 0."""
  p, rng = PROMPTS[name], np.random.default_rng(0)
  q, keys, at = p.arrays()
  shape = (B, H, -(-q.shape[1] // BLOCK), -(-keys.pos.shape[-1] // BLOCK))
  mask = rng.random(shape) < share[0]
  columns = rng.random((B, H, keys.pos.shape[-1])) < share[1]
  out, cost = run(q, keys, *map(jnp.asarray, (mask, columns)), at, room=None)
  want = prompts.masked(p, prompts.pairs(p, mask, columns))
  there = p.at >= 0
  np.testing.assert_allclose(out[there], want[there], atol=1e-5)
  assert (cost.spent > 0) == (sum(share) > 0)
  assert cost.spent <= cost.bound


def test_too_little_room_keeps_the_first_columns():
  p = PROMPTS["text"]
  q, keys, at = p.arrays()
  mask = jnp.zeros((B, H, 6, 6), bool)
  columns = np.zeros((B, H, 22), bool)
  columns[..., [1, 5, 9, 12]] = True
  out, _ = run(q, keys, mask, jnp.asarray(columns), at, room=2)
  columns[..., [9, 12]] = False
  want = prompts.masked(p, prompts.pairs(p, mask, columns))
  there = p.at >= 0
  np.testing.assert_allclose(out[there], want[there], atol=1e-5)
  with pytest.raises(ValueError, match="room=0"):
    attend_columns(q, keys, mask, jnp.asarray(columns), at, **SIZES, room=0)
