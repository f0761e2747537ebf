# SPDX-License-Identifier: Apache-2.0
"""Law: the controller's choice, at each exit, is that of a simulation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.tree_util import Partial
from scipy import special

from adaptivejax.decode import Ended, generate
from adaptivejax.methods.depth import (
  MixtureOfDepths,
  StopAndExit,
  controller_labels,
  controller_loss,
  stop_and_exit,
)
from adaptivejax.models import decoder_block
from adaptivejax.nn import every_layer
from adaptivejax.nn.linear import linear
from tests import reference
from tests.methods.host import (
  CONFIG,
  PROMPT,
  TOKENS,
  B,
  T,
  assert_cache_holds,
  decode,
  model,
  replay,
)

L = CONFIG.layers
END = 12
CONTROLLER = linear(CONFIG.features, 3, rngs=nnx.Rngs(9))
LENGTHS = np.array([3, 5, 4])
PROMPTS, GIVEN = TOKENS[:, :PROMPT], TOKENS[:, PROMPT:]
NEVER = (1.0, 1.0)


def policy(stop, exit, **settings):
  settings = {k: jnp.int32(v) for k, v in settings.items()}
  return StopAndExit(
    CONTROLLER, jnp.float32(stop), jnp.float32(exit), jnp.int32(END), **settings
  )


def stack(stop, exit, **settings):
  settings = {k: jnp.int32(v) for k, v in settings.items()}
  return Partial(
    stop_and_exit,
    controller=CONTROLLER,
    stop=jnp.float32(stop),
    exit=jnp.float32(exit),
    **settings,
  )


def choosing(stop, exit, *, min_depth=1, every=1, stopped=None):
  """The rule for `replay`; writes down the positions that stop."""

  def leave(path, t):
    p = special.softmax(
      path[1:] @ np.asarray(CONTROLLER.kernel.get_value()), axis=-1
    )
    for n in range(1, L):
      if n < min_depth or n % every:
        continue
      best = p[n - 1].argmax()
      if best == 0 and p[n - 1, 0] > stop:
        if stopped is not None:
          stopped.append(t)
        return n
      if best == 1 and p[n - 1, 1] > exit:
        return n
    return L

  return leave


CASES = [
  (0.0, 0.7, {}),
  (0.6, 0.6, {}),
  (0.5, 0.65, {"every": 2}),
  (0.4, 0.4, {"min_depth": 2}),
]


@pytest.mark.parametrize(("stop", "exit", "settings"), CASES)
def test_decisions_and_caches_equal_the_replay(stop, exit, settings):
  rule = choosing(stop, exit, **settings)
  whole = np.full(B, PROMPT)
  want = replay(model(), PROMPTS, whole, rule, given=GIVEN)
  assert len(np.unique(want.exits)) > 1, "the case decides nothing"
  logits, depth, _, cache = decode(
    model(), TOKENS, stack(stop, exit, **settings)
  )
  np.testing.assert_array_equal(depth, want.exits)
  np.testing.assert_allclose(logits, want.logits, rtol=1e-4, atol=1e-5)
  assert_cache_holds(cache, model(), TOKENS, want.states)


@pytest.mark.parametrize(
  ("stop", "exit"), [(0.45, 0.6), (0.0, 0.0), (1.0, 0.3)]
)
def test_generates_and_stops_as_the_replay(stop, exit):
  steps = T - PROMPT
  made = generate(
    model(), PROMPTS, steps=steps, lengths=LENGTHS, policy=policy(stop, exit)
  )
  kinds = set()
  for b, n in enumerate(LENGTHS):
    stopped = []
    rule = choosing(stop, exit, stopped=stopped)
    want = replay(
      model(), PROMPTS[b : b + 1], LENGTHS[b : b + 1], rule, steps=steps
    )
    count = min([steps, *(t - n + 2 for t in stopped[:1])])
    cut = count < steps or (bool(stopped) and stopped[0] - n + 2 == steps)
    tokens = want.tokens[0, :count].copy()
    tokens[-1] = END if cut else tokens[-1]
    assert made.count[b] == count
    np.testing.assert_array_equal(made.tokens[b, :count], tokens)
    exits = want.exits[0, : count - 1]
    np.testing.assert_array_equal(made.depth[b, 1:count], exits)
    assert made.ended[b] == (Ended.STOP if cut else Ended.LENGTH)
    kinds.add(cut)
  assert any(kinds) or stop == 1.0, "the case stops nothing"


def test_above_one_it_is_plain_decoding_bit_by_bit():
  plain, never = decode(model(), TOKENS), decode(model(), TOKENS, stack(*NEVER))
  for i in (0, 1, 3):
    jax.tree.map(np.testing.assert_array_equal, never[i], plain[i])
  made = [
    generate(model(), PROMPTS, steps=4, lengths=LENGTHS, **how)
    for how in ({}, {"policy": policy(*NEVER)})
  ]
  np.testing.assert_array_equal(made[0].tokens, made[1].tokens)
  np.testing.assert_array_equal(made[0].ended, made[1].ended)


def test_thresholds_share_a_trace():
  cache = model()(PROMPTS, model().empty_cache(B, T)).cache
  run = jax.jit(lambda p: model()(TOKENS[:, :1], cache, stack=p).notes)
  for levels in (NEVER, (0.5, 0.5), (0.0, 0.9)):
    run(stack(*levels, min_depth=1, every=1))
  assert run._cache_size() == 1


def test_rows_that_are_not_live_are_not_stopped():
  cache = model()(PROMPTS, model().empty_cache(B, T)).cache
  some = jnp.array([1, 0, 1], jnp.int32)
  out = model()(TOKENS[:, :1], cache, lengths=some, stack=stack(0.0, 0.0))
  assert out.notes.dtype == bool and not out.notes[1] and out.depth[1, 0] == 0


def test_labels_are_those_of_brute_force():
  right = np.random.default_rng(0).random((5, 2, 40)) < 0.3
  want = np.zeros(right.shape, int)
  for j, b, t in np.ndindex(right.shape):
    if right[:, b, t].any():
      want[j, b, t] = 1 if right[: j + 1, b, t].any() else 2
  assert len(np.unique(want)) == 3
  np.testing.assert_array_equal(controller_labels(jnp.asarray(right)), want)


@pytest.mark.parametrize("every", [1, 2, 3])
def test_the_loss_is_the_weighted_mean_over_exits(every):
  inputs, targets = TOKENS[:, :-1], np.asarray(TOKENS[:, 1:])
  states = [np.asarray(h) for h in reference.hidden(model(), inputs)]
  exits = [n for n in range(1, L) if n % every == 0] + [L]
  said = [np.asarray(reference.readout(model(), h)).argmax(-1) for h in states]
  right = np.array([said[n - 1] == targets for n in exits])
  total, weights = 0.0, 0.0
  for j, n in enumerate(exits[:-1]):
    scores = states[n - 1] @ np.asarray(CONTROLLER.kernel.get_value())
    log_p = special.log_softmax(scores, axis=-1)
    label = np.where(right[: j + 1].any(0), 1, np.where(right.any(0), 2, 0))
    nats = -np.take_along_axis(log_p, label[..., None], -1).mean()
    total, weights = total + (j + 1) * nats, weights + j + 1
  hidden = model()(inputs, stack=every_layer).hidden
  got = controller_loss(
    CONTROLLER, hidden, model().readout, jnp.asarray(targets), every=every
  )
  np.testing.assert_allclose(got, total / weights, rtol=1e-5)


def test_the_loss_leaves_the_model_alone():
  def loss(pair):
    controller, host = pair
    hidden = host(TOKENS[:, :-1], stack=every_layer).hidden
    return controller_loss(controller, hidden, host.readout, TOKENS[:, 1:])

  controller, host = jax.grad(loss)((CONTROLLER, model()))
  assert np.abs(controller.kernel.get_value()).max() > 0
  assert not any(np.any(g) for g in jax.tree.leaves(host))


@pytest.mark.parametrize(
  ("call", "words"),
  [
    (lambda: policy(np.nan, 0.5).check(model()), "`stop` is NaN"),
    (
      lambda: generate(model(), TOKENS, steps=2, policy=policy(0.5, np.nan)),
      "`exit` is NaN",
    ),
    (lambda: loss_every(0), "every=0"),
    (lambda: loss_every(L), f"every={L}"),
    (lambda: generate(mixed(), TOKENS, steps=2, policy=policy(1, 1)), "Block"),
  ],
)
def test_bad_input_is_refused_in_words(call, words):
  with pytest.raises(ValueError, match=words):
    call()


def loss_every(every):
  hidden = jnp.zeros((L, B, T, CONFIG.features))
  controller_loss(CONTROLLER, hidden, model().readout, TOKENS, every=every)


def mixed():
  block = lambda rngs: decoder_block(CONFIG, rngs)
  return model(lambda rngs: MixtureOfDepths(block(rngs), 16, rngs=rngs))
