"""Stage `report`: write a page about the run."""

import pathlib
from collections.abc import Mapping
from typing import Any

from cai_jax.data import d_cai, quality_summary
from cai_jax.data.ended import describe_ended
from cai_jax.evaluation import suite
from cai_jax.pipeline.chains import browsable
from cai_jax.pipeline.models import load_scorer
from cai_jax.pipeline.run import Run
from cai_jax.report import write_report
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
  texts = {'Models': _describe_models(run)}
  if 'generate' in stages:
    texts = {'Quality of the revisions': describe_quality(run.workdir / _QUALITY)} | texts
    if ended := describe_ended(run.workdir / 'd_cai', stages['generate']['rows_in']):
      texts = {'Chains without a row': ended} | texts
  external = run.config.data.d_cai and (run.d_cai / 'dataset_info.json').exists()  # else it is gone
  has_d_cai = external or 'generate' in stages
  chains = _read_chains(run, run.d_cai if has_d_cai else run.workdir / 'evaluation' / 'base')
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
    chains=chains,
  )
  return {'chains': len(chains)}


def read_summary(path: pathlib.Path) -> dict[str, Any]:
  """Return the scores in the file `evaluation/summary.json`.

  Args:
    path: the file.

  Raises:
    UserError: if the file is damaged; the message names it and the key.
  """
  scores = read_json(path)
  check_summary(scores, str(path))
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
    return suite.describe(run.config.evaluation, results)
  # Each measure, a plugin's too, has its own form of results, and only its code knows it.
  except (KeyError, TypeError, ValueError, AttributeError, IndexError, OverflowError) as error:
    raise UserError(
      f'{path} does not have the form that the measures of the run write '
      f'({type(error).__name__}: {error}). Restore it, or evaluate in a new workdir.'
    ) from error


def _check_files(run: Run, names: list[str]) -> None:
  missing = [name for name in names if not (run.workdir / name).exists()]
  if missing:
    raise UserError(
      f'{run.workdir / missing[0]} is missing. Put it back, or run all stages in a new workdir.'
    )


def _read_chains(run: Run, folder: pathlib.Path) -> list[dict[str, Any]]:
  """Return the first chains of a dataset for the browser."""
  rows, scorer = d_cai.read_rows(folder), load_scorer(run)
  return [browsable(rows[i], scorer) for i in range(min(len(rows), run.config.report.chains))]
