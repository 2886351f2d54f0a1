"""What the models and files of a run contain, as digests that the manifest records.

If the weights of a model are replaced in place between two stages, its name stays the same and its
digest does not.
"""

import functools
import pathlib
from collections.abc import Iterator
from typing import Any

from cai_jax.data import d_cai
from cai_jax.evaluation.config import TRAINED
from cai_jax.feedback.comparisons.config import LabelConfig
from cai_jax.model import peft
from cai_jax.model.folder import DESCRIPTION_FILES, find_folder, folder_contents
from cai_jax.pipeline.pair_sources import LABELS_FILE, PAIR_SOURCES
from cai_jax.pipeline.policies import list_trainings, trains_preferences
from cai_jax.pipeline.preference_config import ROLES
from cai_jax.pipeline.sections import RunConfig
from cai_jax.runtime.digests import digest_files
from cai_jax.runtime.errors import UserError
from cai_jax.scoring.judge import JUDGES, LABELLED
from cai_jax.scoring.refusal import CLASSIFIERS
from cai_jax.tiny.files import model_path

Contents = dict[str, dict[str, str]]  # config field → part of what it names → digest
_FILES = (  # fields that name files, and no models
  *('evaluation.multiple_choice', 'evaluation.judge_labelled', 'evaluation.reward_labelled'),
  *('report.published', 'label.comparisons', 'label.labelled', 'label.demonstrations'),
  'label.constitution',
  *('reward.data', 'prefer.data'),
)


def stage_contents(config: RunConfig, stage: str) -> Contents:
  """Return digests of the models and files that a stage reads.

  What cannot be read is left out, because a stage that is done may outlive its inputs.

  Args:
    config: the settings of the run.
    stage: name of the stage.
  """
  contents = {}
  for name, value in _inputs(config, stage):
    if value:
      try:
        contents[name] = _digests(name, value)
      except (OSError, UserError):
        continue
  return contents


def _inputs(config: RunConfig, stage: str) -> Iterator[tuple[str, Any]]:
  """Yield the config fields that name the models and files of a stage, and their values."""
  model, evaluation = config.model, config.evaluation
  if stage == 'train':
    role = 'init' if model.init else 'base'
    yield f'model.{role}', getattr(model, role)
    yield 'data.d_cai', config.data.d_cai
    yield 'train.lora_init', config.train.lora_init
    return
  for role in ('base', 'critique', 'revision'):
    yield f'model.{role}', getattr(model, role)
    remote = getattr(config.remote, role)
    yield f'remote.{role}.tokenizer', remote and remote.tokenizer
  if stage == 'generate':
    return
  yield 'model.aligned', model.aligned
  if stage == 'label' or config.label.is_asked_for:
    yield from _label_inputs(config.label)
  if stage == 'prefer' or trains_preferences(config):
    yield from _preference_inputs(config)
  if stage in ('label', 'prefer'):
    return
  is_checkpoint = evaluation.judge != 'base' and evaluation.judge not in JUDGES
  yield 'evaluation.judge', evaluation.judge if is_checkpoint else ''
  is_file = evaluation.judge_labelled not in LABELLED
  yield 'evaluation.judge_labelled', evaluation.judge_labelled if is_file else ''
  is_trained = evaluation.reward_model == TRAINED
  yield 'evaluation.reward_model', '' if is_trained else evaluation.reward_model
  is_file = evaluation.reward_labelled not in LABELLED
  yield 'evaluation.reward_labelled', evaluation.reward_labelled if is_file else ''
  yield 'evaluation.refusal', '' if evaluation.refusal in CLASSIFIERS else evaluation.refusal
  for kind, name in evaluation.guard_checkpoints.items():
    yield f'evaluation.guard_models, {kind}', name
  yield 'evaluation.multiple_choice', evaluation.multiple_choice
  if stage == 'report':
    yield 'report.published', config.report.published


