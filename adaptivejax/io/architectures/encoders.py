# SPDX-License-Identifier: Apache-2.0
"""Encoders: what their configs say, where their tensors go.

The models themselves, without heads: files of a head are refused, its tensors
being named.  Fields and tensors as in transformers 5.23, on disk.

BERT    Devlin et al., 2019, https://arxiv.org/abs/1810.04805 (and MiniLM)
ViT     Dosovitskiy et al., 2021, https://arxiv.org/abs/2010.11929
DINOv2  Oquab et al., 2024, https://arxiv.org/abs/2304.07193
"""

from adaptivejax.io.fields import Fields
from adaptivejax.io.rows import Plan, Row, linear_rows
from adaptivejax.models.encoder import (
  Encoder,
  EncoderConfig,
  ImageInput,
  TextInput,
)

LAYER = "encoder.layer.{layer}."
CONVOLUTION = (2, 3, 1, 0)
"""`axes` of patches: the file has [D, C, P, P], the model [P, P, C, D]."""

OF_TRAINING = {
  "attention_probs_dropout_prob": "of training",
  "drop_path_rate": "of training",
  "hidden_dropout_prob": "of training",
  "layerscale_value": "of training; the tensors say it",
}
OF_OTHER_CLASSES = {
  "classifier_dropout": "of a head",
  "encoder_stride": "of a head",
  "id2label": "of a head",
  "label2id": "of a head",
  "out_features": "of a backbone's choice of layers",
  "out_indices": "of a backbone's choice of layers",
  "reshape_hidden_states": "of a backbone",
  "apply_layernorm": "of a backbone",
  "stage_names": "of a backbone's choice of layers",
  "gradient_checkpointing": "of training",
}


def vit(fields: Fields) -> Plan:
  """ViT with its pooler."""
  fields.one_of("pooler_act", ["tanh"], "tanh")
  features = fields.size("hidden_size")
  fields.one_of("pooler_output_size", [features, None], None)
  shape = _shape(fields, ImageInput, epsilon=1e-12)
  config = EncoderConfig(
    **shape, hidden=fields.size("intermediate_size"), pooler=True
  )
  return _plan(
    config,
    *_image_rows(),
    *_layer_rows("attention.attention.", "attention.output.dense"),
    *linear_rows(f"{LAYER}intermediate.dense", "layers.mlp.up", bias=True),
    *linear_rows(f"{LAYER}output.dense", "layers.mlp.down", bias=True),
    *_norm(f"{LAYER}layernorm_before", "layers.norm_attention"),
    *_norm(f"{LAYER}layernorm_after", "layers.norm_mlp"),
    *linear_rows("pooler.dense", "pooler", bias=True),
  )


def dinov2(fields: Fields) -> Plan:
  """DINOv2: ViT with LayerScale, without a pooler."""
  fields.one_of("use_swiglu_ffn", [False], False)
  masks = fields.flag("use_mask_token", True)
  shape = _shape(fields, ImageInput, epsilon=1e-6, masks=masks)
  hidden = fields.number("mlp_ratio", 4) * shape["features"]
  if hidden != int(hidden) or hidden > fields.limit:
    raise fields.refused("mlp_ratio", "makes no width of a layer there is")
  config = EncoderConfig(**shape, hidden=int(hidden), layer_scale=True)
  rows = [
    *_image_rows(),
    *_layer_rows("attention.attention.", "attention.output.dense"),
    *linear_rows(f"{LAYER}mlp.fc1", "layers.mlp.up", bias=True),
    *linear_rows(f"{LAYER}mlp.fc2", "layers.mlp.down", bias=True),
    *_norm(f"{LAYER}norm1", "layers.norm_attention"),
    *_norm(f"{LAYER}norm2", "layers.norm_mlp"),
    Row(f"{LAYER}layer_scale1.lambda1", "layers.scale_attention"),
    Row(f"{LAYER}layer_scale2.lambda1", "layers.scale_mlp"),
  ]
  if masks:
    rows.append(Row("embeddings.mask_token", "embedding.mask"))
  return _plan(config, *rows)


