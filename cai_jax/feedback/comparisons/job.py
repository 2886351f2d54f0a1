"""A job of AI feedback: everything that determines the labels, checked before work starts."""

import dataclasses
import hashlib
import json
import random
from collections.abc import Iterator, Mapping, Sequence

from cai_jax.constitution import Constitution, Principle, draw_principles
from cai_jax.data.preferences.forms import reason_to_leave_out
from cai_jax.data.prompts import Prompt
from cai_jax.dialogue import ChatDialogue, Dialogue, known_options
from cai_jax.feedback.candidates import numbered
from cai_jax.feedback.comparisons.asking import VERDICTS, FeedbackModel
from cai_jax.feedback.comparisons.comparing import Compare, compare_with_judge, compare_with_model
from cai_jax.feedback.comparisons.config import LabelConfig
from cai_jax.feedback.comparisons.demonstrations import Demonstration, read_demonstrations
from cai_jax.feedback.comparisons.items import read_items
from cai_jax.feedback.comparisons.pairing import PAIRINGS, Pair
from cai_jax.feedback.comparisons.records import Item, Label, Outcome
from cai_jax.feedback.config import FeedbackConfig
from cai_jax.feedback.contexts import smallest_context_limit, word_tokens
from cai_jax.feedback.job import make_dialogue
from cai_jax.feedback.score import assume_first_labels
from cai_jax.feedback.stage import ChainEnded, Stage, check_thinks
from cai_jax.model.lm import LM
from cai_jax.runtime.errors import UserError
from cai_jax.runtime.settings import identity
from cai_jax.sampling.planning import longest_context, planned_turns
from cai_jax.sampling.remote import Remote
from cai_jax.sampling.types import Chain, SamplingConfig, Turn
from cai_jax.scoring.judge import Judge

# Settings that name what the digest of a job covers by its content.
NAMES = frozenset(
  'sampled_by model remote comparisons comparisons_limit form labelled labelled_limit '
  'labelled_form demonstrations constitution'.split()
)
RESPONSES, FEEDBACK = 'responses', 'feedback'  # the roles of models


