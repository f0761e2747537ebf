# SPDX-License-Identifier: Apache-2.0
"""Decoders whose feed-forward layers are mixtures of experts.

Files hold each expert by itself, as transformers writes them, or all experts of
a layer in one tensor, as version 5 keeps them in memory.

Mixtral    Jiang et al., 2024, https://arxiv.org/abs/2401.04088
Qwen3-MoE  Yang et al., 2025, https://arxiv.org/abs/2505.09388

Axes: E experts, I features in, O features out.
"""

from dataclasses import replace

from adaptivejax.io.architectures.decoders import (
  BLOCK,
  OLD_TABLES,
  common_rows,
  copies,
  read_decoder,
  with_window,
)
from adaptivejax.io.fields import Fields
from adaptivejax.io.rows import MATRIX, Plan, Row, linear_rows
from adaptivejax.methods.experts.mixtral import MixtralRouter
from adaptivejax.models.decoder import DecoderLM
from adaptivejax.models.decoder_layer import (
  DecoderConfig,
  decoder_block,
  decoder_mlp,
)
from adaptivejax.nn.experts import MixtureOfExperts
from adaptivejax.nn.stacked import stacked


def mixtral(fields: Fields) -> Plan:
  """Mistral with experts; weights of the chosen sum to 1."""
  # noise on the router's input, in training only
  fields.ignore({"router_jitter_noise": "of training"})
  window = fields.count("sliding_window", None)
  config = replace(read_decoder(fields), window=window)
  names = {"gate": "w1", "up": "w3", "down": "w2"}
  return _plan(fields, config, "block_sparse_moe", names, renormalised=True)


def qwen3_moe(fields: Fields) -> Plan:
  """Qwen3 with experts in every layer."""
  fields.one_of("decoder_sparse_step", [1], 1)
  fields.one_of("mlp_only_layers", [[], None], None)
  fields.ignore({"intermediate_size": "of layers without experts: none"})
  bias = fields.flag("attention_bias", False)
  config = read_decoder(fields, hidden="moe_intermediate_size")
  config = replace(config, qkv_bias=bias, out_bias=bias, norm_heads=True)
  config = with_window(config, fields, all_layers=True)
  names = {name: f"{name}_proj" for name in ("gate", "up", "down")}
  renormalised = fields.flag("norm_topk_prob", False)
  return _plan(fields, config, "mlp", names, renormalised=renormalised)


def _plan(
  fields: Fields,
  config: DecoderConfig,
  module: str,
  names: dict[str, str],
  *,
  renormalised: bool,
) -> Plan:
  """The plan of a mixture.

  Args:
    fields: to read.
    config: of the decoder; `hidden` is the width of an expert.
    module: their name of the feed-forward module.
    names: theirs of an expert's linear maps, by ours.
    renormalised: whether the weights of the chosen sum to 1.
  """
  named = [n for n in ("num_experts", "num_local_experts") if n in fields]
  counts = {fields.size(name) for name in named}
  if len(counts) != 1:
    raise fields.refused("num_experts", "and num_local_experts must agree")
  (experts,), chosen = counts, fields.size("num_experts_per_tok")
  if chosen > experts:
    raise fields.refused("num_experts_per_tok", f"is more than {experts}")
  # its weight in the loss; 0 is none
  balance = fields.get("router_aux_loss_coef", 0.001)
  if balance != 0:
    balance = fields.number("router_aux_loss_coef", 0.001)

  def mixture(rngs):
    router = MixtralRouter(
      config.features,
      experts,
      top_k=chosen,
      renormalised=renormalised,
      balance=float(balance),
      rngs=rngs,
    )
    make = lambda rngs: decoder_mlp(config, config.hidden, rngs)
    return MixtureOfExperts(router, stacked(make, experts, rngs))

  def make(rngs):
    layer = lambda rngs: decoder_block(config, rngs, mlp=mixture(rngs))
    return DecoderLM(config, layer=layer, rngs=rngs)

  common = common_rows(config)
  return Plan(
    make=make,
    forms=(
      (*common, *_apart(f"{BLOCK}{module}.", names)),
      (*common, *_fused(f"{BLOCK}{module}.")),
      (*common, *_fused(f"{BLOCK}mlp.")),
    ),
    counts={"layer": config.layers, "expert": experts},
    copies=copies(config),
    ignored=OLD_TABLES,
  )


def _apart(prefix: str, names: dict[str, str]) -> list[Row]:
  """Each expert by itself."""
  rows = linear_rows(f"{prefix}gate", "layers.mlp.router.gate")
  for ours, theirs in names.items():
    tensor = f"{prefix}experts.{{expert}}.{theirs}"
    rows += linear_rows(tensor, f"layers.mlp.experts.{ours}")
  return rows


def _fused(prefix: str) -> list[Row]:
  """All in one: gate and up in [E, 2 O, I], down in [E, O, I]."""
  both, down = (f"{prefix}experts.{n}_proj" for n in ("gate_up", "down"))
  inner = "layers.mlp.experts."
  return [
    *linear_rows(f"{prefix}gate", "layers.mlp.router.gate"),
    Row(both, f"{inner}gate.kernel", MATRIX, take=(0, 2)),
    Row(both, f"{inner}up.kernel", MATRIX, take=(1, 2)),
    Row(down, f"{inner}down.kernel", MATRIX),
  ]
