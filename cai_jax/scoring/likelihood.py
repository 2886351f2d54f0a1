"""Log-likelihoods of continuations under a language model.

The log-likelihood of a continuation y of a context x is
log P(y | x; θ) = Σ_t log P(y_t | x, y_<t; θ), the term that the supervised objective averages.

Continuations of the same context, such as the options of a question, share a row, so that the model
reads the context once. They follow it one after another, and each sees only the context and itself:

  tokens     x_1 x_2 x_3 | y_1 y_2 | z_1        the last token of a continuation is only predicted
  positions   0   1   2  |  3   4  |  3
  branch      0   0   0  |  1   1  |  2

Rows are padded on the right, where the padding cannot affect a causal model's earlier positions.
"""

import itertools
import math
import operator
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from cai_jax.dialogue import control_tokens
from cai_jax.model.lm import LM
from cai_jax.model.transformer import LONGEST_MASK
from cai_jax.runtime.compilation import jit_on
from cai_jax.runtime.errors import UserError
from cai_jax.runtime.hardware import LOGITS_AT_ONCE
from cai_jax.runtime.mesh import batch_sharding, batch_shards
from cai_jax.runtime.progress import LINE_SECONDS, Progress

SHORTEST_ROW = 32  # tokens of the shortest padded row
SHARED_ROW = 512  # tokens that a row of several continuations may have, however short the context
POSITIONS_AT_ONCE = 16  # positions per row whose logits are computed together

Tokens = tuple[int, ...]
Pair = tuple[Tokens, Tokens]  # a context and a continuation


class _Row(NamedTuple):
  """A context and the continuations that share it."""

  context: Tokens
  continuations: tuple[Tokens, ...]

  @property
  def length(self) -> int:
    """Number of tokens that the model reads."""
    return len(self.context) + sum(len(tokens) - 1 for tokens in self.continuations)

  def pairs(self) -> list[Pair]:
    """Return the context with each of the continuations."""
    return [(self.context, tokens) for tokens in self.continuations]


class _Batch(NamedTuple):
  """Padded rows, and the predictions to read from them: T of each row.

  Attributes:
    tokens: i32[B,T].
    positions: i32[B,T].
    branch: i32[B,T], 0 for the context, else the number of the continuation, from 1.
    source: i32[B,T], for each prediction, the index of the token that makes it.
    target: i32[B,T], the token that it predicts.
    owner: i32[B,T], the index of its continuation; -1 marks padding.
    width: bool[K], K is the largest number of continuations of a row.
  """

  tokens: np.ndarray
  positions: np.ndarray
  branch: np.ndarray
  source: np.ndarray
  target: np.ndarray
  owner: np.ndarray
  width: np.ndarray


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
  unique = sorted(set(pairs))
  # A state cannot branch, and longer rows that do would need a mask of all pairs of tokens.
  most = min(lm.max_positions, LONGEST_MASK) if lm.config.delta is None else 0
  rows = sorted(_share_contexts(unique, most), key=lambda row: (row.length, row))
  value_of = _score_rows(lm, rows, batch_tokens)
  values = [value_of[pair] for pair in pairs]
  if bad := [i for i, value in enumerate(values) if not math.isfinite(value)]:
    raise UserError(
      f'The log-likelihood of pair {bad[0]} (and of {len(bad) - 1} others) is {values[bad[0]]}, '
      f'because logits of {lm.name} are not finite. Check its weights, or load it with '
      'dtype="float32".'
    )
  return values


def _score_rows(lm: LM, rows: Sequence[_Row], batch_tokens: int) -> dict[Pair, float]:
  """Return the log-likelihood of each pair of some rows, and show the progress of a long loop."""
  sharding = batch_sharding(lm.mesh)
  platform = lm.mesh.devices.flat[0].platform
  program = jit_on(platform, _sum_log_probabilities, static_argnums=(0, 1, 2))
  value_of: dict[Pair, float] = {}
  done = tokens = 0
  with Progress(f'likelihoods of {lm.name}', quiet_seconds=LINE_SECONDS) as progress:
    for count, length, members in plan_batches([row.length for row in rows], lm, batch_tokens):
      batch = _pad_rows([rows[i] for i in members], count, length)
      size = positions_at_once(lm, count, length)
      sums = np.asarray(program(lm.graph, sharding, size, lm.params, batch))
      for i, row_sums in zip(members, sums[: len(members)], strict=True):
        value_of |= zip(rows[i].pairs(), map(float, row_sums), strict=False)
      done, tokens = done + len(members), tokens + sum(rows[i].length for i in members)
      progress(done, len(rows), tokens)
  return value_of


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
  whole, alone = encode_text(tokenizer, context + continuation), encode_text(tokenizer, context)
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


def encode_text(tokenizer: Any, text: str) -> list[int]:
  """Tokenize a text. Keep tokens that the tokenizer adds in front, drop those at the end.

  Args:
    tokenizer: a Hugging Face tokenizer.
    text: the text, possibly empty.

  Raises:
    UserError: if the text spells a control token that the tokenizer cannot read as text.
  """
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


