"""The stages of a chain, which sample its replies, with or without a budget for thoughts."""

import dataclasses
from collections.abc import Generator, Sequence

from cai_jax.dialogue import ChatDialogue, Dialogue, Message
from cai_jax.dialogue.messages import check_text
from cai_jax.runtime.errors import UserError
from cai_jax.sampling.types import Completion, SamplingConfig, Turn

THOUGHTS = '.thoughts'  # end of the name of a turn that samples thoughts only


class ChainEnded(Exception):
  """The end of a chain that a sampled reply has made impossible. Its prompt gets no row of D_CAI.

  Args:
    turn: the turn that ended the chain.
    reason: why, in words.
  """

  def __init__(self, turn: str, reason: str):
    super().__init__(f'turn {turn!r}: {reason}')
    self.turn, self.reason = turn, reason


@dataclasses.dataclass(frozen=True)
class Reply:
  """A sampled reply.

  Attributes:
    model: the name by which the engine knows the model that sampled the reply.
    completion: the tokens that the model sampled for the reply, and their log-probabilities.
    text: the text of the reply without thoughts and surrounding white space, as `Dialogue.split`
      returns it.
    thoughts: what a reasoning model wrote before it, '' without. No other turn reads them, unless
      the model's chat template keeps the thoughts of earlier replies.
    tokens: token ids of the reply as a later context holds it. They are those of the completion,
      with the marks of thoughts that a budget wrote.
    ids_known: whether `completion` has the ids that the model sampled. A chat-only server returns
      text; its ids here are those of our tokenizer, and it has no log-probabilities.
  """

  model: str
  completion: Completion
  text: str
  thoughts: str
  tokens: Sequence[int]
  ids_known: bool = True