@dataclasses.dataclass(frozen=True)
class LabelJob:
  """Everything that determines the labels; `check_label` makes a job and checks it.

  Attributes:
    items: what is compared, labelled sets included.
    constitution: has the principles.
    config: the settings.
    models: the models by the names that stages use.
    stages: 'responses' samples responses, and 'feedback' compares them. One that is not needed is
      absent.
    compare: compares two responses.
    demonstrations: few-shot questions and answers.
    seed: seed of principles, pairs and sampling.
    length: number of tokens of the longest context and its reply.
  """

  items: Sequence[Item]
  constitution: Constitution
  config: LabelConfig
  models: Mapping[str, LM | Remote]
  stages: Mapping[str, Stage]
  compare: Compare
  demonstrations: tuple[Demonstration, ...]
  seed: int
  length: int

  def principles(self, item: Item, pair: Pair = (0, 1)) -> tuple[Principle, ...]:
    """Return the principles that are drawn for a pair. Draws of critiques do not repeat in them.

    Args:
      item: the prompt.
      pair: the indices of the two responses. Each pair of several responses has its own draw.
    """
    name, count = f'{item.id}/label', self.config.principles
    if not item.responses and self.config.responses > 2:
      name += f'/{pair[0] + 1}-{pair[1] + 1}'
    return draw_principles(self.constitution, self.seed, name, count, replace=False)

  def chain(self, item: Item) -> Chain:
    """Return the chain of a prompt, whose result is an `Outcome`.

    Args:
      item: the prompt.
    """
    try:
      return (yield from self._chain(item))
    except ChainEnded as ended:
      return Outcome(item, ended=str(ended))

  def placeholder_chain(self, item: Item, principles: Sequence[Principle]) -> Chain:
    """Return a chain for placeholder replies, which also compares texts that are equal.

    Args:
      item: the prompt.
      principles: the principles by which all pairs of its responses are compared.
    """
    return assume_first_labels(self._chain(item, principles))

  def _chain(self, item: Item, placeholder: Sequence[Principle] = ()) -> Chain:
    texts, truncated = list(item.responses), list(item.truncated)
    for name in numbered('initial', self.config.responses) if not texts else ():
      reply = yield from self.stages[RESPONSES].ask(name, item.messages, 'assistant')
      texts.append(reply.text)
      truncated.append(reply.completion.finish_reason == 'length')
    rng = random.Random(f'{self.seed} pairs {item.id}')
    labels: list[Label] = []
    left_out: list[str] = []
    for pair in PAIRINGS[self.config.pairs](len(texts), rng):
      both = texts[pair[0]].strip(), texts[pair[1]].strip()
      reason = '' if placeholder else reason_to_leave_out(*both, sampled=True)
      if reason:
        left_out.append(reason)
        continue
      name, is_sampled = f'label_{pair[0] + 1}_{pair[1] + 1}', not item.responses
      principles = placeholder or self.principles(item, pair)
      readings = yield from self.compare(name, item.messages, principles, both, is_sampled)
      cut = truncated[pair[0]], truncated[pair[1]]
      labels.append(Label(item, pair, both, cut, tuple(readings)))
    return Outcome(item, tuple(labels), tuple(left_out))

  def digest(self) -> str:
    """Return the hex digest of everything that the labels depend on."""
    stages = {
      role: [stage.sampling, stage.dialogue.style, self.models[stage.model].fingerprint]
      for role, stage in self.stages.items()
    }
    settings = {name: v for name, v in identity(self.config).items() if name not in NAMES}
    parts = [
      settings,
      stages,
      self.constitution.comparisons_fingerprint(),
      self.demonstrations,
      self.seed,
      [dataclasses.replace(item, source='') for item in self.items],
    ]
    content = json.dumps(parts, default=identity, sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()

  def test_turns(self) -> dict[str, list[Turn]]:
    """Return a turn of each kind that a served model gets, by the name of the model.

    They are what `Remote.check` sends before the run.
    """
    turns: dict[str, dict[SamplingConfig, Turn]] = {}
    for turn in planned_turns(
      self.placeholder_chain(self.items[0], self.principles(self.items[0]))
    ):
      turns.setdefault(turn.model, {})[turn.sampling] = turn
    return {name: list(of_model.values()) for name, of_model in turns.items()}


def check_label(
  models: Mapping[str, LM | Remote],
  prompts: Sequence[Prompt],
  constitution: Constitution,
  config: LabelConfig,
  feedback: FeedbackConfig,
  sampling: SamplingConfig,
  seed: int,
  judge: Judge | None = None,
) -> LabelJob:
  """Return a checked job that is ready to run. No model needs its weights for this.

  Args:
    models: 'responses' samples the responses, unless they are read from files; 'feedback' compares
      them, unless a judge does.
    prompts: the prompts whose responses are sampled; not used if they are read from files.
    constitution: the principles.
    config: the settings.
    feedback: how prompts are rendered for the model that samples, and the options of templates.
    sampling: how responses are sampled.
    seed: seed of principles, pairs and sampling.
    judge: compares the responses in place of a language model.

  Raises:
    UserError: if a file cannot be read, there is nothing to compare, responses or principles are
      too few, a model cannot be asked, or a chain can exceed its context.
  """
  if not config.is_asked_for:
    raise UserError('label: there is nothing to label. Set label.responses or label.comparisons.')
  items = read_items(config, prompts)
  demonstrations = _read_demonstrations(config)
  stages = _make_stages(models, config, feedback, sampling)
  if judge is not None:
    compare = compare_with_judge(judge)
  else:
    stage, verdict = stages[FEEDBACK], VERDICTS[config.verdict]
    verdict.check(stage)
    model = FeedbackModel(stage, config.verdict, config.thoughts, demonstrations)
    compare = compare_with_model(model, config.samples, config.clamp)
  named = {stage.model: models[role] for role, stage in stages.items()}
  job = LabelJob(
    items, constitution, config, named, stages, compare, demonstrations, seed, length=0
  )
  job.principles(items[0])  # raises if there are fewer than are to be drawn
  return dataclasses.replace(job, length=_longest(job))


def _read_demonstrations(config: LabelConfig) -> tuple[Demonstration, ...]:
  """Return the demonstrations, which have a chain of thought if the feedback model writes one."""
  if not config.demonstrations:
    return ()
  demonstrations = read_demonstrations(config.demonstrations)
  for number, demonstration in enumerate(demonstrations, 1):
    if config.thoughts and not demonstration.thoughts:
      raise UserError(
        f'{config.demonstrations}, demonstration {number} has no thoughts, but label.thoughts='
        f'{config.thoughts} lets the feedback model think first. Give each demonstration its '
        "'thoughts', or set label.thoughts=0."
      )
  return demonstrations


def _make_stages(
  models: Mapping[str, LM | Remote],
  config: LabelConfig,
  feedback: FeedbackConfig,
  sampling: SamplingConfig,
) -> dict[str, Stage]:
  """Return the stages by role. If both have one model and one dialogue, they share its cache."""
  stages = {}
  if config.responses:
    lm = models[RESPONSES]
    dialogue = make_dialogue(lm, feedback)
    check_thinks(dialogue, sampling, 'sampling.initial', lm.name)
    if not sampling.temperature:
      raise UserError(
        f'label: responses={config.responses} at sampling.initial.temperature=0 would be equal. '
        'Set a temperature above 0.'
      )
    stages[RESPONSES] = Stage(RESPONSES, dialogue, sampling)
  if FEEDBACK in models:
    stages[FEEDBACK] = _feedback_stage(models, config, feedback, stages.get(RESPONSES))
  return stages


def _feedback_stage(
  models: Mapping[str, LM | Remote],
  config: LabelConfig,
  feedback: FeedbackConfig,
  responder: Stage | None,
) -> Stage:
  """Return the stage of the feedback model."""
  model = models[FEEDBACK]
  most = config.thoughts + VERDICTS[config.verdict].tokens
  sampling = SamplingConfig(temperature=config.temperature, max_tokens=max(most, 1))
  if isinstance(model, Remote):
    try:
      model.config.check_sampling(sampling)
      if config.verdict == 'logprobs' and not model.reads_chats:
        model.config.check_labels()
    except UserError as error:
      raise UserError(f'label.remote: {str(error).removeprefix("remote: ")}') from error
  style = config.style if model.tokenizer.chat_template else 'plain'
  options = known_options(model.tokenizer, feedback.template_options) if style == 'chat' else ()
  reading = dataclasses.replace(feedback, style=style, template_options=options)
  dialogue: Dialogue | ChatDialogue = make_dialogue(model, reading)
  shares = responder is not None and models[RESPONSES] is model
  if responder is not None and shares and _reads_alike(responder.dialogue, dialogue):
    return Stage(responder.model, responder.dialogue, sampling)
  return Stage(FEEDBACK, dialogue, sampling)


def _reads_alike(first: Dialogue | ChatDialogue, second: Dialogue | ChatDialogue) -> bool:
  """Return whether two dialogues of one model render messages in the same way."""
  if isinstance(first, Dialogue) and isinstance(second, Dialogue):
    return (first.style, first.template_options) == (second.style, second.template_options)
  return type(first) is type(second)


def _longest(job: LabelJob) -> int:
  """Return the number of tokens that a slot's cache needs for the longest chain.

  Of prompts whose responses are sampled, the longest is tried with each principle. Given responses
  are all tried with the principles that are drawn for them.

  Raises:
    UserError: if a chain can exceed the context of a model.
  """
  fillers, longest = word_tokens(job.models), 1
  for item, principles in _possible(job):
    try:
      lengths = longest_context(job.placeholder_chain(item, principles), None, fillers)
    except (ChainEnded, UserError) as error:  # placeholder replies end no chain
      raise UserError(f'label: {_place(item)} cannot be labelled. {error}') from error
    for name, (needed, _) in lengths.items():
      model = job.models[name]
      if needed > model.max_positions:
        raise UserError(
          f'label: {_place(item)} can reach {needed} tokens, but {model.name} holds '
          f'{model.max_positions}. Leave it out, shorten its texts or the demonstrations, or lower '
          'label.thoughts or sampling.initial.max_tokens.'
        )
      if isinstance(model, LM):  # a remote model keeps no cache in this process
        longest = max(longest, needed)
  return min(-(-longest // 64) * 64, smallest_context_limit(job.models))


def _possible(job: LabelJob) -> Iterator[tuple[Item, Sequence[Principle]]]:
  """Yield the prompts with the principles that can make the longest contexts."""
  sampled = [item for item in job.items if not item.responses]
  if sampled:
    responder = job.stages[RESPONSES]
    item = max(sampled, key=lambda item: len(responder.render(item.messages, 'assistant')))
    for principle in job.constitution.principles:
      yield item, (principle,)
  if job.stages.keys() - {RESPONSES}:  # a judge has no context
    for item in job.items:
      if item.responses:
        yield item, job.principles(item)


def _place(item: Item) -> str:
  return f'{item.source}: {item.name!r}' if item.source else f'prompt {item.name!r}'
