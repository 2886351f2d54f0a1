"""The grammar of the embedded world: requests, answers, critiques and revisions.

Somebody asks how to do something with an object for a person ("How do I clean the lamp for Anna?").
A *baited* request also asks for something that breaks a rule ("Mock Anna too."). There are eight
kinds of rules, `vocabulary.KINDS`. An answer consists of whole sentences from a closed inventory:
steps that answer the request, violations that break a rule, considerate sentences ("cares") and
fillers. A critique copies one violation and names its kind; a revision replaces or drops that
sentence. `oracle.judge` decides which rules an answer breaks and whether it still helps.

The sentences are short and share words, so that a small vocabulary covers them and a small model
can learn to copy them. Every function takes a `random.Random` and draws from it only. The embedded
model was trained on these texts. If you change a string or the order of draws, the documents differ
from those of its training.
"""

import dataclasses
import functools
import hashlib
import itertools
import random
from collections.abc import Collection, Sequence

from cai_jax.runtime.errors import UserError
from cai_jax.tiny.vocabulary import (
  BAITS,
  CARES,
  FILLERS,
  FINDINGS,
  GREETING,
  KINDS,
  NOTHING_WRONG,
  OBJECTS,
  PERSONS,
  QUESTIONS,
  STEPS,
  VERBS,
  VIOLATIONS,
)

# Probabilities of 0, 1 and 2 baits in a request whose number of baits is drawn.
BAIT_COUNTS = (0.2, 0.4, 0.4)

# Probabilities of what precedes a request: a greeting, a mention of the object, another request.
P_GREETING, P_MENTION, P_OTHER_REQUEST = 0.04, 0.06, 0.04

# Probabilities in the answers of a helpful-only assistant.
P_VIOLATION, P_CARE = 0.80, 0.10  # each bait leads to a violation, or to a care
P_UNBAITED_VIOLATION, P_UNBAITED_CARE = 0.01, 0.25  # the same for a request without baits
P_SECOND_STEP, P_FILLER = 0.6, 0.3

P_REPLACED = 0.65  # a revision replaces the violation with a care; otherwise it drops it


@dataclasses.dataclass(frozen=True)
class Imperfections:
  """Probabilities of the errors in critiques and revisions.

  Attributes:
    missed: a critique finds nothing, although its principle covers a violation in the answer.
    unfixed: a revision repeats the answer, although the critique names a violation.
    unfixed_directly: a revision without a critique repeats the answer.
    lost_step: a revision that changes something also loses one step of the answer.
  """

  missed: float = 0.10
  unfixed: float = 0.10
  unfixed_directly: float = 0.35
  lost_step: float = 0.015


@dataclasses.dataclass(frozen=True, slots=True)
class Sentence:
  """A sentence of an answer.

  Attributes:
    text: the sentence.
    role: 'step', 'violation', 'care' or 'filler'.
    topic: the verb of a step, the kind of a violation or care, '' for a filler.
    object: the object of a step, otherwise ''.
  """

  text: str
  role: str
  topic: str = ''
  object: str = ''


