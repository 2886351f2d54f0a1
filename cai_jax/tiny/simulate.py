"""What a flawless imitator of the pre-training text would score: the chain run without a model.

The grammar, with its imperfections, answers, criticises and revises; the oracle judges the texts.
It takes seconds, and predicts the trained model within a few points where principles are broad, so
the world and its constitution are tuned here: `python -m cai_jax.tiny.simulate`.
"""

import argparse
import random
from collections.abc import Sequence

from cai_jax.constitution import Principle
from cai_jax.runtime.errors import UserError
from cai_jax.tiny import corpus, world

VARIANTS = ('critique', 'direct')


def simulate(
  principles: Sequence[Principle],
  rounds: int = 4,
  count: int = 1000,
  seed: int = 0,
  variant: str = 'critique',
  bait_counts: Sequence[int] = (1, 2),
  errs: world.Imperfections = world.Imperfections(),  # noqa: B008, frozen
) -> list[tuple[float, float]]:
  """(violation rate, helpful rate) of y_init and after each round, over `count` requests.

  Each round draws its principle independently, by weight. bait_counts: the numbers of baits,
  equally often. variant: 'critique', or 'direct' for revisions without critiques. Raises
  `ValueError` for another variant.
  """
  if variant not in VARIANTS:
    raise UserError(f'unknown variant {variant!r}: choose one of {VARIANTS}')
  rng = random.Random(f'simulate/{seed}')
  triples = world.triples('eval')
  weights = [principle.weight for principle in principles]
  broken, helped = [0] * (rounds + 1), [0] * (rounds + 1)
  for _ in range(count):
    wanted = world.request(rng, rng.choice(triples), rng.choice(bait_counts))
    prompt = world.dialogue(rng, wanted, world.request(rng, rng.choice(triples), 0))
    said = world.answer(rng, wanted)
    for i in range(rounds + 1):
      if i:
        covered = corpus.scope(rng.choices(principles, weights)[0])
        if variant == 'direct':
          said = world.revise_directly(rng, said, covered, wanted.person, errs)
        else:
          named = world.critique(rng, said, covered, errs)[1]
          said = world.revise(rng, said, named, wanted.person, errs)
      verdict = world.judge(prompt, world.render(said))
      broken[i] += bool(verdict.violations)
      helped[i] += verdict.helpful
  return [(b / count, h / count) for b, h in zip(broken, helped, strict=True)]


def main() -> None:
  """Prints the table of violation rates over the rounds for groups of principles."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--count', type=int, default=4000, help='requests for each row')
  parser.add_argument('--seed', type=int, default=0)
  args = parser.parse_args()
  shipped = corpus.shipped()
  rows = {
    'all, by weight': (shipped, {}),
    'all, revised directly': (shipped, {'variant': 'direct'}),
    'group + general': ([p for p in shipped if 'narrow' not in p.tags], {}),
    **{tag: ([p for p in shipped if tag in p.tags], {}) for tag in ('narrow', 'group', 'general')},
    'unbaited': (shipped, {'bait_counts': (0,)}),
  }
  print(f'{"principles":24}violation y_init, r1..r4              helpful y_init, r4')
  for name, (principles, options) in rows.items():
    rates = simulate(principles, count=args.count, seed=args.seed, **options)
    curve = ' '.join(f'{violation:.3f}' for violation, _ in rates)
    print(f'{name:24}{curve}         {rates[0][1]:.3f} {rates[-1][1]:.3f}')


if __name__ == '__main__':
  main()
