"""Runs Constitutional AI's supervised phase: generate, train, evaluate, report.

  python launch.py --config=configs/tiny.py --workdir=runs/tiny
  python launch.py --config=configs/tiny.py --workdir=runs/tiny --stages=train,evaluate

A stage that is done is not done again; one that was killed goes on. Any field of the config is
overridden as `--config.train.learning_rate=1e-4`.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import pathlib
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from absl import app, flags, logging
from jax.experimental import multihost_utils
from ml_collections import ConfigDict, config_flags

from cai_jax import constitution as constitutions
from cai_jax import parallel, quality
from cai_jax.dialogue import Dialogue
from cai_jax.evaluation import scores, suite
from cai_jax.evaluation.suite import EvaluationConfig
from cai_jax.feedback import generate, records
from cai_jax.feedback import prompts as prompt_files
from cai_jax.feedback.prompts import Prompt
from cai_jax.manifest import Manifest, check_workdir, flat, write_json
from cai_jax.model import kernels, lora
from cai_jax.model import lm as models
from cai_jax.model.lm import LM
from cai_jax.progress import Progress
from cai_jax.report import table, write_report
from cai_jax.sampling import generate as answers
from cai_jax.sampling import remote
from cai_jax.sampling.engine import EngineConfig
from cai_jax.sampling.journal import Journal
from cai_jax.sampling.local import describe
from cai_jax.sampling.remote import Remote, RemoteConfig
from cai_jax.sampling.types import SamplingConfig
from cai_jax.tiny import prompts as tiny_prompts
from cai_jax.tiny import world
from cai_jax.training import data, loop
from cai_jax.training import log as logs
from cai_jax.training.config import FREE, TrainConfig
from configs import default

PROMPT_SETS = ('harmful', 'helpful', 'eval_harmful', 'eval_helpful')
SCORERS = {'none': None, 'tiny': world.judge}
TINY = pathlib.Path(world.__file__).parent
EMBEDDED = {'tiny': 'model', 'tiny-small': 'model_small'}  # folders of the embedded models


@dataclasses.dataclass(frozen=True)
class Run:
  """A config made into checked parts, and the folder they work in."""

  config: dict[str, Any]  # resolved
  workdir: pathlib.Path
  constitution: constitutions.Constitution
  prompts: dict[str, list[Prompt]]  # by PROMPT_SETS
  feedback: generate.FeedbackConfig
  sampling: generate.StageSampling
  engine: EngineConfig
  remotes: dict[str, RemoteConfig]  # of 'base', 'critique' and 'revision', those served elsewhere
  train: TrainConfig
  evaluation: EvaluationConfig
  profile: int = 0  # training steps that a trace is written of
  journal: pathlib.Path | None = None  # folder of the turns; None is workdir/journal

  @property
  def scorer(self) -> scores.Scorer | None:
    """Who judges a response."""
    return SCORERS[self.evaluation.scorer]

  def settings(self, stage: str) -> dict[str, Any]:
    """What the result of a stage depends on."""
    known = {name: self.config[name] for name in ('seed', 'model', 'feedback', 'sampling')}
    known['feedback'] = {k: v for k, v in known['feedback'].items() if k not in generate.FREE}
    if self.remotes:  # what is served; where, and how patiently it is asked, may change
      known['remote'] = {
        name: {field: getattr(served, field) for field in remote.TEXT_FIELDS}
        for name, served in self.remotes.items()
      }
    known['constitution'] = self.constitution.fingerprint()
    sets = PROMPT_SETS[:2] if stage in ('generate', 'train') else PROMPT_SETS
    known['prompts'] = {name: _fingerprint(self.prompts[name]) for name in sets}
    if stage != 'generate':
      known['train'] = {k: v for k, v in self.config['train'].items() if k not in FREE}
    if stage in ('evaluate', 'report'):
      known['evaluation'] = self.config['evaluation']
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
  resolved = json.loads(config.to_json_best_effort())
  unknown = sorted(set(flat(resolved)) - set(flat(default.get_config().to_dict())))
  if unknown:
    raise ValueError(
      f'unknown config field {", ".join(unknown)}; configs/default.py lists every field.'
    )
  if not str(workdir):
    raise ValueError('workdir is empty; give the folder of the run.')
  if not 0 <= config.seed < 2**63:
    raise ValueError(f'seed={config.seed} is not in [0, 2**63).')
  if config.report.chains < 0:
    raise ValueError(f'report.chains={config.report.chains}; it must be at least 0.')
  if config.evaluation.scorer not in SCORERS:
    raise ValueError(
      f'evaluation.scorer={config.evaluation.scorer!r} is not one of {tuple(SCORERS)}.'
    )
  if config.evaluation.judge == 'base' and not config.model.base:
    raise ValueError(
      "evaluation.judge='base' needs M_θ here, and it is served elsewhere: name a model."
    )
  evaluation = EvaluationConfig(**config.evaluation)
  sets = {name: _prompts(name, config.prompts[name], config.seed) for name in PROMPT_SETS}
  if not sets['harmful']:
    raise ValueError('prompts.harmful.source is empty: give prompts whose answers are revised.')
  for pair in (PROMPT_SETS[:2], PROMPT_SETS[2:]):
    ids = [prompt.id for name in pair for prompt in sets[name]]
    if len(set(ids)) < len(ids):
      twice = next(i for i in ids if ids.count(i) > 1)
      raise ValueError(f'prompts.{pair[0]} and prompts.{pair[1]} both have the id {twice!r}.')
  sampling = generate.StageSampling(
    **{name: _sampling(name, section) for name, section in config.sampling.items()}
  )
  if config.feedback.helpful_samples > 1 and not sampling.initial.temperature:
    raise ValueError(
      f'feedback.helpful_samples={config.feedback.helpful_samples} answers would all be the same '
      'at sampling.initial.temperature=0: raise it, or sample once.'
    )
  if config.report.published:
    _published(config.report.published)
  held_out = sets['eval_harmful'] + sets['eval_helpful']
  prompt_files.check_disjoint(sets['harmful'] + sets['helpful'], held_out)
  return Run(
    config=resolved,
    workdir=pathlib.Path(workdir),
    constitution=_constitution(config.constitution),
    prompts=sets,
    feedback=generate.FeedbackConfig(**config.feedback),
    sampling=sampling,
    engine=EngineConfig(**config.engine),
    remotes=_remotes(config, sampling),
    train=TrainConfig(seed=config.seed, **config.train),
    evaluation=evaluation,
    journal=journal,
  )


def run_stages(run: Run, stages: Sequence[str], say: Callable[[str], None] = print) -> None:
  """Runs those of the stages that are not done, in their order.

  Raises:
    ValueError: for an unknown stage, a workdir that cannot be used or that holds another run.
  """
  unknown = [name for name in stages if name not in STAGES]
  if not stages:
    raise ValueError(f'no stage is given; there is {", ".join(STAGES)}.')
  if unknown:
    raise ValueError(f'unknown stage {", ".join(unknown)}; there is {", ".join(STAGES)}.')
  _together('check', lambda: check(run, stages))
  first = jax.process_index() == 0
  manifest = Manifest(run.workdir, writes=first)
  for name in list(STAGES)[: max(map(list(STAGES).index, stages)) + 1]:
    manifest.check(name, run.settings(name))
    if name not in stages and not manifest.done(name):
      raise ValueError(f'stage {name} is not done in {run.workdir}; add it to --stages.')
  if any(name in ('generate', 'evaluate') and not manifest.done(name) for name in stages):
    _together('reach servers', lambda: _check_reachable(run))
  _barrier('manifest read')
  if first:
    write_json(run.workdir / 'config.json', run.config)
  for name in (name for name in STAGES if name in stages):
    if manifest.done(name):
      say(f'{name}: done before')
      continue
    say(f'{name} ...')
    with manifest.stage(name, run.settings(name)) as entry:
      entry |= STAGES[name](run, manifest.content)
    say(f'{name}: {entry["seconds"]:.0f} s')
    _barrier(name)


def check(run: Run, stages: Sequence[str]) -> None:
  """Checks what the stages need of models, devices and disk, before the first of them starts.

  Raises:
    ValueError: naming the field and what it may be.
  """
  section = run.config['model']
  init = section['init'] or section['base']
  if not init and {'train', 'evaluate'} & {*stages}:
    raise ValueError(
      'model.init is empty: with M_θ served elsewhere it must name the checkpoint that M_aligned '
      'starts from. Give it, or choose --stages=generate.'
    )
  names = {section[name] for name in ('base', 'critique', 'revision', 'init')} - {''}
  if 'evaluate' in stages:
    names |= {run.evaluation.judge} - {'', 'base'}
  parts = {name: models.check(model_path(name)) for name in names}
  mesh = _mesh(run)
  for part in parts.values():
    parallel.param_shardings(models.structure(part.config)[1], mesh)
  parallel.check_batch(run.engine.slots, _local_mesh(run), 'engine.slots')
  rows = run.train.batch_size // run.train.accumulation
  parallel.check_batch(rows, mesh, 'train.batch_size / train.accumulation')
  try:
    kernels.check(run.train.attention, mesh, run.train.dtype, run.train.max_length)
  except ValueError as error:
    raise ValueError(f'train.attention: {error}') from None
  if init and run.train.lora is not None:
    lora.structure(parts[init].config, run.train.lora)
  if run.train.probes and not (run.prompts['eval_harmful'] or run.prompts['eval_helpful']):
    raise ValueError(
      f'train.probes={run.train.probes} needs held-out prompts: give prompts.eval_harmful.source.'
    )
  if init:
    _check_aligned(run, stages, init, parts[init])
  share, replies = run.train.helpfulness_share, len(run.prompts['harmful'])
  replies *= run.feedback.rounds if run.train.target == 'all' else 1
  wanted = round(share * replies / (1 - share))
  samples = run.feedback.helpful_samples
  if 'train' in stages and wanted > samples * len(run.prompts['helpful']):
    raise ValueError(
      f'train.helpfulness_share={share} beside {replies} replies to harmful prompts needs {wanted} '
      f'helpful prompts, and there are {len(run.prompts["helpful"])}, each answered '
      f'feedback.helpful_samples={samples} times: give more as prompts.helpful, or lower the share.'
    )
  if 'evaluate' in stages and not run.prompts['eval_harmful']:
    raise ValueError(
      'prompts.eval_harmful.source is empty: evaluation needs held-out prompts. Give some, or '
      'choose --stages=generate,train.'
    )
  trained = parts[init].config.num_params if init else 0
  check_workdir(run.workdir, needed_bytes=_disk_bytes(run, trained))


def _check_aligned(run: Run, stages: Sequence[str], name: str, parts: models.Parts) -> None:
  """Checks that the model `name`, once trained, can learn and answer the run's prompts."""
  context = parts.config.max_positions
  if run.train.max_length > context:
    raise ValueError(
      f'train.max_length={run.train.max_length} is more than the {context} tokens of the context '
      f'of {name}.'
    )
  options = run.feedback.style, parts.eos_token_ids, run.feedback.template_options
  dialogue = Dialogue(parts.tokenizer, *options)
  lengths = {
    key: [len(dialogue.prompt(p.messages)) for p in run.prompts[key]] for key in PROMPT_SETS
  }
  if 'train' in stages and min(lengths['harmful']) + 2 > run.train.max_length:
    raise ValueError(
      f'train.max_length={run.train.max_length} holds no prompt with its reply: the shortest '
      f'prompt has {min(lengths["harmful"])} tokens.'
    )
  longest = max(lengths['eval_harmful'] + lengths['eval_helpful'], default=0)
  sampled = 'evaluate' in stages or run.train.probes
  if sampled and longest + run.sampling.initial.max_tokens > context:
    raise ValueError(
      f'a held-out prompt has {longest} tokens and its reply up to '
      f'{run.sampling.initial.max_tokens} (sampling.initial.max_tokens); {name} holds {context}.'
    )


