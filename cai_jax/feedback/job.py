"""A job: everything that determines D_CAI, checked before anything is sampled."""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from cai_jax.constitution import Constitution, Principle, draw_principles
from cai_jax.data.prompts import Prompt
from cai_jax.dialogue import ChatDialogue, Dialogue
from cai_jax.feedback.chain import Record, Stage, Stages, Variant, answer_only
from cai_jax.feedback.config import ROW_INDEPENDENT_FIELDS, FeedbackConfig, StageSampling
from cai_jax.feedback.contexts import Prefixes, cache_length, shared_prefixes
from cai_jax.feedback.rows import make_row
from cai_jax.feedback.score import (
  RaterSource,
  Score,
  VariantChain,
  answer_scores,
  assume_first_labels,
  rate_all_equally,
)
from cai_jax.feedback.stage import check_thinks
from cai_jax.feedback.variants import VARIANTS
from cai_jax.model.lm import LM
from cai_jax.runtime.errors import UserError
from cai_jax.runtime.settings import identity
from cai_jax.sampling.remote import Remote
from cai_jax.sampling.types import MAX_STOP_TOKENS, Chain


@dataclasses.dataclass(frozen=True)
class Job:
  """Everything that determines D_CAI; `prepare` makes a job and checks it.

  Attributes:
    prompts: (prompt, kind) pairs. A kind is 'harmful' (answered and revised) or 'helpful'
      (answered only).
    constitution: the constitution C.
    config: settings of the chains.
    stages: the model and the settings that sample each kind of turn.
    models: the models by role: 'base', and 'critique' and 'revision' if they are other models.
    seed: seed of the principles and of sampling.
    prefixes: for each model, the token ids of the prefixes that many contexts share.
    length: number of tokens of the longest context and its reply, without the shared prefix.
    rater: rates the candidates of the variant, if it has any to rate.
  """

  prompts: Sequence[tuple[Prompt, str]]
  constitution: Constitution
  config: FeedbackConfig
  stages: Stages
  models: Mapping[str, LM | Remote]
  seed: int
  prefixes: Prefixes
  length: int
  rater: RaterSource | None = None

  @property
  def sampled_models(self) -> dict[str, LM | Remote]:
    """The models that sample the turns, by name."""
    return {stage.model: self.models[stage.model] for stage in self.stages.by_name().values()}

  def num_rounds(self, kind: str) -> int:
    """Return the number of revisions of a prompt's response; helpful prompts get none."""
    return self.config.rounds if kind == 'harmful' else 0

  @functools.cached_property
  def has_thoughts(self) -> bool:
    """Whether the rows have a field for thoughts: whether a model's replies may begin with them."""
    return any(stage.dialogue.thinks for stage in self.stages.by_name().values())

  @functools.cached_property
  def unknown_ids(self) -> list[str]:
    """The stages of whose replies a server returns text only, so that their ids are not known."""
    return [name for name, stage in self.stages.by_name().items() if stage.dialogue.reads_text]

  @property
  def has_unknown_ids(self) -> bool:
    """Whether the rows say which ids are known."""
    return bool(self.unknown_ids)

  @property
  def has_details(self) -> bool:
    """Whether rounds have the fields `revised`, `sampled_tokens` and `details`."""
    return self._variant.records

  def chain(self, prompt: Prompt, kind: str) -> VariantChain:
    """Return the chain of a prompt, with the principles that are drawn for it.

    It yields turns, and scores if the variant has candidates to rate, see `answer_scores`.

    Args:
      prompt: the prompt x.
      kind: 'harmful' or 'helpful'.
    """
    principles = draw_principles(
      self.constitution, self.seed, prompt.id, self.num_rounds(kind), self.config.repeat_principles
    )
    donor = self._donors[prompt.id] if principles and self._variant.needs_donor else None
    return self._chain(prompt, principles, donor)

  def placeholder_chain(
    self,
    prompt: Prompt,
    kind: str,
    rate: Callable[[Score], list[float]] = rate_all_equally,
  ) -> Chain:
    """Return the chain of a prompt for placeholder replies, without scores.

    Of labels, the first is chosen.

    Args:
      prompt: the prompt x.
      kind: 'harmful' or 'helpful'.
      rate: rates candidates. By default they are equal, so the first is kept.
    """
    return assume_first_labels(answer_scores(self.chain(prompt, kind), rate))

  def possible_chains(self, prompt: Prompt, kind: str) -> Iterator[Chain]:
    """Yield, for each principle, the chain that applies it in every round, for placeholder replies.

    No chain of this prompt is longer than the longest of these. If a chain needs a donor, the
    prompt is its own donor, so the longest prompt is also tried with the longest donor.

    Args:
      prompt: the prompt x.
      kind: 'harmful' or 'helpful'.
    """
    for principle in self.constitution.principles:
      principles = (principle,) * self.num_rounds(kind)
      if principles and self._variant.longest is not None:
        inputs = self._inputs()
        chain = self._variant.longest(prompt, principles, self.stages, self._growing, **inputs)
      else:
        chain = self._chain(prompt, principles, donor=prompt)
      yield assume_first_labels(answer_scores(chain, rate_all_equally))

  def row(self, record: Record, kind: str) -> dict[str, Any]:
    """Return the row of D_CAI for the record of a finished chain.

    Args:
      record: the result of the chain.
      kind: 'harmful' or 'helpful'.
    """
    names = {
      name: self.models[stage.model].public_name for name, stage in self.stages.by_name().items()
    }
    return make_row(
      record,
      kind,
      self.seed,
      names,
      self._constitution_fingerprint,
      thoughts=self.has_thoughts,
      unknown_ids=self.has_unknown_ids,
      details=self.has_details,
    )

  def rewritten_history(self) -> str:
    """Return which chat templates do not keep the tokens of earlier replies, or ''."""
    stages = self.stages.by_name().values()
    texts = {self.models[s.model].name: s.dialogue.rewritten_history for s in stages}
    return ' '.join(f'{name}: {text}' for name, text in texts.items() if text)

  def digest(self) -> str:
    """Return the hex digest of everything that the rows depend on."""
    stages = [
      [name, stage.sampling, stage.demonstrations, self.models[stage.model].fingerprint]
      for name, stage in self.stages.by_name().items()
    ]
    config = identity(self.config)
    config = {k: v for k, v in config.items() if k not in ROW_INDEPENDENT_FIELDS}
    parts = [config, stages, self.constitution.fingerprint(), self.seed]
    parts += ['thoughts'] if self.has_thoughts else []  # earlier versions stored none
    parts += [self.rater.identity] if self.rater is not None else []
    content = json.dumps(parts, default=identity, sort_keys=True)
    # There may be millions of prompts, so they are hashed one at a time as elements of a JSON list.
    digest, separator = hashlib.sha256(f'{content[:-1]}, ['.encode()), ''
    for prompt, kind in self.prompts:
      entry = [prompt.id, prompt.messages, prompt.metadata, kind]
      digest.update((separator + json.dumps(entry, sort_keys=True)).encode())
      separator = ', '
    digest.update(b']]')
    return digest.hexdigest()

  def _chain(
    self, prompt: Prompt, principles: Sequence[Principle], donor: Prompt | None
  ) -> VariantChain:
    if not principles:
      return answer_only(prompt, self.stages)
    inputs = self._inputs(donor=donor)
    return self._variant.chain(prompt, principles, self.stages, self._growing, **inputs)

  def _inputs(self, **available: Any) -> dict[str, Any]:
    """Return the keywords of the variant's chain function."""
    return self._variant.inputs(
      options=self.config.variant_options, constitution=self.constitution, **available
    )

  @property
  def _growing(self) -> bool:
    return self.config.context == 'growing'

  @property
  def _variant(self) -> Variant:
    return VARIANTS[self.config.variant]

  @functools.cached_property
  def _donors(self) -> dict[str, Prompt]:
    """Map the id of each harmful prompt to the next harmful prompt, and the last to the first."""
    harmful = [prompt for prompt, kind in self.prompts if kind == 'harmful']
    donors = harmful[1:] + harmful[:1]
    return {prompt.id: donor for prompt, donor in zip(harmful, donors, strict=True)}

  @functools.cached_property
  def _constitution_fingerprint(self) -> str:
    """Cached, because hashing the constitution for each row took a quarter of the host's time."""
    return self.constitution.fingerprint()