@dataclasses.dataclass(frozen=True)
class Stage:
  """The model and the settings that sample one kind of turn.

  Attributes:
    model: the name by which the engine knows the model.
    dialogue: renders messages for that model.
    sampling: temperature, length limit and so on.
    demonstrations: few-shot dialogues that precede every context.
  """

  model: str
  dialogue: Dialogue | ChatDialogue
  sampling: SamplingConfig
  demonstrations: tuple[tuple[Message, ...], ...] = ()

  def ask(
    self, turn_name: str, messages: Sequence[Message], role: str
  ) -> Generator[Turn, Completion, Reply]:
    """Sample the reply to some messages; call it as `reply = yield from stage.ask(...)`.

    Args:
      turn_name: the name of the turn, unique within its chain. It seeds the sampling. If thoughts
        have a budget, another turn before it samples them, under this name with `THOUGHTS`.
      messages: the conversation so far. The content of a message is a text or a `Reply`.
      role: the role of the reply: 'assistant', 'critique' or 'revision'.

    Yields:
      The turn to sample, or two if thoughts have a budget.

    Returns:
      The reply.

    Raises:
      ChainEnded: if an earlier reply makes this turn impossible, or the reply is no text.
      UserError: if the turn is impossible whatever was sampled.
    """
    written: list[int] = []
    thought: Completion | None = None
    try:
      rendered = self._rendered(messages)
      context = self.dialogue.prompt(rendered, role, self.demonstrations)
      if self.sampling.max_thought_tokens:
        written, thought = yield from self._think(turn_name, context)
      sampling = dataclasses.replace(self.sampling, max_thought_tokens=0)
      sent = self.dialogue.messages(rendered, role, self.demonstrations)
      completion = yield Turn(turn_name, [*context, *written], sampling, self.model, sent)
    except UserError as error:  # of the rendering, or the engine's: the context is too long
      if thought or any(isinstance(message['content'], Reply) for message in messages):
        raise ChainEnded(turn_name, str(error)) from error
      raise
    _check_not_withheld(turn_name, completion)
    tokens = [*written, *completion.tokens]
    if thought:
      completion = dataclasses.replace(
        completion,
        tokens=[*thought.tokens, *completion.tokens],
        logprobs=[*thought.logprobs, *completion.logprobs],
      )
    if isinstance(self.dialogue, ChatDialogue):
      thoughts, text = '', completion.text.strip()
    else:
      thoughts, text = self.dialogue.split(tokens)
    if completion.finish_reason == 'stop_text':  # it ends somewhere inside the tokens
      ends = [text.find(stop) for stop in self.sampling.stop if stop in text]
      text = text[: min(ends, default=len(text))].strip() if thoughts else completion.text.strip()
    try:
      check_text(text)
    except UserError as error:
      raise ChainEnded(turn_name, str(error)) from error
    known = not self.dialogue.reads_text
    return Reply(self.model, completion, text, thoughts, tokens, known)

  def render(self, messages: Sequence[Message], role: str) -> list[int]:
    """Return the tokens of a conversation, up to the reply.

    Args:
      messages: the conversation. The content of a message is a text or a `Reply`.
      role: the role of the reply: 'assistant', 'critique' or 'revision'.

    Raises:
      UserError: if the messages cannot be rendered.
    """
    return self.dialogue.prompt(self._rendered(messages), role, self.demonstrations)

  def _think(
    self, turn_name: str, context: Sequence[int]
  ) -> Generator[Turn, Completion, tuple[list[int], Completion]]:
    """Sample thoughts of at most `max_thought_tokens` tokens.

    Thoughts that the model does not close are closed, as in budget forcing (Muennighoff et al.
    2025, section 3.1). This holds at the end of the budget, and if the model ends its turn inside
    its thoughts; the token that ends the turn is then left out.

    Args:
      turn_name: the name of the turn that samples the answer.
      context: the tokens before the reply.

    Returns:
      The tokens between the context and the answer; and the completion with those of them that
      were sampled, which are all but the marks.
    """
    assert isinstance(self.dialogue, Dialogue), 'a chat-only model has no thoughts here'
    name, opening = turn_name + THOUGHTS, self.dialogue.open_thoughts()
    sampling = thought_sampling(self.sampling, self.dialogue)
    thought = yield Turn(name, [*context, *opening], sampling, self.model)
    _check_not_withheld(name, thought)
    tokens, logprobs, end = thought.tokens, thought.logprobs, self.dialogue.end_of_thought
    if thought.finish_reason == 'stop' and tokens[-1:] != [end]:
      tokens, logprobs = tokens[:-1], logprobs[:-1]
    closing = [] if tokens[-1:] == [end] else self.dialogue.close_thoughts(tokens)
    kept = dataclasses.replace(thought, tokens=tokens, logprobs=logprobs)
    return [*opening, *tokens, *closing], kept

  def _rendered(self, messages: Sequence[Message]) -> list[Message]:
    """Return messages whose contents are texts or token ids."""
    return [message | {'content': self._content(message['content'])} for message in messages]

  def _content(self, content: str | Reply) -> str | list[int]:
    """Return a text, or the tokens of a reply that this stage's own model sampled.

    The live cache already holds these tokens, so the next context extends it.
    """
    if isinstance(content, str):
      return content
    if self.dialogue.reads_text:
      if not content.text:
        raise UserError('An earlier reply is empty, and chat APIs refuse empty messages.')
      return content.text
    # A stop text ends somewhere inside the tokens, so the text before it is encoded again.
    if content.model == self.model and content.completion.finish_reason != 'stop_text':
      return list(content.tokens)
    return content.text


def thought_sampling(sampling: SamplingConfig, dialogue: Dialogue) -> SamplingConfig:
  """Return the settings of a turn that samples thoughts only.

  They end with `</think>`. The stop texts and stop tokens of the config end answers, not thoughts.

  Args:
    sampling: the settings of the stage, with a budget for thoughts.
    dialogue: renders messages for the stage's model, and `thinks`.
  """
  return dataclasses.replace(
    sampling,
    max_tokens=sampling.max_thought_tokens,
    max_thought_tokens=0,
    stop=(),
    stop_token_ids=(dialogue.end_of_thought,),
  )


def check_thinks(
  dialogue: Dialogue | ChatDialogue, sampling: SamplingConfig, place: str, name: str
) -> None:
  """Check that a model can think if its thoughts have a budget.

  Args:
    dialogue: renders messages for the model.
    sampling: the settings.
    place: what the settings belong to, for the message.
    name: name of the model.

  Raises:
    UserError: if it cannot.
  """
  if sampling.max_thought_tokens and not dialogue.thinks:
    raise UserError(
      f'{place}: max_thought_tokens={sampling.max_thought_tokens} limits thoughts, but {name} '
      f'writes none with style={dialogue.style!r}: its tokenizer has no <think> and </think>, or '
      'its prompt ends the thoughts at once. Set it to 0, or use a reasoning model and template '
      'options that let it think.'
    )


def _check_not_withheld(turn_name: str, completion: Completion) -> None:
  """Raise ChainEnded if a server withheld a reply."""
  if completion.finish_reason == 'content_filter':
    raise ChainEnded(turn_name, 'The server withheld the reply (content_filter).')
