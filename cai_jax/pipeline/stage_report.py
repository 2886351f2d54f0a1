"""Stage `report`: write a page about the run."""

import pathlib
from collections.abc import Mapping
from typing import Any

from cai_jax.data import quality_summary
from cai_jax.data.ended import describe_ended
from cai_jax.evaluation.power import smallest_difference
from cai_jax.pipeline.baselines import describe_results
from cai_jax.pipeline.costs import describe_costs
from cai_jax.pipeline.import_results import IMPORTED, with_imported
from cai_jax.pipeline.models import load_scorer
from cai_jax.pipeline.policies import trains_preferences
from cai_jax.pipeline.policy_table import describe_trainings, policy_table
from cai_jax.pipeline.quality_gate import flag_intervals
from cai_jax.pipeline.rate import describe_ratings
from cai_jax.pipeline.report_chains import read_answers, read_d_cai
from cai_jax.pipeline.run import Run
from cai_jax.report import Diagnosis, find_problems, write_report
from cai_jax.report.findings import JUDGE_SHAPE
from cai_jax.report.numbers import check_summary
from cai_jax.report.run_page import MANIFEST_SHAPE
from cai_jax.runtime import processes
from cai_jax.runtime.errors import UserError
from cai_jax.runtime.files import read_json
from cai_jax.runtime.shapes import check_shape
from cai_jax.training import metrics

_SUMMARY, _MODELS, _QUALITY = 'evaluation/summary.json', 'evaluation/models.json', 'quality.json'


def write_run_report(run: Run, manifest: Mapping[str, Any]) -> dict[str, Any]:
  """Write `report.html`, in process 0.

  Args:
    run: the run.
    manifest: the run's manifest, which the page shows.

  Returns:
    The number of chains on the page, for the manifest; empty in other processes.

  Raises:
    UserError: if a file that an earlier stage wrote is missing or damaged; the message names it.
  """
  return processes.run_on_process_0('write the report', lambda: _write(run, manifest)) or {}


def _write(run: Run, manifest: Mapping[str, Any]) -> dict[str, Any]:
  stages = manifest['stages']
  needed = {'generate': _QUALITY, 'train': metrics.METRICS_FILE}  # of the stages that this run has
  _check_files(run, [_SUMMARY, _MODELS, *(needed[name] for name in needed if name in stages)])
  check_shape(manifest, MANIFEST_SHAPE, str(run.workdir / 'manifest.json'))
  texts = {}
  if trains_preferences(run.config):
    texts['Policies compared'] = _compare_policies(run)
    texts['Training on preferences'] = describe_trainings(run, manifest)
  texts |= {'Models': _describe_models(run), 'Ratings by people': describe_ratings(run.workdir)}
  if 'generate' in stages:
    texts = {'Quality of the revisions': describe_quality(run.workdir / _QUALITY)} | texts
    if ended := describe_ended(run.workdir / 'd_cai', stages['generate']['rows_in']):
      texts = {'Chains without a row': ended} | texts
  if costs := describe_costs(run):
    texts['Costs of served models'] = costs
  external = run.config.data.d_cai and (run.d_cai / 'dataset_info.json').exists()  # else it is gone
  has_d_cai = external or 'generate' in stages
  scorer, limit = load_scorer(run), run.config.report.chains
  chains = read_d_cai(run.d_cai, run.workdir, scorer, limit) if has_d_cai else []
  answers = read_answers(run.workdir / 'evaluation', _read_judge(run.workdir), scorer, limit)
  write_report(
    run.workdir / 'report.html',
    title=run.workdir.name,
    config=run.values,
    manifest=manifest,
    summary=read_summary(run.workdir / _SUMMARY),
    training=metrics.read_rows(run.workdir / metrics.METRICS_FILE) if 'train' in stages else [],
    held_out=metrics.read_rows(run.workdir / metrics.HELD_OUT_FILE),
    probes=metrics.read_rows(run.workdir / metrics.PROBES_FILE),
    texts=texts,
    chains=chains + answers,
    diagnosis=diagnose(run, manifest),
  )
  return {'chains': len(chains), 'answers': len(answers)}


