# SPDX-License-Identifier: Apache-2.0
"""What is measured is what the words say: text, perplexity, exits, reports."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from adaptivejax import adapt
from adaptivejax.adapt import exits, recipes, run
from adaptivejax.adapt.measure import Trial, measure
from adaptivejax.methods.attention import Quest
from adaptivejax.nn import Lens, adopt_cache, out_major, with_look
from adaptivejax.report.data import Point, Report
from tests import pretrained_tiny as tiny
from tests.methods.host import shaken


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
  folder = tmp_path_factory.mktemp("text") / "words"
  tiny.write_corpus(folder)
  config = tiny.config(str(folder))
  model = shaken(tiny.load().model)
  text = adapt.read_text(config, tiny.Bytes())
  return adapt.Bench(model, out_major(model), text, config)


def test_the_sides_of_the_text_share_no_document(bench):
  decode = bench.text.tokenizer.decode
  marks = lambda rows: {c for row in rows for c in decode(row) if c.isupper()}
  learned = marks(bench.text.train)
  held = marks(bench.text.test) | marks(bench.text.long)
  assert learned and held and not learned & held
  assert bench.text.test.shape == (3, 24) and bench.text.long.shape == (2, 88)
  assert bench.text.bytes_per_token == 1


def test_one_file_is_held_out_at_its_end(tmp_path):
  path = tmp_path / "one.txt"
  path.write_text("".join(chr(40 + i % 60) for i in range(4000)))
  text = adapt.read_text(tiny.config(str(path)), tiny.Bytes())
  assert len(text.train) == 3200 // 24
  assert text.test[0, 0] == 40 + 3200 % 60


def test_pieces_are_what_each_token_adds():
  class Pairs:
    def decode(self, ids):  # two tokens to a character
      whole = bytes(ids).decode("utf-8", "replace")
      return whole

  text = adapt.Text(None, None, None, 1.0, Pairs())  # pyrefly: ignore
  assert text.pieces(list("aé".encode())) == [b"a", b"", "é".encode()]


REGIMES = [("decode", 1024), ("prompt", 1024), ("long prompt", 5)]


@pytest.mark.parametrize(("regime", "judged"), REGIMES)
def test_perplexity_is_that_of_the_text(bench, regime, judged):
  dense = Trial("dense", "", bench.fast)
  texts = bench.text.test
  point, _, _ = measure(
    dense,
    dense,
    texts,
    regime=regime,
    prompt=8,
    seconds=0.01,
    bytes_per_token=2.0,
    judged=judged,
  )
  logits = np.asarray(bench.model(jnp.asarray(texts)).logits, np.float64)
  log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
  first = 8 if regime == "decode" else max(1, texts.shape[1] - judged)
  nats = -np.mean(
    [
      log_p[b, t - 1, texts[b, t]]
      for b in range(len(texts))
      for t in range(first, texts.shape[1])
    ]
  )
  assert point.perplexity == pytest.approx(math.exp(nats), rel=1e-4)
  assert point.bits_per_byte == pytest.approx(nats / math.log(2) / 2, rel=1e-4)
  assert point.dense and point.speedup == 1


NO_LESSON = ["neurons", "plans", "skips", "long_decode", "long_prompts"]


@pytest.mark.parametrize("name", NO_LESSON)
def test_recipes_are_exact_at_their_full_budget(bench, name):
  for trial in recipes.RECIPES[name](bench):
    assert trial.exact is not None and trial.exact < 1e-4
    if trial.method in ("Quest", "SnapKV", "StreamingLLM", "TokenSelect"):
      assert bench.exact_after(trial.model) > 1e-3  # not with fewer keys


def test_behind_an_adopted_prompt_the_method_decodes(bench):
  """Behind keys of the model as it was, a look decodes by itself."""
  dense = Trial("dense", "", bench.fast)
  quest = with_look(bench.fast, Quest(1, page=2, dense_layers=0))
  starts = {}

  def nats(trial):
    _, _, reading = measure(
      dense,
      trial,
      bench.text.long,
      regime="long decode",
      prompt=bench.config.long,
      seconds=0.01,
      bytes_per_token=1.0,
      starts=starts,
    )
    return reading.nats

  whole = nats(dense)
  adopted = nats(Trial("Quest", "", quest, adopts=True))
  # the same by hand: keys of the model as it was, read by Quest's decoding
  size = bench.config.long
  text = jnp.asarray(bench.text.long)
  cache = bench.fast.empty_cache(*text.shape)
  out = bench.fast(text[:, :size], cache)
  cache, logits, want = adopt_cache(quest, out.cache), out.logits[:, -1], []
  for t in range(size, text.shape[1]):
    odds = jax.nn.log_softmax(logits)
    want.append(-jnp.take_along_axis(odds, text[:, t, None], 1)[:, 0])
    out = quest(text[:, t, None], cache)
    cache, logits = out.cache, out.logits[:, -1]
  np.testing.assert_allclose(adopted, jnp.stack(want).mean(0), rtol=1e-4)
  assert np.abs(adopted - whole).max() > 1e-3


def test_a_lens_that_is_not_trained_changes_nothing(bench):
  lens = Lens(bench.layers, 16)
  raw, through = (exits.confidences(bench, some) for some in (None, lens))
  for a, b in zip(raw, through):
    np.testing.assert_array_equal(a, b)
  assert raw.agrees[-1].all() and not raw.agrees[0].all()


def test_the_last_layer_has_no_lens():
  lens = jax.tree.map(lambda a: a + 1.0, Lens(3, 4))
  x = jnp.arange(4.0)
  np.testing.assert_array_equal(lens(2, x), x)
  np.testing.assert_allclose(lens(0, x), x + x.sum() + 1)
  rows = lens.by_row(jnp.array([2, 0]), jnp.stack([x, x])[:, None])
  np.testing.assert_allclose(rows[1, 0], x + x.sum() + 1)
  np.testing.assert_array_equal(rows[0, 0], x)


def test_a_margin_is_the_lowest_that_keeps_its_promise():
  gap = np.array([[0.9, 0.9, 0.2, 0.2], [0.0, 0.0, 0.9, 0.2], [1.0] * 4])
  agrees = np.array([[True, True, False, False], [True] * 4, [True] * 4])
  sure = exits.Sure(gap, gap, agrees)
  level = exits.margin_for(sure, 1, 1.0)
  assert 0.2 < level < 0.25
  assert exits.margin_for(sure, 1, 0.5) < 0.2
  never = exits.Sure(gap, gap, np.zeros_like(agrees))
  assert exits.margin_for(never, 1, 0.5) == 2


def test_a_lens_learns_what_the_last_layer_says(bench):
  before = exits.confidences(bench, None, bench.text.train[:4])
  config = tiny.config("", steps=60, batch=4)
  lens = exits.fit_lens(
    adapt.Bench(bench.model, bench.fast, bench.text, config)
  )
  after = exits.confidences(bench, lens, bench.text.train[:4])
  l = exits.exit_layers(bench.layers)[0]
  assert after.agrees[l].mean() > before.agrees[l].mean()


def point(method, speed, perplexity, dense=False):
  return Point(
    method=method,
    setting="",
    regime="decode",
    bits_per_byte=1.0,
    tokens_per_second=1.0,
    speedup=speed,
    spread=(speed, speed),
    flops_share=1.0,
    dense=dense,
    perplexity=perplexity,
  )


def test_what_is_reached_is_fast_and_good():
  points = (
    point("dense", 1.0, 10.0, dense=True),
    point("good", 1.31, 10.2),
    point("good", 1.5, 10.29),
    point("good", 2.5, 11.0),
    point("slow", 1.29, 10.0),
    point("bad", 3.0, 10.4),
    point("unknown", 2.0, None),
  )
  made = Report("", "", {}, points=points)
  found = run.reached(made)
  assert {name: p.speedup for name, p in found.items()} == {"good": 1.5}
