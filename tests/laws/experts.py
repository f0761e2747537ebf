# SPDX-License-Identifier: Apache-2.0
"""The laws' cases of mixtures of experts.

Where a rule chooses K of E experts, K is E here, so that its whole budget is
the dense mixture.
"""

import jax
import jax.numpy as jnp
import numpy as np

from adaptivejax.core.cost import flops
from adaptivejax.core.covers import MIN_CHUNK
from adaptivejax.core.dispatch import expert_load
from adaptivejax.methods.experts import (
  DeepSeekRouter,
  ExpertChoiceRouter,
  MixtralRouter,
  MoEPlusPlus,
  SoftMoE,
  SwitchRouter,
  TopPRouter,
)
from adaptivejax.nn import MixtureOfExperts, Mlp, adjust, stacked
from tests import reference
from tests.laws.case import ALL, NO, Case, D, F, T, Vacuous, gaussian
from tests.laws.primitives import no_rows, small_mlp

E = 8


def _sequence(batch):
  return gaussian(batch, T, D).at[..., 0].set(2)


def module_case(name, build, inputs, dense, **rest):
  """A case of a module that holds its budget."""
  budgets = {"full": ALL, "none": NO, "place": adjust}
  method = f"experts.{name.partition('.')[0]}"
  rest = {"call": call, "least": nothing} | budgets | rest
  return Case(name, method, build, inputs, dense=dense, **rest)


def _uneven(router):
  """Feature 0, which is constant, makes some experts rare."""
  kernel = router.gate.kernel
  ramp = jnp.linspace(1, -1, kernel.shape[1])
  kernel.set_value(kernel.get_value().at[0].set(ramp))
  return router


def _experts(rngs, count=E):
  make = lambda rngs: Mlp(D, F, gated=True, activation=jax.nn.silu, rngs=rngs)
  return stacked(make, count, rngs)


def _routed(router, shared=False, **settings):
  def build(rngs):
    rule = _uneven(router(D, E, rngs=rngs, **settings))
    more = small_mlp(rngs) if shared else None
    return MixtureOfExperts(rule, _experts(rngs), more)

  return build


def call(module, x, budget, key=None):
  del budget
  y, cost, _ = module(x, key=key)
  return y, cost


def nothing(module, x):
  """What runs whatever the budget is."""
  shared = getattr(module, "shared", None)
  return jnp.zeros_like(x) if shared is None else reference.mlp(shared, x)


def _softmax(module, x):
  return jax.nn.softmax(x @ module.gate.kernel.get_value())


def _dense(gates):
  """Every expert on every token, weighted by `gates(router, x)`."""

  def run(module, x):
    weights = gates(getattr(module, "router", module), x)
    y = reference.experts(module.experts, x, weights)
    shared = getattr(module, "shared", None)
    return y if shared is None else y + reference.mlp(shared, x)

  return run


def _best(gates):
  """Only the largest."""
  return lambda router, x: (lambda p: p * (p == p.max(-1, keepdims=True)))(
    gates(router, x)
  )


def _sigmoid(router, x):
  s = jax.nn.sigmoid(x @ router.gate.kernel.get_value())
  return router.scale * s / s.sum(-1, keepdims=True)


def _dead_experts(budget, route=lambda m, x: m.router(x)):
  """NaN in the experts that no token runs at a budget."""

  def poison(params, x):
    routing = route(adjust(params, float(budget)), x)
    count = params.experts.down.kernel.shape[0]
    dead = expert_load(routing.experts, count) == 0
    if not dead.any() or dead.all():
      raise Vacuous("no expert is dead, or all are")
    return poisoned(params, dead), x, budget, None

  return poison


def poisoned(module, dead):
  """The module, NaN in the parameters of some experts."""
  module = jax.tree.map(lambda a: a, module)  # a copy
  bad = lambda a: jnp.where(dead.reshape(-1, *[1] * (a.ndim - 1)), jnp.nan, a)
  module.experts = jax.tree.map(bad, module.experts)
  return module


def asking(module, x, rows=MIN_CHUNK):
  """The router, and what rounds up the rows of each expert."""
  gate = getattr(module, "router", module)
  gate = getattr(gate, "gate", gate)
  padding = jnp.zeros((module.experts.down.kernel.shape[0], rows, D))
  rounding = flops(jax.vmap(Mlp.rows), module.experts, padding)
  return flops(lambda m, x: m(x), gate, x) + rounding


