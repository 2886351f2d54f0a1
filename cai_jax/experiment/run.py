"""Runs an experiment: every arm with every seed, its figures and its report.

  python -m cai_jax.experiment --experiment=experiments/revisions.py --workdir=runs/lab

Runs lie in WORKDIR/runs under names of their settings, and all sampled turns in WORKDIR/journal, so
arms share what they have in common, with each other and with other experiments in the same workdir;
a run that is done is not done again, and one that was killed goes on. The results are in
WORKDIR/NAME: collect.json, report.html, and each figure as an .svg file.
"""

import argparse
import contextlib
import dataclasses
import fcntl
import itertools
import pathlib
from collections.abc import Iterator, Mapping

from ml_collections import ConfigDict

from cai_jax import pipeline
from cai_jax.cli import short_errors
from cai_jax.data import d_cai
from cai_jax.experiment import collect, estimate
from cai_jax.experiment import define as experiments
from cai_jax.experiment.define import Experiment
from cai_jax.pipeline import Run
from cai_jax.pipeline import checks as check
from cai_jax.report import experiment_table, write_experiment, write_figures
from cai_jax.runtime.errors import UserError
from cai_jax.runtime.files import check_workdir, write_json
from cai_jax.runtime.manifest import Manifest


def planned(
  experiment: Experiment, config, workdir: pathlib.Path
) -> dict[pathlib.Path, tuple[Run, tuple[str, ...]]]:
  """The runs of an experiment with their stages, by folder, a seed's after another's; all checked.

  Raises:
    ValueError: for whatever is wrong with an arm, before any work.
  """
  folders = collect.workdirs_of(experiment, workdir / 'runs', config)
  found: dict[pathlib.Path, tuple[Run, tuple[str, ...]]] = {}
  for seed, arm in itertools.product(experiment.seeds, experiment.arms):
    folder, needed = folders[arm][seed], experiment.arms[arm].stages
    if folder in found:
      found[folder] = found[folder][0], max(found[folder][1], needed, key=len)
      continue
    settings = experiments.overridden(config, experiment.settings(arm, seed))
    try:
      run = pipeline.build(settings, folder, journal=workdir / 'journal')
    except ValueError as error:
      raise UserError(f'arm {arm!r}: {error}') from error
    found[folder] = run, needed
  return found


def run(spec: str, workdir: pathlib.Path, options: argparse.Namespace) -> None:
  """Runs what the options ask for and writes the results.

  Raises:
    ValueError: for an unknown experiment, arm or field, and as `pipeline.build`.
  """
  name, docstring, experiment = experiments.load(spec)
  if options.arms:
    experiment = experiment.only(options.arms)
  changes = {'base': options.config or experiment.base, 'seeds': tuple(options.seeds or ())}
  experiment = dataclasses.replace(experiment, **{k: v for k, v in changes.items() if v})
  config = experiments.base_config(experiment.base)
  runs = planned(experiment, config, workdir)
  if options.dry_run:
    print(estimate.describe(name, runs, estimate.Known(workdir)))
    return
  check_workdir(workdir)
  with alone(workdir):
    _run(name, docstring, experiment, config, runs, workdir)


def _run(
  name: str,
  docstring: str,
  experiment: Experiment,
  config: ConfigDict,
  runs: Mapping[pathlib.Path, tuple[Run, tuple[str, ...]]],
  workdir: pathlib.Path,
) -> None:
  """Runs the runs that are planned and writes the results."""
  for folder, (planned_run, stages) in runs.items():
    if not all(Manifest(folder, writes=False).done(stage) for stage in stages):
      check(planned_run, stages)
  known = estimate.Known(workdir)
  counts = dict.fromkeys(('runs', 'turns', 'reused_turns', 'seconds'), 0)
  for number, (folder, (planned_run, stages)) in enumerate(runs.items(), 1):
    print(f'[{number}/{len(runs)}] {folder.name}', flush=True)
    done = [stage for stage in stages if Manifest(folder, writes=False).done(stage)]
    pipeline.run_stages(planned_run, stages)
    known.add(estimate.turns(planned_run, stages))
    costs = [
      row
      for row in collect.costs(folder, planned_run.config['seed'], stages)
      if row['stage'] not in done
    ]
    counts['runs'] += bool(costs)
    for row in costs:
      for key in ('turns', 'reused_turns', 'seconds'):
        counts[key] += row[key]
  folders = collect.workdirs_of(experiment, workdir / 'runs', config)
  first = next(iter(runs.values()))[0]
  scorer = pipeline.load_scorer(first)
  found = collect.collect(
    experiment, name, docstring, folders, scorer, pipeline.measures(first), config
  )
  output = workdir / name
  output.mkdir(parents=True, exist_ok=True)
  write_json(output / 'results.json', found)
  write_figures(output, found)
  chains = browsable(experiment, folders, scorer, config.report.chains)
  write_experiment(output / 'report.html', found, chains)
  print(
    f'\n{experiment_table(found)}\n\n{counts["runs"]} of {len(runs)} runs had work left: '
    f'{counts["turns"]:,} turns sampled, {counts["reused_turns"]:,} taken from the journal, '
    f'{counts["seconds"] / 60:.1f} minutes\nreport: {output / "report.html"}'
  )


@contextlib.contextmanager
def alone(workdir: pathlib.Path) -> Iterator[None]:
  """Keeps other experiments out of the workdir, whose journal one process may write.

  Raises:
    ValueError: if another is running there.
  """
  with open(workdir / 'lock', 'w') as lock:
    try:
      fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      raise UserError(
        f'{workdir}: another experiment is running there. Wait for it, or take another workdir.'
      ) from None
    yield


def browsable(
  experiment: Experiment,
  folders: Mapping[str, Mapping[int, pathlib.Path]],
  scorer,
  count: int,
) -> list[dict]:
  """Chains of the first seed's runs for the report, about `count` in all, each with its arm."""
  seed = experiment.seeds[0]
  sources: dict[pathlib.Path, str] = {}  # of arms that have one in common, the last
  for arm, settings in experiment.arms.items():
    source = experiments.TRAINED.get(settings.response, 'd_cai')
    sources[folders[arm][seed] / source] = arm
  chains = []
  for folder, arm in sources.items():
    rows = d_cai.read_rows(folder)
    for number in range(min(len(rows), count // len(sources))):
      chain = pipeline.browsable(rows[number], scorer)
      chains.append(chain | {'arm': arm, 'id': f'{chain["id"]} ({arm})'})
  return chains


def main() -> None:
  """Reads the flags."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--experiment', required=True, help='file, maybe with :text for it')
  parser.add_argument('--workdir', type=pathlib.Path, required=True)
  parser.add_argument('--arms', type=lambda text: text.split(','), help='some of them, by comma')
  parser.add_argument('--seeds', type=lambda text: [int(s) for s in text.split(',')])
  parser.add_argument('--config', help="another base config than the experiment's")
  parser.add_argument(
    '--dry_run', action='store_true', help='tell what would be done, and what it would take'
  )
  options = parser.parse_args()
  with short_errors():
    run(options.experiment, options.workdir, options)
