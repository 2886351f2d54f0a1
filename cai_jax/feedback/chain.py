"""The parts of a critique–revision chain (Bai et al. 2022, section 3.1), and the variant registry.

A chain is a generator. It yields the next `Turn` to sample, receives the `Completion`, and returns
a `Record`. Each variant of the chain is one file in `cai_jax/feedback/variants/`, or a file of your
own that `config.plugins` names. `register_rounds` supplies the loop, so that a variant only has
to describe one round:

  from cai_jax.feedback.chain import Round, register_rounds, sample_critique, sample_revision

  @register_rounds('my_variant', 'critique', 'revision')
  def my_variant(number, principle, context, stages):
    critique = yield from sample_critique(number, principle, context, stages)
    revision = yield from sample_revision(number, principle, context, stages)
    return Round(principle, critique, revision)
"""

import dataclasses
from collections.abc import Callable, Collection, Generator, Mapping, Sequence
from typing import Any, NamedTuple

from cai_jax.constitution import Constitution, Principle
from cai_jax.data.prompts import Prompt
from cai_jax.feedback.score import VariantChain, count_tokens
from cai_jax.feedback.stage import Reply, Stage
from cai_jax.runtime.registry import Registry
from cai_jax.sampling.types import Chain, Completion, SamplingConfig, Turn


@dataclasses.dataclass(frozen=True)
class Stages:
  """The stages of a chain, one for each kind of turn.

  Attributes:
    initial: samples y_init.
    critique: samples critiques.
    revision: samples revisions.
    extra: the stages that the variant adds, by name.
  """

  initial: Stage
  critique: Stage
  revision: Stage
  extra: Mapping[str, Stage] = dataclasses.field(default_factory=dict)

  def by_name(self) -> dict[str, Stage]:
    """Return the stages by name: 'initial', 'critique', 'revision', then those of the variant."""
    own = {'initial': self.initial, 'critique': self.critique, 'revision': self.revision}
    return own | dict(self.extra)


@dataclasses.dataclass(frozen=True)
class Round:
  """One round of a chain.

  Attributes:
    principle: the principle that the round applies, or None if it applies several.
    critique: the critique, or None if the round samples none.
    revision: the revised response, or None if the response stays as it was.
    details: what else the variant records, as an object of JSON types. A variant that records
      something, or that may keep a response, is registered with `records=True`.
    sampled_tokens: number of tokens of all turns of the round, as `revise_in_rounds` counts them;
      None means those of the critique and the revision.
  """

  principle: Principle | None
  critique: Reply | None
  revision: Reply | None
  details: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  sampled_tokens: int | None = None


@dataclasses.dataclass(frozen=True)
class Record:
  """The result of a chain: the prompt x, the initial response y_init, and every round."""

  prompt: Prompt
  initial: Reply
  rounds: tuple[Round, ...]


# The variant registry.

TurnPlan = Sequence[tuple[str, str]]  # (turn name, stage name) of each turn, in order
NEEDS = ('donor', 'constitution')  # what a chain can ask for besides its principles


class ExtraStage(NamedTuple):
  """A stage that a variant adds to 'initial', 'critique' and 'revision'.

  Attributes:
    parent: the stage of these three whose model, demonstrations and sampling settings it has.
    changes: sampling settings that differ from those of the parent, such as {'max_tokens': 1}.
    chooses: whether its model chooses between labels by their log-probabilities, which a server
      must then return. `feedback.labels.LABEL_STAGE` is such a stage.
  """

  parent: str
  changes: Mapping[str, Any]
  chooses: bool = False

  def sampling(self, parent: SamplingConfig) -> SamplingConfig:
    """Return the sampling settings of this stage.

    Args:
      parent: the settings of its parent.
    """
    return dataclasses.replace(parent, **self.changes)


class RaterName(NamedTuple):
  """What rates the candidates of a variant.

  Attributes:
    kind: a name in `scoring.raters.RATERS`.
    model: name of the judge, checkpoint or scorer.
    label: label of a classifier, '' if it has only one; or the kind of a guard.
    question: what a judge is asked, with which its context is checked before the run.
  """

  kind: str
  model: str
  label: str = ''
  question: str = ''


