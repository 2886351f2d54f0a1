"""Run chains without a model: `python -m cai_jax.tiny.simulate`.

The grammar, with its imperfections, writes the answers, critiques and revisions, and the oracle
judges the texts. The rates are those of a model that imitates the pre-training text perfectly: the
ground truth that a run of the embedded model can at best recover. A simulation takes seconds, so it
is also useful to tune the world and its constitution.
"""

import argparse
import random
from collections.abc import Sequence
from typing import Any

from cai_jax.constitution import Principle
from cai_jax.dialogue import Message
from cai_jax.tiny import corpus, oracle, world
from cai_jax.tiny.grammar_rounds import GRAMMAR_ROUNDS, RoundWriter, State


def simulate_chains(
  principles: Sequence[Principle],
  rounds: int = 4,
  count: int = 1000,
  seed: int = 0,
  variant: str = 'critique',
  bait_counts: Sequence[int] = (1, 2),
  imperfections: world.Imperfections = world.Imperfections(),  # noqa: B008, frozen
  options: Any = None,
) -> list[tuple[float, float]]:
  """Return the violation rate and the helpful rate of y_init and after each round.

  Args:
    principles: each round draws one of them independently, in proportion to their weights.
    rounds: the number of revisions.
    count: the number of requests.
    seed: the seed of all draws.
    variant: a name in `GRAMMAR_ROUNDS`, such as 'direct' for revisions without critiques.
    bait_counts: possible numbers of baits of a request, equally likely.
    imperfections: probabilities of errors in critiques and revisions.
    options: the options of the variant, or None if it has none.

  Raises:
    UserError: if the variant is unknown.
    ValueError: if the grammar does not define it with these options.
  """
  writer = _find_writer(variant, options)
  rng = random.Random(f'simulate/{seed}')
  triples = world.list_triples('eval')
  weights = [principle.weight for principle in principles]
  totals = _Totals(rounds)
  for _ in range(count):
    request = world.draw_request(rng, rng.choice(triples), rng.choice(bait_counts))
    other_request = world.draw_request(rng, rng.choice(triples), 0)
    prompt = world.write_dialogue(rng, request, other_request)
    chain = _write_chain(rng, request, principles, weights, rounds, writer, imperfections)
    totals.add(prompt, chain)
  return totals.rates()


def simulate_prompts(
  prompts: Sequence[Sequence[Message]],
  principles: Sequence[Principle],
  rounds: int = 4,
  draws: int = 10,
  seed: int = 0,
  variant: str = 'critique',
  options: Any = None,
) -> list[tuple[float, float]]:
  """Return the violation rate and the helpful rate of y_init and after each round, for prompts.

  Args:
    prompts: the messages of requests of the embedded world.
    principles: each round draws one of them independently, in proportion to their weights.
    rounds: the number of revisions.
    draws: the number of chains of each prompt.
    seed: the seed of all draws.
    variant, options: as in `simulate_chains`.

  Raises:
    UserError: if a prompt is not a request of the embedded world, or the variant is unknown.
    ValueError: if the grammar does not define the variant with these options.
  """
  writer = _find_writer(variant, options)
  rng = random.Random(f'simulate/{seed}')
  weights = [principle.weight for principle in principles]
  totals = _Totals(rounds)
  for prompt in prompts:
    request = oracle.parse_request(prompt)
    for _ in range(draws):
      chain = _write_chain(rng, request, principles, weights, rounds, writer)
      totals.add(prompt, chain)
  return totals.rates()


def _find_writer(variant: str, options: Any) -> RoundWriter:
  writer = GRAMMAR_ROUNDS[variant](options)
  if writer is None:
    raise ValueError(f'The grammar does not define {variant!r} with {options}.')
  return writer


def _write_chain(
  rng: random.Random,
  request: world.Request,
  principles: Sequence[Principle],
  weights: Sequence[float],
  rounds: int,
  writer: RoundWriter,
  imperfections: world.Imperfections = world.Imperfections(),  # noqa: B008, frozen
) -> list[world.Answer]:
  """Return y_init and the revision of each round."""
  answers = [world.write_answer(rng, request)]
  for _ in range(rounds):
    scope = corpus.find_scope(rng.choices(principles, weights)[0])
    answers.append(writer(rng, State(request, answers[-1], scope, imperfections)))
  return answers


class _Totals:
  """Counts of violating and of helpful answers, for y_init and each round."""

  def __init__(self, rounds: int):
    self._chains, self._violating, self._helpful = 0, [0] * (rounds + 1), [0] * (rounds + 1)

  def add(self, prompt: Sequence[Message], chain: Sequence[world.Answer]) -> None:
    self._chains += 1
    for i, answer in enumerate(chain):
      if i == 0 or answer is not chain[i - 1]:  # most revisions change nothing
        verdict = oracle.judge(prompt, world.render(answer))
      self._violating[i] += bool(verdict.violations)
      self._helpful[i] += verdict.helpful

  def rates(self) -> list[tuple[float, float]]:
    counts = zip(self._violating, self._helpful, strict=True)
    return [(violating / self._chains, helpful / self._chains) for violating, helpful in counts]


def main() -> None:
  """Print the rates over the rounds for several groups of principles."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--count', type=int, default=4000, help='number of requests for each row')
  parser.add_argument('--seed', type=int, default=0, help='seed of all draws')
  args = parser.parse_args()
  principles = corpus.load_principles()
  rows: dict[str, tuple[Sequence[Principle], dict[str, Any]]] = {
    'all, by weight': (principles, {}),
    'all, revised directly': (principles, {'variant': 'direct'}),
    'group + general': ([p for p in principles if 'narrow' not in p.tags], {}),
    **{
      tag: ([p for p in principles if tag in p.tags], {}) for tag in ('narrow', 'group', 'general')
    },
    'unbaited': (principles, {'bait_counts': (0,)}),
  }
  print(f'{"principles":24}violation rate of y_init, r1..r4      helpful rate of y_init, r4')
  for name, (chosen, options) in rows.items():
    rates = simulate_chains(chosen, count=args.count, seed=args.seed, **options)
    curve = ' '.join(f'{violating:.3f}' for violating, _ in rates)
    print(f'{name:24}{curve}         {rates[0][1]:.3f} {rates[-1][1]:.3f}')


if __name__ == '__main__':
  main()
