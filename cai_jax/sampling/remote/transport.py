"""One HTTP request: a deadline and a size limit for the whole answer, and no redirects."""

import contextlib
import email.message
import http.client
import json
import select
import socket
import ssl
import threading
import time
import urllib.parse
import zlib
from collections.abc import Mapping
from typing import Any, NamedTuple

NETWORK_ERRORS = (http.client.HTTPException, OSError)
PIECE = 1 << 16  # bytes that are read at once
CLOCK = 0.1  # seconds between two looks at the deadlines


class AnswerError(Exception):
  """An answer that cannot be read: too large, or in an unknown encoding."""


class Response(NamedTuple):
  """The answer to a request.

  Attributes:
    status: the HTTP status.
    headers: the headers; names are looked up without regard to case.
    data: the body, without its content encoding.
  """

  status: int
  headers: Mapping[str, str] | email.message.Message
  data: bytes


class Transport:
  """Connections to one server, one for each thread that sends requests.

  A socket's own timeout covers a single read, so a server that sends a byte now and then is never
  too late for it. A clock thread therefore shuts down the connections of overdue requests.

  Args:
    url: base URL of the API.
    key: API key; '' sends none. It is sent to this server only: redirects are not followed.
  """

  def __init__(self, url: str, key: str):
    parts = urllib.parse.urlsplit(url)
    self._context = ssl.create_default_context() if parts.scheme == 'https' else None
    self._address = parts.hostname or '', parts.port or (443 if self._context else 80)
    self._path = parts.path.rstrip('/')
    self._headers = {'Authorization': f'Bearer {key}'} if key else {}
    self._idle = threading.local()  # the connection that a thread has kept open
    self._deadlines: dict[socket.socket, float] = {}
    self._lock = threading.Lock()
    self._closed = threading.Event()
    self._clock: threading.Thread | None = None

  def send(self, method: str, path: str, body: Any, timeout: float, max_bytes: int) -> Response:
    """Send one request and return the answer.

    Args:
      method: 'GET' or 'POST'.
      path: path below the base URL.
      body: JSON body of the request, or None.
      timeout: seconds before the request fails, from connecting to the last byte of the answer.
      max_bytes: largest size of the answer's body.

    Raises:
      OSError: if the server cannot be reached, or does not answer in time.
      http.client.HTTPException: if the answer is not HTTP, or is cut short.
      AnswerError: if the answer is too large, or in an encoding that was not asked for.
    """
    deadline = time.monotonic() + timeout
    connection = self._connect(timeout)
    # The connection forgets its socket if the server asks to close it after the answer.
    sock = connection.sock
    self._watch(sock, deadline)
    try:
      response = self._exchange(connection, method, path, body, max_bytes)
    except BaseException as error:
      connection.close()
      if isinstance(error, NETWORK_ERRORS) and time.monotonic() >= deadline:
        raise TimeoutError(f'no complete answer within {timeout:g} s') from None
      raise
    finally:
      with self._lock:
        del self._deadlines[sock]
    self._idle.connection = connection
    return response

  def close(self) -> None:
    """Shut down the connections of all requests, which then fail."""
    self._closed.set()
    self._shut_down(float('inf'))

  def _connect(self, timeout: float) -> http.client.HTTPConnection:
    """Return this thread's open connection, or a new one."""
    connection, self._idle.connection = getattr(self._idle, 'connection', None), None
    if connection is not None and connection.sock is not None:
      if not _is_readable(connection.sock):  # readable without a request: the server closed it
        connection.sock.settimeout(timeout)
        return connection
      connection.close()
    host, port = self._address
    if self._context is None:
      connection = http.client.HTTPConnection(host, port, timeout=timeout)
    else:
      connection = http.client.HTTPSConnection(host, port, timeout=timeout, context=self._context)
    connection.connect()
    return connection

  def _exchange(
    self,
    connection: http.client.HTTPConnection,
    method: str,
    path: str,
    body: Any,
    max_bytes: int,
  ) -> Response:
    """Send a request over a connection and read its answer."""
    data = None if body is None else json.dumps(body).encode()
    headers = self._headers | ({'Content-Type': 'application/json'} if data else {})
    connection.request(method, self._path + path, data, headers)
    response = connection.getresponse()
    content = bytearray()
    while piece := response.read1(PIECE):
      content += piece
      if len(content) > max_bytes:
        raise AnswerError(f'an answer of more than {max_bytes} bytes')
    if response.length:  # `read1` does not complain about a body that is cut short
      raise http.client.IncompleteRead(b'', response.length)
    response.close()
    encoding = response.headers.get('Content-Encoding', 'identity')
    return Response(response.status, response.headers, _decode(bytes(content), encoding, max_bytes))

  def _watch(self, sock: socket.socket, deadline: float) -> None:
    """Let the clock thread shut down a socket at a time."""
    with self._lock:
      self._deadlines[sock] = deadline
      if self._clock is None:
        self._clock = threading.Thread(target=self._run_clock, daemon=True)
        self._clock.start()

  def _run_clock(self) -> None:
    while not self._closed.wait(CLOCK):
      self._shut_down(time.monotonic())

  def _shut_down(self, now: float) -> None:
    """Shut down the sockets whose deadline has passed; reads from them then fail."""
    with self._lock:
      for sock in [sock for sock, deadline in self._deadlines.items() if deadline <= now]:
        # Not the method of a TLS socket, which must not be called while another thread reads.
        with contextlib.suppress(OSError):  # it is closed already
          socket.socket.shutdown(sock, socket.SHUT_RDWR)


def _is_readable(sock: socket.socket) -> bool:
  """Return whether bytes, or the end of the stream, have arrived."""
  poll = select.poll()
  poll.register(sock, select.POLLIN)
  return bool(poll.poll(0))


def _decode(data: bytes, encoding: str, max_bytes: int) -> bytes:
  """Return a body without its content encoding.

  Args:
    data: the body as sent.
    encoding: the header Content-Encoding. Requests ask for none, but a proxy may add gzip.
    max_bytes: largest size of the result; a few bytes can expand to gigabytes.

  Raises:
    AnswerError: if the encoding is unknown, the data are damaged, or the result is too large.
  """
  name = encoding.strip().lower()
  if name in ('', 'identity'):
    return data
  if name not in ('gzip', 'x-gzip', 'deflate'):
    raise AnswerError(f'an answer with Content-Encoding {encoding[:40]!r}')
  unpack = zlib.decompressobj(zlib.MAX_WBITS | 32)  # gzip or zlib, by the first bytes
  try:
    text = unpack.decompress(data, max_bytes + 1)
  except zlib.error as error:
    raise AnswerError(f'an answer whose compression is damaged ({error})') from None
  if len(text) > max_bytes:
    raise AnswerError(f'an answer that expands to more than {max_bytes} bytes')
  if not unpack.eof:
    raise AnswerError('a compressed answer that is cut short')
  return text
