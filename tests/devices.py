# SPDX-License-Identifier: Apache-2.0
"""Eight devices against one, for `test_laws.py`: names of cases as arguments.

python -m tests.devices calm ffn_skip
"""

import functools
import sys
import traceback

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import tests.conftest  # noqa: F401  its hook comes before the library
from tests.laws import CASES, close, differentiate, gradient, loss, parameters

DEVICES = 8


def one(case, params, x):
  """`(y, gradients)` on one device; no gradients where there are none."""
  if "gradient" in case.unless:
    return case.run(params, x, case.some)[0], None
  return gradient(case, params, x, case.some)


def sharded(case, params, x):
  """The compiler spreads the batch."""
  over = lambda spec: NamedSharding(_mesh(), spec)
  shardings = over(P()), over(P("data"))
  f = functools.partial(one, case)
  return jax.jit(f, in_shardings=shardings)(params, x)


def shard_map(case, params, x):
  """Each device has its rows, its decisions, and a part of the loss."""
  spread = functools.partial(
    jax.shard_map, mesh=_mesh(), in_specs=(P(), P("data"))
  )
  if "gradient" in case.unless:
    rows = lambda params, x: case.run(params, x, case.some)[0]
    return jax.jit(spread(rows, out_specs=P("data")))(params, x), None

  def part(params, x):
    total, y = loss(case, params, x, case.some)
    return jax.lax.psum(total, "data"), y

  whole = spread(part, out_specs=(P(), P("data")))
  return jax.jit(functools.partial(differentiate, whole))(params, x)


def _mesh():
  return jax.make_mesh((DEVICES,), ("data",), axis_types=(AxisType.Auto,))


def main(*names):
  failed = []
  for case in (case for case in CASES if case.name in names):
    params, x = parameters(case), case.inputs(DEVICES)
    want = jax.jit(functools.partial(one, case))(params, x)
    for how in (
      f for f in (sharded, shard_map) if f.__name__ not in case.unless
    ):
      print(how.__name__, case.name, flush=True)
      try:
        close(jax.tree.map(np.asarray, how(case, params, x)), want)
      except Exception:  # the other cases still run
        failed.append(f"{how.__name__} {case.name}")
        print(traceback.format_exc()[-3000:], flush=True)
  sys.exit(f"these cases differ: {failed}" if failed else 0)


if __name__ == "__main__":
  main(*sys.argv[1:])