def generate_stage(run: Run, _) -> dict[str, Any]:
  """D_CAI, the implied preferences, and what the revisions are like."""
  folder = run.workdir / 'd_cai'
  with loaded_models(run) as loaded:
    if run.prompts['eval_harmful']:  # so that a held-out prompt that is too long is found now
      prepare_job(run, loaded, run.prompts['eval_harmful'], run.prompts['eval_helpful'])
    helpful = generate.several(run.prompts['helpful'], run.feedback.helpful_samples)
    job = prepare_job(run, loaded, run.prompts['harmful'], helpful)
    counts = _sample(run, job, folder, 'generate')
  if jax.process_index() == 0:
    pairs = records.write_preferences(run.workdir / 'preferences.jsonl', data.read_rows(folder))
    counts |= {'preferences': pairs}
  _together('keep feedback.max_rate', lambda: _check_quality(run, folder))
  return {'rows_in': counts.pop('rows'), 'tokens': counts.pop('sampled_tokens'), **counts}


def _check_quality(run: Run, folder: pathlib.Path) -> None:
  """Writes quality.json and prints its table, in process 0.

  Raises:
    ValueError: if a rate is above its limit in feedback.max_rate.
  """
  if jax.process_index() != 0:
    return
  summary, published = quality.summarise(data.read_rows(folder), _references(run)), None
  path = run.config['report']['published']
  if path:
    published = _published(path)
  both = {'d_cai': summary} | ({'published': published} if path else {})
  write_json(run.workdir / 'quality.json', both)
  print(quality.describe(summary, published), flush=True)
  over = quality.over(summary, run.feedback.max_rate)
  if over:
    raise ValueError(
      f'feedback.max_rate is exceeded ({"; ".join(over)}). All rows are kept in {folder}, the '
      'rates of each round in quality.json. Look at the rows; then raise the limit and start again '
      'in the same workdir, where nothing is sampled again, and leave the rows out of training by '
      'train.filters if you want; or change the prompts, principles, models or sampling in '
      'another.'
    )


