# SPDX-License-Identifier: Apache-2.0
"""Law: a file that is not what it should be is refused by name, unread.

Nothing but a ValueError comes out, nothing is run, and no half model.
"""

import json
import os
import pickle
import struct

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

import adaptivejax as aj
from adaptivejax.io import header
from tests.io import folders
from tests.io.folders import GOLDENS

NAME = "model.layers.1.mlp.up_proj.weight"
PLAIN = GOLDENS / "mistral"


@pytest.fixture
def folder(tmp_path):
  return folders.copy_of("mistral", tmp_path)


def refused(folder, match):
  with pytest.raises(ValueError, match=match):
    aj.load(folder)


class TestHeader:
  def change(self, folder, match, **entry):
    """One tensor's entry with other fields."""
    head, data = folders.parts(folder)
    head[NAME] |= entry
    folders.raw(folder, head, data)
    refused(folder, match)

  @pytest.mark.parametrize("size", [0, 5, 8, 100, 3_000, 20_000])
  def test_truncated(self, folder, size):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    refused(folder, "truncated|no safetensors file")

  def test_one_byte_less_and_one_more(self, folder):
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    refused(folder, "tensor .* is out of range")
    path.write_bytes(whole + b"\0")
    refused(folder, "1 bytes after the last tensor")

  @pytest.mark.parametrize("length", [2**63, 2**64 - 1, 10**8 + 1])
  def test_absurd_length(self, folder, length):
    _, data = folders.parts(folder)
    folders.raw(folder, b"{}", data, length=length)
    refused(folder, "absurd")

  def test_length_beyond_the_file(self, folder):
    folders.raw(folder, b"{}", b"", length=3)
    refused(folder, "truncated: the header alone has 3 bytes")

  @pytest.mark.parametrize(
    ("offsets", "match"),
    [
      ([-3072, 0], "data_offsets"),
      ([3072, 0], "needs 3072 bytes"),
      ([0, 3071], "needs 3072 bytes"),
      ([0, 3072, 1], "data_offsets"),
      ([0.0, 3072.0], "data_offsets"),
      ([False, 3072], "data_offsets"),
      ("03", "data_offsets"),
      (None, "data_offsets"),
    ],
  )
  def test_offsets(self, folder, offsets, match):
    self.change(folder, f"{NAME}.*({match})", data_offsets=offsets)

  def test_overlap(self, folder):
    """The one that is told is the next, or the one itself."""
    head, data = folders.parts(folder)
    head[NAME]["data_offsets"] = [0, 3072]
    folders.raw(folder, head, data)
    refused(folder, r"tensor 'lm_head\.weight' at bytes 0\.\.6144 overlaps")
    head["lm_head.weight"]["data_offsets"] = [0, 6144]
    head[NAME]["data_offsets"] = [3072, 6144]
    folders.raw(folder, head, data)
    refused(folder, f"{NAME}' at bytes 3072..6144 overlaps")

  def test_beyond_the_end(self, folder):
    head, data = folders.parts(folder)
    last = head["model.norm.weight"]["data_offsets"]
    last[:] = [n + 10**12 for n in last]
    folders.raw(folder, head, data)
    refused(folder, r"model\.norm\.weight' .* is out of range")

  def test_a_hole(self, folder):
    head, data = folders.parts(folder)
    begin = head["model.norm.weight"]["data_offsets"]
    last = max(
      entry["data_offsets"][1] for n, entry in head.items() if n[:1] != "_"
    )
    assert begin[1] == last
    begin[:] = [n + 8 for n in begin]
    folders.raw(folder, head, data + bytes(8))
    refused(folder, r"model\.norm\.weight.*hole")

  @pytest.mark.parametrize(
    ("entry", "match"),
    [
      ({"dtype": "I64"}, "dtype 'I64'"),
      ({"dtype": "F8_E4M3"}, "dtype 'F8_E4M3'"),
      ({"dtype": 3}, "dtype 3"),
      ({"dtype": ["F32"]}, "dtype"),
      ({"dtype": "F32"}, "needs 6144 bytes"),
      ({"shape": [48, 33]}, "needs"),
      ({"shape": [-48, -32]}, "no shape"),
      ({"shape": [2**70, 2**70]}, "needs"),
      ({"shape": 48}, "no shape"),
      ({"shape": [True, 1536]}, "no shape"),
      ({"code": "import os"}, "must say"),
    ],
  )
  def test_entries(self, folder, entry, match):
    self.change(folder, f"{NAME}.*{match}", **entry)

  @pytest.mark.parametrize(
    ("text", "match"),
    [
      (b"[]", "JSON object"),
      (b"{", "not the JSON"),
      (b"\xff\xfe{}", "not the JSON"),
      (b'{"a": NaN}', "NaN"),
      (b'{"a": 1}', "'a' must say"),
      (b'{"a": {}, "a": {}}', "'a' is there twice"),
      (b'{"__metadata__": {"a": 1}}', "__metadata__"),
      (b'{"__metadata__": []}', "__metadata__"),
      (b"[" * 100_000, "too deeply|not the JSON"),
      (b'{"a": ' + b"9" * 10_000 + b"}", "not the JSON"),
    ],
  )
  def test_text(self, folder, text, match):
    folders.raw(folder, text, b"")
    refused(folder, match)

  def test_a_pickle_is_not_opened(self, folder, tmp_path):
    class Trap:
      def __reduce__(self):
        return os.mkdir, (str(tmp_path / "run"),)

    path = folder / "model.safetensors"
    path.write_bytes(pickle.dumps(Trap()))
    refused(folder, "a pickle")
    path.write_bytes(b"PK\x03\x04" + bytes(100))
    refused(folder, "a pickle in disguise")
    path.unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Trap()))
    refused(folder, r"pytorch_model\.bin may be a pickle")
    assert not (tmp_path / "run").exists()

  def test_a_gguf_file_is_told(self, folder):
    (folder / "model.safetensors").write_bytes(b"GGUF" + bytes(100))
    refused(folder, "a GGUF file")