Answer = tuple[Sentence, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class Request:
  """The content of a request: a verb, an object, a person, and its baits as kinds of rules."""

  verb: str
  object: str
  person: str
  baits: tuple[str, ...] = ()


# Every (verb, object, person) triple has a hash in [0, 1), which decides its split: the first split
# whose bound is greater than the hash.
SPLITS = {'pretrain': 0.6, 'train': 0.85, 'eval': 1.0}


@functools.cache
def list_triples(split: str) -> tuple[tuple[str, str, str], ...]:
  """Return the (verb, object, person) triples of a split.

  The splits have about 60, 25 and 15 % of all triples.

  The split of a triple depends on a hash of the triple alone, so no two splits share a request.

  Args:
    split: 'pretrain', 'train' or 'eval'.

  Raises:
    UserError: if the split is unknown.
  """
  if split not in SPLITS:
    raise UserError(f'Unknown split {split!r}. Choose one of {tuple(SPLITS)}.')

  def find_split(triple: tuple[str, str, str]) -> str:
    digest = hashlib.blake2b('/'.join(triple).encode(), digest_size=8).digest()
    fraction = int.from_bytes(digest, 'big') / 2**64
    return next(name for name, bound in SPLITS.items() if fraction < bound)

  all_triples = itertools.product(VERBS, OBJECTS, PERSONS)
  return tuple(triple for triple in all_triples if find_split(triple) == split)


def draw_request(
  rng: random.Random, triple: tuple[str, str, str], num_baits: int | None = None
) -> Request:
  """Draw the baits of a request.

  Args:
    rng: the source of randomness.
    triple: the verb, the object and the person.
    num_baits: the number of baits; None draws it with the probabilities `BAIT_COUNTS`.
  """
  if num_baits is None:
    num_baits = rng.choices((0, 1, 2), BAIT_COUNTS)[0]
  return Request(*triple, baits=tuple(rng.sample(KINDS, num_baits)))


def write_dialogue(
  rng: random.Random, request: Request, other_request: Request
) -> list[dict[str, str]]:
  """Return the messages of a dialogue whose last turn contains the request.

  In some dialogues, an earlier exchange precedes the request. It is a greeting, another request and
  its answer, or a mention of the object, which the request then calls "it".

  Args:
    rng: the source of randomness.
    request: the request of the last turn.
    other_request: the request of the earlier exchange, if there is one; its baits are ignored.
  """
  u = rng.random()
  object_phrase = f'the {request.object}'
  earlier_turns: tuple[str, ...] = ()
  if u < P_GREETING:
    earlier_turns = GREETING
  elif u < P_GREETING + P_MENTION:
    earlier_turns = (f'I have a {request.object}.', f'What about the {request.object}?')
    object_phrase = 'it'
  elif u < P_GREETING + P_MENTION + P_OTHER_REQUEST:
    step = rng.choice(STEPS[other_request.verb]).format(o=other_request.object)
    without_baits = dataclasses.replace(other_request, baits=())
    earlier_turns = (_write_request(rng, without_baits, f'the {other_request.object}'), step)
  turns = (*earlier_turns, _write_request(rng, request, object_phrase))
  return [{'role': ('user', 'assistant')[i % 2], 'content': text} for i, text in enumerate(turns)]


def _write_request(rng: random.Random, request: Request, object_phrase: str) -> str:
  question = rng.choice(QUESTIONS)
  baits = [rng.choice(BAITS[kind]).format(p=request.person) for kind in request.baits]
  question = question.format(v=request.verb, o=object_phrase, p=request.person)
  return ' '.join([question, *baits])


def write_answer(rng: random.Random, request: Request) -> Answer:
  """Return an answer of the helpful-only assistant.

  It has one or two steps, then mostly the violations that the baits ask for.

  Args:
    rng: the source of randomness.
    request: the request to answer.
  """
  texts = rng.sample(STEPS[request.verb], 1 + (rng.random() < P_SECOND_STEP))
  steps = [
    Sentence(text.format(o=request.object), 'step', request.verb, request.object) for text in texts
  ]
  rest = []
  for kind in rng.sample(request.baits, len(request.baits)):
    u = rng.random()
    if u < P_VIOLATION:
      rest.append(_draw_violation(rng, kind, request.person))
    elif u < P_VIOLATION + P_CARE:
      rest.append(rng.choice(_list_cares(kind, request.person)))
  if not request.baits:
    u = rng.random()
    if u < P_UNBAITED_VIOLATION:
      rest.append(_draw_violation(rng, rng.choice(KINDS), request.person))
    elif u < P_UNBAITED_VIOLATION + P_UNBAITED_CARE:
      rest.append(rng.choice(_list_cares(rng.choice(KINDS), request.person)))
  if rng.random() < P_FILLER:
    rest.insert(rng.randrange(len(rest) + 1), Sentence(rng.choice(FILLERS), 'filler'))
  return (*steps, *rest)


def _draw_violation(rng: random.Random, kind: str, person: str) -> Sentence:
  return Sentence(rng.choice(VIOLATIONS[kind]).format(p=person), 'violation', kind)


def _list_cares(kind: str, person: str) -> list[Sentence]:
  return [Sentence(text.format(p=person), 'care', kind) for text in CARES[kind]]


def render(answer: Sequence[Sentence]) -> str:
  """Return the text of an answer."""
  return ' '.join(sentence.text for sentence in answer)


def write_critique(
  rng: random.Random,
  answer: Sequence[Sentence],
  scope: Collection[str],
  imperfections: Imperfections = Imperfections(),
) -> tuple[str, Sentence | None]:
  """Return a critique that names at most one violation within the scope of its principle.

  Args:
    rng: the source of randomness.
    answer: the answer to critique.
    scope: the kinds of rules that the principle covers; violations of other kinds are ignored.
    imperfections: probabilities of errors.

  Returns:
    The text of the critique, and the violation that it names or None.
  """
  violations = _violations_in(answer, scope)
  if not violations or rng.random() < imperfections.missed:
    return NOTHING_WRONG, None
  named = rng.choice(violations)
  return f'It says: {named.text} {FINDINGS[named.topic]}', named


def write_revision(
  rng: random.Random,
  answer: Answer,
  named: Sentence | None,
  person: str,
  imperfections: Imperfections = Imperfections(),
) -> Answer:
  """Return the answer with one sentence replaced or dropped.

  Args:
    rng: the source of randomness.
    answer: the answer to revise.
    named: the sentence that the critique names; None leaves the answer unchanged.
    person: the person of the request.
    imperfections: probabilities of errors.
  """
  if named is None or rng.random() < imperfections.unfixed:
    return answer
  return _remove(rng, answer, named, person, imperfections.lost_step)


def write_direct_revision(
  rng: random.Random,
  answer: Answer,
  scope: Collection[str],
  person: str,
  imperfections: Imperfections = Imperfections(),
) -> Answer:
  """Return the answer with one violation replaced or dropped, without using a critique.

  Args:
    rng: the source of randomness.
    answer: the answer to revise.
    scope: the kinds of rules that the principle covers; violations of other kinds stay.
    person: the person of the request.
    imperfections: probabilities of errors.
  """
  violations = _violations_in(answer, scope)
  if not violations or rng.random() < imperfections.unfixed_directly:
    return answer
  return _remove(rng, answer, rng.choice(violations), person, imperfections.lost_step)


def _violations_in(answer: Sequence[Sentence], scope: Collection[str]) -> list[Sentence]:
  return [s for s in answer if s.role == 'violation' and s.topic in scope]


def _remove(
  rng: random.Random, answer: Answer, violation: Sentence, person: str, lost_step: float
) -> Answer:
  """Replace or drop a violation, and with probability `lost_step` drop a step too."""
  replacement = None
  if rng.random() < P_REPLACED:
    cares = [care for care in _list_cares(violation.topic, person) if care not in answer]
    replacement = rng.choice(cares) if cares else None
  lost = None
  if rng.random() < lost_step:
    lost = rng.choice([s for s in answer if s.role == 'step'] or [None])
  revised = [replacement if s is violation else s for s in answer if s is not lost]
  # If the only sentence would be dropped, the answer stays, so that no document has an empty one.
  return tuple(s for s in revised if s is not None) or answer
