"""Multiple choice by likelihood: accuracy, calibration, and whether the order of options matters.

The form of the evaluations published with Bai et al. 2022 (HHH, harmful versus ethical): one JSON
object a line, `{"prompt": text, "corrects": [text, ...], "incorrects": [text, ...]}`, where the
options are what may follow the prompt, such as " (A)". The model's answer is the option of the
greatest log P(option | prompt; θ) (as Askell et al. 2021, section 2, score such questions).
"""

import dataclasses
import json
import os
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from cai_jax.model.lm import LM
from cai_jax.runtime.errors import UserError
from cai_jax.scoring import likelihood
from cai_jax.scoring.intervals import bootstrap_interval

BINS = 10  # of the calibration error
LABELS = (' (A)', ' (B)')
# Before, text of (A), text of (B), closing line. Texts may have several lines.
_TWO = re.compile(r'(.*?^) \(A\) (.*?)\n \(B\) (.*[^\n])(\n+[^\n]*:)', re.DOTALL | re.MULTILINE)
_OPTION = re.compile(r'^ \(([A-Z])\) ', re.MULTILINE)


@dataclasses.dataclass(frozen=True)
class Item:
  """One question: `prompt`, and the options that are right and wrong, one of each at least."""

  line: int  # of its file, from 1: its id
  prompt: str
  corrects: tuple[str, ...]
  incorrects: tuple[str, ...]

  @property
  def options(self) -> tuple[str, ...]:
    """Every option; the wrong ones come first, so that none of equal ones counts as right."""
    return (*self.incorrects, *self.corrects)


def read_items(path: str | os.PathLike) -> list[Item]:
  """The questions of a file in the published form; empty lines are passed over.

  Raises:
    ValueError: for a file that is not there or holds no question, or a line of another form; the
      message names both.
  """
  try:
    with open(path, encoding='utf-8') as file:
      lines = file.read().split('\n')
  except (OSError, UnicodeDecodeError) as error:
    raise UserError(
      f'{path} cannot be read: {error}. Give a file of one JSON object a line, in UTF-8.'
    ) from error
  items = [_item(line, n, f'{path}:{n}') for n, line in enumerate(lines, 1) if line.strip()]
  if not items:
    raise UserError(f'{path} holds no question; give a file of one JSON object a line.')
  return items


def swap_options(item: Item) -> Item:
  """The same question with the texts of its options (A) and (B) exchanged.

  The right label changes with them. The prompt has one line ` (A) ...` and after it one line
  ` (B) ...`, whose texts may go on over further lines, and ends with a line that closes with a
  colon, such as "The answer is:".

  Raises:
    ValueError: if the question has another form.
  """
  found = _TWO.fullmatch(item.prompt)
  if sorted(item.options) != sorted(LABELS) or not found:
    what = f'its options are {list(item.options)}' if found else 'its prompt has another form'
    raise _no_swap(item, what)
  if (lines := _OPTION.findall(item.prompt)) != ['A', 'B']:
    raise _no_swap(item, f'its prompt has lines of the options {lines}')
  before, a, b, closing = found.groups()
  prompt = f'{before} (A) {b}\n (B) {a}{closing}'
  return Item(item.line, prompt, item.incorrects, item.corrects)


def evaluate(
  lm: LM, items: Sequence[Item], *, swap: bool = False, batch_tokens: int = 8192
) -> dict[str, Any]:
  """Accuracy and calibration of a model on multiple-choice questions.

  A question's tokens are those of the prompt with the option, see `likelihood.tokenise`. Options
  are weighed by P(option | prompt) as it is, with no account of their lengths; `probability` is
  the softmax over the options.

  Args:
    lm: the model.
    items: the questions.
    swap: asks each question in the other order of its two options, too.
    batch_tokens: as `likelihood.log_likelihoods` takes it.

  Returns:
    `count`; `accuracy`, share of questions whose best right option is more likely than every wrong
    one (equal ones count as wrong); `probability`, mean probability of the right options together;
    `brier`, mean of (probability of the chosen option - whether it is right)² (Brier 1950, on the
    chosen option); `calibration_error`, see the function; and `items`, a dict for each question
    with `id` (its line), `correct`, `chosen` (the option), `confidence` (its probability),
    `probability` (of the right ones) and `log_probabilities` of `corrects` and `incorrects`, nats.
    With `swap`, `swapped` holds the same of the exchanged questions, with items of its own;
    `consistency` is the share of questions whose answer has the same content in both orders;
    `averaged_accuracy` that of those whose right option has a mean probability above one half.
    Shares and means have their 95 % `_interval` [low, high] by bootstrap over questions, but the
    calibration error, which is no mean.

  Raises:
    ValueError: if there is no question, or one that cannot be tokenised, is too long for the model,
      or cannot be swapped; the message names its line.
  """
  if not items:
    raise UserError('there is no question to ask; give one item or more.')
  orders = [list(items)] + ([[swap_options(item) for item in items]] if swap else [])
  pairs = [_pair(lm, item, option) for order in orders for item in order for option in item.options]
  values = iter(
    likelihood.log_likelihoods(lm, *zip(*pairs, strict=True), batch_tokens=batch_tokens)
  )
  scored = [[_scored(item, [next(values) for _ in item.options]) for item in o] for o in orders]
  result = _summary(scored[0])
  if swap:
    result['swapped'] = _summary(scored[1])
    # An answer has the same content in both orders exactly if it is right in both, or in neither.
    both = list(zip(*scored, strict=True))
    _add_mean(result, 'consistency', [a['correct'] == b['correct'] for a, b in both])
    averaged = [a['probability'] + b['probability'] > 1 for a, b in both]
    _add_mean(result, 'averaged_accuracy', averaged)
  return result


