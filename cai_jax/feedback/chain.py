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
from collections.abc import Callable, Generator, Sequence
from typing import Any

from cai_jax.constitution import Principle
from cai_jax.data.prompts import Prompt
from cai_jax.feedback.stage import Reply, Stage
from cai_jax.runtime.registry import Registry
from cai_jax.sampling.types import Chain, Completion, Turn


@dataclasses.dataclass(frozen=True)
class Stages:
  """The stages of a chain, one for each kind of turn."""

  initial: Stage
  critique: Stage
  revision: Stage

  def by_name(self) -> dict[str, Stage]:
    """Return the stages under the names 'initial', 'critique' and 'revision', in this order."""
    return {'initial': self.initial, 'critique': self.critique, 'revision': self.revision}


@dataclasses.dataclass(frozen=True)
class Round:
  """One round of a chain.

  Attributes:
    principle: the principle that the round applies.
    critique: the critique, or None if the round samples none.
    revision: the revised response.
  """

  principle: Principle
  critique: Reply | None
  revision: Reply


@dataclasses.dataclass(frozen=True)
class Record:
  """The result of a chain: the prompt x, the initial response y_init, and every round."""

  prompt: Prompt
  initial: Reply
  rounds: tuple[Round, ...]


# The variant registry.

TurnPlan = Sequence[tuple[str, str]]  # (turn name, stage name) of each turn, in order


@dataclasses.dataclass(frozen=True)
class Variant:
  """A registered variant of the chain: how a response is revised.

  Attributes:
    chain: the generator function, called as `chain(prompt, principles, stages, growing)`.
    turns: returns the turns that the chain takes for a number of rounds.
    needs_donor: whether `chain` also takes the keyword `donor`, another harmful prompt.
    longest: a generator function without a donor, whose contexts are measured instead of those of
      `chain`; None measures `chain`.
  """

  chain: Callable[..., Chain]
  turns: Callable[[int], TurnPlan]
  needs_donor: bool = False
  longest: Callable[..., Chain] | None = None


VARIANTS: Registry[Variant] = Registry('variant')


def register_variant(
  name: str,
  turns: Callable[[int], TurnPlan],
  needs_donor: bool = False,
  longest: Callable[..., Chain] | None = None,
) -> Callable[[Callable[..., Chain]], Callable[..., Chain]]:
  """Return a decorator that registers a chain function as a value of `feedback.variant`.

  Before sampling, the job runs the chain on placeholder replies of maximum length to find the
  longest context. The turns of a chain must therefore not depend on the text of its replies.

  Args:
    name: the value of `feedback.variant` that selects the variant.
    turns: a function from the number of rounds to the (turn name, stage name) of each turn in
      order; a stage name is 'initial', 'critique' or 'revision'. The names must be those that the
      chain yields. They are used to estimate the cost of an experiment.
    needs_donor: whether the chain also takes the keyword `donor: Prompt`, another harmful prompt.
    longest: a chain function without a donor. If it is given, its contexts are measured to find the
      longest one, instead of those of the chain.

  Raises:
    UserError: if the name is taken.
  """

  def store(chain: Callable[..., Chain]) -> Callable[..., Chain]:
    VARIANTS.register(name)(Variant(chain, turns, needs_donor, longest))
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
RoundFunction = Callable[[int, Principle, Context, Stages], Generator[Turn, Completion, Round]]


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
) -> Chain:
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
  context = [*prompt.messages, message('assistant', initial)]
  rounds = []
  for number, principle in enumerate(principles, 1):
    finished = yield from revise(number, principle, context, stages)
    rounds.append(finished)
    if growing:
      context.append(message('revision', finished.revision))
    else:
      context = [*prompt.messages, message('assistant', finished.revision)]
  return Record(prompt, initial, tuple(rounds))


def register_rounds(
  name: str, *stage_names: str
) -> Callable[[RoundFunction], Callable[..., Chain]]:
  """Return a decorator that registers a variant whose rounds all take the same turns.

  Args:
    name: the value of `feedback.variant` that selects the variant.
    stage_names: the stages that sample the turns of a round, see `turns_per_round`.

  Returns:
    A decorator for a function that samples one round, see `revise_in_rounds`. It returns the chain
    function, `chain(prompt, principles, stages, growing=False)`.
  """

  def register(revise: RoundFunction) -> Callable[..., Chain]:
    def chain(
      prompt: Prompt, principles: Sequence[Principle], stages: Stages, growing: bool = False
    ) -> Chain:
      return revise_in_rounds(prompt, principles, stages, growing, revise)

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