def repeat_prompts(prompts: Sequence[Prompt], times: int) -> list[Prompt]:
  """Return copies of each prompt with different ids, so that it is answered several times.

  Args:
    prompts: the prompts.
    times: number of copies of each prompt. Their ids are 'id', 'id/2', 'id/3', ...
  """
  return [
    dataclasses.replace(prompt, id=f'{prompt.id}/{n}') if n > 1 else prompt
    for prompt in prompts
    for n in range(1, times + 1)
  ]


def prepare(
  models: Mapping[str, LM | Remote],
  harmful: Sequence[Prompt],
  helpful: Sequence[Prompt],
  constitution: Constitution,
  config: FeedbackConfig,
  sampling: StageSampling,
  seed: int,
  rater: RaterSource | None = None,
) -> Job:
  """Return a checked job that is ready to sample.

  Args:
    models: the models by role: 'base' is M_θ; 'critique' and 'revision' are M_critique and
      M_revise, if they are other models.
    harmful: prompts whose responses are critiqued and revised.
    helpful: prompts that are only answered, for mixing into fine-tuning.
    constitution: the constitution C.
    config: settings of the chains.
    sampling: sampling settings of each kind of turn.
    seed: seed of the principles and of sampling.
    rater: rates candidates. It is needed if the variant has some to rate.

  Raises:
    UserError: if there is no prompt, ids repeat, principles or donors are too few or do not fit
      the variant, stop tokens are invalid, thoughts have a budget that a model cannot keep, or a
      chain can exceed the context of a model.
    ValueError: if the rater is missing.
  """
  prompts = (*((p, 'harmful') for p in harmful), *((p, 'helpful') for p in helpful))
  _check_prompts(prompts)
  variant = VARIANTS[config.variant]
  if rater is None and variant.rater(config.variant_options) is not None:
    raise ValueError(f'The variant {config.variant!r} needs a rater for its candidates.')
  variant.check(constitution, config.variant_options)
  if variant.needs_donor and len(harmful) == 1:
    raise UserError(
      f'feedback.variant={config.variant!r} uses another harmful prompt, but there is only one. '
      'Give at least two harmful prompts.'
    )
  # This raises if principles may not repeat and there are fewer of them than rounds.
  draw_principles(constitution, seed, '', config.rounds, config.repeat_principles)
  stages = make_stages(models, constitution, config, sampling)
  for name, stage in stages.by_name().items():
    check_thinks(stage.dialogue, stage.sampling, f'sampling.{name}', models[stage.model].name)
    _check_stop_tokens(stage, models[stage.model])
  prefixes = shared_prefixes(prompts, stages)
  job = Job(prompts, constitution, config, stages, models, seed, prefixes, 0, rater)
  length = cache_length(prompts, stages, models, prefixes, job.possible_chains)
  return dataclasses.replace(job, length=length)


