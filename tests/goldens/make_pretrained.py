# SPDX-License-Identifier: Apache-2.0
"""Makes `pretrained/`: tiny random models of Hugging Face transformers.

    pip install torch==2.14.1 transformers==5.23.0 numpy
    python tests/goldens/make_pretrained.py

Needed only to make the files again; the tests read them, and import neither.
One folder for each case, `config.json` and `model.safetensors` as transformers
writes them, and what it computes with these weights in f32 on a CPU, attention
"eager", in `golden.npz`:

    tokens  i64[B, T]
    hidden  f32[L, B, T, D]  after each layer
    final   f32[B, T, D]     after the last norm
    logits  f32[B, T, V]

Weights are of our own seeds and exact in bfloat16; norms and biases are far
from ones and zeros, so that a forgotten one shows.  No choice of experts is a
close one: a seed with a margin under 1e-3 is passed over.

Axes: B batch, T tokens, D features, L layers, V vocabulary.
"""

import json
import shutil
from pathlib import Path

import numpy as np
import torch
import transformers

HERE = Path(__file__).with_name("pretrained")
B, T = 2, 12
SHAPE = {
  "vocab_size": 96,
  "hidden_size": 32,
  "intermediate_size": 48,
  "num_hidden_layers": 2,
  "num_attention_heads": 4,
  "num_key_value_heads": 2,
  "max_position_embeddings": 256,
}
LLAMA_3 = {
  "rope_theta": 100.0,
  "rope_type": "llama3",
  "factor": 4.0,
  "low_freq_factor": 1.0,
  "high_freq_factor": 4.0,
  "original_max_position_embeddings": 64,
}
CASES = {
  "llama": (transformers.LlamaConfig, "float32", {
    "rope_parameters": LLAMA_3, "attention_bias": True, "mlp_bias": True,
    "num_hidden_layers": 3,
  }),
  "llama_tied": (transformers.LlamaConfig, "float16", {
    "rope_parameters": {
      "rope_theta": 5000.0, "rope_type": "linear", "factor": 2.5,
    },
    "tie_word_embeddings": True, "num_key_value_heads": 4, "head_dim": 12,
    "rms_norm_eps": 1e-3, "hidden_act": "gelu",
  }),
  "mistral": (transformers.MistralConfig, "bfloat16", {"sliding_window": 5}),
  "qwen2": (transformers.Qwen2Config, "float32", {"tie_word_embeddings": True}),
  "qwen2_window": (transformers.Qwen2Config, "bfloat16", {
    "use_sliding_window": True, "sliding_window": 3, "max_window_layers": 0,
  }),
  "qwen3": (transformers.Qwen3Config, "bfloat16", {"head_dim": 16}),
  "gemma": (transformers.GemmaConfig, "bfloat16", {
    "head_dim": 16, "num_key_value_heads": 1,
  }),
  "mixtral": (transformers.MixtralConfig, "float32", {
    "num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 24,
    "sliding_window": 6,
  }),
  "qwen3_moe": (transformers.Qwen3MoeConfig, "bfloat16", {
    "num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 16,
    "head_dim": 16, "norm_topk_prob": True,
  }),
}  # fmt: skip


def randomise(model, seed):
  """Weights of a variance that keeps numbers near 1, exact in bfloat16."""
  random = torch.Generator().manual_seed(seed)
  for name, value in model.named_parameters():
    drawn = torch.randn(value.shape, generator=random)
    if "norm" in name:
      around = 0 if model.config.model_type == "gemma" else 1
      drawn = around + 0.4 * drawn
    elif name.endswith("bias"):
      drawn = 0.5 * drawn
    elif "embed" not in name:
      drawn = 1.5 * drawn / value.shape[-1] ** 0.5
    value.data.copy_(drawn.to(torch.bfloat16).float())


def observed(model, tokens):
  """What is in `golden.npz`, and the closest choice of experts."""
  seen, margins = [], []
  first = lambda out: out[0] if isinstance(out, tuple) else out
  for layer in model.model.layers:
    layer.register_forward_hook(lambda m, i, out: seen.append(first(out)))
    if hasattr(layer.mlp, "gate") and hasattr(layer.mlp, "experts"):
      layer.mlp.gate.register_forward_hook(
        lambda m, i, out: margins.append(margin(first(out), m.top_k))
      )
  model.model.norm.register_forward_hook(lambda m, i, out: seen.append(out))
  with torch.no_grad():
    logits = model(tokens, use_cache=False).logits
  arrays = {
    "tokens": tokens,
    "hidden": torch.stack(seen[:-1]),
    "final": seen[-1],
    "logits": logits,
  }
  return arrays, min(margins, default=1)


def margin(scores, top_k):
  """Between the last chosen and the first that is not."""
  best = scores.softmax(-1).sort(-1, descending=True).values
  return float((best[..., top_k - 1] - best[..., top_k]).min())


def as_version_4(path):
  """Rewrites a config as transformers 4 wrote it."""
  config = json.loads(path.read_text())
  rope = config.pop("rope_parameters")
  config["rope_theta"] = rope.pop("rope_theta")
  config["rope_scaling"] = {"type": rope.pop("rope_type"), **rope}
  config["torch_dtype"] = config.pop("dtype")
  config["transformers_version"] = "4.40.0"
  text = json.dumps(config, indent=2, sort_keys=True) + "\n"
  path.write_text(text)


def check_fused(model):
  """All experts in one tensor: gate above up, as `io` reads them."""
  if not hasattr(model.model.layers[0].mlp, "experts"):
    return
  experts = model.model.layers[0].mlp.experts
  x = torch.randn(1, model.config.hidden_size)
  index = torch.zeros(1, 1, dtype=torch.long)
  got = experts(x, index, torch.ones(1, 1))
  gate, up = (experts.gate_up_proj[0] @ x[0]).chunk(2)
  want = experts.down_proj[0] @ (experts.act_fn(gate) * up)
  torch.testing.assert_close(got[0], want)


def make(name, seed):
  """Writes a case; whether its choices are clear."""
  config, dtype, more = CASES[name]
  config = config(**{**SHAPE, **more})
  model = transformers.AutoModelForCausalLM.from_config(config)
  randomise(model, seed)
  with torch.no_grad():
    check_fused(model)
  folder = HERE / name
  shutil.rmtree(folder, ignore_errors=True)
  model.to(getattr(torch, dtype)).save_pretrained(folder)
  (folder / "generation_config.json").unlink()
  if name == "llama_tied":
    as_version_4(folder / "config.json")
  model = transformers.AutoModelForCausalLM.from_pretrained(
    folder, dtype=torch.float32, attn_implementation="eager"
  ).eval()
  random = torch.Generator().manual_seed(seed)
  tokens = torch.randint(0, SHAPE["vocab_size"], (B, T), generator=random)
  found, closest = observed(model, tokens)
  arrays = {k: v.numpy() for k, v in found.items()}
  np.savez_compressed(folder / "golden.npz", **arrays)
  size = sum(file.stat().st_size for file in folder.iterdir())
  print(f"{name}: {size} bytes, logits to {abs(arrays['logits']).max():.1f}")
  return closest > 1e-3


if __name__ == "__main__":
  for number, case in enumerate(CASES):
    while not make(case, number):
      number += len(CASES)
