"""A config made into checked parts: the run."""

import dataclasses
import hashlib
import json
import os
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from cai_jax.constitution import Constitution, ConstitutionConfig, load_constitution
from cai_jax.data import quality, quality_summary
from cai_jax.data.prompts import Prompt, PromptSource, check_disjoint, load_prompts
from cai_jax.data.published import read_published_samples
from cai_jax.evaluation.config import EvaluationConfig
from cai_jax.feedback.config import ROW_INDEPENDENT_FIELDS, FeedbackConfig, StageSampling
from cai_jax.pipeline.schema import default_config
from cai_jax.runtime.errors import UserError
from cai_jax.runtime.mesh import make_mesh
from cai_jax.runtime.settings import flatten
from cai_jax.sampling.config import EngineConfig
from cai_jax.sampling.remote import RemoteConfig
from cai_jax.sampling.types import SamplingConfig
from cai_jax.scoring.loader import ModelLoader
from cai_jax.scoring.scorer import SCORERS, Scorer
from cai_jax.tiny import world
from cai_jax.training.config import MAY_CHANGE_ON_RESUME, TrainConfig

PROMPT_SETS = ('harmful', 'helpful', 'eval_harmful', 'eval_helpful')
TINY = pathlib.Path(world.__file__).parent
EMBEDDED = {'tiny': 'model', 'tiny-small': 'model_small'}  # folders of the embedded models


@dataclasses.dataclass(frozen=True)
class Run:
  """A config made into checked parts, and the folder they work in."""

  config: dict[str, Any]  # resolved
  workdir: pathlib.Path
  constitution: Constitution
  prompts: dict[str, list[Prompt]]  # by PROMPT_SETS
  feedback: FeedbackConfig
  sampling: StageSampling
  engine: EngineConfig
  remotes: dict[str, RemoteConfig]  # of 'base', 'critique' and 'revision', those served elsewhere
  train: TrainConfig
  evaluation: EvaluationConfig
  profile: int = 0  # training steps that a trace is written of
  journal: pathlib.Path | None = None  # folder of the turns; None is workdir/journal

  def settings(self, stage: str) -> dict[str, Any]:
    """What the result of a stage depends on."""
    known = {name: self.config[name] for name in ('seed', 'model', 'feedback', 'sampling')}
    known['feedback'] = {
      k: v for k, v in known['feedback'].items() if k not in ROW_INDEPENDENT_FIELDS
    }
    if self.remotes:  # what is served; where, and how patiently it is asked, may change
      known['remote'] = {name: served.identity() for name, served in self.remotes.items()}
    known['constitution'] = self.constitution.fingerprint()
    sets = PROMPT_SETS[:2] if stage in ('generate', 'train') else PROMPT_SETS
    known['prompts'] = {name: _fingerprint(self.prompts[name]) for name in sets}
    if stage != 'generate':
      known['train'] = {
        k: v for k, v in self.config['train'].items() if k not in MAY_CHANGE_ON_RESUME
      }
    if stage in ('evaluate', 'report'):
      known['evaluation'] = self.config['evaluation'] | {
        'questions': self.evaluation.question_digests()
      }
    if stage == 'report':
      known['report'] = self.config['report']
    return known


def build(
  config: ConfigDict, workdir: str | os.PathLike, journal: pathlib.Path | None = None
) -> Run:
  """The parts of a run, all checked.

  Args:
    config: with every field of configs/default.py.
    workdir: folder of the run.
    journal: folder of sampled turns, which runs may share; None is workdir/journal.

  Raises:
    ValueError: for whatever is wrong with the config or what it points to, before any work.
  """
  unknown = sorted(set(flatten(config.to_dict())) - set(flatten(default_config().to_dict())))
  if unknown:
    raise UserError(
      f'unknown config field {", ".join(unknown)}; configs/default.py lists every field.'
    )
  if not str(workdir):
    raise UserError('workdir is empty; give the folder of the run.')
  if not 0 <= config.seed < 2**63:
    raise UserError(f'seed={config.seed} is not in [0, 2**63).')
  if config.report.chains < 0:
    raise UserError(f'report.chains={config.report.chains}; it must be at least 0.')
  if config.evaluation.judge == 'base' and not config.model.base:
    raise UserError(
      "evaluation.judge='base' needs M_θ here, and it is served elsewhere: name a model."
    )
  evaluation = EvaluationConfig(**config.evaluation)
  sets = {name: _prompts(name, config.prompts[name], config.seed) for name in PROMPT_SETS}
  if not sets['harmful']:
    raise UserError('prompts.harmful.source is empty: give prompts whose answers are revised.')
  for pair in (PROMPT_SETS[:2], PROMPT_SETS[2:]):
    ids = [prompt.id for name in pair for prompt in sets[name]]
    if len(set(ids)) < len(ids):
      twice = next(i for i in ids if ids.count(i) > 1)
      raise UserError(f'prompts.{pair[0]} and prompts.{pair[1]} both have the id {twice!r}.')
  sampling = StageSampling(
    **{name: _sampling(name, section) for name, section in config.sampling.items()}
  )
  if config.feedback.helpful_samples > 1 and not sampling.initial.temperature:
    raise UserError(
      f'feedback.helpful_samples={config.feedback.helpful_samples} answers would all be the same '
      'at sampling.initial.temperature=0: raise it, or sample once.'
    )
  if config.report.published:
    published(config.report.published)
  held_out = sets['eval_harmful'] + sets['eval_helpful']
  check_disjoint(sets['harmful'] + sets['helpful'], held_out)
  return Run(
    config=json.loads(config.to_json_best_effort()),
    workdir=pathlib.Path(workdir),
    constitution=load_constitution(ConstitutionConfig(**config.constitution)),
    prompts=sets,
    feedback=FeedbackConfig(**config.feedback),
    sampling=sampling,
    engine=EngineConfig(**config.engine),
    remotes=_remotes(config, sampling),
    train=TrainConfig(seed=config.seed, **config.train),
    evaluation=evaluation,
    journal=journal,
  )


