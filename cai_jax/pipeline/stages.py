"""The stages of a run: their order, their requirements, and their execution."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from cai_jax.pipeline.checks import check_run
from cai_jax.pipeline.contents import check_products
from cai_jax.pipeline.costs import describe_costs
from cai_jax.pipeline.device_defaults import describe_training, resolve_devices
from cai_jax.pipeline.engine_sizes import resolve_engine
from cai_jax.pipeline.import_results import has_new_results
from cai_jax.pipeline.kept_models import plan_handover
from cai_jax.pipeline.launches import STAGE, check_launch, hold_run
from cai_jax.pipeline.policies import trains_preferences
from cai_jax.pipeline.rate import has_new_ratings
from cai_jax.pipeline.relative_paths import relative_paths
from cai_jax.pipeline.run import Run
from cai_jax.pipeline.schema import default_config
from cai_jax.pipeline.served_raters import find_served_rater
from cai_jax.pipeline.server_checks import (
  check_guard_server,
  check_judge_server,
  check_rater_server,
  check_servers,
)
from cai_jax.pipeline.stage_evaluate import evaluate_models
from cai_jax.pipeline.stage_generate import generate_d_cai, sample_share
from cai_jax.pipeline.stage_label import check_label_server, label_comparisons
from cai_jax.pipeline.stage_prefer import train_policies
from cai_jax.pipeline.stage_report import write_run_report
from cai_jax.pipeline.stage_train import train_model
from cai_jax.runtime import compilation, digests, processes
from cai_jax.runtime.cloud.direct import check_training
from cai_jax.runtime.errors import UserError
from cai_jax.runtime.files import write_json
from cai_jax.runtime.manifest import Manifest
from cai_jax.runtime.replicas import launched_replica
from cai_jax.runtime.settings import flatten
from cai_jax.runtime.terminal import say

# A stage is a function of the run and its manifest, and returns what the manifest records of it.
STAGES: dict[str, Callable[[Run, Mapping[str, Any]], dict[str, Any]]] = {
  'generate': generate_d_cai,
  'train': train_model,
  'label': label_comparisons,
  'prefer': train_policies,
  'evaluate': evaluate_models,
  'report': write_run_report,
}
SAMPLING = ('generate', 'label', 'prefer', 'evaluate')  # stages that may sample with the engine


def default_stages(run: Run) -> list[str]:
  """Return the stages that a run needs.

  `data.d_cai` replaces the generate stage, and `model.aligned` replaces both generate and train.
  The config has to ask for the stages label and prefer.
  """
  left_out = {*_replaced_stages(run), *_absent_stages(run)}
  return [name for name in STAGES if name not in left_out]


def run_stages(
  run: Run,
  stages: Sequence[str] | None = None,
  log: Callable[[str], None] = say,
  stage_ended: Callable[[], None] = lambda: None,
) -> None:
  """Run stages in their order, and skip those that are done.

  All processes call this function together.

  Args:
    run: the run.
    stages: names of stages; None is `default_stages`.
    log: called with a line of text when a stage begins, ends or is skipped.
    stage_ended: called after each stage that was run, when no file of the run changes.

  Raises:
    UserError: if a stage does not exist, the workdir is not writable, belongs to another run or to
      a running job, an earlier stage is missing, or a check of `check_run` fails.
  """
  stages = default_stages(run) if stages is None else stages
  _check_names(run, stages)
  check_launch(run, stages)
  processes.run_on_all_processes('check the run', lambda: check_run(run, stages))
  with contextlib.ExitStack() as stack:
    stack.enter_context(hold_run(run.workdir))
    if run.journal is not None:  # runs may share it
      stack.enter_context(hold_run(run.journal))
    for note in run.notes:
      log(note)
    _run_missing(run, stages, log, stage_ended)


def _run_missing(
  run: Run,
  stages: Sequence[str],
  log: Callable[[str], None],
  stage_ended: Callable[[], None],
) -> None:
  """Run the stages that are not done, in a workdir that this job holds."""
  is_first = jax.process_index() == 0
  digests.load_digests(run.workdir / 'digests.json')
  manifest = Manifest(run.workdir, writes=is_first and launched_replica()[0] == 0)
  run = resolve_devices(run, manifest.content['stages'])
  _check_manifest(run, stages, manifest)
  if 'train' in stages and not manifest.done('train'):
    log(describe_training(run))
  asking = [n for n in stages if n in SAMPLING and not manifest.done(n)]
  resolve = functools.partial(resolve_engine, run, bool(asking))
  run, note = processes.run_on_all_processes('choose the sizes of the engine', resolve)
  if note:
    log(note)
  if launched_replica()[0]:
    return _sample_as_replica(run, asking, log)
  served = run
  if run.remotes and asking:
    served = check_servers(run, asking, log if is_first else lambda line: None)
  if run.config.evaluation.judge_remote and 'evaluate' in asking:
    processes.run_on_process_0('reach the judge', lambda: check_judge_server(run))
  if run.config.evaluation.served_guards and 'evaluate' in asking:
    processes.run_on_process_0('reach the guard model', lambda: check_guard_server(run))
  if find_served_rater(run.config) and {'generate', 'evaluate'} & {*asking}:
    processes.run_on_process_0('reach the rater', lambda: check_rater_server(run))
  if run.config.label.remote and 'label' in asking:
    processes.run_on_process_0('reach the feedback model', lambda: check_label_server(run))
  # Then the report is written again.
  is_old = has_new_ratings(run.workdir) or has_new_results(run.workdir)
  processes.barrier('manifest read')
  if is_first:
    write_json(run.workdir / 'config.json', run.values)
    digests.save_digests(run.workdir / 'digests.json')
  ordered = [name for name in STAGES if name in stages]
  missing = [n for n in ordered if not manifest.done(n) or (n == 'report' and is_old)]
  if {'train', 'prefer'} & {*missing}:
    check_training(run.workdir)
  if line := plan_handover(run, missing):
    log(line)
  with contextlib.ExitStack() as stack:
    for name in ordered:
      if name not in missing:
        log(f'{name}: done before')
        continue
      if name == missing[0]:
        stack.enter_context(compilation.kept_programs(run.config.compilation, log))
      check = functools.partial(_check_inputs, run, name, manifest)
      processes.run_on_all_processes('check what earlier stages used and wrote', check)
      log(f'{name} ...')
      before = compilation.counts()
      with manifest.stage(name, run.settings(name)) as entry:
        processes.barrier(f'{name} begun')  # all processes see the manifest
        entry['paths'] = relative_paths(run.values)
        entry |= STAGES[name](served, manifest.content)
        if name in asking and (roles := served.server_draws):
          entry['server_draws'] = roles
        programs = compilation.counts().since(before)
        entry['programs'] = dataclasses.asdict(programs)
      log(f'{name}: {entry["seconds"]:.0f} s, {programs.describe()}')
      if name in asking and (costs := describe_costs(run)):
        log(costs)
      processes.barrier(name)
      stage_ended()


def _sample_as_replica(run: Run, asking: Sequence[str], log: Callable[[str], None]) -> None:
  """Sample the shards of this launch; that of replica 0 does the rest of the stage."""
  index, count = launched_replica()
  if not asking:
    log(f'{STAGE}: done before')
    return
  log(f'{STAGE}: replica {index} of {count} ...')
  with compilation.kept_programs(run.config.compilation, log):
    counts = sample_share(run)
  log(f'{STAGE}: replica {index} of {count} has sampled {counts["sampled_rows"]} rows')


def _check_inputs(run: Run, stage: str, manifest: Manifest) -> None:
  """Check that no model or file of an earlier stage has been replaced, and neither its results."""
  _check_manifest(run, [stage], manifest)
  check_products(run.workdir, run.config, stage, manifest.content['stages'])


def _check_names(run: Run, stages: Sequence[str]) -> None:
  unknown = [name for name in stages if name not in STAGES]
  if unknown:
    raise UserError(f'There is no stage {", ".join(unknown)}. The stages are {", ".join(STAGES)}.')
  if not stages:
    raise UserError(f'No stage is given. The stages are {", ".join(STAGES)}.')
  for name, advice in _absent_stages(run).items():
    if name in stages:
      raise UserError(f'Stage {name} has nothing to do. {advice}, or leave {name} out of --stages.')
  for name, field in _replaced_stages(run).items():
    if name in stages:
      raise UserError(
        f'{field} is set, and replaces the result of stage {name}. Leave {name} out of --stages, '
        f"or set {field}=''."
      )


def _replaced_stages(run: Run) -> dict[str, str]:
  """Return the stages that the run does without, each with the config field that replaces it."""
  if run.config.model.aligned:
    return {'generate': 'model.aligned', 'train': 'model.aligned'}
  return {'generate': 'data.d_cai'} if run.config.data.d_cai else {}


def _absent_stages(run: Run) -> dict[str, str]:
  """Return the stages that the config does not ask for, each with what to set to ask for it."""
  config, absent = run.config, {}
  if not config.label.is_asked_for:
    absent['label'] = 'Set label.responses or label.comparisons'
  if not trains_preferences(config):
    absent['prefer'] = 'Set prefer.data or reward.data'
  return absent


def _needed_stages(run: Run, stages: Sequence[str]) -> list[str]:
  """Return the stages that must be done at the end, in order: those to run, and what they need."""
  last = max(list(STAGES).index(name) for name in stages)
  left_out = {*_replaced_stages(run), *_absent_stages(run)}
  return [name for name in list(STAGES)[: last + 1] if name not in left_out]


def _check_manifest(run: Run, stages: Sequence[str], manifest: Manifest) -> None:
  """Check that each needed stage is to be run or done, and that it had the same settings."""
  defaults = flatten(default_config().to_dict())
  alternatives = {
    'generate': ', or train on the D_CAI of another run with data.d_cai',
    'train': ', or evaluate a checkpoint with model.aligned',
  }
  # What a finished stage has read may be gone, and plugins may have been added for later stages.
  is_gone = bool(run.config.data.d_cai) and not run.d_cai.exists()
  free = ['plugins', 'data.d_cai'] if is_gone else ['plugins']
  for name in _needed_stages(run, stages):
    manifest.check(name, run.settings(name), defaults, free_when_done=free)
    if name not in stages and not manifest.done(name):
      raise UserError(
        f'Stage {name} is not done in {run.workdir}. Add it to '
        f'--stages{alternatives.get(name, "")}.'
      )
