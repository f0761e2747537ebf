# SPDX-License-Identifier: Apache-2.0
"""Any module as a Flax Linen module, with a plain `params` dict.

    model = ToLinen(lambda rngs: DecoderLM(config, rngs=rngs))
    variables = model.init(key, tokens)  # {"params": {"layers": {...}, ...}}
    out = model.apply(variables, tokens)

It nests in other Linen modules.  For a pair of functions without Linen see
`adaptivejax.nn.functional`.
"""

from collections.abc import Callable
from typing import Any

import jax
from flax import linen, nnx
from flax.traverse_util import flatten_dict, unflatten_dict


class ToLinen(linen.Module):
  """`make(rngs)` as an `init` / `apply` module; called like what it makes."""

  make: Callable[[nnx.Rngs], nnx.Module]

  @linen.compact
  def __call__(self, *args: Any, **kwargs: Any) -> Any:
    if self.is_initializing():
      module = self.make(nnx.Rngs(self.make_rng("params")))
      for name, value in params_of(module).items():
        self.put_variable("params", name, value)
    else:
      module = nnx.eval_shape(lambda: self.make(nnx.Rngs(0)))
    graph, state = nnx.split(module, nnx.Param)
    given = flatten_dict(self.variables.get("params", {}))
    wanted = _flat(state)
    _check(given, wanted)
    leaves = [given[path] for path in wanted]
    state = jax.tree.unflatten(jax.tree.structure(state), leaves)
    return nnx.merge(graph, state)(*args, **kwargs)


def params_of(module: nnx.Module) -> dict[str, Any]:
  """The parameters of a module as the `params` of its Linen twin.

  They lie under the attribute names, list items under their number.
  """
  return unflatten_dict(_flat(nnx.state(module, nnx.Param)))


def _flat(state: nnx.State) -> dict[tuple[str, ...], Any]:
  """Leaves by path, in the order of `jax.tree.leaves`."""
  paths, _ = jax.tree_util.tree_flatten_with_path(nnx.to_pure_dict(state))
  return {tuple(str(step.key) for step in path): leaf for path, leaf in paths}


def _check(given: dict[Any, Any], wanted: dict[Any, Any]) -> None:
  shapes = lambda flat: {"/".join(p): a.shape for p, a in flat.items()}
  have, want = shapes(given), shapes(wanted)
  if have != want:
    differ = {k for k in have | want if have.get(k) != want.get(k)}
    raise ValueError(
      "the given `params` are not those of this module; they differ at"
      f" {sorted(differ)}. Make them with `init`."
    )