def _references(run: Run) -> quality.References:
  """What revisions may have been copied from."""
  requests = {p.id: (p.critique_request, p.revision_request) for p in run.constitution.principles}
  return quality.references(requests, run.constitution.demonstrations)


def _published(path: str) -> dict[str, Any]:
  """The summary of a file of the paper's samples.

  Raises:
    ValueError: if it is none.
  """
  try:
    rows, principles = quality.published_rows(path)
  except ValueError as error:
    raise ValueError(f'report.published: {error}') from error
  summary = quality.summarise(rows, quality.references(principles))
  del summary['flags']['truncated']  # the samples do not say how they ended
  return summary


def train_stage(run: Run, _) -> dict[str, Any]:
  """M_aligned, fine-tuned on D_CAI."""
  path = run.config['model']['init'] or run.config['model']['base']
  lm = models.load(model_path(path), dtype=run.train.dtype, mesh=_mesh(run), param_dtype='float32')
  style, options = run.feedback.style, run.feedback.template_options
  dialogue = Dialogue(lm.tokenizer, style, lm.eos_token_ids, options)
  rows = data.read_rows(run.workdir / 'd_cai')
  probe = _probe(run, lm) if run.train.probes else None
  params, summary = loop.train(
    lm, rows, dialogue, run.train, run.workdir, probe, run.profile, _references(run)
  )
  folder = run.workdir / 'model'
  models.save(dataclasses.replace(lm, params=params), folder)
  return {
    'rows_in': summary.pop('rows'),
    'rows_kept': summary.pop('kept'),
    'rows_dropped': summary.pop('dropped'),
    'tokens': summary.pop('target_tokens'),
    'tokens_per_second': summary.pop('target_tokens_per_second'),
    **summary,
  }


