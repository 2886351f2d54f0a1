"""Estimate what an experiment will cost before it runs: turns, tokens, time and memory."""

import dataclasses
import functools
import hashlib
import json
import pathlib
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cai_jax import pipeline
from cai_jax.feedback import generate
from cai_jax.model import lm as models
from cai_jax.model.config import ModelConfig
from cai_jax.model.lm import LM
from cai_jax.pipeline import prompt_sets
from cai_jax.pipeline.label_turns import count_label_turns
from cai_jax.pipeline.policies import list_policies
from cai_jax.pipeline.preference_sizes import measure_trainings
from cai_jax.pipeline.space import Need, describe_space, estimate_space, journal_bytes
from cai_jax.runtime.files import read_json, write_json
from cai_jax.runtime.manifest import Manifest
from cai_jax.sampling.caches import cache_bytes
from cai_jax.sampling.journal import Journal
from cai_jax.sampling.types import SamplingConfig
from cai_jax.tiny.files import model_path
from cai_jax.training.config import TrainConfig

PROBE_CHAINS = 64  # chains sampled to measure the speed, at most
START_SECONDS = 3.0  # per run, besides sampling and training: loading, compiling, writing
UTILIZATION = 0.35  # of a train step, relative to plain matrix products; experiments/RESULTS.md
# Training holds the parameters, two moments, the gradient, and two copies while it saves a
# checkpoint.
TRAINING_COPIES = 6
PROCESS_GIB = 1.0  # memory of a process that has only imported and compiled


@dataclasses.dataclass(frozen=True)
class Turns:
  """A number of turns with a common limit on their length, in tokens."""

  count: int
  max_tokens: int


def count_turns(run: pipeline.Run, stages: Sequence[str]) -> dict[str, Turns]:
  """Return the turns that a run needs, by a digest of what determines their text.

  Runs that share turns share digests: a digest covers the settings and the rounds up to a turn, but
  not the rounds after it.

  Args:
    run: the run.
    stages: names of the stages that it goes through.
  """
  turns_by_digest: dict[str, Turns] = {}
  if 'generate' in stages:
    turns_by_digest |= _chain_turns(run, ('harmful', 'helpful'), 'base')
  if 'evaluate' in stages:
    turns_by_digest |= _chain_turns(run, ('eval_harmful', 'eval_helpful'), 'base')
    turns_by_digest |= _chain_turns(run, ('eval_harmful', 'eval_helpful'), _aligned_model(run))
    for policy in list_policies(run.config):
      model = _digest([run.settings('prefer'), policy.name])
      turns_by_digest |= _chain_turns(run, ('eval_harmful', 'eval_helpful'), model)
  return turns_by_digest | _preference_turns(run, stages)


def _preference_turns(run: pipeline.Run, stages: Sequence[str]) -> dict[str, Turns]:
  """Return the turns of stage label, and those of which the reward model keeps the best."""
  turns_by_digest: dict[str, Turns] = {}
  answer = run.config.sampling.initial
  if 'label' in stages:
    label, settings = count_label_turns(run), run.settings('label')
    turns_by_digest |= _reply_turns(label.responses, answer, [settings, 'responses'])
    questions = Turns(label.questions, label.tokens)
    turns_by_digest[_digest([settings, 'questions'])] = questions
  if 'prefer' in stages and (copies := run.config.reward.best_of_n):
    settings = run.settings('generate')
    parts = [settings[name] for name in ('seed', 'model', 'sampling', 'feedback', 'prompts')]
    count = copies * sum(len(run.prompts[name]) for name in prompt_sets.TRAINING)
    turns_by_digest |= _reply_turns(count, answer, [parts, 'best of', copies])
  return {name: turns for name, turns in turns_by_digest.items() if turns.count}


def _aligned_model(run: pipeline.Run) -> str:
  """Return the name of M_aligned, or a digest of the settings that train it."""
  if run.config.model.aligned:
    return run.config.model.aligned
  settings = run.settings('train')
  if settings['train']['loss'] == TrainConfig.loss:  # version 0.1.0 had no such field
    del settings['train']['loss']
  return _digest(settings)


