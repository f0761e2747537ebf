# SPDX-License-Identifier: Apache-2.0
"""Makes `lightning.npz`: what transformers computes for Lightning attention.

    pip install torch==2.14.1 transformers==5.23.0 numpy
    python tests/goldens/make_lightning.py

Needed only to make the file again; the tests read the file, and import neither.
`MiniMaxLightningAttention` of each of L layers, with weights of our own, in f32
on a CPU, in blocks that T is no multiple of, `LAYER/ARRAY` each:

    x      f[B, T, D]  what goes in
    query, key, value, gate, out  f[D, D], norm f[D]: the weights
    y      f[B, T, D]  what comes out
    state  f[B, H, W, W]  after the last token
    dx, dquery, dkey, dvalue, dgate, dnorm: gradients of sum(sin(y))
    more   f[B, 3, D]  further tokens, and `ymore`: one by one, from the state

and `heads`, `layers`.  Weights and inputs are multiples of 1/64: exact in
bfloat16, and small when compressed.

Axes: B batch, T tokens, D features, H heads, W head width.
"""

from pathlib import Path

import numpy as np
import torch
import transformers
from transformers.models.minimax import modeling_minimax as minimax

B, T, D, H, L = 2, 21, 16, 4, 3
FILE = Path(__file__).with_name("lightning.npz")


def drawn(rng, *shape, scale):
  values = np.round(64 * scale * rng.standard_normal(shape)) / 64
  return torch.tensor(values, dtype=torch.float32)


def attention(layer):
  """One layer's module, its weights by name, and the gradients by name."""
  config = transformers.MiniMaxConfig(
    hidden_size=D,
    num_attention_heads=H,
    num_hidden_layers=L,
    block_size=8,
    layer_types=["linear_attention"] * L,
  )
  module = minimax.MiniMaxLightningAttention(config, layer).eval()
  rng = np.random.default_rng(layer)
  weights = {
    name: drawn(rng, D, D, scale=D**-0.5)
    for name in ("query", "key", "value", "gate", "out")
  }
  weights["norm"] = 1 + drawn(rng, D, scale=0.2)
  # Its rows: for each head queries, then keys, then values.
  by_head = [
    weights[n].T.reshape(H, D // H, D) for n in ("query", "key", "value")
  ]
  module.qkv_proj.weight.data = torch.cat(by_head, 1).reshape(3 * D, D)
  module.output_gate.weight.data = weights["gate"].T.clone()
  module.out_proj.weight.data = weights["out"].T.clone()
  module.norm.weight.data = weights["norm"].clone()
  return module, weights, rng


def layer(index):
  module, weights, rng = attention(index)
  x = drawn(rng, B, T, D, scale=1.0).requires_grad_()
  y, state = module(x, None, None)
  tensors = [
    x,
    module.qkv_proj.weight,
    module.output_gate.weight,
    module.norm.weight,
  ]
  dx, dqkv, dgate, dnorm = torch.autograd.grad(torch.sin(y).sum(), tensors)
  parts = dqkv.reshape(H, 3, D // H, D).unbind(1)
  dq, dk, dv = (part.reshape(D, D).T for part in parts)
  cache = minimax.MiniMaxCache()
  more = drawn(rng, B, 3, D, scale=1.0)
  with torch.no_grad():
    module(x, None, None, cache)
    steps = [module(more[:, i : i + 1], None, None, cache)[0] for i in range(3)]
  return weights | {
    "x": x,
    "y": y,
    "state": state,
    "more": more,
    "ymore": torch.cat(steps, 1),
    "dx": dx,
    "dquery": dq,
    "dkey": dk,
    "dvalue": dv,
    "dgate": dgate.T,
    "dnorm": dnorm,
  }


def main():
  plain = lambda a: np.asarray(a.detach().numpy(), order="C")
  arrays = {
    f"{index}/{name}": plain(value)
    for index in range(L)
    for name, value in layer(index).items()
  }
  assert all(np.isfinite(a).all() for a in arrays.values())
  versions = (
    f"torch {torch.__version__}, transformers {transformers.__version__}"
  )
  settings = {"versions": np.array(versions), "heads": H, "layers": L}
  np.savez_compressed(FILE, **settings, **arrays)
  print(f"{FILE}: {FILE.stat().st_size / 1024:.0f} kB, {versions}")


if __name__ == "__main__":
  main()
