# SPDX-License-Identifier: Apache-2.0
"""The laws' cases of stacks: how a decoder runs its layers."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.tree_util import Partial

from adaptivejax.core.cost import Cost
from adaptivejax.methods.depth import (
  MixtureOfDepths,
  calm,
  ffn_skip,
  layer_dropout,
  prefix,
  sorted_loss,
  stop_and_exit,
  unified_skip,
)
from adaptivejax.methods.width import core_of
from adaptivejax.models import DecoderLM, decoder_block
from adaptivejax.nn import (
  MARGIN,
  STATE,
  Group,
  adjust,
  by_neurons,
  by_plan,
  every_layer,
  plain,
)
from adaptivejax.nn.linear import linear
from tests import reference
from tests.laws.case import (
  ALL,
  CONFIG,
  NEVER,
  NO,
  PROMPT,
  SOME,
  Case,
  D,
  F,
  L,
  T,
  V,
)
from tests.laws.layers import learner_modules, no_halting, one_noise, routed
from tests.laws.primitives import no_rows


def some_text(batch):
  draw = np.random.default_rng(0).integers(0, V, (batch, T))
  return jnp.asarray(draw, jnp.int32)


def decoder_of(layer=None):
  return lambda rngs: DecoderLM(CONFIG, layer=layer, rngs=rngs)


def _adaptive_block(rngs):
  return decoder_block(CONFIG, rngs, learner_modules(rngs))


def _alternating(rngs):
  mixture = MixtureOfDepths(_adaptive_block(rngs), D, capacity=0.5, rngs=rngs)
  return Group([_adaptive_block(rngs), mixture])


def _decode(model, tokens, stack=plain, *, prefill=plain):
  """Logits of the tokens after the prompt, read one by one."""
  cache = model.empty_cache(*tokens.shape)
  cache = model(tokens[:, :PROMPT], cache, stack=prefill).cache

  def step(cache, token):
    out = model(token[:, None], cache, stack=stack)
    return out.cache, (out.logits[:, 0], out.cost)

  _, (logits, cost) = lax.scan(step, cache, tokens[:, PROMPT:].T)
  return jnp.swapaxes(logits, 0, 1), cost.total()


def _calm(model, tokens, threshold, measure=MARGIN):
  stack = Partial(calm, threshold=threshold, measure=measure)
  return _decode(model, tokens, stack)


def _prefix(model, tokens, depth):
  stack = Partial(prefix, depth=depth)
  return _decode(model, tokens, stack, prefill=stack)


def _controlled(rngs):
  return {"model": decoder_of()(rngs), "controller": linear(D, 3, rngs=rngs)}


def _stop_and_exit(params, tokens, levels):
  """Reads on where the controller stops: only its exits matter here."""
  controller = jax.tree.map(lambda a: levels[0] * a, params["controller"])
  stack = Partial(
    stop_and_exit, controller=controller, stop=levels[1], exit=levels[2]
  )
  return _decode(params["model"], tokens, stack)


def of_model(f):
  """`f` of the model among the parameters."""
  return lambda params, *args: f(params["model"], *args)


def _poisoned_controlled(params, tokens):
  levels = _levels_of(0, 0, 0)
  poison = poisoned_layers(levels, 1, 2, 3)
  model, *rest = poison(params["model"], tokens)
  return {**params, "model": model}, *rest


def _levels_of(sharpness, stop, exit):
  """All choices tie at a sharpness of 0: the first, stop, is the likeliest."""
  return np.array([sharpness, stop, exit], np.float32)


def _unified(model, tokens, kept):
  return _decode(model, tokens, Partial(unified_skip, kept=kept))


def _core_infer(model, tokens, share):
  core = core_of(model, tokens[:, :PROMPT], share=share)
  return _decode(model, tokens, Partial(by_neurons, neurons=core, first=1))


def _one_neuron(model, tokens):
  """Decodes with the output weights of all other neurons at zero."""
  chosen = core_of(model, tokens[:, :PROMPT], share=1e-9).chosen
  rows = []
  for b, row in enumerate(tokens):
    down = model.layers.mlp.down.kernel.get_value()
    for j, keep in enumerate(np.asarray(chosen[b, :, 0])):
      down = down.at[j + 1].multiply((jnp.arange(F) == keep)[:, None])
    thin = jax.tree.map(lambda a: a, model)
    thin.layers.mlp.down.kernel.set_value(down)
    cache, out = model(row[None, :PROMPT], model.empty_cache(1, T)).cache, []
    for token in row[PROMPT:]:
      said = thin(token[None, None], cache)
      cache = said.cache
      out.append(said.logits[0, 0])
    rows.append(jnp.stack(out))
  return jnp.stack(rows)


def _ffn_skip(model, tokens, threshold):
  skip = Partial(ffn_skip, threshold=threshold, cold_first=0, cold_last=0)
  return _decode(model, tokens, skip, prefill=skip)


def _by_plan(model, tokens, plan):
  out = model(tokens, stack=Partial(by_plan, plan=plan))
  return out.logits[:, PROMPT:], out.cost


def _by_plan_decoding(model, tokens, plan):
  stack = Partial(by_plan, plan=plan)
  return _decode(model, tokens, stack, prefill=stack)


def _dropout(model, tokens, rates):
  stack = Partial(layer_dropout, rates=rates)
  out = model(tokens, stack=stack, key=jax.random.key(0))
  return out.logits[:, PROMPT:], out.cost


def _plain(model, tokens, budget):
  del budget
  return _decode(model, tokens)


def _dense(model, tokens):
  return reference.decoder(model, tokens)[:, PROMPT:]


def _masks(tokens, rule):
  """rule(l, t) as an array [L, B, T]."""
  table = np.array([[rule(l, t) for t in range(T)] for l in range(L)])
  return np.broadcast_to(table[:, None], (L, len(tokens), T))


def _lived(rule, level=None):
  """The dense model, layer l computing token t by rule(l, t)."""

  def run(model, tokens):
    masks = (None if r is None else _masks(tokens, r) for r in (rule, level))
    live, levels = masks
    return reference.decoder(model, tokens, live, level=levels)[:, PROMPT:]

  return run


def poisoned_layers(budget, *layers, names=("attention", "mlp")):
  """NaN in the weights of layers that `budget` leaves out."""
  gone = np.isin(np.arange(L), layers)

  def spoil(a):
    return jnp.where(gone.reshape(-1, *[1] * (a.ndim - 1)), jnp.nan, a)

  def poison(model, x):
    model = jax.tree.map(lambda a: a, model)  # a copy
    for name in names:
      part = getattr(model.layers, name)
      setattr(model.layers, name, jax.tree.map(spoil, part))
    return model, x, budget, None

  return poison


def _deciding(model, tokens):
  """FLOPs of all routers, and a readout after every layer."""
  decoded = tokens[:, PROMPT:]
  return routed(model, decoded) + 2.0 * D * V * L * decoded.size


def _kept(*layers):
  return np.array(layers, np.int32)


def _halves(text):
  """bool[L, 2] from "11 10 ...": attention and feed-forward by layer."""
  return np.array([[c == "1" for c in layer] for layer in text.split()])


def _sorted(model, x, exits):
  """One row at a time, to have rows at all: the loss is a mean."""

  def one(tokens):
    out = model(tokens[None, :-1], stack=every_layer)
    return sorted_loss(out.hidden, model.readout, tokens[None, 1:], exits=exits)

  return lax.map(one, x), Cost.zero()


def _prefix_loss(*exits):
  def run(model, tokens):
    states = reference.hidden(model, tokens[:, :-1])
    losses = []
    for n in exits:
      logits = reference.readout(model, states[n - 1])
      nats = jax.nn.logsumexp(logits, -1) - jnp.take_along_axis(
        logits, tokens[:, 1:, None], -1
      ).squeeze(-1)
      losses.append(nats.mean(1))
    return sum(losses) / len(losses)

  return run


def _poisoned_group(model, tokens):
  """NaN in all feed-forward layers, and in the layers of depth."""
  spoil = lambda tree: jax.tree.map(lambda a: a * jnp.nan, tree)
  model = jax.tree.map(lambda a: a, model)  # a copy
  always, mixture = model.layers.layers
  always.mlp.learners = spoil(always.mlp.learners)
  mixture.block = spoil(mixture.block)
  return model, tokens, NO, None


_cache_in_place = "a loop of one round or none keeps the cache in place"
_no_price_loss = "a loss decides nothing"
_static_exits = "which layers are exits is static"
_static_count = "how many layers are kept is static, which ones is data"
_at_prompt = lambda l, t: t < PROMPT
_at_first = lambda l, t: t < PROMPT or l == 0
_nowhere = lambda l, t: 0

MODELS = [
  Case(
    "calm",
    "depth.calm",
    decoder_of(),
    some_text,
    _calm,
    full=np.float32(NEVER),
    some=np.float32(0.1),
    none=np.float32(0),
    dense=_dense,
    least=_lived(_at_first),
    poison=poisoned_layers(np.float32(0), 1, 2, 3),
    overhead=_deciding,
    unless={
      "gradient": no_halting,
      "poison_gradient": no_halting,
      "cover": no_rows,
    },
  ),
  Case(
    "calm by state",
    "depth.calm",
    decoder_of(),
    some_text,
    lambda m, x, b: _calm(m, x, b, STATE),
    full=np.float32(NEVER),
    some=np.float32(0.85),
    none=np.float32(-NEVER),
    dense=_dense,
    least=_lived(lambda l, t: t < PROMPT or l < 2),
    poison=poisoned_layers(np.float32(-NEVER), 2, 3),
    unless={
      "gradient": no_halting,
      "poison_gradient": no_halting,
      "cover": no_rows,
    },
  ),
  Case(
    "stop_and_exit",
    "depth.stop_and_exit",
    _controlled,
    some_text,
    _stop_and_exit,
    full=_levels_of(1, 1, 1),
    some=_levels_of(1, 0.5, 0.5),
    none=_levels_of(0, 0, 0),
    dense=of_model(_dense),
    least=of_model(_lived(_at_first)),
    poison=_poisoned_controlled,
    overhead=lambda p, x: 2.0 * D * 3 * L * x[:, PROMPT:].size,
    unless={
      "gradient": no_halting,
      "poison_gradient": no_halting,
      "cover": no_rows,
      "linen": "the controller is not a part of the module but beside it",
    },
  ),
  Case(
    "unified_layer_skipping",
    "depth.unified_layer_skipping",
    decoder_of(),
    some_text,
    _unified,
    full=_kept(0, 1, 2, 3),
    some=_kept(0, 3),
    none=_kept(3),
    same_shape=(_kept(0, 3), _kept(1, 2), _kept(0, 1)),
    dense=_dense,
    least=_lived(lambda l, t: t < PROMPT or l == 3),
    poison=poisoned_layers(_kept(0, 1), 2, 3),
    unless={
      "cover": no_rows,
      "poison_gradient": "the prompt runs the skipped layers too",
    },
  ),
  Case(
    "ffn_skip",
    "depth.ffn_skip",
    decoder_of(),
    some_text,
    _ffn_skip,
    full=np.float32(NEVER),
    some=np.float32(0.8),
    none=np.float32(-NEVER),
    dense=_dense,
    least=_lived(None, lambda l, t: l == 0),
    poison=poisoned_layers(np.float32(-NEVER), 1, 2, 3, names=("mlp",)),
  ),
  Case(
    "core_infer",
    "width.core_infer",
    decoder_of(),
    some_text,
    _core_infer,
    full=1.0,
    some=0.5,
    none=1e-9,
    dense=_dense,
    least=_one_neuron,
    static="how many neurons a text has is the shape of their weights",
    unless={
      "oracle": "neurons are gathered by index, which is the definition",
      "gradient": "a loop over so many layers as are whole has no reverse mode",
      "poison": "the prompt runs all neurons, and asks each of them",
      "bf16": "rounded to 16 bits, other neurons may win the vote",
      "poison_gradient": "the prompt runs all neurons, and asks each of them",
      "cover": no_rows,
      "trace": "how many neurons a text has is the shape of their weights",
    },
  ),
  Case(
    "evopress",
    "depth.evopress",
    decoder_of(),
    some_text,
    _by_plan,
    full=_halves("11 11 11 11"),
    some=_halves("11 10 01 00"),
    none=_halves("00 00 00 00"),
    dense=_dense,
    least=_lived(lambda l, t: False),
    poison=poisoned_layers(_halves("11 11 00 00"), 2, 3),
    unless={"cover": no_rows},
  ),
  Case(
    "evopress.decoding",
    "depth.evopress",
    decoder_of(),
    some_text,
    _by_plan_decoding,
    full=_halves("11 11 11 11"),
    some=_halves("11 10 01 00"),
    none=_halves("00 00 00 00"),
    dense=_dense,
    least=_lived(lambda l, t: False),
    poison=poisoned_layers(_halves("11 11 00 00"), 2, 3),
    unless={
      "gradient": _cache_in_place,
      "poison_gradient": _cache_in_place,
      "cover": no_rows,
    },
  ),
  Case(
    "layer_skip",
    "depth.layer_skip",
    decoder_of(),
    some_text,
    _dropout,
    full=np.zeros(L, np.float32),
    some=np.full(L, 0.5, np.float32),
    none=np.ones(L, np.float32),
    dense=_dense,
    least=_lived(lambda l, t: False),
    poison=poisoned_layers(np.array([0, 0, 1, 1], np.float32), 2, 3),
    unless={"row": one_noise, "shard_map": one_noise},
  ),
  Case(
    "sorted_fine_tuning",
    "depth.sorted_fine_tuning",
    decoder_of(),
    some_text,
    _sorted,
    full=(L,),
    some=(1, 3, 4),
    none=(1,),
    dense=_prefix_loss(L),
    least=_prefix_loss(1),
    static=_static_exits,
    unless={
      "oracle": "it is dense itself",
      "gradient": "against separate losses in test_sorted_fine_tuning",
      "cover": no_rows,
      "poison": "every layer is read",
      "poison_gradient": "every layer is read",
      "trace": _static_exits,
      "cost": _no_price_loss,
    },
  ),
  Case(
    "sorted_fine_tuning.prefix",
    "depth.sorted_fine_tuning",
    decoder_of(),
    some_text,
    _prefix,
    full=np.int32(L),
    some=np.int32(2),
    none=np.int32(1),
    dense=_dense,
    least=_lived(lambda l, t: l == 0),
    poison=poisoned_layers(np.int32(2), 2, 3),
    unless={
      "gradient": no_halting,
      "poison_gradient": no_halting,
      "cover": no_rows,
    },
  ),
  # Compositions: what stacks on one model obeys the same laws.
  Case(
    "calm over adaptive modules",
    "depth.calm",
    decoder_of(_adaptive_block),
    some_text,
    lambda m, x, b: _calm(m, x, b[1]),
    full=(ALL, np.float32(NEVER)),
    some=(SOME, np.float32(0.1)),
    none=(NO, np.float32(0)),
    place=lambda m, b: adjust(m, b[0]),
    dense=_dense,
    least=_lived(_at_first, _nowhere),
    poison=poisoned_layers((NO, np.float32(0)), 1, 2, 3),
    overhead=_deciding,
    unless={"gradient": no_halting, "poison_gradient": no_halting},
  ),
  Case(
    "ffn_skip over adaptive modules",
    "depth.ffn_skip",
    decoder_of(_adaptive_block),
    some_text,
    lambda m, x, b: _ffn_skip(m, x, b[1]),
    full=(ALL, np.float32(NEVER)),
    some=(SOME, np.float32(0.8)),
    none=(NO, np.float32(-NEVER)),
    place=lambda m, b: adjust(m, b[0]),
    dense=_dense,
    least=_lived(None, _nowhere),
    poison=poisoned_layers((SOME, np.float32(-NEVER)), 1, 2, 3, names=("mlp",)),
    overhead=_deciding,
  ),
  Case(
    "mixture of depths of adaptive modules",
    "depth.mixture_of_depths",
    decoder_of(_alternating),
    some_text,
    _plain,
    full=ALL,
    some=SOME,
    none=NO,
    place=adjust,
    dense=_dense,
    least=_lived(lambda l, t: l % 2 == 0, _nowhere),
    poison=_poisoned_group,
    overhead=_deciding,
  ),
]
