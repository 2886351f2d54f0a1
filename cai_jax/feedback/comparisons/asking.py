"""How a language model is asked which of two responses is better (Bai et al. 2022, section 4.1).

The question is that of a judge: the conversation, a principle, and the responses as options (A) and
(B). The answer begins with 'The answer is:'. With a chain of thought, the model first continues
"Let's think step by step:", and the answer follows in the same reply. The published demonstrations
put it into a further turn of the human ('So the answer is:'); chat templates have no such turn.
"""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any

from cai_jax.constitution import Principle
from cai_jax.dialogue import ChatDialogue, Dialogue, Message
from cai_jax.feedback.comparisons.demonstrations import Demonstration
from cai_jax.feedback.labels import read_labels, split_labels
from cai_jax.feedback.stage import ChainEnded, Stage
from cai_jax.runtime.errors import UserError
from cai_jax.runtime.registry import Registry
from cai_jax.sampling.types import Completion, Turn
from cai_jax.scoring.judge_answers import sampled_log_odds
from cai_jax.scoring.judge_local import close_thought
from cai_jax.scoring.judge_questions import OPENING, OPTIONS, REASON_FIRST, build_question
from cai_jax.scoring.judge_server import ANSWER_ONLY, VERDICT_TOKENS

THINK = "Let's think step by step:"
LABELS = tuple(f'{OPENING}{option}' for option in OPTIONS)


@dataclasses.dataclass(frozen=True)
class Answer:
  """The answer to one question.

  Attributes:
    probability: that option (A) is better, normalised over the two labels.
    mass: probability of the tokens of both labels together, given all before them; None if it is
      not known.
    text: the chain of thought, or the text in which the label was read; '' without.
    is_cut: whether that text ended at its length limit.
    is_read: whether the answer has a label. A text without one has the probability 0.5.
  """

  probability: float
  mass: float | None = None
  text: str = ''
  is_cut: bool = False
  is_read: bool = True


Answering = Generator[Turn, Completion, Answer]


@dataclasses.dataclass(frozen=True)
class FeedbackModel:
  """A language model that compares responses.

  Attributes:
    stage: the model, what renders its questions, and how its thoughts and answers are sampled.
    verdict: a name in `VERDICTS`.
    thoughts: most tokens of a chain of thought; 0 asks for the answer at once.
    demonstrations: few-shot questions and answers that precede each question.
  """

  stage: Stage
  verdict: str = 'logprobs'
  thoughts: int = 0
  demonstrations: tuple[Demonstration, ...] = ()

  def ask(
    self,
    name: str,
    messages: Sequence[Message],
    principle: Principle,
    options: tuple[str, str],
    is_sampled: bool,
  ) -> Answering:
    """Ask which of two responses is better.

    Args:
      name: name of the turns, unique within the chain.
      messages: the conversation, which ends with the user's turn.
      principle: the principle to compare by.
      options: the responses shown as (A) and as (B).
      is_sampled: whether a model wrote one of them. If so, a question that the feedback model
        cannot read ends the chain, and not the run.

    Raises:
      ChainEnded: if a sampled text makes the question impossible.
      UserError: if it is impossible whatever was sampled, or a server gives no log-probabilities.
    """
    verdict = VERDICTS[self.verdict]
    request = verdict.request(self.thoughts)
    dialogues = tuple(self._demonstrate(d, principle, request) for d in self.demonstrations)
    stage = dataclasses.replace(self.stage, demonstrations=dialogues)
    with _ending_chain(name, is_sampled):
      question = build_question(messages, principle.comparison, *options)
    asked = [{'role': 'user', 'content': question + request}]
    return (yield from verdict.answer(stage, name, asked, self.thoughts, is_sampled))

  def _demonstrate(
    self, demonstration: Demonstration, principle: Principle, request: str
  ) -> tuple[Message, ...]:
    """Return a demonstration as a question of the user and an answer of the assistant."""
    instruction = demonstration.principle or principle.comparison
    question = build_question(demonstration.messages, instruction, *demonstration.options)
    answer = LABELS['AB'.index(demonstration.answer)]
    if self.thoughts:
      answer = f'{THINK} {demonstration.thoughts}\n\n{answer}'
    return (
      {'role': 'user', 'content': question + request},
      {'role': 'assistant', 'content': answer},
    )


@dataclasses.dataclass(frozen=True)
class Verdict:
  """A way to read an answer.

  Attributes:
    answer: a generator function that asks and returns the answer, called as
      `answer(stage, name, messages, thoughts, is_sampled)`.
    request: maps the limit of thoughts to what is asked after the question; '' for nothing.
    tokens: tokens of an answer that is sampled, without its thoughts; 0 if it is not.
    check: raises UserError if a stage cannot be asked like this.
  """

  answer: Callable[[Stage, str, list[Message], int, bool], Answering]
  request: Callable[[int], str] = lambda thoughts: ''
  tokens: int = 0
  check: Callable[[Stage], None] = lambda stage: None


