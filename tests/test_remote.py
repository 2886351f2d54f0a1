"""`Remote` against an HTTP server on loopback that fails on request."""

import concurrent.futures
import dataclasses
import hashlib
import http.server
import json
import math
import shutil
import socket
import threading
import time

import numpy as np
import pytest
import transformers

from cai_jax import pipeline
from cai_jax.data import d_cai
from cai_jax.runtime.errors import UnreachableError, UserError
from cai_jax.sampling.remote import Remote, RemoteConfig, connection, protocol
from cai_jax.sampling.types import SamplingConfig, Turn
from cai_jax.tiny.files import MODELS
from configs import tiny

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


def test_a_completion_has_the_tokens_that_the_server_sampled(server, connect):
  remote = connect()
  completion = ask(remote, max_tokens=40, top_p=0.9, top_k=5, temperature=0.7)
  eos = remote.tokenizer.eos_token_id
  assert completion.finish_reason == 'stop' and completion.tokens[-1] == eos
  assert completion.text == remote.tokenizer.decode(completion.tokens[:-1]) and completion.text
  assert completion.logprobs == [-0.25 * (i + 1) for i in range(len(completion.tokens))]
  [body] = server.bodies
  assert body['prompt'] == [30, 40, 50] and body['model'] == 'served' and body['n'] == 1
  assert (body['max_tokens'], body['temperature']) == (40, 0.7)
  assert (body['top_p'], body['top_k'], body['stop_token_ids']) == (0.9, 5, [eos])
  cut = ask(remote, max_tokens=2)
  assert cut.finish_reason == 'length' and len(cut.tokens) == 2
  assert server.bodies[1]['top_k'] == -1  # otherwise the server's default would apply


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


def test_failures_change_no_completion(server, connect):
  remote = connect()
  expected = [ask(remote, number) for number in range(12)]
  server.script = list(FAILURES)
  remote = connect(
    timeout_seconds=0.5, retries=len(FAILURES), max_concurrent=4, backoff_seconds=0.0
  )
  eos = (remote.tokenizer.eos_token_id,)
  futures = [remote.submit(make_turn(i), make_key(i), eos) for i in range(12)]
  assert [future.result(timeout=60) for future in futures] == expected
  assert not server.script and len(server.bodies) == 12 + 12 + len(FAILURES)


@pytest.mark.parametrize('failure', FAILURES, ids=range(len(FAILURES)))
def test_each_failure_is_retried_and_then_reported(failure, server, connect):
  server.script = [failure] * 3
  remote = connect(timeout_seconds=0.3, retries=2)
  future = remote.submit(make_turn(), make_key(), (), (), 'row 7')
  with pytest.raises(UnreachableError) as error:
    future.result(timeout=60)
  message = str(error.value)
  for part in (
    server.url,
    "chain 'row 7', turn 'critique_0'",
    'in 3 attempts',
    'start the run again',
  ):
    assert part in message
  if isinstance(failure, tuple) and isinstance(failure[1], dict) and 'error' in failure[1]:
    assert f'status {failure[0]}' in message
    assert 'memory' in message or 'slow down' in message
  assert len(server.bodies) == 3 and server.bodies[0] == server.bodies[2]


def test_a_refusal_is_reported_without_a_retry(server, connect):
  server.script = [(400, {'error': {'message': 'context of 9000 tokens is too long'}})]
  with pytest.raises(UserError, match='row 7.*critique_0.*status 400: context of 9000 tokens'):
    ask(connect())
  assert len(server.bodies) == 1


def test_a_server_that_is_gone_is_reported(server, connect):
  remote = connect(retries=1)
  server.server_close()
  with pytest.raises(UnreachableError, match='in 2 attempts'):
    ask(remote)
  with pytest.raises(UserError, match='is unreachable.*Check that it is running'):
    remote.check()


