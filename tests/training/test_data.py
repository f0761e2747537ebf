# SPDX-License-Identifier: Apache-2.0
"""Law: every byte is a target once an epoch; no file is on both sides."""

import dataclasses

import numpy as np
import pytest

from adaptivejax.training import DataConfig, load_corpus
from adaptivejax.training import data as module
from tests.training import tiny


@pytest.fixture
def config(tmp_path):
  folder = tiny.write_corpus(tmp_path / "corpus")
  return DataConfig(str(folder), context=8, batch=4, validation=0.2)


def test_python_corpus_is_real_text_split_by_file():
  corpus = load_corpus(DataConfig())
  assert not corpus.train.keys() & corpus.validation.keys()
  documents = corpus.train | corpus.validation
  assert b"class ArgumentParser" in documents["argparse.py"]
  assert b"for_stmt" in documents["pydoc_data/topics/for.rst"]
  folders = {part for name in documents for part in name.split("/")[:-1]}
  assert not folders & {"test", "tests", "site-packages"}
  train, held = (sum(map(len, part.values())) for part in corpus)
  assert train > 4_000_000 and 0.01 < held / train < 0.12


def test_split_of_a_file_is_that_of_its_name(config):
  small = load_corpus(config)
  large = load_corpus(dataclasses.replace(config, validation=0.5))
  assert small.validation.keys() < large.validation.keys()
  assert small == load_corpus(config)


def test_windows_cover_every_byte_once():
  documents = {"b": b"6789abc", "a": b"01234"}
  cut = module.windows(documents, 4)
  assert [bytes(window) for window in cut] == [b"01234", b"4\n678", b"89abc"]


def test_an_epoch_is_a_permutation_and_epochs_differ(config):
  documents = load_corpus(config).train
  cut = module.windows(documents, 8)
  numbers = {bytes(window): i for i, window in enumerate(cut)}
  config = dataclasses.replace(config, batch=len(cut))
  batches = module.training_batches(documents, config)
  first, second = np.asarray(next(batches)), np.asarray(next(batches))
  assert first.dtype == np.int32 and first.shape == cut.shape
  counts = lambda rows: sorted(numbers[bytes(r.astype(np.uint8))] for r in rows)
  assert counts(first) == counts(second) == counts(cut)
  assert (first != second).any()


def test_batches_go_on_from_their_place(config):
  documents = load_corpus(config).train
  batches = module.training_batches(documents, config)
  next(batches)
  place = batches.get_state()
  expected = [next(batches) for _ in range(3)]
  again = module.training_batches(documents, config)
  again.set_state(place)
  for batch in expected:
    np.testing.assert_array_equal(next(again), batch)


def test_a_batch_reads_what_is_asked_for():
  cut = np.arange(20, dtype=np.uint8).reshape(5, 4)
  batch = module.Batch(cut, np.array([4, 0, 2]))
  assert batch.shape == (3, 4)
  np.testing.assert_array_equal(batch, cut[[4, 0, 2]].astype(np.int32))
  part = batch.read(np.s_[1:, 0:2])
  assert part.dtype == np.int32
  np.testing.assert_array_equal(part, [[0, 1], [8, 9]])


def test_validation_is_spread_over_the_documents(config):
  documents = load_corpus(config).validation
  batches = module.validation_batches(documents, config, 3)
  assert [batch.shape for batch in batches] == [(4, 9)] * 3
  cut = module.windows(documents, 8)
  np.testing.assert_array_equal(batches[0].read(np.s_[0:1, 0:]), cut[:1])
  np.testing.assert_array_equal(batches[-1].read(np.s_[-1:, 0:]), cut[-1:])
  assert len(module.validation_batches(documents, config, 10**6)) * 4 <= len(
    cut
  )


def test_one_file_is_split_by_bytes(tmp_path):
  path = tmp_path / "text"
  path.write_bytes(bytes(range(200)))
  corpus = load_corpus(DataConfig(str(path), 4, 2, validation=0.25))
  assert corpus.train == {"text": bytes(range(150))}
  assert corpus.validation == {"text": bytes(range(150, 200))}


def test_hidden_and_binary_files_are_no_text(config, tmp_path):
  before = load_corpus(config)
  (tmp_path / "corpus" / ".hidden").write_text("text" * 100)
  (tmp_path / "corpus" / "binary").write_bytes(b"\0" * 100)
  assert load_corpus(config) == before


@pytest.mark.parametrize(
  ("wrong", "named"),
  [
    ({"corpus": "no/such/place"}, "'no/such/place' is no file or folder"),
    ({"batch": 10**6}, "train split .* too small .* data.batch=1000000"),
    ({"context": 10**6}, "train split .* too small .* 0 windows"),
    ({"validation": 1e-9}, "validation split .* too small"),
  ],
)
def test_refuses_what_cannot_make_a_batch(config, wrong, named):
  with pytest.raises(ValueError, match=named):
    load_corpus(dataclasses.replace(config, **wrong))


@pytest.mark.parametrize(
  "wrong", [{"context": 0}, {"batch": 0}, {"validation": 0.0}]
)
def test_refuses_settings_outside_their_range(wrong):
  [(name, value)] = wrong.items()
  with pytest.raises(ValueError, match=f"{name}={value}"):
    DataConfig(**wrong)


def test_an_empty_folder_is_too_small(tmp_path):
  with pytest.raises(ValueError, match="too small .* 0 windows"):
    load_corpus(DataConfig(str(tmp_path)))
