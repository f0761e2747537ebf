# SPDX-License-Identifier: Apache-2.0
"""Law: a prompt is read by one look, what follows by the other."""

import jax.numpy as jnp
import numpy as np
import pytest

from adaptivejax.decode import generate
from adaptivejax.methods.attention import APE, DELTA, Quest, XAttention
from adaptivejax.methods.decode import SelfSpeculation
from adaptivejax.methods.kv import SnapKV, SpAtten, StreamingLLM
from adaptivejax.nn import (
  ByBlocks,
  ByPhase,
  Coded,
  Look,
  Watch,
  adjust,
  with_look,
)
from tests.methods import host

BLOCKS = {"block_q": 4, "block_kv": 4}


def prompt_of(look):
  model = with_look(host.model(), look)
  return model, model(host.TOKENS, model.empty_cache(host.B, host.T + 4))


def next_of(model, cache):
  return model(host.TOKENS[:, :1], cache).logits


def sparse():
  return XAttention(0.5, stride=2, **BLOCKS)


def test_each_look_has_its_phase():
  few = Quest(1, page=2, dense_layers=0)
  _, want = prompt_of(sparse())
  model, got = prompt_of(ByPhase(sparse(), few))
  np.testing.assert_array_equal(got.logits, want.logits)
  quest, dense = prompt_of(few)
  assert np.abs(got.logits - dense.logits).max() > 1e-3
  # behind the same prompt they go on alike, and not as all keys would
  after, same = next_of(quest, got.cache), next_of(model, got.cache)
  np.testing.assert_array_equal(same, after)
  whole, _ = prompt_of(Look())
  kept = got.cache._replace(memory=None)
  assert np.abs(same - next_of(whole, kept)).max() > 1e-3


def test_with_its_whole_budget_it_looks_at_all():
  both = ByPhase(XAttention(0.5, stride=2, **BLOCKS), Quest(host.T, page=2))
  model, want = prompt_of(Look())
  made = adjust(with_look(host.model(), both), jnp.float32(0))
  got = made(host.TOKENS, made.empty_cache(host.B, host.T + 4))
  np.testing.assert_allclose(got.logits, want.logits, rtol=1e-4, atol=1e-5)
  np.testing.assert_allclose(
    next_of(made, got.cache), next_of(model, want.cache), rtol=1e-4, atol=1e-5
  )


@pytest.mark.parametrize(
  "decode", [Coded(), DELTA((0,), pages=host.T, page=2), Quest(host.T, page=2)]
)
def test_rows_and_lengths_of_prompts_do_not_matter(decode):
  """Also a prompt of one token, and some shorter than a tile."""
  prefill = XAttention(1.0, stride=2, **BLOCKS)
  both = with_look(host.model(), ByPhase(prefill, decode))
  alone = with_look(host.model(), decode)
  lengths = [10, 1, 3][: host.B]
  got = generate(both, host.TOKENS, steps=5, lengths=lengths)
  want = generate(alone, host.TOKENS, steps=5, lengths=lengths)
  np.testing.assert_array_equal(got.tokens, want.tokens)


def test_drafts_are_refused():
  both = with_look(host.model(), ByPhase(sparse(), Look()))
  with pytest.raises(ValueError, match="ByPhase looks otherwise for one"):
    generate(both, host.TOKENS, steps=2, policy=SelfSpeculation(1, 1))


@pytest.mark.parametrize(
  ("prefill", "decode", "said"),
  [
    (Look(), Quest(2), "prefill=Look must be a SparsePrefill"),
    (ByBlocks(), SnapKV(4, window=2), "decode=SnapKV does not keep all keys"),
    (ByBlocks(), StreamingLLM(1, 4), "decode=StreamingLLM does not keep all"),
    (ByBlocks(), SpAtten(), "decode=SpAtten .* or remembers more than"),
    (ByBlocks(), Watch([], 2), "decode=Watch .* or remembers more than"),
    (ByBlocks(), APE(1, 2), "decode=APE .* or remembers more than"),
  ],
)
def test_refuses_looks_that_cannot_share_a_cache(prefill, decode, said):
  with pytest.raises(ValueError, match=said):
    ByPhase(prefill, decode)
