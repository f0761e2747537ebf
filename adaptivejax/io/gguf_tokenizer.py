# SPDX-License-Identifier: Apache-2.0
"""The tokenizer in a GGUF file as the `tokenizer.json` of Hugging Face.

Byte-level byte pair encoding (Sennrich et al., 2016, https://arxiv.org/abs/1508.07909;
on bytes: Radford et al., 2019) is known by its tokens, its merges, and how a
text is cut before; GGUF names the last, and the cuts of a name are those of the
model's own `tokenizer.json`.
"""

import json
from collections.abc import Mapping
from typing import Any, TypeGuard

CONTROL, USER = 3, 4
"""Kinds of tokens that are found in a text before it is cut."""

LLAMA_3 = (
  r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
  r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _byte_level(regex: bool) -> dict[str, Any]:
  return {
    "type": "ByteLevel",
    "add_prefix_space": False,
    "trim_offsets": True,
    "use_regex": regex,
  }


def _split(pattern: str) -> dict[str, Any]:
  return {
    "type": "Split",
    "pattern": {"Regex": pattern},
    "behavior": "Isolated",
    "invert": False,
  }


DIGITS = {"type": "Digits", "individual_digits": True}
CUTS = {
  "gpt-2": [_byte_level(True)],
  "llama-bpe": [_split(LLAMA_3), _byte_level(False)],
  "smollm": [DIGITS, _byte_level(True)],
  "starcoder": [DIGITS, _byte_level(True)],
}
"""How a text is cut, by GGUF's name of it (`tokenizer.ggml.pre`)."""


def tokenizer_files(metadata: Mapping[str, Any]) -> dict[str, bytes]:
  """`tokenizer.json` and the chat template, as far as there are such.

  A tokenizer of another kind is left out: the model is whole without.

  Raises:
    ValueError: lists that do not fit one another.
  """
  files = {}
  template = metadata.get("tokenizer.chat_template")
  if isinstance(template, str):
    files["chat_template.jinja"] = template.encode("utf-8")
  said = {k.removeprefix("tokenizer.ggml."): v for k, v in metadata.items()}
  cut = said.get("pre")
  if said.get("model") == "gpt2" and isinstance(cut, str) and cut in CUTS:
    text = json.dumps(_tokenizer(said), ensure_ascii=False, indent=2)
    files["tokenizer.json"] = text.encode("utf-8")
  return files


def _tokenizer(said: Mapping[str, Any]) -> dict[str, Any]:
  """The whole of it."""
  tokens, merges = said.get("tokens"), said.get("merges")
  if not _texts(tokens) or not _texts(merges):
    raise ValueError("tokenizer.ggml: `tokens` and `merges` must be texts.")
  kinds = said.get("token_type", [1] * len(tokens))
  if not isinstance(kinds, list) or len(kinds) != len(tokens):
    raise ValueError("tokenizer.ggml: give as many `token_type` as `tokens`.")
  table = {token: i for i, token in enumerate(tokens)}
  if len(table) != len(tokens):
    raise ValueError("tokenizer.ggml.tokens has the same token twice.")
  added = [
    {
      "id": i,
      "content": token,
      "single_word": False,
      "lstrip": False,
      "rstrip": False,
      "normalized": False,
      "special": kind == CONTROL,
    }
    for i, (token, kind) in enumerate(zip(tokens, kinds))
    if kind in (CONTROL, USER)
  ]
  return {
    "version": "1.0",
    "truncation": None,
    "padding": None,
    "added_tokens": added,
    "normalizer": None,
    "pre_tokenizer": {"type": "Sequence", "pretokenizers": CUTS[said["pre"]]},
    "post_processor": _first(said, tokens),
    "decoder": _byte_level(True),
    "model": {
      "type": "BPE",
      "dropout": None,
      "unk_token": None,
      "continuing_subword_prefix": None,
      "end_of_word_suffix": None,
      "fuse_unk": False,
      "byte_fallback": False,
      "ignore_merges": said["pre"] == "llama-bpe",
      "vocab": table,
      "merges": [merge.split(" ", 1) for merge in merges],
    },
  }


def _first(said: Mapping[str, Any], tokens: list[str]) -> dict[str, Any] | None:
  """Puts the first token in front of a text, where this is wanted."""
  begin = said.get("bos_token_id")
  if not said.get("add_bos_token") or begin is None:
    return None
  if type(begin) is not int or not 0 <= begin < len(tokens):
    raise ValueError(f"tokenizer.ggml.bos_token_id={begin!r} is no token.")
  name = tokens[begin]
  start = {"SpecialToken": {"id": name, "type_id": 0}}
  a, b = ({"Sequence": {"id": s, "type_id": i}} for i, s in enumerate("AB"))
  return {
    "type": "TemplateProcessing",
    "single": [start, a],
    "pair": [start, a, {"SpecialToken": {"id": name, "type_id": 1}}, b],
    "special_tokens": {name: {"id": name, "ids": [begin], "tokens": [name]}},
  }


def _texts(values: Any) -> TypeGuard[list[str]]:
  return isinstance(values, list) and all(isinstance(v, str) for v in values)
