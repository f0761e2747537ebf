# SPDX-License-Identifier: Apache-2.0
"""Law: what a config says is used, of no consequence, or refused by name."""

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import adaptivejax as aj
from adaptivejax.io.architectures import BOOKKEEPING
from tests.io import folders
from tests.io.folders import CASES, GOLDENS

LLAMA_3 = {
  "rope_theta": 100.0,
  "rope_type": "llama3",
  "factor": 4.0,
  "low_freq_factor": 1.0,
  "high_freq_factor": 4.0,
  "original_max_position_embeddings": 64,
}


def said(folder):
  """The logits of the golden's tokens."""
  tokens = folders.golden(folder.name)["tokens"].astype(np.int32)
  model = aj.load(folder, dtype="float32").model
  return jax.jit(lambda m, t: m(t).logits)(model, tokens)


@pytest.mark.parametrize("name", CASES)
def test_an_unknown_field_is_refused(name, tmp_path):
  folder = folders.copy_of(name, tmp_path)
  folders.configure(folder, attn_logit_softcapping=50.0, quantization_config={})
  with pytest.raises(
    ValueError,
    match=r"attn_logit_softcapping=50\.0, quantization_config=\{\}, which",
  ):
    aj.load(folder)


REFUSED = {
  "llama": {
    "model_type": ["gpt2", None, ["llama"], 3],
    "hidden_act": ["swish", "relu2", None, 1],
    "rope_parameters": [
      {"rope_type": "yarn", "factor": 2.0},
      {"rope_type": "dynamic", "factor": 2.0},
      {"rope_type": "linear"},
      {"rope_type": "linear", "factor": 0.0},
      {"rope_type": "linear", "factor": 2.0, "beta_fast": 3},
      {"rope_type": "default", "partial_rotary_factor": 0.5},
      LLAMA_3 | {"low_freq_factor": 4.0},
      {k: v for k, v in LLAMA_3.items() if k != "high_freq_factor"},
      {"full_attention": {"rope_type": "default"}},
      [],
    ],
    "rope_theta": [10_000.0],  # not what rope_parameters says
    "rope_interleaved": [True],
    "partial_rotary_factor": [0.5],
    "head_dim": [7, 0, 10**9, "8", True, 4.0],
    "num_attention_heads": [0, 3, -4, 10**30, 4.0, None],
    "num_key_value_heads": [3, 0, True],
    "num_hidden_layers": [0, 10**9, 2.0, None],
    "hidden_size": [10**9, 0],
    "vocab_size": [97, 10**12],
    "rms_norm_eps": [0, -1e-6, "1e-6", None, True],
    "tie_word_embeddings": ["yes", 1],
    "attention_bias": [1, "true"],
    "sliding_window": [5],  # of Mistral
  },
  "qwen2_window": {
    "layer_types": [
      ["sliding_attention", "full_attention"],
      ["sliding_attention"],
      ["chunked_attention"] * 2,
      "sliding_attention",
    ],
    "sliding_window": [0, -3, 2.5],
    "use_sliding_window": ["no"],
  },
  "gemma": {
    "use_bidirectional_attention": [True],
    "hidden_activation": ["tanh"],
  },
  "mixtral": {
    "num_experts_per_tok": [0, 5, None],
    "num_local_experts": [None, 10**6],
    "num_experts": [3],  # and 4 local ones
    "router_aux_loss_coef": [-1, "a"],
  },
  "qwen3_moe": {
    "decoder_sparse_step": [2],
    "mlp_only_layers": [[0]],
    "norm_topk_prob": [0.5],
  },
}


@pytest.mark.parametrize(
  ("name", "field", "value"),
  [(n, f, v) for n, fs in REFUSED.items() for f, vs in fs.items() for v in vs],
)
def test_a_value_is_refused_by_the_field(name, field, value, tmp_path):
  folder = folders.copy_of(name, tmp_path)
  folders.configure(folder, **{field: value})
  with pytest.raises(ValueError) as error:
    aj.load(folder)
  inner = set(value) if isinstance(value, dict) else set()
  assert any(n in str(error.value) for n in (field, *inner)), error.value


