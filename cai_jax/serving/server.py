"""HTTP: addresses, the token, limits and errors.

A thread per connection reads requests and waits for the worker, which has the main thread. Python's
`http.server` suffices: the time of an answer is that of the model.
"""

import contextlib
import hmac
import http.server
import json
import math
import re
import selectors
import socket
import sys
import threading
import time
import traceback
import urllib.parse
from collections.abc import Callable
from typing import Any, NoReturn

from cai_jax.runtime.errors import UserError
from cai_jax.serving.api import Api
from cai_jax.serving.errors import RequestError

LOOPBACK = ('127.0.0.1', '::1', 'localhost')
MOST_BODY_BYTES = 16 * 2**20
MOST_REQUESTS = 512  # in progress; more are told to come back later
MOST_CONNECTIONS = 640  # open; more are closed at once. Each has a thread and a file descriptor
LOGIN_SECONDS = 10.0  # until a connection that has sent no valid token is closed
IDLE_SECONDS = 120.0  # until any other connection that sends nothing is closed


class Server(http.server.ThreadingHTTPServer):
  """A server of one API.

  Connections wait until the server has an API and `serve_forever` runs.

  Args:
    host: name or address to listen at.
    port: number of the port; 0 chooses a free one.
    token: what a request must send as `Authorization: Bearer TOKEN`; '' asks for none.

  Attributes:
    api: answers requests.
    is_closing: whether new requests are refused, because the server is about to end.

  Raises:
    UserError: if the address cannot be used.
  """

  daemon_threads = True
  request_queue_size = MOST_REQUESTS

  api: Api

  def __init__(self, host: str, port: int, token: str = ''):
    self.token = token
    self.is_closing: Callable[[], bool] = lambda: False
    self.is_local = host in LOOPBACK
    self._active, self._lock = 0, threading.Lock()
    self._deadlines: dict[socket.socket, float] = {}  # of open connections, to be let in
    self.address_family = socket.AF_INET6 if ':' in host else socket.AF_INET
    try:
      super().__init__((host, port), Handler)
    except (OSError, OverflowError) as error:
      raise UserError(
        f'Cannot listen at {host}, port {port}: {error}. Choose another --host or --port.'
      ) from None
    self.host = f'[{host}]' if ':' in host else host

  @property
  def url(self) -> str:
    """The base address of the API."""
    return f'http://{self.host}:{self.server_address[1]}/v1'

  @property
  def is_idle(self) -> bool:
    """Whether no request is in progress."""
    with self._lock:
      return not self._active

  def begin(self) -> None:
    """Count a request that begins.

    Raises:
      RequestError: if the server is about to end, or has too many requests.
    """
    with self._lock:
      if self.is_closing():
        raise RequestError('The server is about to end.', status=503, code='shutting_down')
      if self._active >= MOST_REQUESTS:
        raise RequestError(
          f'{MOST_REQUESTS} requests are in progress. Send this one again later.',
          status=429,
          code='rate_limit_exceeded',
        )
      self._active += 1

  def end(self) -> None:
    """Count a request that has been answered."""
    with self._lock:
      self._active -= 1

  def get_request(self) -> tuple[socket.socket, Any]:
    """Accept a connection."""
    connection, address = super().get_request()
    with self._lock:
      self._deadlines[connection] = time.monotonic() + LOGIN_SECONDS
    return connection, address

  def verify_request(self, request: Any, client_address: Any) -> bool:
    """Return whether a connection may stay open: there are not too many."""
    with self._lock:
      return len(self._deadlines) <= MOST_CONNECTIONS

  def let_in(self, connection: socket.socket) -> None:
    """Keep a connection that has sent a request with the right token."""
    with self._lock:
      self._deadlines[connection] = math.inf

  def service_actions(self) -> None:
    """Close the connections that took too long to be let in. This is called twice a second."""
    with self._lock:
      late = [one for one, deadline in self._deadlines.items() if deadline < time.monotonic()]
    for connection in late:
      with contextlib.suppress(OSError):  # it has just been closed
        connection.shutdown(socket.SHUT_RDWR)  # ends the wait of its thread

  def shutdown_request(self, request: Any) -> None:
    """Close a connection."""
    with self._lock:
      self._deadlines.pop(request, None)
    super().shutdown_request(request)

  def handle_error(self, request: Any, client_address: Any) -> None:
    """Print the error of a connection, unless the client has hung up."""
    if not isinstance(sys.exception(), OSError):
      traceback.print_exc()