def plan_batches(
  lengths: Sequence[int], lm: LM, batch_tokens: int
) -> Iterator[tuple[int, int, list[int]]]:
  """Yield (number of rows, padded length, row indices) of each batch.

  A program is compiled for each pair of the first two, so there are few of them. A batch has as
  many rows as `batch_tokens` allows. Rows that do not fill one join those of the next length, if
  that is at most twice their own, unless only one of the two is within `LONGEST_MASK`. Where they
  do not join, the number of rows is rounded up to the number of batch shards times a power of two.

  Args:
    lengths: tokens of each row, in ascending order.
    lm: the model.
    batch_tokens: maximum number of tokens in a batch.
  """
  shards = batch_shards(lm.mesh)
  padded = [_padded_length(length, lm.max_positions) for length in lengths]
  groups = [
    (length, list(group))
    for length, group in itertools.groupby(range(len(padded)), padded.__getitem__)
  ]
  followers = [length for length, _ in groups[1:]] + [math.inf]
  waiting: list[int] = []

  def stays_alone(length, follower):
    return follower > 2 * length or length <= LONGEST_MASK < follower

  for (length, group), follower in zip(groups, followers, strict=False):
    waiting += group
    most = max(1, batch_tokens // (length * shards))
    while len(waiting) >= most * shards or (waiting and stays_alone(padded[waiting[0]], follower)):
      rows = shards * min(most, 1 << (-(-len(waiting) // shards) - 1).bit_length())
      yield rows, length, waiting[:rows]
      waiting = waiting[rows:]


def positions_at_once(lm: LM, rows: int, length: int) -> int:
  """Return how many positions per row get their logits together, within `LOGITS_AT_ONCE`.

  Args:
    lm: the model.
    rows: number of rows of a batch.
    length: number of tokens of a row, including padding.
  """
  rows_per_device = -(-rows // batch_shards(lm.mesh))
  limit = LOGITS_AT_ONCE // (rows_per_device * lm.vocab_size)
  return max(1, min(POSITIONS_AT_ONCE, limit, length))


def _share_contexts(pairs: Sequence[Pair], longest: int) -> Iterator[_Row]:
  """Yield rows that contain each pair once.

  A row has at most as many continuations as its context has tokens, so that its predictions are no
  more than its tokens. With several continuations, it is at most twice as long as its context, or
  `SHARED_ROW` tokens: attention takes time and memory that grow with the square of the length, and
  sharing a short context saves little.

  Args:
    pairs: distinct pairs in ascending order, so that equal contexts are neighbours.
    longest: maximum number of tokens of a row with several continuations; 0 allows no such row.
  """
  for context, group in itertools.groupby(pairs, key=operator.itemgetter(0)):
    row, most = _Row(context, ()), min(longest, max(2 * len(context), SHARED_ROW))
    for _, continuation in group:
      longer = _Row(context, (*row.continuations, continuation))
      if row.continuations and (longer.length > most or len(longer.continuations) > len(context)):
        yield row
        longer = _Row(context, (continuation,))
      row = longer
    yield row


def _pad_rows(rows: Sequence[_Row], count: int, length: int) -> _Batch:
  """Return a batch of `count` rows of `length` tokens, filled up with empty ones."""
  tokens, positions, branch, source, target = np.zeros((5, count, length), np.int32)
  owner = np.full((count, length), -1, np.int32)
  for row, (context, continuations) in enumerate(rows):
    end = len(context)
    tokens[row, :end], positions[row, :end] = context, np.arange(end)
    read = 0
    for number, continuation in enumerate(continuations):
      size = len(continuation)
      inner = np.arange(end, end + size - 1)  # all of its tokens but the last
      tokens[row, inner], branch[row, inner] = continuation[:-1], number + 1
      positions[row, inner] = len(context) + np.arange(size - 1)
      part = slice(read, read + size)
      source[row, part] = [len(context) - 1, *inner]
      target[row, part], owner[row, part] = continuation, number
      end, read = end + size - 1, read + size
    # Padding sees the context and is seen by no token, because its position is the largest.
    positions[row, end:] = positions[row, :end].max() + 1
  most = max(len(row.continuations) for row in rows)
  width = np.zeros(1 << (most - 1).bit_length(), bool)  # powers of two, so that few are compiled
  return _Batch(tokens, positions, branch, source, target, owner, width)


def _sum_log_probabilities(graph, sharding, size, params, batch):
  """Return f32[B,K], the sum of log P over each continuation of each row of a `_Batch`.

  Logits f32[B,size,V] are computed for `size` predictions per row at a time.
  """
  batch = jax.tree.map(jnp.asarray, batch)
  tokens = jax.lax.with_sharding_constraint(batch.tokens, sharding)
  branch = batch.branch
  model = nnx.merge(graph, params)
  allowed = None  # without branches, as in long rows, a token sees all before it
  if model.config.delta is None and tokens.shape[1] <= LONGEST_MASK:
    allowed = (branch[:, None, :] == 0) | (branch[:, :, None] == branch[:, None, :])
  hidden = model(tokens, batch.positions, sharding=sharding, allowed=allowed)
  owners = jnp.arange(len(batch.width))

  def add_slice(number, sums):
    places = number * size + jnp.arange(size)
    inside = places < tokens.shape[1]
    places = jnp.minimum(places, tokens.shape[1] - 1)
    logits = model.unembed(jnp.take_along_axis(hidden, batch.source[:, places, None], axis=1))
    target = batch.target[:, places, None]
    target_logits = jnp.take_along_axis(logits, target, axis=-1)[..., 0]
    log_p = target_logits - jax.nn.logsumexp(logits, axis=-1)
    owned = (batch.owner[:, places, None] == owners) & inside[:, None]
    return sums + jnp.sum(jnp.where(owned, log_p[..., None], 0.0), axis=1)

  slices = -(-jnp.max(jnp.sum(batch.owner >= 0, axis=1)) // size)
  sums = jnp.zeros((tokens.shape[0], len(batch.width)))
  sums = jax.lax.fori_loop(0, slices, add_slice, sums)
  # Replicate the result, so that every process can read it.
  return jax.lax.with_sharding_constraint(sums, NamedSharding(sharding.mesh, P()))