def test_the_number_of_concurrent_requests_is_limited(server, connect):
  server.delay = 0.02
  remote = connect(max_concurrent=3)
  futures = [remote.submit(make_turn(i), make_key(i)) for i in range(20)]
  concurrent.futures.wait(futures, timeout=60)
  assert server.max_current == 3 and len(server.bodies) == 20


def test_retry_after_is_honoured(server, connect):
  server.script = [(503, b'', [('Retry-After', '0.3')])]
  begin = time.monotonic()
  ask(connect(backoff_seconds=0.0))
  assert time.monotonic() - begin >= 0.3
  assert connection.parse_retry_after(None) == connection.parse_retry_after('soon') == 0.0
  date = time.strftime('%a, %d %b %Y %H:%M:%S GMT', time.gmtime(time.time() + 100))
  assert 90 < connection.parse_retry_after(date) <= 100


def test_backoff_doubles_with_jitter_that_depends_on_the_turn():
  def waits_of(number):
    seed = make_key(number).tobytes()
    return [connection.backoff_seconds(1.0, attempt, seed) for attempt in range(1, 12)]

  waits = waits_of(3)
  assert waits == waits_of(3)
  assert waits != waits_of(4)
  for attempt, wait in enumerate(waits):
    longest = min(2.0**attempt, connection.MAX_BACKOFF)
    assert longest / 2 <= wait <= longest


def test_the_seed_is_a_function_of_the_random_key(server, connect):
  remote = connect()
  for number in (0, 1, 0):
    ask(remote, number)
  seeds = [body['seed'] for body in server.bodies]
  assert seeds[0] == seeds[2] != seeds[1]
  for word in (0, 1, 2**31 - 2, 2**31 - 1, 2**32 - 1):
    assert 1 <= protocol.request_seed(np.array([word, 0], np.uint32)) < 2**31


def test_the_api_key_is_sent_and_never_shown(server, connect, monkeypatch):
  with pytest.raises(UserError, match=KEY_NAME):
    connect(api_key_env=KEY_NAME)
  monkeypatch.setenv(KEY_NAME, KEY)
  remote = connect(api_key_env=KEY_NAME)
  server.script = [(401, {'error': {'message': f'Incorrect API key provided: {KEY}'}})]
  with pytest.raises(UserError, match='status 401: Incorrect API key') as error:
    ask(remote)
  assert server.headers[0]['Authorization'] == f'Bearer {KEY}'
  shown = str(error.value) + repr(remote) + repr(remote.config) + remote.fingerprint + remote.name
  assert KEY not in shown
  ask(connect())
  assert 'Authorization' not in server.headers[1]


def test_a_stop_text_ends_the_reply_at_its_token(server, connect):
  remote = connect()
  tokens = remote.tokenizer.encode('kind words and the brake', add_special_tokens=False)
  server.script = [
    lambda reply: {
      'choices': [
        {
          'text': 'kind words',
          'finish_reason': 'stop',
          'stop_reason': ' and',
          'token_ids': tokens,
          'logprobs': {'tokens': [''] * len(tokens), 'token_logprobs': [-1.0] * len(tokens)},
        }
      ]
    }
  ]
  completion = ask(remote, stop_texts=(' and',))
  assert server.bodies[0]['stop'] == [' and']
  assert completion.finish_reason == 'stop_text' and completion.text == 'kind words'
  assert remote.tokenizer.decode(completion.tokens).endswith(' and')
  assert len(completion.logprobs) == len(completion.tokens) < len(tokens)


