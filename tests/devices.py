# SPDX-License-Identifier: Apache-2.0
"""Eight devices against one, for `test_laws.py`: `HOW GROUP` as arguments.

python -m tests.devices shard_map models
"""

import functools
import sys
import traceback

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import tests.conftest  # noqa: F401  its hook comes before the library
from tests.laws import (
  CASES,
  MODELS,
  close,
  compiled,
  differentiate,
  gradient,
  loss,
  parameters,
)

DEVICES = 8
GROUPS = {
  "layers": [case for case in CASES if case not in MODELS],
  "models": MODELS,
}


def _mesh():
  return jax.make_mesh((DEVICES,), ("data",), axis_types=(AxisType.Auto,))


def sharded(case, params, x):
  """The compiler spreads the batch."""
  mesh = _mesh()
  over = lambda spec: NamedSharding(mesh, spec)
  shard = lambda f: jax.jit(
    lambda params, x: f(params, x, case.some),
    in_shardings=(over(P()), over(P("data"))),
  )
  y = shard(lambda *a: case.run(*a)[0])(params, x)
  if "gradient" in case.unless:
    return y, None
  return y, shard(functools.partial(gradient, case))(params, x)


def shard_map(case, params, x):
  """Each device has its rows, its decisions, and a part of the loss."""
  mesh = _mesh()

  def rows(params, x):
    return case.run(params, x, case.some)[0]

  spread = jax.shard_map(
    rows, mesh=mesh, in_specs=(P(), P("data")), out_specs=P("data")
  )
  y = jax.jit(spread)(params, x)
  if "gradient" in case.unless:
    return y, None

  def total(params, x):
    return jax.lax.psum(loss(case, params, x, case.some), "data")

  total = jax.shard_map(
    total, mesh=mesh, in_specs=(P(), P("data")), out_specs=P()
  )
  grads = jax.jit(lambda params, x: differentiate(total, params, x))
  return y, grads(params, x)


def main(how, group):
  failed = []
  for case in GROUPS[group]:
    if how in case.unless:
      continue
    print(case.name, flush=True)
    params, x = parameters(case), case.inputs(DEVICES)
    try:
      y, grads = {"sharded": sharded, "shard_map": shard_map}[how](
        case, params, x
      )
      close(np.asarray(y), compiled(case)(params, x, case.some)[0])
      if grads is not None:
        one = jax.jit(lambda p, x, case=case: gradient(case, p, x, case.some))
        close(grads, one(params, x))
    except Exception:  # the other cases still run
      failed.append(case.name)
      print(traceback.format_exc()[-3000:], flush=True)
  sys.exit(f"these cases differ: {failed}" if failed else 0)


if __name__ == "__main__":
  main(*sys.argv[1:])