def _chain_turns(run: pipeline.Run, names: Sequence[str], model: str) -> dict[str, Turns]:
  """Return the turns over the named prompt sets.

  Args:
    run: holds the prompts and the settings.
    names: prompt sets.
    model: 'base' for M_θ, which also critiques and revises; any other model only answers.
  """
  settings = run.settings('evaluate')
  feedback = {k: v for k, v in settings['feedback'].items() if k not in ('rounds', 'shard_rows')}
  answer_settings = [
    settings['seed'],
    model,
    settings['model']['base'] if model == 'base' else '',
    settings['sampling']['initial'],
    [feedback[k] for k in ('style', 'template_options')],
  ]
  revision_settings = [
    answer_settings,
    {name: model for name, model in settings['model'].items() if name != 'aligned'} | {'init': ''},
    settings['sampling'],
    feedback,
    settings['constitution'],
    settings.get('remote'),
  ]
  turns_by_digest: dict[str, Turns] = {}
  for name in names:
    samples = run.config.feedback.helpful_samples if name == 'helpful' else 1
    count, prompts = samples * len(run.prompts[name]), [settings['prompts'][name], samples]
    turns_by_digest |= _reply_turns(count, run.config.sampling.initial, [answer_settings, prompts])
    if model != 'base' or name.endswith('helpful'):
      continue
    for turn, stage in run.config.feedback.plan():
      if turn != 'initial':  # counted above, since runs with other variants share it
        sampling = run.config.sampling.of_stage(stage, run.config.feedback.variant)
        turns_by_digest |= _reply_turns(count, sampling, [revision_settings, prompts, turn])
  return turns_by_digest


def _reply_turns(count: int, sampling: SamplingConfig, identity: list[Any]) -> dict[str, Turns]:
  """Return the turns that sample one reply in each of some chains, by digest.

  Args:
    count: number of chains.
    sampling: settings of the reply. If thoughts have a budget, they are a turn of their own.
    identity: everything that determines the replies.
  """
  turns = {_digest(identity): Turns(count, sampling.max_tokens)}
  if sampling.max_thought_tokens:
    turns[_digest([*identity, 'thoughts'])] = Turns(count, sampling.max_thought_tokens)
  return turns


class SampledTurns:
  """The digests of turns that a workdir's journal already holds, stored beside the journal."""

  def __init__(self, workdir: pathlib.Path):
    self._path = workdir / 'journal' / 'known.json'
    self.digests = set(read_json(self._path, list)) if self._path.exists() else set()

  def add(self, digests: Iterable[str]) -> None:
    """Record the turns of a finished run.

    Args:
      digests: digests from `count_turns`.
    """
    self.digests |= set(digests)
    write_json(self._path, sorted(self.digests))


def describe(
  name: str,
  runs: Mapping[pathlib.Path, tuple[pipeline.Run, Sequence[str]]],
  sampled: SampledTurns,
) -> str:
  """Return a text that lists the turns of each run and the cost of all runs.

  To measure the speed, this function samples some chains of the first unfinished run twice, in a
  temporary folder, and times the matrix products of its model.

  Args:
    name: name of the experiment.
    runs: each run and its stages, by folder.
    sampled: the turns that the journal already contains.

  Raises:
    UserError: if that run's models cannot be loaded.
  """
  lines = [f'{name}: {len(runs)} runs']
  seen = set(sampled.digests)
  total, tokens, unfinished = 0, 0, {}
  for folder, (run, stages) in runs.items():
    needed = count_turns(run, stages)
    new = {k: v for k, v in needed.items() if k not in seen}
    seen |= set(needed)
    num_new = sum(t.count for t in new.values())
    num_shared = sum(t.count for t in needed.values()) - num_new
    total += num_new
    tokens += sum(t.count * t.max_tokens for t in new.values())
    manifest = Manifest(folder, writes=False)
    remaining = [stage for stage in stages if not manifest.done(stage)]
    if remaining:
      unfinished[folder] = run, remaining
    state = ', '.join(remaining) if remaining else 'already done'
    lines.append(
      f'  {folder.name}\n    {state}; {num_new:,} turns to sample, {num_shared:,} shared'
    )
  if not unfinished:
    return '\n'.join([*lines, 'nothing is left to do but the report'])
  lines.append(f'{total:,} turns to sample, at most {tokens:,} tokens')
  lines.append(f'disk space, at most: {describe_space(estimate_disk(runs, sampled))}')
  lines.append(_describe_cost(unfinished, total))
  return '\n'.join(lines)


def estimate_disk(
  runs: Mapping[pathlib.Path, tuple[pipeline.Run, Sequence[str]]], sampled: SampledTurns
) -> list[Need]:
  """Return the disk space that the unfinished runs need together.

  Args:
    runs: each run and its stages, by folder.
    sampled: the turns that the journal already contains. Turns that runs share count once.
  """
  needs, seen = [], set(sampled.digests)
  for folder, (run, stages) in runs.items():
    manifest = Manifest(folder, writes=False)
    remaining = [stage for stage in stages if not manifest.done(stage)]
    if not remaining:
      continue
    start = run.training_start if 'train' in remaining else ''
    trained = models.inspect_model(model_path(start)).config if start else None
    new = {k: v for k, v in count_turns(run, remaining).items() if k not in seen}
    seen |= set(new)
    tokens = sum(turns.count * turns.max_tokens for turns in new.values())
    journal = journal_bytes(sum(turns.count for turns in new.values()), tokens)
    for need in estimate_space(run, remaining, trained):
      needs.append(need._replace(bytes=journal) if need.part == 'journal' else need)
  return needs