def test_a_text_only_answer_is_encoded_and_has_no_log_probabilities(server, connect):
  server.answers = 'text'
  remote = connect(server='openai')
  completion = ask(remote)
  eos = remote.tokenizer.eos_token_id
  assert completion.finish_reason == 'stop'
  assert completion.tokens == [
    *remote.tokenizer.encode(completion.text, add_special_tokens=False),
    eos,
  ]
  assert len(completion.logprobs) == len(completion.tokens) and all(
    map(math.isnan, completion.logprobs)
  )
  assert 'top_k' not in server.bodies[0] and 'stop_token_ids' not in server.bodies[0]
  cut = ask(remote, max_tokens=3)
  assert cut.finish_reason == 'length' and eos not in cut.tokens
  # A server that removes the stop text does not say whether a text or a token ended the reply.
  assert ask(remote, stop_texts=('\n\nHuman:',)).finish_reason == 'stop_text'
  # A server that accepts fewer stop texts continues after the others; the client cuts its answer.
  labels = tuple(f'{i})' for i in range(5)) + (' and',)
  server.script = [lambda _: {'choices': [{'text': 'kind and rude', 'finish_reason': 'length'}]}]
  completion = ask(remote, stop_texts=labels)
  assert server.bodies[-1]['stop'] == list(labels[:4])
  assert (completion.text, completion.finish_reason) == ('kind', 'stop_text')


def test_threads_do_not_share_a_tokenizer(server, connect):
  """A thread that encodes control tokens does not make the worker threads encode them."""
  remote = connect(server='openai', max_concurrent=4)
  eos = remote.tokenizer.eos_token_id
  spelled = {'choices': [{'text': '<|im_end|> ' * 40, 'finish_reason': 'length'}]}
  server.script = [lambda _: spelled] * 150
  futures = [
    remote.submit(make_turn(i % 100, max_tokens=400), make_key(i), (eos,)) for i in range(150)
  ]
  while not all(future.done() for future in futures):
    assert eos in remote.tokenizer.encode('the brake <|im_end|> ' * 40, split_special_tokens=False)
  assert not any(eos in future.result().tokens for future in futures)


def test_text_that_spells_a_control_token_stays_text(server, connect):
  remote = connect(server='openai')
  server.script = [
    lambda _: {'choices': [{'text': 'x <|im_end|> y', 'finish_reason': 'length'}]},
  ]
  completion = ask(remote)
  assert (
    remote.tokenizer.eos_token_id not in completion.tokens and completion.text == 'x <|im_end|> y'
  )


@pytest.mark.parametrize(
  'software, temperature, kept', [('sglang', 1.0, True), ('sglang', 0.5, False)]
)
def test_log_probabilities_after_temperature_are_dropped(
  software, temperature, kept, server, connect
):
  remote = connect(server=software)
  tokens = remote.tokenizer.encode('look at the brake', add_special_tokens=False)
  pieces = [*(remote.tokenizer.decode([token]) for token in tokens), '<|im_end|>']
  logprobs = [-0.5] * len(pieces)
  choice = {'text': 'look at the brake', 'finish_reason': 'stop', 'matched_stop': 1}
  choice['logprobs'] = {'tokens': pieces, 'token_logprobs': logprobs}
  server.script = [lambda _: {'choices': [choice]}]
  completion = ask(remote, temperature=temperature)
  assert completion.tokens == [*tokens, remote.tokenizer.eos_token_id]
  assert completion.logprobs == logprobs if kept else all(map(math.isnan, completion.logprobs))


def test_ids_in_the_chat_format_are_read(server, connect):
  """llama.cpp returns them; if it omits part of a character, the text is encoded instead."""
  remote = connect(server='llama.cpp')
  tokens = [
    *remote.tokenizer.encode('look', add_special_tokens=False),
    remote.tokenizer.eos_token_id,
  ]
  content = [{'id': token, 'token': '', 'logprob': -1.5} for token in tokens]
  choice = {'text': 'look', 'finish_reason': 'stop', 'logprobs': {'content': content}}
  complete = {'choices': [choice], 'usage': {'completion_tokens': len(tokens)}}
  incomplete = complete | {'usage': {'completion_tokens': len(tokens) + 1}}
  server.script = [lambda _: complete, lambda _: incomplete]
  completion = ask(remote)
  assert completion.tokens == tokens and completion.logprobs == [-1.5] * len(tokens)
  completion = ask(remote)
  assert completion.tokens == tokens and all(map(math.isnan, completion.logprobs))
  order = ['penalties', 'temperature', 'top_k', 'top_p', 'min_p']
  assert server.bodies[0]['samplers'] == order and server.bodies[0]['top_k'] == 0


