"""Log-likelihoods of continuations under a language model.

The log-likelihood of a continuation y of a context x is
log P(y | x; θ) = Σ_t log P(y_t | x, y_<t; θ), the term that the supervised objective averages. Rows
are padded on the right, where the padding cannot affect a causal model's earlier positions.
"""

import functools
import itertools
import math
import operator
from collections.abc import Iterator, Sequence
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

SHORTEST_ROW = 32  # tokens of the shortest padded row
POSITIONS_AT_ONCE = 16  # positions per row whose logits are computed together


def log_likelihoods(
  lm: LM,
  contexts: Sequence[Sequence[int]],
  continuations: Sequence[Sequence[int]],
  *,
  batch_tokens: int = 8192,
) -> list[float]:
  """Return log P(continuation | context; θ) of each pair, in nats.

  The sum is over the tokens of the continuation, and the log-softmax is computed in f32. Up to
  rounding, a value depends only on its own pair. The order of the pairs does not change a single
  bit of any value.

  Args:
    lm: the model.
    contexts: token ids of each context, at least one token each.
    continuations: token ids of each continuation, at least one token each.
    batch_tokens: maximum number of tokens in a batch, including padding. A batch always has at
      least one row per batch shard of the mesh, even if these rows exceed the maximum.

  Returns:
    One value per pair, in the order of the arguments.

  Raises:
    ValueError: if the two lists differ in length, or `batch_tokens` is less than 1.
    UserError: if a pair cannot be scored (see `check_pair`), or the model's logits are not finite.
  """
  if len(contexts) != len(continuations):
    raise ValueError(
      f'There are {len(contexts)} contexts and {len(continuations)} continuations. Pass one of '
      'each per pair, and repeat a context that has several continuations.'
    )
  if batch_tokens < 1:
    raise ValueError(f'batch_tokens={batch_tokens} must be at least 1.')
  pairs = []
  for number, (context, continuation) in enumerate(zip(contexts, continuations, strict=True)):
    pair = tuple(map(operator.index, context)), tuple(map(operator.index, continuation))
    check_pair(lm, *pair, f'pair {number}')
    pairs.append(pair)
  # Sort by content after length, so that batches, and hence rounding, do not depend on input order.
  order = sorted(range(len(pairs)), key=lambda i: (len(pairs[i][0]) + len(pairs[i][1]), pairs[i]))
  lengths = [sum(map(len, pairs[i])) - 1 for i in order]
  sharding = batch_sharding(lm.mesh)
  values = [0.0] * len(pairs)
  for rows, length, members in _batches(lengths, lm, batch_tokens):
    batch = _pad_pairs([pairs[order[i]] for i in members], rows, length)
    size = _positions_at_once(lm, rows, length)
    sums = np.asarray(_sum_log_probabilities(lm.graph, sharding, size, lm.params, *batch))
    for i, value in zip(members, sums[: len(members)], strict=True):
      values[order[i]] = float(value)
  if bad := [i for i, value in enumerate(values) if not math.isfinite(value)]:
    raise UserError(
      f'The log-likelihood of pair {bad[0]} (and of {len(bad) - 1} others) is {values[bad[0]]}, '
      f'because logits of {lm.name} are not finite. Check its weights, or load it with '
      'dtype="float32".'
    )
  return values


def tokenize_pair(tokenizer: Any, context: str, continuation: str) -> tuple[list[int], list[int]]:
  """Tokenize a context and its continuation as one text, and split the tokens between them.

  The split is where the tokens of the whole text first differ from those of the context alone. The
  model thus reads the text in tokens like those of its training. A token that merges the end of the
  context with the start of the continuation belongs to the continuation. Tokens that the tokenizer
  adds in front (BOS) are kept; tokens that it adds at the end (EOS) are dropped.

  Args:
    tokenizer: a Hugging Face tokenizer.
    context: a text, possibly empty.
    continuation: the text that follows it, with its leading white space.

  Returns:
    Token ids of the context and of the continuation.

  Raises:
    UserError: if the continuation adds no token, or the text spells a control token that the
      tokenizer cannot read as text.
  """
  whole, alone = _encode(tokenizer, context + continuation), _encode(tokenizer, context)
  split = 0
  while split < min(len(whole), len(alone)) and whole[split] == alone[split]:
    split += 1
  if split == len(whole):
    raise UserError(f'{continuation!r} adds no token to its context. Use a longer continuation.')
  return whole[:split], whole[split:]


def check_pair(lm: LM, context: Sequence[int], continuation: Sequence[int], label: str) -> None:
  """Check that a model can score a continuation of a context.

  Args:
    lm: the model.
    context: token ids.
    continuation: token ids.
    label: name of the pair, for the error message.

  Raises:
    UserError: if one of the two is empty or has a token outside the vocabulary, or if they do not
      fit into the model's context together.
  """
  for part, tokens in (('context', context), ('continuation', continuation)):
    if not len(tokens):
      hint = ', such as BOS' if part == 'context' else ''
      raise UserError(f'{label}: the {part} has no token. It needs at least one{hint}.')
    if not 0 <= min(tokens) <= max(tokens) < lm.vocab_size:
      raise UserError(
        f'{label}: the {part} has tokens in {min(tokens)}..{max(tokens)}, but the vocabulary is '
        f"0..{lm.vocab_size - 1}. Use the model's own tokenizer."
      )
  if len(context) + len(continuation) > lm.max_positions:
    raise UserError(
      f'{label}: {len(context)} tokens of context and {len(continuation)} of continuation exceed '
      f'the {lm.max_positions} positions of {lm.name}. Shorten the context, leave the pair out, or '
      'use a model with a longer context.'
    )


