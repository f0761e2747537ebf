# SPDX-License-Identifier: Apache-2.0
"""What a `model_type` means: a config read, a model made, a table of rows."""

from collections.abc import Callable, Mapping

from adaptivejax.io.architectures import decoders, mixtures
from adaptivejax.io.fields import Fields
from adaptivejax.io.rows import Plan

ARCHITECTURES: Mapping[str, Callable[[Fields], Plan]] = {
  "gemma": decoders.gemma,
  "llama": decoders.llama,
  "mistral": decoders.mistral,
  "mixtral": mixtures.mixtral,
  "qwen2": decoders.qwen2,
  "qwen3": decoders.qwen3,
  "qwen3_moe": mixtures.qwen3_moe,
}
"""By `model_type`; each reads every field it knows."""

BOOKKEEPING = {
  "_attn_implementation_autoset": "of another program",
  "_name_or_path": "where it came from",
  "architectures": "the tensors' names say it",
  "attention_dropout": "of training",
  "bos_token_id": "of the caller; kept",
  "dtype": "the tensors say it",
  "eos_token_id": "of the caller; kept",
  "initializer_range": "of training",
  "max_position_embeddings": "positions are computed; a cache has its own room",
  "output_router_logits": "of the caller",
  "pad_token_id": "of the caller; kept",
  "pretraining_tp": "how it was trained; the product is the same",
  "torch_dtype": "the tensors say it",
  "transformers.js_config": "of another program",
  "transformers_version": "of another program",
  "use_cache": "of the caller",
}
"""Fields that change nothing that is computed here, and why."""


def plan_of(fields: Fields) -> Plan:
  """The plan of a config.

  Raises:
    ValueError: a model, a field or a value that is not supported, by name.
  """
  kind = fields.one_of("model_type", ARCHITECTURES)
  plan = ARCHITECTURES[kind](fields)
  fields.ignore(BOOKKEEPING)
  fields.done()
  return plan
