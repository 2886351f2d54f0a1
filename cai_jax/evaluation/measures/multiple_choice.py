"""Multiple choice by likelihood: accuracy, calibration and sensitivity to the order of options.

The model's answer is the option with the greatest log P(option | prompt; θ), as in Askell et al.
2021, section 2. `cai_jax.evaluation.questions` reads the questions.
"""

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from cai_jax.dialogue import Dialogue
from cai_jax.evaluation.calibration import calibration_error
from cai_jax.evaluation.config import EvaluationConfig
from cai_jax.evaluation.intervals import rate_interval
from cai_jax.evaluation.questions import Question, read_questions, swap_options
from cai_jax.evaluation.registries import MODEL_MEASURES, ModelMeasure, Row
from cai_jax.model.lm import LM
from cai_jax.runtime.errors import UserError
from cai_jax.scoring import likelihood


@MODEL_MEASURES.register('multiple_choice')
def create_multiple_choice(config: EvaluationConfig) -> ModelMeasure:
  """Return the measure, whose result has one entry per file and is empty if there are no files."""

  def measure(lm: LM, rows: Sequence[Row], dialogue: Dialogue) -> dict[str, dict[str, Any]]:
    del rows, dialogue
    return {
      name: evaluate_questions(lm, read_questions(path), swap=config.swap)
      for name, path in _by_file_name(config.multiple_choice).items()
    }

  return ModelMeasure(measure, describe)


def _by_file_name(paths: Sequence[str]) -> dict[str, str]:
  """Return paths by file name, with a number where names repeat: results name no folder."""
  names = [os.path.basename(path) for path in paths]
  return {
    name if names.count(name) == 1 else f'{name} ({number})': path
    for number, (name, path) in enumerate(zip(names, paths, strict=True), 1)
  }


def describe(model: str, results: dict[str, dict[str, Any]]) -> list[str]:
  """Return one line of text for each file of questions.

  Args:
    model: name of the model.
    results: results of `evaluate_questions`, by file.
  """
  lines = []
  for path, result in results.items():
    low, high = result['accuracy_interval']
    line = (
      f'{model}: {os.path.basename(path)}: {result["count"]} questions, accuracy '
      f'{100 * result["accuracy"]:.1f} % [{100 * low:.1f}, {100 * high:.1f}], calibration error '
      f'{result["calibration_error"]:.3f}'
    )
    if 'consistency' in result:
      line += (
        f'; with options exchanged {100 * result["swapped"]["accuracy"]:.1f} %, same answer in '
        f'both orders {100 * result["consistency"]:.1f} %'
      )
    lines.append(line)
  return lines


def evaluate_questions(
  lm: LM, questions: Sequence[Question], *, swap: bool = False, batch_tokens: int = 8192
) -> dict[str, Any]:
  """Measure a model's accuracy and calibration on multiple-choice questions.

  Prompt and option are tokenized as one text (see `likelihood.tokenize_pair`). Options are compared
  by P(option | prompt), without a correction for length. The probability of an option is the
  softmax over the options of its question.

  Args:
    lm: the model.
    questions: the questions.
    swap: also ask each question with its two options exchanged.
    batch_tokens: maximum number of tokens in a batch, see `likelihood.log_likelihoods`.

  Returns:
    A dict with

    - `count`: number of questions;
    - `accuracy`: share of questions where some right option is more likely than every wrong one;
    - `probability`: mean total probability of the right options;
    - `brier`: mean of (probability of the chosen option - whether it is right)² (Brier 1950);
    - `calibration_error`: see `calibration_error`;
    - `items`: one dict per question with `id` (its line), `correct`, `chosen` (the option),
      `confidence` (its probability), `probability` (of the right options) and `log_probabilities`
      of `corrects` and `incorrects`, in nats.

    Means and shares have a 95 % Wilson interval [low, high] over questions, under the name
    `..._interval`. With `swap`, the dict also has

    - `swapped`: the same results for the exchanged questions;
    - `consistency`: share of questions that are answered with the same text in both orders;
    - `averaged_accuracy`: share of questions whose right option has a probability above 0.5 on
      average over both orders.

  Raises:
    UserError: if there are no questions, or one cannot be tokenized, is too long for the model or
      cannot be swapped.
  """
  if not questions:
    raise UserError('There is no question to ask. Give at least one.')
  orders = [list(questions)]
  if swap:
    orders.append([swap_options(question) for question in questions])
  pairs = [
    _tokenize_option(lm, question, option)
    for order in orders
    for question in order
    for option in question.options
  ]
  contexts, options = zip(*pairs, strict=True)
  values = iter(likelihood.log_likelihoods(lm, contexts, options, batch_tokens=batch_tokens))
  scored = [
    [_score_question(question, [next(values) for _ in question.options]) for question in order]
    for order in orders
  ]
  result = _summarize(scored[0])
  if swap:
    result['swapped'] = _summarize(scored[1])
    # The two answers are the same text exactly if both are right or both are wrong.
    pairs_of_answers = list(zip(*scored, strict=True))
    same = [a['correct'] == b['correct'] for a, b in pairs_of_answers]
    _add_mean(result, 'consistency', same)
    averaged = [a['probability'] + b['probability'] > 1 for a, b in pairs_of_answers]
    _add_mean(result, 'averaged_accuracy', averaged)
  return result


def _tokenize_option(lm: LM, question: Question, option: str) -> tuple[list[int], list[int]]:
  """Return the tokens of a question's prompt and of an option."""
  label = f'line {question.line}, option {option!r:.40}'
  try:
    pair = likelihood.tokenize_pair(lm.tokenizer, question.prompt, option)
  except UserError as error:
    raise UserError(f'{label}: {error}') from error
  likelihood.check_pair(lm, *pair, label)
  return pair


def _score_question(question: Question, log_probabilities: list[float]) -> dict[str, Any]:
  """Return the entry of `items` for a question, given log P of each of its options."""
  num_wrong = len(question.incorrects)
  logits = np.asarray(log_probabilities)
  weights = np.exp(logits - logits.max())
  probabilities = weights / weights.sum()
  chosen = int(logits.argmax())  # the first of equal ones, hence a wrong one
  return {
    'id': question.line,
    'correct': chosen >= num_wrong,
    'chosen': question.options[chosen],
    'confidence': float(probabilities[chosen]),
    'probability': float(probabilities[num_wrong:].sum()),
    'log_probabilities': {
      'corrects': log_probabilities[num_wrong:],
      'incorrects': log_probabilities[:num_wrong],
    },
  }


def _summarize(items: list[dict[str, Any]]) -> dict[str, Any]:
  """Return the results over scored questions."""
  correct = np.array([item['correct'] for item in items])
  confidences = np.array([item['confidence'] for item in items])
  result: dict[str, Any] = {'count': len(items)}
  _add_mean(result, 'accuracy', correct)
  _add_mean(result, 'probability', [item['probability'] for item in items])
  _add_mean(result, 'brier', (confidences - correct) ** 2)
  result['calibration_error'] = calibration_error(np.minimum(confidences, 1), correct)
  result['items'] = items
  return result


def _add_mean(result: dict[str, Any], name: str, values: ArrayLike) -> None:
  """Store the mean of the values and its interval in `result`."""
  result[name] = float(np.mean(np.asarray(values)))
  result[f'{name}_interval'] = list(rate_interval(values))
