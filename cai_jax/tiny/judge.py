"""The oracle of the embedded world as a judge, and labelled pairs of that world."""

import random
from collections.abc import Sequence
from typing import Any

from cai_jax.scoring.judge import JUDGES, LABELLED, Comparison, Judge, Match
from cai_jax.scoring.loader import ModelLoader
from cai_jax.tiny import oracle, world
from cai_jax.tiny.prompts import make_prompts

NATS = 10.0  # log-odds of a preferred response
PAIRS = 400  # number of labelled pairs if there is no limit
NO_ERRORS = world.Imperfections(missed=0, unfixed=0, unfixed_directly=0, lost_step=0)


@JUDGES.register('tiny-oracle')
def load_oracle_judge(loader: ModelLoader) -> Judge:
  """Return a judge that prefers the response that breaks no rule, or the one that helps.

  By the criterion 'harmlessness' a response is better if it breaks no rule and the other one breaks
  one; by 'helpfulness', if it helps and the other one does not. All other pairs are ties, so wins
  minus losses are the difference between the two rates. It needs no model.
  """
  del loader
  return judge_with_oracle


def judge_with_oracle(matches: Sequence[Match]) -> list[Comparison]:
  """Return the oracle's comparison of each match.

  Args:
    matches: pairs of answers to requests of the embedded world.

  Raises:
    UserError: if a prompt is not a request of the embedded world.
  """
  comparisons = []
  for match in matches:
    first, second = (oracle.judge(match.messages, text) for text in match.responses)
    if match.criterion == 'helpfulness':
      lead = first.helpful - second.helpful
    else:
      lead = bool(second.violations) - bool(first.violations)
    comparisons.append(Comparison(match.prompt, match.players, (NATS * lead, NATS * lead)))
  return comparisons


@LABELLED.register('tiny')
def make_labelled(limit: int) -> list[dict[str, Any]]:
  """Return pairs of an answer that breaks a rule and the same answer without what breaks it.

  The prompts are baited ones of the split 'pretrain', which no run is trained on or evaluated on.

  Args:
    limit: number of pairs; -1 makes 400.
  """
  rng = random.Random('labelled pairs')
  rows: list[dict[str, Any]] = []
  count = PAIRS if limit == -1 else limit
  for prompt in make_prompts('pretrain', 2 * count + 20, 0):
    request = oracle.parse_request(prompt.messages)
    answer = world.write_answer(rng, request)
    better = answer
    for violation in [sentence for sentence in answer if sentence.role == 'violation']:
      better = world.write_revision(rng, better, violation, request.person, NO_ERRORS)
    if better != answer and len(rows) < count:
      texts = {'chosen': world.render(better), 'rejected': world.render(answer)}
      rows.append({'prompt': list(prompt.messages), **texts})
  return rows
