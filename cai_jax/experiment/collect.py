"""Collect an experiment's results: scores of its arms, paired differences, and costs."""

import dataclasses
import functools
import math
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from cai_jax.data import d_cai
from cai_jax.evaluation import estimates
from cai_jax.evaluation.diversity import word_pair_diversity
from cai_jax.evaluation.intervals import holm
from cai_jax.evaluation.registries import ResponseMeasure
from cai_jax.evaluation.summary import measure_responses
from cai_jax.experiment.define import (
  HELD_OUT_RESPONSES,
  Arm,
  Experiment,
  changed_settings,
  figure_arms,
  override_config,
  run_name,
)
from cai_jax.runtime.errors import UserError
from cai_jax.runtime.manifest import read_manifest
from cai_jax.runtime.settings import flatten

KINDS = ('harmful', 'helpful')
RunFolders = Mapping[str, Mapping[int, pathlib.Path]]  # arm → seed → folder of the run


@dataclasses.dataclass(frozen=True)
class Responses:
  """An arm's responses to the prompts of one kind.

  Attributes:
    prompts: seed → prompt id → messages.
    turns: seed → prompt id → sampled turn.
  """

  prompts: Mapping[int, Mapping[str, list[dict[str, str]]]]
  turns: Mapping[int, Mapping[str, dict[str, Any]]]

  def measure(
    self,
    measures: Sequence[ResponseMeasure],
    diversity: bool = False,
  ) -> Mapping[str, estimates.Values]:
    """Return the value of every measure for every response.

    Args:
      measures: the measures of responses.
      diversity: whether to measure diversity as well.

    Returns:
      Measure → seed → prompt id → value.
    """
    values_by_measure: dict[str, dict[int, dict[str, float]]] = {}
    for seed, turns in self.turns.items():
      prompts = self.prompts[seed]
      columns = measure_responses(measures, list(prompts.values()), list(turns.values()))
      if diversity:
        columns['diversity'] = [*word_pair_diversity([turn['text'] for turn in turns.values()])]
      for name, values in columns.items():
        by_seed = values_by_measure.setdefault(name, {})
        numbers = [math.nan if value is None else value for value in values]
        by_seed[seed] = dict(zip(turns, numbers, strict=True))
    return values_by_measure


def read_responses(arm: Arm, folders: Mapping[int, pathlib.Path], kind: str) -> Responses | None:
  """Read an arm's responses to prompts of one kind.

  Args:
    arm: the arm, which names the response to read.
    folders: the arm's run folders, by seed.
    kind: 'harmful' or 'helpful'. For helpful prompts D_CAI has the initial response only.

  Returns:
    The responses, or None if a run has fewer than two prompts of the kind.

  Raises:
    UserError: if a run has fewer rounds than the response needs.
  """
  prompts, turns = {}, {}
  for seed, folder in folders.items():
    rows = [row for row in _scored_rows(arm, folder) if row['kind'] == kind]
    prompts[seed] = {row['id']: row['prompt'] for row in rows}
    turns[seed] = {row['id']: _select_response(arm.response, row) for row in rows}
  return Responses(prompts, turns) if all(len(t) > 1 for t in turns.values()) else None


@functools.cache  # several arms read the same dataset
def _read_rows(folder: pathlib.Path) -> tuple[dict[str, Any], ...]:
  """Return the rows of a finished dataset, reduced to the fields that are scored."""
  fields = ('id', 'kind', 'prompt', 'initial', 'rounds')
  dataset = d_cai.read_rows(folder)
  rows = (dataset[i] for i in range(len(dataset)))
  return tuple({name: row[name] for name in fields} for row in rows)


def _scored_rows(arm: Arm, folder: pathlib.Path) -> Sequence[Mapping[str, Any]]:
  if arm.response not in HELD_OUT_RESPONSES:
    return [row for row in _read_rows(folder / 'd_cai') if row['rounds']]
  # M_aligned answers every prompt and revises none, so its dataset does not know the kinds.
  kinds = {row['id']: row['kind'] for row in _read_rows(folder / 'evaluation' / 'base')}
  rows = _read_rows(folder / HELD_OUT_RESPONSES[arm.response])
  return [row | {'kind': kinds[row['id']]} for row in rows]


