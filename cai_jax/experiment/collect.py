"""Collect an experiment's results: scores of its arms, paired differences, and costs."""

import pathlib
import re
import types
from collections.abc import Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from cai_jax.evaluation import estimates
from cai_jax.evaluation.diversity import Measure
from cai_jax.evaluation.intervals import holm
from cai_jax.evaluation.registries import ResponseMeasure
from cai_jax.experiment.define import Experiment, changed_settings, override_config, run_name
from cai_jax.experiment.figures import figure_arms
from cai_jax.experiment.responses import read_responses
from cai_jax.report.results import COMPARED_WITH
from cai_jax.runtime.manifest import read_manifest
from cai_jax.runtime.settings import flatten

KINDS = ('harmful', 'helpful')
RunFolders = Mapping[str, Mapping[int, pathlib.Path]]  # arm → seed → folder of the run
KindValues = Mapping[str, Mapping[str, estimates.Values]]  # kind of prompts → measure → values


def collect_results(
  experiment: Experiment,
  name: str,
  docstring: str,
  folders: RunFolders,
  measures: Sequence[ResponseMeasure],
  config: ConfigDict,
  diversity: Mapping[str, Measure] = types.MappingProxyType({}),
) -> dict[str, Any]:
  """Return the results of an experiment, as `cai_jax.report.write_experiment` takes them.

  Args:
    experiment: the arms.
    name: name of the experiment's file, without suffix.
    docstring: docstring of that file.
    folders: arm → seed → folder of the finished run.
    measures: the measures of responses.
    config: the base config.
    diversity: the measures that `experiment.diversity` names.

  Raises:
    UserError: if an arm and the reference answer different prompts.
  """
  values, others = _measure_arms(experiment, folders, measures, diversity)
  arms = _arm_results(experiment, values, others)
  _add_p_values(values, others, arms)
  figures, notes = _select_figures(experiment.figures, arms)
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


def _measure_arms(
  experiment: Experiment,
  folders: RunFolders,
  measures: Sequence[ResponseMeasure],
  diversity: Mapping[str, Measure],
) -> tuple[dict[str, KindValues], dict[str, KindValues]]:
  """Return the values of each arm, and those that it is compared with.

  Args:
    experiment: the arms.
    folders: arm → seed → folder of the finished run.
    measures: the measures of responses.
    diversity: the measures that `experiment.diversity` names.

  Returns:
    Arm → its values, and arm → the values of what it is compared with. The second has no entry for
    the reference, unless that is compared with another response of its run.
  """

  def measure(arm: str, response: str = '') -> KindValues:
    settings = experiment.arms[arm]
    read = {kind: read_responses(settings, folders[arm], kind, response) for kind in KINDS}
    return {
      kind: responses.measure(measures, diversity, experiment.spent, experiment.distance)
      for kind, responses in read.items()
      if responses is not None
    }

  values = {arm: measure(arm) for arm in experiment.arms}
  others = {
    arm: measure(arm, settings.against) if settings.against else values[experiment.reference]
    for arm, settings in experiment.arms.items()
    if settings.against or arm != experiment.reference
  }
  return values, others


def _arm_results(
  experiment: Experiment, values: Mapping[str, KindValues], others: Mapping[str, KindValues]
) -> dict[str, dict[str, Any]]:
  """Return each arm's response, settings, facts, and results by kind of prompts.

  Args:
    experiment: the arms.
    values: the values of each arm.
    others: the values that each arm is compared with, if it is compared.
  """
  return {
    arm: {
      'response': settings.response,
      'overrides': dict(settings.overrides),
      'facts': {**settings.facts, **_comparison(experiment, arm)},
      'groups': {
        kind: _summarize(columns, others.get(arm, {}).get(kind, {}))
        for kind, columns in values[arm].items()
      },
    }
    for arm, settings in experiment.arms.items()
  }


def _select_figures(
  figures: Sequence[Mapping[str, Any]], arms: Mapping[str, Any]
) -> tuple[list[dict[str, Any]], list[str]]:
  """Return the figures whose measures exist, and a note for each other one.

  Args:
    figures: figure specifications.
    arms: results by arm.
  """
  selected, notes = [], []
  for figure in figures:
    if missing := _missing_measure(figure, arms):
      notes.append(f'The figure "{figure["caption"]}" is left out: {missing}.')
    else:
      selected.append(dict(figure))
  return selected, notes


def _comparison(experiment: Experiment, arm: str) -> dict[str, str]:
  """Return the fact that says what an arm is compared with, if not all have the same reference."""
  if not any(settings.against for settings in experiment.arms.values()):
    return {}
  against = experiment.arms[arm].against.replace('_', ' ')
  reference = '' if arm == experiment.reference else experiment.reference
  return {COMPARED_WITH: against or reference} if against or reference else {}


