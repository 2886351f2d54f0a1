"""Prompts in, D_CAI out: runs the chains over the engine and writes shards as they fill."""

import dataclasses
import functools
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from cai_jax import constitution as constitutions
from cai_jax.constitution import Constitution, Principle
from cai_jax.data import quality
from cai_jax.data.prompts import Prompt
from cai_jax.dialogue import Dialogue
from cai_jax.feedback.chain import (
  VARIANTS,
  Record,
  Reply,
  Stage,
  Stages,
  critique_revision,
  shuffled_critique,
)
from cai_jax.model.lm import LM
from cai_jax.runtime.errors import UserError
from cai_jax.sampling.engine import longest_context
from cai_jax.sampling.remote.client import Remote
from cai_jax.sampling.slots import match_prefix
from cai_jax.sampling.types import MAX_STOP_TOKENS, Chain, SamplingConfig

MIN_PREFIX = 32  # tokens from which a common prefix is worth a product of its own in every layer
SAMPLE = 64  # prompts that are rendered to find it
FREE = ('max_rate',)  # of FeedbackConfig: what no row depends on, so a run may change it


@dataclasses.dataclass(frozen=True)
class FeedbackConfig:
  """How responses are criticised and revised."""

  rounds: int = 4  # revisions of each harmful prompt's response
  variant: str = 'critique'  # of `chain.VARIANTS`
  context: str = 'fresh'  # a round sees the latest response ('fresh') or all before ('growing')
  repeat_principles: bool = True  # draw each round's principle independently
  demonstrations: bool = True  # put the constitution's demonstrations before critiques, revisions
  style: str = 'chat'  # 'chat' template or 'plain' labels
  template_options: tuple = ()  # (name, value) pairs that the chat template is given
  shard_rows: int = 256  # rows of D_CAI in one file
  helpful_samples: int = 1  # responses to each helpful prompt
  max_rate: Mapping[str, float] = dataclasses.field(  # of the revisions, by quality.FLAGS
    default_factory=lambda: dict.fromkeys(quality.FLAGS, 1.0)
  )

  def __post_init__(self):
    checks = (
      ('rounds', self.rounds >= 1, 'at least 1'),
      ('variant', self.variant in VARIANTS, f'one of {tuple(VARIANTS)}'),
      ('context', self.context in ('fresh', 'growing'), "'fresh' or 'growing'"),
      ('shard_rows', self.shard_rows >= 1, 'at least 1'),
      ('helpful_samples', self.helpful_samples >= 1, 'at least 1'),
    )
    for name, fine, allowed in checks:
      if not fine:
        raise UserError(f'feedback: {name}={getattr(self, name)!r}; it must be {allowed}.')
    object.__setattr__(self, 'max_rate', dict(self.max_rate))
    for name, rate in self.max_rate.items():
      if name not in quality.FLAGS or not 0 <= rate <= 1:
        raise UserError(
          f'feedback: max_rate.{name}={rate!r}; it must be a rate in [0, 1] of one of '
          f'{tuple(quality.FLAGS)}.'
        )


@dataclasses.dataclass(frozen=True)
class StageSampling:
  """Sampling settings of the three kinds of turn."""

  initial: SamplingConfig = SamplingConfig()
  critique: SamplingConfig = SamplingConfig()
  revision: SamplingConfig = SamplingConfig()


@dataclasses.dataclass(frozen=True)
class Job:
  """All that D_CAI is a function of, made ready and checked before anything is sampled."""

  prompts: Sequence[tuple[Prompt, str]]  # with kind: 'harmful' or 'helpful'
  constitution: Constitution
  config: FeedbackConfig
  stages: Stages
  models: Mapping[str, LM | Remote]  # 'base', and 'critique' and 'revision' where they are others
  seed: int
  prefixes: Mapping[str, Sequence[list[int]]]  # for each model, what many of its contexts share
  length: int  # tokens of the longest context with its reply, such a prefix not counted

  def rounds(self, kind: str) -> int:
    """Revisions of a prompt's response: helpful ones are answered and not revised."""
    return self.config.rounds if kind == 'harmful' else 0

  def chain(self, prompt: Prompt, kind: str) -> Chain:
    """The chain of one prompt under the principles drawn for it."""
    principles = constitutions.draw(
      self.constitution, self.seed, prompt.id, self.rounds(kind), self.config.repeat_principles
    )
    return self.chain_under(prompt, principles)

  def chain_under(self, prompt: Prompt, principles: Sequence[Principle]) -> Chain:
    """The chain of one prompt under given principles, one a round."""
    variant = VARIANTS[self.config.variant] if principles else critique_revision
    more = {'donor': self._donors[prompt.id]} if variant is shuffled_critique else {}
    return variant(prompt, principles, self.stages, self.config.context == 'growing', **more)

  @functools.cached_property
  def _donors(self) -> dict[str, Prompt]:
    """For each prompt that is revised the next of them, and for the last the first."""
    harmful = [prompt for prompt, kind in self.prompts if kind == 'harmful']
    return {p.id: d for p, d in zip(harmful, harmful[1:] + harmful[:1], strict=True)}

  def digest(self) -> str:
    """Hex digest of all that the rows depend on; one prompt at a time, as there may be millions."""
    stages = [
      [name, stage.sampling, stage.demonstrations, self.models[stage.model].fingerprint]
      for name, stage in zip(
        ('initial', 'critique', 'revision'), each_stage(self.stages), strict=True
      )
    ]
    config = {k: v for k, v in dataclasses.asdict(self.config).items() if k not in FREE}
    parts = [config, stages, self.constitution.fingerprint(), self.seed]
    content = json.dumps(parts, default=dataclasses.asdict, sort_keys=True)
    digest, between = hashlib.sha256(f'{content[:-1]}, ['.encode()), ''
    for prompt, kind in self.prompts:
      row = [prompt.id, prompt.messages, prompt.metadata, kind]
      digest.update((between + json.dumps(row, sort_keys=True)).encode())
      between = ', '
    digest.update(b']]')
    return digest.hexdigest()

  def row(self, record, kind: str) -> dict[str, Any]:
    """The row of D_CAI for a finished chain."""
    names = {
      stage: self.models[getattr(self.stages, stage).model].name
      for stage in ('initial', 'critique', 'revision')
    }
    return row_of(record, kind, self.seed, names, self._constitution_id)

  @functools.cached_property
  def _constitution_id(self) -> str:
    """Hashing the constitution again for each row took a quarter of the host's time."""
    return self.constitution.fingerprint()


