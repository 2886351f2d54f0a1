"""Pre-training documents of the embedded world.

A document is a list of messages. It shows a helpful-only assistant that does what the baits ask
for. On request, the assistant critiques and revises its answers, with the errors of
`world.Imperfections`. Requests come from the split 'pretrain'. Document i of a seed is a pure
function of (seed, i).
"""

import dataclasses
import functools
import random
from collections.abc import Iterator, Sequence

from cai_jax.constitution import ConstitutionConfig, Principle, load_constitution
from cai_jax.tiny import world
from cai_jax.tiny.vocabulary import KINDS

# How a made-up principle refers to each kind; the group principles of the constitution do the same.
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

# For each form of document, the probabilities of 0, 1, ..., 4 rounds after the first answer.
ROUNDS = {
  'plain': (1, 0, 0, 0, 0),
  'direct': (0, 0.7, 0.2, 0.1, 0),
  'one_round': (0, 1, 0, 0, 0),
  'growing': (0, 0, 0.5, 0.3, 0.2),
}
FORMS = tuple(ROUNDS)


@dataclasses.dataclass(frozen=True)
class Mixture:
  """Shares of the forms of documents and of the principles in them.

  Attributes:
    plain: documents that end with the first answer.
    direct: documents with one to three revisions and no critique.
    one_round: documents with one critique and one revision.
    growing: documents with two to four rounds of critique and revision.
    in_scope: answers whose principle covers a rule that they break, among all answers that break
      one.
    tiers: narrow, group, general and invented principles, in this order.
  """

  plain: float = 0.27
  direct: float = 0.15
  one_round: float = 0.42
  growing: float = 0.16
  in_scope: float = 0.60
  tiers: tuple[float, ...] = (0.35, 0.30, 0.25, 0.10)


@functools.cache
def load_principles() -> tuple[Principle, ...]:
  """Return the principles of the embedded world's constitution."""
  return load_constitution(ConstitutionConfig('tiny')).principles


@functools.cache
def _principles_with_tag(tag: str) -> tuple[Principle, ...]:
  return tuple(principle for principle in load_principles() if tag in principle.tags)


@functools.cache
def find_scope(principle: Principle) -> frozenset[str]:
  """Return the kinds of rules that a principle covers: its tags, or all kinds for 'general'."""
  kinds = frozenset(KINDS)
  return kinds if 'general' in principle.tags else kinds & frozenset(principle.tags)


def make_principle(kinds: Sequence[str]) -> Principle:
  """Return a principle that covers two or more kinds, such as "Find any lie, secret or theft.".

  Args:
    kinds: two or more kinds of rules.
  """
  nouns = [NOUNS[kind] for kind in kinds]
  listed = f'{", ".join(nouns[:-1])} or {nouns[-1]}'
  return Principle(
    '-'.join(kinds), f'Find any {listed}.', f'Rewrite it with no {listed}.', tags=tuple(kinds)
  )


def draw_principle(rng: random.Random, answer: world.Answer, mixture: Mixture) -> Principle:
  """Draw a principle for an answer.

  If the answer breaks rules, the principle covers one of them with probability `mixture.in_scope`
  and none of them otherwise.

  Args:
    rng: the source of randomness.
    answer: the answer that the principle applies to.
    mixture: shares of the principles.
  """
  broken = frozenset(s.topic for s in answer if s.role == 'violation')
  in_scope = rng.random() < mixture.in_scope
  tier = rng.choices(('narrow', 'group', 'general', 'made_up'), mixture.tiers)[0]
  choices: Sequence[Principle]
  if tier == 'made_up':
    choices = [make_principle(rng.sample(KINDS, rng.randint(2, 4))) for _ in range(4)]
  else:
    choices = _principles_with_tag(tier)
  # Every general principle covers every violation, so the narrow principles serve as a fallback.
  for principles in (choices, _principles_with_tag('narrow')):
    fitting = [p for p in principles if not broken or bool(find_scope(p) & broken) == in_scope]
    if fitting:
      return rng.choice(fitting)
  raise AssertionError('A narrow principle covers one kind, and an answer breaks at most two.')


def make_document(
  seed: int,
  index: int,
  mixture: Mixture = Mixture(),
  imperfections: world.Imperfections = world.Imperfections(),  # noqa: B008, frozen
) -> list[dict[str, str]]:
  """Return one document: messages with the roles of a critique–revision chain.

  Args:
    seed: the seed of the corpus.
    index: the index of the document in the corpus.
    mixture: shares of the forms of documents and of the principles.
    imperfections: probabilities of errors in critiques and revisions.
  """
  rng = random.Random(f'{seed}/{index}')
  triples = world.list_triples('pretrain')
  request = world.draw_request(rng, rng.choice(triples))
  other_request = world.draw_request(rng, rng.choice(triples), 0)
  messages = world.write_dialogue(rng, request, other_request)
  answer = world.write_answer(rng, request)
  messages.append({'role': 'assistant', 'content': world.render(answer)})
  form = rng.choices(FORMS, [getattr(mixture, form) for form in FORMS])[0]
  for _ in range(rng.choices(range(5), ROUNDS[form])[0]):
    principle = draw_principle(rng, answer, mixture)
    scope = find_scope(principle)
    if form == 'direct':
      answer = world.write_direct_revision(rng, answer, scope, request.person, imperfections)
    else:
      critique, named = world.write_critique(rng, answer, scope, imperfections)
      messages += _turn('critique', principle.critique_request, critique)
      answer = world.write_revision(rng, answer, named, request.person, imperfections)
    messages += _turn('revision', principle.revision_request, world.render(answer))
  return messages


def make_documents(count: int, seed: int) -> Iterator[list[dict[str, str]]]:
  """Return an iterator over the documents 0, 1, ..., count - 1 of a seed.

  Args:
    count: the number of documents.
    seed: the seed of the corpus.
  """
  return (make_document(seed, index) for index in range(count))


def _turn(role: str, request: str, reply: str) -> list[dict[str, str]]:
  return [{'role': f'{role}_request', 'content': request}, {'role': role, 'content': reply}]