def _add_p_values(
  values: Mapping[str, KindValues], others: Mapping[str, KindValues], arms: Mapping[str, Any]
) -> None:
  """Add the p-value of each difference, and the one adjusted for its family.

  The family of a difference is all arms with the same measure of the same kind of prompts.

  Args:
    values: the values of each arm.
    others: the values that each arm is compared with, if it is compared.
    arms: results by arm, which this function changes.
  """
  families: dict[tuple[str, str], list[str]] = {}
  for arm, results in arms.items():
    for kind, group in results['groups'].items():
      for measure in group.get('differences', {}):
        families.setdefault((kind, measure), []).append(arm)
  for (kind, measure), family in families.items():
    p_values = [
      estimates.difference_p_value(values[arm][kind][measure], others[arm][kind][measure])
      for arm in family
    ]
    for arm, p, adjusted in zip(family, p_values, holm(p_values), strict=True):
      entry = arms[arm]['groups'][kind]['differences'][measure]
      entry['p_value'], entry['adjusted_p_value'] = p, adjusted


def _missing_measure(figure: Mapping[str, Any], arms: Mapping[str, Any]) -> str:
  """Return which measure of a figure is missing, or '' if the results have all of them."""
  if figure['kind'] == 'frontier':
    shown = {tuple(figure['x']), tuple(figure['y'])}
  else:
    metrics = figure.get('metrics') or [series['metric'] for series in figure['series']]
    shown = {(figure['group'], metric) for metric in metrics}
  numbers = 'differences' if figure['kind'] == 'differences' else 'metrics'
  for group, metric in sorted(shown):
    for arm in sorted(figure_arms(figure)):
      if metric not in arms[arm]['groups'].get(group, {}).get(numbers, {}):
        return f'there is no {metric} of {group} prompts for {arm!r}'
  return ''


def _summarize(
  columns: Mapping[str, estimates.Values], other: Mapping[str, estimates.Values]
) -> dict[str, Any]:
  """Return an arm's count and means, and its paired differences to what it is compared with.

  Args:
    columns: measure → seed → prompt id → value.
    other: the same for what the arm is compared with; it may lack measures, or all of them.
  """
  count = sum(map(len, next(iter(columns.values())).values()))
  metrics = {}
  for name, values in columns.items():
    by_seed = {str(s): sum(column.values()) / len(column) for s, column in values.items()}
    metrics[name] = _as_dict(estimates.estimate_mean(values)) | {'by_seed': by_seed}
  group: dict[str, Any] = {'count': count, 'metrics': metrics}
  if other:
    group['differences'] = {
      name: _as_dict(estimates.estimate_difference(values, other[name]))
      for name, values in columns.items()
      if name in other
    }
  return group


def _as_dict(estimate: estimates.Estimate) -> dict[str, Any]:
  return {'value': estimate.value, 'interval': [estimate.low, estimate.high]}


def _config_differences(experiment: Experiment, config: ConfigDict) -> dict[str, dict[str, Any]]:
  """Return field → arm → value for the fields in which any arm differs from the base config."""
  seed = experiment.seeds[0]
  by_arm = {}
  for arm, settings in experiment.arms.items():
    by_arm[arm] = flatten(override_config(config, experiment.settings(arm, seed, config)).to_dict())
    if settings.start:
      by_arm[arm]['model.base'] = f'M_aligned of {settings.start}'
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
    # The stage evaluate counts the turns of each model apart.
    parts: list[dict[str, Any]] = [x for x in entry.values() if isinstance(x, dict)]
    jobs = [part for part in parts if 'turns' in part] or [entry]
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
  folders: dict[str, dict[int, pathlib.Path]] = {}
  for arm, settings in experiment.arms.items():
    folders[arm] = {}
    for seed in experiment.seeds:
      changed = changed_settings(config, experiment.settings(arm, seed, config))
      if settings.start:  # a name that does not depend on where the folders are
        # The last characters of a run's name are a hash of all its settings.
        changed['model.base'] = f'{folders[settings.start][seed].name[-8:]}/model'
      folders[arm][seed] = folder / run_name(experiment.base, changed)
  return folders


def start_models(experiment: Experiment, folders: RunFolders) -> dict[pathlib.Path, pathlib.Path]:
  """Return the model that each run starts from, for arms that start from another arm's M_aligned.

  Args:
    experiment: the arms and seeds.
    folders: folder of each run, by arm and seed.

  Returns:
    Folder of the run → folder of the model, which exists when the other arm's run is done.
  """
  return {
    folders[arm][seed]: folders[settings.start][seed] / 'model'
    for arm, settings in experiment.arms.items()
    if settings.start
    for seed in experiment.seeds
  }
