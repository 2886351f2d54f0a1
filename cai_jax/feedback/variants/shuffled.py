"""A control with critiques of another prompt, which shows whether revisions use critiques."""

import dataclasses
from collections.abc import Generator, Sequence

from cai_jax.constitution import Principle
from cai_jax.data.prompts import Prompt
from cai_jax.feedback.chain import (
  Context,
  Round,
  Stages,
  TurnPlan,
  insert_critique,
  register_variant,
  revise_in_rounds,
  sample_revision,
  turns_per_round,
)
from cai_jax.feedback.forward import forward
from cai_jax.feedback.score import VariantChain
from cai_jax.feedback.stage import ChainEnded
from cai_jax.feedback.variants.critique import critique_revision
from cai_jax.sampling.types import Completion, Turn


def _turns(rounds: int) -> TurnPlan:
  donor_turns = turns_per_round('critique', 'revision')(rounds)
  own_turns = turns_per_round('revision')(rounds)
  return [*((f'donor_{name}', stage) for name, stage in donor_turns), *own_turns]


# The longest contexts are those of the donor's chain, with a critique of maximum length.
@register_variant('shuffled', _turns, needs=('donor',), longest=critique_revision)
def shuffled_critique(
  prompt: Prompt,
  principles: Sequence[Principle],
  stages: Stages,
  growing: bool = False,
  *,
  donor: Prompt,
) -> VariantChain:
  """Sample the donor's whole chain, then revise y_init with the donor's critiques.

  Round n of the prompt uses the critique of round n of the donor, under the same principle. The
  rounds of the record have no critique, since none is sampled for this prompt. A chain of n rounds
  takes 2 + 3n turns.

  Args:
    prompt: the prompt x.
    principles: one principle for each round.
    stages: models, rendering and sampling settings.
    growing: whether a round sees all earlier rounds.
    donor: the prompt whose critiques are used.
  """
  donor_record = yield from _with_prefix(
    'donor', critique_revision(donor, principles, stages, growing)
  )
  critiques = [finished.critique.text for finished in donor_record.rounds]

  def revise(
    number: int, principle: Principle, context: Context, stages: Stages
  ) -> Generator[Turn, Completion, Round]:
    insert_critique(critiques[number - 1], principle, context)
    revision = yield from sample_revision(number, principle, context, stages)
    return Round(principle, None, revision)

  return (yield from revise_in_rounds(prompt, principles, stages, growing, revise))


def _with_prefix(prefix: str, chain: VariantChain) -> VariantChain:
  """Prefix the names of a chain's turns, which also gives the turns randomness of their own."""

  def answer(turn: Turn) -> VariantChain:
    return (yield dataclasses.replace(turn, name=f'{prefix}_{turn.name}'))

  try:
    return (yield from forward(chain, answer))
  except ChainEnded as ended:
    raise ChainEnded(f'{prefix}_{ended.turn}', ended.reason) from ended
