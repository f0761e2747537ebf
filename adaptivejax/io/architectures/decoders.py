# SPDX-License-Identifier: Apache-2.0
"""Llama and its like: what their configs say, where their tensors go.

Field names, defaults and meanings are those of Hugging Face transformers 5.23
(`configuration_*.py`, `modeling_*.py`); files of version 4 are read as well.

Llama   Touvron et al., 2023, https://arxiv.org/abs/2302.13971
Mistral Jiang et al., 2023, https://arxiv.org/abs/2310.06825
Qwen2   Yang et al., 2024, https://arxiv.org/abs/2407.10671
Qwen3   Yang et al., 2025, https://arxiv.org/abs/2505.09388
Gemma   Gemma Team, 2024, https://arxiv.org/abs/2403.08295
"""

from collections.abc import Mapping
from dataclasses import replace

from adaptivejax.io.architectures.rope import read_rope
from adaptivejax.io.fields import Fields
from adaptivejax.io.rows import Plan, Row, linear_rows
from adaptivejax.models.decoder import DecoderLM
from adaptivejax.models.decoder_layer import DecoderConfig

ACTIVATIONS = {
  "gelu": "gelu",
  "gelu_new": "gelu_tanh",
  "gelu_pytorch_tanh": "gelu_tanh",
  "relu": "relu",
  "silu": "silu",
}
"""Our names of theirs."""

OLD_TABLES = {
  r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq": "computed from config"
}
"""Tensors that old versions wrote besides."""

FULL, SLIDING = "full_attention", "sliding_attention"

BLOCK = "model.layers.{layer}."


def llama(fields: Fields) -> Plan:
  """Llama 1 to 3 and what uses its class, such as SmolLM2."""
  fields.ignore({"is_llama_config": "it is"})
  fields.one_of("rope_interleaved", [False, None], None)
  bias = fields.flag("attention_bias", False)
  config = replace(
    read_decoder(fields),
    qkv_bias=bias,
    out_bias=bias,
    mlp_bias=fields.flag("mlp_bias", False),
  )
  return decoder_plan(config)


def mistral(fields: Fields) -> Plan:
  """Llama with a window."""
  window = fields.count("sliding_window", None)
  return decoder_plan(replace(read_decoder(fields), window=window))


def qwen2(fields: Fields) -> Plan:
  """Llama with biases of queries, keys and values."""
  config = replace(read_decoder(fields), qkv_bias=True)
  return decoder_plan(with_window(config, fields))


def qwen3(fields: Fields) -> Plan:
  """Llama with norms of queries and keys."""
  bias = fields.flag("attention_bias", False)
  config = replace(
    read_decoder(fields), qkv_bias=bias, out_bias=bias, norm_heads=True
  )
  return decoder_plan(with_window(config, fields))


def gemma(fields: Fields) -> Plan:
  """Llama with scales around 0, and embeddings scaled by sqrt(D)."""
  fields.one_of("use_bidirectional_attention", [False, None], None)
  bias = fields.flag("attention_bias", False)
  named = fields.one_of("hidden_activation", [None, *ACTIVATIONS], None)
  config = read_decoder(fields, activation="gelu_pytorch_tanh", tied=True)
  act = config.activation if named is None else ACTIVATIONS[named]
  config = replace(
    config,
    qkv_bias=bias,
    out_bias=bias,
    # `gelu` in the published configs was always meant to be this one
    activation="gelu_tanh" if act == "gelu" else act,
    norm_offset=1.0,
    embedding_scale=config.features**0.5,
  )
  return decoder_plan(config)


