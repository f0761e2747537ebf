# SPDX-License-Identifier: Apache-2.0
"""Makes `encoders/`: tiny random encoders of Hugging Face transformers.

    pip install torch==2.14.1 transformers==5.23.0 numpy
    python tests/goldens/make_encoders.py

Needed only to make the files again; the tests read them, and import neither.
One folder for each case, `config.json` and `model.safetensors` as transformers
writes them, and what it computes with these weights in f32 on a CPU, attention
"eager", in `golden.npz`:

    pixels f32[B, H, W, C], or tokens and types i64[B, N], lengths i64[B]
    hidden f32[L + 1, B, N, D]  embedded, and after each layer
    final  f32[B, N, D]         after the last norm
    pooled f32[B, D]

and for images `wide`, of other sides, and `wide_final`, with positions
interpolated.  Weights are exact in bfloat16, norms and biases far from ones and
zeros, so that a forgotten one shows.

Axes: B batch, H, W, C of images, N tokens, D features, L layers.
"""

import shutil
from pathlib import Path

import numpy as np
import torch
import transformers

HERE = Path(__file__).with_name("encoders")
SHAPE = {
  "hidden_size": 24,
  "num_hidden_layers": 2,
  "num_attention_heads": 3,
}
HIDDEN = {"intermediate_size": 40}
IMAGE = {"image_size": 12, "patch_size": 3}
CASES = {
  "vit": (transformers.ViTConfig, {**HIDDEN, **IMAGE, "layer_norm_eps": 1e-5}),
  "dinov2": (transformers.Dinov2Config, {**IMAGE, "mlp_ratio": 2}),
  "bert": (
    transformers.BertConfig,
    {
      **HIDDEN,
      "vocab_size": 50,
      "max_position_embeddings": 16,
      "type_vocab_size": 2,
    },
  ),
}


def randomise(model, seed):
  random = torch.Generator().manual_seed(seed)
  for name, value in model.named_parameters():
    drawn = torch.randn(value.shape, generator=random)
    lower = name.lower()
    if ("norm" in lower and "bias" not in lower) or "lambda" in lower:
      drawn = 1 + 0.4 * drawn
    elif value.ndim > 1 and "embeddings" not in lower:
      drawn = 1.5 * drawn / value.shape[-1] ** 0.5
    else:
      drawn = 0.5 * drawn
    value.data.copy_(drawn.to(torch.bfloat16).float())


def observed(model, **inputs):
  with torch.no_grad():
    return model(**inputs, output_hidden_states=True)


def images(model, random):
  draw = lambda *shape: torch.randn(shape, generator=random)
  pixels, wide = draw(2, 3, 12, 12), draw(2, 3, 18, 9)
  more = {"interpolate_pos_encoding": True}
  if model.config.model_type == "dinov2":
    more = {}
  out = observed(model, pixel_values=pixels)
  other = observed(model, pixel_values=wide, **more)
  last = lambda a: a.permute(0, 2, 3, 1)
  arrays = {
    "pixels": last(pixels),
    "wide": last(wide),
    "wide_final": other.last_hidden_state,
  }
  return out, arrays


def texts(model, random):
  tokens = torch.randint(0, 50, (3, 9), generator=random)
  types = torch.randint(0, 2, (3, 9), generator=random)
  lengths = torch.tensor([9, 4, 7])
  mask = (torch.arange(9) < lengths[:, None]).long()
  out = observed(
    model, input_ids=tokens, token_type_ids=types, attention_mask=mask
  )
  return out, {"tokens": tokens, "types": types, "lengths": lengths}


def make(name, seed):
  config, more = CASES[name]
  model = transformers.AutoModel.from_config(
    config(**{**SHAPE, **more}), attn_implementation="eager"
  ).eval()
  randomise(model, seed)
  folder = HERE / name
  shutil.rmtree(folder, ignore_errors=True)
  model.save_pretrained(folder)
  random = torch.Generator().manual_seed(seed)
  out, arrays = (texts if name == "bert" else images)(model, random)
  arrays |= {
    "hidden": torch.stack(out.hidden_states),
    "final": out.last_hidden_state,
    "pooled": out.pooler_output,
  }
  arrays = {k: np.ascontiguousarray(v.numpy()) for k, v in arrays.items()}
  np.savez_compressed(folder / "golden.npz", **arrays)
  size = sum(file.stat().st_size for file in folder.iterdir())
  print(f"{name}: {size} bytes, final to {abs(arrays['final']).max():.1f}")


if __name__ == "__main__":
  for number, case in enumerate(CASES):
    make(case, number)
