"""Scores of conversations by a reward model or classifier: a decoder with a head over its end.

These are checkpoints of transformers' sequence classification (`LlamaForSequenceClassification`
and its kin), the form in which preference models (Bai et al. 2022, section 4; Ouyang et al. 2022,
section 3.5) are mostly published: a linear head without a bias over the hidden state of the last
token.
"""

import dataclasses
import functools
import os
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from cai_jax.dialogue import Dialogue, Message
from cai_jax.model.classifier import load_classifier
from cai_jax.model.config import ModelConfig
from cai_jax.model.precision import einsum_f32
from cai_jax.model.transformer import Params, abstract_model
from cai_jax.runtime.errors import UserError
from cai_jax.runtime.mesh import batch_sharding, batch_shards, place, to_host

SHORTEST = 64  # tokens of the shortest rows; others are twice as long, four times, ...


@functools.partial(jax.jit, static_argnames=('graph', 'sharding'))
def _logits(graph, sharding, params, score, tokens, positions, segment_ids, last):
  """Logits f32[B,C] at place `last` i32[B] of each row."""
  model = nnx.merge(graph, params)
  # Of the kernels this one runs on every device, and never holds a whole square of scores.
  hidden, _ = model(tokens, positions, segment_ids, sharding=sharding, attention='blocks')
  ends = jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0]
  return einsum_f32('BD,CD->BC', ends, score.astype(ends.dtype))