def _encode(tokenizer: Any, text: str) -> list[int]:
  """Tokenize a text. Keep tokens that the tokenizer adds in front, drop those at the end."""
  tokens = tokenizer.encode(text, split_special_tokens=True, add_special_tokens=False)
  spellings = {token: spelling for spelling, token in control_tokens(tokenizer).items()}
  # Some tokenizers do not mark a control token, such as </s>, as special, and read it all the same.
  if control := [token for token in tokens if token in spellings]:
    raise UserError(
      f'The text spells {spellings[control[0]]!r}, which the tokenizer reads as control token '
      f'{control[0]} even where only text is allowed. Change the text.'
    )
  return _prefix_tokens(tokenizer) + tokens


def _prefix_tokens(tokenizer: Any) -> list[int]:
  """Return the tokens that the tokenizer adds in front of a text, such as BOS."""
  bare, full = (tokenizer.encode('a', add_special_tokens=special) for special in (False, True))
  for start in range(len(full) - len(bare) + 1):
    if full[start : start + len(bare)] == bare:
      return full[:start]
  raise UserError(
    f"The tokenizer encodes 'a' as {bare} alone and as {full} with special tokens. Use a tokenizer "
    'that adds special tokens around a text without changing its tokens.'
  )


def _padded_length(length: int, longest: int) -> int:
  """Return the length that a row is padded to: 32, 48, 64, 96, 128, ... and at most `longest`."""
  power = max(SHORTEST_ROW, 1 << (length - 1).bit_length())
  three_quarters = power * 3 // 4
  fits = SHORTEST_ROW <= three_quarters and length <= three_quarters
  return min(three_quarters if fits else power, longest)


def _batches(
  lengths: Sequence[int], lm: LM, batch_tokens: int
) -> Iterator[tuple[int, int, list[int]]]:
  """Yield (number of rows, padded length, row indices) of each batch.

  The number of rows is the number of batch shards times a power of two, or times the largest number
  that `batch_tokens` allows. This keeps the number of compiled shapes small.

  Args:
    lengths: tokens of each row, in ascending order.
    lm: the model.
    batch_tokens: maximum number of tokens in a batch.
  """
  shards = batch_shards(lm.mesh)
  padded = [_padded_length(length, lm.max_positions) for length in lengths]
  for length, group in itertools.groupby(range(len(padded)), key=padded.__getitem__):
    remaining = list(group)
    most = max(1, batch_tokens // (length * shards))
    while remaining:
      rows = shards * min(most, 1 << (-(-len(remaining) // shards) - 1).bit_length())
      yield rows, length, remaining[:rows]
      remaining = remaining[rows:]


def _positions_at_once(lm: LM, rows: int, length: int) -> int:
  """Return how many positions per row get their logits together, within `LOGITS_AT_ONCE`."""
  rows_per_device = -(-rows // batch_shards(lm.mesh))
  limit = LOGITS_AT_ONCE // (rows_per_device * lm.vocab_size)
  return max(1, min(POSITIONS_AT_ONCE, limit, length))


def _pad_pairs(
  pairs: Sequence[tuple[tuple[int, ...], tuple[int, ...]]], rows: int, length: int
) -> tuple[np.ndarray, ...]:
  """Return a batch of (context, continuation) pairs, filled up with empty rows.

  Returns:
    `tokens: i32[B,T]`, the tokens that the model reads; `targets: i32[B,T]`, the token that each
    position predicts; `first: i32[B]`, the position that predicts the first token of the
    continuation; and `count: i32[B]`, the number of tokens in the continuation.
  """
  tokens, targets = np.zeros((2, rows, length), np.int32)
  first, count = np.zeros((2, rows), np.int32)
  for row, (context, continuation) in enumerate(pairs):
    whole = context + continuation
    tokens[row, : len(whole) - 1], targets[row, : len(whole) - 1] = whole[:-1], whole[1:]
    first[row], count[row] = len(context) - 1, len(continuation)
  return tokens, targets, first, count


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _sum_log_probabilities(graph, sharding, size, params, tokens, targets, first, count):
  """Return f32[B], each row's sum of log P over its continuation.

  Logits f32[B,size,V] are computed for `size` positions per row at a time. The other arguments are
  those that `_pad_pairs` returns.
  """
  tokens = jax.lax.with_sharding_constraint(tokens, sharding)
  model = nnx.merge(graph, params)
  positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
  hidden, _ = model(tokens, positions, sharding=sharding)

  def add_slice(number, sums):
    offset = number * size + jnp.arange(size)
    indices = jnp.minimum(first[:, None] + offset, tokens.shape[1] - 1)
    logits = model.unembed(jnp.take_along_axis(hidden, indices[..., None], axis=1))
    target = jnp.take_along_axis(targets, indices, axis=1)[..., None]
    target_logits = jnp.take_along_axis(logits, target, axis=-1)[..., 0]
    log_p = target_logits - jax.nn.logsumexp(logits, axis=-1)
    return sums + jnp.sum(jnp.where(offset < count[:, None], log_p, 0.0), axis=1)

  slices = -(-jnp.max(count) // size)
  sums = jax.lax.fori_loop(0, slices, add_slice, jnp.zeros(tokens.shape[0]))
  # Replicate the result, so that every process can read it.
  return jax.lax.with_sharding_constraint(sums, NamedSharding(sharding.mesh, P()))
