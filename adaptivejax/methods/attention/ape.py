# SPDX-License-Identifier: Apache-2.0
r"""APE: contexts are read apart from one another, and looked at together.

Yang et al., 2025, https://arxiv.org/abs/2502.05431

Every context C_1..C_N is encoded after the same prefix alone, from the same
position on, so that encodings can be kept and put together at will; the text
that follows has positions after the longest.  A query of it finds o_C in the
contexts, at a temperature T, and o in the rest, prefix and text:

    o_C, l_C = attention(q / T, C_1..C_N),        o, l = attention(q, rest)
    out = softmax(S T l_C, l) . (o_C, o)

(sec. 4), l being the log of the sum of the exponents.  T < 1 is sharper, S < 1
gives contexts less weight; T = S = 1 reads one context as in sequence.

Primitive: `attend_apart`, two attentions and `merge_lse`.
Departs: nowhere; contexts are memory, their positions empty in the cache.
Axes: B batch, P prefix tokens, N contexts, M tokens of one, T tokens.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from adaptivejax.core.cache import KVCache
from adaptivejax.core.contexts import Contexts, attend_apart
from adaptivejax.nn.look import Look, Looked, look_cost
from adaptivejax.nn.looks import looks_of, with_look
from adaptivejax.nn.setting import Frozen


class APE(Look):
  """A look at contexts and the text after them; see `parallel_context`.

  Args:
    contexts: N (static).
    length: M, the tokens of the longest (static).
    temperature, scale: T and S, above 0.
  """

  learns = True  # contexts, which the cache has no slots for

  def __init__(
    self,
    contexts: int,
    length: int,
    *,
    temperature: float = 0.9,
    scale: float = 0.9,
  ):
    if contexts < 1 or length < 1 or not (temperature > 0 and scale > 0):
      raise ValueError(
        f"{contexts=} and {length=} must be at least 1, {temperature=} and"
        f" {scale=} above 0."
      )
    self.contexts, self.length = contexts, length
    self.temperature = Frozen(jnp.float32(temperature))
    self.scale = Frozen(jnp.float32(scale))

  def memory(self, batch, heads, slots, width, dtype) -> Contexts:
    size = self.contexts * self.length
    return Contexts.empty(batch, heads, size, width, dtype)

  def recall(
    self, q, positions, cache: KVCache, layer=0, *, x=None, live=None, key=None
  ) -> Looked:
    if cache.tree is not None:
      raise ValueError("APE reads no trees of drafts: decode without them.")
    held, keys = cache.recollect(layer), cache.read(layer)
    t, s = self.temperature.get_value(), self.scale.get_value()
    out = attend_apart(q, held, keys, positions, t, s)
    return Looked(out, look_cost(q, cache.slots + held.k.shape[2], live))


def parallel_context(
  model,
  prefix: Int[Array, "B P"],
  contexts: Int[Array, "B N M"],
  slots: int,
  *,
  lengths: Int[Array | np.ndarray, "B N"] | None = None,
) -> KVCache:
  """The cache of a model that has read contexts, each by itself.

  Args:
    model: a `DecoderLM` that looks by `APE(N, M)`, see `nn.with_look`.
    prefix: what comes before every context.
    contexts: in any order, padded on the right.
    slots: room for prefix, one context and the text to come (static).
    lengths: tokens of each context, 0 for none (dynamic); all M if not given.

  Raises:
    ValueError: another look, other shapes, or no room.
  """
  (batch, *room), start = contexts.shape, prefix.shape[1]
  looks = [look for look in looks_of(model) if isinstance(look, APE)]
  if not looks or len(looks) < len(looks_of(model)):
    raise ValueError("contexts need `with_look(model, APE(contexts, length))`.")
  fits = [looks[0].contexts, looks[0].length] == room
  if not fits or slots <= start + room[1]:
    raise ValueError(
      f"{contexts.shape=} must be [batch, contexts, length] as in the model's"
      f" APE, and {slots=} more than prefix and context, {start + room[1]}."
    )
  given = jnp.full((batch, room[0]), room[1]) if lengths is None else lengths
  count = jnp.asarray(given, jnp.int32)
  alone = with_look(model, Look())
  read = alone(prefix, alone.empty_cache(batch, start + room[1])).cache
  each = jax.tree.map(lambda a: jnp.repeat(a, room[0], axis=0), read)
  flat = contexts.reshape(-1, room[1])
  each = alone(flat, each, lengths=count.reshape(-1)).cache
  put = lambda old, new: old.at[:, :, :, :start].set(new[:, :, :, :start])
  cache = model.empty_cache(batch, slots)
  return cache._replace(
    k=put(cache.k, read.k),
    v=put(cache.v, read.v),
    pos=put(cache.pos, read.pos),
    length=start + count.max(1),
    memory=Contexts.of_rows(each, start, room[0]),
  )
