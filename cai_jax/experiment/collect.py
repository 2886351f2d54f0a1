"""Scores of an experiment's arms from the rows that its runs wrote, with paired differences."""

import dataclasses
import functools
import json
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from cai_jax.data import d_cai
from cai_jax.evaluation import compare, summary
from cai_jax.experiment.define import (
  TRAINED,
  Arm,
  Experiment,
  changed,
  drawn_arms,
  overridden,
  run_name,
)
from cai_jax.runtime.errors import UserError
from cai_jax.runtime.settings import flatten
from cai_jax.scoring import scorer

KINDS = ('harmful', 'helpful')


@dataclasses.dataclass(frozen=True)
class Responses:
  """The responses of an arm to the prompts of one kind, by seed and prompt id."""

  prompts: Mapping[int, Mapping[str, list[dict[str, str]]]]
  turns: Mapping[int, Mapping[str, dict[str, Any]]]

  def measured(
    self,
    scorer: scorer.Scorer | None,
    further: Mapping[str, scorer.Measure],
    diversity: bool = False,
  ) -> dict[str, compare.Values]:
    """Measure → seed → prompt id → value."""
    found: dict[str, dict[int, dict[str, float]]] = {}
    for seed, turns in self.turns.items():
      prompts = self.prompts[seed]
      columns = summary.measures(list(prompts.values()), list(turns.values()), scorer, further)
      if diversity:
        columns['diversity'] = compare.diversity([turn['text'] for turn in turns.values()])
      for name, values in columns.items():
        found.setdefault(name, {})[seed] = dict(zip(turns, values, strict=True))
    return found


def responses(arm: Arm, workdirs: Mapping[int, pathlib.Path], kind: str) -> Responses | None:
  """An arm's responses; None where its runs have fewer than two prompts of the kind.

  Args:
    arm: what is scored.
    workdirs: of its runs, by seed.
    kind: 'harmful' or 'helpful'; of helpful prompts D_CAI holds the initial response alone.

  Raises:
    ValueError: if a run has no such revision.
  """
  prompts, turns = {}, {}
  for seed, workdir in workdirs.items():
    rows = [row for row in _rows(arm, workdir) if row['kind'] == kind]
    prompts[seed] = {row['id']: row['prompt'] for row in rows}
    turns[seed] = {row['id']: _response(arm.response, row) for row in rows}
  return Responses(prompts, turns) if all(len(t) > 1 for t in turns.values()) else None


@functools.cache
def _read(folder: pathlib.Path) -> tuple[dict[str, Any], ...]:
  """The rows of a dataset that is done, without what is not scored: arms ask for them again."""
  kept = ('id', 'kind', 'prompt', 'initial', 'rounds')
  return tuple({name: row[name] for name in kept} for row in d_cai.read_rows(folder))


def _rows(arm: Arm, workdir: pathlib.Path) -> Sequence[Mapping[str, Any]]:
  if arm.response not in TRAINED:
    return [row for row in _read(workdir / 'd_cai') if row['rounds']]
  kinds = {row['id']: row['kind'] for row in _read(workdir / 'evaluation' / 'base')}
  rows = _read(workdir / TRAINED[arm.response])
  # To M_aligned's run all prompts are to be answered and not revised: kinds are those of M_θ's.
  return [row | {'kind': kinds[row['id']]} for row in rows]


def _response(name: str, row: Mapping[str, Any]) -> dict[str, Any]:
  if name in ('initial', 'base', 'aligned') or (name == 'revised' and not row['rounds']):
    return row['initial']
  number = (
    len(row['rounds']) if name in ('last', 'revised') else int(name.removeprefix('revision_'))
  )
  if number > len(row['rounds']):
    raise UserError(f'{name} is asked for, and the run has {len(row["rounds"])} rounds.')
  return row['rounds'][number - 1]['revision']


def collect(
  experiment: Experiment,
  name: str,
  docstring: str,
  workdirs: Mapping[str, Mapping[int, pathlib.Path]],
  scorer: scorer.Scorer | None,
  further: Mapping[str, scorer.Measure],
  config: ConfigDict,
) -> dict[str, Any]:
  """The results of an experiment as `cai_jax.report.write_experiment` takes them.

  Args:
    experiment: the arms.
    name, docstring: of its file.
    workdirs: arm → seed → folder of its run.
    scorer: judges a response, or None.
    further: measures beside the scorer's, by name.
    config: the base config.

  Raises:
    ValueError: if an arm answers other prompts than the reference.
  """
  measured = {
    arm: {
      kind: found.measured(scorer, further, experiment.diversity)
      for kind in KINDS
      if (found := responses(experiment.arms[arm], workdirs[arm], kind)) is not None
    }
    for arm in experiment.arms
  }
  reference = measured[experiment.reference]
  arms = {
    arm: {
      'response': settings.response,
      'overrides': dict(settings.overrides),
      'facts': dict(settings.facts),
      'groups': {
        kind: _group(columns, None if arm == experiment.reference else reference.get(kind))
        for kind, columns in measured[arm].items()
      },
    }
    for arm, settings in experiment.arms.items()
  }
  metrics = list(dict.fromkeys(m for found in measured.values() for g in found.values() for m in g))
  figures, notes = [], []
  for figure in experiment.figures:
    if missing := _missing(figure, arms):
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
    'metrics': metrics,
    'arms': arms,
    'figures': figures,
    'config_differences': _config_differences(experiment, config),
    'costs': _all_costs(experiment, workdirs),
    'notes': notes,
  }