def several(prompts: Sequence[Prompt], samples: int) -> list[Prompt]:
  """Each prompt `samples` times, to be answered as often: as 'id', 'id/2', 'id/3', ..."""
  return [
    dataclasses.replace(prompt, id=f'{prompt.id}/{n}') if n > 1 else prompt
    for prompt in prompts
    for n in range(1, samples + 1)
  ]


def prepare(
  models: Mapping[str, LM | Remote],
  harmful: Sequence[Prompt],
  helpful: Sequence[Prompt],
  constitution: Constitution,
  config: FeedbackConfig,
  sampling: StageSampling,
  seed: int,
) -> Job:
  """Everything ready to sample.

  Args:
    models: 'base' is M_θ; 'critique' and 'revision' are M_critique and M_revise where given.
    harmful: prompts whose responses are criticised and revised.
    helpful: prompts that are answered only, for mixing into fine-tuning.
    constitution: C.
    config, sampling: of the chains.
    seed: of principles and sampling.

  Raises:
    ValueError: if ids repeat, or a prompt's chain can come to a context longer than the model's.
  """
  prompts = (*((p, 'harmful') for p in harmful), *((p, 'helpful') for p in helpful))
  seen = set()
  for prompt, _ in prompts:
    if prompt.id in seen:
      raise UserError(f'two prompts have the id {prompt.id!r}; ids must differ.')
    seen.add(prompt.id)
  if not prompts:
    raise UserError('there is no prompt to answer.')
  if config.variant == 'shuffled' and len(harmful) == 1:
    raise UserError(
      "feedback.variant='shuffled' takes critiques from another prompt, and there is only one: "
      'give two harmful prompts or more.'
    )
  # A draw fails where there are more rounds than principles and none may come twice.
  constitutions.draw(constitution, seed, '', config.rounds, config.repeat_principles)
  stages = make_stages(models, constitution, config, sampling)
  for stage in each_stage(stages):
    _check_stops(stage, models[stage.model])
  job = Job(
    prompts, constitution, config, stages, models, seed, shared_prefixes(prompts, stages), 0
  )
  return dataclasses.replace(job, length=_cache_length(job))


def _check_stops(stage: Stage, lm: LM | Remote) -> None:
  ids = sorted({*stage.dialogue.stop_token_ids, *stage.sampling.stop_token_ids})
  if len(ids) > MAX_STOP_TOKENS or not all(0 <= i < lm.vocab_size for i in ids):
    raise UserError(
      f'stop tokens {ids} of {lm.name} and of sampling.*.stop_token_ids: there may be at most '
      f'{MAX_STOP_TOKENS}, each in 0..{lm.vocab_size - 1}.'
    )


def make_stages(
  models: Mapping[str, LM | Remote],
  constitution: Constitution,
  config: FeedbackConfig,
  sampling: StageSampling,
) -> Stages:
  """The three stages: each its model's dialogue, its settings, and what precedes it."""
  dialogues = {
    name: Dialogue(lm.tokenizer, config.style, lm.eos_token_ids, config.template_options)
    for name, lm in models.items()
  }

  def stage(name: str, demonstrations=()) -> Stage:
    model = name if name in models else 'base'
    # One checkpoint under two names is one model: its live cache goes on from stage to stage.
    model = next(other for other in models if models[other] is models[model])
    return Stage(model, dialogues[model], getattr(sampling, name), demonstrations)

  shown = constitution.demonstrations if config.demonstrations else ()
  return Stages(stage('initial'), stage('critique', shown), stage('revision', shown))


