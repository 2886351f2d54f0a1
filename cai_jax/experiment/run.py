"""Run an experiment: every arm with every seed, then its figures and its report.

  python -m cai_jax.experiment --experiment=experiments/revisions.py --workdir=runs/lab

Runs are stored in WORKDIR/runs, in folders named after their settings, and all sampled turns in
WORKDIR/journal. Arms and experiments in the same workdir therefore share turns and runs: a finished
run is not repeated, and an interrupted one continues. Results are written to WORKDIR/NAME:
results.json, report.html, and each figure as an SVG and a PDF file.

WORKDIR may be the URL of a folder in a store, such as s3://bucket/lab. The experiment then works in
a local folder, and what changes there is in the store within seconds. Start the same command on any
machine to continue.
"""

import argparse
import dataclasses
import functools
import os
import pathlib
from collections.abc import Callable, Mapping

from ml_collections import ConfigDict

from cai_jax import pipeline
from cai_jax.cli import short_errors
from cai_jax.data import d_cai
from cai_jax.evaluation.diversity import DIVERSITY, Measure
from cai_jax.evaluation.power import describe_power
from cai_jax.experiment import collect, define, estimate, grammar
from cai_jax.experiment.define import Experiment
from cai_jax.experiment.plan import plan_runs
from cai_jax.pipeline import Run
from cai_jax.pipeline.space import check_space
from cai_jax.report import experiment_table, write_experiment, write_figures
from cai_jax.runtime import lock
from cai_jax.runtime.cloud.workdir import Workdir, resolve_workdir
from cai_jax.runtime.errors import UserError
from cai_jax.runtime.files import check_workdir, make_folder, write_json
from cai_jax.runtime.manifest import Manifest
from cai_jax.runtime.terminal import say
from cai_jax.scoring.loader import Inspected
from cai_jax.scoring.scorer import Scorer

Plan = Mapping[pathlib.Path, tuple[Run, tuple[str, ...]]]  # folder → run and its stages


def run_experiment(spec: str, workdir: str | os.PathLike, options: argparse.Namespace) -> None:
  """Run an experiment and write its results, or print an estimate for a dry run.

  Args:
    spec: the experiment's file; see `load_experiment`.
    workdir: folder of the experiment, or its URL; several experiments may share it.
    options: `arms`, `seeds`, `shared_model`, `config` and `dry_run` of the command line.

  Raises:
    UserError: if an experiment, arm or field does not exist, a run cannot be built, or the URL
      cannot be used.
  """
  place = resolve_workdir(os.fspath(workdir))
  place = dataclasses.replace(place, folder=os.path.realpath(os.path.expanduser(place.folder)))
  name, docstring, experiment = define.load_experiment(spec, options.config or '')
  if options.arms:
    experiment = experiment.select(options.arms)
  if options.shared_model:
    experiment = dataclasses.replace(experiment, model_by_seed=False)
  if options.seeds:
    experiment = dataclasses.replace(experiment, seeds=tuple(options.seeds))
  config = define.load_config(experiment.base)
  runs: Plan
  plan = functools.partial(plan_runs, experiment, config)
  if options.dry_run:
    with place.look() as folder:
      runs = plan(folder, dataclasses.replace(place, folder=str(folder)).show)
      say(estimate.describe(name, runs, estimate.SampledTurns(folder)))
      say(_describe_power(experiment, next(iter(runs.values()))[0]))
    return
  with place.open() as stage_ended:
    folder = pathlib.Path(place.folder)
    runs = plan(folder, place.show)
    check_workdir(folder)
    _check_diversity(experiment, next(iter(runs.values()))[0])
    with lock.hold(folder):
      folders = collect.run_folders(experiment, folder / 'runs', config)
      starts = collect.start_models(experiment, folders)
      again = functools.partial(plan, folder, place.show)
      runs, totals = _run_all(runs, place, starts, again, stage_ended)
      _write_results(name, docstring, experiment, config, runs, folder)
      say(
        f'{totals["runs"]} of {len(runs)} runs had work left: {totals["turns"]:,} turns sampled, '
        f'{totals["reused_turns"]:,} taken from the journal, {totals["seconds"] / 60:.1f} minutes\n'
        f'report: {place.show(str(folder / name / "report.html"))}'
      )


def _describe_power(experiment: Experiment, run: Run) -> str:
  """Return the smallest differences that the arms of an experiment can show, by kind of prompt."""
  held_out = any(arm.response in define.HELD_OUT_RESPONSES for arm in experiment.arms.values())
  prefix = 'eval_' if held_out else ''
  counts = {kind: len(run.prompts[prefix + kind]) for kind in collect.KINDS}
  return '\n'.join(
    f'{kind} prompts: {describe_power(count, len(experiment.seeds))}'
    for kind, count in counts.items()
    if count
  )