def _probe(run: Run, lm: LM) -> loop.Probe:
  """Answers to the first held-out prompts by parameters as they are, sampled by process 0."""
  chosen = [*run.prompts['eval_harmful'], *run.prompts['eval_helpful']][: run.train.probes]
  mesh, dtype = _local_mesh(run), run.config['model']['dtype']

  def probe(params) -> list[dict[str, str]]:
    local = parallel.localise(params, mesh, dtype)
    return _together('answer probe prompts', lambda: answer(local))

  def answer(local) -> list[dict[str, str]]:
    if jax.process_index() != 0:
      return []
    model = dataclasses.replace(lm, params=local, mesh=mesh, dtype=dtype)
    found = answers.generate(
      model,
      [list(prompt.messages) for prompt in chosen],
      run.sampling.initial,
      run.config['seed'],
      style=run.feedback.style,
    )
    return [
      {'id': prompt.id, 'prompt': prompt.messages[-1]['content'], 'text': answer.text}
      for prompt, answer in zip(chosen, found, strict=True)
    ]

  return probe


def evaluate_stage(run: Run, _) -> dict[str, Any]:
  """Scores of every round, of M_θ and of M_aligned, on the held-out prompts."""
  harmful, helpful = run.prompts['eval_harmful'], run.prompts['eval_helpful']
  folder = run.workdir / 'evaluation'
  told = {}
  with loaded_models(run) as loaded:
    base = _sample(run, prepare_job(run, loaded, harmful, helpful), folder / 'base', 'base')
    rows = {'base': list(data.read_rows(folder / 'base'))}
    if isinstance(loaded['base'], LM):
      told['base'] = _of_model(run, loaded['base'], rows['base'])
  del loaded  # M_aligned takes its place
  aligned = models.load(run.workdir / 'model', run.config['model']['dtype'], _local_mesh(run))
  answers = prepare_job(run, {'base': aligned}, [], [*harmful, *helpful])
  counts = _sample(run, answers, folder / 'aligned', 'aligned')
  rows['aligned'] = list(data.read_rows(folder / 'aligned'))
  told['aligned'] = _of_model(run, aligned, rows['base'])
  del aligned
  if jax.process_index() == 0:
    summary = scores.summarise(rows['base'], rows['aligned'], run.scorer, measures(run))
    if run.evaluation.judge:
      told['judge'] = _judged(run, rows)
    write_json(folder / 'models.json', told)
    if text := suite.describe(told):
      print(text, flush=True)
    write_json(folder / 'summary.json', summary)
  return {'base': base, 'aligned': counts, 'rows_in': base['rows']}


