"""Log-likelihoods of given continuations, and the loss of held-out replies.

log P(y | x; θ) = Σ_t log P(y_t | x, y_<t; θ), the summand of the supervised objective; each row is
right-padded, which a causal model cannot see.
"""

import functools
import itertools
import math
import operator
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from cai_jax.dialogue import control_tokens
from cai_jax.model.lm import LM
from cai_jax.runtime.errors import UserError
from cai_jax.runtime.hardware import LOGITS_AT_ONCE
from cai_jax.runtime.mesh import batch_sharding, batch_shards

SHORTEST = 32  # tokens of the shortest padded row
PLACES_AT_ONCE = 16  # of a row, whose logits are computed together: most answers are short


def log_likelihoods(
  lm: LM,
  contexts: Sequence[Sequence[int]],
  continuations: Sequence[Sequence[int]],
  *,
  batch_tokens: int = 8192,
) -> list[float]:
  """log P(continuation | context; θ) of each pair in nats, in the order given.

  Summed over the continuation's tokens, the log-softmax in f32. A value is one of its pair alone,
  to within rounding; the same pairs in another order give the same values bit for bit.

  Args:
    lm: the model.
    contexts: token ids, at least one each.
    continuations: token ids, at least one each, as many as contexts.
    batch_tokens: tokens of a batch, padding included. A batch has one row for each part of the
      mesh's batch axes at least, however long.

  Raises:
    ValueError: for lists of two lengths, a context or continuation without a token, a token
      outside the vocabulary, a pair longer than the model's context, a `batch_tokens` below 1, or
      a model whose logits are not finite.
  """
  if len(contexts) != len(continuations):
    raise UserError(
      f'{len(contexts)} contexts and {len(continuations)} continuations were given; there must be '
      'one continuation for each context (repeat a context that has several).'
    )
  if batch_tokens < 1:
    raise UserError(f'batch_tokens={batch_tokens}; it must be 1 or more, such as 8192.')
  pairs = []
  for number, (context, continuation) in enumerate(zip(contexts, continuations, strict=True)):
    pair = tuple(map(operator.index, context)), tuple(map(operator.index, continuation))
    check_pair(lm, *pair, f'pair {number}')
    pairs.append(pair)
  # By content too: batches, and with them the rounding, do not depend on the order given.
  order = sorted(range(len(pairs)), key=lambda i: (len(pairs[i][0]) + len(pairs[i][1]), pairs[i]))
  values = [0.0] * len(pairs)
  sharding = batch_sharding(lm.mesh)
  for rows, length, chosen in _batches(
    [sum(map(len, pairs[i])) - 1 for i in order], lm, batch_tokens
  ):
    batch = _pad([pairs[order[i]] for i in chosen], rows, length)
    sums = np.asarray(_sums(lm.graph, sharding, _places(lm, rows, length), lm.params, *batch))
    for i, value in zip(chosen, sums[: len(chosen)], strict=True):
      values[order[i]] = float(value)
  if bad := [i for i, value in enumerate(values) if not math.isfinite(value)]:
    raise UserError(
      f'pair {bad[0]} (and {len(bad) - 1} more) has the log-likelihood {values[bad[0]]}: logits of '
      f'{lm.name} are not finite. Check its weights, or load it with dtype="float32".'
    )
  return values


def perplexity(
  lm: LM,
  rows: Sequence[tuple[Sequence[int], Sequence[int]]],
  *,
  batch_tokens: int = 8192,
) -> dict[str, float | int]:
  """Loss and perplexity of held-out replies.

  Args:
    lm: the model.
    rows: (context, continuation), token ids; the continuation is what counts.
    batch_tokens: as `log_likelihoods` takes it.

  Returns:
    `loss`: nats a sequence, -1/N Σ_i log P(y_i | x_i; θ), the objective with normalization
    'sequence'; `loss_per_token`: nats a token of the continuations; `perplexity`: its exponential;
    `tokens` and `sequences`: how many there were.

  Raises:
    ValueError: if there is no row, or as `log_likelihoods`.
  """
  if not len(rows):
    raise UserError('there is no row to compute the loss of; give one (context, continuation).')
  contexts, continuations = zip(*rows, strict=True)
  total = -math.fsum(log_likelihoods(lm, contexts, continuations, batch_tokens=batch_tokens))
  tokens = sum(map(len, continuations))
  return {
    'loss': total / len(rows),
    'loss_per_token': total / tokens,
    'perplexity': float(np.exp(total / tokens)),
    'tokens': tokens,
    'sequences': len(rows),
  }


def tokenise(tokenizer: Any, context: str, continuation: str) -> tuple[list[int], list[int]]:
  """(context, continuation) in tokens: those of the whole text, cut where the continuation begins.

  The whole text and the context are tokenised, and the cut is where their tokens first differ. So
  the tokens are the ones that the model knows such text by; where the continuation merges with the
  end of the context, the merged token counts as the continuation's. Tokens that the tokenizer puts
  in front itself (BOS) are kept and those that it puts at the end are not.

  Raises:
    ValueError: for a text that spells a control token which this tokenizer reads as one all the
      same, or a continuation that adds no token.
  """
  whole, alone = _encode(tokenizer, context + continuation), _encode(tokenizer, context)
  same = 0
  while same < min(len(whole), len(alone)) and whole[same] == alone[same]:
    same += 1
  if same == len(whole):
    raise UserError(f'{continuation!r} adds no token to its context; give a text that does.')
  return whole[:same], whole[same:]