def model_path(name: str) -> str:
  """The folder or hub name that a model's name stands for."""
  return str(TINY / EMBEDDED[name]) if name in EMBEDDED else name


def mesh_of(run: Run) -> Mesh:
  """The mesh of all devices."""
  return make_mesh(**run.config['mesh'])


def local_mesh(run: Run) -> Mesh:
  """The mesh of this process: each samples its own share of the prompts, on a model of its own."""
  sizes = run.config['mesh']
  if jax.process_count() > 1:
    split = {'data': -1, 'fsdp': 1} if sizes['fsdp'] == 1 else {'data': 1, 'fsdp': -1}
    sizes = sizes | split
  return make_mesh(**sizes, devices=jax.local_devices())


def model_loader(run: Run) -> ModelLoader:
  """Return the loader of the models that scorers and measures use; 'base' means M_θ."""
  aliases = {name: model_path(name) for name in EMBEDDED}
  aliases['base'] = model_path(run.config['model']['base'])
  return ModelLoader(run.config['model']['dtype'], local_mesh(run), aliases)


def load_scorer(run: Run) -> Scorer | None:
  """Return the scorer that `evaluation.scorer` names, or None if it is 'none'."""
  return SCORERS[run.evaluation.scorer](model_loader(run))


def published(path: str) -> dict[str, Any]:
  """The summary of a file of the paper's samples.

  Raises:
    ValueError: if it is none.
  """
  try:
    rows, principles = read_published_samples(path)
  except ValueError as error:
    raise UserError(f'report.published: {error}') from error
  summary = quality_summary.summarise(rows, quality.build_references(principles))
  del summary['flags']['truncated']  # the samples do not say how they ended
  return summary


def _prompts(name: str, section: ConfigDict, seed: int) -> list[Prompt]:
  """Load one of the prompt sets; a set without a source is empty."""
  try:
    return load_prompts(PromptSource(**section), seed)
  except UserError as error:
    raise UserError(f'prompts.{name}: {error}') from error


def _sampling(name: str, section: ConfigDict) -> SamplingConfig:
  try:
    return SamplingConfig(**section)
  except ValueError as error:
    raise UserError(f'sampling.{name}: {error}') from error


def _fingerprint(prompts: Sequence[Prompt]) -> str:
  """Hex digest of ids, messages and metadata, in order."""
  content = json.dumps([dataclasses.astuple(prompt) for prompt in prompts], sort_keys=True)
  return hashlib.sha256(content.encode()).hexdigest()[:16]


def _remotes(config: ConfigDict, sampling: StageSampling) -> dict[str, RemoteConfig]:
  """The models that are served elsewhere, checked as far as the config says."""
  sections = {name: section for name, section in config.remote.items() if section.url}
  found = {}
  for name, section in sections.items():
    if config.model[name]:
      raise UserError(
        f'model.{name}={config.model[name]!r} and remote.{name}.url={section.url!r} are both set; '
        f"one model is meant: set model.{name}='' or remote.{name}.url=''."
      )
    try:
      found[name] = RemoteConfig(**section)
      for stage in dataclasses.fields(sampling):
        own = stage.name in sections or config.model.get(stage.name)
        if name == (stage.name if own else 'base'):
          found[name].check_sampling(getattr(sampling, stage.name))
    except ValueError as error:
      raise UserError(f'remote.{name}: {str(error).removeprefix("remote: ")}') from error
  if not config.model.base and 'base' not in found:
    raise UserError('model.base is empty: name a checkpoint, or set remote.base.url.')
  return found