def bert(fields: Fields) -> Plan:
  """BERT and what uses its class, such as MiniLM, with the pooler."""
  fields.one_of("is_decoder", [False], False)
  fields.one_of("add_cross_attention", [False], False)
  fields.one_of("position_embedding_type", ["absolute", None], None)
  fields.ignore({"tie_word_embeddings": "of a head"})
  shape = _shape(fields, TextInput, epsilon=1e-12)
  config = EncoderConfig(
    **shape,
    hidden=fields.size("intermediate_size"),
    post_norm=True,
    pooler=True,
  )
  tables = {
    "word_embeddings": "words",
    "position_embeddings": "places",
    "token_type_embeddings": "types",
  }
  return _plan(
    config,
    *(
      Row(f"embeddings.{n}.weight", f"embedding.{m}") for n, m in tables.items()
    ),
    *_norm("embeddings.LayerNorm", "embedding.norm"),
    *_layer_rows("attention.self.", "attention.output.dense"),
    *_norm(f"{LAYER}attention.output.LayerNorm", "layers.norm_attention"),
    *linear_rows(f"{LAYER}intermediate.dense", "layers.mlp.up", bias=True),
    *linear_rows(f"{LAYER}output.dense", "layers.mlp.down", bias=True),
    *_norm(f"{LAYER}output.LayerNorm", "layers.norm_mlp"),
    *linear_rows("pooler.dense", "pooler", bias=True),
  )


def _shape(fields: Fields, kind, *, epsilon: float, masks: bool = False):
  """What all of them say in the same words, as arguments of the config."""
  fields.one_of("hidden_act", ["gelu"], "gelu")
  fields.one_of("qkv_bias", [True], True)
  fields.ignore({**OF_TRAINING, **OF_OTHER_CLASSES})
  if kind is ImageInput:
    image, patch = fields.count("image_size"), fields.size("patch_size")
    if image % patch or (image // patch) ** 2 >= fields.limit:
      raise fields.refused("image_size", f"has no positions, at {patch=}")
    channels = fields.size("num_channels", 3)
    given = ImageInput(image, patch, channels, masks)
  else:
    given = TextInput(
      fields.size("vocab_size"),
      fields.size("max_position_embeddings"),
      fields.size("type_vocab_size", 2),
    )
  return {
    "input": given,
    "layers": fields.layers("num_hidden_layers"),
    "features": fields.size("hidden_size"),
    "heads": fields.size("num_attention_heads"),
    "epsilon": fields.number("layer_norm_eps", epsilon),
  }


def _plan(config: EncoderConfig, *rows: Row) -> Plan:
  return Plan(
    make=lambda rngs: Encoder(config, rngs=rngs),
    forms=(rows,),
    counts={"layer": config.layers},
    ignored={r"embeddings\.position_ids": "counts up from 0"},
  )


def _image_rows() -> list[Row]:
  patches = "embeddings.patch_embeddings.projection"
  return [
    Row(f"{patches}.weight", "embedding.kernel", CONVOLUTION),
    Row(f"{patches}.bias", "embedding.bias"),
    Row("embeddings.cls_token", "embedding.first"),
    Row("embeddings.position_embeddings", "embedding.places"),
    *_norm("layernorm", "norm"),
  ]


def _layer_rows(attention: str, out: str) -> list[Row]:
  """The linear maps of attention."""
  theirs, ours = f"{LAYER}{attention}", "layers.attention."
  both = f"{ours}key_value"
  return [
    *linear_rows(f"{theirs}query", f"{ours}query", bias=True),
    *linear_rows(f"{theirs}key", both, bias=True, part=(0, 2)),
    *linear_rows(f"{theirs}value", both, bias=True, part=(1, 2)),
    *linear_rows(f"{LAYER}{out}", f"{ours}out", bias=True),
  ]


def _norm(tensor: str, leaf: str) -> list[Row]:
  return [
    Row(f"{tensor}.weight", f"{leaf}.scale"),
    Row(f"{tensor}.bias", f"{leaf}.bias"),
  ]
