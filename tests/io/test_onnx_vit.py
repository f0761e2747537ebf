# SPDX-License-Identifier: Apache-2.0
"""Law: a DINOv2 that went through ONNX is the DINOv2 that it was.

The files are written here, with the names that PyTorch's exporter gives.
"""

from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from adaptivejax.io import load
from adaptivejax.io.onnx_vit import onnx_to_folder

onnx = pytest.importorskip("onnx", reason="needs `.[vision]`, 20 MB")
GOLDEN = Path(__file__).parents[1] / "goldens/encoders/dinov2"
PLACES = "embeddings.position_embeddings"


def tensors():
  found = load_file(GOLDEN / "model.safetensors")
  del found["embeddings.mask_token"]
  return found


def write(path, tensors, prefix="backbone."):
  """As `torch.onnx.export` does, with a head that is not the encoder's."""
  values, nodes = {"decoder.weight": np.ones((2, 3), np.float32)}, []
  for i, (name, a) in enumerate(tensors.items()):
    if name == PLACES:
      values |= {"onnx::Concat_1": a[:, :1], "onnx::Reshape_2": a[:, 1:]}
    elif a.ndim == 2 and name.startswith("encoder"):
      module = f"/{prefix}{name}".replace(".", "/").replace("layer/", "layer.")
      node = f"{module.removesuffix('/weight')}/MatMul"
      values[f"onnx::MatMul_{i}"] = np.ascontiguousarray(a.T)
      given = [f"x{i}", f"onnx::MatMul_{i}"]
      nodes.append(onnx.helper.make_node("MatMul", given, [f"y{i}"], node))
    else:
      values[prefix + name] = a
  made = [onnx.numpy_helper.from_array(a, name) for name, a in values.items()]
  graph = onnx.helper.make_graph(nodes, "g", [], [], made)
  path.write_bytes(onnx.helper.make_model(graph).SerializeToString())


def test_it_is_the_same_model(tmp_path):
  write(tmp_path / "vit.onnx", tensors())
  onnx_to_folder(
    tmp_path / "vit.onnx", tmp_path / "vit", prefix="backbone.", heads=3
  )
  with np.load(GOLDEN / "golden.npz") as golden:
    pixels, final = golden["pixels"], golden["final"]
  got = jax.jit(lambda m, x: m(x).x)(load(tmp_path / "vit").model, pixels)
  np.testing.assert_allclose(got, final, rtol=0, atol=1e-4)
  written = load_file(tmp_path / "vit/model.safetensors")
  assert written.keys() - {"decoder.weight"} == tensors().keys()
  for name, a in tensors().items():
    np.testing.assert_array_equal(written[name], a)


def test_what_is_no_dinov2_is_refused(tmp_path):
  some = tensors()
  del some[PLACES]
  write(tmp_path / "vit.onnx", some)
  with pytest.raises(ValueError, match="position_embeddings"):
    onnx_to_folder(
      tmp_path / "vit.onnx", tmp_path / "vit", prefix="backbone.", heads=3
    )
  assert not (tmp_path / "vit").exists()


def test_a_layer_with_a_hole_is_refused_when_loaded(tmp_path):
  some = tensors()
  del some["encoder.layer.1.norm2.bias"]
  write(tmp_path / "vit.onnx", some)
  onnx_to_folder(
    tmp_path / "vit.onnx", tmp_path / "vit", prefix="backbone.", heads=3
  )
  with pytest.raises(ValueError, match=r"layer\.1\.norm2\.bias.*missing"):
    load(tmp_path / "vit")
