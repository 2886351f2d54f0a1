"""Few-shot demonstrations: questions about two responses, with their answers.

A file is in one of these forms:

- JSON Lines of `{"prompt": ..., "chosen": ..., "rejected": ...}`, where the prompt is a text or a
  list of messages. A line may also have `thoughts`, the chain of thought before the answer, and
  `principle`, the instruction of this question;
- a JSON list of `{"prompt": ..., "corrects": [text], "incorrects": [text]}` with transcripts as
  prompts, the form of `prompts/RLMadisonFewShotPrompts.json` of Bai et al. 2022 (repository
  anthropics/ConstitutionalHarmlessnessPaper, commit e65282b);
- a JSON list of `{"prompt": text}`, where the text has a question, a chain of thought and an
  answer, the form of `prompts/RLMadisonPrecogFewShotPrompts.json` of the same repository.

A question without a principle of its own has that of the pair for which it is shown. Where a form
does not say which option is the better response, it is (A) and (B) in turn, so that the
demonstrations favour neither.
"""

import dataclasses
import os
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from cai_jax.data.dialogues import check_prompt, parse_messages
from cai_jax.dialogue import Message
from cai_jax.runtime.errors import UserError, show
from cai_jax.runtime.text_files import check_characters, parse_json, read_text
from cai_jax.scoring.judge_questions import build_question

MAX_SIZE = 2**20  # characters
FORM = (
  'Write one JSON object per line, {"prompt": ..., "chosen": ..., "rejected": ...}, with '
  '"thoughts" if the feedback model thinks first. docs/preferences.md has the other forms.'
)
# What separates the parts of a published text: dialogue, options, thoughts and answer.
_PRINCIPLE, _SECOND, _END = '\n\n{}\n (A) [[[', ']]]\n (B) [[[', ']]]'
_THINK, _ANSWER = "\n\nAssistant: Let's think step by step:", '\n\nHuman:'
_LABEL = re.compile(r'\s*So the answer is: \(([AB])\)\s*')
_SPEAKER = re.compile(r'\n\n([HA]):\s*')


@dataclasses.dataclass(frozen=True)
class Demonstration:
  """A question about two responses, and its answer.

  Attributes:
    messages: the conversation, which ends with the user's turn.
    options: the responses shown as (A) and as (B).
    answer: the label of the better one, 'A' or 'B'.
    thoughts: the chain of thought before the answer; '' without.
    principle: the instruction; '' takes that of the pair for which the question is shown.

  Raises:
    UserError: if a text is blank, or the conversation is not one.
  """

  messages: tuple[Message, ...]
  options: tuple[str, str]
  answer: str
  thoughts: str = ''
  principle: str = ''

  def __post_init__(self) -> None:
    check_prompt(self.messages)
    build_question(self.messages, self.principle or 'x', *self.options)
    for name, text in (('thoughts', self.thoughts), ('principle', self.principle)):
      if not isinstance(text, str):
        raise UserError(f'{name} must be a text, but got {show(text)}.')
      check_characters(name, text)


def read_demonstrations(path: str | os.PathLike) -> tuple[Demonstration, ...]:
  """Read demonstrations in one of the forms of this module.

  Args:
    path: the file.

  Raises:
    UserError: if the file cannot be read or has another form. The message names the entry.
  """
  text = read_text(path, MAX_SIZE)
  entries = _parse_entries(str(path), text)
  if not entries:
    raise UserError(f'{path} has no demonstration. {FORM}')
  demonstrations = []
  for number, entry in enumerate(entries, 1):
    try:
      demonstrations.append(_parse(entry, number))
    except UserError as error:
      raise UserError(f'{path}, demonstration {number}: {error} {FORM}') from error
  return tuple(demonstrations)


def _parse_entries(path: str, text: str) -> list[Any]:
  """Return the elements of a JSON list, or the values of the lines of JSON Lines."""
  try:
    if text.lstrip().startswith('['):
      return parse_json(text)
    return [parse_json(line) for line in text.splitlines() if line.strip()]
  except (ValueError, RecursionError) as error:
    raise UserError(f'{path} is neither a JSON list nor JSON Lines ({error}). {FORM}') from error


def _parse(entry: Any, number: int) -> Demonstration:
  """Return the demonstration of an entry of any form."""
  if not isinstance(entry, Mapping):
    raise UserError(f'it must be an object, but got {show(entry)}.')
  parse: Callable[[Mapping[str, Any], int], Demonstration]
  parse = _parse_published if 'corrects' in entry else _parse_row
  if set(entry) == {'prompt'}:
    return _parse_thinking(_text('prompt', entry['prompt']))
  try:
    return parse(entry, number)
  except KeyError as error:
    raise UserError(f'it has no {error.args[0]!r}; it has {show(list(entry), 200)}.') from error


def _parse_row(row: Mapping[str, Any], number: int) -> Demonstration:
  """Return the demonstration of a line in our form."""
  messages = tuple(parse_messages(row['prompt']))
  texts = [_text(name, row[name]) for name in ('chosen', 'rejected')]
  return _in_turn(messages, texts, number, row.get('thoughts', ''), row.get('principle', ''))


def _parse_published(entry: Mapping[str, Any], number: int) -> Demonstration:
  """Return the demonstration of an entry with `corrects` and `incorrects`."""
  prompt = _text('prompt', entry['prompt']).strip().removesuffix('Assistant:')
  messages = tuple(parse_messages(prompt.rstrip(), is_transcript=True))
  texts = []
  for name in ('corrects', 'incorrects'):
    if not isinstance(entry[name], list) or len(entry[name]) != 1:
      raise UserError(f'{name!r} must be a list of one text, but got {show(entry[name])}.')
    texts.append(_text(name, entry[name][0]))
  return _in_turn(messages, texts, number)


def _parse_thinking(text: str) -> Demonstration:
  """Return the demonstration of a published text with a chain of thought."""
  question, _, rest = text.partition(_THINK)
  thoughts, _, end = rest.rpartition(_ANSWER)
  dialogue, _, options = question.partition(_PRINCIPLE)
  first, _, second = options.partition(_SECOND)
  heading, *parts = _SPEAKER.split(dialogue)
  label = _LABEL.fullmatch(end)
  if not (label and parts and second.endswith(_END) and heading.strip().startswith('Human:')):
    raise UserError(
      'a text must have a conversation (H: ... A: ...), {}, options (A) [[[...]]] and (B) '
      f"[[[...]]], 'Let's think step by step:' and 'So the answer is:', but got {show(text, 200)}."
    )
  roles = {'H': 'user', 'A': 'assistant'}
  messages = tuple(
    {'role': roles[speaker], 'content': content.strip()}
    for speaker, content in zip(parts[::2], parts[1::2], strict=True)
  )
  texts = first.strip(), second.removesuffix(_END).strip()
  return Demonstration(messages, texts, label[1], thoughts.strip())


def _in_turn(
  messages: tuple[Message, ...], texts: Sequence[str], number: int, *others: str
) -> Demonstration:
  """Return a demonstration whose better response is (A) if its number is odd, else (B).

  Args:
    messages: the conversation.
    texts: the better and the worse response.
    number: the number of the demonstration in its file, from 1.
    others: the thoughts and the principle.
  """
  better, worse = texts
  if number % 2:
    return Demonstration(messages, (better, worse), 'A', *others)
  return Demonstration(messages, (worse, better), 'B', *others)


def _text(name: str, value: Any) -> str:
  """Return a text without surrounding white space."""
  if not isinstance(value, str) or not value.strip():
    raise UserError(f'{name} must be non-blank text, but got {show(value)}.')
  check_characters(name, value)
  return value.strip()
