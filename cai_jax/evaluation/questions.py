"""Multiple-choice questions and their file format.

The format is that of the evaluations published with Bai et al. 2022 (HHH, harmful versus ethical):
one JSON object per line, `{"prompt": text, "corrects": [text, ...], "incorrects": [text, ...]}`.
The options are possible continuations of the prompt, such as " (A)".
"""

import dataclasses
import os
import re

from cai_jax.runtime.errors import UserError, show
from cai_jax.runtime.text_files import check_characters, parse_json, read_lines

LABELS = (' (A)', ' (B)')
FORM = '{"prompt": "...", "corrects": [" (A)"], "incorrects": [" (B)"]}'
# Text before the options, text of (A), text of (B), closing line. Texts may span several lines.
_TWO_OPTIONS = re.compile(
  r'(.*?^) \(A\) (.*?)\n \(B\) (.*[^\n])(\n+[^\n]*:)', re.DOTALL | re.MULTILINE
)
_OPTION_LABEL = re.compile(r'^ \(([A-Z])\) ', re.MULTILINE)


@dataclasses.dataclass(frozen=True)
class Question:
  """A multiple-choice question.

  Attributes:
    line: line number in its file, from 1. It identifies the question.
    prompt: the text before the answer.
    corrects: right options, at least one.
    incorrects: wrong options, at least one.
  """

  line: int
  prompt: str
  corrects: tuple[str, ...]
  incorrects: tuple[str, ...]

  @property
  def options(self) -> tuple[str, ...]:
    """All options. Wrong ones come first, so that a tie counts as a wrong answer."""
    return (*self.incorrects, *self.corrects)


def read_questions(path: str | os.PathLike) -> list[Question]:
  """Read the questions of a file. Empty lines are skipped.

  Args:
    path: a file with one JSON object per line, possibly compressed with gzip.

  Raises:
    UserError: if the file cannot be read, has no question, or has a line of another form.
  """
  questions = [
    _parse_line(line, number, f'{path}:{number}')
    for number, line in read_lines(path)
    if line.strip()
  ]
  if not questions:
    raise UserError(f'{path} has no question. Use a file with one JSON object per line.')
  return questions


def swap_options(question: Question) -> Question:
  """Return the same question with the texts of options (A) and (B) exchanged.

  The right label changes with them. The prompt must have one line ` (A) ...`, then one line
  ` (B) ...`, and a last line that ends with a colon, such as "The answer is:". The text of an
  option may span several lines.

  Raises:
    UserError: if the question has another form.
  """
  match = _TWO_OPTIONS.fullmatch(question.prompt)
  if sorted(question.options) != sorted(LABELS):
    raise _cannot_swap(question, f'its options are {list(question.options)}')
  if not match:
    raise _cannot_swap(question, 'its prompt has another form')
  if (labels := _OPTION_LABEL.findall(question.prompt)) != ['A', 'B']:
    raise _cannot_swap(question, f'its prompt has lines for the options {labels}')
  before, a, b, closing = match.groups()
  prompt = f'{before} (A) {b}\n (B) {a}{closing}'
  return Question(question.line, prompt, question.incorrects, question.corrects)


def _parse_line(line: str, number: int, location: str) -> Question:
  try:
    row = parse_json(line)
  except ValueError as error:
    raise UserError(f'{location} is not JSON ({error}). A line has the form {FORM}.') from error
  if not isinstance(row, dict) or not isinstance(row.get('prompt'), str) or not row['prompt']:
    raise UserError(f'{location} has no text "prompt". A line has the form {FORM}.')
  for name in ('corrects', 'incorrects'):
    texts = row.get(name)
    if not isinstance(texts, list) or not texts or not all(t and isinstance(t, str) for t in texts):
      raise UserError(
        f'{location}: "{name}" is {show(texts)}. It must be a list of one or more nonempty texts. '
        f'A line has the form {FORM}.'
      )
  options = [*row['corrects'], *row['incorrects']]
  if len(set(options)) != len(options):
    raise UserError(f'{location} has an option twice, in {show(options)}. Remove one of the two.')
  check_characters(location, ''.join([row['prompt'], *options]))
  return Question(number, row['prompt'], tuple(row['corrects']), tuple(row['incorrects']))


def _cannot_swap(question: Question, reason: str) -> UserError:
  return UserError(
    f'The options of line {question.line} cannot be exchanged: {reason}. It needs the options '
    f'{list(LABELS)} and a prompt with one line " (A) ...", then one line " (B) ...", and a last '
    'line that ends with a colon. Leave the question out, or set swap to False.'
  )
