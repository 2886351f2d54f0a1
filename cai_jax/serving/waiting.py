"""Wait for the worker on behalf of a client, which may hang up."""

import concurrent.futures
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import TypeVar

POLL_SECONDS = 1.0  # between two looks whether the client is still there

IsGone = Callable[[], bool]  # whether the client of a request has hung up
Result = TypeVar('Result')


def wait_for(futures: Sequence[Future[Result]], is_gone: IsGone) -> list[Result]:
  """Return the results of futures, in order; cancel all of them if one fails.

  Args:
    futures: what the worker computes for a request.
    is_gone: whether the client has hung up, so that nobody needs the results.

  Raises:
    ConnectionAbortedError: if the client has hung up.
  """
  waiting: set[Future[Result]] = set(futures)
  try:
    while waiting:
      done, waiting = concurrent.futures.wait(
        waiting, POLL_SECONDS, concurrent.futures.FIRST_EXCEPTION
      )
      for future in done:
        future.result()  # raises its exception
      if waiting and is_gone():
        raise ConnectionAbortedError('The client has hung up.')
    return [future.result() for future in futures]
  finally:
    for future in futures:
      future.cancel()  # changes nothing for those that are done
