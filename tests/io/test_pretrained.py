# SPDX-License-Identifier: Apache-2.0
"""Law: what is loaded is what was stored, and goes back as it came."""

import dataclasses
import json
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import adaptivejax as aj
from adaptivejax.io import Pretrained
from adaptivejax.models import DecoderConfig, DecoderLM
from adaptivejax.nn import MixtureOfExperts
from tests.io import folders
from tests.io.folders import CASES, GOLDENS

MIXTURES = ["mixtral", "qwen3_moe"]


def same(a, b):
  """Bit for bit, all of it."""
  assert jax.tree.structure(a) == jax.tree.structure(b)
  for one, other in zip(jax.tree.leaves(a), jax.tree.leaves(b)):
    assert one.dtype == other.dtype
    assert np.asarray(one).tobytes() == np.asarray(other).tobytes()


@pytest.mark.parametrize("name", CASES)
def test_files_come_back_bit_for_bit(name, tmp_path):
  smol = aj.load(GOLDENS / name)
  aj.save(smol.model, tmp_path / "out", like=smol)
  for file in ("model.safetensors", "config.json"):
    theirs = (GOLDENS / name / file).read_bytes()
    assert (tmp_path / "out" / file).read_bytes() == theirs


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_shards_hold_what_one_file_does(name, tmp_path):
  smol = aj.load(GOLDENS / name)
  aj.save(smol.model, tmp_path / "out", like=smol, max_shard_bytes=30_000)
  shards = sorted((tmp_path / "out").glob("model-*.safetensors"))
  assert len(shards) > 3
  assert shards[0].name == f"model-00001-of-{len(shards):05d}.safetensors"
  assert all(file.stat().st_size < 30_000 + 8_000 for file in shards)
  path = tmp_path / "out" / "model.safetensors.index.json"
  index = json.loads(path.read_text())
  sizes = [a.nbytes for a in folders.tensors_of(GOLDENS / name).values()]
  assert index["metadata"]["total_size"] == sum(sizes)
  assert len(index["weight_map"]) == len(sizes)
  same(aj.load(tmp_path / "out").model, smol.model)


@pytest.mark.parametrize("name", MIXTURES)
def test_experts_in_one_tensor_are_the_same_experts(name, tmp_path):
  folder = folders.copy_of(name, tmp_path)
  tensors, fused = folders.tensors_of(folder), {}
  gate, up, down = (
    ("w1", "w3", "w2")
    if name == "mixtral"
    else ("gate_proj", "up_proj", "down_proj")
  )
  module = "block_sparse_moe" if name == "mixtral" else "mlp"
  for layer in range(2):
    prefix = f"model.layers.{layer}.{module}.experts."
    experts = sorted({n.split(".")[5] for n in tensors if n.startswith(prefix)})
    take = lambda e, kind, at=prefix: tensors.pop(f"{at}{e}.{kind}.weight")
    both = [[take(e, gate), take(e, up)] for e in experts]
    fused[f"{prefix}gate_up_proj"] = np.stack([np.concatenate(b) for b in both])
    fused[f"{prefix}down_proj"] = np.stack([take(e, down) for e in experts])
  folders.store(folder, tensors | fused)
  smol = aj.load(folder)
  same(smol.model, aj.load(GOLDENS / name).model)
  aj.save(smol.model, tmp_path / "out", like=smol)  # apart again
  theirs = (GOLDENS / name / "model.safetensors").read_bytes()
  assert (tmp_path / "out" / "model.safetensors").read_bytes() == theirs


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_weights_have_the_type_asked_for(dtype, tmp_path):
  smol = aj.load(GOLDENS / "qwen2", dtype=dtype)
  types = {leaf.dtype for leaf in jax.tree.leaves(smol.model)}
  assert types == {jnp.dtype(dtype)}
  aj.save(smol.model, tmp_path / "out", like=smol)
  assert folders.config_of(tmp_path / "out")["dtype"] == dtype
  # the weights of this golden are exact in bfloat16
  back = aj.load(tmp_path / "out", dtype="float32").model
  near = 1e-3 if dtype == "float16" else 0  # the smallest are subnormal there
  for one, other in zip(
    jax.tree.leaves(back), jax.tree.leaves(aj.load(GOLDENS / "qwen2").model)
  ):
    np.testing.assert_allclose(one, other, atol=near)