def _label_inputs(label: LabelConfig) -> Iterator[tuple[str, Any]]:
  """Yield the fields of section `label` that name models and files."""
  yield 'label.sampled_by', '' if label.sampled_by in ROLES else label.sampled_by
  yield 'label.model', '' if label.model in (*ROLES, *JUDGES) else label.model
  yield 'label.comparisons', label.comparisons
  yield 'label.labelled', tuple(name for name in label.labelled if name not in LABELLED)
  yield 'label.demonstrations', label.demonstrations
  yield 'label.constitution', label.constitution


def _preference_inputs(config: RunConfig) -> Iterator[tuple[str, Any]]:
  """Yield the fields of sections `reward` and `prefer` that name models and files."""
  yield 'data.d_cai', config.data.d_cai
  for training in list_trainings(config):
    section = training.config
    yield f'{section.section}.init', '' if section.init in ROLES else section.init
    yield f'{section.section}.lora_init', section.lora_init
    yield f'{section.section}.data', '' if section.data in PAIR_SOURCES else section.data


def _digests(name: str, value: Any) -> dict[str, str]:
  """Return the digests of what a field names."""
  if name == 'data.d_cai':
    return {'rows': d_cai.content_digest(value)}
  if name in ('reward.data', 'prefer.data') and pathlib.Path(value).is_dir():
    return {'rows': d_cai.content_digest(value)}
  if name in _FILES:
    paths = [pathlib.Path(path) for path in ((value,) if isinstance(value, str) else value)]
    return {
      f'{number}: {path.name}': digest_files(path.parent, [path.name])
      for number, path in enumerate(paths, 1)
    }
  if name.endswith('.lora_init'):
    return {'adapters': digest_files(pathlib.Path(value), peft.FILES)}
  if name.startswith('remote.'):
    return folder_contents(_find_tokenizer(value), weights=False)
  return model_contents(model_path(value))


def model_contents(path: str) -> dict[str, str]:
  """Return the digests of the parts of a model, see `folder_contents`.

  Args:
    path: a folder or hub name.

  Raises:
    UserError: if there is no such model.
  """
  return folder_contents(_find_model(path))


def check_products(workdir: pathlib.Path, config: RunConfig, stage: str, done: Any) -> None:
  """Check that what earlier stages wrote has not changed, before a stage reads it.

  Args:
    workdir: folder of the run.
    config: the settings of the run.
    stage: name of the stage that is about to begin.
    done: the manifest's entry of each stage.

  Raises:
    UserError: if D_CAI or the trained model has changed; the message names the shard or the part.
  """
  if (
    stage in ('train', 'prefer') and not config.data.d_cai and done.get('generate', {}).get('d_cai')
  ):
    folder = workdir / 'd_cai'
    d_cai.check_files(folder)
    if d_cai.content_digest(folder) != done['generate']['d_cai']:
      raise UserError(
        f'{folder} is not the dataset that stage generate wrote. Restore it, or use another '
        'workdir.'
      )
  reads_aligned = stage in ('label', 'prefer', 'evaluate') and not config.model.aligned
  if reads_aligned and done.get('train', {}).get('model'):
    _check_model(workdir / 'model', 'train', done['train']['model'])
  if stage == 'prefer' and (recorded := done.get('label', {}).get('comparisons_digest')):
    if digest_files(workdir, [LABELS_FILE]) != recorded:
      raise UserError(
        f'{workdir / LABELS_FILE} is not what stage label wrote. Restore it, or use another '
        'workdir.'
      )
  if stage == 'evaluate':
    for training in list_trainings(config):
      if recorded := done.get('prefer', {}).get(training.name, {}).get('model'):
        _check_model(workdir / training.folder, 'prefer', recorded)


def _check_model(folder: pathlib.Path, stage: str, recorded: dict[str, str]) -> None:
  """Check that a folder has the model that a stage wrote."""
  for part, digest in folder_contents(folder).items():
    if recorded.get(part) != digest:
      advice = 'set model.aligned in another workdir to evaluate it.'
      raise UserError(
        f'{folder} is not the model that stage {stage} wrote: its {part} has changed. Restore it, '
        f'or {advice}'
      )


# Asking the hub takes a second, and a run must not change to another revision between its stages.
_find_model = functools.cache(find_folder)


@functools.cache
def _find_tokenizer(path: str) -> pathlib.Path:
  return find_folder(path, DESCRIPTION_FILES)