def _select_response(name: str, row: Mapping[str, Any]) -> dict[str, Any]:
  rounds = row['rounds']
  if name in ('initial', 'base', 'aligned') or (name == 'revised' and not rounds):
    return row['initial']
  if name in ('last', 'revised'):
    return rounds[-1]['revision']
  number = int(name.removeprefix('revision_'))
  if number > len(rounds):
    raise UserError(
      f'An arm scores {name}, but its run has {len(rounds)} rounds. Raise feedback.rounds.'
    )
  return rounds[number - 1]['revision']


def collect_results(
  experiment: Experiment,
  name: str,
  docstring: str,
  folders: RunFolders,
  measures: Sequence[ResponseMeasure],
  config: ConfigDict,
) -> dict[str, Any]:
  """Return the results of an experiment, as `cai_jax.report.write_experiment` takes them.

  Args:
    experiment: the arms.
    name: name of the experiment's file, without suffix.
    docstring: docstring of that file.
    folders: arm → seed → folder of the finished run.
    measures: the measures of responses.
    config: the base config.

  Raises:
    UserError: if an arm and the reference answer different prompts.
  """
  values = {
    arm: {
      kind: responses.measure(measures, experiment.diversity)
      for kind in KINDS
      if (responses := read_responses(experiment.arms[arm], folders[arm], kind)) is not None
    }
    for arm in experiment.arms
  }
  reference = values[experiment.reference]
  arms = {
    arm: {
      'response': settings.response,
      'overrides': dict(settings.overrides),
      'facts': dict(settings.facts),
      'groups': {
        kind: _summarize(columns, None if arm == experiment.reference else reference.get(kind))
        for kind, columns in values[arm].items()
      },
    }
    for arm, settings in experiment.arms.items()
  }
  _add_p_values(experiment, values, arms)
  figures, notes = [], []
  for figure in experiment.figures:
    if missing := _missing_measure(figure, arms):
      notes.append(f'The figure "{figure["caption"]}" is left out: {missing}.')
    else:
      figures.append(dict(figure))
  return {
    'name': name,
    'title': re.split(r'(?<=[?.]) ', docstring.partition('\n')[0], maxsplit=1)[0] or name,
    'docstring': docstring,
    'base': experiment.base,
    'seeds': list(experiment.seeds),
    'reference': experiment.reference,
    'metrics': list(
      dict.fromkeys(m for kinds in values.values() for columns in kinds.values() for m in columns)
    ),
    'arms': arms,
    'figures': figures,
    'config_differences': _config_differences(experiment, config),
    'costs': _all_costs(experiment, folders),
    'notes': notes,
  }


def _add_p_values(
  experiment: Experiment,
  values: Mapping[str, Mapping[str, Mapping[str, estimates.Values]]],
  arms: Mapping[str, Any],
) -> None:
  """Add the p-value of each difference to the reference, and the one adjusted for its family.

  The family of a difference is all arms with the same measure of the same kind of prompts.

  Args:
    experiment: names the reference.
    values: arm → kind of prompts → measure → values.
    arms: results by arm, which this function changes.
  """
  for kind, measures in values[experiment.reference].items():
    for measure, reference in measures.items():
      family = {
        arm: arms[arm]['groups'][kind]['differences'][measure]
        for arm, kinds in values.items()
        if arm != experiment.reference and measure in kinds.get(kind, {})
      }
      p_values = [
        estimates.difference_p_value(values[arm][kind][measure], reference) for arm in family
      ]
      for entry, p, adjusted in zip(family.values(), p_values, holm(p_values), strict=True):
        entry['p_value'], entry['adjusted_p_value'] = p, adjusted


def _missing_measure(figure: Mapping[str, Any], arms: Mapping[str, Any]) -> str:
  """Return which measure of a figure is missing, or '' if the results have all of them."""
  if figure['kind'] == 'frontier':
    shown = {tuple(figure['x']), tuple(figure['y'])}
  else:
    metrics = figure.get('metrics') or [series['metric'] for series in figure['series']]
    shown = {(figure['group'], metric) for metric in metrics}
  for group, metric in sorted(shown):
    for arm in sorted(figure_arms(figure)):
      if metric not in arms[arm]['groups'].get(group, {'metrics': {}})['metrics']:
        return f'there is no {metric} of {group} prompts for {arm!r}'
  return ''


