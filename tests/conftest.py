# SPDX-License-Identifier: Apache-2.0
"""Checked shapes, eight fake devices, a compilation cache, fixed examples.

Most of the time goes to tracing and compiling.  So tests that share compiled
functions run one after the other in one process: those of a file, and all laws
of one case (`make test`).
"""

import gc
import itertools
import os
from pathlib import Path

import hypothesis
import jax
import jaxtyping
import pytest

# An int is a float here, as it is for a type checker (PEP 484).
CHECKER = "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))"
CACHE = Path(__file__).parents[1] / ".cache" / "jax"

jaxtyping.install_import_hook(["adaptivejax", "pallas_kernels"], CHECKER)

# Eight devices wait for one another in threads: with too few they starve, and
# independent collectives deadlock.  XLA reads its number of threads from here.
os.environ.setdefault("NPROC", "64")

# Nearly all of the time goes to compiling small programs that run once.
QUICK = [
  "--xla_backend_optimization_level=0",
  "--xla_cpu_parallel_codegen_split_count=1",
]
if jax.__version_info__ < (0, 11):  # later ones are fatal: no such flag
  QUICK.append("--xla_cpu_use_fusion_emitters=false")
os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *QUICK])

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_compilation_cache_dir", str(CACHE))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)
jax.config.update("jax_traceback_in_locations_limit", 0)  # a tenth of lowering

# Traces are many long-lived objects: the collector's default is to look often.
gc.set_threshold(200_000, 20, 100)

hypothesis.settings.register_profile("laws", deadline=None, derandomize=True)
hypothesis.settings.load_profile("laws")


def group(item):
  """Names the tests that share compiled functions with this one."""
  file = item.nodeid.partition("::")[0]
  if not file.endswith("test_laws.py"):
    return file
  case = item.callspec.params.get("case")
  return f"{file}:{case.name if case else item.callspec.id}"


@pytest.hookimpl(tryfirst=True)  # before xdist reads the marks
def pytest_collection_modifyitems(items):
  """Puts each group together: subprocesses, then files, then laws."""
  names = {item: group(item) for item in items}
  first = {name: i for i, name in enumerate(dict.fromkeys(names.values()))}

  def turn(item):
    if ":" not in names[item]:
      return 1
    return 2 if "case" in item.callspec.params else 0

  items.sort(key=lambda item: (turn(item), first[names[item]]))
  for item, name in names.items():
    item.add_marker(pytest.mark.xdist_group(name))


MAPS, RUN = Path("/proc/self/maps"), itertools.count(1)


@pytest.fixture(autouse=True)
def few_programs():
  """Forgets compiled programs before there are too many.

  XLA maps memory for each, and Linux allows a process 65,530 maps: the compiler
  crashes at that limit.
  """
  yield
  often = next(RUN) % 20 == 0 and MAPS.exists()
  if often and MAPS.read_bytes().count(b"\n") > 25_000:
    jax.clear_caches()