def check_pair(lm: LM, context: Sequence[int], continuation: Sequence[int], name: str) -> None:
  """ValueError unless the model can score the pair, which the message calls `name`."""
  for kind, tokens in (('context', context), ('continuation', continuation)):
    if not len(tokens):
      hint = '; begin it with the BOS token' if kind == 'context' else ''
      raise UserError(f'{name}: the {kind} has no token; it needs one at least{hint}.')
    if not 0 <= min(tokens) <= max(tokens) < lm.vocab_size:
      raise UserError(
        f'{name}: the {kind} has tokens in {min(tokens)}..{max(tokens)}; the vocabulary is '
        f'0..{lm.vocab_size - 1}. Take the tokenizer of this model.'
      )
  if len(context) + len(continuation) > lm.max_positions:
    raise UserError(
      f'{name}: {len(context)} tokens of context and {len(continuation)} of continuation exceed '
      f'the {lm.max_positions} positions of {lm.name}; shorten the context, leave the pair out, or '
      'take a model with a longer context.'
    )


def _encode(tokenizer, text: str) -> list[int]:
  """Tokens of a text with what the tokenizer puts in front, and nothing behind."""
  bare = tokenizer.encode(text, split_special_tokens=True, add_special_tokens=False)
  control = {token: spelling for spelling, token in control_tokens(tokenizer).items()}
  # Some are not marked as special (</s> of several tokenizers), and those are read all the same.
  if read := [token for token in bare if token in control]:
    raise UserError(
      f'the text spells {control[read[0]]!r}, and the tokenizer makes it token {read[0]} though it '
      'was told to take it as text; change the text.'
    )
  return _front(tokenizer) + bare


def _front(tokenizer) -> list[int]:
  """Tokens that the tokenizer puts in front of a text, such as BOS."""
  bare, full = (tokenizer.encode('a', add_special_tokens=special) for special in (False, True))
  for start in range(len(full) - len(bare) + 1):
    if full[start : start + len(bare)] == bare:
      return full[:start]
  raise UserError(
    f"the tokenizer makes 'a' {bare} by itself and {full} with its special tokens; take one that "
    'puts these around a text.'
  )


def _bucket(length: int, most: int) -> int:
  """Length that a row is padded to: 32, 48, 64, 96, 128, ..., two an octave; `most` at most."""
  power = max(SHORTEST, 1 << (length - 1).bit_length())
  short = power * 3 // 4
  return min(short if SHORTEST <= short and length <= short else power, most)


def _batches(lengths: list[int], lm: LM, batch_tokens: int):
  """(rows, padded length, indices) of each batch of rows with these ascending lengths.

  Rows are a power of two times the mesh's batch shards, or as many as `batch_tokens` allows: few
  shapes to compile, whatever the number of pairs.
  """
  shards = batch_shards(lm.mesh)
  sizes = [_bucket(length, lm.max_positions) for length in lengths]
  for length, group in itertools.groupby(range(len(sizes)), key=sizes.__getitem__):
    left = list(group)
    most = max(1, batch_tokens // (length * shards))
    while left:
      rows = shards * min(most, 1 << (-(-len(left) // shards) - 1).bit_length())
      yield rows, length, left[:rows]
      left = left[rows:]


def _places(lm: LM, rows: int, length: int) -> int:
  """Places of each row whose logits are computed together: `LOGITS_AT_ONCE` bounds a device's."""
  shards = batch_shards(lm.mesh)
  bound = LOGITS_AT_ONCE // (-(-rows // shards) * lm.vocab_size)
  return max(1, min(PLACES_AT_ONCE, bound, length))


def _pad(pairs, rows: int, length: int) -> tuple[np.ndarray, ...]:
  """(tokens i32[B,T], targets i32[B,T], first i32[B], count i32[B]) of pairs and empty rows.

  Place t holds the token that is read and the one that it predicts; places `first` up to
  `first + count` predict the continuation.
  """
  tokens, targets = np.zeros((2, rows, length), np.int32)
  first, count = np.zeros((2, rows), np.int32)
  for row, (context, continuation) in enumerate(pairs):
    whole = context + continuation
    tokens[row, : len(whole) - 1], targets[row, : len(whole) - 1] = whole[:-1], whole[1:]
    first[row], count[row] = len(context) - 1, len(continuation)
  return tokens, targets, first, count


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _sums(graph, sharding, size, params, tokens, targets, first, count):
  """f32[B]: sum of log P over the places that count, by logits f32[B,size,V] at a time."""
  tokens = jax.lax.with_sharding_constraint(tokens, sharding)
  model = nnx.merge(graph, params)
  positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
  hidden, _ = model(tokens, positions, sharding=sharding)

  def add(number, sums):
    offset = number * size + jnp.arange(size)
    places = jnp.minimum(first[:, None] + offset, tokens.shape[1] - 1)
    logits = model.unembed(jnp.take_along_axis(hidden, places[..., None], axis=1))
    target = jnp.take_along_axis(targets, places, axis=1)[..., None]
    chosen = jnp.take_along_axis(logits, target, axis=-1)[..., 0]
    log_p = chosen - jax.nn.logsumexp(logits, axis=-1)
    return sums + jnp.sum(jnp.where(offset < count[:, None], log_p, 0.0), axis=1)

  sums = jax.lax.fori_loop(0, -(-jnp.max(count) // size), add, jnp.zeros(tokens.shape[0]))
  # Whole on every process, which then can read it.
  return jax.lax.with_sharding_constraint(sums, NamedSharding(sharding.mesh, P()))
