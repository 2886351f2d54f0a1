"""Compare the widths of an experiment's paired intervals in two workdirs.

  python -m experiments.widths --experiment=experiments/revisions.py \\
    --before=runs/before --after=runs/lab --shared_model

Both workdirs must hold the finished runs of the experiment, for example sampled before and after a
change of the sampler. All intervals are computed here, by this version of the program, so that only
the responses differ. Add `--shared_model` if the runs used one embedded model for all seeds.
"""

import argparse
import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from cai_jax import pipeline
from cai_jax.cli import short_errors
from cai_jax.experiment import collect, define
from cai_jax.experiment import run as runner
from cai_jax.report.differences import format_difference
from cai_jax.runtime.terminal import say

METRICS = ('violation_rate', 'helpful_rate')


def compute_results(spec: str, workdir: pathlib.Path, shared_model: bool, seeds=()) -> dict:
  """Return the results of the finished runs of an experiment, as `collect_results` does.

  Args:
    spec: the experiment's file; see `define.load_experiment`.
    workdir: folder of the experiment.
    shared_model: whether every seed used the config's own model.
    seeds: seeds to use; () means the experiment's.

  Raises:
    UserError: if a run is missing.
  """
  name, docstring, experiment = define.load_experiment(spec)
  experiment = dataclasses.replace(
    experiment, model_by_seed=not shared_model, seeds=tuple(seeds) or experiment.seeds
  )
  config = define.load_config(experiment.base)
  runs = runner.plan_runs(experiment, config, workdir)
  folders = collect.run_folders(experiment, workdir / 'runs', config)
  measures = pipeline.load_measures(next(iter(runs.values()))[0])
  diversity = runner.load_diversity(experiment, next(iter(runs.values()))[0])
  return collect.collect_results(experiment, name, docstring, folders, measures, config, diversity)


def width_rows(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[tuple]:
  """Return (group, arm, metric, width before, width after) of each paired interval, as fractions.

  Args:
    before, after: results of the same experiment.
  """
  rows = []
  for arm, settings in before['arms'].items():
    for group, row in settings['groups'].items():
      for metric in METRICS:
        pair = [row, after['arms'][arm]['groups'][group]]
        numbers = [side.get('differences', {}).get(metric) for side in pair]
        if all(numbers):
          widths = [number['interval'][1] - number['interval'][0] for number in numbers]
          rows.append((group, arm, metric, *widths))
  return rows


def describe(before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
  """Return the table of widths, in percentage points, and their mean ratio.

  Args:
    before, after: results of the same experiment.
  """
  rows = width_rows(before, after)
  lines = [f'{"arm":24}{"metric":16}{"before":>24}{"after":>24}{"widths":>14}{"ratio":>7}']
  for group, arm, metric, old, new in rows:
    cells = ''.join(
      f'{format_difference(side["arms"][arm]["groups"][group], metric):>24}'
      for side in (before, after)
    )
    ratio = f'{new / old:.2f}' if old else '–'
    lines.append(f'{arm:24}{metric:16}{cells}{100 * old:7.1f} → {100 * new:4.1f}{ratio:>7}')
  for metric in METRICS:
    pairs = [(old, new) for *_, name, old, new in rows if name == metric and old and new]
    if pairs:
      ratio = np.exp(np.mean([np.log(new / old) for old, new in pairs]))
      lines.append(f'{metric}: geometric mean of after / before {ratio:.2f} over {len(pairs)} arms')
  return '\n'.join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
  """Print the widths in the two workdirs that the command line names."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--experiment', required=True, help="the experiment's file")
  parser.add_argument('--before', type=pathlib.Path, required=True, help='a workdir')
  parser.add_argument('--after', type=pathlib.Path, required=True, help='another workdir')
  parser.add_argument(
    '--seeds', type=lambda text: [int(s) for s in text.split(',')], default=(), help='as in a run'
  )
  parser.add_argument('--shared_model', action='store_true', help='as in a run')
  options = parser.parse_args(arguments)
  with short_errors():
    results = [
      compute_results(options.experiment, workdir, options.shared_model, options.seeds)
      for workdir in (options.before, options.after)
    ]
    say(describe(*results))


if __name__ == '__main__':
  main()
