"""A completions server on loopback that lies, stalls, or sends any bytes.

  with serve(answer) as server:
    Remote(RemoteConfig(url=server.url, ...))

`answer` is called with each POST request's body and returns the response as pieces: bytes are sent,
and a number is a pause in seconds. `respond` makes such pieces of a status, a body and headers,
`complete` makes the body of an honest answer, and `LIES` and `STALLS` change it.
"""

import contextlib
import dataclasses
import gzip
import json
import math
import socket
import socketserver
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

Pieces = list[bytes | float]
Answer = Callable[[dict[str, Any]], Pieces]
FOREVER = 60.0  # seconds; far longer than a test waits
BOMB_BYTES = 1 << 28


@dataclasses.dataclass
class Server:
  """A running server.

  Attributes:
    answer: makes the response to a POST request.
    models: the answer to GET /v1/models, or the pieces of a response.
    url: base URL of the API.
    bodies: the JSON body of every POST request.
    headers: the headers of every request, with names in lower case.
    stopped: set when the server ends; pauses then end too.
  """

  answer: Answer
  models: Any
  url: str = ''
  bodies: list[dict] = dataclasses.field(default_factory=list)
  headers: list[dict[str, str]] = dataclasses.field(default_factory=list)
  stopped: threading.Event = dataclasses.field(default_factory=threading.Event)


MODELS = {'data': [{'id': 'served', 'max_model_len': 1024}]}