VERDICTS: Registry[Verdict] = Registry('verdict of a feedback model')


@contextlib.contextmanager
def _ending_chain(name: str, is_sampled: bool) -> Iterator[None]:
  """End the chain, and not the run, if a text that a model wrote cannot be read.

  Args:
    name: name of the turn.
    is_sampled: whether a model wrote one of the texts of the block.
  """
  try:
    yield
  except UserError as error:
    if is_sampled:
      raise ChainEnded(name, str(error)) from error
    raise


def _answer(logprobs: Sequence[float], text: str = '', is_cut: bool = False) -> Answer:
  """Return the answer of a model: P(A) / (P(A) + P(B)).

  Args:
    logprobs: log P(A) and log P(B) in nats.
    text: the chain of thought.
    is_cut: whether it ended at its length limit.
  """
  a, b = logprobs
  mass = min(1.0, math.exp(a) + math.exp(b))
  return Answer(0.5 + 0.5 * math.tanh((a - b) / 2), mass, text, is_cut)


def _answer_by_log_probabilities(
  stage: Stage, name: str, messages: list[Message], thoughts: int, is_sampled: bool
) -> Answering:
  """Read the log-probabilities of the two labels, after a chain of thought if there is one."""
  if not thoughts:
    with _ending_chain(name, is_sampled):
      context = stage.render(messages, 'assistant')
    replies = [stage.dialogue.reply(label) for label in LABELS]
    shared, tokens = split_labels(name, replies, LABELS)
    logprobs = yield from read_labels(stage, name, [*context, *shared], tokens, is_sampled)
    return _answer(logprobs)
  context, thought = yield from _think(stage, name, messages, is_sampled)
  dialogue: Any = stage.dialogue
  replies = [dialogue.continue_reply(context, f'\n\n{label}') for label in LABELS]
  shared, tokens = split_labels(name, replies, LABELS)
  logprobs = yield from read_labels(stage, name, [*context, *shared], tokens, True)
  return _answer(logprobs, thought.text.strip(), thought.finish_reason == 'length')


def _think(
  stage: Stage, name: str, messages: list[Message], is_sampled: bool
) -> Generator[Turn, Completion, tuple[list[int], Completion]]:
  """Sample a chain of thought; return the context up to its end, and its completion."""
  dialogue = stage.dialogue
  assert isinstance(dialogue, Dialogue), '_check_reads_tokens refuses chat-only models'
  opening = dialogue.reply(THINK)
  opening = opening[:-1] if opening[-1] in dialogue.stop_token_ids else opening
  with _ending_chain(name, is_sampled):
    before = [*stage.render(messages, 'assistant'), *opening]
    thought = yield Turn(f'{name}_thoughts', before, stage.sampling, stage.model)
  if thought.finish_reason == 'content_filter':
    raise ChainEnded(name, 'The server withheld the reply (content_filter).')
  if thought.finish_reason == 'stop_text':  # it ends somewhere inside the tokens
    written = dialogue.continue_reply(before, thought.text)
  else:
    written = thought.tokens[: -1 if thought.finish_reason == 'stop' else None]
  return close_thought(dialogue.tokenizer, [*before, *written]), thought


def _check_reads_tokens(stage: Stage) -> None:
  """Check that the log-probabilities of labels can be read.

  Raises:
    UserError: if the model is behind a chat API, which returns text only.
  """
  if isinstance(stage.dialogue, ChatDialogue):
    raise UserError(
      "label: verdict='logprobs' needs log-probabilities of token ids, which a server with "
      "prompt='chat' does not return. Set label.verdict='text', or serve the model with "
      "prompt='tokens'."
    )


def _answer_by_text(
  stage: Stage, name: str, messages: list[Message], thoughts: int, is_sampled: bool
) -> Answering:
  """Sample an answer and read the label in it."""
  del thoughts
  with _ending_chain(name, is_sampled):
    reply = yield from stage.ask(name, messages, 'assistant')
  odds = sampled_log_odds(reply.text)
  probability = 0.5 if not odds else float(odds > 0)
  is_cut = reply.completion.finish_reason == 'length'
  return Answer(probability, None, reply.text, is_cut, bool(odds))


VERDICTS.register('logprobs')(Verdict(_answer_by_log_probabilities, check=_check_reads_tokens))
VERDICTS.register('text')(
  Verdict(
    _answer_by_text,
    request=lambda thoughts: f'\n\n{REASON_FIRST if thoughts else ANSWER_ONLY}',
    tokens=VERDICT_TOKENS,
  )
)
