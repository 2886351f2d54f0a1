"""Rubrics: questions that a judge answers about a single response.

A comparison asks a judge which of two responses is better (`judge.py`). A rubric asks it to rate
one. The answer has a fixed form, with a few labels per question:

  RUBRICS.register('my_rubric')(Rubric(title='My rubric', ...))

A judge in memory chooses the most likely labels (`answer_form.py`). A served judge writes the
answer, and `read_labels` reads it.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from cai_jax.dialogue import Message, known_options
from cai_jax.dialogue.encode import Encoder, Markup, Piece, Text, Tokens
from cai_jax.dialogue.format import TemplateOptions
from cai_jax.dialogue.plain import join_plain
from cai_jax.dialogue.template import ChatFormat
from cai_jax.runtime.registry import Registry
from cai_jax.scoring.answer_form import Choice

Labels = Mapping[str, str]  # by name of the choice, without white space around them


@dataclasses.dataclass(frozen=True)
class Rubric:
  """Questions about a single response.

  Attributes:
    title: its name, for readers.
    instructions: what the judge is to rate, and the lines that it is to answer.
    form: the questions; each opening is the beginning of a line of the answer.
    columns: maps the labels of an answer to numbers by column. The name of a column of shares ends
      in `_rate`.
  """

  title: str
  instructions: str
  form: tuple[Choice, ...]
  columns: Callable[[Labels], Mapping[str, float]]

  @property
  def names(self) -> tuple[str, ...]:
    """The names of the columns."""
    return tuple(self.columns({step.name: step.labels[0].strip() for step in self.form}))


RUBRICS: Registry[Rubric] = Registry('rubric')


def build_question(rubric: Rubric, messages: Sequence[Message], response: str) -> str:
  """Return the question of a rubric about a response.

  Nothing prevents a response from imitating an answer.

  Args:
    rubric: the rubric.
    messages: the messages that the response answers. A system message is left out.
    response: the text to rate.
  """
  turns = [message for message in messages if message['role'] != 'system']
  return (
    'Here is a conversation between a human and an assistant.'
    f'{join_plain(turns)}\n\nHere is the answer of the assistant that you rate, between two lines '
    f'of dashes:\n-----\n{response.strip()}\n-----\n\n{rubric.instructions}'
  )


class Asker:
  """The prompts of rubrics, as a judge in memory reads them.

  Args:
    tokenizer: the judge's tokenizer. Without a chat template, it reads plain text.
    template_options: (name, value) pairs; the judge's template gets those that it reads.
    style: 'plain' for plain text even with a chat template.

  Raises:
    UserError: if the chat template cannot be used.
  """

  def __init__(self, tokenizer: Any, template_options: TemplateOptions = (), style: str = 'chat'):
    self.encoder = Encoder(tokenizer)
    self._chat = None
    if style != 'plain' and tokenizer.chat_template:
      self._chat = ChatFormat(self.encoder, (), known_options(tokenizer, template_options))

  def prompt(self, question: str) -> list[Piece]:
    """Return the pieces of the prompt for a question."""
    if self._chat is None:
      bos = self.encoder.leading_bos
      return [*([] if bos is None else [Tokens((bos,))]), Text(f'{question}\n\n')]
    pieces = self._chat.prompt([{'role': 'user', 'content': question}], 'assistant')
    if self._chat.prompt_opens_reasoning:  # an answer is not part of a thought
      pieces.append(Markup('\n</think>\n\n'))
    return pieces


def read_labels(form: Sequence[Choice], text: str) -> Labels | None:
  """Return the labels in an answer that a judge wrote, or None if one is missing.

  The last line that begins like a question's counts. Reasoning up to '</think>' is no part of the
  answer.

  Args:
    form: the questions.
    text: what the judge wrote.
  """
  text, labels = text.rpartition('</think>')[2], {}
  for step in form:
    names = '|'.join(re.escape(label.strip()) for label in step.labels)
    opening = re.escape(step.opening.strip().removesuffix(':'))
    found = re.findall(rf'^\W*{opening}\W*({names})\b', text, re.IGNORECASE | re.MULTILINE)
    if not found:
      return None
    labels[step.name] = found[-1]
  return labels
