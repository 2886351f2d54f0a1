"""Pre-training documents of the embedded world.

A document is a list of messages. It shows a helpful-only assistant that does what the baits ask for
and that, when asked, criticises and revises, imperfectly (`world.Imperfections`). Requests are
those of the split 'pretrain'. Document i of a seed is a pure function of (seed, i).
"""

import dataclasses
import functools
import pathlib
import random
from collections.abc import Iterator, Sequence

from cai_jax.constitution import CONSTITUTIONS, ConstitutionConfig, Principle, load_constitution
from cai_jax.tiny import world

CONSTITUTION = CONSTITUTIONS.register('tiny')(
  str(pathlib.Path(__file__).with_name('constitution.yaml'))
)

# The nouns by which a principle made up of kinds calls them; the groups of the constitution do too.
NOUNS = {
  'insult': 'insult',
  'privacy': 'secret',
  'danger': 'danger',
  'theft': 'theft',
  'threat': 'threat',
  'rumour': 'gossip',
  'lie': 'lie',
  'waste': 'waste',
}

# What follows the first answer, and how often there are 0, 1, ..., 4 rounds of it.
ROUNDS = {
  'plain': (1, 0, 0, 0, 0),
  'direct': (0, 0.7, 0.2, 0.1, 0),
  'one_round': (0, 1, 0, 0, 0),
  'growing': (0, 0, 0.5, 0.3, 0.2),
}
FORMS = tuple(ROUNDS)


@dataclasses.dataclass(frozen=True)
class Mixture:
  """Shares of the documents by what follows the first answer, and of the principles drawn.

  plain, direct, one_round, growing: nothing, revisions without critiques (one to three), one
  critique and revision, two to four of them in one context.
  in_scope: where an answer breaks a rule, how often the principle covers a rule that it breaks.
  tiers: shares of narrow, group, general and made-up principles.
  """

  plain: float = 0.27
  direct: float = 0.15
  one_round: float = 0.42
  growing: float = 0.16
  in_scope: float = 0.60
  tiers: tuple[float, ...] = (0.35, 0.30, 0.25, 0.10)


@functools.cache
def shipped() -> tuple[Principle, ...]:
  """The principles of the world's constitution."""
  return load_constitution(ConstitutionConfig('tiny')).principles


@functools.cache
def _tier(tag: str) -> tuple[Principle, ...]:
  return tuple(principle for principle in shipped() if tag in principle.tags)


@functools.cache
def scope(principle: Principle) -> frozenset[str]:
  """The kinds of rule that a principle covers, by its tags: all for 'general', else those named."""
  kinds = frozenset(world.KINDS)
  return kinds if 'general' in principle.tags else kinds & frozenset(principle.tags)


def made_up(kinds: Sequence[str]) -> Principle:
  """A principle that covers two or more kinds, in their order: "Find any lie, secret or theft." """
  nouns = [NOUNS[kind] for kind in kinds]
  listed = f'{", ".join(nouns[:-1])} or {nouns[-1]}'
  return Principle(
    '-'.join(kinds), f'Find any {listed}.', f'Rewrite it with no {listed}.', tags=tuple(kinds)
  )


def _principle(rng: random.Random, said: Sequence[world.Sentence], mixture: Mixture) -> Principle:
  """A principle; where the answer breaks rules, one that covers one of them in a set share."""
  broken = frozenset(s.topic for s in said if s.role == 'violation')
  meddles = rng.random() < mixture.in_scope
  tier = rng.choices(('narrow', 'group', 'general', 'made_up'), mixture.tiers)[0]
  if tier == 'made_up':
    choices = [made_up(rng.sample(world.KINDS, rng.randint(2, 4))) for _ in range(4)]
  else:
    choices = _tier(tier)
  # No general principle leaves a violation out, but a narrow one always does.
  for principles in (choices, _tier('narrow')):
    fitting = [p for p in principles if not broken or bool(scope(p) & broken) == meddles]
    if fitting:
      return rng.choice(fitting)
  raise AssertionError('the narrow principles cover one kind each')


def document(
  seed: int,
  index: int,
  mixture: Mixture = Mixture(),
  errs: world.Imperfections = world.Imperfections(),  # noqa: B008, frozen
) -> list[dict[str, str]]:
  """Document `index` of a seed: messages whose roles are those of a critique-revision chain."""
  rng = random.Random(f'{seed}/{index}')
  triples = world.triples('pretrain')
  wanted = world.request(rng, rng.choice(triples))
  earlier = world.request(rng, rng.choice(triples), 0)
  messages = world.dialogue(rng, wanted, earlier)
  said = world.answer(rng, wanted)
  messages.append({'role': 'assistant', 'content': world.render(said)})
  form = rng.choices(FORMS, [getattr(mixture, form) for form in FORMS])[0]
  for _ in range(rng.choices(range(5), ROUNDS[form])[0]):
    principle = _principle(rng, said, mixture)
    if form == 'direct':
      said = world.revise_directly(rng, said, scope(principle), wanted.person, errs)
    else:
      text, named = world.critique(rng, said, scope(principle), errs)
      messages += _turn('critique', principle.critique_request, text)
      said = world.revise(rng, said, named, wanted.person, errs)
    messages += _turn('revision', principle.revision_request, world.render(said))
  return messages


def documents(count: int, seed: int) -> Iterator[list[dict[str, str]]]:
  """Documents 0, 1, ..., count - 1 of a seed."""
  return (document(seed, index) for index in range(count))


def _turn(name: str, request: str, reply: str) -> list[dict[str, str]]:
  return [{'role': f'{name}_request', 'content': request}, {'role': name, 'content': reply}]
