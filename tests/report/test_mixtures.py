# SPDX-License-Identifier: Apache-2.0
"""Laws: the report shows the experts that ran, and none that did not."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from adaptivejax import report as reports
from adaptivejax.methods.experts import TopPRouter
from adaptivejax.models import DecoderConfig, DecoderLM, decoder_block
from adaptivejax.nn import Group, MixtureOfExperts, Mlp, stacked
from adaptivejax.report import Mixture, Report
from adaptivejax.report.frontier import Entry
from adaptivejax.report.heat import load_map
from adaptivejax.report.mixtures import experts_snippet, mixture
from tests.report.test_report import HOSTILE, written

CONFIG = DecoderConfig(layers=4, features=8, hidden=16, heads=2, kv_heads=1)
TEXT = np.frombuffer(b"def f(x):\n  return x\n" * 4, np.uint8)
TEXT = TEXT.astype(np.int32).reshape(4, -1)


def layer_of(*counts):
  """Layers with so many experts that repeat together."""

  def one(rngs, count):
    router = TopPRouter(8, count, p=0.6, rngs=rngs)
    gate = router.gate.kernel.get_value()
    router.gate.kernel.set_value(3 * gate)
    experts = stacked(lambda r: Mlp(8, 4, rngs=r), count, rngs)
    return decoder_block(CONFIG, rngs, MixtureOfExperts(router, experts))

  return lambda rngs: Group([one(rngs, count) for count in counts])


@functools.cache
def entry(*counts):
  model = DecoderLM(CONFIG, layer=layer_of(*counts), rngs=nnx.Rngs(0))
  return Entry("some", "p = 0.6", model)


def routed(model, windows):
  """The experts of every token, layer by layer: bool[W, S - 1, E] each."""
  x = model.embed(jnp.asarray(windows[:, :-1], jnp.int32))
  positions = jnp.broadcast_to(jnp.arange(x.shape[1]), x.shape[:2])
  found = []
  for l in range(jax.tree.leaves(model.layers)[0].shape[0]):
    group = jax.tree.map(lambda a, l=l: a[l], model.layers)
    for block in group.layers:
      mid = block.attend(x, positions)[0]
      taken = block.mlp.router(block.norm_mlp(mid)).experts
      count = block.mlp.count
      found.append(np.asarray((taken[..., None] == np.arange(count)).any(-2)))
      x = block(x, positions)[0]
  return found


@pytest.mark.parametrize("counts", [(4,), (4, 3)])
def test_the_load_is_that_of_the_routers_in_their_order(counts):
  found = mixture(entry(*counts), TEXT)
  wanted = routed(entry(*counts).model, TEXT)
  assert len(found.load) == len(wanted) == 4
  for load, taken in zip(found.load, wanted):
    count = taken.sum((0, 1))
    np.testing.assert_allclose(load, count / count.sum(), rtol=1e-5)
  assert found.dropped == 0


def test_bins_go_from_easy_to_hard_and_hold_all_tokens():
  found = mixture(entry(4), TEXT, bins=7)
  each = np.mean([taken.sum(-1) for taken in routed(entry(4).model, TEXT)], 0)
  assert list(found.nats) == sorted(found.nats) and len(found.nats) == 7
  sizes = [len(part) for part in np.array_split(np.arange(each.size), 7)]
  np.testing.assert_allclose(
    np.average(found.experts, weights=sizes), each.mean(), rtol=1e-5
  )
  assert np.ptp(found.experts) > 0
  assert len(mixture(entry(4), TEXT[:1], bins=99).nats) == TEXT.shape[1] - 1


@pytest.mark.parametrize("counts", [(4,), (4, 3)])
def test_a_snippet_has_the_share_of_the_experts_of_each_byte(counts):
  text = bytes(TEXT[0].astype(np.uint8))
  snippet = experts_snippet(entry(*counts), text)
  wanted = routed(entry(*counts).model, np.array([[10, *text]]))
  shares = [taken[0].mean(-1) for taken in wanted]
  np.testing.assert_allclose(snippet.matrix, shares, rtol=1e-5)
  np.testing.assert_allclose(snippet.share, np.mean(shares, 0), rtol=1e-5)
  assert snippet.whole == "all experts"


def test_a_dense_model_is_refused():
  dense = Entry("plain", "", DecoderLM(CONFIG, rngs=nnx.Rngs(0)))
  with pytest.raises(ValueError, match="'plain' has no mixture"):
    mixture(dense, TEXT)


LOADS = ((0.25, 0.25, 0.5), (1.0, 0.0, 0.0))


def shown(**fields):
  values = {
    "method": "MoE", "setting": "top 2", "load": LOADS, "dropped": 0.125,
    "nats": (0.5, 2.0), "experts": (1.0, 3.0),
  }  # fmt: skip
  return Mixture(**values | fields)


def test_imbalance_is_the_fullest_over_the_mean():
  assert [shown().imbalance(l) for l in (0, 1)] == [1.5, 3.0]
  assert shown().mean_imbalance == 2.25
  assert shown(load=((0.0, 0.0),)).mean_imbalance == 0


def test_the_map_has_a_cell_for_each_expert_the_last_layer_on_top():
  page = load_map(shown())
  assert re.findall(r"<b>(layer \d)</b>", page) == ["layer 2", "layer 1"]
  assert re.findall(r'opacity="([\d.]+)"', page) == [
    "1.00", "0.00", "0.00", "0.38", "0.38", "0.75",
  ]  # fmt: skip
  assert "layer 1, expert 3: 50 % of the choices" in page
  assert re.findall(r"<b>([\d.]+×)</b>", page) == ["3.00×", "1.50×"]


def test_the_page_shows_mixtures_and_keeps_them(tmp_path):
  report = Report("t", "c", {}, mixtures=(shown(), shown(method=HOSTILE)))
  page = written(report, tmp_path)
  assert page.open == [] and not {"script", "img"} & set(page.tags)
  assert "Which experts ran" in page.text
  assert page.text.count("2.25× the mean · 12 % of the choices dropped") == 2
  assert page.tags.count("svg") == 2 * 2 + 1  # layers, difficulty
  assert reports.load_report(tmp_path) == report
  assert reports.rebuild(tmp_path).is_file()
  assert reports.load_report(tmp_path) == report
  bare = dataclasses.replace(
    report, mixtures=(shown(nats=(), experts=(), dropped=None),)
  )
  assert written(bare, tmp_path).tags.count("svg") == 2


@pytest.mark.parametrize(
  ("fields", "word"),
  [({"load": ()}, "no expert"), ({"load": ((),)}, "no expert"),
   ({"nats": (1.0,)}, "bins")],
)  # fmt: skip
def test_refuses_what_does_not_fit(fields, word):
  with pytest.raises(ValueError, match=word):
    shown(**fields)
