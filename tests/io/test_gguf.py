# SPDX-License-Identifier: Apache-2.0
"""Law: a Llama in a GGUF file is the one in the folder it was made of."""

import struct

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

import adaptivejax as aj
from adaptivejax.io.gguf_header import read_gguf
from adaptivejax.io.gguf_tokenizer import tokenizer_files
from tests.io import folders

D, F, H, G, V, L = 64, 96, 4, 2, 32, 2
TOKENS = jnp.arange(10)[None] * 3 % V
CONFIG = {
  "model_type": "llama",
  "hidden_size": D,
  "intermediate_size": F,
  "num_attention_heads": H,
  "num_key_value_heads": G,
  "num_hidden_layers": L,
  "vocab_size": V,
  "rms_norm_eps": 1e-5,
  "rope_theta": 500.0,
}
NAMES = {
  "self_attn.q_proj": ("attn_q", (D, D)),
  "self_attn.k_proj": ("attn_k", (D // H * G, D)),
  "self_attn.v_proj": ("attn_v", (D // H * G, D)),
  "self_attn.o_proj": ("attn_output", (D, D)),
  "mlp.gate_proj": ("ffn_gate", (F, D)),
  "mlp.up_proj": ("ffn_up", (F, D)),
  "mlp.down_proj": ("ffn_down", (D, F)),
  "input_layernorm": ("attn_norm", (D,)),
  "post_attention_layernorm": ("ffn_norm", (D,)),
}


def weights(tied=False):
  """`{name: (name in GGUF, values)}`"""
  random = np.random.default_rng(0)
  draw = lambda *shape: random.standard_normal(shape, np.float32) / 8
  found = {
    "model.embed_tokens.weight": ("token_embd.weight", draw(V, D)),
    "model.norm.weight": ("output_norm.weight", 1 + draw(D)),
  }
  if not tied:
    found["lm_head.weight"] = ("output.weight", draw(V, D))
  for layer in range(L):
    for ours, (theirs, shape) in NAMES.items():
      name = f"model.layers.{layer}.{ours}.weight"
      found[name] = f"blk.{layer}.{theirs}.weight", draw(*shape)
  return found


def interleaved(rows, heads):
  """Feature i and i + W/2 of a head become neighbours, as llama.cpp wants."""
  out = np.empty_like(rows)
  width = len(rows) // heads
  for head in range(heads):
    for i in range(width):
      j = 2 * i if i < width // 2 else 2 * (i - width // 2) + 1
      out[head * width + j] = rows[head * width + i]
  return out


def metadata(writer):
  writer.add_block_count(L)
  writer.add_context_length(128)
  writer.add_embedding_length(D)
  writer.add_feed_forward_length(F)
  writer.add_head_count(H)
  writer.add_head_count_kv(G)
  writer.add_rope_freq_base(500.0)
  writer.add_rope_dimension_count(D // H)
  writer.add_layer_norm_rms_eps(1e-5)
  writer.add_vocab_size(V)
  writer.add_bos_token_id(1)
  writer.add_eos_token_id(2)
  writer.add_file_type(0)


def write(path, tensors, *, kind="F32", arch="llama", more=lambda writer: None):
  writer = gguf.GGUFWriter(path, arch)
  metadata(writer)
  more(writer)
  quantised = gguf.GGMLQuantizationType[kind]
  for name, values in tensors.values():
    heads = H if "attn_q" in name else G if "attn_k" in name else None
    values = values if heads is None else interleaved(values, heads)
    if values.ndim == 2 and kind != "F32":
      coded = gguf.quantize(values, quantised)
      writer.add_tensor(name, coded, raw_dtype=quantised)
    else:
      writer.add_tensor(name, values)
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  return path


def folder(path, tensors, **more):
  path.mkdir()
  (path / "config.json").write_text(folders.json.dumps(CONFIG | more))
  folders.store(path, {name: values for name, (_, values) in tensors.items()})
  return path


@pytest.mark.parametrize("tied", [False, True])
def test_equals_its_folder(tied, tmp_path):
  tensors = weights(tied)
  got = aj.load(write(tmp_path / "a.gguf", tensors))
  want = aj.load(folder(tmp_path / "hf", tensors, tie_word_embeddings=tied))
  for a, b in zip(jax.tree.leaves(got.model), jax.tree.leaves(want.model)):
    np.testing.assert_array_equal(a, b)
  np.testing.assert_array_equal(
    got.model(TOKENS).logits, want.model(TOKENS).logits
  )
  assert got.config["rms_norm_eps"] == 1e-5
  assert (got.config["bos_token_id"], got.config["eos_token_id"]) == (1, 2)
  aj.save(got.model, tmp_path / "out", like=got)  # and is one, once saved
  back = aj.load(tmp_path / "out")
  for a, b in zip(jax.tree.leaves(back.model), jax.tree.leaves(want.model)):
    np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize(
  ("kind", "error"),
  [("F16", 1e-3), ("BF16", 4e-3), ("Q8_0", 4e-3), ("Q4_1", 0.06)],
)
def test_quantised_weights_are_near(kind, error, tmp_path):
  tensors = weights()
  got = aj.load(write(tmp_path / "a.gguf", tensors, kind=kind)).model
  want = aj.load(folder(tmp_path / "hf", tensors)).model
  far = 0.0
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want)):
    np.testing.assert_allclose(a, b, atol=error)
    far = max(far, float(abs(a - b).max()))
  assert far > error / 100  # they were quantised
  assert aj.load(tmp_path / "a.gguf", dtype="bfloat16").model.layers


@pytest.mark.parametrize(
  ("more", "match"),
  [
    (lambda w: w.add_expert_count(8), r"llama\.expert_count=8"),
    (lambda w: w.add_sliding_window(8), r"llama\.attention\.sliding_window=8"),
    (lambda w: w.add_key_length(32), r"rope\.dimension_count=16"),
    (
      lambda w: w.add_rope_scaling_type(gguf.RopeScalingType.YARN),
      r"rope\.scaling\.type='yarn'",
    ),
    (lambda w: w.add_uint16("split.count", 3), r"split\.count=3"),
    (
      lambda w: w.add_tensor("rope_freqs.weight", np.ones(8, "f4")),
      "rope_freqs",
    ),
  ],
)
def test_what_is_not_supported_is_named(more, match, tmp_path):
  path = write(tmp_path / "a.gguf", weights(), more=more)
  with pytest.raises(ValueError, match=match):
    aj.load(path)


def test_another_architecture_is_named(tmp_path):
  path = write(tmp_path / "a.gguf", weights(), arch="qwen2")
  with pytest.raises(ValueError, match=r"general\.architecture='qwen2'"):
    aj.load(path)


def test_linear_scaling(tmp_path):
  def more(writer):
    writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
    writer.add_rope_scaling_factor(4.0)

  model = aj.load(write(tmp_path / "a.gguf", weights(), more=more)).model
  assert model.config.rope == aj.core.Rope(500.0, 4.0)


class TestMalformed:
  @pytest.fixture
  def path(self, tmp_path):
    return write(tmp_path / "a.gguf", weights())

  def refused(self, path, match):
    with pytest.raises(ValueError, match=match):
      aj.load(path)

  def test_not_one(self, path):
    path.write_bytes(b"")
    self.refused(path, "no GGUF file")
    path.write_bytes(b"PK\x03\x04" + bytes(100))
    self.refused(path, "no GGUF file")

  @pytest.mark.parametrize("share", [0.0, 0.001, 0.01, 0.5, 0.999])
  def test_truncated(self, path, share):
    whole = path.read_bytes()
    path.write_bytes(whole[: max(4, int(share * len(whole)))])
    self.refused(path, "truncated")

  @pytest.mark.parametrize(
    ("at", "form", "value", "match"),
    [
      (4, "<I", 1, "version 1"),
      (4, ">I", 3, "version"),
      (8, "<Q", 2**60, "truncated"),  # tensors
      (16, "<Q", 2**60, "truncated"),  # pairs
      (24, "<Q", 2**62, "truncated"),  # the length of the first key
    ],
  )
  def test_absurd_numbers(self, path, at, form, value, match):
    whole = bytearray(path.read_bytes())
    struct.pack_into(form, whole, at, value)
    path.write_bytes(whole)
    self.refused(path, match)

  def record(self, whole, name):
    """Where the axes of a tensor's record begin."""
    return whole.index(name.encode()) + len(name)

  def test_records(self, path):
    whole = path.read_bytes()
    at = self.record(whole, "blk.1.attn_norm.weight")  # u32 1, u64 D, u32, u64
    for form, offset, value, match in [
      ("<Q", 4, 2**60, "out of range"),
      ("<Q", 4, 0, "cannot have the shape"),
      ("<I", 12, 777, "unknown type, 777"),
      ("<Q", 16, 2**60, "out of range"),
      ("<Q", 16, 33, "aligned"),
      ("<Q", 16, 0, "overlaps"),
    ]:
      spoilt = bytearray(whole)
      struct.pack_into(form, spoilt, at + offset, value)
      path.write_bytes(spoilt)
      self.refused(path, match)
    path.write_bytes(whole.replace(b"blk.1.attn_norm", b"blk.0.attn_norm"))
    self.refused(path, r"'blk\.0\.attn_norm\.weight' is there twice")
    path.write_bytes(whole.replace(b"blk.1.attn_norm", b"blk.1.attn_nora"))
    self.refused(path, r"layers\.1\.input_layernorm\.weight' is missing")

  def test_keys_twice(self, path):
    whole = path.read_bytes().replace(b"block_count", b"block_xount")
    path.write_bytes(whole)
    self.refused(path, r"does not say `llama\.block_count`|block_xount")
    whole = whole.replace(b"tokenizer.ggml.bos_", b"tokenizer.ggml.eos_")
    path.write_bytes(whole)
    self.refused(path, "is there twice")

  def test_not_finite(self, tmp_path):
    tensors = weights()
    tensors["model.norm.weight"][1][5] = np.nan
    path = write(tmp_path / "b.gguf", tensors)
    self.refused(path, r"model\.norm\.weight' holds NaN")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
  path = tmp_path_factory.mktemp("gguf") / "a.gguf"
  return write(path, weights()).read_bytes()


@settings(max_examples=200)
@given(
  edits=st.lists(
    st.tuples(st.integers(0, 2600), st.integers(0, 255)), min_size=1, max_size=3
  ),
  cut=st.integers(0, 2600),
)
def test_any_header_is_read_or_refused(tmp_path_factory, whole, edits, cut):
  """What passes lies in the file, apart from one another."""
  spoilt = bytearray(whole)
  for at, value in edits:
    spoilt[at] = value
  if cut % 2:
    del spoilt[cut]
  path = tmp_path_factory.getbasetemp() / "spoilt.gguf"
  path.write_bytes(spoilt)
  try:
    _, tensors = read_gguf(path)
  except ValueError as error:
    assert "spoilt.gguf" in str(error)
    return
  assert all(0 < t.data.nbytes <= len(spoilt) for t in tensors.values())


@settings(max_examples=30)
@given(at=st.integers(0, 2600), value=st.integers(0, 255))
def test_any_file_loads_or_is_refused(tmp_path_factory, whole, at, value):
  spoilt = bytearray(whole)
  spoilt[at] = value
  path = tmp_path_factory.getbasetemp() / "spoilt.gguf"
  path.write_bytes(spoilt)
  try:
    aj.load(path)
  except ValueError as error:
    assert str(error)


BYTES = "Ġ0123456789abcdehlorw!"
MERGES = ("h e", "l l", "he ll", "hell o", "Ġ w", "Ġ 1", "1 2", "o r")
SAID = {
  "tokenizer.ggml.model": "gpt2",
  "tokenizer.ggml.pre": "smollm",
  "tokenizer.ggml.tokens": [
    "<s>",
    "<|im_end|>",
    *BYTES,
    *(merge.replace(" ", "") for merge in MERGES),
  ],
  "tokenizer.ggml.merges": [*MERGES],
  "tokenizer.ggml.token_type": [3, 3] + [1] * (len(BYTES) + len(MERGES)),
  "tokenizer.chat_template": "{{ messages }}",
}


class TestTokenizer:
  def tokens(self, text, **more):
    files = tokenizer_files(SAID | more)
    made = tokenizers.Tokenizer.from_str(files["tokenizer.json"].decode())
    found = made.encode(text)
    first = "<s>" if more.get("tokenizer.ggml.add_bos_token") else ""
    said = made.decode(found.ids, skip_special_tokens=False)
    assert said == first + text
    return found.tokens

  def test_merges_and_digits_one_by_one(self):
    got = self.tokens("hello world 12<|im_end|>hell")
    assert got == [
      *("hello", "Ġw", "or", "l", "d", "Ġ", "1", "2", "<|im_end|>", "hell"),
    ]

  def test_other_cuts(self):
    pre = "tokenizer.ggml.pre"
    assert self.tokens("12 12", **{pre: "gpt-2"}) == ["12", "Ġ1", "2"]
    assert self.tokens("12 12", **{pre: "llama-bpe"}) == ["12", "Ġ", "12"]

  def test_a_first_token(self):
    begin = {
      "tokenizer.ggml.add_bos_token": True,
      "tokenizer.ggml.bos_token_id": 0,
    }
    assert self.tokens("hell", **begin) == ["<s>", "hell"]
    bad = begin | {"tokenizer.ggml.bos_token_id": 10**6}
    with pytest.raises(ValueError, match="bos_token_id=1000000 is no token"):
      tokenizer_files(SAID | bad)

  def test_the_rest(self):
    files = tokenizer_files(SAID)
    assert files["chat_template.jinja"] == b"{{ messages }}"
    for other in (
      {"tokenizer.ggml.pre": "tekken"},
      {"tokenizer.ggml.model": "t5"},
    ):
      assert set(tokenizer_files(SAID | other)) == {"chat_template.jinja"}
    assert tokenizer_files({}) == {}
    for name, bad in [
      ("tokens", [1, 2]),
      ("merges", None),
      ("token_type", [1]),
      ("tokens", ["a"] * 32),
    ]:
      with pytest.raises(ValueError, match=r"tokenizer\.ggml"):
        tokenizer_files(SAID | {f"tokenizer.ggml.{name}": bad})
