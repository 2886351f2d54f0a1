"""Chains that wait for the answers of a batch, and the end of a run that has some."""

from collections.abc import Mapping, Sequence
from typing import NoReturn

from cai_jax.model.lm import LM
from cai_jax.runtime.errors import StoppedError, UserError, WaitingError
from cai_jax.sampling.engine import DEFERRED
from cai_jax.sampling.remote import Remote
from cai_jax.sampling.types import Chain

LISTED_FAILURES = 2  # of all chains that failed, how many a message describes


def has_batch(models: Mapping[str, LM | Remote]) -> bool:
  """Return whether a batch interface answers for one of the models.

  Args:
    models: the models of a run, by name.
  """
  return any(isinstance(model, Remote) and model.batch is not None for model in models.values())


def set_aside(chain: Chain, chain_id: str, failures: list[str]) -> Chain:
  """Return a chain that is `DEFERRED` if it fails, so that the others still write their requests.

  A request that is written late costs hours: the next batch then waits for it.

  Args:
    chain: the chain.
    chain_id: its id.
    failures: gets a message if the chain fails.
  """
  try:
    return (yield from chain)
  except StoppedError:  # such as a full disk, which is no fault of this chain
    raise
  except UserError as error:
    failures.append(f'Chain {chain_id!r}: {error}')
    return DEFERRED


def end_waiting(
  models: Mapping[str, LM | Remote], deferred: int, failures: Sequence[str] = ()
) -> NoReturn:
  """Write the requests of all chains that wait for a batch, and say what to do with them.

  Args:
    models: the models of the run, by name.
    deferred: number of chains that did not finish.
    failures: a message for each of them that failed.

  Raises:
    UserError: if requests cannot be answered, or chains failed. The others are written first.
    WaitingError: otherwise.
  """
  faults, lines = _list_failures(failures), []
  if waiting := deferred - len(failures):
    lines.append(f'{waiting:,} chains wait for the answers of a batch.')
  for model in models.values():
    batch = model.batch if isinstance(model, Remote) else None
    if batch is None:
      continue
    new, old, paths = batch.new, batch.waiting, ', '.join(map(str, batch.write()))
    if new:
      lines.append(f'{model.name}: {new:,} new requests, in {paths}.')
    if old:
      lines.append(f'{model.name}: {old:,} requests that were written before have no answer.')
    if new + old:
      lines.append(f'Put the files of answers into {batch.folder}.')
    if batch.failures:
      faults.append(batch.describe_failures())
  if faults:
    raise UserError(' '.join([*faults, *lines]))
  raise WaitingError(
    ' '.join([*lines, 'Then start the same command again: it continues where it stopped.'])
  )


def _list_failures(failures: Sequence[str]) -> list[str]:
  """Return the first messages, and the number of the others."""
  more = len(failures) - LISTED_FAILURES
  rest = [f'Other chains that failed: {more:,}.'] if more > 0 else []
  return [*failures[:LISTED_FAILURES], *rest]
