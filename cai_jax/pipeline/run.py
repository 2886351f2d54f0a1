"""A run: a checked config, the files that it names, and a folder."""

import dataclasses
import hashlib
import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from cai_jax.constitution import Constitution, load_constitution
from cai_jax.data.prompts import Prompt
from cai_jax.feedback.config import ROW_INDEPENDENT_FIELDS
from cai_jax.feedback.variants import VARIANTS
from cai_jax.model.transformer import Params
from cai_jax.pipeline import contents, prompt_sets, schema
from cai_jax.pipeline.model_sampling import resolve_sampling
from cai_jax.pipeline.policies import trains_preferences
from cai_jax.pipeline.published_quality import summarize_published
from cai_jax.pipeline.sections import RunConfig
from cai_jax.pipeline.served_raters import check_served_guard, find_served_rater
from cai_jax.pipeline.served_stages import served_stages
from cai_jax.runtime.cloud.workdir import refuse_url
from cai_jax.runtime.errors import UserError
from cai_jax.runtime.plugins import load_plugins
from cai_jax.sampling.remote import RemoteConfig
from cai_jax.tiny.files import model_path
from cai_jax.training.fit_config import MAY_CHANGE_ON_RESUME


@dataclasses.dataclass
class KeptModels:
  """Parameters that stay in memory between stages.

  Attributes:
    wanted: whether the run has planned to keep those of M_aligned.
    params: the parameters on the mesh of sampling, by the folder of the model.
  """

  wanted: bool = False
  params: dict[str, Params] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Run:
  """A checked config, the contents of the files that it names, and the folder of the run.

  Attributes:
    config: the settings, by section.
    values: the same settings as nested dicts of JSON types, as in `config.json`.
    workdir: the run's folder, on a local or shared filesystem.
    constitution: the constitution.
    prompts: prompts by set: 'harmful', 'helpful', 'eval_harmful' and 'eval_helpful'.
    plugins: digest of the content of each plugin file, by path.
    profile: number of training steps to profile.
    journal: folder of the turn journal, which runs may share; None is `workdir/journal`.
    notes: what the run says at its start about sampling settings that come from the models.
    near_duplicates: number of training prompts that were left out because they are near-duplicates
      of held-out ones, by set.
    repeats: number of prompts that were left out because the first of the two training sets, or of
      the two held-out sets, has them too, by set.
    kept: parameters that stay in memory between stages.
  """

  config: RunConfig
  values: Mapping[str, Any]
  workdir: pathlib.Path
  constitution: Constitution
  prompts: Mapping[str, list[Prompt]]
  plugins: Mapping[str, str]
  profile: int = 0
  journal: pathlib.Path | None = None
  notes: tuple[str, ...] = ()
  near_duplicates: Mapping[str, int] = dataclasses.field(default_factory=dict)
  repeats: Mapping[str, int] = dataclasses.field(default_factory=dict)
  kept: KeptModels = dataclasses.field(default_factory=KeptModels, compare=False)

  @property
  def remotes(self) -> dict[str, RemoteConfig]:
    """The served models by role: 'base', 'critique' or 'revision'."""
    section = self.config.remote
    remotes = {field.name: getattr(section, field.name) for field in dataclasses.fields(section)}
    return {role: remote for role, remote in remotes.items() if remote is not None}

  @property
  def server_draws(self) -> list[str]:
    """The roles whose servers draw without a seed of the run; another run gets other texts."""
    return [role for role, remote in self.remotes.items() if remote.seed == 'server']

  @property
  def d_cai(self) -> pathlib.Path:
    """Folder of the D_CAI to train on."""
    return pathlib.Path(self.config.data.d_cai or self.workdir / 'd_cai')

  @property
  def aligned(self) -> str:
    """Checkpoint of M_aligned: the configured one, or that of the train stage."""
    name = self.config.model.aligned
    return model_path(name) if name else str(self.workdir / 'model')

  def preference_start(self, init: str) -> str:
    """Return the checkpoint that a training on preferences starts from.

    Args:
      init: 'aligned', 'base', 'init', or a folder or hub name.
    """
    if init == 'aligned':
      return self.aligned
    return model_path({'base': self.config.model.base, 'init': self.training_start}.get(init, init))

  def stand_in(self, init: str) -> str:
    """Return a checkpoint with the shape and the tokenizer of what a training starts from.

    It exists before the first stage, also if M_aligned is yet to be trained.

    Args:
      init: 'aligned', 'base', 'init', or a folder or hub name.
    """
    is_missing = init == 'aligned' and not self.config.model.aligned
    return self.preference_start('init' if is_missing else init)

  @property
  def training_start(self) -> str:
    """Name of the model to fine-tune; '' if the run has none."""
    return self.config.model.init or self.config.model.base

  def settings(self, stage: str) -> dict[str, Any]:
    """Return everything that the result of a stage depends on, as nested dicts of JSON types.

    The manifest records these settings, and a later start with other settings is an error. Settings
    that do not affect the stage are left out, so they may change.

    Args:
      stage: name of the stage.
    """
    values = self.values
    evaluates = stage in ('evaluate', 'report')
    prefers = trains_preferences(self.config) and (evaluates or stage == 'prefer')
    labels = self.config.label.is_asked_for and (evaluates or stage in ('label', 'prefer'))
    reads_aligned = evaluates or prefers or labels
    aligned = self.config.model.aligned if reads_aligned else ''
    settings = {name: values[name] for name in ('seed', 'sampling')}
    settings['contents'] = contents.stage_contents(self.config, stage)
    settings['model'] = _without(values['model'], ('layers',) if aligned else ('layers', 'aligned'))
    settings['feedback'] = _without(values['feedback'], ROW_INDEPENDENT_FIELDS)
    if self.remotes:  # what is served counts, not where it is served or how patiently it is asked
      settings['remote'] = {role: remote.identity() for role, remote in self.remotes.items()}
    if rater := find_served_rater(self.config):
      settings['rater'] = rater.service.identity()
    settings['constitution'] = self.constitution.fingerprint()
    settings['prompts'] = {
      name: _fingerprint(self.prompts[name])
      for name in prompt_sets.NAMES
      if evaluates or name not in prompt_sets.HELD_OUT
    }
    if self.plugins:
      settings['plugins'] = sorted(self.plugins.values())
    if stage == 'train' or (reads_aligned and not aligned):
      settings['train'] = _without(values['train'], MAY_CHANGE_ON_RESUME)
    if (stage == 'train' or prefers) and self.config.data.d_cai:
      settings['data'] = {'d_cai': _dataset_digest(self.d_cai)}
    if labels:
      settings['label'] = _without(values['label'], ('remote',))
      if not self.config.label.constitution:  # else `contents` has the digest of its file
        settings['label']['principles_read'] = self.constitution.comparisons_fingerprint()
      if remote := self.config.label.remote:
        settings['label']['remote'] = remote.identity()
    if prefers:
      for name in ('reward', 'prefer'):
        settings[name] = _without(values[name], MAY_CHANGE_ON_RESUME)
    if evaluates:
      questions = self.config.evaluation.question_digests()
      servers = ('judge_remote', 'guard_remote')
      settings['evaluation'] = _without(values['evaluation'], servers)
      settings['evaluation']['questions'] = questions
      for name in servers:
        if server := getattr(self.config.evaluation, name):  # not where it is served
          settings['evaluation'][name] = server.identity()
    if stage == 'report':
      settings['report'] = values['report']
    return settings


