"""The baselines of an evaluation: their prompts, and the choice among several answers."""

import dataclasses
import functools
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from cai_jax.data import d_cai
from cai_jax.data.prompts import Prompt
from cai_jax.evaluation import suite
from cai_jax.evaluation.baselines import BASELINES, BY_JUDGE, BY_REWARD, Selection
from cai_jax.evaluation.config import EvaluationConfig
from cai_jax.evaluation.judge_validity import VALID, judge_status
from cai_jax.evaluation.judges import load_judge
from cai_jax.feedback.job import repeat_prompts
from cai_jax.pipeline.models import model_loader
from cai_jax.pipeline.run import Run
from cai_jax.scoring.judge import mean_label_mass

Rows = Sequence[Mapping[str, Any]]


def num_answers(run: Run, name: str) -> int:
  """Return the number of answers of M_θ to each held-out prompt that a baseline needs.

  Args:
    run: the run.
    name: name of the baseline.
  """
  if not isinstance(BASELINES[name], Selection):
    return 1
  return run.config.evaluation.best_of_n or len(run.config.feedback.plan())


def make_prompts(run: Run, name: str, prompts: Sequence[Prompt]) -> list[Prompt]:
  """Return the prompts that M_θ answers for a baseline.

  Args:
    run: the run.
    name: name of the baseline.
    prompts: the held-out prompts.
  """
  baseline = BASELINES[name]
  if isinstance(baseline, Selection):
    return repeat_prompts(prompts, num_answers(run, name))
  return baseline(run.constitution, prompts)


def copy_ids(name: str, count: int) -> list[str]:
  """Return the ids of a prompt and its copies, as `repeat_prompts` makes them.

  Args:
    name: id of the prompt.
    count: number of copies, with the prompt itself.
  """
  return [name, *(f'{name}/{n}' for n in range(2, count + 1))]


def load_choosers(run: Run) -> dict[str, tuple[dict[str, str], Any]]:
  """Return what the run's baselines choose by, for each kind that they need.

  Args:
    run: the run.

  Returns:
    `BY_JUDGE` or `BY_REWARD` → its name, as an entry of the results; and the judge, or the function
    from conversations to rewards.

  Raises:
    UserError: if a model cannot be loaded.
  """
  config, loader = run.config.evaluation, model_loader(run)
  choosers: dict[str, tuple[dict[str, str], Any]] = {}
  if config.selections_by(BY_JUDGE):
    named = config if config.judge_name else dataclasses.replace(config, judge='base')
    judge = load_judge(named, loader, run.config.seed)
    choosers[BY_JUDGE] = {'judge': named.judge_name}, judge
  if config.selections_by(BY_REWARD):
    model = loader.reward_model(config.reward_model, config.style)
    label = model.label_index(config.reward_label or None)
    score = functools.partial(model.scores, label=label)
    choosers[BY_REWARD] = {'reward_model': config.reward_model}, score
  return choosers


def select_answers(
  run: Run, name: str, chooser: Any, base: Rows, rows: Rows
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
  """Return the answers that a baseline chooses, and how its judge used the labels.

  Args:
    run: the run.
    name: name of the baseline, a `Selection`.
    chooser: what it chooses by, see `load_choosers`.
    base: rows of M_θ.
    rows: rows of all answers, with the ids of `repeat_prompts`. An answer whose chain ended early
      is missing, except those to the prompts of `base`.

  Returns:
    One row per row of `base`, with its id; and a dict with `answers` (how many each prompt has at
    most), `comparisons` (how many were made), `label_mass` (None if the judge does not tell),
    `chosen` (by prompt, the number of the chosen answer, from 1), `compared` (by prompt, how many
    answers took part) and `tokens` (by prompt, those of the answers that took part).
  """
  selection, config, count = BASELINES[name], run.config.evaluation, num_answers(run, name)
  assert isinstance(selection, Selection)
  by_id = {row['id']: row for row in rows}
  numbers, candidates = [], []
  for row in base:
    ids = copy_ids(row['id'], count)
    numbers.append([n for n, name in enumerate(ids, 1) if name in by_id])
    # M_θ only answers for a baseline, so the rows do not know the kind of their prompt.
    kept = {'id': row['id'], 'kind': row['kind']}
    answers = [dict(by_id[name]) | kept for name in ids if name in by_id]
    candidates.append(answers[: selection.count(row, answers)])
  principles = {'harmful': config.judge_principles, 'helpful': config.judge_helpful_principles}
  rng = np.random.default_rng([run.config.seed, 4])
  best, comparisons = selection.choose(chooser, candidates, principles, rng)
  result = {
    'answers': count,
    'comparisons': len(comparisons),
    'label_mass': mean_label_mass(comparisons),
    'chosen': {
      row['id']: taken[index] for row, taken, index in zip(base, numbers, best, strict=True)
    },
    'compared': {row['id']: len(rows) for row, rows in zip(base, candidates, strict=True)},
    'tokens': {
      row['id']: sum(answer['initial']['num_tokens'] for answer in rows)
      for row, rows in zip(base, candidates, strict=True)
    },
  }
  return [rows[index] for rows, index in zip(candidates, best, strict=True)], result


def write_answers(folder: pathlib.Path, rows: Rows) -> None:
  """Write chosen answers as a dataset, which reads like that of a model.

  Args:
    folder: folder of the dataset.
    rows: its rows.
  """
  folder.mkdir(parents=True, exist_ok=True)
  has_thoughts = any('thoughts' in row['initial'] for row in rows)
  has_unknown_ids = any('ids_known' in row['initial'] for row in rows)
  d_cai.write_shard(folder, 0, [dict(row) for row in rows], has_thoughts, has_unknown_ids)
  d_cai.write_metadata(folder, [len(rows)], has_thoughts, has_unknown_ids)
  d_cai.write_checksums(folder)


def describe_results(config: EvaluationConfig, results: Mapping[str, Any]) -> str:
  """Return the results in `models.json` as lines of text.

  Args:
    config: the settings of the evaluation.
    results: the content of the file.
  """
  measured = {name: result for name, result in results.items() if name not in BASELINES}
  lines = [suite.describe(config, measured), *_describe_selections(results)]
  return '\n'.join(filter(None, lines))


def _describe_selections(results: Mapping[str, Any]) -> Iterable[str]:
  """Yield a line about each baseline that chooses, with what its judge is worth, if it has one."""
  validity = (results.get('judge') or {}).get('validity') or {}
  for name, result in results.items():
    if not isinstance(BASELINES.get(name), Selection):
      continue
    if 'reward_model' in result:
      yield (
        f'{name}: the best of {_count_answers(result)} answers of M_θ by the reward model '
        f'{result["reward_model"]}'
      )
    else:
      status, reasons = judge_status(validity.get('labelled'), [result['label_mass']])
      line = (
        f'{name}: the best of {_count_answers(result)} answers of M_θ by the judge '
        f'{result["judge"]}, '
        f'in {result["comparisons"]} comparisons'
      )
      yield line if status == VALID else f'{line}; this judge is {status}: {"; ".join(reasons)}'


def _count_answers(result: Mapping[str, Any]) -> str:
  """Return how many answers a baseline chose from, such as '9' or '3 to 9 (mean 5.2)'."""
  counts = list(result.get('compared', {}).values()) or [result['answers']]
  if min(counts) == max(counts):
    return str(counts[0])
  return f'{min(counts)} to {max(counts)} (mean {sum(counts) / len(counts):.1f})'