def diagnose(run: Run, manifest: Mapping[str, Any]) -> Diagnosis:
  """Return what is wrong with a run, as far as its stages have written their files.

  Args:
    run: the run.
    manifest: the run's manifest.

  Raises:
    UserError: if a file is damaged; the message names it.
  """
  return diagnose_folder(run.workdir, run.values, manifest)


def diagnose_folder(
  folder: pathlib.Path, values: Mapping[str, Any], manifest: Mapping[str, Any]
) -> Diagnosis:
  """Return what is wrong with the run of a folder, see `diagnose`.

  Args:
    folder: the folder.
    values: the run's config as nested dicts of JSON types.
    manifest: the run's manifest.

  Raises:
    UserError: if a file is damaged; the message names it.
  """
  files: dict[str, Any] = {'manifest': manifest, 'config': values}
  if (folder / _SUMMARY).exists():
    files['summary'] = read_summary(folder / _SUMMARY)
    if count := files['summary'].get('models', {}).get('base', {}).get('count'):
      files['smallest_difference'] = smallest_difference(count, 0.5)
  files['models'] = {'judge': _read_judge(folder)}
  if 'generate' in manifest['stages'] and (folder / _QUALITY).exists():
    files['quality'] = read_quality(folder / _QUALITY)
  if 'train' in manifest['stages']:
    files['training'] = metrics.read_rows(folder / metrics.METRICS_FILE)
    files['held_out'] = metrics.read_rows(folder / metrics.HELD_OUT_FILE)
  return find_problems(files)


def _read_judge(folder: pathlib.Path) -> dict[str, Any] | None:
  """Return the results of the judge, or None if the run has none."""
  path = folder / _MODELS
  judge = read_json(path).get('judge') if path.exists() else None
  if not isinstance(judge, dict) or 'status' not in judge:
    return None
  check_shape(judge, JUDGE_SHAPE, f'{path}: judge')
  return judge


def read_quality(path: pathlib.Path) -> dict[str, Any]:
  """Return `quality.json`, with the interval of each rate over all rounds.

  Args:
    path: the file.

  Raises:
    UserError: if the file is damaged; the message names it and the key.
  """
  quality = read_json(path)
  check_shape(quality, quality_summary.SHAPE, str(path))
  for name, bounds in flag_intervals(quality['d_cai']).items():
    quality['d_cai']['flags'][name]['interval'] = list(bounds)
  return quality


def read_summary(path: pathlib.Path) -> dict[str, Any]:
  """Return the scores in the file `evaluation/summary.json`, and the imported ones beside it.

  Args:
    path: the file.

  Raises:
    UserError: if a file is damaged; the message names it and the key.
  """
  scores = read_json(path)
  check_summary(scores, str(path))
  imported = path.with_name(IMPORTED)
  if imported.exists():
    scores = with_imported(scores, imported)
    check_summary(scores, str(imported))
  return scores


def describe_quality(path: pathlib.Path) -> str:
  """Return the rates of defects in the file `quality.json` as a text table.

  Args:
    path: the file.

  Raises:
    UserError: if the file is damaged; the message names it and the key.
  """
  summary = read_json(path)
  check_shape(summary, quality_summary.SHAPE, str(path))
  return quality_summary.format_table(summary['d_cai'], summary.get('published'))


def _describe_models(run: Run) -> str:
  """Return what the measures of models say about `models.json`."""
  path = run.workdir / _MODELS
  results = read_json(path)
  try:
    return describe_results(run.config.evaluation, results)
  # Each measure, a plugin's too, has its own form of results, and only its code knows it.
  except (KeyError, TypeError, ValueError, AttributeError, IndexError, OverflowError) as error:
    raise UserError(
      f'{path} does not have the form that the measures of the run write '
      f'({type(error).__name__}: {error}). Restore it, or evaluate in a new workdir.'
    ) from error


def _compare_policies(run: Run) -> str:
  """Return the table of M_θ, M_aligned, the policies and the best of several answers."""
  summary = read_summary(run.workdir / _SUMMARY)
  return policy_table(run.config, summary, read_json(run.workdir / _MODELS))


def _check_files(run: Run, names: list[str]) -> None:
  missing = [name for name in names if not (run.workdir / name).exists()]
  if missing:
    raise UserError(
      f'{run.workdir / missing[0]} is missing. Put it back, or run all stages in a new workdir.'
    )