def each_stage(stages: Stages) -> tuple[Stage, Stage, Stage]:
  return stages.initial, stages.critique, stages.revision


def shared_prefixes(
  prompts: Sequence[tuple[Prompt, str]], stages: Stages
) -> dict[str, list[list[int]]]:
  """For each model the token ids that the contexts of a stage begin with, whatever the prompt.

  They hold the demonstrations, and a system message that all prompts have in common. Found by
  rendering some of the prompts; a chain whose context begins otherwise goes without.
  """
  found: dict[str, list[list[int]]] = {}
  for stage in each_stage(stages):
    contexts = [
      stage.dialogue.prompt(
        [*prompt.messages[:-1], prompt.messages[-1] | {'content': content}],
        'assistant',
        stage.demonstrations,
      )
      for prompt, _ in prompts[:SAMPLE]
      for content in ('a', 'B')
    ]
    prefix = os.path.commonprefix(contexts)
    known = found.setdefault(stage.model, [])
    if len(prefix) >= MIN_PREFIX and prefix not in known:
      known.append(prefix)
  return found


def _cache_length(job: Job) -> int:
  """Tokens a cache needs for the longest chain, in whole blocks of 64 where the models allow it.

  Of the prompts whose contexts begin with the same shared prefixes the longest is taken, under
  each principle in every round: no chain drawn needs more.

  Raises:
    ValueError: if it does not fit a model.
  """
  render = job.stages.initial.dialogue.prompt
  longest = 1
  longest_of: dict[tuple, tuple[int, Prompt]] = {}
  for prompt, kind in job.prompts:
    size, group = len(render(prompt.messages)), (kind, _shared(job, prompt))
    if group not in longest_of or size > longest_of[group][0]:
      longest_of[group] = size, prompt
  for (kind, _), (size, prompt) in longest_of.items():
    for chain in _possible_chains(job, prompt, kind):
      for name, (needed, own) in longest_context(chain, job.prefixes).items():
        limit = job.models[name].max_positions
        if needed > limit:
          raise UserError(
            f'the chain of prompt {prompt.id!r} can come to {needed} tokens, and '
            f'{job.models[name].name} holds {limit}. Shorten the prompt ({size} tokens), the '
            "max_tokens of the stages, the rounds, or use feedback.context='fresh'."
          )
        if isinstance(job.models[name], LM):  # others keep no cache here
          longest = max(longest, own)
  return min(-(-longest // 64) * 64, shortest_context(job))


def shortest_context(job: Job) -> int:
  """Tokens of the shortest context of the models that sample here."""
  local = (model for model in job.models.values() if isinstance(model, LM))
  return min((lm.max_positions for lm in local), default=64)


def _shared(job: Job, prompt: Prompt) -> tuple[int, ...]:
  """Tokens of a shared prefix that each stage's contexts of a prompt begin with."""
  return tuple(
    match_prefix(
      job.prefixes[stage.model],
      stage.dialogue.prompt(prompt.messages, 'assistant', stage.demonstrations),
    )[1]
    for stage in each_stage(job.stages)
    if job.prefixes[stage.model]
  )


def _possible_chains(job: Job, prompt: Prompt, kind: str):
  """For each principle the chain that has it in every round."""
  for principle in job.constitution.principles:
    principles = (principle,) * job.rounds(kind)
    if job.config.variant == 'shuffled':  # a critique may be as long as one's own, its prompt too
      yield critique_revision(prompt, principles, job.stages, job.config.context == 'growing')
    else:
      yield job.chain_under(prompt, principles)


def row_of(
  record: Record, kind: str, seed: int, models: dict[str, str], constitution: str
) -> dict[str, Any]:
  """The row of D_CAI for a chain's record.

  Args:
    record: what the chain gave.
    kind: 'harmful' or 'helpful'.
    seed: of the run.
    models: names for the keys 'initial', 'critique' and 'revision'.
    constitution: its fingerprint.
  """
  replies = [record.initial]
  for step in record.rounds:
    replies += [step.critique, step.revision]
  return {
    'id': record.prompt.id,
    'kind': kind,
    'prompt': [dict(message) for message in record.prompt.messages],
    'metadata': json.dumps(record.prompt.metadata, sort_keys=True),
    'initial': _turn(record.initial),
    'rounds': [
      {
        'principle': step.principle.id,
        'critique': _turn(step.critique),
        'revision': _turn(step.revision),
      }
      for step in record.rounds
    ],
    'logprobs': [x for reply in replies if reply for x in reply.completion.logprobs],
    'seed': seed,
    'model': models['initial'],
    'critique_model': models['critique'],
    'revision_model': models['revision'],
    'constitution': constitution,
  }


def _turn(reply: Reply | None) -> dict[str, Any]:
  if reply is None:
    return {'text': '', 'finish_reason': '', 'logprob': 0.0, 'num_tokens': 0}
  completion = reply.completion
  return {
    'text': reply.text,
    'finish_reason': completion.finish_reason,
    'logprob': float(np.float32(sum(completion.logprobs))),
    'num_tokens': len(completion.tokens),
  }
