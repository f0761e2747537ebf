"""A pretrained model: decoding beside transformers, and what methods gain.

SmolLM2-135M-Instruct in f32 at batch 1 (`configs/adapt/smollm2.py`).  The other
side is transformers' eager CPU model, the same weights, written by
`adaptivejax.save`; where torch and transformers are not installed, that is said
and left out.  "frontier" is `adaptivejax adapt`: it takes 40 minutes.

  python -m benchmarks.pretrained [--cases plain frontier] [--json FILE]
"""

import importlib
import importlib.util
import math
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from adaptivejax import adapt, decode, io
from adaptivejax.adapt.bench import DENSE_BLOCK
from adaptivejax.adapt.run import RISE, SPEED, reached
from adaptivejax.methods.decode import SelfSpeculation
from adaptivejax.models import DecoderConfig, DecoderLM
from adaptivejax.nn import ByBlocks, out_major, with_look
from adaptivejax.report.clock import interleave
from benchmarks.harness import Options, Row, main
from configs.adapt import smollm2

CASES = ("plain", "assisted", "self-speculation", "frontier")
OUT = Path("runs/benchmarks/pretrained")
PROMPTS, STEPS = 8, 64


class Sizes(NamedTuple):
  """How much of everything."""

  prompt: int = 32
  steps: int = 16
  short: int = 256
  prefill: int = 1024
  seconds: float = 20.0


def tiny() -> io.Pretrained:
  """A random model of the same kind, for smoke runs."""
  c = DecoderConfig(
    vocab=256, layers=4, features=32, hidden=64, heads=2, kv_heads=1, gated=True
  )
  config = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": c.vocab,
    "num_hidden_layers": c.layers,
    "hidden_size": c.features,
    "intermediate_size": c.hidden,
    "num_attention_heads": c.heads,
    "num_key_value_heads": c.kv_heads,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 2048,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
  }
  return io.Pretrained(DecoderLM(c, rngs=nnx.Rngs(0)), config, {})


def rows(options: Options) -> Iterator[Row]:
  cases = options.select(CASES)
  sizes = Sizes(8, 8, 16, 32, 0.1) if options.quick else Sizes()
  try:
    loaded = tiny() if options.quick else smollm2.load()
  except ValueError as error:
    print(f"left out: {error}", file=sys.stderr)
    return
  fast = out_major(loaded.model)
  prompts = _prompts(loaded, sizes.prompt)
  if "plain" in cases or "assisted" in cases:
    yield from _beside_transformers(loaded, fast, prompts, sizes, cases)
  if "self-speculation" in cases:
    yield _exact_drafts(fast, prompts, 8 if options.quick else STEPS)
  if "frontier" in cases and not options.quick:
    yield from _frontier()


