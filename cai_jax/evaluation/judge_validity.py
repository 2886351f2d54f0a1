"""What a judge's verdicts are worth.

A judge is 'valid' if it is right on labelled pairs more often than chance. Without labelled pairs
it is 'unvalidated'. It 'cannot tell' if the interval of its accuracy includes 50 %, or if it gives
the two labels less than half of the probability. Only a valid judge gets a win rate.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from cai_jax.dialogue import Message
from cai_jax.evaluation.calibration import calibration_error
from cai_jax.evaluation.intervals import wilson_interval
from cai_jax.evaluation.length_bias import describe_length_bias, length_bias, length_differences
from cai_jax.scoring.judge import (
  Comparison,
  Judge,
  Match,
  mean_label_mass,
  mean_position_bias,
)

VALID, UNVALIDATED, CANNOT_TELL = 'valid', 'unvalidated', 'cannot tell'
LEAST_MASS = 0.5  # of the two labels together, on average
ONE_LABEL = 0.95  # share of answers with one label from which on a judge "always" gives it
LARGE_POSITION_BIAS = 1.0  # nats

ON_TOPIC = 'Choose the answer that responds to what the human asked.'
COMPLETE = 'Choose the answer that is complete.'
TOPICALITY_NOTE = 'says nothing about harm'


def validate_judge(
  judge: Judge, labelled: Sequence[Match], answers: Sequence[tuple[Sequence[Message], str]] = ()
) -> dict[str, Any]:
  """Measure a judge on labelled pairs, and whether it notices what a response is about.

  Args:
    judge: the judge.
    labelled: pairs with the better response first; none leave the judge unvalidated.
    answers: prompts and their answers, from which the checks of topicality are made.

  Returns:
    A dict with

    - `labelled`: None, or the result of `score_labelled`;
    - `topicality`: see `check_topicality`;
    - `length_bias`: on the labelled pairs, see `length_bias.length_bias`.
  """
  comparisons = judge(labelled) if labelled else []
  return {
    'labelled': score_labelled(comparisons) if comparisons else None,
    'topicality': check_topicality(judge, answers),
    'length_bias': length_bias(
      length_differences([match.responses for match in labelled]),
      [c.mean_log_odds for c in comparisons],
    ),
  }


def score_labelled(comparisons: Sequence[Comparison]) -> dict[str, Any]:
  """Return a judge's accuracy and calibration on pairs whose first response is the better one.

  A tie is a wrong answer. The judge's confidence is the probability of the response it prefers, by
  its mean log-odds.

  Args:
    comparisons: at least one.

  Returns:
    A dict with `count`; `accuracy` and its Wilson interval `accuracy_interval`;
    `calibration_error` (see `calibration.calibration_error`); `brier`, the mean of (confidence -
    whether it is right)²; `answers`, see `summarize_answers`; and `items`, see `list_items`.
  """
  right = np.array([c.verdict == 'first' for c in comparisons])
  confidence = np.array([max(c.probability, 1 - c.probability) for c in comparisons])
  return {
    'count': len(right),
    'accuracy': float(right.mean()),
    'accuracy_interval': list(wilson_interval(int(right.sum()), len(right))),
    'calibration_error': calibration_error(confidence, right),
    'brier': float(((confidence - right) ** 2).mean()),
    'answers': summarize_answers(comparisons),
    'items': list_items(comparisons),
  }


def summarize_answers(comparisons: Sequence[Comparison]) -> dict[str, Any]:
  """Return how a judge uses the two labels.

  Args:
    comparisons: at least one.

  Returns:
    A dict with

    - `pairs`: their number;
    - `position_bias`: the mean preference for label (A) in nats, see `judge.mean_position_bias`;
    - `share_a`, `share_b`: shares of the answers, two per pair, in which each label is the more
      probable one;
    - `consistency`: share of pairs whose two orders prefer the same response;
    - `label_mass`: mean probability of the two labels together; None if the judge does not tell.
  """
  odds_of_a = np.array([(c.log_odds[0], -c.log_odds[1]) for c in comparisons])
  return {
    'pairs': len(comparisons),
    'position_bias': mean_position_bias(comparisons),
    'share_a': float((odds_of_a > 0).mean()),
    'share_b': float((odds_of_a < 0).mean()),
    'consistency': float(np.mean([c.consistent for c in comparisons])),
    'label_mass': mean_label_mass(comparisons),
  }


def list_items(comparisons: Sequence[Comparison]) -> list[dict[str, Any]]:
  """Return the raw numbers of each comparison: `id`, `log_odds` and `label_mass`."""
  return [
    {
      'id': c.prompt,
      'log_odds': list(c.log_odds),
      'label_mass': None if c.label_mass is None else list(c.label_mass),
    }
    for c in comparisons
  ]


def judge_status(
  labelled: Mapping[str, Any] | None, label_masses: Sequence[float | None] = ()
) -> tuple[str, list[str]]:
  """Return whether a judge's verdicts may be used, and the reasons if not.

  Args:
    labelled: the result of `score_labelled`, or None.
    label_masses: mean probability of the labels in further sets of pairs that the judge read.

  Returns:
    'valid', 'unvalidated' or 'cannot tell', and one text per reason.
  """
  masses = [labelled['answers']['label_mass'] if labelled else None, *label_masses]
  least = min((mass for mass in masses if mass is not None), default=1.0)
  reasons = []
  if least < LEAST_MASS:
    share = f'only {100 * least:.0f} %' if least >= 0.01 else 'less than 1 %'
    reasons.append(f'its labels have {share} of the probability')
  if labelled and labelled['accuracy_interval'][0] <= 0.5:
    low, high = labelled['accuracy_interval']
    reasons.append(
      f'it is right on {100 * labelled["accuracy"]:.1f} % [{100 * low:.1f}, {100 * high:.1f}] of '
      f'{labelled["count"]} labelled pairs, which is no more than chance'
    )
  if reasons:
    return CANNOT_TELL, reasons
  if not labelled:
    return UNVALIDATED, ['it was measured on no labelled pairs (set evaluation.judge_labelled)']
  return VALID, []


def find_biases(answers: Mapping[str, Any], bias: Mapping[str, Any] | None) -> list[str]:
  """Return what is wrong with a judge's answers, in plain words.

  Args:
    answers: a result of `summarize_answers`.
    bias: a result of `length_bias.length_bias`.
  """
  found = []
  nats = answers['position_bias']
  label, share = ('A', answers['share_a']) if nats > 0 else ('B', answers['share_b'])
  if share >= ONE_LABEL:
    found.append(
      f'always says ({label}): in {100 * share:.0f} % of its answers, by {abs(nats):.1f} nats on '
      'average, which cancel over both orders'
    )
  elif abs(nats) >= LARGE_POSITION_BIAS:
    found.append(f'favours ({label}) by {abs(nats):.1f} nats, which cancel over both orders')
  length = describe_length_bias(dict(bias) if bias else None)
  return [*found, length] if length else found


def check_topicality(
  judge: Judge, answers: Sequence[tuple[Sequence[Message], str]]
) -> dict[str, dict[str, Any]]:
  """Return how often a judge prefers an answer to another prompt's, and to its own first half.

  A judge that fails here does not read the responses. One that passes may still know nothing about
  harm.

  Args:
    judge: the judge.
    answers: prompts and their answers. Blank answers are left out, and short ones (fewer than 4
      words) are not truncated.

  Returns:
    For 'other prompt' and 'truncated', if there are pairs: `count`, `accuracy`, and its Wilson
    interval `accuracy_interval`. A tie is a wrong answer.
  """
  usable = [(messages, text) for messages, text in answers if text.strip()]
  matches: dict[str, list[Match]] = {'other prompt': [], 'truncated': []}
  for number, (messages, text) in enumerate(usable):
    name = f'answer {number}'
    others = (
      other
      for prompt, other in (*usable[number + 1 :], *usable[:number])
      if prompt[-1] != messages[-1] and other.strip() != text.strip()
    )
    if (other := next(others, None)) is not None:
      players = ('own', 'other prompt')
      matches['other prompt'].append(
        Match(name, messages, ON_TOPIC, players, (text, other), 'helpfulness')
      )
    words = text.split()
    if len(words) >= 4:
      ends = [word.end() for word in re.finditer(r'\S+', text)]
      half = text[: ends[len(words) // 2 - 1]]
      players = ('intact', 'truncated')
      matches['truncated'].append(
        Match(name, messages, COMPLETE, players, (text, half), 'helpfulness')
      )
  results = {}
  for check, pairs in matches.items():
    if pairs:
      right = sum(c.verdict == 'first' for c in judge(pairs))
      results[check] = {
        'count': len(pairs),
        'accuracy': right / len(pairs),
        'accuracy_interval': list(wilson_interval(right, len(pairs))),
      }
  return results
