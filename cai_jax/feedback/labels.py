"""Decisions of a model between labels, such as 'Yes' and 'No', by their log-probabilities.

A label is read from the first token in which it differs from the other labels. The tokens that the
labels have in common precede that token in the context. The engine samples that token like any
other turn, with a bias that leaves only labels to draw. It reports the model's own
log-probabilities, from before the bias, so decisions are exact, and the journal stores and
replays them.
"""

import math
import os
from collections.abc import Generator, Sequence

from cai_jax.dialogue import ChatDialogue, Message
from cai_jax.feedback.chain import ExtraStage
from cai_jax.feedback.stage import ChainEnded, Reply, Stage
from cai_jax.runtime.errors import UserError
from cai_jax.sampling.types import MAX_BIASES, Completion, LabelTurn, SamplingConfig, Turn

BIAS = 100.0  # nats; what `SamplingConfig.logit_bias` allows, and more than logits differ by

# The stage of a decision by the critic, for `register_variant(stages=...)`. Its bias stands for
# those of the labels, so that a server without biases is refused before the run.
LABEL_STAGE = ExtraStage(
  'critique', {'max_tokens': 1, 'max_thought_tokens': 0, 'logit_bias': ((0, BIAS),)}, chooses=True
)


def label_log_probabilities(
  stage: Stage, turn_name: str, messages: Sequence[Message], role: str, labels: Sequence[str]
) -> Generator[Turn, Completion, list[float]]:
  """Return log P(label | messages) of each label's own token, in nats. Takes one turn per label.

  Args:
    stage: the model that is asked.
    turn_name: the turns are called `label_turns(turn_name, len(labels))`.
    messages: the conversation so far. The content of a message is a text or a `Reply`.
    role: the role of the reply that a label begins.
    labels: two or more different texts.

  Raises:
    ChainEnded: if an earlier reply makes the turns impossible.
    UserError: if labels cannot be told apart, or a server gives no log-probabilities.
  """
  context, tokens = _find_tokens(stage, turn_name, messages, role, labels)
  return (yield from read_labels(stage, turn_name, context, tokens, _is_sampled(messages)))


def read_labels(
  stage: Stage, turn_name: str, context: Sequence[int], tokens: Sequence[int], is_sampled: bool
) -> Generator[Turn, Completion, list[float]]:
  """Return log P(token | context) of the token of each label, in nats. Takes one turn per label.

  Args:
    stage: the model that is asked.
    turn_name: the turns are called `label_turns(turn_name, len(tokens))`.
    context: token ids up to the label.
    tokens: different token ids, one for each label, as `split_labels` returns them.
    is_sampled: whether the context has text of a model. If so, a context that the model cannot read
      ends the chain, and not the run.

  Raises:
    ChainEnded: if an earlier reply makes the turns impossible.
    UserError: if a server gives no log-probabilities.
  """
  numbers = []
  for name, token in zip(label_turns(turn_name, len(tokens)), tokens, strict=True):
    sampling = _sampling(0.0, (token,))
    turn = LabelTurn(name, list(context), sampling, stage.model, labels=(token,))
    completion = yield from _ask(turn, is_sampled)
    numbers.append(completion.logprobs[0])
  if not all(map(math.isfinite, numbers)):
    raise UserError(
      f'turn {turn_name!r}: a server gives no log-probabilities, which this decision needs. Use a '
      'server with log-probabilities or a model in memory.'
    )
  return numbers


def split_labels(
  turn_name: str, replies: Sequence[Sequence[int]], labels: Sequence[str]
) -> tuple[list[int], tuple[int, ...]]:
  """Return the tokens that some replies have in common, and the token in which each differs.

  Args:
    turn_name: the name of the decision, for the error message.
    replies: token ids of the reply that begins with each label.
    labels: the labels.

  Raises:
    UserError: if one token is not enough to distinguish the labels.
  """
  shared = os.path.commonprefix([list(reply) for reply in replies])  # works for any sequences
  tokens = tuple(reply[len(shared)] for reply in replies if len(reply) > len(shared))
  if len(labels) < 2 or len({*tokens}) < len(labels):
    raise UserError(
      f'turn {turn_name!r}: the labels {tuple(labels)!r} do not differ in one token of the '
      "model's tokenizer. Use two or more labels that begin differently."
    )
  return list(shared), tokens


