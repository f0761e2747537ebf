# SPDX-License-Identifier: Apache-2.0
"""Law: CALM is the plain model, each token stopped at its own first sure layer.

The oracle (`host.replay`) decodes one row at a time, without a cache, and reads
the confidences in double precision.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.tree_util import Partial
from scipy import special

from adaptivejax.core.losses import cross_entropy
from adaptivejax.decode import generate, score
from adaptivejax.methods.depth import MixtureOfDepths, calm, meta_loss
from adaptivejax.models import decoder_block
from adaptivejax.nn import (
  MARGIN,
  MAX_PROB,
  STATE,
  Group,
  MetaClassifier,
  every_layer,
  exit_confidence,
)
from tests import reference
from tests.methods.host import (
  CONFIG,
  PROMPT,
  TOKENS,
  B,
  T,
  decode,
  keys_of,
  model,
  replay,
  shaken,
)

L = CONFIG.layers
META = shaken(MetaClassifier(CONFIG.features, rngs=nnx.Rngs(5)))
MEASURES = {
  "margin": MARGIN,
  "max_prob": MAX_PROB,
  "state": STATE,
  "meta": META,
}
LENGTHS = np.array([3, 5, 4])
PROMPTS, GIVEN = TOKENS[:, :PROMPT], TOKENS[:, PROMPT:]
READ = T - PROMPT  # tokens decoded after a prompt


def policy(
  threshold, measure="margin", *, min_depth=1, every=1, decay=0.0, horizon=1.0
):
  return Partial(
    calm,
    threshold=jnp.float32(threshold),
    measure=MEASURES[measure],
    min_depth=jnp.int32(min_depth),
    every=jnp.int32(every),
    decay=jnp.float32(decay),
    horizon=jnp.float32(horizon),
  )


def confidences(name, path):
  """After every layer, by NumPy: path f[L+1, ..., D] -> f64[L, ...]."""
  path = np.asarray(path, np.float64)
  if name == "state":
    unit = path / np.linalg.norm(path, axis=-1, keepdims=True)
    cosine = (unit[1:] * unit[:-1]).sum(-1)
    cosine[0] = -np.inf
    return cosine
  if name == "meta":
    head = META.head.outer
    scores = path[1:] @ np.asarray(head.kernel.get_value(), np.float64)
    scores = scores + np.asarray(head.bias.get_value(), np.float64)
    return special.softmax(scores, axis=-1)[..., 1]
  logits = reference.readout(model(), jnp.asarray(path[1:], jnp.float32))
  ranked = np.sort(special.softmax(np.asarray(logits, np.float64), -1), -1)
  gap = ranked[..., -2] if name == "margin" else 0
  return ranked[..., -1] - gap


def leaving(name, threshold, *, min_depth=1, every=1, decay=0, horizon=1):
  """The rule of a policy, for `replay`."""

  def leave(path, t):
    level = threshold * (0.9 + 0.1 * np.exp(-decay * t / horizon))
    c = confidences(name, path)
    asked = [n for n in range(1, L) if n >= min_depth and n % every == 0]
    return next((n for n in asked if c[n - 1] >= level), L)

  return leave


CASES = [
  ("margin", 0.1, {}),
  ("margin", 0.1, {"min_depth": 2}),
  ("margin", 0.08, {"every": 2}),
  ("margin", 0.13, {"decay": 4.0, "horizon": 10.0}),
  ("max_prob", 0.3, {}),
  ("max_prob", 0.3, {"min_depth": 3}),
  ("state", 0.8, {}),
  ("meta", 0.5, {}),
]


@pytest.mark.parametrize(("name", "threshold", "settings"), CASES)
def test_decisions_and_caches_equal_the_replay(name, threshold, settings):
  """Given text after prompts of three lengths, in one batch."""
  rule = leaving(name, threshold, **settings)
  want = replay(model(), PROMPTS, LENGTHS, rule, given=GIVEN)
  assert len(np.unique(want.exits)) > 1, "the case decides nothing"
  cache = model().empty_cache(B, T)
  cache = model()(PROMPTS, cache, lengths=jnp.asarray(LENGTHS)).cache
  both = jnp.concatenate([PROMPTS, GIVEN], 1)  # the cache holds the prompts
  logits, depth, _, cache = decode(
    model(), both, policy(threshold, name, **settings), cache=cache
  )
  np.testing.assert_array_equal(depth, want.exits)
  np.testing.assert_allclose(logits, want.logits, rtol=1e-4, atol=1e-5)
  text = np.array(both)
  for row, n in zip(text, LENGTHS):
    row[n : n + READ] = row[PROMPT:].copy()
  before = [model().embedding.get_value()[text], *want.states[:-1]]
  here = np.arange(T) < LENGTHS[:, None] + READ
  for i, layer in enumerate(reference.layers_of(model())):
    for got, keys in zip((cache.k, cache.v), keys_of(layer, before[i])):
      keys = np.where(here[:, None, :, None], keys, 0)
      np.testing.assert_allclose(got[:, i], keys, rtol=1e-4, atol=1e-5)
    place = np.where(here, np.arange(T), -1)
    np.testing.assert_array_equal(cache.pos[:, i, 0], place)


@pytest.mark.parametrize(("name", "threshold", "settings"), CASES)
def test_generates_what_the_replay_does(name, threshold, settings):
  """Rows of different prompts and limits: the finished ones wait for nobody."""
  limits = np.array([READ, 3, 4])
  made = generate(
    model(),
    PROMPTS,
    steps=READ,
    lengths=LENGTHS,
    limits=limits,
    policy=policy(threshold, name, **settings),
  )
  rule = leaving(name, threshold, **settings)
  want = replay(model(), PROMPTS, LENGTHS, rule, steps=READ)
  for b, limit in enumerate(limits):
    np.testing.assert_array_equal(
      made.tokens[b, :limit], want.tokens[b, :limit]
    )
    exits = want.exits[b, : limit - 1]
    np.testing.assert_array_equal(made.depth[b, 1:limit], exits)


@pytest.mark.parametrize("name", MEASURES)
def test_above_one_it_is_plain_decoding_bit_by_bit(name):
  plain = decode(model(), TOKENS)
  never = decode(model(), TOKENS, policy(1.1, name))
  np.testing.assert_array_equal(never[0], plain[0])
  np.testing.assert_array_equal(never[1], plain[1])
  jax.tree.map(np.testing.assert_array_equal, never[3], plain[3])
  made = [
    generate(model(), PROMPTS, steps=4, lengths=LENGTHS, **how)
    for how in ({}, {"policy": policy(1.1, name)})
  ]
  np.testing.assert_array_equal(made[0].tokens, made[1].tokens)


@pytest.mark.parametrize("name", ["margin", "max_prob"])
def test_confidences_of_exactly_one(name):
  """Saturated: 1 is reached at once, above 1 never."""
  sharp = jax.tree.map(lambda a: a, model())  # a copy
  kernel = sharp.head.kernel
  kernel.set_value(1e4 * kernel.get_value())
  states = sharp(TOKENS, stack=every_layer).hidden
  sure = exit_confidence(states, sharp.readout, MEASURES[name])
  assert (sure == 1).mean() > 0.9, "the case is not saturated"
  depth = decode(sharp, TOKENS, policy(1.0, name))[1]
  assert (depth == 1).mean() > 0.8
  plain, never = decode(sharp, TOKENS), decode(sharp, TOKENS, policy(1.1, name))
  np.testing.assert_array_equal(never[0], plain[0])


@pytest.mark.parametrize("depth", range(1, L + 1))
def test_at_zero_it_stops_at_the_least_depth(depth):
  found = decode(model(), TOKENS, policy(0, min_depth=depth))[1]
  np.testing.assert_array_equal(found, depth)


def test_the_first_layer_never_exits_by_its_state():
  found = decode(model(), TOKENS, policy(-2, "state"))[1]
  np.testing.assert_array_equal(found, 2)


def test_a_row_exits_where_it_would_alone():
  together = decode(model(), TOKENS, policy(0.1))
  for i in range(B):
    alone = decode(model(), TOKENS[i : i + 1], policy(0.1))
    np.testing.assert_array_equal(alone[1][0], together[1][i])
    np.testing.assert_allclose(alone[0][0], together[0][i], atol=1e-5)


def test_padding_runs_nothing_and_holds_nobody():
  cache = prompted()
  token, stack = TOKENS[:, PROMPT : PROMPT + 1], policy(0.1)
  alone = model()(token, cache, stack=stack).depth[:, 0]
  deepest = int(alone.argmax())
  here = np.arange(B) != deepest
  others = np.asarray(alone)[here].max()
  assert others < alone[deepest], "the case decides nothing"
  lengths = jnp.asarray(here, jnp.int32)
  out = model()(token, cache, lengths=lengths, stack=stack)
  np.testing.assert_array_equal(out.depth[:, 0], np.where(here, alone, 0))
  np.testing.assert_array_equal(out.shares, np.arange(L) < others)
  np.testing.assert_array_equal(out.cache.length, PROMPT + lengths)
  nobody = model()(token, cache, lengths=0 * lengths, stack=stack)
  assert np.isfinite(nobody.cost.spent) and not nobody.depth.any()
  assert (np.asarray(nobody.cache.pos) == np.asarray(cache.pos)).all()


@pytest.mark.parametrize("name", MEASURES)
def test_settings_share_a_trace(name):
  cache = prompted()
  run = jax.jit(lambda p: model()(TOKENS[:, :1], cache, stack=p).depth)
  for threshold, least, every in [(0, 1, 1), (0.5, 2, 2), (1.1, 4, 3)]:
    run(policy(threshold, name, min_depth=least, every=every, decay=threshold))
  assert run._cache_size() == 1


def prompted():
  cache = model().empty_cache(B, T)
  return model()(TOKENS[:, :PROMPT], cache).cache


@pytest.mark.parametrize(("name", "asking"), [("margin", 13), ("meta", 2)])
def test_the_cost_counts_layers_questions_and_keys(name, asking):
  """FLOPs by hand, for one token of each row."""
  d, f, v, s = CONFIG.features, CONFIG.hidden, CONFIG.vocab, T
  keys = 2 * B * d * 2 * 8  # one key/value head of width 8
  layer = keys + 4 * B * d * d + 4 * B * d * s + 4 * B * d * f
  readout, question = 2 * B * d * v, 2 * B * d * asking
  cache = prompted()
  for depth in range(1, L + 1):
    out = model()(TOKENS[:, :1], cache, stack=policy(0, name, min_depth=depth))
    asked = depth < L  # once, where it leaves; nobody asks after the last
    spent = depth * layer + asked * question + (L - depth) * keys + readout
    np.testing.assert_allclose(out.cost.spent, spent, rtol=1e-6)
    np.testing.assert_allclose(out.cost.full, L * layer + readout, rtol=1e-6)
  never = model()(TOKENS[:, :1], cache, stack=policy(2, name, every=2))
  spent = L * layer + (L - 1) // 2 * question + readout
  np.testing.assert_allclose(never.cost.spent, spent, rtol=1e-6)


@pytest.mark.parametrize("name", MEASURES)
def test_exit_confidence_is_that_of_every_layer(name):
  out = model()(TOKENS, stack=every_layer)
  sure = exit_confidence(out.hidden, model().readout, MEASURES[name])
  states = reference.hidden(model(), TOKENS)
  path = [model().embedding.get_value()[TOKENS], *states]
  want = confidences(name, np.array(path)).reshape(L, -1).T
  np.testing.assert_allclose(sure, want, rtol=1e-4, atol=1e-5)


def test_meta_loss_balances_its_two_answers():
  out = model()(TOKENS, stack=every_layer)
  states = np.asarray(out.hidden)
  said = [np.asarray(reference.readout(model(), h)).argmax(-1) for h in states]
  losses = {True: [], False: []}
  for l in range(L - 1):
    p = confidences("meta", states[[0, l]])[0]
    for i in np.ndindex(TOKENS.shape):
      agrees = bool(said[l][i] == said[-1][i])
      losses[agrees].append(-np.log(p[i] if agrees else 1 - p[i]))
  assert losses[True] and losses[False], "the case has one answer only"
  want = np.mean([np.mean(part) for part in losses.values()])
  got = meta_loss(META, out.hidden, model().readout)
  np.testing.assert_allclose(got, want, rtol=1e-5)
  same = jnp.broadcast_to(out.hidden[-1:], out.hidden.shape)  # one answer
  p = confidences("meta", states[[0, -1]])[0]
  got = meta_loss(META, same, model().readout)
  np.testing.assert_allclose(got, -np.log(p).mean() / 2, rtol=1e-5)


def test_meta_loss_trains_the_classifier_and_leaves_the_model_alone():
  def loss(pair):
    classifier, host = pair
    hidden = host(TOKENS, stack=every_layer).hidden
    return meta_loss(classifier, hidden, host.readout)

  classifier, host = jax.grad(loss)((META, model()))
  assert all(np.abs(g).max() > 0 for g in jax.tree.leaves(classifier))
  assert not any(np.any(g) for g in jax.tree.leaves(host))


def test_score_reads_by_the_same_exits():
  rule, given = leaving("margin", 0.1), np.asarray(TOKENS[:, PROMPT:])
  whole = np.full(B, PROMPT)
  want = replay(model(), TOKENS[:, :PROMPT], whole, rule, given=given)
  out = score(model(), TOKENS, prompt=PROMPT, policy=policy(0.1))
  np.testing.assert_array_equal(out.depth, want.exits)
  logits = jnp.asarray(want.logits[:, :-1])
  nats = cross_entropy(logits, jnp.asarray(given[:, 1:]))
  np.testing.assert_allclose(out.nats[:, 1:], nats, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("grouped", [True, False])
def test_refuses_layers_it_cannot_project(grouped):
  def layer(rngs):
    block = decoder_block(CONFIG, rngs)
    if grouped:
      return Group([block, decoder_block(CONFIG, rngs)])
    return MixtureOfDepths(block, CONFIG.features, rngs=rngs)

  with pytest.raises(ValueError, match=r"leave early.*Block"):
    generate(model(layer), TOKENS, steps=2, policy=policy(0.5))


@pytest.mark.parametrize("name", ["threshold", "decay"])
def test_refuses_nan_where_it_can_be_seen(name):
  settings = {"threshold": 0.5, "decay": 0.0, name: float("nan")}
  with pytest.raises(ValueError, match=f"`{name}` is NaN"):
    model()(TOKENS[:, :1], prompted(), stack=Partial(calm, **settings))
  with pytest.raises(ValueError, match=f"`{name}` is NaN"):
    generate(model(), TOKENS, steps=2, policy=Partial(calm, **settings))


def test_meta_needs_a_layer_to_leave_before():
  with pytest.raises(ValueError, match="2 or more"):
    meta_loss(META, jnp.zeros((1, B, T, CONFIG.features)), model().readout)