@dataclasses.dataclass(frozen=True, eq=False)
class RewardModel:
  """A reward model or classifier of conversations, placed on a mesh."""

  config: ModelConfig
  params: Params
  score: np.ndarray  # f32[C,D], the head
  labels: tuple[str, ...]  # C names
  dialogue: Dialogue
  pad_token_id: int | None
  mesh: Mesh
  dtype: str  # compute dtype
  name: str  # folder or hub name it came from

  def logits(self, tokens: np.ndarray, mask: np.ndarray | None = None) -> np.ndarray:
    """Logits f32[B,C] of rows of tokens, each taken at its last real token.

    That is where transformers takes them, which knows real tokens by their not being the pad token.

    Args:
      tokens: i32[B,T]. Each B × T is compiled once.
      mask: bool or i32[B,T], nonzero on real tokens, for left- or right-padded rows.

    Raises:
      ValueError: for another shape, a token outside the vocabulary, or a row without real tokens
        or with padding between them.
    """
    tokens = np.asarray(tokens)
    fits = mask is None or np.shape(mask) == tokens.shape
    if tokens.ndim != 2 or not tokens.size or not fits:
      given = f'tokens {tokens.shape}' + ('' if mask is None else f', mask {np.shape(mask)}')
      raise UserError(f'{given}: tokens, and a mask if there is one, have the same shape [B,T].')
    if not 0 <= tokens.min() <= tokens.max() < self.config.vocab_size:
      raise UserError(
        f'tokens lie in {tokens.min()}..{tokens.max()}; the vocabulary is '
        f'0..{self.config.vocab_size - 1}.'
      )
    real = np.ones(tokens.shape, bool) if mask is None else np.asarray(mask) != 0
    runs = np.diff(real.astype(np.int8), axis=1, prepend=0, append=0)  # 1 where one begins
    if (wrong := np.flatnonzero((runs == 1).sum(1) != 1)).size:
      raise UserError(
        f"row {wrong[0]}: a row's real tokens must follow each other, one at least; its mask has "
        f'{(runs[wrong[0]] == 1).sum()} runs of them.'
      )
    rows = len(tokens)
    fill = -rows % batch_shards(self.mesh)
    tokens, real = (np.pad(x, ((0, fill), (0, 0)), 'edge') for x in (tokens, real))
    positions = np.maximum(np.cumsum(real, axis=1) - 1, 0)
    last = tokens.shape[1] - 1 - np.argmax(real[:, ::-1], axis=1)
    sharding = batch_sharding(self.mesh)
    arrays = [place(x.astype(np.int32), sharding) for x in (tokens, positions, real, last)]
    graph = abstract_model(self.config, self.dtype)[0]
    return to_host(_logits(graph, sharding, self.params, self.score, *arrays))[:rows]

  def conversation_logits(
    self, conversations: Sequence[Sequence[Message]], batch_tokens: int = 8192
  ) -> np.ndarray:
    """Logits f32[n,C] of conversations that end with a reply, in their order.

    Rows are of lengths 64, 128, 256, ... tokens, so few programs are compiled. A pad token that a
    conversation ends with is no end: transformers, with which the models were trained, does not
    tell it from padding.

    Args:
      conversations: each a list of messages, the last by the assistant.
      batch_tokens: tokens of a batch, padding included; a longer row is a batch of its own.

    Raises:
      ValueError: as `tokens`; for `batch_tokens` below 1.
    """
    if batch_tokens < 1:
      raise UserError(f'batch_tokens={batch_tokens} is too small: at least 1.')
    rows = self.tokens(conversations)
    result = np.empty((len(rows), len(self.labels)), np.float32)
    buckets: dict[int, list[int]] = {}
    for index, row in enumerate(rows):
      buckets.setdefault(_bucket(len(row), self.config.max_positions), []).append(index)
    shards = batch_shards(self.mesh)
    for length, members in sorted(buckets.items()):
      size = -(-max(1, batch_tokens // length) // shards) * shards
      size = min(size, _power_of_two(-(-len(members) // shards)) * shards)
      for start in range(0, len(members), size):
        chosen = members[start : start + size]
        tokens, mask = np.zeros((size, length), np.int32), np.zeros((size, length), bool)
        for row_index in range(size):  # the last batch is filled up with its last row
          row = rows[chosen[min(row_index, len(chosen) - 1)]]
          tokens[row_index, : len(row)], mask[row_index, : len(row)] = row, True
        result[chosen] = self.logits(tokens, mask)[: len(chosen)]
    return result

  def scores(
    self,
    conversations: Sequence[Sequence[Message]],
    label: int | str | None = None,
    batch_tokens: int = 8192,
  ) -> list[float]:
    """The reward of each conversation: its logit of `label`.

    Args:
      conversations, batch_tokens: as of `conversation_logits`.
      label: index or name; a model of one label needs none.

    Raises:
      ValueError: as `conversation_logits` and `label_index`.
    """
    column = self.label_index(label)
    return [float(x) for x in self.conversation_logits(conversations, batch_tokens)[:, column]]

  def label_index(self, label: int | str | None) -> int:
    """The place of a label in `labels`; None is the only one.

    Raises:
      ValueError: for an unknown label, or None where there are several.
    """
    if label is None and len(self.labels) == 1:
      return 0
    if isinstance(label, str) and self.labels.count(label) == 1:
      return self.labels.index(label)
    if isinstance(label, int) and 0 <= label < len(self.labels):
      return label
    raise UserError(
      f'label={label!r} is not one of the {len(self.labels)} labels of {self.name}: choose by '
      f'name, or by place from 0, one of {self.labels}.'
    )

  def tokens(self, conversations: Sequence[Sequence[Message]]) -> list[list[int]]:
    """Tokens of each conversation up to where its logits are taken.

    Raises:
      ValueError: for a conversation that does not end with a reply, that the chat template refuses,
        or that is longer than the model's context, naming its place.
    """
    rows = []
    for index, messages in enumerate(conversations):
      try:
        row = self.dialogue.conversation(messages)
      except ValueError as error:
        raise UserError(f'conversation {index}: {error}') from error
      while row and row[-1] == self.pad_token_id:
        row.pop()
      if not 0 < len(row) <= self.config.max_positions:
        raise UserError(
          f'conversation {index} has {len(row)} tokens; {self.name} reads 1 to '
          f'{self.config.max_positions}. Leave it out or shorten it: nothing is cut here.'
        )
      rows.append(row)
    return rows


def load(
  path: str | os.PathLike,
  dtype: str = 'float32',
  mesh: Mesh | None = None,
  style: str = 'chat',
) -> RewardModel:
  """The reward model of a Hugging Face folder or hub name.

  Args:
    path: a sequence-classification checkpoint of a family that is supported.
    dtype: what is computed in, and what parameters are kept in: 'float32', 'bfloat16', 'float16'.
    mesh: where the parameters go; None is `make_mesh()`.
    style: of the conversations: the tokenizer's chat template, or 'plain' Human:/Assistant:.

  Raises:
    ValueError: as `load_classifier` and `Dialogue`.
  """
  found = load_classifier(path, dtype, mesh)
  return RewardModel(
    config=found.config,
    params=found.params,
    score=found.score,
    labels=found.labels,
    dialogue=Dialogue(found.tokenizer, style, found.eos_token_ids),
    pad_token_id=found.pad_token_id,
    mesh=found.mesh,
    dtype=dtype,
    name=str(path),
  )


def _power_of_two(n: int) -> int:
  """The smallest power of two that is at least n ≥ 1."""
  return 1 << (n - 1).bit_length()


def _bucket(length: int, longest: int) -> int:
  """Tokens of the rows that `length` tokens are put in."""
  return min(max(SHORTEST, _power_of_two(length)), longest)
