# SPDX-License-Identifier: Apache-2.0
"""Attention over block lists by loops and float64, gradients by hand."""

import numpy as np


def visible(shape, lists, marks, rule):
  """Which query sees which key, pair by pair, bool[B, H, T, S]."""
  batch, heads, queries, _ = shape
  index, count = np.asarray(lists.index), np.asarray(lists.count)
  seen = np.zeros(shape, bool)
  for b in range(batch):
    for h in range(heads):
      own = b % index.shape[0], h * index.shape[1] // heads
      for t in range(queries):
        tile, row = divmod(t, lists.block_q)
        for c in range(count[own][tile]):
          if lists.rows is None or np.asarray(lists.rows)[own][tile, c, row]:
            first = index[own][tile, c] * lists.block_kv
            seen[b, h, t, first : first + lists.block_kv] = True
  read = lambda a, *at: np.asarray(a)[tuple(i % n for i, n in zip(at, a.shape))]
  for b, h, t, s in zip(*np.nonzero(seen)):
    at = t if marks.q_pos is None else read(marks.q_pos, b, t)
    pos = s
    if marks.kv_pos is not None:
      owner = h * marks.kv_pos.shape[1] // heads
      pos = read(marks.kv_pos, b, owner, s)
    ok = at >= 0 and pos >= 0
    ok &= not rule.causal or pos <= at
    ok &= rule.window is None or pos > at - rule.window
    if marks.q_segment is not None:
      ok &= read(marks.q_segment, b, t) == read(marks.kv_segment, b, s)
    seen[b, h, t, s] = ok
  return seen


def attention(q, k, v, lists, marks, rule, dout=None, dlse=None):
  """`{out, lse, mass, dq, dk, dv, dbias, dsinks}`."""
  wide = lambda a: np.asarray(a, np.float64)
  q, k, v = wide(q), wide(k), wide(v)
  batch, heads, queries, width = q.shape
  groups, keys = k.shape[1:3]
  group = np.arange(heads) * groups // heads
  seen = visible((batch, heads, queries, keys), lists, marks, rule)
  scale = width**-0.5 if rule.scale is None else rule.scale
  raw = np.einsum("bhtd,bhsd->bhts", q, k[:, group]) * scale
  slope = np.ones_like(raw)
  if rule.softcap is not None:
    slope = 1 - np.tanh(raw / rule.softcap) ** 2
    raw = rule.softcap * np.tanh(raw / rule.softcap)
  if marks.kv_bias is not None:
    bias = wide(marks.kv_bias)
    owner = np.arange(heads) * bias.shape[1] // heads
    raw = raw + bias[:, owner][:, :, None]
  e = np.where(seen, np.exp(raw), 0)
  total = e.sum(-1)
  if marks.sinks is not None:
    total = total + np.exp(wide(marks.sinks))[:, None]
  with np.errstate(divide="ignore"):
    lse = np.log(total)
  p = e / np.where(total == 0, 1, total)[..., None]
  out = np.einsum("bhts,bhse->bhte", p, v[:, group])
  found = {"out": out, "lse": lse, "mass": _mass(p, lists)}
  if dout is None:
    return found
  dout, dlse = wide(dout), wide(dlse)
  given = np.einsum("bhte,bhse->bhts", dout, v[:, group])
  gain = dlse - (out * dout).sum(-1)
  ds = p * (given + gain[..., None])
  by_group = lambda a: a.reshape(batch, groups, -1, *a.shape[2:]).sum(2)
  found["dv"] = by_group(np.einsum("bhts,bhte->bhse", p, dout))
  if marks.kv_bias is not None:
    of_head = ds.sum(2)
    found["dbias"] = np.zeros(np.shape(marks.kv_bias))
    np.add.at(found["dbias"], (slice(None), owner), of_head)
  if marks.sinks is not None:
    share = np.exp(wide(marks.sinks))[:, None] / total
    found["dsinks"] = (share * gain).sum((0, 2))
  ds = ds * slope * scale
  found["dq"] = np.einsum("bhts,bhsd->bhtd", ds, k[:, group])
  found["dk"] = by_group(np.einsum("bhts,bhtd->bhsd", ds, q))
  return found


def _mass(p, lists):
  index, count = np.asarray(lists.index), np.asarray(lists.count)
  batch, heads, *_ = p.shape
  mass = np.zeros((batch, heads, *index.shape[2:]))
  for b, h, tile, c in np.ndindex(mass.shape):
    own = b % index.shape[0], h * index.shape[1] // heads
    if c < count[own][tile]:
      t, s = tile * lists.block_q, index[own][tile, c] * lists.block_kv
      part = p[b, h, t : t + lists.block_q, s : s + lists.block_kv]
      mass[b, h, tile, c] = part.sum()
  return mass