def label_turns(turn_name: str, count: int) -> list[str]:
  """Return the names of the turns that `label_log_probabilities` takes.

  Args:
    turn_name: the name of the decision.
    count: number of labels.
  """
  return [f'{turn_name}_{number}' for number in range(1, count + 1)]


def choose_label(
  stage: Stage, turn_name: str, messages: Sequence[Message], role: str, labels: Sequence[str]
) -> Generator[Turn, Completion, tuple[int, float]]:
  """Draw one of the labels with the model's probabilities, at the temperature of the stage.

  Args:
    stage: the model that is asked, and the temperature. 0 takes the most likely label.
    turn_name: the name of the turn.
    messages: the conversation so far. The content of a message is a text or a `Reply`.
    role: the role of the reply that a label begins.
    labels: at most `MAX_BIASES` different texts.

  Returns:
    The index of the label, and the log-probability of its token in nats among all tokens; NaN if a
    server does not tell.

  Raises:
    ChainEnded: if an earlier reply makes the turn impossible.
    UserError: if labels cannot be told apart, there are too many, or a server ignores biases.
  """
  if len(labels) > MAX_BIASES:
    raise UserError(
      f'turn {turn_name!r}: a model can choose among {MAX_BIASES} labels at most, but there are '
      f'{len(labels)}. Offer fewer.'
    )
  context, tokens = _find_tokens(stage, turn_name, messages, role, labels)
  sampling = _sampling(stage.sampling.temperature, tokens)
  turn = LabelTurn(turn_name, context, sampling, stage.model, labels=tokens)
  completion = yield from _ask(turn, _is_sampled(messages))
  return tokens.index(completion.tokens[0]), completion.logprobs[0]


def probe_labels(stage: Stage, turn_name: str, messages: Sequence[Message]) -> LabelTurn:
  """Return a turn that chooses between 'Yes' and 'No', to test whether a server can.

  Args:
    stage: the model that is asked, and the temperature.
    turn_name: the name of the turn.
    messages: the conversation, of texts.

  Raises:
    UserError: if the tokenizer cannot tell the labels apart, or the server is chat-only.
  """
  context, tokens = _find_tokens(stage, turn_name, messages, 'critique', ('Yes', 'No'))
  sampling = _sampling(stage.sampling.temperature, tokens)
  return LabelTurn(turn_name, context, sampling, stage.model, labels=tokens)


def _is_sampled(messages: Sequence[Message]) -> bool:
  """Return whether a model wrote one of the messages."""
  return any(isinstance(message['content'], Reply) for message in messages)


def _ask(turn: LabelTurn, is_sampled: bool) -> Generator[Turn, Completion, Completion]:
  """Yield a turn, and check that a label replies."""
  try:
    completion = yield turn
  except UserError as error:  # the engine refuses the turn
    if is_sampled:
      raise ChainEnded(turn.name, str(error)) from error
    raise
  if completion.finish_reason == 'content_filter':
    raise ChainEnded(turn.name, 'The server withheld the reply (content_filter).')
  if completion.tokens[:1] not in [[token] for token in turn.labels]:
    raise UserError(
      f'turn {turn.name!r}: the reply {completion.text!r:.80} is none of the labels, so the server '
      'ignores logit_bias. Use a server that applies it or a model in memory.'
    )
  return completion


def _find_tokens(
  stage: Stage, turn_name: str, messages: Sequence[Message], role: str, labels: Sequence[str]
) -> tuple[list[int], tuple[int, ...]]:
  """Return the context up to the label, and the token that stands for each label."""
  if isinstance(stage.dialogue, ChatDialogue):
    raise UserError(
      f'turn {turn_name!r}: a chat-only server returns no token ids, so its model cannot choose '
      'between labels. Serve it with completions, or use a variant without labels.'
    )
  replies = [stage.dialogue.reply(label, role) for label in labels]
  shared, tokens = split_labels(turn_name, replies, labels)
  try:
    context = stage.render(messages, role)
  except UserError as error:
    if _is_sampled(messages):
      raise ChainEnded(turn_name, str(error)) from error
    raise
  return [*context, *shared], tokens


def _sampling(temperature: float, tokens: Sequence[int]) -> SamplingConfig:
  """Return settings that draw one of some tokens."""
  biases = tuple((token, BIAS) for token in tokens)
  return SamplingConfig(temperature=temperature, max_tokens=1, logit_bias=biases)
