"""The pace of requests to a server: its limits on requests and tokens per minute.

Requests are spread evenly. Each one moves the time of the next, by 60 s divided by the requests per
minute, or by the share of a minute that its tokens take, whichever is later. So no minute has more
than the limits, and a server that counts seconds sees no bursts.
"""

import threading
import time
from collections.abc import Callable


class Pace:
  """The times at which the threads of a process may send requests to one server.

  Args:
    requests_per_minute: limit on requests; 0 sets none.
    tokens_per_minute: limit on tokens; 0 sets none.
    clock: returns the time in seconds.
  """

  def __init__(
    self,
    requests_per_minute: float,
    tokens_per_minute: float,
    clock: Callable[[], float] = time.monotonic,
  ):
    self._seconds_per_request = 60 / requests_per_minute if requests_per_minute else 0.0
    self._seconds_per_token = 60 / tokens_per_minute if tokens_per_minute else 0.0
    self._clock, self._lock = clock, threading.Lock()
    self._next_request = self._next_tokens = self._paused_until = 0.0

  def start(self, tokens: int) -> float:
    """Start a request now and return 0, or return the seconds after which to ask again.

    Args:
      tokens: tokens of its context, and the most that its reply may have.
    """
    with self._lock:
      now = self._clock()
      wait = max(self._next_request, self._next_tokens, self._paused_until) - now
      if wait > 0:
        return wait
      self._next_request = now + self._seconds_per_request
      self._next_tokens = now + tokens * self._seconds_per_token
      return 0.0

  def settle(self, reserved: int, used: int) -> None:
    """Give back the tokens with which a request started and that it did not use.

    Args:
      reserved: the tokens with which it started.
      used: the tokens that the server counted.
    """
    with self._lock:
      self._next_tokens -= max(0, reserved - used) * self._seconds_per_token

  def pause(self, seconds: float) -> None:
    """Let no request start for some seconds, as a server asks for that limits its rate."""
    with self._lock:
      self._paused_until = max(self._paused_until, self._clock() + seconds)
