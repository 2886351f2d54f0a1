"""Reward models and classifiers: a decoder with a linear head on the last token.

They are sequence-classification checkpoints of transformers, such as
`LlamaForSequenceClassification`. Most preference models are published in this form (Bai et al.
2022, section 4; Ouyang et al. 2022, section 3.5). The head has no bias.
"""

import dataclasses
import os
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from cai_jax.dialogue import Dialogue, Message, known_options
from cai_jax.dialogue.format import TemplateOptions
from cai_jax.model.classifier import ClassifierInfo, load_classifier
from cai_jax.model.config import ModelConfig
from cai_jax.model.score_head import score_states
from cai_jax.model.transformer import Params, abstract_model
from cai_jax.runtime.compilation import jit_on
from cai_jax.runtime.errors import UnreadableError, UserError
from cai_jax.runtime.mesh import batch_sharding, batch_shards, place, to_host

SHORTEST_ROW = 64  # tokens of the shortest padded row; longer rows have 128, 256, ... tokens


@dataclasses.dataclass(frozen=True, eq=False)
class RewardModel:
  """A reward model or classifier of conversations, placed on a mesh.

  Attributes:
    config: shape of the decoder.
    params: parameters of the decoder.
    score: f32[C,D], the head.
    labels: names of the C labels.
    dialogue: renders conversations as tokens.
    pad_token_id: the checkpoint's padding token, or None.
    mesh: the devices that hold the parameters.
    dtype: dtype of the activations.
    name: the folder or hub name of the checkpoint.
  """

  config: ModelConfig
  params: Params
  score: np.ndarray
  labels: tuple[str, ...]
  dialogue: Dialogue
  pad_token_id: int | None
  mesh: Mesh
  dtype: str
  name: str

  def logits(self, tokens: np.ndarray, mask: np.ndarray | None = None) -> np.ndarray:
    """Return the logits at the last real token of each row.

    Each shape B × T is compiled once.

    Args:
      tokens: i32[B,T], padded on either side.
      mask: bool or i32[B,T], nonzero on real tokens. None means that all tokens are real.

    Returns:
      f32[B,C].

    Raises:
      ValueError: if the shapes are wrong, or the real tokens of a row are not one contiguous run.
      UserError: if a token is outside the vocabulary.
    """
    tokens = np.asarray(tokens)
    real = np.ones(tokens.shape, bool) if mask is None else np.asarray(mask) != 0
    self._check_rows(tokens, real)
    rows = len(tokens)
    fill = -rows % batch_shards(self.mesh)
    tokens, real = (np.pad(x, ((0, fill), (0, 0)), 'edge') for x in (tokens, real))
    positions = np.maximum(np.cumsum(real, axis=1) - 1, 0)
    last = tokens.shape[1] - 1 - np.argmax(real[:, ::-1], axis=1)
    sharding = batch_sharding(self.mesh)
    arrays = [place(x.astype(np.int32), sharding) for x in (tokens, positions, real, last)]
    graph = abstract_model(self.config, self.dtype)[0]
    program = logits_program(self.mesh.devices.flat[0].platform)
    return to_host(program(graph, sharding, self.params, self.score, *arrays))[:rows]

  def conversation_logits(
    self, conversations: Sequence[Sequence[Message]], batch_tokens: int = 8192
  ) -> np.ndarray:
    """Return the logits of conversations that end with a reply.

    Rows are padded to 64, 128, 256, ... tokens, so few shapes are compiled. Padding tokens at the
    end of a conversation are removed first, because transformers uses the logits before them in
    training.

    Args:
      conversations: lists of messages, each ending with the assistant's.
      batch_tokens: maximum number of tokens in a batch, including padding. A longer row forms a
        batch of its own.

    Returns:
      f32[N,C], in the order of the conversations.

    Raises:
      ValueError: if `batch_tokens` is less than 1.
      UserError: if a conversation cannot be scored, see `tokenize`.
    """
    if batch_tokens < 1:
      raise ValueError(f'batch_tokens={batch_tokens} must be at least 1.')
    rows = self.tokenize(conversations)
    result = np.empty((len(rows), len(self.labels)), np.float32)
    by_length: dict[int, list[int]] = {}
    for index, row in enumerate(rows):
      length = min(max(SHORTEST_ROW, _next_power_of_two(len(row))), self.config.max_positions)
      by_length.setdefault(length, []).append(index)
    shards = batch_shards(self.mesh)
    for length, members in sorted(by_length.items()):
      size = -(-max(1, batch_tokens // length) // shards) * shards
      size = min(size, _next_power_of_two(-(-len(members) // shards)) * shards)
      for start in range(0, len(members), size):
        batch = members[start : start + size]
        tokens, mask = _pad_rows([rows[index] for index in batch], size, length)
        result[batch] = self.logits(tokens, mask)[: len(batch)]
    return result

  def scores(
    self,
    conversations: Sequence[Sequence[Message]],
    label: int | str | None = None,
    batch_tokens: int = 8192,
  ) -> list[float]:
    """Return the reward of each conversation, which is its logit of `label`.

    Args:
      conversations: lists of messages, each ending with the assistant's.
      label: name or index of the label. It may be None if the model has a single label.
      batch_tokens: maximum number of tokens in a batch, including padding.

    Raises:
      UserError: if a conversation cannot be scored, or the model has no such label.
    """
    column = self.label_index(label)
    return [float(x) for x in self.conversation_logits(conversations, batch_tokens)[:, column]]

  def label_index(self, label: int | str | None) -> int:
    """Return the index of a label.

    Args:
      label: name or index of the label. It may be None if the model has a single label.

    Raises:
      UserError: if the model has no such label, or `label` is None and there are several.
    """
    return find_label(self.labels, label, self.name)

  def tokenize(self, conversations: Sequence[Sequence[Message]]) -> list[list[int]]:
    """Return the tokens of each conversation, up to the token whose logits are used.

    Args:
      conversations: lists of messages, each ending with the assistant's.

    Raises:
      UnreadableError: if a conversation does not end with a reply, does not fit the chat template,
        or is longer than the model's context.
    """
    rows = []
    for index, messages in enumerate(conversations):
      try:
        row = tokens_to_score(self.dialogue, messages, self.pad_token_id)
      except UserError as error:
        raise UnreadableError(f'Conversation {index}: {error}') from error
      if not 0 < len(row) <= self.config.max_positions:
        raise UnreadableError(
          f'Conversation {index} has {len(row)} tokens, but {self.name} reads 1 to '
          f'{self.config.max_positions}. Shorten it or leave it out.'
        )
      rows.append(row)
    return rows

  def _check_rows(self, tokens: np.ndarray, real: np.ndarray) -> None:
    """Check the shapes, the vocabulary, and that real tokens are contiguous."""
    if tokens.ndim != 2 or not tokens.size or tokens.shape != real.shape:
      raise ValueError(
        f'tokens {tokens.shape} and mask {real.shape} must have the same shape [B,T], not empty.'
      )
    if not 0 <= tokens.min() <= tokens.max() < self.config.vocab_size:
      raise UserError(
        f'The tokens are in {tokens.min()}..{tokens.max()}, but the vocabulary is '
        f"0..{self.config.vocab_size - 1}. Use the model's own tokenizer."
      )
    starts = np.diff(real.astype(np.int8), axis=1, prepend=0, append=0) == 1
    runs = starts.sum(axis=1)
    if (wrong := np.flatnonzero(runs != 1)).size:
      raise ValueError(
        f'row {wrong[0]}: the mask has {runs[wrong[0]]} runs of real tokens. Each row needs '
        'exactly one, with padding only before or after it.'
      )


def load(
  path: str | os.PathLike,
  dtype: str = 'float32',
  mesh: Mesh | None = None,
  style: str = 'chat',
  template_options: TemplateOptions = (),
) -> RewardModel:
  """Load a reward model or classifier from a Hugging Face folder or hub name.

  Args:
    path: a sequence-classification checkpoint of a supported family.
    dtype: dtype of parameters and activations: 'float32', 'bfloat16' or 'float16'.
    mesh: the devices that hold the parameters. None means `make_mesh()`.
    style: name of the prompt format of conversations: 'chat' is the tokenizer's chat template,
      'plain' is Human:/Assistant: text.
    template_options: (name, value) pairs for the chat templates of a run. Those that this model's
      template reads are used.

  Raises:
    UserError: if the checkpoint cannot be loaded, or its tokenizer has no chat template.
  """
  classifier = load_classifier(path, dtype, mesh)
  return RewardModel(
    config=classifier.info.config,
    params=classifier.params,
    score=classifier.score,
    labels=classifier.info.labels,
    dialogue=make_dialogue(classifier.info, style, template_options),
    pad_token_id=classifier.info.pad_token_id,
    mesh=classifier.mesh,
    dtype=dtype,
    name=str(path),
  )


def make_dialogue(
  info: ClassifierInfo, style: str = 'chat', template_options: TemplateOptions = ()
) -> Dialogue:
  """Return the dialogue that renders conversations for a reward model or classifier.

  Args:
    info: the checkpoint.
    style: name of the prompt format.
    template_options: (name, value) pairs. The chat template gets those that it reads.

  Raises:
    UserError: if the tokenizer has no chat template that renders conversations.
  """
  options = known_options(info.tokenizer, template_options) if style == 'chat' else ()
  return Dialogue(info.tokenizer, style, info.eos_token_ids, options, has_replies=False)


def tokens_to_score(
  dialogue: Dialogue, messages: Sequence[Message], pad_token_id: int | None
) -> list[int]:
  """Return the tokens of a conversation up to the one whose logits are the scores.

  Padding tokens at the end are left out: transformers takes the logits at the last token that is
  not the padding token.

  Args:
    dialogue: renders conversations for the model.
    messages: the conversation, which ends with a reply.
    pad_token_id: the model's padding token, or None.

  Raises:
    UserError: as `Dialogue.conversation`.
  """
  tokens = dialogue.conversation(messages)
  while tokens and tokens[-1] == pad_token_id:
    tokens.pop()
  return tokens


def find_label(labels: Sequence[str], label: int | str | None, name: str) -> int:
  """Return the index of a label.

  Args:
    labels: names of the labels of a model.
    label: name or index of the label. It may be None if there is a single label.
    name: the model, for the error message.

  Raises:
    UserError: if the model has no such label, or `label` is None and there are several.
  """
  if label is None and len(labels) == 1:
    return 0
  if isinstance(label, str) and labels.count(label) == 1:
    return labels.index(label)
  if isinstance(label, int) and 0 <= label < len(labels):
    return label
  raise UserError(
    f'label={label!r} is not one of the {len(labels)} labels of {name}. Choose one of '
    f'{tuple(labels)} by name, or by its index from 0.'
  )


def append_replies(
  prompts: Sequence[Sequence[Message]], replies: Sequence[str]
) -> list[list[Message]]:
  """Return conversations: the messages of each prompt, followed by its reply.

  Args:
    prompts: the messages of each prompt.
    replies: one text per prompt.
  """
  return [
    [*prompt, {'role': 'assistant', 'content': reply}]
    for prompt, reply in zip(prompts, replies, strict=True)
  ]


def logits_program(platform: str) -> Callable[..., jax.Array]:
  """Return the program that computes the logits of rows, jitted for a platform."""
  return jit_on(platform, _logits_at_last, static_argnames=('graph', 'sharding'))


def _logits_at_last(graph, sharding, params, score, tokens, positions, segment_ids, last):
  """Return the logits f32[B,C] at position `last: i32[B]` of each row."""
  model = nnx.merge(graph, params)
  # The 'blocks' kernel runs on every device and never materializes the T × T attention scores.
  hidden = model(tokens, positions, segment_ids, sharding=sharding, attention='blocks')
  ends = jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0]
  return score_states(ends, score)


def _next_power_of_two(n: int) -> int:
  """Return the smallest power of two that is at least n ≥ 1."""
  return 1 << (n - 1).bit_length()


def _pad_rows(
  rows: Sequence[Sequence[int]], size: int, length: int
) -> tuple[np.ndarray, np.ndarray]:
  """Return tokens i32[size,length] and mask bool[size,length], repeating the last row as needed."""
  tokens, mask = np.zeros((size, length), np.int32), np.zeros((size, length), bool)
  for index in range(size):
    row = rows[min(index, len(rows) - 1)]
    tokens[index, : len(row)], mask[index, : len(row)] = row, True
  return tokens, mask
