# SPDX-License-Identifier: Apache-2.0
"""Law: ViT, DINOv2 and BERT say what transformers says, and are saved alike.

The goldens are made by `tests/goldens/make_encoders.py`.
"""

import functools
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from adaptivejax.io import load, save
from adaptivejax.models import (
  Encoder,
  EncoderConfig,
  ImageInput,
  TextInput,
  mean_of_tokens,
)
from adaptivejax.nn import every_layer

FOLDER = Path(__file__).parents[1] / "goldens/encoders"
NAMES = ("bert", "dinov2", "vit")


@functools.cache
def golden(name):
  """`(loaded, arrays)`."""
  with np.load(FOLDER / name / "golden.npz") as file:
    return load(FOLDER / name), dict(file)


def inputs_of(arrays):
  if "pixels" in arrays:
    return arrays["pixels"], {}
  more = {k: arrays[k].astype(np.int32) for k in ("types", "lengths")}
  return arrays["tokens"].astype(np.int32), more


@functools.cache
def output(name):
  loaded, arrays = golden(name)
  inputs, more = inputs_of(arrays)
  run = jax.jit(lambda m, x, more: m(x, stack=every_layer, **more))
  return run(loaded.model, inputs, more)


def real(arrays):
  """Tokens that are no padding, bool[B, N]."""
  shape = arrays["final"].shape[:2]
  lengths = arrays.get("lengths", np.full(shape[0], shape[1]))
  return np.arange(shape[1]) < lengths[:, None]


@pytest.mark.parametrize("name", NAMES)
def test_it_says_what_transformers_says(name):
  out, (_, arrays) = output(name), golden(name)
  there = real(arrays)
  close = functools.partial(np.testing.assert_allclose, rtol=0, atol=1e-4)
  hidden = arrays["hidden"][1:]
  close(out.hidden[:-1][:, there], hidden[:-1][:, there])
  close(np.asarray(out.x)[there], arrays["final"][there])
  close(out.pooled, arrays["pooled"])


@pytest.mark.parametrize("name", ["dinov2", "vit"])
def test_images_of_other_sides(name):
  loaded, arrays = golden(name)
  got = jax.jit(lambda m, x: m(x).x)(loaded.model, arrays["wide"])
  np.testing.assert_allclose(got, arrays["wide_final"], rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_files_come_out_bit_by_bit(name, tmp_path):
  loaded, _ = golden(name)
  save(loaded.model, tmp_path / "copy", like=loaded)
  again = load(tmp_path / "copy")
  jax.tree.map(
    np.testing.assert_array_equal,
    nnx.state(loaded.model),
    nnx.state(again.model),
  )
  size = lambda folder: (folder / "model.safetensors").stat().st_size
  assert abs(size(tmp_path / "copy") - size(FOLDER / name)) < 4096


def test_positions_that_count_up_are_no_weights(tmp_path):
  """Old files hold them, as integers; a weight may not be of these."""
  source = FOLDER / "bert"
  shutil.copy(source / "config.json", tmp_path)
  tensors = load_file(source / "model.safetensors")
  counting = {"embeddings.position_ids": np.arange(16)[None]}
  save_file({**tensors, **counting}, tmp_path / "model.safetensors")
  jax.tree.map(
    np.testing.assert_array_equal,
    nnx.state(load(tmp_path).model),
    nnx.state(golden("bert")[0].model),
  )
  name = "pooler.dense.bias"
  tensors[name] = tensors[name].astype(np.int64)
  save_file(tensors, tmp_path / "model.safetensors")
  with pytest.raises(ValueError, match=f"{name}' is of dtype 'I64'"):
    load(tmp_path)


def test_heads_are_refused_by_name(tmp_path):
  source = FOLDER / "vit"
  shutil.copy(source / "config.json", tmp_path)
  tensors = load_file(source / "model.safetensors")
  tensors["classifier.weight"] = np.zeros((3, 24), np.float32)
  save_file(tensors, tmp_path / "model.safetensors")
  with pytest.raises(ValueError, match=r"no place.*classifier\.weight"):
    load(tmp_path)


@pytest.mark.parametrize(
  ("name", "field", "value"),
  [
    ("vit", "hidden_act", "relu"),
    ("vit", "qkv_bias", False),
    ("vit", "image_size", 13),
    ("dinov2", "use_swiglu_ffn", True),
    ("dinov2", "mlp_ratio", 1.3),
    ("bert", "is_decoder", True),
    ("bert", "position_embedding_type", "relative_key"),
    ("bert", "something_new", 1),
  ],
)
def test_fields_that_are_not_supported_are_named(name, field, value, tmp_path):
  config = json.loads((FOLDER / name / "config.json").read_text())
  (tmp_path / "config.json").write_text(json.dumps({**config, field: value}))
  shutil.copy(FOLDER / name / "model.safetensors", tmp_path)
  with pytest.raises(ValueError, match=field):
    load(tmp_path)


def test_padding_changes_nothing():
  loaded, arrays = golden("bert")
  tokens, more = inputs_of(arrays)
  lengths = jnp.asarray(more["lengths"])
  other = np.where(real(arrays), tokens, (tokens + 7) % 50)
  run = jax.jit(lambda m, x, more: m(x, **more))
  got = run(loaded.model, other, more)
  want = output("bert")
  there = real(arrays)
  np.testing.assert_allclose(
    np.asarray(got.x)[there], np.asarray(want.x)[there], rtol=0, atol=1e-6
  )
  pool = lambda x: mean_of_tokens(x, lengths)
  wanted = [x[:n].mean(0) for x, n in zip(want.x, more["lengths"])]
  np.testing.assert_allclose(pool(got.x), wanted, rtol=1e-5, atol=1e-6)


def test_the_cost_by_hand():
  d, f, n = 24, 40, 17
  layer = n * (8 * d * d + 4 * d * f) + 4 * n * n * d
  want = 2 * (2 * layer + 2 * 16 * 27 * d + 2 * d * d)
  np.testing.assert_allclose(output("vit").cost.spent, want, rtol=1e-6)
  assert output("vit").cost.share == 1


def test_bad_input_is_refused_in_words():
  config = EncoderConfig(
    ImageInput(8, 4), layers=1, features=8, hidden=8, heads=2
  )
  model = Encoder(config, rngs=nnx.Rngs(0))
  with pytest.raises(ValueError, match=r"patches of 4.*\(1, 9, 8, 3\)"):
    model(jnp.zeros((1, 9, 8, 3)))
  with pytest.raises(ValueError, match="types"):
    model(jnp.zeros((1, 8, 8, 3)), types=jnp.zeros((1, 5), jnp.int32))
  with pytest.raises(ValueError, match="divide"):
    Encoder(EncoderConfig(ImageInput(9, 4)), rngs=nnx.Rngs(0))
  with pytest.raises(ValueError, match="`context`"):
    EncoderConfig(TextInput(context=0))
  text, _ = golden("bert")
  with pytest.raises(ValueError, match="16 positions"):
    text.model(jnp.zeros((1, 17), jnp.int32))
  with pytest.raises(ValueError, match="integers"):
    text.model(jnp.zeros((1, 8)))