def read_decoder(
  fields: Fields,
  *,
  activation: str = "silu",
  tied: bool = False,
  hidden: str = "intermediate_size",
) -> DecoderConfig:
  """What all decoders say.

  Args:
    fields: to read.
    activation: theirs, if they do not say.
    tied: whether the readout is the embedding, if they do not say.
    hidden: the field with the width of feed-forward layers.
  """
  heads = fields.size("num_attention_heads")
  groups = fields.size("num_key_value_heads", heads)
  features = fields.size("hidden_size")
  width = fields.size("head_dim", None)
  if heads % groups:
    why = f"must divide num_attention_heads={heads}"
    raise fields.refused("num_key_value_heads", why)
  if width is None and (features % heads or features // heads % 2):
    raise fields.refused(
      "num_attention_heads", f"cuts {features} features into no even heads"
    )
  if width is not None and (width % 2 or heads * width > fields.limit):
    raise fields.refused("head_dim", f"is odd, or too wide for {heads} heads")
  act = fields.one_of("hidden_act", ACTIVATIONS, activation)
  return DecoderConfig(
    vocab=fields.size("vocab_size"),
    layers=fields.layers("num_hidden_layers"),
    features=features,
    hidden=fields.size(hidden),
    heads=heads,
    kv_heads=groups,
    head_width=width,
    gated=True,
    tied=fields.flag("tie_word_embeddings", tied),
    activation=ACTIVATIONS[act],
    norm_epsilon=fields.number("rms_norm_eps", 1e-6),
    rope=read_rope(fields),
  )


def with_window(
  config: DecoderConfig, fields: Fields, *, all_layers: bool = False
) -> DecoderConfig:
  """With the window of all layers, or none, as Qwen says it.

  It starts at layer `max_window_layers`, or as `layer_types` say; models of
  `all_layers` look at neither.
  """
  window, layers = fields.count("sliding_window", None), config.layers
  used = fields.flag("use_sliding_window", False)
  start = fields.get("max_window_layers", layers)
  kinds = fields.get("layer_types", None)
  if all_layers or window is None or not used:
    return replace(config, window=window if used else None)
  if kinds is None:
    if type(start) is not int:
      raise fields.refused("max_window_layers", "must be a whole number")
    start = min(max(start, 0), layers)
    kinds = [FULL] * start + [SLIDING] * (layers - start)
  if kinds == [SLIDING] * layers:
    return replace(config, window=window)
  if kinds == [FULL] * layers:
    return config
  raise fields.refused(
    "layer_types" if "layer_types" in fields else "max_window_layers",
    "mixes layers with and without a window, or names none for some",
  )


def decoder_plan(config: DecoderConfig) -> Plan:
  """The plan of a decoder with feed-forward layers."""
  gate, up, down = (
    linear_rows(
      f"{BLOCK}mlp.{name}_proj", f"layers.mlp.{name}", bias=config.mlp_bias
    )
    for name in ("gate", "up", "down")
  )
  return Plan(
    make=lambda rngs: DecoderLM(config, rngs=rngs),
    forms=((*common_rows(config), *gate, *up, *down),),
    counts={"layer": config.layers},
    copies=copies(config),
    ignored=OLD_TABLES,
  )


def common_rows(config: DecoderConfig) -> tuple[Row, ...]:
  """All but the feed-forward half."""
  attention, qkv = "layers.attention.", config.qkv_bias
  theirs = f"{BLOCK}self_attn."
  key_value = f"{attention}key_value"
  rows = [
    Row("model.embed_tokens.weight", "embedding"),
    Row("model.norm.weight", "norm.scale"),
    Row(f"{BLOCK}input_layernorm.weight", "layers.norm_attention.scale"),
    Row(f"{BLOCK}post_attention_layernorm.weight", "layers.norm_mlp.scale"),
    *linear_rows(f"{theirs}q_proj", f"{attention}query", bias=qkv),
    *linear_rows(f"{theirs}k_proj", key_value, bias=qkv, part=(0, 2)),
    *linear_rows(f"{theirs}v_proj", key_value, bias=qkv, part=(1, 2)),
    *linear_rows(f"{theirs}o_proj", f"{attention}out", bias=config.out_bias),
  ]
  if config.norm_heads:
    rows += [
      Row(f"{theirs}q_norm.weight", f"{attention}norm_query.scale"),
      Row(f"{theirs}k_norm.weight", f"{attention}norm_key.scale"),
    ]
  return (*rows, *([] if config.tied else linear_rows("lm_head", "head")))


def copies(config: DecoderConfig) -> Mapping[str, str]:
  """A tied readout that was written all the same."""
  tied = {"lm_head.weight": "model.embed_tokens.weight"}
  return tied if config.tied else {}