def _summarize(
  columns: Mapping[str, estimates.Values], reference: Mapping[str, estimates.Values] | None
) -> dict[str, Any]:
  """Return an arm's count and means, and its paired differences to the reference if there is one.

  Args:
    columns: measure → seed → prompt id → value.
    reference: the same for the reference arm.
  """
  count = sum(map(len, next(iter(columns.values())).values()))
  metrics = {}
  for name, values in columns.items():
    by_seed = {str(s): sum(column.values()) / len(column) for s, column in values.items()}
    metrics[name] = _as_dict(estimates.estimate_mean(values)) | {'by_seed': by_seed}
  group = {'count': count, 'metrics': metrics}
  if reference is not None:
    group['differences'] = {
      name: _as_dict(estimates.estimate_difference(values, reference[name]))
      for name, values in columns.items()
    }
  return group


def _as_dict(estimate: estimates.Estimate) -> dict[str, Any]:
  return {'value': estimate.value, 'interval': [estimate.low, estimate.high]}


def _config_differences(experiment: Experiment, config: ConfigDict) -> dict[str, dict[str, Any]]:
  """Return field → arm → value for the fields in which any arm differs from the base config."""
  seed = experiment.seeds[0]
  by_arm = {
    arm: flatten(override_config(config, experiment.settings(arm, seed, config)).to_dict())
    for arm in experiment.arms
  }
  return {
    field: {arm: fields[field] for arm, fields in by_arm.items()}
    for field, value in flatten(config.to_dict()).items()
    if field != 'seed' and any(fields[field] != value for fields in by_arm.values())
  }


def _all_costs(experiment: Experiment, folders: RunFolders) -> list[dict[str, Any]]:
  """Return the costs of each distinct run, for the stages that its arms need."""
  stages: dict[tuple[pathlib.Path, int], tuple[str, ...]] = {}
  for arm, by_seed in folders.items():
    for seed, folder in by_seed.items():
      candidates = stages.get((folder, seed), ()), experiment.arms[arm].stages
      stages[folder, seed] = max(candidates, key=len)
  return [row for run, needed in stages.items() for row in stage_costs(*run, needed)]


def stage_costs(folder: pathlib.Path, seed: int, stages: Sequence[str]) -> list[dict[str, Any]]:
  """Return one row of costs for each of the stages that has finished.

  Counts are those of the stage's last start. Memory is the peak of the process at the end of the
  stage.

  Args:
    folder: the run's folder.
    seed: the run's seed, copied into the rows.
    stages: names of stages.
  """
  manifest = read_manifest(folder / 'manifest.json')
  rows = []
  for stage, entry in manifest['stages'].items():
    if stage not in stages or 'finished' not in entry:
      continue
    jobs = [entry[job] for job in ('base', 'aligned') if job in entry] or [entry]
    rows.append(
      {
        'run': folder.name,
        'seed': seed,
        'stage': stage,
        'turns': sum(job.get('turns', 0) for job in jobs),
        'reused_turns': sum(job.get('replayed_turns', 0) for job in jobs),
        'tokens': sum(job.get('sampled_tokens', job.get('tokens', 0)) for job in jobs),
        'seconds': entry['seconds'],
        'peak_memory_bytes': entry['peak_memory_bytes'],
      }
    )
  return rows


def run_folders(
  experiment: Experiment, folder: pathlib.Path, config: ConfigDict
) -> dict[str, dict[int, pathlib.Path]]:
  """Return the folder of each run, by arm and seed. Arms with equal settings share one.

  Args:
    experiment: the arms and seeds.
    folder: the folder of all runs.
    config: the base config.
  """
  return {
    arm: {
      seed: folder
      / run_name(experiment.base, changed_settings(config, experiment.settings(arm, seed, config)))
      for seed in experiment.seeds
    }
    for arm in experiment.arms
  }