def _prompts(loaded: io.Pretrained, length: int) -> np.ndarray:
  """Beginnings of topics of Python's documentation; of random tokens else."""
  if not loaded.files:
    draw = np.random.default_rng(0)
    return draw.integers(0, 256, (PROMPTS, length)).astype(np.int32)
  from pydoc_data import topics

  tokenizer = loaded.tokenizer()
  texts = [topics.topics[name] for name in sorted(topics.topics)]
  tokens = (adapt.text.encode(tokenizer, text) for text in texts)
  some = [t[:length] for t in tokens if len(t) >= length]
  return np.stack(some[:: len(some) // PROMPTS][:PROMPTS])


@jax.jit
def _prefill(model, tokens):
  """The last logits, and the cache."""
  cache = model.empty_cache(*tokens.shape)
  newest = jnp.full(len(tokens), tokens.shape[1] - 1)
  out = model(tokens, cache, read_at=newest)
  return out.logits, out.cache


def _beside_transformers(loaded, fast, prompts, sizes, cases) -> Iterator[Row]:
  ours = lambda i: decode.generate(
    fast, jnp.asarray(prompts[i % PROMPTS][None]), steps=sizes.steps
  )
  many = lambda size: np.resize(prompts.reshape(-1), (1, size))
  size = min(DENSE_BLOCK, sizes.prefill // 2)
  by_blocks = with_look(fast, ByBlocks(block_q=size, block_kv=size))
  prefills = (
    ("plain attention", fast, many(sizes.short), None),
    ("by blocks", by_blocks, many(sizes.prefill), 1.2),
  )
  theirs = _transformers(loaded)
  if theirs is None:
    (times,) = interleave([ours], seconds=sizes.seconds, least=3)
    yield Row.of("plain", "tokens/s", [sizes.steps / t for t in times])
    for how, model, text, _ in prefills:
      read = lambda i, m=model, t=text: _prefill(m, jnp.asarray(t))
      (times,) = interleave([read], seconds=sizes.seconds, least=3)
      rate = [text.size / t for t in times]
      yield Row.of("plain", f"prefill of {text.size} {how}, tokens/s", rate)
    return
  write, answer = theirs
  if "plain" in cases:
    calls = [ours, lambda i: write(prompts[i % PROMPTS], sizes.steps)]
    a, b = interleave(calls, seconds=sizes.seconds, least=3)
    yield Row.of("plain", "tokens/s", [sizes.steps / t for t in a])
    yield Row.of("plain", "transformers tokens/s", [sizes.steps / t for t in b])
    ratio = [y / x for x, y in zip(a, b)]
    yield Row.of("plain", "decode / transformers", ratio, target=1.0)
    for how, model, text, target in prefills:
      calls = [
        lambda i, m=model, t=text: _prefill(m, jnp.asarray(t)),
        lambda i, t=text: answer(t),
      ]
      a, b = interleave(calls, seconds=sizes.seconds, least=3)
      name = f"prefill of {text.size} {how}"
      yield Row.of("plain", f"{name}, tokens/s", [text.size / t for t in a])
      ratio = [y / x for x, y in zip(a, b)]
      yield Row.of("plain", f"{name} / transformers", ratio, target=target)
    same = [
      float(
        (np.asarray(ours(i).tokens[0]) == write(prompts[i], sizes.steps)).all()
      )
      for i in range(PROMPTS)
    ]
    yield Row.of(
      "plain", "prompts with the same greedy text", [float(np.mean(same))]
    )
  if "assisted" in cases:
    exit = fast.config.layers * 3 // 4
    policy = SelfSpeculation(exit, 3)
    draft = lambda i: decode.generate(
      fast,
      jnp.asarray(prompts[i % PROMPTS][None]),
      steps=sizes.steps,
      policy=policy,
    )
    help = lambda i: write(prompts[i % PROMPTS], sizes.steps, exit)
    a, b = interleave([draft, help], seconds=sizes.seconds, least=3)
    ratio = [y / x for x, y in zip(a, b)]
    yield Row.of("assisted", "tokens/s", [sizes.steps / t for t in a])
    yield Row.of("assisted", "self-speculation / transformers'", ratio)


def _transformers(
  loaded: io.Pretrained,
) -> tuple[Callable[..., Any], Callable[..., Any]] | None:
  """`(write(prompt, steps, exit), read(tokens))` of transformers, or None."""
  missing = [
    name
    for name in ("torch", "transformers")
    if importlib.util.find_spec(name) is None
  ]
  if missing:
    print(
      f"left out: transformers' side, for {' and '.join(missing)} are not"
      " installed",
      file=sys.stderr,
    )
    return None
  torch = importlib.import_module("torch")
  transformers = importlib.import_module("transformers")

  with tempfile.TemporaryDirectory() as folder:
    path = Path(folder) / "model"
    io.save(loaded.model, path, like=loaded)
    model = transformers.LlamaForCausalLM.from_pretrained(
      path, dtype=torch.float32, attn_implementation="eager"
    ).eval()

  @torch.no_grad()
  def write(prompt, steps: int, exit: int | None = None):
    tokens = torch.from_numpy(np.asarray(prompt, np.int64))[None]
    more = {} if exit is None else {"assistant_early_exit": exit}
    out = model.generate(
      tokens,
      attention_mask=torch.ones_like(tokens),
      max_new_tokens=steps,
      min_new_tokens=steps,
      do_sample=False,
      pad_token_id=0,
      **more,
    )
    return out[0, len(prompt) :].numpy()

  @torch.no_grad()
  def read(tokens):
    model(torch.from_numpy(tokens.astype(np.int64)), logits_to_keep=1)

  return write, read


def _exact_drafts(fast, prompts, steps: int) -> Row:
  """Prompts whose text is that of greedy decoding, a share."""
  prompts = jnp.asarray(prompts)
  policy = SelfSpeculation(fast.config.layers * 3 // 4, 3)
  plain = decode.generate(fast, prompts, steps=steps).tokens
  drafted = decode.generate(fast, prompts, steps=steps, policy=policy).tokens
  same = np.all(np.asarray(plain) == np.asarray(drafted), axis=1)
  metric = f"prompts with the greedy text, of {PROMPTS} x {steps} tokens"
  return Row.of("self-speculation", metric, [float(same.mean())], target=1.0)


def _frontier() -> Iterator[Row]:
  made = adapt.adapt(smollm2.config(), OUT)
  for p in made.points:
    if p.dense:
      continue
    case = f"{p.method}, {p.setting}"
    known = lambda x: math.nan if x is None else float(x)
    low, high = map(known, p.spread)
    yield Row(case, f"{p.regime}: speed", known(p.speedup), (low, high))
    rise = made.rise(p)
    if rise is not None:
      yield Row(case, f"{p.regime}: rise of perplexity", rise, (rise, rise))
  many = float(len(reached(made)))
  metric = f"methods at {SPEED}x, perplexity up {RISE:.0%} at most"
  yield Row("frontier", metric, many, (many, many), target=3)


if __name__ == "__main__":
  main(__doc__, rows)
