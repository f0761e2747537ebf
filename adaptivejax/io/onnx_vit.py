# SPDX-License-Identifier: Apache-2.0
"""The weights of a DINOv2 that was exported to ONNX, as Hugging Face's files.

    onnx_to_folder("vit_s_focus.onnx", "vit", prefix="backbone.")
    vit = load("vit").model

The exporter of PyTorch keeps the names of parameters but for matrices, which it
transposes: these are found by the name of the node that multiplies by them, and
the positions, which it cuts in two, by their shape.  Only tensors are read; the
graph is never run, and what is not the encoder's is left out.  Needs `onnx`.
"""

import json
from pathlib import Path

import numpy as np

from adaptivejax.io.write import Tensor, write_folder


def onnx_to_folder(
  source: str | Path,
  folder: str | Path,
  *,
  prefix: str = "",
  heads: int,
  epsilon: float = 1e-6,
) -> None:
  """Writes `config.json` and `model.safetensors`.

  Args:
    source: the .onnx file.
    folder: that is not there yet.
    prefix: of the encoder's names in the file, with its dot.
    heads: of attention; no tensor says how many.
    epsilon: of the norms, likewise.

  Raises:
    ValueError: the tensors are not those of a DINOv2.
  """
  named = _named(Path(source), prefix)
  config = _config(named, str(source), heads, epsilon)
  tensors = [
    Tensor(name, a.size, a.nbytes, lambda a=a: a) for name, a in named.items()
  ]
  write_folder(Path(folder), tensors, config, {}, 5 * 10**9)


def _named(source: Path, prefix: str) -> dict[str, np.ndarray]:
  """The encoder's tensors by their names in PyTorch."""
  import onnx  # pyrefly: ignore[missing-import]
  from onnx import numpy_helper  # pyrefly: ignore[missing-import]

  graph = onnx.load(source, load_external_data=False).graph
  values = {t.name: numpy_helper.to_array(t) for t in graph.initializer}
  own = lambda name: name.startswith(prefix) and not name.startswith("onnx::")
  named = {n.removeprefix(prefix): a for n, a in values.items() if own(n)}
  for node in graph.node:
    if node.op_type == "MatMul" and node.input[1] in values:
      module = node.name.strip("/").replace("/", ".").rpartition(".")[0]
      if module.startswith(prefix):
        name = f"{module.removeprefix(prefix)}.weight"
        named[name] = values[node.input[1]].T
  places = [
    a
    for n, a in values.items()
    if n.startswith("onnx::") and a.ndim == 3 and a.shape[0] == 1
  ]
  if places:
    places.sort(key=lambda a: a.shape[1])
    named["embeddings.position_embeddings"] = np.concatenate(places, axis=1)
  return named


def _config(named, source: str, heads: int, epsilon: float) -> dict:
  """What the shapes of the tensors say."""
  try:
    kernel = named["embeddings.patch_embeddings.projection.weight"]
    places = named["embeddings.position_embeddings"]
    hidden = named["encoder.layer.0.mlp.fc1.bias"].size
  except KeyError as missing:
    raise ValueError(
      f"{source} holds no tensor {missing} under this prefix, so no DINOv2;"
      f" there are {json.dumps(sorted(named)[:4])}."
    ) from missing
  features, channels, patch, _ = kernel.shape
  layers = {n.split(".")[2] for n in named if n.startswith("encoder.layer.")}
  return {
    "architectures": ["Dinov2Model"],
    "model_type": "dinov2",
    "hidden_act": "gelu",
    "hidden_size": features,
    "image_size": patch * round((places.shape[1] - 1) ** 0.5),
    "layer_norm_eps": epsilon,
    "mlp_ratio": hidden / features,
    "num_attention_heads": heads,
    "num_channels": channels,
    "num_hidden_layers": len(layers),
    "patch_size": patch,
    "qkv_bias": True,
    "use_mask_token": "embeddings.mask_token" in named,
    "use_swiglu_ffn": False,
  }
