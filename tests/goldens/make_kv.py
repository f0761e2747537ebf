# SPDX-License-Identifier: Apache-2.0
"""Makes `kv.npz`: which keys of a prompt kvpress keeps.

    pip install torch==2.14.1 transformers==5.23.0 numpy
    pip install --no-deps kvpress==0.5.5
    python tests/goldens/make_kv.py

Needed only to make the file again; the tests read the file, and import neither.
Queries and keys of our own, multiples of 1/64, in f32 on a CPU:

    q       f[B, T, H, W]
    k       f[B, G, T, W]
    observed/scores  f[B, G, T]   ObservedAttentionPress
    observed/kept    i[B, G, C]   the C best, rising
    snap/scores      f[B, G, T]   SnapKVPress of `snap/window` and `snap/kernel`
    snap/kept        i[B, G, C]

No choice is a close one: the script refuses a margin under 1e-5.

Axes: B batch, T tokens, H query heads, G key heads, W head width, C kept.
"""

import importlib.util
import sys
import types
from pathlib import Path

import numpy as np
import torch

B, T, H, G, W, C = 2, 24, 4, 2, 8, 10
WINDOW, KERNEL = 4, 5
FILE = Path(__file__).with_name("kv.npz")


def presses():
  """The two classes, without the rest of kvpress and what that imports."""
  spec = importlib.util.find_spec("kvpress")
  root = Path(spec.submodule_search_locations[0])
  for name in ("kvpress", "kvpress.presses"):
    path = root.joinpath(*name.split(".")[1:])
    package = types.ModuleType(name)
    package.__path__ = [str(path)]
    sys.modules[name] = package
  from kvpress.presses.observed_attention_press import ObservedAttentionPress
  from kvpress.presses.snapkv_press import SnapKVPress

  return (
    ObservedAttentionPress(),
    SnapKVPress(window_size=WINDOW, kernel_size=KERNEL),
  )


def main():
  rng = np.random.default_rng(0)
  draw = lambda *shape: torch.tensor(
    np.round(64 * rng.standard_normal(shape)) / 64, dtype=torch.float32
  )
  q, k = 2 * draw(B, H, T, W), draw(B, G, T, W)
  each = k.repeat_interleave(H // G, 1)
  scores = q @ each.transpose(2, 3) / W**0.5
  hidden = torch.ones(T, T, dtype=torch.bool).triu(1)
  attentions = scores.masked_fill(hidden, float("-inf")).softmax(-1)
  config = types.SimpleNamespace(num_attention_heads=H, num_key_value_heads=G)
  module = types.SimpleNamespace(config=config, head_dim=W)
  states = torch.zeros(B, T, H * W)
  out = {
    "q": q.movedim(1, 2).numpy(),
    "k": k.numpy(),
    "snap/window": WINDOW,
    "snap/kernel": KERNEL,
  }
  for name, press in zip(("observed", "snap"), presses()):
    given = press.score(module, states, k, k, attentions, {})
    top = given.topk(C + 1, dim=-1)
    margin = (top.values[..., -2] - top.values[..., -1]).min()
    assert margin > 1e-5, (name, margin)
    out[f"{name}/scores"] = given.numpy()
    out[f"{name}/kept"] = np.sort(top.indices[..., :C].numpy(), -1)
  np.savez_compressed(FILE, **out)


if __name__ == "__main__":
  main()
