# SPDX-License-Identifier: Apache-2.0
"""A Llama in a GGUF file, shown as the Hugging Face folder it was made of.

Weights are dequantised to f32 one at a time.  llama.cpp turns neighbouring
features of a head, i and i + 1, where Hugging Face turns i and i + W/2, so the
rows of queries and keys are stored in another order, which is undone.

Axes: H heads, W head width, O features out, I features in.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from adaptivejax.io.fields import Fields
from adaptivejax.io.gguf_header import Stored, read_gguf
from adaptivejax.io.gguf_tokenizer import tokenizer_files
from adaptivejax.io.source import Source, Spec

NAMES = {
  "token_embd": "model.embed_tokens",
  "output_norm": "model.norm",
  "output": "lm_head",
}
BLOCK_NAMES = {
  "attn_norm": "input_layernorm",
  "attn_q": "self_attn.q_proj",
  "attn_k": "self_attn.k_proj",
  "attn_v": "self_attn.v_proj",
  "attn_output": "self_attn.o_proj",
  "ffn_norm": "post_attention_layernorm",
  "ffn_gate": "mlp.gate_proj",
  "ffn_up": "mlp.up_proj",
  "ffn_down": "mlp.down_proj",
}
"""Names of a block's tensors there, by those here."""

SPECIAL = {
  "bos": "bos_token_id",
  "eos": "eos_token_id",
  "padding": "pad_token_id",
}


class Gguf(Source):
  """A file `*.gguf`.

  Raises:
    ValueError: malformed, not a Llama, or with metadata that is not supported.
  """

  def __init__(self, path: Path):
    self.where = str(path)
    metadata, stored = read_gguf(path)
    self.stored = {_name(name): tensor for name, tensor in stored.items()}
    if len(self.stored) < len(stored):
      raise ValueError(f"{path} holds a tensor under two of its names.")
    self.specs = {
      name: Spec(tensor.shape, np.dtype(np.float32))
      for name, tensor in self.stored.items()
    }
    longest = max((max(t.shape) for t in stored.values()), default=1)
    fields = Fields(metadata, self.where, longest, len(stored))
    self.config = _config(fields, self.stored)
    self.files = tokenizer_files(metadata)

  @np.errstate(all="ignore")  # what is not finite is refused by `Reader`
  def read(self, name: str) -> np.ndarray:
    """The values of a tensor, f32."""
    import gguf

    shape, kind, data = self.stored[name]
    if kind == gguf.GGMLQuantizationType.F32:
      values = data.view("<f4")
    elif kind == gguf.GGMLQuantizationType.F16:
      values = data.view("<f2").astype(np.float32)
    else:
      rows = data.reshape(*shape[:-1], -1)
      try:
        values = gguf.dequantize(rows, kind)
      except NotImplementedError as error:
        raise ValueError(
          f"{self.where}: tensor {name!r} is {kind.name}, which the gguf"
          f" package cannot dequantise: {error}"
        ) from error
    values = values.reshape(shape)
    if ".q_proj." in name:
      return unpermuted(values, self.config["num_attention_heads"])
    if ".k_proj." in name:
      return unpermuted(values, self.config["num_key_value_heads"])
    return values


def unpermuted(
  rows: Float[np.ndarray, "O *I"], heads: int
) -> Float[np.ndarray, "O *I"]:
  """Rows of a query or key map in the order of Hugging Face."""
  if rows.shape[0] % (2 * heads):
    raise ValueError(
      f"{rows.shape[0]} rows are no {heads} heads of even width."
    )
  pairs = rows.reshape(heads, -1, 2, *rows.shape[1:])
  return pairs.swapaxes(1, 2).reshape(rows.shape)


def _name(theirs: str) -> str:
  """A tensor's name in Hugging Face's Llama; itself if it has none there."""
  stem, _, kind = theirs.rpartition(".")
  block = re.fullmatch(r"blk\.(0|[1-9]\d*)\.(\w+)", stem)
  if block and block[2] in BLOCK_NAMES:
    return f"model.layers.{block[1]}.{BLOCK_NAMES[block[2]]}.{kind}"
  return f"{NAMES[stem]}.{kind}" if stem in NAMES else theirs


def _config(fields: Fields, stored: Mapping[str, Stored]) -> dict[str, Any]:
  """The `config.json` of this model."""
  fields.one_of("general.architecture", ["llama"])
  fields.one_of("split.count", [0, 1], 1)
  fields.one_of("llama.expert_count", [0], 0)
  fields.ignore(
    {name: "of the file" for name in fields.values if _of_the_file(name)}
  )
  get = lambda name: f"llama.{name}"
  heads = fields.size(get("attention.head_count"))
  features = fields.size(get("embedding_length"))
  width = fields.size(get("attention.key_length"), features // heads)
  fields.one_of(get("attention.value_length"), [width], width)
  fields.one_of(get("rope.dimension_count"), [width], width)
  # a single-precision number in as many digits as it has
  short = lambda name, default=None: float(
    str(np.float32(fields.number(get(name), default)))
  )
  config: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": "model.layers.0.self_attn.q_proj.bias" in stored,
    "dtype": "float32",
    "head_dim": width,
    "hidden_act": "silu",
    "hidden_size": features,
    "intermediate_size": fields.size(get("feed_forward_length")),
    "max_position_embeddings": fields.count(get("context_length"), 2048),
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": heads,
    "num_hidden_layers": fields.layers(get("block_count")),
    "num_key_value_heads": fields.size(get("attention.head_count_kv"), heads),
    "rms_norm_eps": short("attention.layer_norm_rms_epsilon"),
    "rope_scaling": None,
    "rope_theta": short("rope.freq_base", 10_000.0),
    "tie_word_embeddings": "lm_head.weight" not in stored,
    "vocab_size": fields.size(get("vocab_size"), _vocabulary(fields, stored)),
  }
  if (
    fields.one_of(get("rope.scaling.type"), ["none", "linear"], "none")
    == "linear"
  ):
    factor = short("rope.scaling.factor")
    config["rope_scaling"] = {"rope_type": "linear", "factor": factor}
  for theirs, ours in SPECIAL.items():
    token = fields.values.get(f"tokenizer.ggml.{theirs}_token_id")
    if token is not None:
      config[ours] = token
  fields.done()
  return config


def _of_the_file(name: str) -> bool:
  """Whether metadata says nothing of what the model computes."""
  kinds = ("general.", "tokenizer.", "quantize.", "split.")
  return name.startswith(kinds)


def _vocabulary(fields: Fields, stored: Mapping[str, Stored]) -> int:
  if (table := stored.get("model.embed_tokens.weight")) is None:
    raise ValueError(
      f"{fields.where}: the tensor 'token_embd.weight' is missing."
    )
  return table.shape[0]