def _check_prompts(prompts: Sequence[tuple[Prompt, str]]) -> None:
  """Raise UserError if there is no prompt or two prompts have the same id."""
  if not prompts:
    raise UserError('There is no prompt to answer. Give at least one.')
  seen: dict[str, Prompt] = {}
  for prompt, _ in prompts:
    if prompt.id in seen:
      raise UserError(
        f'Two prompts have the id {prompt.id!r}: {seen[prompt.id]} and {prompt}. Give each prompt '
        'its own id.'
      )
    seen[prompt.id] = prompt


def _check_stop_tokens(stage: Stage, lm: LM | Remote) -> None:
  """Raise UserError unless the stop tokens of a stage exist and fit the compiled program."""
  ids = sorted({*stage.dialogue.stop_token_ids, *stage.sampling.stop_token_ids})
  if stage.sampling.max_thought_tokens and isinstance(stage.dialogue, Dialogue):
    ids = sorted({*ids, stage.dialogue.end_of_thought})
  if len(ids) > MAX_STOP_TOKENS or not all(0 <= i < lm.vocab_size for i in ids):
    raise UserError(
      f'The stop tokens of {lm.name} and of sampling.*.stop_token_ids are {ids}. At most '
      f'{MAX_STOP_TOKENS} are allowed, each between 0 and {lm.vocab_size - 1}.'
    )


def make_dialogue(model: LM | Remote, config: FeedbackConfig) -> Dialogue | ChatDialogue:
  """Return what renders the conversations of a run for a model that samples.

  Args:
    model: the model.
    config: has the prompt format and its options. A chat-only server has a format of its own.
  """
  if isinstance(model, Remote) and model.reads_chats:
    return ChatDialogue(model.tokenizer)
  return Dialogue(model.tokenizer, config.style, model.eos_token_ids, config.template_options)


def make_stages(
  models: Mapping[str, LM | Remote],
  constitution: Constitution,
  config: FeedbackConfig,
  sampling: StageSampling,
) -> Stages:
  """Return the stages, each with the dialogue of its model and its own settings.

  Args:
    models: 'base', and 'critique' and 'revision' if they are other models.
    constitution: its demonstrations precede critiques and revisions if the config says so.
    config: settings of the chains.
    sampling: sampling settings of each kind of turn.
  """
  dialogues = {name: make_dialogue(model, config) for name, model in models.items()}

  def make_stage(name: str, demonstrations: tuple = ()) -> Stage:
    model = name if name in models else 'base'
    # If one checkpoint has two names, the stages use the first, so that they share a live cache.
    model = next(other for other in models if models[other] is models[model])
    return Stage(model, dialogues[model], getattr(sampling, name), demonstrations)

  demonstrations = constitution.demonstrations if config.demonstrations else ()
  stages = {
    'initial': make_stage('initial'),
    'critique': make_stage('critique', demonstrations),
    'revision': make_stage('revision', demonstrations),
  }
  extra = {
    name: dataclasses.replace(
      stages[added.parent], sampling=sampling.of_stage(name, config.variant)
    )
    for name, added in VARIANTS[config.variant].stages.items()
  }
  return Stages(**stages, extra=extra)
