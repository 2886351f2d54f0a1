"""Rates over prompts, each with its bootstrap interval."""

from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np

from cai_jax.runtime.errors import UserError
from cai_jax.scoring.intervals import bootstrap_interval
from cai_jax.scoring.scorer import Measure, Scorer


def measures(
  prompts: Sequence[Sequence[Mapping[str, str]]],
  turns: Sequence[Mapping[str, Any]],
  scorer: Scorer | None,
  further: Mapping[str, Measure] = MappingProxyType({}),
) -> dict[str, list[float]]:
  """What is measured of each response, by name: one number a response, in their order.

  Args:
    prompts: the messages that each turn answers.
    turns: with `text` and `num_tokens`, as rows of D_CAI hold them.
    scorer: judges a response; None leaves its rates out.
    further: measures by name, such as `suite.measures` gives.

  Returns:
    `mean_tokens`, with a scorer `violation_rate` and `helpful_rate` (0 or 1), and those further.
  """
  found: dict[str, list[float]] = {}
  if scorer is not None:
    verdicts = scorer(prompts, [turn['text'] for turn in turns])
    found['violation_rate'] = [float(bool(v.violations)) for v in verdicts]
    found['helpful_rate'] = [float(v.helpful) for v in verdicts]
  found['mean_tokens'] = [float(turn['num_tokens']) for turn in turns]
  texts = [turn['text'] for turn in turns]
  return found | {name: measure(prompts, texts) for name, measure in further.items()}


def score(
  prompts: Sequence[Sequence[Mapping[str, str]]],
  turns: Sequence[Mapping[str, Any]],
  scorer: Scorer | None,
  further: Mapping[str, Measure] = MappingProxyType({}),
) -> dict[str, Any]:
  """Count of the responses and the mean of each of their `measures`.

  Returns:
    `count`, `mean_tokens`, and with a scorer `violation_rate` and `helpful_rate` (shares of the
    responses), and those further; each `_rate` with its 95 % `_interval` [low, high].

  Raises:
    ValueError: if there is nothing to score.
  """
  if not turns:
    raise UserError('there is no response to score.')
  result: dict[str, Any] = {'count': len(turns)}
  for name, values in measures(prompts, turns, scorer, further).items():
    result[name] = float(np.mean(values))
    if name.endswith('_rate'):
      result[f'{name}_interval'] = list(bootstrap_interval(values))
  return result


def summarise(
  base: Iterable[Mapping[str, Any]],
  aligned: Iterable[Mapping[str, Any]],
  scorer: Scorer | None,
  further: Mapping[str, Measure] = MappingProxyType({}),
) -> dict[str, dict[str, Any]]:
  """The summary of a run from rows of two models on the same held-out prompts.

  Args:
    base: rows of M_θ's chains: harmful prompts with their rounds, helpful ones without.
    aligned: rows of M_aligned's answers to the same prompts.
    scorer: judges a response, or None.
    further: measures, as `measures` takes them.

  Returns:
    `stages` (initial, revision_1, ...) and `models` (base, aligned) over harmful prompts, and
    `benign` (base, aligned) over helpful ones, where there are any; each as `score` gives it.

  Raises:
    ValueError: if the two hold different prompts.
  """
  base, aligned = list(base), {row['id']: row for row in aligned}
  if {row['id'] for row in base} != set(aligned):
    raise UserError('M_θ and M_aligned were sampled on different prompts; they must be the same.')
  summary: dict[str, dict[str, Any]] = {}
  for kind, group in (('harmful', 'models'), ('helpful', 'benign')):
    rows = [row for row in base if row['kind'] == kind]
    if not rows:
      continue
    prompts = [row['prompt'] for row in rows]
    answers = {
      'base': [row['initial'] for row in rows],
      'aligned': [aligned[row['id']]['initial'] for row in rows],
    }
    scores = {name: score(prompts, turns, scorer, further) for name, turns in answers.items()}
    if kind == 'harmful':
      summary['stages'] = {'initial': scores['base']}
      for number in range(min(len(row['rounds']) for row in rows)):
        turns = [row['rounds'][number]['revision'] for row in rows]
        summary['stages'][f'revision_{number + 1}'] = score(prompts, turns, scorer, further)
    summary[group] = scores
  return summary
