# SPDX-License-Identifier: Apache-2.0
"""Pretrained models in, and out again.

    smol = adaptivejax.load("SmolLM2-135M")    # a folder, or a .gguf file
    out = smol.model(tokens)
    adaptivejax.save(smol.model, "copy", like=smol)

A file is checked before its values are read: `config.json` says which tensors
there must be, of which shape, and what is missing, left over or malformed is
refused by name.  Nothing in a file is ever run.
"""

import dataclasses
from pathlib import Path
from typing import Any

from jax.typing import DTypeLike

from adaptivejax.io.architectures import plan_of
from adaptivejax.io.fields import Fields
from adaptivejax.io.gguf_source import Gguf
from adaptivejax.io.place import Shardings
from adaptivejax.io.reader import Reader
from adaptivejax.io.rows import choose_form
from adaptivejax.io.source import Folder, Source
from adaptivejax.untrusted import parse_object


@dataclasses.dataclass(frozen=True)
class Pretrained:
  """A model, and what came with it."""

  model: Any
  """Such as a `models.DecoderLM`."""
  config: dict[str, Any]
  """Its `config.json`; special tokens are here, such as `eos_token_id`."""
  files: dict[str, bytes]
  """What lay beside the weights, by name: `tokenizer.json` and its like."""

  def tokenizer(self) -> Any:
    """A `tokenizers.Tokenizer` (extra `text`).

    Raises:
      ValueError: none came with the model, or it cannot be read.
    """
    text = self.files.get("tokenizer.json")
    if text is None:
      raise ValueError("no tokenizer.json came with this model.")
    import tokenizers

    parse_object(text, "tokenizer.json")
    try:
      return tokenizers.Tokenizer.from_str(text.decode("utf-8"))
    except Exception as error:  # that of the library is no more than one
      raise ValueError(
        f"tokenizer.json is none that `tokenizers` can read: {error}. Take"
        " that of the model, or tokenise without."
      ) from error


def load(
  path: str | Path,
  *,
  dtype: DTypeLike | None = None,
  sharding: Shardings | None = None,
  allow_nonfinite: bool = False,
) -> Pretrained:
  """The model in a folder, or in a GGUF file.

  Args:
    path: a folder with `config.json` and `model.safetensors`, or shards with
      their index; or a file `*.gguf` of a Llama, whose weights become f32.
    dtype: of the weights, float32, bfloat16 or float16; as stored if None.
    sharding: where weights go: one for all, a function `sharding(path, leaf)`
      of a parameter's path and its `jax.ShapeDtypeStruct`, or a pytree like the
      model; the default device if None.
    allow_nonfinite: accept weights that are NaN or infinite.

  Raises:
    ValueError: the config asks for something that is not supported, or the
      file does not hold what it asks for; the field or tensor is named.
  """
  source = _open(Path(path))
  longest = max((n for s in source.specs.values() for n in s.shape), default=1)
  where = f"the config of {source.where}"
  plan = plan_of(Fields(source.config, where, longest, len(source.specs)))
  form = choose_form(plan, source.specs, source.where)
  reader = Reader(source, plan, dtype, allow_nonfinite)
  model = reader.model(form, sharding)
  return Pretrained(model, source.config, dict(source.files))


def _open(path: Path) -> Source:
  if path.is_dir():
    return Folder(path)
  if not path.is_file():
    raise ValueError(f"{path} does not exist: give a folder or a .gguf file.")
  if path.suffix != ".gguf":
    raise ValueError(
      f"{path} is neither a folder with config.json nor a .gguf file."
    )
  return Gguf(path)