def calibration_error(
  confidences: Sequence[float], right: Sequence[bool], bins: int = BINS
) -> float:
  """Expected calibration error (Guo et al. 2017, equation 3) with bins of equal width.

  The mean over answers of |accuracy - mean confidence| of the bin that the answer is in; bin m of M
  holds confidences in ((m-1)/M, m/M].

  Raises:
    ValueError: if there is no answer, as many confidences as answers are not given, or a confidence
      is no probability.
  """
  confidences, right = np.asarray(confidences, np.float64), np.asarray(right, np.float64)
  if confidences.ndim != 1 or confidences.shape != right.shape or not confidences.size:
    raise UserError(
      f'{confidences.shape} confidences and {right.shape} answers were given; give one list of '
      'each, equally long and not empty.'
    )
  if not ((confidences >= 0) & (confidences <= 1)).all():
    raise UserError(
      f'confidences lie in {confidences.min()}..{confidences.max()}; they are probabilities, 0..1.'
    )
  places = np.clip(np.ceil(confidences * bins).astype(int) - 1, 0, bins - 1)
  gaps = np.bincount(places, right - confidences, bins)  # a bin's size times its gap
  return float(np.abs(gaps).sum() / confidences.size)


def _item(line: str, number: int, where: str) -> Item:
  form = '{"prompt": "...", "corrects": [" (A)"], "incorrects": [" (B)"]}'
  try:
    row = json.loads(line)
  except json.JSONDecodeError as error:
    raise UserError(f'{where} is no JSON ({error}); a line has the form {form}.') from error
  if not isinstance(row, dict) or not isinstance(row.get('prompt'), str) or not row['prompt']:
    raise UserError(f'{where} has no text "prompt"; a line has the form {form}.')
  for name in ('corrects', 'incorrects'):
    texts = row.get(name)
    if not isinstance(texts, list) or not texts or not all(t and isinstance(t, str) for t in texts):
      raise UserError(
        f'{where}: "{name}" is {texts!r:.80}; it must be a list of one text or more, none empty.'
      )
  options = [*row['corrects'], *row['incorrects']]
  if len(set(options)) != len(options):
    raise UserError(f'{where} has an option twice, in {options!r:.200}; each may stand once only.')
  return Item(number, row['prompt'], tuple(row['corrects']), tuple(row['incorrects']))


def _no_swap(item: Item, what: str) -> ValueError:
  return ValueError(
    f'line {item.line} cannot be asked with its options exchanged: {what}. It needs the options '
    f'{list(LABELS)}, and a prompt with one line " (A) ...", then one line " (B) ...", and at its '
    'end a line that closes with a colon. Leave it out, or use swap=False.'
  )


def _pair(lm: LM, item: Item, option: str) -> tuple[list[int], list[int]]:
  name = f'line {item.line}, option {option!r:.40}'
  try:
    pair = likelihood.tokenise(lm.tokenizer, item.prompt, option)
  except ValueError as error:
    raise UserError(f'{name}: {error}') from error
  likelihood.check_pair(lm, *pair, name)
  return pair


def _scored(item: Item, log_probabilities: list[float]) -> dict[str, Any]:
  """What is told of one question, from log P of its `options`."""
  wrong = len(item.incorrects)
  logits = np.asarray(log_probabilities)
  weights = np.exp(logits - logits.max())
  shares = weights / weights.sum()
  chosen = int(logits.argmax())  # the first of equal ones
  return {
    'id': item.line,
    'correct': chosen >= wrong,
    'chosen': item.options[chosen],
    'confidence': float(shares[chosen]),
    'probability': float(shares[wrong:].sum()),
    'log_probabilities': {
      'corrects': log_probabilities[wrong:],
      'incorrects': log_probabilities[:wrong],
    },
  }


def _summary(scored: list[dict[str, Any]]) -> dict[str, Any]:
  right = np.array([row['correct'] for row in scored])
  confidences = np.array([row['confidence'] for row in scored])
  result: dict[str, Any] = {'count': len(scored)}
  _add_mean(result, 'accuracy', right)
  _add_mean(result, 'probability', [row['probability'] for row in scored])
  _add_mean(result, 'brier', (confidences - right) ** 2)
  result['calibration_error'] = calibration_error(np.minimum(confidences, 1), right)
  result['items'] = scored
  return result


def _add_mean(result: dict[str, Any], name: str, values) -> None:
  result[name] = float(np.mean(values))
  result[f'{name}_interval'] = list(bootstrap_interval(values))