def test_types_that_differ_need_one(tmp_path):
  folder = folders.copy_of("llama", tmp_path)
  tensors = folders.tensors_of(folder)
  name = "model.layers.1.mlp.up_proj.weight"
  folders.store(folder, tensors | {name: tensors[name].astype(np.float16)})
  with pytest.raises(ValueError, match=r"layers\.1\.mlp\.up_proj.*`dtype`"):
    aj.load(folder)
  aj.load(folder, dtype="float32")
  for other in ("int8", "float33"):
    with pytest.raises(ValueError, match=f"BF16.*{other}"):
      aj.load(folder, dtype=other)


def test_a_tied_readout_may_be_written_twice(tmp_path):
  folder = folders.copy_of("qwen2", tmp_path)
  tensors = folders.tensors_of(folder)
  table = tensors["model.embed_tokens.weight"]
  folders.store(folder, tensors | {"lm_head.weight": table})
  same(aj.load(folder).model, aj.load(GOLDENS / "qwen2").model)
  folders.store(folder, tensors | {"lm_head.weight": table + 1})
  with pytest.raises(ValueError, match=r"lm_head\.weight.*should equal"):
    aj.load(folder)


def test_rates_that_old_files_hold_are_computed(tmp_path):
  folder = folders.copy_of("mistral", tmp_path)
  old = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(4, np.float32)}
  folders.store(folder, folders.tensors_of(folder) | old)
  same(aj.load(folder).model, aj.load(GOLDENS / "mistral").model)


def test_files_beside_the_weights_go_along(tmp_path):
  folder = folders.copy_of("qwen2", tmp_path)
  (folder / "generation_config.json").write_bytes(b'{"top_k":  5}')
  (folder / "code.py").write_text("raise SystemExit")
  smol = aj.load(folder)
  assert smol.files == {"generation_config.json": b'{"top_k":  5}'}
  with pytest.raises(ValueError, match=r"tokenizer\.json"):
    smol.tokenizer()
  aj.save(smol.model, tmp_path / "out", like=smol)
  names = {path.name for path in (tmp_path / "out").iterdir()}
  assert names == {"config.json", "generation_config.json", "model.safetensors"}


class TestSharding:
  mesh = staticmethod(lambda: jax.make_mesh((4, 2), ("data", "model")))

  def check(self, model, name="llama"):
    whole = aj.load(GOLDENS / name).model
    same(jax.tree.map(np.asarray, model), jax.tree.map(np.asarray, whole))

  def test_one_for_all(self):
    device = jax.devices()[3]
    place = jax.sharding.SingleDeviceSharding(device)
    model = aj.load(GOLDENS / "llama", sharding=place).model
    assert all(leaf.device == device for leaf in jax.tree.leaves(model))
    self.check(model)

  @pytest.mark.parametrize("name", ["llama", "mixtral"])
  def test_a_function_of_the_path(self, name):
    mesh, seen = self.mesh(), {}

    def sharding(path, leaf):
      seen[path] = leaf.shape
      wide = path.endswith("kernel") and leaf.ndim > 2
      lead = [None] * (leaf.ndim - 2)
      return NamedSharding(mesh, P(*lead, "data", "model") if wide else P())

    model = aj.load(GOLDENS / name, sharding=sharding).model
    kernel = model.layers.attention.key_value.kernel.get_value()
    assert kernel.sharding.spec == P(None, "data", "model")
    assert kernel.addressable_shards[0].data.shape[1:] == (8, 16)
    assert seen["layers.attention.key_value.kernel"] == kernel.shape
    self.check(model, name)

  def test_a_tree(self):
    place = NamedSharding(self.mesh(), P())
    whole = aj.load(GOLDENS / "llama").model
    tree = jax.tree.map(lambda leaf: place, whole)
    model = aj.load(GOLDENS / "llama", sharding=tree).model
    assert all(leaf.sharding == place for leaf in jax.tree.leaves(model))
    self.check(model)

  def test_what_does_not_divide(self):
    place = NamedSharding(jax.make_mesh((8,), ("data",)), P("data"))
    with pytest.raises(ValueError, match="embedding|norm|layers"):
      aj.load(GOLDENS / "llama", sharding=place)
    with pytest.raises(ValueError, match="no sharding for"):
      aj.load(GOLDENS / "llama", sharding={"embedding": place})