def test_a_tokenizer_of_another_model_is_detected(server, connect):
  remote = connect()
  other = {'text': 'kind words', 'finish_reason': 'length', 'token_ids': [60, 61, 62]}
  beyond = {'text': '', 'finish_reason': 'length', 'token_ids': [999999]}
  for choice in (other, beyond):
    server.script = [lambda _, choice=choice: {'choices': [choice]}]
    with pytest.raises(UserError, match='Set tokenizer to that of the served model'):
      ask(remote)


def test_a_prompt_is_sent_as_text_if_that_keeps_its_control_tokens(server, connect):
  server.answers = 'text'
  remote = connect(server='tgi', prompt='text')
  text = '<|im_start|>user\nHow kind?<|im_end|>\n<|im_start|>assistant\n'
  turn = Turn('initial', remote.tokenizer.encode(text), SamplingConfig(max_tokens=8))
  remote.submit(turn, make_key()).result(timeout=60)
  [body] = server.bodies
  assert body['model'] == 'tgi'  # TGI takes any other name for an adapter
  assert body['prompt'] == text and not {'top_p', 'top_k', 'logprobs'} & set(body)
  spelled = remote.tokenizer.encode('<|im_end|>', split_special_tokens=True)
  with pytest.raises(UserError, match='spells a control token'):
    turn = dataclasses.replace(turn, context=[*turn.context, *spelled])
    remote.submit(turn, make_key()).result(timeout=60)


def test_the_check_asks_the_server_what_it_serves(server, connect):
  connect(max_positions=256).check()
  for fields, message in (
    ({'model': 'other'}, "does not serve 'other'.*: served"),
    ({'max_positions': 257}, 'accepts contexts of 256 tokens'),
    (
      {'url': server.url.replace('/v1', '')},
      'GET /models with status 404 .no such page.. Check that it is running',
    ),
  ):
    with pytest.raises(UserError, match=message):
      connect(**{'max_positions': 256} | fields).check()
  server.models = ['what']
  with pytest.raises(UserError, match='not a list of models'):
    connect().check()


def test_the_fingerprint_depends_on_the_model_and_not_its_address(connect, vocabulary):
  plain = connect().fingerprint
  assert plain == connect(url='http://elsewhere/v1', timeout_seconds=1.0, retries=0).fingerprint
  assert plain != connect(model='other').fingerprint
  assert plain != connect(revision='fp8').fingerprint
  assert plain != connect(server='sglang').fingerprint


def test_a_closed_remote_sends_no_requests(server, connect):
  server.script = ['stall'] * 2
  remote = connect(max_concurrent=1, timeout_seconds=0.5, retries=50)
  first, second = (remote.submit(make_turn(i), make_key(i)) for i in range(2))
  while not server.bodies:
    time.sleep(0.005)
  remote.close()
  with pytest.raises(UnreachableError, match='closed before'):
    first.result(timeout=60)
  with pytest.raises(UnreachableError, match='closed before'):
    second.result(timeout=60)
  with pytest.raises(RuntimeError, match='closed'):
    remote.submit(make_turn(), make_key())