def build(
  config: ConfigDict, workdir: str | os.PathLike, journal: pathlib.Path | None = None
) -> Run:
  """Return the run of a config, after loading its plugins, prompts and constitution.

  Args:
    config: a config with fields of `configs/default.py`; absent ones have their defaults.
    workdir: the run's folder, on a local or shared filesystem.
    journal: folder of the turn journal, which runs may share; None is `workdir/journal`.

  Raises:
    UserError: if anything is wrong with the config or with a file that it names.
  """
  if not str(workdir):
    raise UserError('workdir is empty. Give the folder of the run.')
  refuse_url(workdir, 'A run that is built in Python')
  if os.path.expanduser(workdir).startswith('~'):
    raise UserError(f'workdir={workdir} names no user whose folder exists. Write the whole path.')
  config = schema.complete_config(config)
  plugins = load_plugins(schema.expand_paths(config.plugins, copied=False))
  notes = resolve_sampling(config)
  settings = schema.from_config(config)
  _check_roles(settings)
  _check_sampling(settings)
  _check_candidates(settings)
  check_served_guard(settings)
  if settings.report.published:
    summarize_published(settings.report.published)
  constitution = load_constitution(settings.constitution)
  feedback = settings.feedback
  VARIANTS[feedback.variant].check(constitution, feedback.variant_options)
  loaded = prompt_sets.load_prompt_sets(settings.prompts, settings.seed)
  return Run(
    config=settings,
    values=json.loads(config.to_json_best_effort()),
    workdir=pathlib.Path(os.path.realpath(os.path.expanduser(workdir))),
    constitution=constitution,
    prompts=loaded.prompts,
    near_duplicates=loaded.near_duplicates,
    repeats=loaded.repeats,
    plugins=plugins,
    journal=journal,
    notes=notes,
  )


