"""The critique–revision chain of Constitutional AI (Bai et al. 2022, section 3.1), turn by turn.

A chain is a generator: it yields the turn it wants sampled, is sent the completion, and returns its
`Record`. Another way to revise is another generator of a few lines.
"""

import dataclasses
from collections.abc import Callable, Generator, Sequence

from cai_jax.constitution import Principle
from cai_jax.data.prompts import Prompt
from cai_jax.dialogue import Dialogue, Message
from cai_jax.sampling.types import Chain, Completion, SamplingConfig, Turn


@dataclasses.dataclass(frozen=True)
class Stage:
  """Who samples one kind of turn, and how."""

  model: str  # the engine's name of the model
  dialogue: Dialogue  # renders for that model
  sampling: SamplingConfig
  demonstrations: tuple[tuple[Message, ...], ...] = ()

  def ask(
    self, name: str, messages: Sequence[Message], role: str
  ) -> Generator[Turn, Completion, 'Reply']:
    """Samples the reply of `role` to messages as the turn `name`."""
    rendered = [message | {'content': self._content(message['content'])} for message in messages]
    context = self.dialogue.prompt(rendered, role, self.demonstrations)
    completion = yield Turn(name, context, self.sampling, self.model)
    if completion.finish_reason == 'stop_text':
      return Reply(self.model, completion, completion.text.strip())
    return Reply(self.model, completion, self.dialogue.decode(completion.tokens))

  def _content(self, content: 'str | Reply') -> str | list[int]:
    """Text, or a reply's tokens where this stage's model sampled it: the live cache holds them."""
    if isinstance(content, str):
      return content
    # A stop text lies somewhere in the tokens, so what came before it is encoded anew.
    if content.model == self.model and content.completion.finish_reason != 'stop_text':
      return content.completion.tokens
    return content.text


@dataclasses.dataclass(frozen=True)
class Reply:
  """A sampled reply and the model that gave it."""

  model: str
  completion: Completion
  text: str  # as `Dialogue.decode` gives it: no reasoning, no surrounding white space


@dataclasses.dataclass(frozen=True)
class Stages:
  """The three kinds of turn of a chain."""

  initial: Stage
  critique: Stage
  revision: Stage


@dataclasses.dataclass(frozen=True)
class Round:
  """One revision: under which principle, after which critique (None if there was none)."""

  principle: Principle
  critique: Reply | None
  revision: Reply


@dataclasses.dataclass(frozen=True)
class Record:
  """What a chain gives: y_init and every round."""

  prompt: Prompt
  initial: Reply
  rounds: tuple[Round, ...]


def critique_revision(
  prompt: Prompt, principles: Sequence[Principle], stages: Stages, growing: bool = False
) -> Chain:
  """y_init, then for each principle a critique of the latest response and its revision.

  Args:
    prompt: x.
    principles: one a round.
    stages: models, rendering and sampling settings.
    growing: keep every earlier round in the context. Otherwise a round sees the prompt and the
      latest response alone, as if that had been the answer from the start.
  """
  response = initial = yield from stages.initial.ask('initial', prompt.messages, 'assistant')
  context = [*prompt.messages, _message('assistant', response)]
  rounds = []
  for number, principle in enumerate(principles, 1):
    context.append(_message('critique_request', principle.critique_request))
    critique = yield from stages.critique.ask(f'critique_{number}', context, 'critique')
    context.append(_message('critique', critique))
    context.append(_message('revision_request', principle.revision_request))
    response = yield from stages.revision.ask(f'revision_{number}', context, 'revision')
    rounds.append(Round(principle, critique, response))
    context = _next_context(prompt, context, response, growing)
  return Record(prompt, initial, tuple(rounds))


def direct_revision(
  prompt: Prompt, principles: Sequence[Principle], stages: Stages, growing: bool = False
) -> Chain:
  """As `critique_revision`, but revised without a critique (Bai et al. 2022, section 3.5)."""
  return (yield from _given_critiques(prompt, principles, None, stages, growing))


def empty_critique(
  prompt: Prompt, principles: Sequence[Principle], stages: Stages, growing: bool = False
) -> Chain:
  """As `critique_revision`, but every critique is empty: does the request alone do the work?"""
  return (yield from _given_critiques(prompt, principles, [''] * len(principles), stages, growing))


def shuffled_critique(
  prompt: Prompt,
  principles: Sequence[Principle],
  stages: Stages,
  growing: bool = False,
  *,
  donor: Prompt,
) -> Chain:
  """As `critique_revision`, but with the critiques of another prompt's chain.

  Does a revision use what its critique says? Round n gets what the donor's chain, under the same
  principles, said in its round n. That chain is sampled here too: 2 + 3 n turns in all.
  """
  other = yield from _renamed('donor', critique_revision(donor, principles, stages, growing))
  critiques = [step.critique.text for step in other.rounds]
  return (yield from _given_critiques(prompt, principles, critiques, stages, growing))


def _given_critiques(
  prompt: Prompt,
  principles: Sequence[Principle],
  critiques: Sequence[str] | None,
  stages: Stages,
  growing: bool,
) -> Chain:
  """The chain whose critiques are given, one a round; none of them stands in the record.

  Without any, none is asked for.
  """
  response = initial = yield from stages.initial.ask('initial', prompt.messages, 'assistant')
  context = [*prompt.messages, _message('assistant', response)]
  rounds = []
  for number, principle in enumerate(principles, 1):
    if critiques is not None:
      context.append(_message('critique_request', principle.critique_request))
      context.append(_message('critique', critiques[number - 1]))
    context.append(_message('revision_request', principle.revision_request))
    response = yield from stages.revision.ask(f'revision_{number}', context, 'revision')
    rounds.append(Round(principle, None, response))
    context = _next_context(prompt, context, response, growing)
  return Record(prompt, initial, tuple(rounds))


def _renamed(prefix: str, chain: Chain) -> Chain:
  """The chain with other names for its turns, and so with randomness of its own."""
  completion = None
  while True:
    try:
      turn = chain.send(completion)
    except StopIteration as done:
      return done.value
    completion = yield dataclasses.replace(turn, name=f'{prefix}_{turn.name}')


VARIANTS: dict[str, Callable[..., Chain]] = {
  'critique': critique_revision,
  'direct': direct_revision,
  'empty': empty_critique,
  'shuffled': shuffled_critique,
}


def _message(role: str, content: str | Reply) -> dict:
  return {'role': role, 'content': content}


def _next_context(prompt: Prompt, context: list, response: Reply, growing: bool) -> list:
  """What the next round sees: all so far, or the prompt answered by the latest response."""
  if growing:
    return [*context, _message('revision', response)]
  return [*prompt.messages, _message('assistant', response)]
