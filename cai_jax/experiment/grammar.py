"""The truth beside an experiment in the embedded world: what the grammar gives at each arm."""

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

from cai_jax.constitution import Constitution
from cai_jax.experiment import collect
from cai_jax.experiment.define import Arm, Experiment
from cai_jax.experiment.responses import read_responses
from cai_jax.pipeline.ground_truth import COLUMNS, PREFIX, grammar_rates
from cai_jax.pipeline.run import Run
from cai_jax.report.palette import COLOURS

NOTE = (
  'grammar: what the grammar of the embedded world gives by itself at the settings of the arm. A '
  'rate that agrees with it shows that the pipeline recovers what the model was trained on, and '
  'nothing about the method. A dash: the grammar does not define this arm.'
)


def add_grammar(
  results: dict[str, Any],
  experiment: Experiment,
  folders: collect.RunFolders,
  runs: Mapping[pathlib.Path, Run],
) -> None:
  """Add the grammar's rates, their columns, their lines in figures and a note to the results.

  Nothing is added to an experiment outside the embedded world.

  Args:
    results: the result of `collect.collect_results`, changed in place.
    experiment: the arms.
    folders: arm → seed → folder of the finished run.
    runs: the run of each folder.
  """
  simulated: dict[Any, dict[str, dict[str, float]]] = {}
  found = set()
  for arm, kind in ((arm, kind) for arm in experiment.arms for kind in collect.KINDS):
    if kind not in results['arms'][arm]['groups']:
      continue
    settings = experiment.arms[arm]
    responses = read_responses(settings, folders[arm], kind)
    assert responses is not None, 'the group has responses'
    totals, weight = dict.fromkeys((f'{PREFIX}{column}' for column in COLUMNS), 0.0), 0
    for seed, prompts in responses.prompts.items():
      key = folders[arm][seed], kind, settings.principle, tuple(prompts)
      if key not in simulated:
        run = _with_principle(runs[folders[arm][seed]], settings)
        simulated[key] = grammar_rates(run, list(prompts.values()), kind)
      rates = simulated[key].get(settings.response) if _is_defined(settings) else None
      if rates is None:
        break
      totals = {name: total + len(prompts) * rates[name] for name, total in totals.items()}
      weight += len(prompts)
    else:
      metrics = results['arms'][arm]['groups'][kind]['metrics']
      for name, total in totals.items():
        metrics[name] = {'value': total / weight, 'interval': None, 'by_seed': {}}
      found.add((arm, kind))
  if found:
    _show_grammar(results, found)


def _is_defined(arm: Arm) -> bool:
  """Return whether the grammar can say what an arm gives: later rounds follow drawn principles."""
  return not arm.principle or arm.response == 'revision_1'


def _with_principle(run: Run, arm: Arm) -> Run:
  """Return the run with the principle of an arm alone, under which its prompts were revised."""
  kept = [p for p in run.constitution.principles if p.id == arm.principle]
  return dataclasses.replace(run, constitution=Constitution(tuple(kept))) if kept else run


def _show_grammar(results: dict[str, Any], found: set[tuple[str, str]]) -> None:
  """Put each column of the grammar after the model's, and its line into each line figure."""
  columns = []
  for name in results['metrics']:
    columns += [name, f'{PREFIX}{name}'] if name in COLUMNS else [name]
  results['metrics'] = columns
  results['notes'].append(NOTE)
  for figure in results['figures']:
    if figure['kind'] != 'line':
      continue
    lines = [
      series | {'name': f'{series["name"]}: grammar', 'metric': f'{PREFIX}{series["metric"]}'}
      for series in figure['series']
      if series['metric'] in COLUMNS
      and sum((arm, figure['group']) in found for arm in series['arms']) >= 2
    ]
    if len(figure['series']) + len(lines) <= len(COLOURS):
      figure['series'] = [*figure['series'], *lines]
