# SPDX-License-Identifier: Apache-2.0
"""Law: a setting that cannot be is refused before anything is traced."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.tree_util import Partial

from adaptivejax.core import Streak
from adaptivejax.decode import calibrate, generate, score
from adaptivejax.methods.depth import (
  StopAndExit,
  calm,
  pabee,
  prefix,
  stop_and_exit,
  unified_skip,
)
from adaptivejax.nn import MAX_PROB, ByStack
from adaptivejax.nn.linear import linear
from adaptivejax.nn.setting import refuse_nan, refuse_outside
from tests.methods.host import CONFIG, INPUTS, ROWS, TOKENS, encoder, model

CONTROLLER = linear(CONFIG.features, 3, rngs=nnx.Rngs(0))
CALM = Partial(calm, threshold=0.5)
EXIT = Partial(stop_and_exit, controller=CONTROLLER, stop=1.0, exit=0.5)
STACKS = [
  (Partial(prefix, depth=99), r"depth=99 must lie in 1..4, the layers"),
  (Partial(prefix, depth=jnp.int32(0)), r"depth=0 must lie in 1..4"),
  (Partial(prefix, depth=-1), "depth=-1"),
  (Partial(CALM, min_depth=99), "min_depth=99 must lie in 1..4"),
  (Partial(CALM, min_depth=0), "min_depth=0"),
  (Partial(CALM, every=jnp.int32(99)), "every=99 must lie in 1..4"),
  (Partial(CALM, every=0), "every=0"),
  (Partial(CALM, horizon=0.0), r"horizon=0.0 must be above 0"),
  (Partial(CALM, horizon=jnp.float32(-1)), "horizon=-1.0"),
  (Partial(CALM, decay=np.nan), "`decay` is NaN"),
  (Partial(EXIT, every=99), "every=99"),
  (Partial(EXIT, min_depth=5), "min_depth=5"),
  (Partial(EXIT, stop=np.nan), "`stop` is NaN"),
  (Partial(unified_skip, kept=jnp.array([0, 99])), r"0..3.*\[ 0 99\]"),
  (Partial(unified_skip, kept=jnp.array([0, -7])), "must rise within 0..3"),
  (Partial(unified_skip, kept=jnp.array([-1, 3])), "must rise within 0..3"),
  (Partial(unified_skip, kept=jnp.array([2, 2])), "must rise within 0..3"),
  (Partial(unified_skip, kept=jnp.arange(0)), "must name 1..4"),
]


@pytest.fixture
def untraced(monkeypatch):
  """Any model that is run, or traced, fails the test."""
  ran = lambda *_, **__: pytest.fail("the model was run")
  monkeypatch.setattr(type(model()), "__call__", ran)


@pytest.mark.parametrize(("stack", "words"), STACKS)
def test_a_stack_is_checked_before_it_is_traced(stack, words, untraced):
  with pytest.raises(ValueError, match=words):
    generate(model(), TOKENS, steps=2, policy=stack)
  with pytest.raises(ValueError, match=words):
    score(model(), TOKENS, policy=stack)


@pytest.mark.parametrize(("stack", "words"), STACKS[:-1])
def test_a_stack_that_is_called_is_checked_too(stack, words):
  cache = jax.eval_shape(lambda: model().empty_cache(3, 4))
  with pytest.raises(ValueError, match=words):
    stack(model().layers, None, None, cache, readout=None)


@pytest.mark.parametrize("name", ["depth", "min_depth", "every", "kept"])
def test_traced_settings_pass(name):
  """And those that fit, bound in one go or in two."""
  func = {"depth": prefix, "kept": unified_skip}.get(name, calm)

  def check(value):
    ByStack(Partial(func, **{name: value})).check(model())
    return value

  good = jnp.array([0, 3]) if name == "kept" else jnp.int32(4)
  check(good)
  jax.jit(check)(good + 99)
  ByStack(Partial(Partial(func), **{name: good})).check(model())


@pytest.mark.parametrize(
  ("how", "words"),
  [
    ({"stack": Partial(calm, measure=MAX_PROB, every=99)}, "every=99"),
    ({"delta": 0.0}, "delta=0.0"),
    ({"delta": 1.5}, "delta=1.5"),
    ({"epsilon": 1.0}, "epsilon=1.0"),
    ({"texts": TOKENS + CONFIG.vocab}, "0..12, the model's vocabulary"),
    ({"texts": TOKENS - 1}, "0..12, the model's vocabulary"),
  ],
)
def test_calibration_is_checked_before_a_text_is_read(how, words, untraced):
  given = {"texts": TOKENS, "stack": calm, "delta": 0.5, "epsilon": 0.2} | how
  texts, stack = given.pop("texts"), given.pop("stack")
  with pytest.raises(ValueError, match=words):
    calibrate(model(), texts, stack, [0.9, 0.5], **given)


@pytest.mark.parametrize("least", [77, 0, jnp.int32(-1)])
def test_a_classifier_has_no_exit_there(least):
  with pytest.raises(ValueError, match=rf"min_exit={least} must lie in 1..4"):
    encoder()(INPUTS, min_exit=least)


@pytest.mark.parametrize(
  ("settings", "words"),
  [
    ({"controller": None}, "three scores of 16 features"),
    ({"controller": linear(16, 2, rngs=nnx.Rngs(0))}, "three scores"),
    ({"controller": linear(8, 3, rngs=nnx.Rngs(0))}, "three scores"),
    ({"controller": lambda h: h.sum()}, "three scores"),
    ({"end": 13}, "end=13 must lie in 0..12, the model's vocabulary"),
    ({"end": jnp.int32(-1)}, "end=-1"),
    ({"min_depth": 5}, "min_depth=5 must lie in 1..4"),
    ({"every": 0}, "every=0"),
    ({"exit": np.nan}, "`exit` is NaN"),
  ],
)
def test_a_controller_is_checked_before_it_is_traced(settings, words, untraced):
  settings = {"controller": CONTROLLER, "stop": 1.0, "exit": 0.5} | settings
  with pytest.raises(ValueError, match=words):
    generate(model(), TOKENS, steps=2, policy=StopAndExit(**settings))


def test_a_controller_that_fits_passes():
  StopAndExit(CONTROLLER, 1.0, 0.5, 12, 4, 4).check(model())
  check = lambda end: StopAndExit(CONTROLLER, 1.0, 0.5, end).check(model())
  jax.jit(check)(99)


def test_nan_is_found_wherever_it_stands():
  table = jnp.ones((2, 3)).at[1, 2].set(jnp.nan)
  for value in (np.nan, table, {"a": [table]}, table.astype(jnp.bfloat16)):
    with pytest.raises(ValueError, match="`x` is NaN"):
      refuse_nan(x=value)
  refuse_nan(x=(jnp.inf, 3, jnp.arange(2), jax.random.key(0), len))
  jax.jit(lambda x: refuse_nan(x=x))(table)
  with pytest.raises(ValueError, match="`arguments` is NaN"):
    ByStack(Partial(_by_level, table)).check(model())


def _by_level(level, layers, *args, **settings):
  """A stack with an argument of its own before the others."""


def test_a_rule_of_a_classifier_still_takes_any_exit_there_is():
  rule = Partial(pabee.patient_exit, limit=jnp.int32(0))
  for least in (1, jnp.int32(4)):
    out = encoder()(INPUTS, rule, Streak.none(ROWS), min_exit=least)
    np.testing.assert_array_equal(out.exit, least)


def test_ranges_hold_for_every_number():
  refuse_outside(0, 3, "them", a=0, b=np.array([1, 3]))
  with pytest.raises(ValueError, match=r"b=\[1 4\] must lie in 0..3, them"):
    refuse_outside(0, 3, "them", a=0, b=np.array([1, 4]))
