# SPDX-License-Identifier: Apache-2.0
"""Makes `experts.npz`: what Hugging Face transformers computes for tiny MoEs.

    pip install torch==2.14.1 transformers==5.23.0 numpy
    python tests/goldens/make_experts.py

Needed only to make the file again; the tests read the file, and import neither.
Five blocks with weights of our own, in f32 on a CPU, `BLOCK/ARRAY` each:

    x       f[B, T, D]  what goes in
    router  f[D, E]     up, gate f[E, D, F], down f[E, F, D]: the weights, as in
                        `nn.Mlp`; `shared_*` without E; `bias` f[E]
    logits  f[B, T, E]  of the router
    experts i[B, T, K]  chosen, by falling score; -1 where one was dropped
    weights f[B, T, K]  of the chosen
    y       f[B, T, D]  what comes out
    dx, drouter         gradient of sum(sin(y))
    balance, z          the losses that transformers has for the block

and the settings, `BLOCK/top_k` and the like.  Weights and inputs are multiples
of 1/64: exact in bfloat16, and small when compressed.  No choice is a close
one: the script refuses a margin under 1e-3.

Axes: B batch, T tokens, D features, F hidden, E experts, K chosen.
"""

from pathlib import Path

import numpy as np
import torch
import transformers
from transformers.models.deepseek_v3 import modeling_deepseek_v3 as deepseek
from transformers.models.longcat_flash import modeling_longcat_flash as longcat
from transformers.models.mixtral import modeling_mixtral as mixtral
from transformers.models.qwen3_moe import modeling_qwen3_moe as qwen3
from transformers.models.switch_transformers import (
  modeling_switch_transformers as switch,
)

B, T, D, F = 2, 12, 16, 24
FILE = Path(__file__).with_name("experts.npz")


class Weights:
  """Seeded multiples of 1/64, by shape and standard deviation."""

  def __init__(self, seed):
    self.rng = np.random.default_rng(seed)

  def __call__(self, *shape, scale):
    drawn = np.round(64 * scale * self.rng.standard_normal(shape)) / 64
    return torch.tensor(drawn, dtype=torch.float32)


def fill(parameter, value):
  """Sets a parameter or buffer, which must have that shape."""
  assert parameter.shape == value.shape, (parameter.shape, value.shape)
  parameter.data.copy_(value)


def fill_experts(experts, draw, count):
  """Random gated experts; the first `count` of those allocated."""
  up, gate = (draw(count, F, D, scale=D**-0.5) for _ in range(2))
  down = draw(count, D, F, scale=F**-0.5)
  fill(experts.gate_up_proj[:count], torch.cat([gate, up], 1))
  fill(experts.down_proj, down)
  flip = lambda a: a.transpose(1, 2)
  return {"up": flip(up), "gate": flip(gate), "down": flip(down)}


def fill_mlp(mlp, draw, prefix):
  out = {}
  for name in ("up", "gate", "down"):
    weight = getattr(mlp, f"{name}_proj").weight
    fill(weight, draw(*weight.shape, scale=weight.shape[1] ** -0.5))
    out[prefix + name] = weight.T
  return out


def by_score(experts, weights, scores):
  """The chosen, by falling score: transformers does not always sort them."""
  order = scores.gather(-1, experts).argsort(-1, descending=True)
  return experts.gather(-1, order), weights.gather(-1, order)


def refuse_close(scores, k, name):
  """The k-th and the next must be apart."""
  ranked = scores.sort(-1, descending=True).values
  gap = (ranked[..., k - 1] - ranked[..., k]).min()
  assert gap > 1e-3, f"{name}: a margin of {gap}"


def measure(module, router, x):
  """`y`, and the gradients of sum(sin(y)) by the input and the router."""
  x = x.clone().requires_grad_()
  y = module(x)
  dx, drouter = torch.autograd.grad(torch.sin(y).sum(), (x, router))
  return {"x": x, "router": router.T, "y": y, "dx": dx, "drouter": drouter.T}


def shaped(logits, experts, weights):
  fold = lambda a: a.reshape(B, T, -1)
  return {
    "logits": fold(logits),
    "experts": fold(experts).to(torch.int32),
    "weights": fold(weights),
  }


def top_k_block(module, router, draw, k, name):
  """Mixtral or Qwen3-MoE."""
  fill(router.weight, draw(*router.weight.shape, scale=1.0))
  out = fill_experts(module.experts, draw, router.weight.shape[0])
  x = draw(B, T, D, scale=1.0)
  logits, weights, experts = router(x.reshape(-1, D))
  refuse_close(logits.softmax(-1), k, name)
  out |= shaped(logits, experts, weights) | measure(module, router.weight, x)
  out["balance"] = mixtral.load_balancing_loss_func(
    (logits,), logits.shape[-1], k
  )
  return out | {"top_k": k}


def mixtral_block():
  config = transformers.MixtralConfig(
    hidden_size=D,
    intermediate_size=F,
    num_local_experts=8,
    num_experts_per_tok=2,
  )
  config._experts_implementation = "eager"
  module = mixtral.MixtralSparseMoeBlock(config).eval()
  return top_k_block(module, module.gate, Weights(1), 2, "mixtral")


def qwen3_block():
  config = transformers.Qwen3MoeConfig(
    hidden_size=D,
    moe_intermediate_size=F,
    num_experts=8,
    num_experts_per_tok=3,
    norm_topk_prob=False,
  )
  config._experts_implementation = "eager"
  module = qwen3.Qwen3MoeSparseMoeBlock(config).eval()
  return top_k_block(module, module.gate, Weights(2), 3, "qwen3")