def _missing(figure: Mapping[str, Any], arms: Mapping[str, Any]) -> str:
  """What a figure shows that was not measured; '' where all was."""
  if figure['kind'] == 'frontier':
    shown = {tuple(figure['x']), tuple(figure['y'])}
  else:
    metrics = figure.get('metrics') or [line['metric'] for line in figure['series']]
    shown = {(figure['group'], metric) for metric in metrics}
  for group, metric in sorted(shown):
    for arm in sorted(drawn_arms(figure)):
      if metric not in arms[arm]['groups'].get(group, {'metrics': {}})['metrics']:
        return f'there is no {metric} of {group} prompts for {arm!r}'
  return ''


def _group(
  columns: Mapping[str, compare.Values], reference: Mapping[str, compare.Values] | None
) -> dict[str, Any]:
  """An arm's count and means, and where there is a reference its paired differences to that."""
  count = sum(map(len, next(iter(columns.values())).values()))
  metrics = {}
  for name, values in columns.items():
    by_seed = {str(s): sum(found.values()) / len(found) for s, found in values.items()}
    metrics[name] = _told(compare.mean(values)) | {'by_seed': by_seed}
  group = {'count': count, 'metrics': metrics}
  if reference is not None:
    group['differences'] = {
      name: _told(compare.paired_difference(values, reference[name]))
      for name, values in columns.items()
    }
  return group


def _told(estimate: compare.Estimate) -> dict[str, Any]:
  return {'value': estimate.value, 'interval': [estimate.low, estimate.high]}


def _config_differences(experiment: Experiment, config) -> dict[str, dict[str, Any]]:
  """Field → arm → value, of the fields in which an arm differs from the base config."""
  base = flatten(config.to_dict())
  found: dict[str, dict[str, Any]] = {}
  of = {
    arm: flatten(overridden(config, experiment.settings(arm, experiment.seeds[0])).to_dict())
    for arm in experiment.arms
  }
  for field, value in base.items():
    if field != 'seed' and any(fields[field] != value for fields in of.values()):
      found[field] = {arm: fields[field] for arm, fields in of.items()}
  return found


def _all_costs(
  experiment: Experiment, workdirs: Mapping[str, Mapping[int, pathlib.Path]]
) -> list[dict[str, Any]]:
  """The costs of each run once, in the stages that its arms need."""
  stages: dict[tuple[pathlib.Path, int], tuple[str, ...]] = {}
  for arm, seeds in workdirs.items():
    for seed, folder in seeds.items():
      both = stages.get((folder, seed), ()), experiment.arms[arm].stages
      stages[folder, seed] = max(both, key=len)
  return [row for run, needed in stages.items() for row in costs(*run, needed)]


def costs(workdir: pathlib.Path, seed: int, stages: Sequence[str]) -> list[dict[str, Any]]:
  """What those of the stages that are done sampled, found in the journal, and took.

  Counts are those of a stage's last start; memory is the process's most until then.
  """
  manifest = json.loads((workdir / 'manifest.json').read_text(encoding='utf-8'))
  found = []
  for stage, entry in manifest['stages'].items():
    if stage not in stages or 'finished' not in entry:
      continue
    jobs = [entry[job] for job in ('base', 'aligned') if job in entry] or [entry]
    found.append(
      {
        'run': workdir.name,
        'seed': seed,
        'stage': stage,
        'turns': sum(job.get('turns', 0) for job in jobs),
        'reused_turns': sum(job.get('replayed_turns', 0) for job in jobs),
        'tokens': sum(job.get('sampled_tokens', job.get('tokens', 0)) for job in jobs),
        'seconds': entry['seconds'],
        'peak_memory_bytes': entry['peak_memory_bytes'],
      }
    )
  return found


def workdirs_of(
  experiment: Experiment, folder: pathlib.Path, config: ConfigDict
) -> dict[str, dict[int, pathlib.Path]]:
  """Arm → seed → the folder of its run; arms of equal settings have the same."""
  return {
    arm: {
      seed: folder / run_name(experiment.base, changed(config, experiment.settings(arm, seed)))
      for seed in experiment.seeds
    }
    for arm in experiment.arms
  }