def _run_all(
  runs: Plan,
  place: Workdir,
  starts: Mapping[pathlib.Path, pathlib.Path],
  plan: Callable[[], Plan],
  stage_ended: Callable[[], None],
) -> tuple[Plan, dict[str, float]]:
  """Run all planned runs.

  Args:
    runs: the runs.
    place: where the experiment works.
    starts: the model of each run that starts from one that another run trains.
    plan: plans the runs again, when such a model exists.
    stage_ended: called after each stage of a run.

  Returns:
    The runs, and the total costs of the stages that were not done before.
  """
  for folder, (run, stages) in runs.items():
    if not all(Manifest(folder, writes=False).done(stage) for stage in stages):
      pipeline.check_run(run, stages)
  sampled = estimate.SampledTurns(pathlib.Path(place.folder))
  check_space(estimate.estimate_disk(runs, sampled))
  totals: dict[str, float] = dict.fromkeys(('runs', 'turns', 'reused_turns', 'seconds'), 0)
  for number, folder in enumerate(runs, 1):
    if folder in starts and runs[folder][0].config.model.base != str(starts[folder]):
      runs = plan()
    run, stages = runs[folder]
    say(f'[{number}/{len(runs)}] {folder.name}')
    done = [stage for stage in stages if Manifest(folder, writes=False).done(stage)]
    pipeline.run_stages(run, stages, lambda text: say(place.show(text)), stage_ended)
    sampled.add(estimate.count_turns(run, stages))
    costs = collect.stage_costs(folder, run.config.seed, stages)
    costs = [row for row in costs if row['stage'] not in done]
    totals['runs'] += bool(costs)
    for row in costs:
      for key in ('turns', 'reused_turns', 'seconds'):
        totals[key] += row[key]
  return runs, totals


def _write_results(
  name: str,
  docstring: str,
  experiment: Experiment,
  config: ConfigDict,
  runs: Plan,
  workdir: pathlib.Path,
) -> None:
  """Collect the results of finished runs, write them to files and print the table."""
  folders = collect.run_folders(experiment, workdir / 'runs', config)
  first = next(iter(runs.values()))[0]
  measures, diversity = pipeline.load_measures(first), load_diversity(experiment, first)
  results = collect.collect_results(
    experiment, name, docstring, folders, measures, config, diversity
  )
  grammar.add_grammar(
    results, experiment, folders, {folder: run for folder, (run, _) in runs.items()}
  )
  output = make_folder(workdir / name)
  write_json(output / 'results.json', results)
  write_figures(output, results)
  scorer = pipeline.load_scorer(first)
  chains = select_chains(experiment, folders, scorer, config.report.chains)
  write_experiment(output / 'report.html', results, chains)
  say('\n'.join(['', experiment_table(results), *results['notes'], '']))


def load_diversity(experiment: Experiment, run: Run) -> dict[str, Measure]:
  """Return the measures of diversity that an experiment names, with M_θ of a run for embeddings.

  Args:
    experiment: names the measures.
    run: its M_θ embeds the texts of all arms and seeds, so that they can be compared.
  """
  loader = pipeline.model_loader(run)
  return {name: DIVERSITY[name](loader) for name in experiment.diversity}


def _check_diversity(experiment: Experiment, run: Run) -> None:
  """Check that the model which embeds texts can be loaded, before the first run begins."""
  loader = pipeline.model_loader(run, inspect_only=True)
  for name in experiment.diversity:
    try:
      DIVERSITY[name](loader)
    except Inspected:
      pass
    except UserError as error:
      raise UserError(f'diversity, {name!r}: {error}') from error


def select_chains(
  experiment: Experiment,
  folders: collect.RunFolders,
  scorer: Scorer | None,
  count: int,
) -> list[dict]:
  """Return about `count` chains of the first seed's runs for the report, each with its arm.

  If several arms share a dataset, its chains appear under the last of them.

  Args:
    experiment: the arms and seeds.
    folders: folder of each run, by arm and seed.
    scorer: names the rules that each response breaks; None judges nothing.
    count: number of chains.

  """
  seed = experiment.seeds[0]
  datasets: dict[pathlib.Path, str] = {}
  for arm, settings in experiment.arms.items():
    dataset = define.HELD_OUT_RESPONSES.get(settings.response, 'd_cai')
    datasets[folders[arm][seed] / dataset] = arm
  chains = []
  for folder, arm in datasets.items():
    rows = d_cai.read_rows(folder)
    for number in range(min(len(rows), count // len(datasets))):
      chain = pipeline.browsable(rows[number], scorer)
      chains.append(chain | {'arm': arm, 'id': f'{chain["id"]} ({arm})'})
  return chains


def main() -> None:
  """Run the experiment that the command line names."""
  parser = argparse.ArgumentParser(
    prog='python -m cai_jax.experiment',
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument(
    '--experiment', required=True, help='Python file, optionally followed by :TEXT for it'
  )
  parser.add_argument(
    '--workdir', required=True, help='folder for all results, or its URL in a store'
  )
  parser.add_argument(
    '--arms', type=lambda text: text.split(','), help='arms to run, separated by commas'
  )
  parser.add_argument(
    '--seeds',
    type=lambda text: [int(s) for s in text.split(',')],
    help='seeds, separated by commas; default: 0,1,2. Each arm runs once with each. A seed varies '
    'generated prompts, all draws, the order of training examples and, in the embedded world, the '
    'pre-trained model (tiny, tiny-1, tiny-2)',
  )
  parser.add_argument(
    '--shared_model',
    action='store_true',
    help="start every seed from the config's own model, also in the embedded world",
  )
  parser.add_argument('--config', help="base config to use instead of the experiment's")
  parser.add_argument(
    '--dry_run', action='store_true', help='only print what would run and what it would cost'
  )
  options = parser.parse_args()
  with short_errors():
    run_experiment(options.experiment, options.workdir, options)