def switch_block(capacity):
  config = transformers.SwitchTransformersConfig(
    d_model=D,
    hidden_size=D,
    d_ff=F,
    num_experts=8,
    expert_capacity=capacity,
    dense_act_fn="relu",
    router_bias=False,
  )
  module = switch.SwitchTransformersSparseMLP(config).eval()
  draw, router = Weights(1), module.router.classifier
  fill(router.weight, draw(8, D, scale=0.7))
  up, down = draw(8, F, D, scale=D**-0.5), draw(8, D, F, scale=F**-0.5)
  for e in range(8):
    fill(module.experts[f"expert_{e}"].wi.weight, up[e])
    fill(module.experts[f"expert_{e}"].wo.weight, down[e])
  x = draw(B, T, D, scale=1.0)
  taken, weight, logits = module.router(x)
  prob = logits.softmax(-1)
  refuse_close(prob, 1, "switch")
  served = taken.sum(-1, keepdim=True) > 0
  wanted = logits.argmax(-1, keepdim=True)
  experts = torch.where(served, wanted, -1)
  out = shaped(logits, experts, weight) | measure(module, router.weight, x)
  return out | {
    "up": up.transpose(1, 2),
    "down": down.transpose(1, 2),
    "balance": switch.load_balancing_loss_func(prob, wanted),
    "z": switch.router_z_loss_func(logits),
    "capacity": capacity,
  }


def deepseek_block():
  config = transformers.DeepseekV3Config(
    hidden_size=D,
    moe_intermediate_size=F,
    n_shared_experts=2,
    n_routed_experts=8,
    num_experts_per_tok=3,
    n_group=4,
    topk_group=2,
    routed_scaling_factor=2.5,
    norm_topk_prob=True,
  )
  config._experts_implementation = "eager"
  module = deepseek.DeepseekV3MoE(config).eval()
  draw, router = Weights(1), module.gate
  fill(router.weight, draw(8, D, scale=0.5))
  bias = draw(8, scale=0.3)
  x = draw(B, T, D, scale=1.0)
  rows = x.reshape(-1, D)
  unbiased = router(rows)[2].sort(-1).values
  fill(router.e_score_correction_bias, bias)
  logits, weights, experts = router(rows)
  biased = logits.sigmoid() + bias
  assert (unbiased != experts.sort(-1).values).any(), "the bias decides nothing"
  free = biased.topk(3).indices.sort(-1).values
  assert (free != experts.sort(-1).values).any(), "the groups decide nothing"
  group = biased.reshape(-1, 4, 2).sum(-1)
  refuse_close(group, 2, "deepseek's groups")
  kept = group.argsort(-1, descending=True).argsort(-1) < 2
  kept = kept.repeat_interleave(2, -1)
  refuse_close(torch.where(kept, biased, -9.0), 3, "deepseek")
  experts, weights = by_score(experts, weights, biased)
  out = fill_experts(module.experts, draw, 8)
  out |= fill_mlp(module.shared_experts, draw, "shared_")
  out |= shaped(logits, experts, weights) | measure(module, router.weight, x)
  settings = {"top_k": 3, "groups": 4, "kept_groups": 2, "scale": 2.5}
  return out | settings | {"bias": bias}


def longcat_block():
  """Experts 6, 7 and 8 are the identity."""
  config = transformers.LongcatFlashConfig(
    hidden_size=D,
    expert_ffn_hidden_size=F,
    n_routed_experts=6,
    zero_expert_num=3,
    moe_topk=3,
    routed_scaling_factor=6.0,
  )
  config._experts_implementation = "eager"
  module = longcat.LongcatFlashMoE(config).eval()
  draw, router = Weights(1), module.router
  fill(router.classifier.weight, draw(9, D, scale=0.5))
  bias = draw(9, scale=0.1)
  x = draw(B, T, D, scale=1.0)
  rows = x.reshape(-1, D)
  unbiased = router(rows)[2].sort(-1).values
  fill(router.e_score_correction_bias, bias)
  logits, weights, experts = router(rows)
  assert (unbiased != experts.sort(-1).values).any(), "the bias decides nothing"
  ffn = (experts < 6).sum(-1)
  assert len(ffn.unique()) > 2, "tokens differ in how many experts they ask"
  biased = logits.softmax(-1) + bias
  refuse_close(biased, 3, "longcat")
  experts, weights = by_score(experts, weights, biased)
  out = fill_experts(module.experts, draw, 6)
  out |= shaped(logits, experts, weights)
  out |= measure(module, router.classifier.weight, x)
  return out | {"bias": bias, "top_k": 3, "scale": 6.0}


def main():
  blocks = {
    "mixtral": mixtral_block(),
    "qwen3": qwen3_block(),
    "switch": switch_block(T),
    "switch_drops": switch_block(2),
    "deepseek": deepseek_block(),
    "longcat": longcat_block(),
  }
  assert (blocks["switch_drops"]["experts"] < 0).any(), "nothing is dropped"
  plain = lambda a: a.detach().numpy() if torch.is_tensor(a) else np.array(a)
  arrays = {
    f"{block}/{name}": np.asarray(plain(value), order="C")
    for block, values in blocks.items()
    for name, value in values.items()
  }
  assert all(np.isfinite(a).all() for a in arrays.values())
  versions = (
    f"torch {torch.__version__}, transformers {transformers.__version__}"
  )
  np.savez_compressed(FILE, versions=np.array(versions), **arrays)
  print(f"{FILE}: {FILE.stat().st_size / 1024:.0f} kB, {versions}")


if __name__ == "__main__":
  main()
