"""HTTP requests to one server: authentication, retries, backoff and worker threads."""

import email.utils
import hashlib
import json
import os
import queue
import re
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

import urllib3

from cai_jax.runtime.errors import UnreachableError, UserError
from cai_jax.sampling.remote.config import RemoteConfig
from cai_jax.sampling.remote.protocol import ProtocolError

T = TypeVar('T')

MAX_BACKOFF = 60.0  # seconds; only a server's Retry-After header can ask for a longer wait
RETRIED_STATUSES = (408, 425, 429)  # besides 500..599
CHECK_TIMEOUT = 30.0  # seconds
MAX_QUOTE = 300  # characters of an answer that an error message quotes
NETWORK_ERRORS = (urllib3.exceptions.HTTPError, OSError)


class Connection:
  """A pool of worker threads that send requests to one server.

  A request is retried after a timeout, a lost connection, status 408, 425, 429 or 5xx, and an
  answer that does not follow the API. Any other status raises a UserError at once.

  Args:
    config: address, API key, timeout and retries.

  Attributes:
    label: name of the model and the server, for error messages.

  Raises:
    UserError: if the environment variable for the API key is not set.
  """

  def __init__(self, config: RemoteConfig):
    self.label = f'remote {config.model!r} at {config.url.rstrip("/")}'
    self._config = config
    self._url = config.url.rstrip('/')
    self._key = _api_key(config)
    self._http = urllib3.PoolManager(maxsize=config.max_concurrent, retries=False, block=False)
    self._queue: queue.SimpleQueue = queue.SimpleQueue()
    self._threads: list[threading.Thread] = []
    self._closed = threading.Event()

  def check(self) -> None:
    """Check that the server answers, serves the model and accepts contexts that are long enough.

    Raises:
      UserError: if one of these does not hold.
    """
    advice = (
      'Check that it is running and that url is the base of its API, such as '
      'http://localhost:8000/v1.'
    )
    try:
      timeout = min(self._config.timeout_seconds, CHECK_TIMEOUT)
      status, _, data = self._send('GET', '/models', None, timeout)
    except NETWORK_ERRORS as error:
      raise UserError(f'{self.label} is unreachable ({self._quote(error)}). {advice}') from None
    if status != 200:
      raise UserError(
        f'{self.label} answers GET /models with status {status} ({self._quote(data)}). {advice} '
        'If it needs an API key, set api_key_env.'
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
      raise UserError(
        f'{self.label} does not serve {model!r}. Set model to one that it serves: '
        f'{", ".join(sorted(map(str, served)))}.'
      )
    limit = served[model]
    if isinstance(limit, int) and limit < max_positions:
      raise UserError(
        f'{self.label} accepts contexts of {limit} tokens, fewer than '
        f'max_positions={max_positions}. Lower max_positions, or serve the model with a longer '
        'context.'
      )

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
    """Cancel requests that have not been sent, and stop retrying those in flight."""
    self._closed.set()
    for _ in self._threads:
      self._queue.put(None)
    self._http.clear()

  def post(
    self, path: str, body: dict[str, Any], read: Callable[[bytes], T], name: str, seed: bytes
  ) -> T:
    """Send a POST request, retry it if necessary, and return the parsed answer.

    Args:
      path: path below the base URL.
      body: JSON body of the request.
      read: parses the answer; raises ProtocolError if it does not follow the API.
      name: purpose of the request, for error messages.
      seed: seed of the jitter in the waits between retries.

    Raises:
      UserError: if the server refuses the request.
      UnreachableError: if all attempts fail, or the connection is closed before one succeeds.
    """
    attempts = self._config.retries + 1
    failure, retry_after = '', 0.0
    for attempt in range(attempts):
      if attempt:
        wait = backoff_seconds(self._config.backoff_seconds, attempt, seed)
        if self._closed.wait(max(wait, retry_after)):
          break
      retry_after = 0.0
      try:
        status, headers, data = self._send('POST', path, body, self._config.timeout_seconds)
      except NETWORK_ERRORS as error:
        failure = self._quote(error)
        continue
      if status in RETRIED_STATUSES or status >= 500:
        failure = f'status {status}: {self._quote(data)}'
        retry_after = parse_retry_after(headers.get('Retry-After'))
        continue
      if status != 200:
        raise UserError(f'{self.label} refuses {name} with status {status}: {self._quote(data)}')
      try:
        return read(data)
      except ProtocolError as error:
        failure = f'an answer that does not follow the API ({error}): {self._quote(data)}'
    if self._closed.is_set():
      raise UnreachableError(f'{self.label} was closed before {name} was answered.')
    raise UnreachableError(
      f'{self.label} did not answer {name} in {attempts} attempts; the last one failed with '
      f'{failure}. Finished turns are in the journal: fix the server and start the run again to '
      'continue. If the server is only slow, increase timeout_seconds or retries, or lower '
      'max_concurrent.'
    )

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

  def _send(
    self, method: str, path: str, body: dict[str, Any] | None, timeout: float
  ) -> tuple[int, Any, bytes]:
    """Send one request and return the status, headers and body of the response."""
    headers = {'Authorization': f'Bearer {self._key}'} if self._key else {}
    response = self._http.request(
      method,
      self._url + path,
      json=body,
      headers=headers | ({'Content-Type': 'application/json'} if body else {}),
      timeout=urllib3.Timeout(total=timeout),
    )
    return response.status, response.headers, response.data

  def _quote(self, source: bytes | Exception) -> str:
    """Return an answer's or an exception's message, short, on one line and without the API key."""
    if isinstance(source, Exception):
      text = f'{type(source).__name__}: {source}'
    else:
      text = _server_message(source)
    if self._key:
      text = text.replace(self._key, '(key)')
    text = ' '.join(text.split())
    return text if len(text) <= MAX_QUOTE else f'{text[:MAX_QUOTE]} ...'


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
  """Return the seconds that a Retry-After header asks for; 0 if it is absent or malformed.

  The header is a number of seconds or a date (RFC 9110, section 10.2.3).
  """
  if value is None:
    return 0.0
  if re.fullmatch(r'\d+(\.\d+)?', value.strip()):
    return float(value)
  try:
    return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
  except (ValueError, TypeError):
    return 0.0


def _server_message(data: bytes) -> str:
  """Return the error message in the body of a response, or the whole body if it has none."""
  text = data.decode('utf-8', 'replace')
  try:
    content = json.loads(text)
  except (ValueError, RecursionError):
    return text or '(an empty body)'
  error = content.get('error', content) if isinstance(content, dict) else content
  message = error.get('message') if isinstance(error, dict) else error
  return message if isinstance(message, str) and message else text or '(an empty body)'


def _api_key(config: RemoteConfig) -> str:
  if not config.api_key_env:
    return ''
  key = os.environ.get(config.api_key_env, '')
  if not key:
    raise UserError(
      f'remote: api_key_env names the environment variable {config.api_key_env}, which is not set. '
      'Export it with the API key.'
    )
  return key
