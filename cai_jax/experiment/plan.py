"""Plan the runs of an experiment: build and check each of them before the first one begins."""

import collections
import dataclasses
import itertools
import pathlib
from collections.abc import Callable
from typing import Any

from ml_collections import ConfigDict

from cai_jax import pipeline
from cai_jax.constitution import draw_principles
from cai_jax.evaluation.baselines import BASELINES
from cai_jax.experiment import collect, define
from cai_jax.experiment.define import Experiment
from cai_jax.feedback.variants import VARIANTS
from cai_jax.pipeline import Run
from cai_jax.pipeline.policies import POLICIES, list_policies
from cai_jax.runtime.errors import UserError
from cai_jax.runtime.manifest import Manifest

FEWEST_PROMPTS = 2  # that draw a principle, with each seed


def plan_runs(
  experiment: Experiment,
  config: ConfigDict,
  workdir: pathlib.Path,
  name_model: Callable[[str], str] = str,
) -> dict[pathlib.Path, tuple[Run, tuple[str, ...]]]:
  """Build and check every distinct run of an experiment.

  Args:
    experiment: the arms and seeds.
    config: the base config.
    workdir: folder of the experiment.
    name_model: returns the name that runs record of a model in `workdir`, from its path. A workdir
      with a URL has another path on each machine, but the URL stays.

  Returns:
    Folder → the run and the stages that its arms need, seed by seed.

  Raises:
    UserError: if the settings of an arm are wrong.
  """
  folders = collect.run_folders(experiment, workdir / 'runs', config)
  starts = collect.start_models(experiment, folders)
  draws: dict[Any, collections.Counter] = {}
  runs: dict[pathlib.Path, tuple[Run, tuple[str, ...]]] = {}
  for seed, arm in itertools.product(experiment.seeds, experiment.arms):
    folder, start = folders[arm][seed], experiment.arms[arm].start
    try:
      if folder not in runs:
        settings = define.override_config(config, experiment.settings(arm, seed, config))
        parent = runs[folders[start][seed]][0] if start else None
        run = _build(settings, folder, workdir, starts.get(folder), parent)
        if folder in starts:
          run = _rename_base(run, name_model(str(starts[folder])))
        runs[folder] = run, ()
      run, stages = runs[folder]
      runs[folder] = run, max(stages, _arm_stages(experiment.arms[arm], run), key=len)
      _check_principle(experiment.arms[arm], run, draws)
    except UserError as error:
      raise UserError(f'arm {arm!r}: {error}') from error
    if start and 'train' not in runs[folders[start][seed]][1]:
      raise UserError(
        f'arm {arm!r} starts from the M_aligned of {start!r}, but model.aligned replaces that. '
        "Set model.aligned=''."
      )
  return runs


def _build(
  config: ConfigDict,
  folder: pathlib.Path,
  workdir: pathlib.Path,
  start: pathlib.Path | None,
  parent: Run | None,
) -> Run:
  """Return a run, which may start from a model that another run is yet to train.

  Until that model exists, the run has the model that it will be trained from in its place, whose
  shape and tokenizer are the same. So everything is checked before the first run begins.

  Args:
    config: the config of the run.
    folder: folder of the run.
    workdir: folder of the experiment.
    start: folder of the model that the run starts from; None is the config's.
    parent: the run that trains that model.
  """
  if start is not None and parent is not None:
    exists = Manifest(start.parent, writes=False).done('train')
    base = str(start) if exists else parent.training_start
    config = define.override_config(config, {'model.base': base})
  return pipeline.build(config, folder, journal=workdir / 'journal')


def _rename_base(run: Run, name: str) -> Run:
  """Return a run that records another name of its M_θ, by which its turns are counted.

  Args:
    run: the run; its model may be a stand-in.
    name: the name.
  """
  return dataclasses.replace(
    run, values={**run.values, 'model': {**run.values['model'], 'base': name}}
  )


def _arm_stages(arm: define.Arm, run: Run) -> tuple[str, ...]:
  """Return the stages that produce an arm's response, without those that its config replaces."""
  number, rounds = arm.response.removeprefix('revision_'), run.config.feedback.rounds
  if number.isdecimal() and not 1 <= int(number) <= rounds:
    raise UserError(
      f'it scores {arm.response}, but feedback.rounds={rounds}. Score an existing round, or raise '
      'feedback.rounds.'
    )
  for response in {arm.response, arm.against} & {*BASELINES}:
    if response not in run.config.evaluation.baselines:
      raise UserError(
        f'it scores the baseline {response!r}, but evaluation.baselines='
        f'{run.config.evaluation.baselines}. Add it there.'
      )
  trained = [policy.name for policy in list_policies(run.config)]
  for response in {arm.response, arm.against} & {*POLICIES}:
    if response not in trained:
      raise UserError(
        f'it scores {response!r}, but its run trains {", ".join(trained) or "no policy"}. Set '
        'prefer.data, and prefer.compare for further policies.'
      )
  stages = tuple(stage for stage in pipeline.default_stages(run) if stage in arm.stages)
  if not stages:
    raise UserError(
      f'it scores the response {arm.response!r} of D_CAI, but its data.d_cai or model.aligned '
      'replaces the stage that samples it. Score base, revised or aligned.'
    )
  return stages


def _round_index(arm: define.Arm, run: Run) -> int:
  """Return the index of the round that writes an arm's response, from 0."""
  number = arm.response.removeprefix('revision_')
  return (int(number) if number.isdecimal() else run.config.feedback.rounds) - 1


def _check_principle(arm: define.Arm, run: Run, draws: dict[Any, collections.Counter]) -> None:
  """Check that enough prompts draw the principle of an arm, before anything is sampled.

  Args:
    arm: the arm.
    run: its run.
    draws: how many prompts drew each principle, which this function fills.

  Raises:
    UserError: if too few do, there is no such principle, or the variant does not apply the
      principles that are drawn.
  """
  if not arm.principle:
    return
  variant = run.config.feedback.variant
  if not VARIANTS[variant].applies_drawn:
    raise UserError(
      f'it counts the prompts that drew the principle {arm.principle!r}, but feedback.variant='
      f'{variant!r} does not apply the principles that are drawn. Choose another variant, or count '
      'all prompts.'
    )
  ids = [principle.id for principle in run.constitution.principles]
  if arm.principle not in ids:
    raise UserError(f'the constitution has no principle {arm.principle!r}. It has {ids}.')
  index = _round_index(arm, run)
  held_out = arm.response in define.HELD_OUT_RESPONSES
  prompts = run.prompts['eval_harmful' if held_out else 'harmful']
  key = run.workdir, held_out, index
  if key not in draws:
    draws[key] = collections.Counter(
      draw_principles(
        run.constitution,
        run.config.seed,
        prompt.id,
        index + 1,
        run.config.feedback.repeat_principles,
      )[index].id
      for prompt in prompts
    )
  count = draws[key][arm.principle]
  if count < FEWEST_PROMPTS:
    raise UserError(
      f'{count} of {len(prompts)} prompts draw the principle in round {index + 1} with seed '
      f'{run.config.seed}, and {FEWEST_PROMPTS} are needed. Give more prompts, or leave the '
      'principle out with constitution.leave_out.'
    )
