"""What a set of labels is worth: counts, preference for an option, sureness, and accuracy."""

import collections
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from cai_jax.feedback.comparisons.comparing import Reading
from cai_jax.feedback.comparisons.records import Label, Outcome
from cai_jax.scoring.wilson import wilson_interval

TIE = 1e-9  # a probability this near to 0.5 prefers neither response
LISTED_ENDS = 5  # reasons of chains that ended, of which the summary has examples


def summarize(outcomes: Sequence[Outcome]) -> dict[str, Any]:
  """Return the summary of a job.

  Args:
    outcomes: the results of its chains.

  Returns:
    A dict with

    - `prompts` and `pairs`: numbers of prompts and of pairs that were labelled, without the
      labelled sets;
    - `left_out`: number of pairs that were not compared, by reason;
    - `ended`: `count` of chains that a sampled text made impossible, and some `reasons`;
    - what `summarize_labels` returns for the labels that are written;
    - `accuracy`: for each set with known better responses, `summarize_accuracy` of its labels, and
      `ended`, the number of its pairs without a label because their chain ended.
  """
  written = [outcome for outcome in outcomes if outcome.item.is_written]
  labels = [label for outcome in written for label in outcome.labels]
  left_out = collections.Counter(reason for o in written for reason in o.left_out)
  ended = [outcome for outcome in outcomes if outcome.ended]
  known: dict[str, list[Label]] = {}
  unknown: collections.Counter[str] = collections.Counter()
  for outcome in outcomes:
    if outcome.item.better is not None:
      known.setdefault(outcome.item.source, []).extend(outcome.labels)
      unknown[outcome.item.source] += bool(outcome.ended)
  return {
    'prompts': len(written),
    'pairs': len(labels),
    'left_out': dict(sorted(left_out.items())),
    'ended': {
      'count': len(ended),
      'reasons': [f'{o.item.name}: {o.ended}' for o in ended[:LISTED_ENDS]],
    },
    **summarize_labels(labels),
    'accuracy': {
      source: summarize_accuracy(group)
      | {'ended': unknown[source], 'answers': summarize_labels(group)}
      for source, group in known.items()
      if group
    },
  }


def summarize_labels(labels: Sequence[Label]) -> dict[str, Any]:
  """Return how sure labels are, and how the feedback model uses the options.

  Args:
    labels: the labels.

  Returns:
    A dict with

    - `ties`: share of labels that prefer neither response;
    - `confidence`: mean probability of the preferred response;
    - `entropy`: mean entropy of the labels in nats; ln 2 = 0.69 says nothing about a pair;
    - `option_a`: share of answers that prefer the response shown as (A), of those that prefer one;
      without a preference for an option it is 0.5, because each pair is shown in both orders;
    - `consistent`: share of labels whose mean answers in the two orders prefer the same response;
    - `label_mass`: mean probability of the two labels together, None if it is not known;
    - `unread`: share of answers without a label; `cut`: share of texts that ended at their limit.

    Each value is None without labels.
  """
  readings = [reading for label in labels for reading in label.readings]
  preferring = [r for r in readings if abs(r.answer.probability - 0.5) > TIE]
  masses = [r.answer.mass for r in readings if r.answer.mass is not None]
  return {
    'ties': _mean(labels, is_tie),
    'confidence': _mean(labels, lambda label: max(label.probability, 1 - label.probability)),
    'entropy': _mean(labels, lambda label: entropy(label.probability)),
    'option_a': _mean(preferring, lambda reading: reading.answer.probability > 0.5),
    'consistent': _mean(labels, is_consistent),
    'label_mass': _mean(masses, float),
    'unread': _mean(readings, lambda reading: not reading.answer.is_read),
    'cut': _mean(readings, lambda reading: reading.answer.is_cut),
  }


def summarize_accuracy(labels: Sequence[Label]) -> dict[str, Any]:
  """Return how often labels prefer the response that is known to be better.

  Args:
    labels: labels of pairs whose better response is known, at least one.

  Returns:
    A dict with `count`, `right`, `ties`, `accuracy` and its Wilson 95 % `interval`. A tie is a
    wrong answer.
  """
  right = sum(not is_tie(label) and preferred(label) == label.item.better for label in labels)
  return {
    'count': len(labels),
    'right': right,
    'ties': sum(map(is_tie, labels)),
    'accuracy': right / len(labels),
    'interval': list(wilson_interval(right, len(labels))),
  }


def is_tie(label: Label) -> bool:
  """Return whether a label prefers neither response.

  Args:
    label: the label.
  """
  return abs(label.probability - 0.5) <= TIE


def preferred(label: Label) -> int:
  """Return the index, 0 or 1, of the response that a label prefers; 0 for a tie.

  Args:
    label: the label.
  """
  return int(label.probability < 0.5)


def is_consistent(label: Label) -> bool:
  """Return whether the two orders prefer the same response, or neither prefers one.

  Args:
    label: the label.
  """
  signs = []
  for option_a in (0, 1):
    of_order: list[Reading] = [r for r in label.readings if r.option_a == option_a]
    mean = sum(reading.probability for reading in of_order) / len(of_order)
    signs.append(0 if abs(mean - 0.5) <= TIE else math.copysign(1, mean - 0.5))
  return signs[0] == signs[1]


def entropy(probability: float) -> float:
  """Return the entropy in nats of a choice between two.

  Args:
    probability: of one of them.
  """
  parts = (p for p in (probability, 1 - probability) if p > 0)
  return -sum(p * math.log(p) for p in parts)


def _mean(values: Iterable[Any], measure: Callable[[Any], float]) -> float | None:
  numbers = [float(measure(value)) for value in values]
  return sum(numbers) / len(numbers) if numbers else None