def _check_roles(config: RunConfig) -> None:
  """Check that each role has one model, served or not."""
  for field in dataclasses.fields(config.remote):
    role, name = field.name, getattr(config.model, field.name)
    remote = getattr(config.remote, role)
    if remote is not None and name:
      raise UserError(
        f'model.{role}={name!r} and remote.{role}.url={remote.url!r} are both set, but only one '
        f"model is used. Set model.{role}='' or remote.{role}.url=''."
      )
  if not config.model.base and config.remote.base is None:
    raise UserError('model.base is empty. Name a checkpoint, or give remote.base.url.')
  if config.evaluation.judge == 'base' and not config.model.base:
    raise UserError(
      "evaluation.judge='base' needs M_θ as a local model, but model.base is empty because M_θ is "
      'served. Name a checkpoint as evaluation.judge.'
    )


def _check_sampling(config: RunConfig) -> None:
  """Check that the servers support the sampling settings of the turns that they sample."""
  for role, stages in served_stages(config).items():
    remote = getattr(config.remote, role)
    try:
      for stage in stages.values():
        remote.check_sampling(stage.sampling)
        if stage.chooses:
          remote.check_labels()
    except UserError as error:
      raise UserError(f'remote.{role}: {str(error).removeprefix("remote: ")}') from error
  if config.feedback.helpful_samples > 1 and not config.sampling.initial.temperature:
    raise UserError(
      f'feedback.helpful_samples={config.feedback.helpful_samples} answers would all be the same '
      'at sampling.initial.temperature=0. Raise the temperature, or sample once.'
    )


def _server_of(config: RunConfig, stage: str) -> tuple[str, RemoteConfig | None]:
  """Return the role whose model samples a stage, and its server; None for a model in memory."""
  role = _own_stage(config, stage)
  own = getattr(config.remote, role, None) or getattr(config.model, role, '')
  role = role if own else 'base'  # M_critique and M_revise default to M_θ
  return role, getattr(config.remote, role)


def _own_stage(config: RunConfig, stage: str) -> str:
  """Return the stage whose section has the sampling settings of a stage: itself or its parent."""
  extra = VARIANTS[config.feedback.variant].stages.get(stage)
  return stage if extra is None else extra.parent


def _check_candidates(config: RunConfig) -> None:
  """Check that candidates can differ, and that what rates them by their likelihood is known."""
  feedback = config.feedback
  variant, options = VARIANTS[feedback.variant], feedback.variant_options
  for stage, count in variant.repeats(options).items():
    if count > 1 and not config.sampling.of_stage(stage, feedback.variant).temperature:
      raise UserError(
        f'feedback.variant={feedback.variant!r}: {count} candidates would all be the same at '
        f'sampling.{_own_stage(config, stage)}.temperature=0. Raise the temperature, or sample one '
        'candidate with feedback.options.'
      )
  for stage in variant.reads_logprobs(options):
    role, remote = _server_of(config, stage)
    sampling = config.sampling.of_stage(stage, feedback.variant)
    if remote is not None and not remote.gives_logprobs(sampling):
      raise UserError(
        f'feedback.variant={feedback.variant!r} rates candidates by log-probabilities, but '
        f'remote.{role} (server={remote.server!r}, prompt={remote.prompt!r}) gives none from '
        f'before the temperature {sampling.temperature:g}, biases and penalties. Choose another '
        'scorer in feedback.options, or another server.'
      )


def _without(values: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
  return {name: value for name, value in values.items() if name not in names}


def _fingerprint(prompts: Sequence[Prompt]) -> str:
  """Return a hex digest of the ids, messages and metadata of prompts, in their order."""
  parts = [[prompt.id, prompt.messages, prompt.metadata] for prompt in prompts]
  content = json.dumps(parts, sort_keys=True)
  return hashlib.sha256(content.encode()).hexdigest()[:16]


def _dataset_digest(folder: pathlib.Path) -> str:
  """Return a hex digest of a D_CAI: of its job, its metadata, and its shards' names and sizes."""
  digest = hashlib.sha256()
  for name in ('job.json', 'dataset_info.json'):
    path = folder / name
    digest.update(path.read_bytes() if path.exists() else b'')
  shards = sorted((path.name, path.stat().st_size) for path in folder.glob('*.array_record-*'))
  digest.update(json.dumps(shards).encode())
  return digest.hexdigest()[:16]