def _judged(run: Run, rows: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
  """How often a judge prefers M_aligned's answers to M_θ's."""
  name = run.evaluation.judge
  path = model_path(run.config['model']['base'] if name == 'base' else name)
  judge = models.load(path, run.config['model']['dtype'], _local_mesh(run))
  seed = run.config['seed']
  return suite.judged(run.evaluation, judge, rows['base'], rows['aligned'], seed)


def measures(run: Run) -> dict[str, scores.Measure]:
  """What is measured of each response besides the scorer's verdict; models for it are loaded."""
  dtype, style = run.config['model']['dtype'], run.feedback.style
  return suite.measures(run.evaluation, dtype, _local_mesh(run), style)


def _of_model(run: Run, lm: LM, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
  """What a model's log-probabilities tell, by process 0."""

  def ask() -> dict[str, Any]:
    if jax.process_index() != 0:
      return {}
    options = run.feedback.style, lm.eos_token_ids, run.feedback.template_options
    return suite.of_model(run.evaluation, lm, rows, Dialogue(lm.tokenizer, *options))

  return _together('evaluate a model', ask)


def report_stage(run: Run, manifest: dict[str, Any]) -> dict[str, Any]:
  """report.html."""
  if jax.process_index() != 0:
    return {}
  summary = json.loads((run.workdir / 'evaluation' / 'summary.json').read_text())
  if not (run.workdir / logs.METRICS).exists():
    raise ValueError(f'{run.workdir / logs.METRICS} is gone: put it back, or train again.')
  rows = data.read_rows(run.workdir / 'd_cai')
  told = json.loads((run.workdir / 'evaluation' / 'models.json').read_text())
  found = json.loads((run.workdir / 'quality.json').read_text())
  shown = [rows[i] for i in range(min(len(rows), run.config['report']['chains']))]
  write_report(
    run.workdir / 'report.html',
    title=run.workdir.name,
    config=run.config,
    manifest=manifest,
    summary=summary,
    training=logs.read(run.workdir / logs.METRICS),
    held_out=logs.read(run.workdir / logs.HELD_OUT),
    probes=logs.read(run.workdir / logs.PROBES),
    texts={
      'Quality of the revisions': quality.describe(found['d_cai'], found.get('published')),
      'Models': suite.describe(told),
    },
    chains=[browsable(row, run.scorer) for row in shown],
  )
  return {'chains': len(shown)}


STAGES = {
  'generate': generate_stage,
  'train': train_stage,
  'evaluate': evaluate_stage,
  'report': report_stage,
}


def _prompts(name: str, section: ConfigDict, seed: int) -> list[Prompt]:
  """One of the prompt sets; [] where it has no source."""
  if not section.source:
    return []
  if section.source == 'tiny':
    if section.limit < 1:
      raise ValueError(
        f"prompts.{name}.limit={section.limit}: 'tiny' makes as many as it says, at least 1."
      )
    idle = [field for field in ('subset', 'field', 'shuffle', 'metadata_fields') if section[field]]
    if idle:
      raise ValueError(f"prompts.{name}: 'tiny' has no use for {', '.join(idle)}; leave it out.")
    return tiny_prompts.prompts(section.split, section.limit, seed, section.name)
  fields = section.to_dict() | {'shuffle_seed': seed if section.shuffle else None}
  del fields['shuffle']
  try:
    return prompt_files.load(**fields)
  except ValueError as error:
    raise ValueError(f'prompts.{name}: {error}') from error


def _sampling(name: str, section: ConfigDict) -> SamplingConfig:
  try:
    return SamplingConfig(**section)
  except ValueError as error:
    raise ValueError(f'sampling.{name}: {error}') from error


def _fingerprint(prompts: Sequence[Prompt]) -> str:
  """Hex digest of ids, messages and metadata, in order."""
  content = json.dumps([dataclasses.astuple(prompt) for prompt in prompts], sort_keys=True)
  return hashlib.sha256(content.encode()).hexdigest()[:16]


def _constitution(section: ConfigDict) -> constitutions.Constitution:
  shipped = {'general': constitutions.GENERAL, 'tiny': TINY / 'constitution.yaml'}
  path = str(shipped.get(section.path, section.path))
  return constitutions.load(path, tuple(section.tags), tuple(section.ids))


def model_path(name: str) -> str:
  """The folder or hub name that a model's name stands for."""
  return str(TINY / EMBEDDED[name]) if name in EMBEDDED else name


def _mesh(run: Run):
  return parallel.make_mesh(**run.config['mesh'])


def _local_mesh(run: Run):
  """The mesh of this process: each samples its own share of the prompts, on a model of its own."""
  sizes = run.config['mesh']
  if jax.process_count() > 1:
    split = {'data': -1, 'fsdp': 1} if sizes['fsdp'] == 1 else {'data': 1, 'fsdp': -1}
    sizes = sizes | split
  return parallel.make_mesh(**sizes, devices=jax.local_devices())


@contextlib.contextmanager
def loaded_models(run: Run) -> Iterator[dict[str, LM | Remote]]:
  """M_θ, and M_critique and M_revise where they are others; loaded once each."""
  section = run.config['model']
  mesh = _local_mesh(run)
  names = {
    name: section[name]
    for name in ('base', 'critique', 'revision')
    if section[name] and (name == 'base' or section[name] != section['base'])
  }

  def load(path: str) -> LM:
    return dataclasses.replace(models.load(model_path(path), section['dtype'], mesh), name=path)

  with contextlib.ExitStack() as open_remotes:
    served = {}
    for name, settings in run.remotes.items():
      served[name] = Remote(settings)
      open_remotes.callback(served[name].close)
    loaded = {path: load(path) for path in set(names.values())}
    yield {name: loaded[path] for name, path in names.items()} | served


def _remotes(config: ConfigDict, sampling: generate.StageSampling) -> dict[str, RemoteConfig]:
  """The models that are served elsewhere, checked as far as the config says."""
  sections = {name: section for name, section in config.remote.items() if section.url}
  found = {}
  for name, section in sections.items():
    if config.model[name]:
      raise ValueError(
        f'model.{name}={config.model[name]!r} and remote.{name}.url={section.url!r} are both set; '
        f"one model is meant: set model.{name}='' or remote.{name}.url=''."
      )
    try:
      found[name] = RemoteConfig(**section)
      for stage in dataclasses.fields(sampling):
        own = stage.name in sections or config.model.get(stage.name)
        if name == (stage.name if own else 'base'):
          remote.check_sampling(found[name], getattr(sampling, stage.name))
    except ValueError as error:
      raise ValueError(f'remote.{name}: {str(error).removeprefix("remote: ")}') from error
  if not config.model.base and 'base' not in found:
    raise ValueError('model.base is empty: name a checkpoint, or give remote.base.url.')
  return found


def _check_reachable(run: Run) -> None:
  """Asks each server once whether it serves its model."""
  for name, settings in run.remotes.items():
    try:
      with contextlib.closing(Remote(settings)) as served:
        served.check()
    except ValueError as error:
      raise ValueError(f'remote.{name}: {str(error).removeprefix("remote: ")}') from error


def prepare_job(run: Run, loaded: dict[str, LM | Remote], harmful, helpful) -> generate.Job:
  """The chains of harmful prompts and answers to helpful ones by the loaded models."""
  seed = run.config['seed']
  return generate.prepare(
    loaded, harmful, helpful, run.constitution, run.feedback, run.sampling, seed
  )


def _sample(run: Run, job: generate.Job, folder: pathlib.Path, name: str) -> dict[str, Any]:
  """Runs a job's chains into a dataset."""
  journal = Journal(run.journal or run.workdir / 'journal', jax.process_index())
  with Progress(name) as progress:
    work = lambda: generate.run(job, folder, journal, run.engine, progress)  # noqa: E731
    counts = _together(f'sample {folder}', work)
  journal.close()
  counts = _over_processes(counts) | {'engine': run.config['engine']}
  if jax.process_index() == 0:
    if counts['sampled_rows']:
      print(describe(counts), flush=True)
    generate.finish(job, folder)
  _barrier(f'finished {folder}')
  return counts


def _over_processes(counts: dict[str, float]) -> dict[str, float]:
  """What all processes counted: sums, but the longest time and what is the same for each."""
  if jax.process_count() == 1:
    return counts
  table = multihost_utils.process_allgather(np.array(list(counts.values()), np.float64))
  kept = ('rows', 'seconds', 'slots', 'most_slots', 'occupancy')
  totals = np.where([name in kept for name in counts], table.max(0), table.sum(0)).tolist()
  return {name: type(count)(t) for (name, count), t in zip(counts.items(), totals, strict=True)}


def browsable(row: dict[str, Any], scorer: scores.Scorer | None) -> dict[str, Any]:
  """A row of D_CAI as the report shows it."""
  shown = {k: row[k] for k in ('id', 'prompt', 'initial')}
  shown['rounds'] = [
    step | {'critique': step['critique'] if step['critique']['finish_reason'] else None}
    for step in row['rounds']
  ]
  if scorer is not None:
    responses = [row['initial'], *(step['revision'] for step in row['rounds'])]
    shown['violations'] = [
      sorted(scorer(row['prompt'], reply['text']).violations) for reply in responses
    ]
  return shown


def _disk_bytes(run: Run, num_params: int) -> int:
  """About what a run writes: f32 parameters and two moments a checkpoint, a model, the rows."""
  rows = sum(map(len, run.prompts.values())) * 50_000
  return 4 * num_params * (3 * (run.train.keep + 1) + 1) + rows + 100_000_000


def _together(name: str, work: Callable[[], Any]) -> Any:
  """The result of `work`, once all processes have theirs; where one fails, all end with an error.

  The others come to the end of their own work first: what they have done is kept.
  """
  error, result = None, None
  try:
    result = work()
  except (ValueError, OSError) as caught:
    error = caught
  if jax.process_count() > 1:
    well = multihost_utils.process_allgather(np.array(error is None))
    if error is None and not well.all():
      failed = ', '.join(map(str, np.flatnonzero(~well)))
      raise ValueError(f'process {failed} could not {name}; its own output says why.')
  if error is not None:
    raise error
  return result


def _barrier(name: str) -> None:
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices(name)


_CONFIG = config_flags.DEFINE_config_file(
  'config', None, 'file that states the run', lock_config=True
)
_WORKDIR = flags.DEFINE_string('workdir', None, 'folder of the run')
_PROFILE = flags.DEFINE_integer(
  'profile', 0, 'training steps that a trace is written of, to workdir/profile', lower_bound=0
)
_STAGES = flags.DEFINE_list('stages', list(STAGES), 'stages to run')


def main(argv: Sequence[str]) -> None:
  """Builds the run that the flags state and runs its stages."""
  if len(argv) > 1:
    raise app.UsageError(f'unexpected arguments {argv[1:]}')
  logging.set_verbosity(logging.WARNING)  # Orbax and TFDS tell every step of theirs
  parallel.initialize()
  say = print if jax.process_index() == 0 else lambda text: None
  try:
    run = dataclasses.replace(build(_CONFIG.value, _WORKDIR.value), profile=_PROFILE.value)
    run_stages(run, _STAGES.value, say)
  except (ValueError, FloatingPointError, ConnectionError) as error:
    sys.exit(f'error: {error}')
  except loop.Preempted as ended:
    print(f'SIGTERM: {ended} The same command goes on from here.', file=sys.stderr)
    sys.exit(128 + signal.SIGTERM)
  except KeyboardInterrupt:
    sys.exit('stopped; the same command goes on from here.')
  summary = run.workdir / 'evaluation' / 'summary.json'
  if summary.exists():
    say(f'\n{table(json.loads(summary.read_text()))}\n')
  if 'report' in _STAGES.value:
    say(f'report: {run.workdir / "report.html"}')


def parse(argv: list[str]) -> list[str]:
  """What is left of the arguments after the flags; a field that no config has ends the program."""
  try:
    return app.parse_flags_with_usage(argv)
  except AttributeError as error:  # ml_collections' word for it
    told = ' '.join(str(error.args[0] if error.args else error).split())
    sys.exit(f'error: unknown config field {told}; configs/default.py lists every field.')


if __name__ == '__main__':
  flags.mark_flags_as_required(['config', 'workdir'])
  app.run(main, flags_parser=parse)