class Handler(http.server.BaseHTTPRequestHandler):
  """Answers the requests of one connection."""

  server: Server
  protocol_version = 'HTTP/1.1'  # keeps connections open
  server_version, sys_version = 'cai_jax', ''
  timeout = IDLE_SECONDS
  wbufsize = -1  # one packet per answer: clients delay the acknowledgement of the first of two

  def log_message(self, format: str, *args: Any) -> None:
    """Write no line per request."""

  def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
    """Send an error that `http.server` finds, such as an unknown method, in OpenAI's form."""
    self.close_connection = True
    self._send(int(code), RequestError(message or explain or '', status=int(code)).body())

  def do_GET(self) -> None:
    """Answer a request without a body."""
    self._handle('GET')

  def do_POST(self) -> None:
    """Answer a request with a JSON body."""
    self._handle('POST')

  def _handle(self, method: str) -> None:
    """Answer one request. Every error is an answer in OpenAI's form."""
    path = urllib.parse.unquote(self.path.partition('?')[0])
    try:
      self._check_sender()
      self.server.let_in(self.connection)
      endpoint = self._find(method, path)
      body = self._read_body() if method == 'POST' else {}
      self.server.begin()
      try:
        self._send(200, self._answer(endpoint, body))
      finally:
        self.server.end()
    except RequestError as error:
      self._send(error.status, error.body())

  def _answer(self, endpoint: Callable, body: dict[str, Any]) -> dict[str, Any]:
    """Return the answer of an endpoint. What is not the client's fault has the status 500."""
    try:
      return endpoint(body, self._is_gone)
    except (RequestError, ConnectionAbortedError):  # the latter ends the connection
      raise
    except UserError as error:  # such as logits that are not finite
      raise RequestError(str(error), status=500) from None
    except Exception as error:
      traceback.print_exc()
      raise RequestError(f'The server failed: {type(error).__name__}.', status=500) from None

  def _is_gone(self) -> bool:
    """Return whether the client has closed the connection while it waits for its answer."""
    try:
      with selectors.DefaultSelector() as selector:
        selector.register(self.connection, selectors.EVENT_READ)
        # A closed connection reads as an empty one. The next request may also be there.
        return bool(selector.select(0)) and not self.connection.recv(1, socket.MSG_PEEK)
    except OSError:  # such as a reset
      return True

  def _check_sender(self) -> None:
    """Check the token; without one, refuse what a page in a browser sends.

    A page of any site may send requests to addresses of this machine. Its browser names the site in
    `Origin`, or, if the site's name leads to this machine, in `Host`.
    """
    if self.server.token:
      given = self.headers.get('Authorization', '').encode('utf-8', 'replace')
      if not hmac.compare_digest(given, f'Bearer {self.server.token}'.encode()):
        self._refuse(401, 'The token is missing or wrong. Send it as Authorization: Bearer TOKEN.')
      return
    host = self.headers.get('Host', '').rpartition(':')
    name = (host[0] or host[2]).strip('[]')
    if 'Origin' in self.headers or name not in LOOPBACK:
      self._refuse(
        403, 'Pages in browsers may use this server only if it was started with a token.'
      )

  def _find(self, method: str, path: str) -> Callable:
    """Return the endpoint of a request."""
    endpoints = self.server.api.endpoints
    if (method, path) in endpoints:
      return endpoints[method, path]
    others = [known for known, place in endpoints if place == path]
    if others:
      self._refuse(405, f'{path} takes {others[0]}, not {method}.')
    known = ', '.join(dict.fromkeys(place for _, place in endpoints))
    self._refuse(404, f'There is no {path} here. The addresses are {known}.')

  def _read_body(self) -> dict[str, Any]:
    """Return the JSON object of a request."""
    length = self.headers.get('Content-Length', '')
    if not re.fullmatch('[0-9]{1,15}', length) or 'Transfer-Encoding' in self.headers:
      self._refuse(411, 'The request has no Content-Length. Send the body in one piece.')
    if int(length) > MOST_BODY_BYTES:
      self._refuse(
        413, f'The body has {length} bytes. Send at most {MOST_BODY_BYTES}, in several requests.'
      )
    data = self.rfile.read(int(length))
    try:
      body = json.loads(data, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
      raise RequestError(f'The body is not JSON: {error}.') from None
    if not isinstance(body, dict):
      raise RequestError('The body must be a JSON object.')
    return body

  def _refuse(self, status: int, message: str) -> NoReturn:
    """Refuse a request whose body is not read, so that the connection must be closed."""
    self.close_connection = True
    raise RequestError(message, status=status)

  def _send(self, status: int, content: dict[str, Any]) -> None:
    """Send an answer."""
    data = json.dumps(content, allow_nan=False).encode()
    self.send_response(status)
    self.send_header('Content-Type', 'application/json')
    self.send_header('Content-Length', str(len(data)))
    if status == 401:
      self.send_header('WWW-Authenticate', 'Bearer')
    if self.close_connection or self.server.is_closing():
      self.close_connection = True
      self.send_header('Connection', 'close')
    self.end_headers()
    self.wfile.write(data)


def _refuse_constant(name: str) -> NoReturn:
  raise ValueError(f'{name} is not a number in JSON')