def _describe_cost(
  runs: Mapping[pathlib.Path, tuple[pipeline.Run, Sequence[str]]], num_turns: int
) -> str:
  """Return the time and memory that unfinished runs need, measured on the first of them."""
  run, note = pipeline.resolve_engine(next(iter(runs.values()))[0], True)
  with pipeline.open_models(run) as models_by_role:
    turns_per_second, example_tokens, slot_tokens = _measure_sampling(run, models_by_role)
    base = models_by_role['base']
  sampling = num_turns / turns_per_second
  training_runs = [run for run, stages in runs.values() if 'train' in stages]
  training = sum(_training_seconds(run, example_tokens) for run in training_runs)
  preferring = [size for r, s in runs.values() if 'prefer' in s for size in measure_trainings(r)]
  training += sum(_seconds(size.flops(example_tokens), size.shape) for size in preferring)
  seconds = sampling + training + START_SECONDS * len(runs)
  memory = PROCESS_GIB * 2**30
  if isinstance(base, LM):
    engine = run.config.engine
    caches = engine.slots * cache_bytes(base, slot_tokens, engine.slack, engine.page_tokens)
    copies = TRAINING_COPIES if training_runs else 1
    memory += min(caches, engine.cache_gib * 2**30) + 4 * base.config.num_params * copies
  for size in preferring:  # a reference, which is gone before the first step, takes less
    needed = 4 * size.num_params * TRAINING_COPIES + size.host_bytes
    memory = max(memory, PROCESS_GIB * 2**30 + needed)
  count = len(training_runs) + len(preferring)
  return (
    f'about {seconds / 60:.1f} minutes here: {sampling / 60:.1f} sampling '
    f'({turns_per_second:,.0f} turns per second, measured on a few chains), '
    f'{training / 60:.1f} training ({count} models); about {memory / 2**30:.1f} GiB of memory'
    + (f'\n{note}' if note else '')
  )


def _measure_sampling(
  run: pipeline.Run, models_by_role: dict[str, Any]
) -> tuple[float, float, int]:
  """Sample some chains.

  Returns:
    Turns per second, mean tokens of a prompt with its reply, and tokens of a slot.
  """
  prompts = run.prompts['harmful'] or run.prompts['eval_harmful']
  # A large model takes minutes for 64 chains, so at most as many are timed as there are slots. The
  # first chain compiles.
  first, second = prompts[:1], prompts[: min(PROBE_CHAINS, run.config.engine.slots)]
  with tempfile.TemporaryDirectory() as temporary:
    for number, batch in enumerate((first, second)):  # the first batch compiles
      job = pipeline.prepare_job(run, models_by_role, batch, [])
      folder = pathlib.Path(temporary) / str(number)
      journal = Journal(folder / 'journal')
      start = time.perf_counter()
      counts = generate.generate_shards(job, folder / 'd_cai', journal, run.config.engine)
      seconds = time.perf_counter() - start
      journal.close()
  prompt = np.mean([len(job.stages.initial.dialogue.prompt(p.messages)) for p, _ in job.prompts])
  reply = counts['sampled_tokens'] / counts['turns']
  return counts['turns'] / seconds, prompt + reply, job.length


def _training_seconds(run: pipeline.Run, example_tokens: float) -> float:
  """Return the estimated time of fine-tuning: its FLOPs at a share of the speed of products."""
  config = models.inspect_model(model_path(run.training_start)).config
  train = run.config.train
  examples: float = len(run.prompts['harmful'])
  examples *= run.config.feedback.rounds if train.target == 'all' else 1
  examples /= 1 - train.helpfulness_share
  flops = config.training_flops([round(example_tokens)]) * examples * train.epochs
  return _seconds(flops, config)


def _seconds(flops: float, config: ModelConfig) -> float:
  """Return the estimated time of the products of a training."""
  speed = _product_flops(config.d_model, config.d_ff)
  return flops / (UTILIZATION * speed * len(jax.devices()))


@functools.cache
def _product_flops(d_model: int, d_ff: int) -> float:
  """Return the measured FLOP/s of a matrix product with a model's dimensions."""
  x, w = jnp.ones((2048, d_model)), jnp.ones((d_model, d_ff))
  product = jax.jit(lambda x, w: x @ w)
  product(x, w).block_until_ready()
  start, repetitions = time.perf_counter(), 20
  for _ in range(repetitions):
    product(x, w).block_until_ready()
  return 2 * repetitions * x.size * d_ff / (time.perf_counter() - start)


def _digest(value: Any) -> str:
  content = json.dumps(value, sort_keys=True, default=str)
  return hashlib.sha256(content.encode()).hexdigest()[:16]