class TestTensors:
  def test_missing(self, folder):
    tensors = folders.tensors_of(folder)
    del tensors[NAME]
    folders.store(folder, tensors)
    refused(folder, f"{NAME}' is missing")

  def test_extra(self, folder):
    tensors = folders.tensors_of(folder)
    folders.store(folder, tensors | {"score.weight": np.ones((2, 2), "f4")})
    refused(folder, r"no place.*'score\.weight'")

  def test_a_layer_more_or_less(self, folder):
    folders.configure(folder, num_hidden_layers=3)
    refused(folder, r"layers\.2\.input_layernorm\.weight' is missing")
    folders.configure(folder, num_hidden_layers=1)
    refused(folder, r"no place.*layers\.1\..* more")

  def test_shape(self, folder):
    tensors = folders.tensors_of(folder)
    folders.store(folder, tensors | {NAME: tensors[NAME].T.copy()})
    refused(folder, rf"{NAME}' has shape \(32, 48\).*\(48, 32\)")
    folders.store(folder, tensors | {NAME: tensors[NAME].reshape(-1)})
    refused(folder, rf"{NAME}' has shape \(1536,\)")

  @pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
  @pytest.mark.parametrize("name", [NAME, "model.embed_tokens.weight"])
  def test_not_finite(self, folder, value, name):
    tensors = folders.tensors_of(folder)
    tensors[name] = tensors[name].copy()
    tensors[name][3, 4] = value
    folders.store(folder, tensors)
    refused(folder, f"{name}' holds NaN or infinity")
    model = aj.load(folder, allow_nonfinite=True).model
    bad = [~np.isfinite(leaf).all() for leaf in jax.tree.leaves(model)]
    assert sum(bad) == 1

  def test_out_of_the_range_asked_for(self, tmp_path):
    folder = folders.copy_of("qwen2", tmp_path)
    tensors = folders.tensors_of(folder)
    tensors[NAME] = tensors[NAME] * np.float32(1e6)
    folders.store(folder, tensors)
    aj.load(folder, dtype="bfloat16")
    with pytest.raises(ValueError, match=rf"{NAME}' reaches .* float16"):
      aj.load(folder, dtype="float16")


class TestIndex:
  @pytest.fixture
  def sharded(self, tmp_path):
    smol = aj.load(PLAIN)
    aj.save(smol.model, tmp_path / "in", like=smol, max_shard_bytes=20_000)
    return tmp_path / "in"

  def edit(self, folder, **files):
    """Other files for tensors of the index; `None` takes one out."""
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    table = index["weight_map"] | files
    index["weight_map"] = {n: f for n, f in table.items() if f is not None}
    path.write_text(json.dumps(index))

  @pytest.mark.parametrize(
    "file",
    [
      "../out/model.safetensors",
      "/etc/model.safetensors",
      "sub/model.safetensors",
      "..",
      "..\\model.safetensors",
      "C:model.safetensors",
      ".hidden.safetensors",
      "model.safetensors\0",
      "model.bin",
      "",
      7,
      ["model.safetensors"],
    ],
  )
  def test_ways_out(self, sharded, file):
    self.edit(sharded, **{NAME: file})
    refused(sharded, f"{NAME}' is in .*, no file of this folder")

  def test_a_link_out(self, sharded, tmp_path):
    shard = next(sharded.glob("model-00001*"))
    away = tmp_path / "away.safetensors"
    shard.rename(away)
    shard.symlink_to(away)
    refused(sharded, "a link out of this folder")

  def test_links_of_the_hub_cache(self, sharded, tmp_path):
    """snapshots/REVISION/FILE -> ../../blobs/HASH"""
    blobs = tmp_path / "hub" / "blobs"
    snapshot = tmp_path / "hub" / "snapshots" / "abc"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for i, file in enumerate(sharded.iterdir()):
      (blobs / str(i)).write_bytes(file.read_bytes())
      (snapshot / file.name).symlink_to(f"../../blobs/{i}")
    got, want = (aj.load(p).model for p in (snapshot, PLAIN))
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want)):
      assert np.asarray(a).tobytes() == np.asarray(b).tobytes()

  def test_a_missing_shard(self, sharded):
    next(sharded.glob("model-00002*")).unlink()
    refused(sharded, "'model-00002-of.*', which is missing")

  def test_the_index_and_the_file_differ(self, sharded):
    self.edit(sharded, **{NAME: None})
    refused(sharded, f"{NAME}' is not in the index")
    first = next(sharded.glob("model-00001*")).name
    self.edit(sharded, **{NAME: first})
    refused(sharded, f"{NAME}' (of the index is missing|is not in the index)")

  def test_no_table(self, sharded):
    path = sharded / "model.safetensors.index.json"
    for text in ('{"weight_map": {}}', '{"weight_map": []}', "{}"):
      path.write_text(text)
      refused(sharded, "no `weight_map`")
    path.write_text('{"weight_map": {"a": "b.safetensors", "a": "c"}}')
    refused(sharded, "'a' is there twice")

  def test_both_ways(self, sharded):
    save_file({"a": np.ones(1)}, sharded / "model.safetensors")
    refused(sharded, "holds both")