@pytest.mark.parametrize(
  'fields, message',
  [
    ({'url': ''}, "url=''"),
    ({'url': 'localhost:8000'}, "url='localhost:8000'"),
    ({'url': f'http://me:{KEY}@host/v1'}, 'without user or password'),
    ({'model': ''}, "model=''"),
    ({'tokenizer': ''}, "tokenizer=''"),
    ({'server': 'ollama'}, "server='ollama'.*vllm"),
    ({'server': 'tgi'}, "prompt='text'"),
    ({'prompt': 'words'}, "prompt='words'"),
    ({'requests_per_minute': -1.0}, 'requests_per_minute=-1.0'),
    ({'tokens_per_minute': math.inf}, 'tokens_per_minute=inf'),
    ({'price_output': -0.5}, 'price_output=-0.5'),
    ({'price_cached_input': -0.5}, 'or -1 for price_input'),
    ({'limit_field': 'n_predict'}, 'max_completion_tokens'),
    ({'limit_field': 'max_completion_tokens'}, "unless prompt='chat'"),
    ({'timeout_seconds': 0.0}, 'timeout_seconds=0.0'),
    ({'timeout_seconds': math.inf}, 'timeout_seconds=inf'),
    ({'retries': -1}, 'retries=-1'),
    ({'backoff_seconds': -1.0}, 'backoff_seconds=-1.0'),
    ({'max_concurrent': 0}, 'max_concurrent=0'),
    ({'max_positions': 0}, 'max_positions=0'),
    ({'api_key_env': KEY}, 'never the key itself'),
  ],
)
def test_invalid_fields_are_refused(fields, message):
  valid = {'url': 'http://localhost:8000/v1', 'model': 'm', 'tokenizer': 't'}
  with pytest.raises(UserError, match=message) as error:
    RemoteConfig(**valid | fields)
  assert KEY not in str(error.value)


def test_sampling_settings_that_a_server_lacks_are_refused():
  config = RemoteConfig('http://localhost:8000/v1', 'm', 't')
  config.check_sampling(SamplingConfig(top_p=0.5, temperature=0.0))
  with pytest.raises(UserError, match=r'openai.*top_k=3.*vllm'):
    config.check_sampling(SamplingConfig(top_k=3))
  with pytest.raises(UserError, match='stop_token_ids'):
    dataclasses.replace(config, server='llama.cpp').check_sampling(
      SamplingConfig(stop_token_ids=(1,))
    )
  dataclasses.replace(config, server='vllm').check_sampling(
    SamplingConfig(stop_token_ids=(1,), top_k=2)
  )
  every = dict(
    min_p=0.1,
    repetition_penalty=1.2,
    presence_penalty=0.5,
    frequency_penalty=0.25,
    logit_bias=((3, -1.0),),
  )
  for server in ('vllm', 'sglang'):
    dataclasses.replace(config, server=server).check_sampling(SamplingConfig(**every))
  refused = {
    'openai': {'min_p', 'repetition_penalty'},
    'llama.cpp': {'presence_penalty', 'frequency_penalty'},
    'tgi': {*every},
  }
  for server, names in refused.items():
    own = dataclasses.replace(config, server=server, prompt='text')
    for name, value in every.items():
      if name in names:
        with pytest.raises(
          UserError, match=rf'{name}=.*Remove it, or serve .* with vllm or sglang'
        ):
          own.check_sampling(SamplingConfig(**{name: value}))
      else:
        own.check_sampling(SamplingConfig(**{name: value}))


def test_penalties_and_biases_are_sent_under_the_servers_names(server, connect):
  settings = dict(min_p=0.1, repetition_penalty=1.2, logit_bias=((3, -1.0), (7, 2.0)))
  for name in ('vllm', 'llama.cpp'):
    own = dict(presence_penalty=0.5, frequency_penalty=0.25) if name == 'vllm' else {}
    ask(connect(server=name), **settings, **own)
    ask(connect(server=name))
  penalized, plain = server.bodies[:2]
  assert (penalized['min_p'], penalized['repetition_penalty']) == (0.1, 1.2)
  assert (penalized['presence_penalty'], penalized['frequency_penalty']) == (0.5, 0.25)
  assert penalized['logit_bias'] == {'3': -1.0, '7': 2.0}
  assert (plain['min_p'], plain['repetition_penalty']) == (0.0, 1.0)
  assert not {'presence_penalty', 'frequency_penalty', 'logit_bias'} & set(plain)
  penalized, plain = server.bodies[2:]
  assert (penalized['repeat_penalty'], penalized['repeat_last_n']) == (1.2, -1)
  assert plain['repeat_penalty'] == 1.0 and 'repetition_penalty' not in penalized


PROBES = 1  # test requests at each start of a run, if all turns have the same sampling settings


