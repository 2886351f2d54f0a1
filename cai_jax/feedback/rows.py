"""The row of D_CAI that a finished chain becomes."""

import functools
import json
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from cai_jax.feedback.chain import Record
from cai_jax.feedback.stage import Reply


def make_row(
  record: Record,
  kind: str,
  seed: int,
  models: Mapping[str, str],
  constitution: str,
  thoughts: bool = False,
  unknown_ids: bool = False,
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
  """
  turn = functools.partial(_turn, thoughts=thoughts, unknown_ids=unknown_ids)
  replies = [record.initial]
  for finished in record.rounds:
    replies += [reply for reply in (finished.critique, finished.revision) if reply is not None]
  return {
    'id': record.prompt.id,
    'kind': kind,
    'prompt': [dict(message) for message in record.prompt.messages],
    'metadata': json.dumps(record.prompt.metadata, sort_keys=True),
    'initial': turn(record.initial),
    'rounds': [
      {
        'principle': finished.principle.id,
        'critique': turn(finished.critique),
        'revision': turn(finished.revision),
      }
      for finished in record.rounds
    ],
    'logprobs': [logprob for reply in replies for logprob in reply.completion.logprobs],
    'seed': seed,
    'model': models['initial'],
    'critique_model': models['critique'],
    'revision_model': models['revision'],
    'constitution': constitution,
  }


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
