"""The row of D_CAI that a finished chain becomes."""

import functools
import json
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from cai_jax.feedback.chain import Record, Round
from cai_jax.feedback.stage import Reply


def make_row(
  record: Record,
  kind: str,
  seed: int,
  models: Mapping[str, str],
  constitution: str,
  thoughts: bool = False,
  unknown_ids: bool = False,
  details: bool = False,
) -> dict[str, Any]:
  """Return the row of D_CAI for a chain's record, in the form of `d_cai.make_features`.

  Args:
    record: the result of the chain.
    kind: 'harmful' or 'helpful'.
    seed: the seed of the run.
    models: model names under the keys 'initial', 'critique' and 'revision'.
    constitution: the fingerprint of the constitution.
    thoughts: whether each turn has a field for its thoughts.
    unknown_ids: whether each turn says if its ids are known.
    details: whether rounds have the fields `revised`, `sampled_tokens` and `details`.
  """
  turn = functools.partial(_turn, thoughts=thoughts, unknown_ids=unknown_ids)
  replies, rounds = [record.initial], []
  latest = record.initial
  for finished in record.rounds:
    replies += [reply for reply in (finished.critique, finished.revision) if reply is not None]
    latest = finished.revision or latest
    rounds.append(_round(finished, latest, turn, details))
  return {
    'id': record.prompt.id,
    'kind': kind,
    'prompt': [dict(message) for message in record.prompt.messages],
    'metadata': json.dumps(record.prompt.metadata, sort_keys=True),
    'initial': turn(record.initial),
    'rounds': rounds,
    'logprobs': [logprob for reply in replies for logprob in reply.completion.logprobs],
    'seed': seed,
    'model': models['initial'],
    'critique_model': models['critique'],
    'revision_model': models['revision'],
    'constitution': constitution,
  }


def _round(
  finished: Round, latest: Reply, turn: Callable[[Reply | None], dict[str, Any]], details: bool
) -> dict[str, Any]:
  """Return the columns of one round.

  Args:
    finished: the round.
    latest: the response after the round: its revision, or the one that it kept.
    turn: returns the columns of a turn.
    details: see `make_row`.

  Raises:
    ValueError: if the round has details, or no revision, and `details` is false; or if its details
      have a number that is not finite, which JSON cannot write.
  """
  columns: dict[str, Any] = {
    'principle': finished.principle.id if finished.principle is not None else '',
    'critique': turn(finished.critique),
    'revision': turn(latest),
  }
  if not details and (finished.details or finished.revision is None):
    raise ValueError('A variant that keeps responses or records details needs records=True.')
  if details:
    count = finished.sampled_tokens
    if count is None:
      replies = [reply for reply in (finished.critique, finished.revision) if reply is not None]
      count = sum(len(reply.completion.tokens) for reply in replies)
    columns['revised'] = finished.revision is not None
    columns['sampled_tokens'] = count
    columns['details'] = json.dumps(
      finished.details, sort_keys=True, ensure_ascii=False, allow_nan=False
    )
  return columns


def _turn(reply: Reply | None, thoughts: bool, unknown_ids: bool) -> dict[str, Any]:
  """Return the columns of one turn; they are empty if no reply was sampled."""
  others: dict[str, Any] = {}
  if thoughts:
    others['thoughts'] = reply.thoughts if reply is not None else ''
  if unknown_ids:
    others['ids_known'] = reply is None or reply.ids_known
  if reply is None:
    return {'text': '', 'finish_reason': '', 'logprob': 0.0, 'num_tokens': 0, **others}
  completion = reply.completion
  logprob = sum(completion.logprobs) if reply.ids_known else math.nan
  return {
    'text': reply.text,
    'finish_reason': completion.finish_reason,
    'logprob': float(np.float32(logprob)),
    'num_tokens': len(completion.tokens),
    **others,
  }