@dataclasses.dataclass(frozen=True)
class Variant:
  """A registered variant of the chain: how a response is revised.

  Attributes: those of `register_variant`, and
    chain: the generator function, called as `chain(prompt, principles, stages, growing)` with the
      keywords that `inputs` names.
  """

  chain: Callable[..., VariantChain]
  turns: Callable[..., TurnPlan]
  needs: frozenset[str] = frozenset()
  longest: Callable[..., VariantChain] | None = None
  options: type | None = None
  stages: Mapping[str, ExtraStage] = dataclasses.field(default_factory=dict)
  rater: Callable[[Any], RaterName | None] = lambda options: None
  records: bool = False
  check: Callable[[Constitution, Any], None] = lambda constitution, options: None
  applies_drawn: bool = True
  repeats: Callable[[Any], Mapping[str, int]] = lambda options: {}
  reads_logprobs: Callable[[Any], Collection[str]] = lambda options: ()

  @property
  def needs_donor(self) -> bool:
    """Whether the chain takes another harmful prompt."""
    return 'donor' in self.needs

  def plan(self, rounds: int, options: Any = None) -> TurnPlan:
    """Return (turn name, stage name) of the turns that a chain takes at most, in order.

    Args:
      rounds: number of rounds.
      options: an instance of `options`, if the variant has options.
    """
    return self.turns(rounds) if self.options is None else self.turns(rounds, options)

  def inputs(self, **available: Any) -> dict[str, Any]:
    """Return the keywords of the chain.

    Args:
      available: 'options', and the names in `NEEDS`.
    """
    names = self.needs | ({'options'} if self.options is not None else set())
    return {name: value for name, value in available.items() if name in names}


VARIANTS: Registry[Variant] = Registry('variant')


def register_variant(
  name: str,
  turns: Callable[..., TurnPlan],
  *,
  needs: Collection[str] = (),
  longest: Callable[..., VariantChain] | None = None,
  options: type | None = None,
  stages: Mapping[str, ExtraStage] | None = None,
  rater: Callable[[Any], RaterName | None] = lambda options: None,
  records: bool = False,
  check: Callable[[Constitution, Any], None] = lambda constitution, options: None,
  applies_drawn: bool = True,
  repeats: Callable[[Any], Mapping[str, int]] = lambda options: {},
  reads_logprobs: Callable[[Any], Collection[str]] = lambda options: (),
) -> Callable[[Callable[..., VariantChain]], Callable[..., VariantChain]]:
  """Return a decorator that registers a chain function as a value of `feedback.variant`.

  Before sampling, the job runs the chain on placeholder replies of maximum length to find the
  longest context. If the turns of a chain depend on the text of its replies, give `longest`.

  Args:
    name: the value of `feedback.variant` that selects the variant.
    turns: a function from the number of rounds, and the options if the variant has any, to the
      (turn name, stage name) of each turn in order. The names must be those that the chain yields.
      If a chain may leave turns out, these are the turns that it takes at most. They are used to
      estimate the cost of an experiment.
    needs: names in `NEEDS`. The chain takes each as a keyword: `donor: Prompt`, another harmful
      prompt, and `constitution: Constitution`.
    longest: a chain function that is measured instead, without a donor. No context of the chain may
      be longer than the longest of this function's, under any principle.
    options: a frozen dataclass with the settings of the variant, whose fields are made by
      `setting`. `feedback.options` gives their values, and the chain takes them as `options`.
    stages: the stages that the variant adds, by name.
    rater: a function from the options to what rates the `Score`s that the chain yields; None if it
      yields none.
    records: whether the rounds have details, or may keep a response. D_CAI then has the fields
      `revised`, `sampled_tokens` and `details`.
    check: raises UserError if the variant cannot work with a constitution and its options.
    applies_drawn: whether every round applies the principle that is drawn for it, and records that
      one. If not, an experiment cannot group the variant's responses by principle.
    repeats: a function from the options to the stages that answer one context several times, and
      how many times. A run with temperature 0 for one of them is refused.
    reads_logprobs: a function from the options to the stages of whose replies the chain reads the
      log-probabilities. A server without them is refused before the run.

  Raises:
    UserError: if the name is taken.
    ValueError: if `needs` has an unknown name.
  """
  if unknown := set(needs) - set(NEEDS):
    raise ValueError(f'needs={sorted(unknown)} must be some of {NEEDS}.')

  def store(chain: Callable[..., VariantChain]) -> Callable[..., VariantChain]:
    others = longest, options, dict(stages or {}), rater, records, check, applies_drawn
    reads = repeats, reads_logprobs
    VARIANTS.register(name)(Variant(chain, turns, frozenset(needs), *others, *reads))
    return chain

  return store


def turns_per_round(*stage_names: str) -> Callable[[int], TurnPlan]:
  """Return a `turns` function for chains with one turn of each of these stages in every round.

  `turns_per_round('critique', 'revision')(2)` returns the turns initial, critique_1, revision_1,
  critique_2 and revision_2.
  """

  def turns(rounds: int) -> TurnPlan:
    numbered = [(f'{name}_{n}', name) for n in range(1, rounds + 1) for name in stage_names]
    return [('initial', 'initial'), *numbered]

  return turns