def test_the_host_holds_one_tensor_at_a_time(tmp_path):
  """Of 16 layers, of which each linear map is 1/50 of the whole."""
  config = folders.config_of(GOLDENS / "llama") | {
    "attention_bias": False,
    "mlp_bias": False,
    "num_hidden_layers": 16,
    "hidden_size": 128,
    "intermediate_size": 512,
    "head_dim": 32,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},
  }
  shape = {"vocab": 96, "layers": 16, "features": 128, "hidden": 512}
  heads = {"heads": 4, "kv_heads": 2, "gated": True, "tied": False}
  model = DecoderLM(DecoderConfig(**shape, **heads), rngs=nnx.Rngs(0))
  total = sum(leaf.nbytes for leaf in jax.tree.leaves(model))
  aj.save(model, tmp_path / "out", like=Pretrained(model, config, {}))
  aj.load(tmp_path / "out")  # compiled
  tracemalloc.start()
  back = aj.load(tmp_path / "out").model
  _, most = tracemalloc.get_traced_memory()
  tracemalloc.stop()
  assert most < total / 6
  same(back.layers, model.layers)


class TestSaving:
  def test_another_architecture(self, tmp_path):
    llama, mistral = (aj.load(GOLDENS / n) for n in ("llama", "mistral"))
    with pytest.raises(
      ValueError, match=r"key_value\.bias.*no parameter|has no"
    ):
      aj.save(mistral.model, tmp_path / "out", like=llama)
    with pytest.raises(ValueError, match="no place in a file of 'mistral'"):
      aj.save(llama.model, tmp_path / "out", like=mistral)
    assert not [*tmp_path.iterdir()]

  def test_another_size(self, tmp_path):
    smol = aj.load(GOLDENS / "mistral")
    config = smol.config | {"vocab_size": 48}
    like = dataclasses.replace(smol, config=config)
    with pytest.raises(ValueError, match=r"'embedding' has shape \(96, 32\)"):
      aj.save(smol.model, tmp_path / "out", like=like)

  def test_something_is_there(self, tmp_path):
    smol = aj.load(GOLDENS / "mistral")
    (tmp_path / "out").mkdir()
    aj.save(smol.model, tmp_path / "out", like=smol)
    before = (tmp_path / "out" / "model.safetensors").stat()
    with pytest.raises(ValueError, match="is there already"):
      aj.save(smol.model, tmp_path / "out", like=smol)
    assert (tmp_path / "out" / "model.safetensors").stat() == before
    with pytest.raises(ValueError, match="max_shard_bytes"):
      aj.save(smol.model, tmp_path / "more", like=smol, max_shard_bytes=0)

  def test_whole_or_not_at_all(self, tmp_path, monkeypatch):
    smol = aj.load(GOLDENS / "mistral")

    def full(*args, **settings):
      raise OSError("no space left on device")

    monkeypatch.setattr("adaptivejax.io.write._dump", full)
    with pytest.raises(OSError, match="no space"):
      aj.save(smol.model, tmp_path / "out", like=smol)
    assert not [*tmp_path.iterdir()]


def test_a_mixture_can_be_served_with_fewer_experts():
  """What a file does not hold is there: the budget of the router."""
  model = aj.load(GOLDENS / "mixtral", dtype="float32").model
  assert isinstance(model.layers.mlp, MixtureOfExperts)
  tokens = jnp.asarray(folders.golden("mixtral")["tokens"], jnp.int32)
  whole, less = (aj.nn.adjust(model, n)(tokens) for n in (0, 1))
  assert less.cost.spent < whole.cost.spent
  assert (less.logits != whole.logits).any()