@contextlib.contextmanager
def serve(answer: Answer, models: Any = MODELS) -> Iterator[Server]:
  """Run a server, and yield it."""
  server = Server(answer, models)

  class Handler(socketserver.StreamRequestHandler):
    def handle(self) -> None:
      with contextlib.suppress(OSError):
        while request := _read_request(self.rfile):
          method, headers, data = request
          server.headers.append(headers)
          if method == 'GET':
            models = server.models
            pieces = models if isinstance(models, list) else respond(200, models)
          else:
            body = json.loads(data)
            server.bodies.append(body)
            pieces = server.answer(body)
          for piece in pieces:
            if isinstance(piece, bytes):
              self.wfile.write(piece)
            elif server.stopped.wait(piece):
              return

  class Listener(socketserver.ThreadingTCPServer):
    daemon_threads, allow_reuse_address, block_on_close = True, True, False

    def handle_error(self, request, address):
      pass  # the client has closed the connection

  with Listener(('127.0.0.1', 0), Handler) as listener:
    server.url = f'http://127.0.0.1:{listener.server_address[1]}/v1'
    thread = threading.Thread(target=listener.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
      yield server
    finally:
      server.stopped.set()
      listener.shutdown()
      thread.join()


def _read_request(stream) -> tuple[str, dict[str, str], bytes] | None:
  """Return method, headers and body of a request, or None at the end of the connection."""
  first = stream.readline()
  if not first:
    return None
  headers = {}
  while (line := stream.readline().strip()) != b'':
    name, _, value = line.decode('latin-1').partition(':')
    headers[name.lower()] = value.strip()
  return first.split()[0].decode(), headers, stream.read(int(headers.get('content-length', 0)))


def respond(status: int, body: Any, headers: Mapping[str, str] | None = None) -> Pieces:
  """Return a response with Content-Length; a body other than bytes is sent as JSON."""
  data = body if isinstance(body, bytes) else json.dumps(body).encode()
  fields = {'Content-Length': str(len(data))} | dict(headers or {})
  lines = [f'HTTP/1.1 {status} Status', *(f'{name}: {value}' for name, value in fields.items())]
  return ['\r\n'.join([*lines, '', '']).encode('latin-1'), data]


def complete(body: Mapping[str, Any], tokenizer: Any, words: str = 'look at the') -> dict[str, Any]:
  """Return an honest answer to a request, as vLLM gives it, that ends with the end-of-text token.

  Args:
    body: the JSON body of the request.
    tokenizer: the served model's tokenizer.
    words: the text of the reply.
  """
  tokens = tokenizer.encode(words, add_special_tokens=False)[: body['max_tokens']]
  ends = len(tokens) < body['max_tokens']
  tokens = [*tokens, tokenizer.eos_token_id] if ends else tokens
  prompt = body['prompt']
  prompt = tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
  choice = {
    'index': 0,
    'text': tokenizer.decode(tokens, skip_special_tokens=True),
    'finish_reason': 'stop' if ends else 'length',
    'stop_reason': None,
    'token_ids': tokens,
    'prompt_token_ids': prompt,
    'logprobs': {'tokens': [''] * len(tokens), 'token_logprobs': [-0.5] * len(tokens)},
  }
  usage = {'prompt_tokens': len(prompt), 'completion_tokens': len(tokens)}
  return {'id': 'cmpl-1', 'object': 'text_completion', 'choices': [choice], 'usage': usage}


def _set(**fields: Any) -> Callable[[dict], None]:
  return lambda answer: answer['choices'][0].update(fields)


def _use(**fields: Any) -> Callable[[dict], None]:
  return lambda answer: answer['usage'].update(fields)


def _logprobs(change: Callable[[list], list]) -> Callable[[dict], None]:
  def apply(answer: dict) -> None:
    record = answer['choices'][0]['logprobs']
    record['token_logprobs'] = change(record['token_logprobs'])
    record['tokens'] = [''] * len(record['token_logprobs'])

  return apply


# Answers that follow the API and contradict their request, as changes of an honest one.
LIES: dict[str, Callable[[dict], Any]] = {
  'prompt cut': _use(prompt_tokens=4),
  'prompt in a template': _use(prompt_tokens=57),
  'another prompt': _set(prompt_token_ids=[5, 6]),
  'two choices': lambda answer: answer['choices'].append(answer['choices'][0]),
  'another index': _set(index=1),
  'more tokens than counted': _use(completion_tokens=1),
  'more tokens than asked for': lambda answer: (
    answer['usage'].update(completion_tokens=10**6)
    or answer['choices'][0].update(token_ids=None, logprobs=None)
  ),
  'ids beyond the vocabulary': _set(token_ids=[10**6]),
  'negative ids': _set(token_ids=[-1]),
  'ids of another text': _set(text='something else'),
  'no text for its ids': _set(text=''),
  'a positive log-probability': _logprobs(lambda values: [0.5] * len(values)),
  'too few log-probabilities': _logprobs(lambda values: values[1:]),
  'length too early': _set(finish_reason='length', text='look', token_ids=None, logprobs=None),
  'stop without a stop': lambda answer: (
    _set(token_ids=answer['choices'][0]['token_ids'][:-1], logprobs=None)(answer)
    or _use(completion_tokens=None)(answer)
  ),
  'a stop text that was not sent': _set(finish_reason='stop_sequence'),
  'an unknown finish reason': _set(finish_reason='tool_calls'),
}

# Bodies with status 200 that do not follow the API. JSON has no NaN, but Python writes it.
MALFORMED: dict[str, Callable[[dict], Any]] = {
  'a NaN': _logprobs(lambda values: [math.nan] * len(values)),
  'an infinity': _logprobs(lambda values: [-math.inf] * len(values)),
  'text for a number': _logprobs(lambda values: ['-0.5'] * len(values)),
  'true for an id': _set(token_ids=[True]),
  'a number for a text': _set(text=3),
  'half of a surrogate pair': _set(text='\ud800'),
  'a text for usage': lambda answer: answer.update(usage='many'),
  'a negative count': _use(completion_tokens=-1),
  'no choice': lambda answer: answer.update(choices=[]),
  'a list for a choice': lambda answer: answer.update(choices=[[]]),
  'an object for choices': lambda answer: answer.update(choices={}),
}

JSON_TYPE = {'Content-Type': 'application/json'}


def _drip(data: bytes, seconds: float) -> Pieces:
  """Return a response of single bytes with pauses, none of which is longer than a read may take."""
  return [piece for byte in data for piece in (bytes([byte]), seconds)]


def stalls(data: bytes) -> dict[str, Pieces]:
  """Return responses that never end, or end before they are complete.

  Args:
    data: the body of an honest answer.
  """
  head = b'HTTP/1.1 200 OK\r\n'
  chunked = head + b'Transfer-Encoding: chunked\r\n\r\n'
  length = head + b'Content-Length: %d\r\n\r\n' % len(data)
  return {
    'nothing': [FOREVER],
    'half a status line': [b'HTTP/1.1 2', FOREVER],
    'a dripping header': [head, *_drip(b'X-Header: ' + b'a' * 10**4, 0.05)],
    'endless headers': [head, *[b'X-Header: a\r\n' * 1000] * 100, FOREVER],
    'endless interim answers': [b'HTTP/1.1 100 Continue\r\n\r\n', 0.05] * 10**4,
    'a dripping body': [length, *_drip(data, 0.05)],
    'a dripping chunk size': [chunked, *_drip(b'0' * 10**4, 0.05)],
    'half a body': [length, data[: len(data) // 2], FOREVER],
    'a chunk that is cut short': [chunked, b'ffff\r\n' + data, FOREVER],
  }


def floods() -> dict[str, Pieces]:
  """Return responses that are far larger than an answer can be."""
  head, mib = b'HTTP/1.1 200 OK\r\n', b' ' * (1 << 20)
  chunk = b'100000\r\n' + mib + b'\r\n'
  bomb = gzip.compress(b' ' * BOMB_BYTES, 9)
  return {
    'a huge body': [head + b'Content-Length: 10000000000000\r\n\r\n', *[mib] * 4096],
    'endless chunks': [head + b'Transfer-Encoding: chunked\r\n\r\n', *[chunk] * 4096],
    'a body without an end': [head + b'\r\n', *[mib] * 4096],
    'a compressed bomb': respond(200, bomb, {'Content-Encoding': 'gzip'}),
  }


def free_port() -> int:
  """Return a port of loopback that nothing listens on."""
  with socket.socket() as sock:
    sock.bind(('127.0.0.1', 0))
    return sock.getsockname()[1]