def served_run(test_server, workdir, rounds=2, stage='critique', **fields):
  """Return a small run with the model of one stage on the test's server."""
  config = tiny.get_config()
  for name, limit in (('harmful', 6), ('helpful', 3), ('eval_harmful', 2), ('eval_helpful', 1)):
    config.prompts[name].limit = limit
  config.feedback.rounds, config.feedback.shard_rows = rounds, 2
  config.feedback.max_rate.update(
    dict.fromkeys(config.feedback.max_rate, 1.0)
  )  # texts of 12 tokens
  for turn in config.sampling.values():
    turn.max_tokens = 12
  config.engine.slots = 8
  config.train.helpfulness_share = 0.2
  address = {'url': test_server.url, 'model': 'served', 'tokenizer': str(MODELS['tiny'])}
  defaults = {'server': 'vllm', 'max_positions': 256, 'backoff_seconds': 0.01}
  config.remote[stage].update(address | defaults | fields)
  if stage == 'base':
    config.model.update(base='', init='tiny')
  return pipeline.build(config, workdir)


def shards(workdir):
  return {path.name: path.read_bytes() for path in workdir.glob('d_cai/*.array_record-*')}


@pytest.fixture
def tiny_server(server):
  """Return the test's server with the tokenizer of the embedded world."""
  server.tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(MODELS['tiny'])
  return server


def test_a_run_with_a_served_critic_survives_server_failures(tiny_server, tmp_path):
  pipeline.run_stages(served_run(tiny_server, tmp_path / 'healthy'), ['generate'])
  asked = len(tiny_server.bodies)
  assert asked == 6 * 2 + PROBES
  tiny_server.script = list(FAILURES)
  patient = {'timeout_seconds': 0.5, 'retries': len(FAILURES), 'backoff_seconds': 0.0}
  pipeline.run_stages(served_run(tiny_server, tmp_path / 'failing', **patient), ['generate'])
  assert len(tiny_server.bodies) == 2 * asked + len(FAILURES)
  assert shards(tmp_path / 'failing') == shards(tmp_path / 'healthy')
  assert len(shards(tmp_path / 'failing')) == 5


def test_a_run_resumes_after_its_server_failed(tiny_server, tmp_path):
  pipeline.run_stages(served_run(tiny_server, tmp_path / 'whole'), ['generate'])
  asked = len(tiny_server.bodies)
  tiny_server.bodies.clear()
  tiny_server.script = [None] * (9 + PROBES) + [(500, b'out of order')] * 3
  run = served_run(tiny_server, tmp_path / 'broken', retries=0, max_concurrent=1)
  with pytest.raises(UnreachableError, match='chain .* turn .critique_.*start the run again'):
    pipeline.run_stages(run, ['generate'])
  tiny_server.script = []
  pipeline.run_stages(run, ['generate'])
  assert shards(tmp_path / 'broken') == shards(tmp_path / 'whole')
  requests = len(tiny_server.bodies)
  assert asked < requests - PROBES <= asked + 3  # answered requests were not repeated
  shutil.rmtree(tmp_path / 'broken' / 'd_cai')
  (tmp_path / 'broken' / 'manifest.json').unlink()
  pipeline.run_stages(run, ['generate'])  # replays the journal
  assert len(tiny_server.bodies) == requests + PROBES
  assert shards(tmp_path / 'broken') == shards(tmp_path / 'whole')


def test_a_served_model_gives_a_text_only_dataset(tiny_server, tmp_path):
  """The server of M_θ returns text only, so log-probabilities are unknown."""
  tiny_server.answers = 'text'
  run = served_run(tiny_server, tmp_path, stage='base', server='openai')
  pipeline.run_stages(run, ['generate'])
  rows = list(d_cai.read_rows(tmp_path / 'd_cai'))
  assert len(rows) == 9 and {row['model'] for row in rows} == {'served'}
  assert all(row['initial']['text'] and math.isnan(row['initial']['logprob']) for row in rows)
