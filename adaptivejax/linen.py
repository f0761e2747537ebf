# SPDX-License-Identifier: Apache-2.0
"""Any module as a Flax Linen module, with a plain `params` dict.

    model = ToLinen(lambda rngs: DecoderLM(config, rngs=rngs))
    variables = model.init(key, tokens)  # {"params": {"layers": {...}, ...}}
    out = model.apply(variables, tokens)

Parameters lie under their attribute names, list items under their number; the
budgets of a module (`nn.Setting`) are the collection "settings", and what it
does not train (`nn.Frozen`) is "frozen".  It nests in other Linen modules.  For
a pair of functions without Linen see `adaptivejax.nn.functional`.
"""

from collections.abc import Callable
from typing import Any

import jax
from flax import linen, nnx
from flax.traverse_util import flatten_dict, unflatten_dict

from adaptivejax.nn.setting import Frozen, Setting

COLLECTIONS = {"params": nnx.Param, "settings": Setting, "frozen": Frozen}

Flat = dict[tuple[str, ...], Any]


class ToLinen(linen.Module):
  """`make(rngs)` as an `init` / `apply` module; called like what it makes."""

  make: Callable[[nnx.Rngs], nnx.Module]

  @linen.compact
  def __call__(self, *args: Any, **kwargs: Any) -> Any:
    if self.is_initializing():
      module = self.make(nnx.Rngs(self.make_rng("params")))
      for collection, tree in variables_of(module).items():
        for name, value in tree.items():
          self.put_variable(collection, name, value)
    else:
      module = nnx.eval_shape(lambda: self.make(nnx.Rngs(0)))
    graph, *states = nnx.split(module, *COLLECTIONS.values())
    given = {name: self.variables.get(name, {}) for name in COLLECTIONS}
    states = map(_fill, states, given.values())
    return nnx.merge(graph, *states)(*args, **kwargs)


def variables_of(module: nnx.Module) -> dict[str, Any]:
  """The variables that the Linen twin of a module is applied to."""
  _, *states = nnx.split(module, *COLLECTIONS.values())
  trees = [unflatten_dict(_flat(state)) for state in states]
  return {name: tree for name, tree in zip(COLLECTIONS, trees) if tree}


def _fill(state: nnx.State, values: Any) -> nnx.State:
  """`state` with other values."""
  given, wanted = flatten_dict(values), _flat(state)
  shapes = lambda flat: {"/".join(p): a.shape for p, a in flat.items()}
  have, want = shapes(given), shapes(wanted)
  if have != want:
    differ = {k for k in have | want if have.get(k) != want.get(k)}
    raise ValueError(
      "the given variables are not those of this module; they differ at"
      f" {sorted(differ)}. Make them with `init` or `variables_of`."
    )
  leaves = [given[path] for path in wanted]
  return jax.tree.unflatten(jax.tree.structure(state), leaves)


def _flat(state: nnx.State) -> Flat:
  """Leaves by path, in the order of `jax.tree.leaves`."""
  paths, _ = jax.tree_util.tree_flatten_with_path(nnx.to_pure_dict(state))
  return {tuple(str(step.key) for step in path): leaf for path, leaf in paths}
