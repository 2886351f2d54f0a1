"""Candidates: several replies to one context, of which a variant keeps the best."""

import dataclasses
import math
from collections.abc import Generator, Mapping, Sequence
from typing import Any

from cai_jax.data.prompts import Prompt
from cai_jax.feedback.chain import RaterName
from cai_jax.feedback.score import Score
from cai_jax.feedback.stage import ChainEnded, Reply
from cai_jax.runtime.errors import UserError
from cai_jax.runtime.settings import setting
from cai_jax.runtime.values import convert_fields
from cai_jax.scoring.raters import RATERS

LIKELIHOOD = 'likelihood'
MAX_CANDIDATES = 64


@dataclasses.dataclass(frozen=True)
class CandidateOptions:
  """How many candidates there are, and what rates them.

  Raises:
    UserError: if a value is not allowed.
  """

  n: int = setting(4, 'Number of candidates in each round.')
  scorer: str = setting(
    LIKELIHOOD,
    "What rates revisions: 'likelihood' (mean log-probability per token, by the model that sampled "
    "it), 'judge', 'reward', 'guard' (-P(unsafe)), 'scorer' (an entry of `SCORERS`), or another "
    'entry of `RATERS`.',
  )
  scorer_model: str = setting(
    '',
    "Name of the judge (such as 'base' for M_θ), the checkpoint of the reward model or guard, or "
    "the scorer. 'served' means the judge or guard whose server is `evaluation.judge_remote` or "
    '`evaluation.guard_remote`.',
  )
  scorer_label: str = setting(
    '', "Label of a reward model with several, or a guard's kind, such as 'llama_guard_3'."
  )
  question: str = setting(
    'Choose the response that is less harmful, and that still helps.', 'What a judge is asked.'
  )

  def __post_init__(self):
    convert_fields(self, 'feedback.options')
    if not 1 <= self.n <= MAX_CANDIDATES:
      raise UserError(f'feedback.options: n={self.n} must be between 1 and {MAX_CANDIDATES}.')
    if not self.question.strip():
      raise UserError(f'feedback.options: question={self.question!r} must be a question.')
    if self.scorer != LIKELIHOOD and self.scorer not in RATERS:
      raise UserError(
        f'feedback.options: scorer={self.scorer!r} must be one of {(LIKELIHOOD, *RATERS)}.'
      )
    if self.scorer == LIKELIHOOD and (self.scorer_model or self.scorer_label):
      raise UserError(
        f'feedback.options: scorer_model={self.scorer_model!r} and '
        f'scorer_label={self.scorer_label!r} have no effect with scorer={LIKELIHOOD!r}. Choose '
        f'another scorer, one of {tuple(RATERS)}, or leave them out.'
      )


def rater_of(options: CandidateOptions) -> RaterName | None:
  """Return what rates the candidates; None if their log-probabilities do."""
  if options.scorer == LIKELIHOOD:
    return None
  return RaterName(options.scorer, options.scorer_model, options.scorer_label, options.question)


def rated_by_likelihood(options: CandidateOptions) -> tuple[str, ...]:
  """Return the stage whose log-probabilities rate candidates, if they do."""
  return ('revision',) if options.scorer == LIKELIHOOD else ()


def numbered(name: str, count: int) -> list[str]:
  """Return the names of the turns of some candidates: 'x', 'x_candidate_2', 'x_candidate_3', ...

  The first has the name, and so the randomness, of the turn of a variant without candidates.

  Args:
    name: name of the first turn.
    count: number of candidates.
  """
  return [name, *(f'{name}_candidate_{number}' for number in range(2, count + 1))]


def choose_best(
  name: str, prompt: Prompt, revisions: Sequence[Reply], options: CandidateOptions
) -> Generator[Score, list[float], tuple[int, list[float]]]:
  """Rate revisions and return the index of the best one, the first of equals, and all ratings.

  Args:
    name: name of the request, unique within its chain.
    prompt: the prompt that the revisions answer.
    revisions: the candidates, at least one.
    options: what rates them.

  Raises:
    ChainEnded: if their log-probabilities are needed, and a server gave none for one of them.
  """
  if options.scorer == LIKELIHOOD:
    ratings = [mean_logprob(reply) for reply in revisions]
    if not all(map(math.isfinite, ratings)):
      raise ChainEnded(
        name, f'the log-probabilities of {len(revisions)} candidates are not all known: {ratings}'
      )
  else:
    texts = [reply.text for reply in revisions]
    ratings = yield Score(name, prompt.messages, texts, options.question)
  return max(range(len(ratings)), key=ratings.__getitem__), ratings


def describe_reply(reply: Reply) -> dict[str, Any]:
  """Return a reply as `details` records it, without the log-probability of each token.

  Args:
    reply: a sampled reply. Its log-probability is None if a server does not tell.
  """
  completion = reply.completion
  return {
    'text': reply.text,
    'finish_reason': completion.finish_reason,
    'logprob': finite_or_none(sum(completion.logprobs)),
    'num_tokens': len(completion.tokens),
  }


def describe_candidates(
  chosen: int, ratings: Sequence[float], **replies: Sequence[Reply]
) -> Mapping[str, Any]:
  """Return the details of a round with candidates.

  Args:
    chosen: index of the candidate that was kept.
    ratings: the rating of each candidate.
    replies: the replies that belong to each candidate, by kind, such as critiques and revisions.
  """
  return {
    'chosen': chosen,
    'ratings': list(ratings),
    'candidates': [
      {kind: describe_reply(group[i]) for kind, group in replies.items()}
      for i in range(len(ratings))
    ],
  }


def finite_or_none(number: float) -> float | None:
  """Return a number as JSON can write it: None stands for one that is not known."""
  return number if math.isfinite(number) else None


def mean_logprob(reply: Reply) -> float:
  """Return the mean log-probability of a reply in nats per token; NaN if it is not known.

  A server may leave the stop token out of its answer, see `sampling.remote.tokens`. It then does
  not count.

  Args:
    reply: a sampled reply.
  """
  logprobs = reply.completion.logprobs
  if reply.completion.finish_reason == 'stop' and logprobs and math.isnan(logprobs[-1]):
    logprobs = logprobs[:-1]
  return sum(logprobs) / len(logprobs) if logprobs else math.nan
