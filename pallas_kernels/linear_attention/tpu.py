# SPDX-License-Identifier: Apache-2.0
"""Linear attention on TPU: the state of a head stays in VMEM.

The grid is (B, H, N), its last axis in order, so that the state goes from one
chunk to the next in VMEM; so do the powers of a decay that is the same for all
tokens.  The gradient walks from the last chunk to the first with the gradient
of the state, and reads the state before each chunk, which the forward pass has
kept: all gradients in one pass.  What a chunk computes is in `chunk.py`.

Axes: B batch, H heads, T tokens, N chunks, C tokens of a chunk, D key width, E
value width; T = N C.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.linear_attention import chunk as maths

F32 = jnp.float32


def forward(q, k, v, marks, state, *, keep: bool, interpret: Any = False):
  """`(o, state, states)`, see `xla.forward`."""
  grid = _Grid.of(q, v, marks)
  outs = [
    (v.shape, q.dtype, grid.tokens(v.shape[3])),
    (state.shape, F32, grid.state()),
  ]
  if keep:
    shape = (*state.shape[:2], grid.chunks, *state.shape[2:])
    outs.append((shape, F32, grid.states()))
  kernel = functools.partial(_forward_kernel, shared=marks.shape[2] == 1)
  call = grid.call(
    kernel,
    "linear_attention",
    [
      grid.marks(),
      *(grid.tokens(a.shape[3]) for a in (q, k, v)),
      grid.state(),
    ],
    outs,
    products=2,
    interpret=interpret,
  )
  out, state, *states = call(marks, q, k, v, state)
  return out, state, states[0] if keep else None


def backward(q, k, v, marks, states, dout, dstate, *, interpret: Any = False):
  """Gradients of q, k, v, the log decay and the state, see `xla.backward`."""
  grid = _Grid.of(q, v, marks, reverse=True)
  batch, heads, tokens, _ = q.shape
  rows = (batch, heads, grid.chunks, 1, grid.size)
  kernel = functools.partial(_backward_kernel, shared=marks.shape[2] == 1)
  call = grid.call(
    kernel,
    "linear_attention_gradient",
    [
      grid.marks(),
      *(grid.tokens(a.shape[3]) for a in (q, k, v)),
      grid.states(),
      grid.tokens(v.shape[3]),
      grid.state(),
    ],
    [
      *((a.shape, a.dtype, grid.tokens(a.shape[3])) for a in (q, k, v)),
      (rows, F32, grid.rows()),
      (dstate.shape, F32, grid.state()),
    ],
    products=5,
    interpret=interpret,
  )
  dq, dk, dv, dg, dstate = call(marks, q, k, v, states, dout, dstate)
  return dq, dk, dv, dg.reshape(batch, heads, tokens), dstate


def _forward_kernel(marks, q, k, v, start, out, end, *refs, shared: bool):
  """One chunk.

  In: marks, f32[2, C]; q and k, [C, D]; v, [C, E]; the first state, f32[D, E].
  Out: o, [C, E]; the last state; if kept the state before the chunk.
  Scratch: the state, and `Powers`.
  """
  *kept, state, pair, into, out_of, total = refs
  n = pl.program_id(2)

  @pl.when(n == 0)
  def begin():
    state[...] = start[...]

  powers = _powers(marks, (pair, into, out_of, total), n, shared)
  for ref in kept:
    ref[...] = state[...]
  y, after = maths.forward(q[...], k[...], v[...], state[...], powers)
  out[...] = y.astype(out.dtype)
  state[...] = after

  @pl.when(n == pl.num_programs(2) - 1)
  def finish():
    end[...] = after


def _backward_kernel(
  marks, q, k, v, before, dout, dend, dq, dk, dv, dg, dstart, dstate, *powers,
  shared: bool,
):  # fmt: skip
  """One chunk, the last one first.

  In: as forward, but the state before the chunk; the gradients of o, [C, E],
  and of the last state, f32[D, E].
  Out: of q, k, v; of the log decay, f32[1, C]; of the first state.
  Scratch: the gradient of the state after the chunk, and `Powers`.
  """
  n = pl.program_id(2)

  @pl.when(n == 0)
  def begin():
    dstate[...] = dend[...]

  made = maths.backward(
    q[...], k[...], v[...], before[...], _powers(marks, powers, n, shared),
    dout[...], dstate[...],
  )  # fmt: skip
  for ref, value in zip((dq, dk, dv, dg), made):
    ref[...] = value.astype(ref.dtype)
  dstate[...] = made.state

  @pl.when(n == pl.num_programs(2) - 1)
  def finish():
    dstart[...] = made.state


def _powers(marks, refs, n, shared: bool) -> maths.Powers:
  """Made at every chunk, or at the first one where they are all the same."""

  def make():
    for ref, value in zip(refs, maths.powers(marks[...])):
      ref[...] = value

  if not shared:
    return maths.powers(marks[...])
  pl.when(n == 0)(make)
  return maths.Powers(*(ref[...] for ref in refs))


@dataclasses.dataclass(frozen=True)
class _Grid:
  """The blocks of a program; `reverse` walks from the last chunk."""

  batch: int
  heads: int
  chunks: int
  size: int  # C
  width: int  # D
  out_width: int  # E
  shared: tuple[bool, bool, bool]  # axes of `marks` that are 1
  reverse: bool
  varies: Any  # over which mesh axes

  @classmethod
  def of(cls, q, v, marks, reverse: bool = False) -> "_Grid":
    size = marks.shape[-1]
    batch, heads, tokens, width = q.shape
    return cls(
      batch=batch,
      heads=heads,
      chunks=tokens // size,
      size=size,
      width=width,
      out_width=v.shape[3],
      shared=(marks.shape[0] == 1, marks.shape[1] == 1, marks.shape[2] == 1),
      reverse=reverse,
      varies=jax.typeof(q).manual_axis_type,
    )

  def at(self, n):
    return self.chunks - 1 - n if self.reverse else n

  def tokens(self, width: int) -> pl.BlockSpec:
    """A chunk of [B, H, T, width]."""
    block = (None, None, self.size, width)
    return pl.BlockSpec(block, lambda b, h, n: (b, h, self.at(n), 0))

  def rows(self) -> pl.BlockSpec:
    """A chunk of [B, H, N, 1, C]."""
    block = (None, None, None, 1, self.size)
    return pl.BlockSpec(block, lambda b, h, n: (b, h, self.at(n), 0, 0))

  def marks(self) -> pl.BlockSpec:
    """A chunk of [B|1, H|1, N|1, 2, C]."""
    block = (None, None, None, 2, self.size)

    def index(b, h, n):
      place = b, h, self.at(n)
      return (*(0 if one else p for p, one in zip(place, self.shared)), 0, 0)

    return pl.BlockSpec(block, index)

  def state(self) -> pl.BlockSpec:
    """Of a head, [B, H, D, E]."""
    block = (None, None, self.width, self.out_width)
    return pl.BlockSpec(block, lambda b, h, n: (b, h, 0, 0))

  def states(self) -> pl.BlockSpec:
    """Of a chunk, [B, H, N, D, E]."""
    block = (None, None, None, self.width, self.out_width)
    return pl.BlockSpec(block, lambda b, h, n: (b, h, self.at(n), 0, 0))

  def call(self, kernel, name, in_specs, outs, *, products, interpret):
    """`pallas_call`; `outs` are (shape, dtype, block)."""
    size, column = self.size, (self.size, 1)
    tokens = self.batch * self.heads * self.chunks * size
    pairs = tokens * size * (self.width + self.out_width)
    states = 2 * tokens * self.width * self.out_width
    return pl.pallas_call(
      kernel,
      out_shape=[
        jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=self.varies)
        for shape, dtype, _ in outs
      ],
      grid_spec=pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=0,
        grid=(self.batch, self.heads, self.chunks),
        in_specs=in_specs,
        out_specs=[spec for _, _, spec in outs],
        scratch_shapes=[
          pltpu.VMEM(shape, F32)
          for shape in (
            (self.width, self.out_width),
            (size, size),
            column,
            column,
            (1, 1),
          )
        ],
      ),
      compiler_params=pltpu.CompilerParams(
        dimension_semantics=("parallel", "parallel", "arbitrary")
      ),
      cost_estimate=pl.CostEstimate(
        flops=products * (pairs + states),
        bytes_accessed=4 * tokens * (self.width + self.out_width),
        transcendentals=0 if self.shared[2] else tokens * size,
      ),
      interpret=interpret,
      name=name,
    )
