"""How the grammar writes a round of each variant, for those that it defines.

`GRAMMAR_ROUNDS` maps the name of a variant to a function from the variant's options to a
`RoundWriter`, or None if the grammar has no such round with these options. The grammar has
critiques under one principle, revisions by them, and direct revisions. It does not say what a model
makes of other requests, such as a debate.
"""

import random
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from cai_jax.feedback.candidates import CandidateOptions
from cai_jax.runtime.registry import Registry
from cai_jax.tiny import oracle, world
from cai_jax.tiny.vocabulary import KINDS


class State(NamedTuple):
  """What a round begins with.

  Attributes:
    request: the request that is answered.
    answer: the latest answer.
    scope: the kinds of rules that the round's principle covers.
    imperfections: probabilities of errors in critiques and revisions.
  """

  request: world.Request
  answer: world.Answer
  scope: frozenset[str]
  imperfections: world.Imperfections


RoundWriter = Callable[[random.Random, State], world.Answer]
GRAMMAR_ROUNDS: Registry[Callable[[Any], RoundWriter | None]] = Registry('round of the grammar')


def _critique_and_revise(rng: random.Random, state: State) -> world.Answer:
  _, named = world.write_critique(rng, state.answer, state.scope, state.imperfections)
  return _revise(rng, state, named)


def _revise(rng: random.Random, state: State, named: world.Sentence | None) -> world.Answer:
  person = state.request.person
  return world.write_revision(rng, state.answer, named, person, state.imperfections)


@GRAMMAR_ROUNDS.register('critique')
def critique(options: None) -> RoundWriter:
  """Return a critique and its revision."""
  del options
  return _critique_and_revise


@GRAMMAR_ROUNDS.register('direct')
def direct(options: None) -> RoundWriter:
  """Return a revision without a critique."""
  del options

  def write(rng: random.Random, state: State) -> world.Answer:
    person = state.request.person
    return world.write_direct_revision(rng, state.answer, state.scope, person, state.imperfections)

  return write


@GRAMMAR_ROUNDS.register('if_needed')
def if_needed(options: Any) -> RoundWriter | None:
  """Return the round of 'critique': a critique that finds nothing leaves the answer as it is."""
  return _critique_and_revise if options.decide == 'text' else None


@GRAMMAR_ROUNDS.register('all_principles')
def all_principles(options: Any) -> RoundWriter:
  """Return the round of a principle that covers every rule, as a perfect reader of all would."""
  del options
  return lambda rng, state: _critique_and_revise(rng, state._replace(scope=frozenset(KINDS)))


@GRAMMAR_ROUNDS.register('best_revision')
def best_revision(options: CandidateOptions) -> RoundWriter | None:
  """Return a critique and the best of n revisions, if the oracle rates them."""

  def write(rng: random.Random, state: State) -> world.Answer:
    _, named = world.write_critique(rng, state.answer, state.scope, state.imperfections)
    return _best([_revise(rng, state, named) for _ in range(options.n)], state, options)

  return write if _rate_of(options) else None


@GRAMMAR_ROUNDS.register('best_critique')
def best_critique(options: CandidateOptions) -> RoundWriter | None:
  """Return the best of n revisions, each by a critique of its own, if the oracle rates them."""

  def write(rng: random.Random, state: State) -> world.Answer:
    return _best([_critique_and_revise(rng, state) for _ in range(options.n)], state, options)

  return write if _rate_of(options) else None


def _best(answers: Sequence[world.Answer], state: State, options: CandidateOptions) -> world.Answer:
  """Return the answer with the best rating, the first of equals."""
  rate = _rate_of(options)
  assert rate is not None, 'the caller has a writer'
  return max(answers, key=lambda answer: rate(state.request, answer))


def _rate_of(options: CandidateOptions) -> Callable[[world.Request, world.Answer], float] | None:
  """Return how the oracle rates an answer as a scorer or as a judge; None for other raters."""
  return {
    ('scorer', 'tiny'): lambda request, answer: (
      0.5 * _helps(request, answer) - len(_violations(answer))
    ),
    ('judge', 'tiny-oracle'): lambda request, answer: -float(bool(_violations(answer))),
  }.get((options.scorer, options.scorer_model))


def _violations(answer: world.Answer) -> frozenset[str]:
  return oracle.find_violations(world.render(answer))


def _helps(request: world.Request, answer: world.Answer) -> bool:
  """Return whether an answer has a step, and only steps for the request, as the oracle asks."""
  steps = [(s.topic, s.object) for s in answer if s.role == 'step']
  return {*steps} == {(request.verb, request.object)}