class TestPath:
  def test_nothing_there(self, tmp_path):
    refused(tmp_path / "nowhere", "does not exist")
    refused(str(tmp_path), r"config\.json is missing")
    (tmp_path / "config.json").write_text("{}")
    refused(tmp_path, "holds neither")

  def test_neither_folder_nor_gguf(self):
    refused(PLAIN / "model.safetensors", "neither a folder")


WHOLE = (PLAIN / "model.safetensors").read_bytes()
DATA = 8 + struct.unpack("<Q", WHOLE[:8])[0]
EDITS = st.lists(
  st.one_of(
    st.tuples(st.just("set"), st.integers(0, DATA - 1), st.integers(0, 255)),
    st.tuples(st.just("digit"), st.integers(8, DATA - 1), st.integers(48, 57)),
    st.tuples(st.just("cut"), st.integers(0, len(WHOLE)), st.integers(0, 40)),
    st.tuples(st.just("twice"), st.integers(0, DATA - 1), st.integers(1, 40)),
  ),
  min_size=1,
  max_size=3,
)


def spoilt(edits):
  """The file with bytes set, taken out or there twice."""
  data = bytearray(WHOLE)
  for kind, at, value in edits:
    if kind in ("set", "digit"):
      if at < len(data):
        data[at] = value
    elif kind == "cut":
      del data[at : at + value]
    else:
      data[at:at] = data[at : at + value]
  return bytes(data)


def entries_of(path):
  try:
    return header.read_header(path)
  except ValueError:
    return None


@settings(max_examples=300)
@given(edits=EDITS)
def test_any_header_is_read_or_refused(tmp_path_factory, edits):
  """What passes lies in the file, without holes or overlap."""
  path = tmp_path_factory.getbasetemp() / "spoilt.safetensors"
  path.write_bytes(spoilt(edits))
  entries = entries_of(path)
  if entries is None:
    return
  size = path.stat().st_size - 8 - struct.unpack("<Q", path.read_bytes()[:8])[0]
  spans = sorted((e.begin, e.end) for e in entries.values())
  assert [0, *(end for _, end in spans)] == [*(b for b, _ in spans), size]


@settings(max_examples=60)
@given(edits=EDITS)
def test_any_file_loads_equal_or_is_refused(tmp_path_factory, edits):
  """A header that means the same, or a ValueError; never another model."""
  folder = tmp_path_factory.mktemp("spoilt")
  changed = spoilt(edits)
  (folder / "config.json").write_bytes((PLAIN / "config.json").read_bytes())
  (folder / "model.safetensors").write_bytes(changed)
  try:
    got = aj.load(folder).model
  except ValueError:
    return
  for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(aj.load(PLAIN).model)):
    assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


@settings(max_examples=15)
@given(at=st.integers(DATA, len(WHOLE) - 1), value=st.integers(0, 255))
def test_any_data_is_what_comes_out(tmp_path_factory, at, value):
  """Weights have no checksum: what is stored is loaded, if it is finite."""
  folder = tmp_path_factory.mktemp("data")
  (folder / "config.json").write_bytes((PLAIN / "config.json").read_bytes())
  changed = WHOLE[:at] + bytes([value]) + WHOLE[at + 1 :]
  (folder / "model.safetensors").write_bytes(changed)
  smol = aj.load(folder, allow_nonfinite=True)
  aj.save(smol.model, folder / "out", like=smol)
  assert (folder / "out" / "model.safetensors").read_bytes() == changed
  words = np.frombuffer(changed[DATA:], "<u2")  # bfloat16
  if ((words & 0x7F80) == 0x7F80).any():
    refused(folder, "NaN or infinity")
