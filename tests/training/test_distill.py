# SPDX-License-Identifier: Apache-2.0
"""Distillation: what each loss is, who learns, and that it learns."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from adaptivejax import surgery
from adaptivejax.models import DecoderConfig, DecoderLM
from adaptivejax.training import distill as d
from tests import reference
from tests.methods.host import shaken

CONFIG = DecoderConfig(
  vocab=13,
  layers=2,
  features=8,
  hidden=16,
  heads=2,
  kv_heads=1,
  gated=True,
)
TEXT = np.random.default_rng(0).integers(0, 13, (6, 10)).astype(np.int32)
TOKENS, KEY = jnp.asarray(TEXT), jax.random.key(0)


@functools.cache
def teacher():
  return shaken(DecoderLM(CONFIG, rngs=nnx.Rngs(0)))


@functools.cache
def student(kind="acm"):
  make = {"acm": surgery.to_acm, "experts": surgery.to_experts}[kind]
  return shaken(make(teacher()), seed=1)


def by_hand():
  """What each layer of the teacher gets and gives, as NumPy; and its mlp."""
  x = teacher().embed(TOKENS)
  places = jnp.broadcast_to(jnp.arange(10), TOKENS.shape)
  for l in range(2):
    layer = jax.tree.map(lambda a, l=l: a[l], teacher().layers)
    x = layer.attend(x, places)[0]
    inputs = layer.norm_mlp(x)
    x = layer.feed(x)[0]
    mlp = jax.tree.map(lambda a, l=l: a[l], student().layers.mlp)
    yield np.asarray(inputs), reference.mlp(layer.mlp, inputs), mlp


def errors_by_hand(inputs, wanted, mlp):
  """Relative squared error with the first k learners, [M + 1, B, T]."""
  sums, found = np.zeros_like(wanted), []
  for k in range(5):
    found.append(((sums - wanted) ** 2).sum(-1) / (wanted**2).sum(-1))
    if k < 4:
      part = jax.tree.map(lambda a, k=k: a[k], mlp.learners)
      sums = sums + reference.mlp(part, inputs)
  return np.stack(found)


def test_layers_are_judged_by_themselves_on_the_teachers_states():
  loss, _ = d.layerwise(student(), teacher(), TOKENS, KEY)
  want = np.mean([errors_by_hand(*layer)[1:] for layer in by_hand()])
  np.testing.assert_allclose(loss, want, rtol=1e-4)


def test_surgery_alone_leaves_an_error_with_fewer_learners_only():
  exact = surgery.to_acm(teacher())
  x = next(by_hand())[0]
  first = jax.tree.map(lambda a: a[0], exact.layers.mlp)
  whole = jax.tree.map(lambda a: a[0], teacher().layers.mlp)
  x = jnp.asarray(x)
  errors = d.nested_errors(first, x, whole.rows(x)).mean((1, 2))
  assert errors[0] == pytest.approx(1) and errors[4] < 1e-9
  assert (errors[1:4] > 1e-3).all()


@pytest.mark.parametrize("gain, tolerance", [(1.2, np.inf), (2.0, 0.9)])
def test_gates_learn_how_many_learners_are_enough(gain, tolerance):
  rule = {"gain": gain, "tolerance": tolerance}
  loss, metrics = d.gates(student(), teacher(), TOKENS, KEY, **rule)
  nats, shares = [], []
  for inputs, wanted, mlp in by_hand():
    errors = errors_by_hand(inputs, wanted, mlp)
    logits = np.asarray(mlp.gate(jnp.asarray(inputs)))
    log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    for b, t in np.ndindex(*TOKENS.shape):
      e = errors[:, b, t]
      fit = [k for k in range(4) if e[k] < gain * e[k + 1]]
      needed = next((k for k in fit if e[k] < tolerance), 4)
      nats.append(-log_p[b, t, needed])
      shares.append(needed / 4)
  np.testing.assert_allclose(loss, np.mean(nats), rtol=1e-4)
  np.testing.assert_allclose(metrics["share"], np.mean(shares), rtol=1e-5)
  assert len(set(shares)) > 1


def test_end_to_end_is_the_divergence_and_the_budget():
  out = student()(TOKENS, key=KEY)
  p = jax.nn.softmax(teacher()(TOKENS).logits)
  q = jax.nn.softmax(out.logits)
  kl = np.mean(np.sum(np.asarray(p) * np.log(p / q), -1))
  loss, metrics = d.at_budget(0.3, 2.0)(student(), teacher(), TOKENS, KEY)
  want = kl + out.signals.penalty + 2 * abs(out.signals.share - 0.3)
  np.testing.assert_allclose(loss, want, rtol=1e-4)
  np.testing.assert_allclose(metrics["kl"], kl, rtol=1e-4)
  free, _ = d.end_to_end(student(), teacher(), TOKENS, KEY)
  np.testing.assert_allclose(free, kl + out.signals.penalty, rtol=1e-4)


def test_the_teacher_gets_no_gradient():
  for loss in (d.layerwise, d.gates, d.end_to_end):
    of = lambda t, loss=loss: loss(student(), t, TOKENS, KEY)[0]
    for g in jax.tree.leaves(jax.grad(of)(teacher())):
      np.testing.assert_array_equal(g, 0)


@pytest.mark.parametrize(
  "kind, loss, pattern",
  [
    ("acm", d.layerwise, "learners"),
    ("acm", d.gates, "mlp/gate"),
    ("experts", d.layerwise, "router"),
    ("experts", d.end_to_end, ".*"),
  ],
)
def test_it_learns(kind, loss, pattern):
  seen = []
  made = d.distill(
    student(kind),
    teacher(),
    TEXT,
    loss,
    rates={pattern: 1e-2},
    steps=12,
    batch=6,
    progress=lambda step, metrics: seen.append((step, float(metrics["loss"]))),
  )
  assert [step for step, _ in seen] == list(range(1, 13))
  before, after = (
    float(loss(m, teacher(), TOKENS, KEY)[0]) for m in (student(kind), made)
  )
  assert after < before


def test_only_what_is_named_moves():
  before = jax.tree.map(np.array, student())
  rates = {"mlp/gate": 1e-2, "norm_mlp": 1e-3}
  made = d.distill(
    student(), teacher(), TEXT, d.end_to_end, rates=rates, steps=2
  )
  flat = lambda m: {
    "/".join(map(str, path)): np.array(value.get_value())
    for path, value in nnx.to_flat_state(nnx.state(m, nnx.Param))
  }
  old, new = flat(student()), flat(made)
  moved = {name for name in old if (old[name] != new[name]).any()}
  assert moved and all("mlp/gate" in n or "norm_mlp" in n for n in moved)
  assert any("norm_mlp" in n for n in moved)
  for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(student())):
    np.testing.assert_array_equal(a, b)  # itself it stays


def test_each_pattern_has_its_rate():
  params = {"a": {"x": jnp.ones(3)}, "b": jnp.ones(2), "c": jnp.ones(1)}
  optimizer = d.by_path({"^a": 0.1, "b": 0.01}, params, clip=1e9)
  updates, _ = optimizer.update(
    jax.tree.map(jnp.ones_like, params), optimizer.init(params), params
  )
  new = optax.apply_updates(params, updates)
  np.testing.assert_allclose(new["a"]["x"], 0.9, rtol=1e-4)
  np.testing.assert_allclose(new["b"], 0.99, rtol=1e-4)
  np.testing.assert_array_equal(new["c"], 1.0)


def test_a_step_is_compiled_once():
  traced = []

  def loss(student, teacher, tokens, key):
    traced.append(1)
    return d.end_to_end(student, teacher, tokens, key)

  d.distill(student(), teacher(), TEXT, loss, steps=4, batch=2)
  assert len(traced) == 1


def test_bad_input():
  run = functools.partial(d.distill, student(), teacher())
  with pytest.raises(ValueError, match="'nothing'"):
    run(TEXT, d.end_to_end, rates={"nothing": 1.0})
  with pytest.raises(ValueError, match="steps=0"):
    run(TEXT, d.end_to_end, steps=0)
  with pytest.raises(ValueError, match="next token"):
    run(TEXT[:, :1], d.end_to_end)
  with pytest.raises(ValueError, match="FactorLLM"):
    d.gates(student("experts"), teacher(), TOKENS, KEY)
  routed = surgery.to_mixture_of_depths(teacher())
  with pytest.raises(ValueError, match="Group"):
    d.layerwise(routed, teacher(), TOKENS, KEY)


@pytest.mark.parametrize(
  ("rates", "says"),
  [({}, "at least one"), ({"": 1.0}, "not empty"), ({"(": 1.0}, "regular")],
)
def test_rates_that_say_nothing(rates, says):
  with pytest.raises(ValueError, match=says):
    d.by_path(rates, {"a": jnp.ones(2)})