# Helpers that variants share.

Context = list[dict[str, Any]]  # messages whose content is a text or a Reply
RoundFunction = Callable[[int, Principle, Context, Stages], VariantChain]  # returns a Round


def message(role: str, content: str | Reply) -> dict[str, Any]:
  """Return a message of a context.

  Args:
    role: such as 'critique_request'.
    content: a text, or a sampled reply.
  """
  return {'role': role, 'content': content}


def answer_only(prompt: Prompt, stages: Stages) -> Chain:
  """Sample y_init only. With every variant, helpful prompts use this chain.

  Args:
    prompt: the prompt x.
    stages: models, rendering and sampling settings.
  """
  initial = yield from stages.initial.ask('initial', prompt.messages, 'assistant')
  return Record(prompt, initial, ())


def revise_in_rounds(
  prompt: Prompt,
  principles: Sequence[Principle],
  stages: Stages,
  growing: bool,
  revise: RoundFunction,
) -> VariantChain:
  """Sample y_init, then one round for each principle.

  Args:
    prompt: the prompt x.
    principles: one principle for each round.
    stages: models, rendering and sampling settings.
    growing: whether a round sees all earlier rounds. Otherwise it sees the prompt and the latest
      response only, as if that response had been the first answer.
    revise: a generator function that samples one round, called as
      `revise(number, principle, context, stages)`. Rounds are numbered from 1. The context ends
      with the latest response; `revise` appends its requests and critiques.
  """
  initial = yield from stages.initial.ask('initial', prompt.messages, 'assistant')
  context, latest = [*prompt.messages, message('assistant', initial)], initial
  rounds: list[Round] = []
  for number, principle in enumerate(principles, 1):
    chain = count_tokens(revise(number, principle, context, stages))
    finished, sampled_tokens = yield from chain
    finished = dataclasses.replace(finished, sampled_tokens=sampled_tokens)
    rounds.append(finished)
    latest = finished.revision or latest
    if not growing:
      context = [*prompt.messages, message('assistant', latest)]
    elif finished.revision is not None:
      context.append(message('revision', latest))
  return Record(prompt, initial, tuple(rounds))


def register_rounds(
  name: str, *stage_names: str
) -> Callable[[RoundFunction], Callable[..., VariantChain]]:
  """Return a decorator that registers a variant whose rounds all take the same turns.

  Args:
    name: the value of `feedback.variant` that selects the variant.
    stage_names: the stages that sample the turns of a round, see `turns_per_round`.

  Returns:
    A decorator for a function that samples one round, see `revise_in_rounds`. It returns the chain
    function, `chain(prompt, principles, stages, growing=False)`.
  """

  def register(revise: RoundFunction) -> Callable[..., VariantChain]:
    def chain(
      prompt: Prompt, principles: Sequence[Principle], stages: Stages, growing: bool = False
    ) -> VariantChain:
      return revise_in_rounds(prompt, principles, stages, growing, revise)

    chain.__module__, chain.__doc__ = revise.__module__, revise.__doc__
    return register_variant(name, turns_per_round(*stage_names))(chain)

  return register


def sample_critique(
  number: int, principle: Principle, context: Context, stages: Stages
) -> Generator[Turn, Completion, Reply]:
  """Sample the critique of a round and append the request and the critique to the context.

  Args:
    number: the number of the round, from 1.
    principle: the principle of the round.
    context: the messages so far; it is extended in place.
    stages: models, rendering and sampling settings.

  Returns:
    The critique.
  """
  context.append(message('critique_request', principle.critique_request))
  critique = yield from stages.critique.ask(f'critique_{number}', context, 'critique')
  context.append(message('critique', critique))
  return critique


def insert_critique(text: str, principle: Principle, context: Context) -> None:
  """Append the critique request and a given critique to the context, without sampling.

  Args:
    text: the critique.
    principle: the principle of the round.
    context: the messages so far; it is extended in place.
  """
  context.append(message('critique_request', principle.critique_request))
  context.append(message('critique', text))


def sample_revision(
  number: int, principle: Principle, context: Context, stages: Stages
) -> Generator[Turn, Completion, Reply]:
  """Append the revision request to the context and sample the revision of a round.

  The revision itself is not appended, because the next round may start from a fresh context.

  Args:
    number: the number of the round, from 1.
    principle: the principle of the round.
    context: the messages so far; it is extended in place.
    stages: models, rendering and sampling settings.

  Returns:
    The revision.
  """
  context.append(message('revision_request', principle.revision_request))
  return (yield from stages.revision.ask(f'revision_{number}', context, 'revision'))
