"""Requests to one server: authentication, pace, retries, backoff and worker threads."""

import email.utils
import hashlib
import json
import queue
import re
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

from cai_jax.runtime.errors import UnreachableError, UserError
from cai_jax.sampling.remote import refusals
from cai_jax.sampling.remote.answers import ContradictionError
from cai_jax.sampling.remote.api_key import hide, read_key
from cai_jax.sampling.remote.config import RemoteConfig
from cai_jax.sampling.remote.fields import ProtocolError
from cai_jax.sampling.remote.pace import Pace
from cai_jax.sampling.remote.refusals import RefusedError, ServerError
from cai_jax.sampling.remote.transport import NETWORK_ERRORS, AnswerError, Response, Transport

T = TypeVar('T')

MAX_BACKOFF = 60.0  # seconds; only a server's Retry-After header can ask for a longer wait
MAX_RETRY_AFTER = 600.0  # seconds; a server that asks for a longer wait ends the run
CHECK_TIMEOUT = 30.0  # seconds
MAX_LIST_BYTES = 16 << 20  # bytes of the answer to GET /models
MAX_QUOTE = 300  # characters of an answer that an error message quotes
SECRET_LENGTH = 16  # a key with at least this many characters is not a word of a reply by chance


class Connection:
  """A pool of worker threads that send requests to one server.

  What may pass is retried: a timeout, a lost connection, status 408, 425, 429 or 5xx, and an answer
  that does not follow the API. What lasts raises a UserError at once: any other status, a used-up
  quota, and an answer that contradicts its request.

  Args:
    config: address, API key, timeout and retries.

  Attributes:
    label: name of the model and the server, for error messages.

  Raises:
    UserError: if the environment variable for the API key is not set, or holds no key.
  """

  def __init__(self, config: RemoteConfig):
    self._key = read_key(config)  # checks that the URL, which messages show, has no key
    self.label = f'remote {config.model!r} at {config.url.rstrip("/")}'
    self._config = config
    self._transport = Transport(config.url, self._key)
    self._pace = Pace(config.requests_per_minute, config.tokens_per_minute)
    self._queue: queue.SimpleQueue = queue.SimpleQueue()
    self._threads: list[threading.Thread] = []
    self._closed = threading.Event()

  def check(self) -> int | None:
    """Check that the server answers, serves the model and accepts contexts that are long enough.

    Returns:
      The number of tokens that the server accepts, if it says so.

    Raises:
      UserError: if one of these does not hold.
    """
    advice = (
      'Check that it is running and that url is the base of its API, such as '
      'http://localhost:8000/v1.'
    )
    timeout = min(self._config.timeout_seconds, CHECK_TIMEOUT)
    try:
      status, _, data = self._transport.send('GET', '/models', None, timeout, MAX_LIST_BYTES)
    except (*NETWORK_ERRORS, AnswerError) as error:
      raise UserError(f'{self.label} is unreachable ({self._quote(error)}). {advice}') from None
    if status != 200:
      if status != 404:
        advice = refusals.advice(status, self._quote(data), bool(self._key)) or advice
      raise UserError(
        f'{self.label} answers GET /models with status {status} ({self._quote(data)}). {advice}'
      )
    try:
      served = {entry['id']: entry.get('max_model_len') for entry in json.loads(data)['data']}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
      raise UserError(
        f'{self.label} answers GET /models with {self._quote(data)}, which is not a list of '
        f'models. {advice}'
      ) from None
    model, max_positions = self._config.model, self._config.max_positions
    if model not in served:
      names = self._quote(', '.join(sorted(map(str, served))))
      raise UserError(
        f'{self.label} does not serve {model!r}. Set model to one that it serves: {names}.'
      )
    limit = served[model] if type(served[model]) is int else None
    if limit is not None and limit < max_positions:
      raise UserError(
        f'{self.label} accepts contexts of {limit} tokens, fewer than '
        f'max_positions={max_positions}. Lower max_positions, or serve the model with a longer '
        'context.'
      )
    return limit

  def submit(self, work: Callable[[], T]) -> 'Future[T]':
    """Run a function in a worker thread, and return a future of its result.

    Args:
      work: called without arguments in a worker thread.

    Raises:
      RuntimeError: if the connection is closed.
    """
    if self._closed.is_set():
      raise RuntimeError(f'{self.label} is closed. Create another Remote.')
    future: Future[T] = Future()
    self._queue.put((future, work))
    if len(self._threads) < self._config.max_concurrent:
      # Daemon threads, so that a stalled request does not keep the program from exiting.
      self._threads.append(threading.Thread(target=self._run_worker, daemon=True))
      self._threads[-1].start()
    return future

  def close(self) -> None:
    """Cancel requests that have not been sent, and end those in flight."""
    self._closed.set()
    for _ in self._threads:
      self._queue.put(None)
    self._transport.close()

  def post(
    self,
    path: str,
    body: dict[str, Any],
    read: Callable[[bytes, int], T],
    name: str,
    seed: bytes,
    max_bytes: int,
    tokens: int = 0,
  ) -> T:
    """Send a POST request, retry it if necessary, and return the parsed answer.

    Args:
      path: path below the base URL.
      body: JSON body of the request.
      read: parses the answer, given also the number of requests that were sent; raises
        ProtocolError if it does not follow the API, and ContradictionError if it contradicts the
        request.
      name: purpose of the request, for error messages.
      seed: seed of the jitter in the waits between retries.
      max_bytes: largest size of the answer.
      tokens: tokens of the request and at most of its reply, for the limit per minute.

    Raises:
      RefusedError: if the server refuses the request.
      UserError: if the answer contradicts the request.
      UnreachableError: if all attempts fail, or the connection is closed before one succeeds.
    """
    begin, wait, failure, attempt = time.monotonic(), 0.0, '', 0
    while attempt <= self._config.retries:
      if attempt:
        wait = max(wait, backoff_seconds(self._config.backoff_seconds, attempt, seed))
        if time.monotonic() - begin + wait > self._config.give_up_seconds:
          break
        if self._closed.wait(wait):
          break
      begin += self._wait_for_pace(tokens)  # what we hold back is no failure of the server
      if self._closed.is_set():
        break
      attempt, wait = attempt + 1, 0.0
      try:
        return self._post_once(path, body, read, name, max_bytes, attempt)
      except ServerError as error:
        failure, wait = str(error), error.retry_after
        if wait > MAX_RETRY_AFTER:
          failure += f', and asks to wait {wait:.0f} s (Retry-After)'
          break
        self._pace.pause(wait)  # the other threads need not ask either
    if self._closed.is_set():
      raise UnreachableError(f'{self.label} was closed before {name} was answered.')
    raise UnreachableError(
      f'{self.label} did not answer {name} in {attempt} attempts; the last one failed with '
      f'{failure}. Finished turns are in the journal: fix the server and start the run again to '
      'continue. If the server is only slow, increase timeout_seconds or retries, or lower '
      'max_concurrent.'
    )

  def _post_once(
    self,
    path: str,
    body: dict[str, Any],
    read: Callable[[bytes, int], T],
    name: str,
    max_bytes: int,
    attempt: int,
  ) -> T:
    """Send a POST request once and return the parsed answer.

    Args:
      path: as for `post`.
      body: as for `post`.
      read: as for `post`.
      name: as for `post`.
      max_bytes: as for `post`.
      attempt: number of this attempt, from 1.

    Raises:
      ServerError: if the request may succeed later.
      RefusedError: if the server refuses the request.
      UserError: if the answer contradicts the request.
    """
    try:
      response = self._transport.send('POST', path, body, self._config.timeout_seconds, max_bytes)
    except (*NETWORK_ERRORS, AnswerError) as error:
      raise ServerError(self._quote(error), 0.0) from None
    content = self._accept(response, name)
    try:
      return read(content, attempt)
    except ProtocolError as error:
      data = self._quote(content)
      text = f'an answer that does not follow the API ({self._quote(error)}): {data}'
      raise ServerError(text, 0.0) from None
    except ContradictionError as error:
      raise UserError(f'{self.label} contradicts {name}. {self._clean(str(error))}') from None

  def settle(self, reserved: int, used: int) -> None:
    """Say how many tokens an answered request took, so that the others need not wait for more.

    Args:
      reserved: the tokens with which it was sent.
      used: the tokens that the server counted.
    """
    self._pace.settle(reserved, used)

  def _wait_for_pace(self, tokens: int) -> float:
    """Wait until a request may be sent, or the connection is closed; return the seconds."""
    begin = time.monotonic()
    while (wait := self._pace.start(tokens)) and not self._closed.wait(wait):
      pass
    return time.monotonic() - begin

  def _accept(self, response: Response, name: str) -> bytes:
    """Return the body of a response if it is an answer.

    Raises:
      ServerError: if the failure may pass.
      RefusedError: if it lasts.
      UserError: if the answer contains the API key.
    """
    status, data = response.status, response.data
    if status == 200:
      status = refusals.hidden_status(data)
    if status == 200:
      if len(self._key) >= SECRET_LENGTH and self._key.encode() in data:
        raise UserError(
          f'{self.label} answers {name} with the API key in its answer, which is therefore not '
          'stored. Check the server.'
        )
      return data
    message, code = self._quote(data), refusals.error_code(data)
    if refusals.may_pass(status, code):
      header = response.headers.get('Retry-After')
      raise ServerError(f'status {status}: {message}', parse_retry_after(header))
    target = refusals.redirect_target(response.headers.get('Location'))
    where = f' to {self._clean(target)}' if 300 <= status < 400 and target else ''
    advice = refusals.advice(status, message, bool(self._key), code)
    text = f'{self.label} refuses {name} with status {status}{where}: {message}'
    raise RefusedError(f'{text.rstrip(".")}. {advice}'.strip(), status, code)

  def _run_worker(self) -> None:
    while (item := self._queue.get()) is not None:
      future, work = item
      if not future.set_running_or_notify_cancel():
        continue
      if self._closed.is_set():
        future.set_exception(
          UnreachableError(f'{self.label} was closed before the request was sent.')
        )
        continue
      try:
        future.set_result(work())
      except BaseException as error:  # raised again by future.result()
        future.set_exception(error)

  def _quote(self, source: bytes | str | Exception) -> str:
    """Return a message of the server or of an exception, short and as `_clean` returns it."""
    if isinstance(source, bytes):
      text = refusals.server_message(source)
    elif isinstance(source, NETWORK_ERRORS):
      text = f'{type(source).__name__}: {source}'
    else:
      text = str(source)
    text = self._clean(text[: 10 * MAX_QUOTE])
    return text if len(text) <= MAX_QUOTE else f'{text[:MAX_QUOTE]} ...'

  def _clean(self, text: str) -> str:
    """Return a text on one line, without the API key and without terminal escapes."""
    text = ' '.join(hide(text, self._key).split())
    return ''.join(c if c.isprintable() else '\ufffd' for c in text)