def _others(module, x):
  """What copies and constants of MoE++ make of the tokens, after a router."""
  gates = _others_gates(module, x)[..., module.ffn :]
  return module.others(x, gates)


def _others_gates(module, x):
  logits = (x @ module.gate.kernel.get_value()).at[..., : module.ffn].set(-1e9)
  return jax.nn.softmax(logits)


def _only_ffn(module, x):
  logits = (x @ module.gate.kernel.get_value())[..., : module.ffn]
  return jax.nn.softmax(logits)


def _plus_plus(rngs):
  return _uneven(MoEPlusPlus(_experts(rngs, 4), D, top_k=4, rngs=rngs))


def _plus_plus_asking(module, x):
  gates = _others_gates(module, x)[..., module.ffn :]
  others = flops(lambda m, x: m.others(x, gates), module, x)
  return others + asking(module, x)


def _soft(rngs):
  return SoftMoE(_experts(rngs, 4), D, slots=T, rngs=rngs)


def _soft_call(module, x, slots):
  module = jax.tree.map(lambda a: a, module)  # a copy
  module.slots = slots
  return call(module, x, None)


def _soft_dense(slots):
  """The formula, slot by slot."""

  def run(module, x):
    mu = module.mu.get_value()[..., :slots]
    unit = lambda v, axis: v / jnp.sqrt((v * v).sum(axis, keepdims=True) + 1e-6)
    match = jnp.einsum("btd,dep->btep", unit(x, -1), unit(mu, 0))
    match = match * module.scale.get_value()
    gather, spread = jax.nn.softmax(match, 1), jax.nn.softmax(match, (2, 3))
    y = 0
    for e in range(module.count):
      one = jax.tree.map(lambda a, e=e: a[e], module.experts)
      slot = jnp.einsum("btp,btd->bpd", gather[:, :, e], x)
      y += jnp.einsum("btp,bpd->btd", spread[:, :, e], reference.mlp(one, slot))
    return y

  return run


_one_of_many = "a token runs one expert at most, and refusals are drops"
_fixed_slots = "the number of slots is a shape"
_no_choice = "every expert runs its slots: nothing is selected"
_plain = "it is made of plain products"
_all_chosen = "no expert is without tokens but where none has any"
K = np.float32

TOP_K = {"full": K(0), "some": K(5), "none": K(E)}

EXPERTS = [
  module_case(
    "switch",
    _routed(SwitchRouter),
    _sequence,
    _dense(_best(_softmax)),
    some=K(0.75),
    poison=_dead_experts(0.875),
    unless={"cost": _one_of_many},
  ),
  module_case(
    "mixtral",
    _routed(MixtralRouter, top_k=E),
    _sequence,
    _dense(_softmax),
    **TOP_K,
    poison=_dead_experts(E - 1.0),
    overhead=asking,
  ),
  module_case(
    "deepseek",
    _routed(DeepSeekRouter, shared=True, top_k=E, groups=4, kept_groups=4),
    _sequence,
    _dense(_sigmoid),
    **TOP_K,
    poison=_dead_experts(E - 1.0),
    overhead=asking,
  ),
  module_case(
    "dynamic_top_p",
    _routed(TopPRouter, p=0.9),
    _sequence,
    _dense(_softmax),
    some=K(0),
    least=_dense(_best(_softmax)),
    poison=_dead_experts(NO),
    overhead=asking,
  ),
  module_case(
    "expert_choice",
    _routed(ExpertChoiceRouter),
    _sequence,
    _dense(_softmax),
    some=K(0),
    overhead=asking,
    unless={"poison": _all_chosen, "poison_gradient": _all_chosen},
  ),
  module_case(
    "mixture_of_experts_plus_plus",
    _plus_plus,
    _sequence,
    _dense(_only_ffn),
    some=K(0.5),
    least=_others,
    poison=_dead_experts(5.0, lambda m, x: m.route(x)),
    overhead=_plus_plus_asking,
  ),
  Case(
    "soft_moe",
    "experts.soft_moe",
    _soft,
    _sequence,
    _soft_call,
    full=T,
    some=3,
    none=1,
    dense=_soft_dense(T),
    least=_soft_dense(1),
    overhead=lambda m, x: 6.0 * x.size * 4 * T,
    static=_fixed_slots,
    unless={
      "oracle": _plain,
      "gradient": _plain,
      "cover": no_rows,
      "poison": _no_choice,
      "poison_gradient": _no_choice,
      "trace": _fixed_slots,
      "linen": _fixed_slots,
    },
  ),
]
