# SPDX-License-Identifier: Apache-2.0
"""Checked shapes, eight fake devices, a compilation cache, fixed examples."""

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
QUICK = ["--xla_backend_optimization_level=0"]
if jax.__version_info__ < (0, 11):  # later ones are fatal: no such flag
  QUICK.append("--xla_cpu_use_fusion_emitters=false")
os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *QUICK])

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_compilation_cache_dir", str(CACHE))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)

hypothesis.settings.register_profile("laws", deadline=None, derandomize=True)
hypothesis.settings.load_profile("laws")


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