def backoff_seconds(base: float, attempt: int, seed: bytes) -> float:
  """Return the wait before a retry, in seconds.

  The wait doubles with every retry, up to `MAX_BACKOFF`. It is multiplied by a pseudo-random factor
  between 0.5 and 1, which depends only on the seed and the attempt.

  Args:
    base: wait before the first retry, in seconds, without jitter.
    attempt: number of the retry, from 1.
    seed: seed of the jitter.
  """
  digest = hashlib.blake2b(seed + bytes([attempt % 256]), digest_size=4).digest()
  jitter = int.from_bytes(digest, 'little') / 2**32
  exponent = min(attempt - 1, 32)
  return min(base * 2**exponent, MAX_BACKOFF) * (0.5 + jitter / 2)


def parse_retry_after(value: str | None) -> float:
  """Return the seconds that a Retry-After header asks for.

  It is 0 if the header is absent or malformed, or asks for a time in the past. The next wait is
  then that of the backoff.

  The header is a number of seconds or a date (RFC 9110, section 10.2.3).
  """
  if value is None:
    return 0.0
  if re.fullmatch(r'[0-9]+(\.[0-9]+)?', value.strip()):
    return float(value)
  try:
    return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
  except (ValueError, TypeError, OverflowError, OSError):
    return 0.0
