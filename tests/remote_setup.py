"""An HTTP server on loopback that fails on request, and a `Remote` that asks it."""

import hashlib
import http.server
import json
import socket
import threading
import time

import numpy as np
import pytest

from cai_jax.sampling.remote import Remote, RemoteConfig
from cai_jax.sampling.types import SamplingConfig, Turn

KEY_NAME, KEY = 'CAI_JAX_TEST_KEY', 'sk-never-to-be-seen'
STALL = 30.0  # seconds; far longer than the timeouts in the tests


class Server(http.server.ThreadingHTTPServer):
  """A small completions API whose answer is a function of prompt, seed and stop tokens.

  Args:
    tokenizer: the tokenizer of the served model.
    answers: 'ids' to return token ids and log-probabilities, 'text' to return text only.

  Attributes:
    script: how the next requests fail. Each request takes the first entry. None answers normally,
      as does an empty script.
    bodies: the JSON body of every request.
    headers: the headers of every request.
    current: number of requests that are being answered.
    max_current: the maximum of `current` so far.
    delay: seconds before every answer.
    models: the answer to GET /v1/models.
  """

  daemon_threads = True

  def __init__(self, tokenizer, answers='ids'):
    super().__init__(('127.0.0.1', 0), Handler)
    self.tokenizer, self.answers = tokenizer, answers
    self.script: list = []
    self.bodies: list[dict] = []
    self.headers: list[dict] = []
    self.current = self.max_current = 0
    self.delay = 0.0
    self.lock = threading.Lock()
    self.models = {'data': [{'id': 'served', 'max_model_len': 256}]}

  @property
  def url(self) -> str:
    return f'http://127.0.0.1:{self.server_address[1]}/v1'

  def reply(self, body: dict) -> dict:
    """Return an answer: text that depends on prompt and seed, and a stop token if it fits."""
    draw = hashlib.sha256(f'{body["prompt"]}{body["seed"]}'.encode()).digest()
    words = ' '.join(('the brake', 'look at', 'kind words', 'human')[x % 4] for x in draw[:4])
    tokens = self.tokenizer.encode(words, add_special_tokens=False)[: body['max_tokens']]
    finish = 'length'
    if len(tokens) < body['max_tokens']:
      tokens, finish = (
        [*tokens, body.get('stop_token_ids', [self.tokenizer.eos_token_id])[0]],
        'stop',
      )
    text = self.tokenizer.decode(tokens, skip_special_tokens=True)
    choice = {'index': 0, 'text': text, 'finish_reason': finish}
    if self.answers == 'ids':
      logprobs = [-0.25 * (i + 1) for i in range(len(tokens))]
      choice |= {'token_ids': tokens, 'stop_reason': None}
      choice['logprobs'] = {'tokens': [''] * len(tokens), 'token_logprobs': logprobs}
    return {'choices': [choice], 'usage': {'completion_tokens': len(tokens)}}


class Handler(http.server.BaseHTTPRequestHandler):
  """Answers requests, or fails as the script says."""

  def log_message(self, *args):
    pass

  def do_GET(self):
    if self.path == '/v1/models':
      self.send(200, self.server.models)
    else:
      self.send(404, {'error': 'no such page'})

  def do_POST(self):
    server = self.server
    body = json.loads(self.rfile.read(int(self.headers['Content-Length'])))
    with server.lock:
      server.bodies.append(body)
      server.headers.append(dict(self.headers))
      act = server.script.pop(0) if server.script else None
      server.current += 1
      server.max_current = max(server.max_current, server.current)
    time.sleep(server.delay)
    with server.lock:  # after the answer, the client may send its next request at once
      server.current -= 1
    try:
      if act is None:
        self.send(200, server.reply(body))
      elif act == 'hang up':
        self.connection.shutdown(socket.SHUT_RDWR)
      elif act == 'half':
        self.send(200, server.reply(body), cut=20)
      elif act == 'stall':
        self.connection.settimeout(STALL)
        self.connection.recv(1)  # returns when the client closes the connection
      elif callable(act):
        self.send(200, act(server.reply(body)))
      else:
        self.send(*act)
    except OSError:
      pass
    finally:
      self.close_connection = True

  def send(self, status, content, headers=(), cut=None):
    data = content if isinstance(content, bytes) else json.dumps(content).encode()
    self.send_response(status)
    self.send_header('Content-Length', str(len(data)))
    for name, value in headers:
      self.send_header(name, value)
    self.end_headers()
    self.wfile.write(data[:cut])


@pytest.fixture
def server(tiny_tokenizer):
  with Server(tiny_tokenizer) as running:
    thread = threading.Thread(target=running.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield running
    running.shutdown()
    thread.join()


@pytest.fixture(scope='session')
def vocabulary(tmp_path_factory, tiny_tokenizer):
  """Return a folder with a tokenizer and no model."""
  folder = tmp_path_factory.mktemp('vocabulary')
  tiny_tokenizer.save_pretrained(folder)
  return str(folder)


@pytest.fixture
def connect(server, vocabulary):
  """Return a function that makes a Remote for the test's server from fields of RemoteConfig."""
  remotes = []

  def make(**fields) -> Remote:
    defaults = {'server': 'vllm', 'backoff_seconds': 0.01, 'retries': 3}
    address = {'url': server.url, 'model': 'served', 'tokenizer': vocabulary}
    remotes.append(Remote(RemoteConfig(**defaults | address | fields)))
    return remotes[-1]

  yield make
  for remote in remotes:
    remote.close()


def make_turn(number=0, **sampling):
  settings = SamplingConfig(**({'max_tokens': 40} | sampling))
  return Turn(f'critique_{number}', [30 + number, 40, 50], settings)


def make_key(number=0):
  return np.array([number * 7919 + 5, 2], np.uint32)


def ask(remote, number=0, stop_texts=(), **sampling):
  """Submit turn `number` and return its completion."""
  eos = (remote.tokenizer.eos_token_id,)
  turn = make_turn(number, **sampling)
  return remote.submit(turn, make_key(number), eos, stop_texts, 'row 7').result(timeout=60)


FAILURES = [
  (500, {'error': {'message': 'out of memory'}}),
  (429, {'error': 'slow down'}, [('Retry-After', '0')]),
  'hang up',
  (200, b'{"choices": [{"te'),
  (200, b'<html>bad gateway</html>'),
  'half',
  'stall',
  (503, b''),
  (503, b'1' * 5000),
  (200, b'1' * 5000),
  (200, {'choices': []}),
  (200, {'choices': [{'text': 'no reason to end'}]}),
  (200, {'choices': [{'text': 'x', 'finish_reason': 'abort'}]}),
  (200, {'choices': [{'text': None, 'finish_reason': 'stop'}]}),
  (200, {'choices': [{'text': 'x', 'finish_reason': 'stop', 'token_ids': ['x']}]}),
  (200, [1, 2]),
  (408, b''),
]