@pytest.mark.parametrize("field", ["hidden_size", "vocab_size", "model_type"])
def test_what_must_be_said(field, tmp_path):
  folder = folders.copy_of("llama", tmp_path)
  config = folders.config_of(folder)
  del config[field]
  (folder / "config.json").write_text(folders.json.dumps(config))
  with pytest.raises(ValueError, match=f"(does not say `)?{field}"):
    aj.load(folder)


@pytest.mark.parametrize(
  "text", ["", "[]", "{", '{"a": 1, "a": 2}', '{"rms_norm_eps": NaN}', "\x00"]
)
def test_no_json(text, tmp_path):
  folder = folders.copy_of("llama", tmp_path)
  (folder / "config.json").write_text(text)
  with pytest.raises(ValueError, match=r"config\.json"):
    aj.load(folder)


def test_no_consequence(tmp_path):
  folder = folders.copy_of("mistral", tmp_path)
  model = aj.load(folder).model
  folders.configure(folder, **dict.fromkeys(BOOKKEEPING, 17))
  changed = aj.load(folder).model
  assert jax.tree.structure(model) == jax.tree.structure(changed)


@pytest.mark.parametrize(
  ("name", "fields"),
  [
    ("llama", {"rope_parameters": LLAMA_3 | {"factor": 2.0}}),
    ("llama", {"rope_parameters": LLAMA_3 | {"rope_theta": 50.0}}),
    ("llama", {"rms_norm_eps": 0.5}),
    ("llama", {"hidden_act": "gelu"}),
    ("llama_tied", {"hidden_act": "gelu_pytorch_tanh"}),
    ("llama_tied", {"rope_scaling": None}),
    ("mistral", {"sliding_window": 4}),
    ("mistral", {"sliding_window": None}),
    ("qwen2_window", {"use_sliding_window": False}),
    ("qwen3_moe", {"norm_topk_prob": False}),
    ("qwen3_moe", {"num_experts_per_tok": 2}),
    ("mixtral", {"sliding_window": 3}),
    ("gemma", {"hidden_act": "silu"}),
  ],
)
def test_of_consequence(name, fields, tmp_path):
  """Each of these is read: another value says something else."""
  folder = folders.copy_of(name, tmp_path)
  folders.configure(folder, **fields)
  assert abs(said(folder) - folders.golden(name)["logits"]).max() > 1e-3


@pytest.mark.parametrize(
  ("name", "fields"),
  [
    ("gemma", {"hidden_act": "gelu"}),  # as published, and as meant
    ("gemma", {"hidden_act": "gelu", "hidden_activation": None}),
    ("qwen2_window", {"layer_types": None}),  # `max_window_layers` says it
    ("mistral", {"head_dim": None}),
    (
      "llama",
      {"rope_parameters": None, "rope_theta": 100, "rope_scaling": LLAMA_3},
    ),
  ],
)
def test_other_words_for_the_same(name, fields, tmp_path):
  folder = folders.copy_of(name, tmp_path)
  folders.configure(folder, **fields)
  want = folders.golden(name)["logits"]
  np.testing.assert_allclose(said(folder), want, rtol=1e-4, atol=1e-4)


TEXT = (GOLDENS / "llama" / "config.json").read_bytes()


@settings(max_examples=60)
@given(
  st.lists(
    st.tuples(
      st.integers(0, len(TEXT) - 1),
      st.one_of(st.sampled_from(b'0123456789-e.",:[]{}'), st.integers(0, 255)),
    ),
    min_size=1,
    max_size=3,
  )
)
def test_any_config_is_read_or_refused(tmp_path_factory, edits):
  folder = tmp_path_factory.mktemp("spoilt")
  weights = (GOLDENS / "llama" / "model.safetensors").read_bytes()
  (folder / "model.safetensors").write_bytes(weights)
  text = bytearray(TEXT)
  for at, value in edits:
    text[at] = value
  (folder / "config.json").write_bytes(bytes(text))
  try:
    aj.load(folder)
  except ValueError as error:
    assert str(error)
