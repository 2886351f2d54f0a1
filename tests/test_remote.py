"""A served model against a real HTTP server on loopback that is not always well."""

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
from cai_jax.sampling.remote import Remote, RemoteConfig, connection, protocol
from cai_jax.sampling.types import SamplingConfig, Turn
from cai_jax.tiny.files import MODELS
from configs import tiny

KEY_NAME, KEY = 'CAI_JAX_TEST_KEY', 'sk-never-to-be-seen'
STALL = 30.0  # seconds, unless the client hangs up; far beyond the tests' time-outs


class Server(http.server.ThreadingHTTPServer):
  """A small completions API, whose answer is a function of prompt, seed and stop tokens.

  `script` says how it fails: each request takes its first entry, and is answered when it is empty.
  """

  daemon_threads = True

  def __init__(self, tokenizer, answers='ids'):
    super().__init__(('127.0.0.1', 0), Handler)
    self.tokenizer, self.answers = tokenizer, answers
    self.script: list = []
    self.bodies: list[dict] = []  # of all requests, in order
    self.headers: list[dict] = []
    self.now = self.most = 0  # requests that are being answered, and the most of them at a time
    self.delay = 0.0
    self.lock = threading.Lock()
    self.models = {'data': [{'id': 'served', 'max_model_len': 256}]}

  @property
  def url(self) -> str:
    return f'http://127.0.0.1:{self.server_address[1]}/v1'

  def reply(self, body: dict) -> dict:
    """What the model says: pieces of text that hang on prompt and seed, and an end."""
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
  """Answers, or does what the script says."""

  def log_message(self, *args):
    pass

  def do_GET(self):
    there = self.path == '/v1/models'
    self.send(*((200, self.server.models) if there else (404, {'error': 'no such page'})))

  def do_POST(self):
    server = self.server
    body = json.loads(self.rfile.read(int(self.headers['Content-Length'])))
    with server.lock:
      server.bodies.append(body)
      server.headers.append(dict(self.headers))
      act = server.script.pop(0) if server.script else None
      server.now += 1
      server.most = max(server.most, server.now)
    time.sleep(server.delay)
    with server.lock:  # before the answer, after which the client may send its next at once
      server.now -= 1
    try:
      if act is None:
        self.send(200, server.reply(body))
      elif act == 'hang up':
        self.connection.shutdown(socket.SHUT_RDWR)
      elif act == 'half':
        self.send(200, server.reply(body), cut=20)
      elif act == 'stall':
        self.connection.settimeout(STALL)
        self.connection.recv(1)  # returns when the client has given up
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
  """A folder with a tokenizer and no model."""
  folder = tmp_path_factory.mktemp('vocabulary')
  tiny_tokenizer.save_pretrained(folder)
  return str(folder)


@pytest.fixture
def connect(server, vocabulary):
  """`connect(**fields)`: a Remote of the test's server."""
  made = []

  def make(**fields) -> Remote:
    fields = {'server': 'vllm', 'backoff_seconds': 0.01, 'retries': 3} | fields
    given = {'url': server.url, 'model': 'served', 'tokenizer': vocabulary} | fields
    made.append(Remote(RemoteConfig(**given)))
    return made[-1]

  yield make
  for one in made:
    one.close()


def turn_of(number=0, **sampling):
  settings = SamplingConfig(**({'max_tokens': 40} | sampling))
  return Turn(f'critique_{number}', [30 + number, 40, 50], settings)


def key_of(number=0):
  return np.array([number * 7919 + 5, 2], np.uint32)


def ask(one, number=0, stop_texts=(), **sampling):
  eos = (one.tokenizer.eos_token_id,)
  turn = turn_of(number, **sampling)
  return one.submit(turn, key_of(number), eos, stop_texts, 'row 7').result(timeout=60)


def test_a_completion_is_what_the_server_sampled(server, connect):
  one = connect()
  done = ask(one, max_tokens=40, top_p=0.9, top_k=5, temperature=0.7)
  eos = one.tokenizer.eos_token_id
  assert done.finish_reason == 'stop' and done.tokens[-1] == eos
  assert done.text == one.tokenizer.decode(done.tokens[:-1]) and done.text
  assert done.logprobs == [-0.25 * (i + 1) for i in range(len(done.tokens))]
  [body] = server.bodies
  assert body['prompt'] == [30, 40, 50] and body['model'] == 'served' and body['n'] == 1
  assert (body['max_tokens'], body['temperature']) == (40, 0.7)
  assert (body['top_p'], body['top_k'], body['stop_token_ids']) == (0.9, 5, [eos])
  cut = ask(one, max_tokens=2)
  assert cut.finish_reason == 'length' and len(cut.tokens) == 2
  assert server.bodies[1]['top_k'] == -1  # or a default of the server's would hold


ILL = [
  (500, {'error': {'message': 'out of memory'}}),
  (429, {'error': 'slow down'}, [('Retry-After', '0')]),
  'hang up',
  (200, b'{"choices": [{"te'),
  (200, b'<html>bad gateway</html>'),
  'half',
  'stall',
  (503, b''),
  (200, {'choices': []}),
  (200, {'choices': [{'text': 'no reason to end'}]}),
  (200, {'choices': [{'text': 'x', 'finish_reason': 'abort'}]}),
  (200, {'choices': [{'text': None, 'finish_reason': 'stop'}]}),
  (200, {'choices': [{'text': 'x', 'finish_reason': 'stop', 'token_ids': ['x']}]}),
  (200, [1, 2]),
  (408, b''),
]


def test_failures_change_no_completion(server, connect):
  well = connect()
  expected = [ask(well, number) for number in range(12)]
  server.script = list(ILL)
  ill = connect(timeout_seconds=0.5, retries=len(ILL), max_concurrent=4, backoff_seconds=0.0)
  futures = [ill.submit(turn_of(i), key_of(i), (ill.tokenizer.eos_token_id,)) for i in range(12)]
  assert [future.result(timeout=60) for future in futures] == expected
  assert not server.script and len(server.bodies) == 12 + 12 + len(ILL)


@pytest.mark.parametrize('fault', ILL, ids=range(len(ILL)))
def test_each_failure_is_tried_again_and_then_told(fault, server, connect):
  server.script = [fault] * 3
  one = connect(timeout_seconds=0.3, retries=2)
  future = one.submit(turn_of(), key_of(), (), (), 'row 7')
  with pytest.raises(ConnectionError) as error:
    future.result(timeout=60)
  said = str(error.value)
  for part in (
    server.url,
    "chain 'row 7', turn 'critique_0'",
    'in 3 attempts',
    'start the run again',
  ):
    assert part in said
  if isinstance(fault, tuple) and isinstance(fault[1], dict) and 'error' in fault[1]:
    assert f'status {fault[0]}' in said and ('memory' in said or 'slow down' in said)
  assert len(server.bodies) == 3 and server.bodies[0] == server.bodies[2]


def test_a_refusal_is_told_at_once(server, connect):
  server.script = [(400, {'error': {'message': 'context of 9000 tokens is too long'}})]
  with pytest.raises(ValueError, match='row 7.*critique_0.*status 400: context of 9000 tokens'):
    ask(connect())
  assert len(server.bodies) == 1


def test_a_server_that_is_gone_is_told(server, connect):
  one = connect(retries=1)
  server.server_close()
  with pytest.raises(ConnectionError, match='in 2 attempts'):
    ask(one)
  with pytest.raises(ValueError, match='is unreachable.*Check that it is running'):
    one.check()


def test_requests_on_their_way_are_bounded(server, connect):
  server.delay = 0.02
  one = connect(max_concurrent=3)
  futures = [one.submit(turn_of(i), key_of(i)) for i in range(20)]
  concurrent.futures.wait(futures, timeout=60)
  assert server.most == 3 and len(server.bodies) == 20


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
    seed = key_of(number).tobytes()
    return [connection.backoff_seconds(1.0, attempt, seed) for attempt in range(1, 12)]

  waits = waits_of(3)
  assert waits == waits_of(3)
  assert waits != waits_of(4)
  for attempt, wait in enumerate(waits):
    whole = min(2.0**attempt, connection.MAX_BACKOFF)
    assert whole / 2 <= wait <= whole


def test_the_seed_is_a_function_of_the_key(server, connect):
  one = connect()
  for number in (0, 1, 0):
    ask(one, number)
  seeds = [body['seed'] for body in server.bodies]
  assert seeds[0] == seeds[2] != seeds[1]
  for word in (0, 1, 2**31 - 2, 2**31 - 1, 2**32 - 1):
    assert 1 <= protocol.request_seed(np.array([word, 0], np.uint32)) < 2**31


def test_the_key_is_sent_and_never_shown(server, connect, monkeypatch):
  with pytest.raises(ValueError, match=KEY_NAME):
    connect(api_key_env=KEY_NAME)
  monkeypatch.setenv(KEY_NAME, KEY)
  one = connect(api_key_env=KEY_NAME)
  server.script = [(401, {'error': {'message': f'Incorrect API key provided: {KEY}'}})]
  with pytest.raises(ValueError, match='status 401: Incorrect API key') as error:
    ask(one)
  assert server.headers[0]['Authorization'] == f'Bearer {KEY}'
  shown = str(error.value) + repr(one) + repr(one.config) + one.fingerprint + one.name
  assert KEY not in shown
  ask(connect())
  assert 'Authorization' not in server.headers[1]


def test_a_stop_text_ends_the_reply_at_its_token(server, connect):
  one = connect()
  said = one.tokenizer.encode('kind words and the brake', add_special_tokens=False)
  server.script = [
    lambda reply: {
      'choices': [
        {
          'text': 'kind words',
          'finish_reason': 'stop',
          'stop_reason': ' and',
          'token_ids': said,
          'logprobs': {'tokens': [''] * len(said), 'token_logprobs': [-1.0] * len(said)},
        }
      ]
    }
  ]
  done = ask(one, stop_texts=(' and',))
  assert server.bodies[0]['stop'] == [' and']
  assert done.finish_reason == 'stop_text' and done.text == 'kind words'
  assert one.tokenizer.decode(done.tokens).endswith(' and')
  assert len(done.logprobs) == len(done.tokens) < len(said)


def test_text_alone_is_encoded_anew_without_invented_numbers(server, connect):
  server.answers = 'text'
  one = connect(server='openai')
  done = ask(one)
  eos = one.tokenizer.eos_token_id
  assert done.finish_reason == 'stop'
  assert done.tokens == [*one.tokenizer.encode(done.text, add_special_tokens=False), eos]
  assert len(done.logprobs) == len(done.tokens) and all(map(math.isnan, done.logprobs))
  assert 'top_k' not in server.bodies[0] and 'stop_token_ids' not in server.bodies[0]
  cut = ask(one, max_tokens=3)
  assert cut.finish_reason == 'length' and eos not in cut.tokens
  # A server that trims its stop texts does not say which of the two ended the reply.
  assert ask(one, stop_texts=('\n\nHuman:',)).finish_reason == 'stop_text'
  # One that takes few of them goes on, and what follows is cut here.
  labels = tuple(f'{i})' for i in range(5)) + (' and',)
  server.script = [lambda _: {'choices': [{'text': 'kind and rude', 'finish_reason': 'length'}]}]
  done = ask(one, stop_texts=labels)
  assert server.bodies[-1]['stop'] == list(labels[:4])
  assert (done.text, done.finish_reason) == ('kind', 'stop_text')


def test_threads_do_not_share_a_tokenizer(server, connect):
  """Another thread that reads control tokens from text must not make ours read them."""
  one = connect(server='openai', max_concurrent=4)
  eos = one.tokenizer.eos_token_id
  spelled = {'choices': [{'text': '<|im_end|> ' * 40, 'finish_reason': 'length'}]}
  server.script = [lambda _: spelled] * 150
  futures = [one.submit(turn_of(i % 100), key_of(i), (eos,)) for i in range(150)]
  while not all(future.done() for future in futures):
    assert eos in one.tokenizer.encode('the brake <|im_end|> ' * 40, split_special_tokens=False)
  assert not any(eos in future.result().tokens for future in futures)


def test_text_that_spells_a_control_token_stays_text(server, connect):
  one = connect(server='openai')
  server.script = [
    lambda _: {'choices': [{'text': 'x <|im_end|> y', 'finish_reason': 'length'}]},
  ]
  done = ask(one)
  assert one.tokenizer.eos_token_id not in done.tokens and done.text == 'x <|im_end|> y'


@pytest.mark.parametrize(
  'kind, temperature, known', [('sglang', 1.0, True), ('sglang', 0.5, False)]
)
def test_log_probabilities_of_another_distribution_are_not_taken(
  kind, temperature, known, server, connect
):
  one = connect(server=kind)
  tokens = one.tokenizer.encode('look at the brake', add_special_tokens=False)
  pieces = [*(one.tokenizer.decode([token]) for token in tokens), '<|im_end|>']
  logprobs = [-0.5] * len(pieces)
  choice = {'text': 'look at the brake', 'finish_reason': 'stop', 'matched_stop': 1}
  choice['logprobs'] = {'tokens': pieces, 'token_logprobs': logprobs}
  server.script = [lambda _: {'choices': [choice]}]
  done = ask(one, temperature=temperature)
  assert done.tokens == [*tokens, one.tokenizer.eos_token_id]
  assert done.logprobs == logprobs if known else all(map(math.isnan, done.logprobs))


def test_ids_in_the_form_of_chats_are_read(server, connect):
  """As llama.cpp gives them; where it leaves out half a character, the text is what counts."""
  one = connect(server='llama.cpp')
  tokens = [*one.tokenizer.encode('look', add_special_tokens=False), one.tokenizer.eos_token_id]
  content = [{'id': token, 'token': '', 'logprob': -1.5} for token in tokens]
  choice = {'text': 'look', 'finish_reason': 'stop', 'logprobs': {'content': content}}
  whole = {'choices': [choice], 'usage': {'completion_tokens': len(tokens)}}
  short = whole | {'usage': {'completion_tokens': len(tokens) + 1}}
  server.script = [lambda _: whole, lambda _: short]
  done = ask(one)
  assert done.tokens == tokens and done.logprobs == [-1.5] * len(tokens)
  done = ask(one)
  assert done.tokens == tokens and all(map(math.isnan, done.logprobs))
  assert server.bodies[0]['samplers'][0] == 'temperature' and server.bodies[0]['top_k'] == 0


def test_another_models_tokenizer_is_found_out(server, connect):
  one = connect()
  other = {'text': 'kind words', 'finish_reason': 'length', 'token_ids': [60, 61, 62]}
  beyond = {'text': '', 'finish_reason': 'length', 'token_ids': [999999]}
  for choice in (other, beyond):
    server.script = [lambda _, choice=choice: {'choices': [choice]}]
    with pytest.raises(ValueError, match='Set tokenizer to that of the served model'):
      ask(one)


def test_a_prompt_goes_as_text_where_its_control_tokens_survive(server, connect):
  server.answers = 'text'
  one = connect(server='tgi', prompt='text')
  text = '<|im_start|>user\nHow kind?<|im_end|>\n<|im_start|>assistant\n'
  turn = Turn('initial', one.tokenizer.encode(text), SamplingConfig(max_tokens=8))
  one.submit(turn, key_of()).result(timeout=60)
  [body] = server.bodies
  assert body['model'] == 'tgi'  # another name would be an adapter's
  assert body['prompt'] == text and not {'top_p', 'top_k', 'logprobs'} & set(body)
  spelled = one.tokenizer.encode('<|im_end|>', split_special_tokens=True)
  with pytest.raises(ValueError, match='spells a control token'):
    turn = dataclasses.replace(turn, context=[*turn.context, *spelled])
    one.submit(turn, key_of()).result(timeout=60)


def test_the_server_is_asked_what_it_serves(server, connect):
  connect(max_positions=256).check()
  for fields, said in (
    ({'model': 'other'}, "does not serve 'other'.*: served"),
    ({'max_positions': 257}, 'accepts contexts of 256 tokens'),
    (
      {'url': server.url.replace('/v1', '')},
      'GET /models with status 404 .no such page.. Check that it is running',
    ),
  ):
    with pytest.raises(ValueError, match=said):
      connect(**{'max_positions': 256} | fields).check()
  server.models = ['what']
  with pytest.raises(ValueError, match='not a list of models'):
    connect().check()


def test_the_fingerprint_names_the_model_and_not_its_place(connect, vocabulary):
  plain = connect().fingerprint
  assert plain == connect(url='http://elsewhere/v1', timeout_seconds=1.0, retries=0).fingerprint
  assert plain != connect(model='other').fingerprint
  assert plain != connect(revision='fp8').fingerprint
  assert plain != connect(server='sglang').fingerprint


def test_what_is_closed_asks_no_more(server, connect):
  server.script = ['stall'] * 2
  one = connect(max_concurrent=1, timeout_seconds=0.5, retries=50)
  first, second = (one.submit(turn_of(i), key_of(i)) for i in range(2))
  while not server.bodies:
    time.sleep(0.005)
  one.close()
  with pytest.raises(ConnectionError, match='closed before'):
    first.result(timeout=60)
  with pytest.raises(ConnectionError, match='closed before'):
    second.result(timeout=60)
  with pytest.raises(RuntimeError, match='closed'):
    one.submit(turn_of(), key_of())


@pytest.mark.parametrize(
  'fields, said',
  [
    ({'url': ''}, "url=''"),
    ({'url': 'localhost:8000'}, "url='localhost:8000'"),
    ({'url': f'http://me:{KEY}@host/v1'}, 'without user or password'),
    ({'model': ''}, "model=''"),
    ({'tokenizer': ''}, "tokenizer=''"),
    ({'server': 'ollama'}, "server='ollama'.*vllm"),
    ({'server': 'tgi'}, "prompt='text'"),
    ({'prompt': 'chat'}, "prompt='chat'"),
    ({'timeout_seconds': 0.0}, 'timeout_seconds=0.0'),
    ({'timeout_seconds': math.inf}, 'timeout_seconds=inf'),
    ({'retries': -1}, 'retries=-1'),
    ({'backoff_seconds': -1.0}, 'backoff_seconds=-1.0'),
    ({'max_concurrent': 0}, 'max_concurrent=0'),
    ({'max_positions': 0}, 'max_positions=0'),
    ({'api_key_env': KEY}, 'never the key itself'),
  ],
)
def test_bad_fields_are_refused(fields, said):
  whole = {'url': 'http://localhost:8000/v1', 'model': 'm', 'tokenizer': 't'} | fields
  with pytest.raises(ValueError, match=said) as error:
    RemoteConfig(**whole)
  assert KEY not in str(error.value)


def test_what_a_server_has_no_field_for_is_refused():
  config = RemoteConfig('http://localhost:8000/v1', 'm', 't')
  config.check_sampling(SamplingConfig(top_p=0.5, temperature=0.0))
  with pytest.raises(ValueError, match=r'openai.*top_k=3.*vllm'):
    config.check_sampling(SamplingConfig(top_k=3))
  with pytest.raises(ValueError, match='stop_token_ids'):
    dataclasses.replace(config, server='llama.cpp').check_sampling(
      SamplingConfig(stop_token_ids=(1,))
    )
  dataclasses.replace(config, server='vllm').check_sampling(
    SamplingConfig(stop_token_ids=(1,), top_k=2)
  )


def served_run(at, workdir, rounds=2, stage='critique', **fields):
  """A small generate stage with one of its models on the test's server."""
  config = tiny.get_config()
  for name, limit in (('harmful', 6), ('helpful', 3), ('eval_harmful', 2), ('eval_helpful', 1)):
    config.prompts[name].limit = limit
  config.feedback.rounds, config.feedback.shard_rows = rounds, 2
  for turn in config.sampling.values():
    turn.max_tokens = 12
  config.engine.slots = 8
  config.train.helpfulness_share = 0.2
  own = {'url': at.url, 'model': 'served', 'tokenizer': str(MODELS['tiny'])}
  given = own | {'server': 'vllm', 'max_positions': 256, 'backoff_seconds': 0.01} | fields
  config.remote[stage].update(given)
  if stage == 'base':
    config.model.update(base='', init='tiny')
  return pipeline.build(config, workdir)


def shards(workdir):
  return {path.name: path.read_bytes() for path in workdir.glob('d_cai/*.array_record-*')}


@pytest.fixture
def tiny_server(server):
  """The test's server with the embedded world's tokenizer."""
  words = transformers.PreTrainedTokenizerFast.from_pretrained(MODELS['tiny'])
  server.tokenizer = words
  return server


def test_a_run_with_a_served_critic_survives_its_bad_days(tiny_server, tmp_path):
  pipeline.run_stages(served_run(tiny_server, tmp_path / 'well'), ['generate'])
  asked = len(tiny_server.bodies)
  assert asked == 6 * 2
  tiny_server.script = list(ILL)
  ill = {'timeout_seconds': 0.5, 'retries': len(ILL), 'backoff_seconds': 0.0}
  pipeline.run_stages(served_run(tiny_server, tmp_path / 'ill', **ill), ['generate'])
  assert len(tiny_server.bodies) == 2 * asked + len(ILL)
  assert shards(tmp_path / 'ill') == shards(tmp_path / 'well')
  assert len(shards(tmp_path / 'ill')) == 5


def test_a_run_goes_on_where_its_server_failed_it(tiny_server, tmp_path):
  pipeline.run_stages(served_run(tiny_server, tmp_path / 'whole'), ['generate'])
  asked = len(tiny_server.bodies)
  tiny_server.bodies.clear()
  tiny_server.script = [None] * 9 + [(500, b'out of order')] * 3
  run = served_run(tiny_server, tmp_path / 'broken', retries=0, max_concurrent=1)
  with pytest.raises(ConnectionError, match='chain .* turn .critique_.*start the run again'):
    pipeline.run_stages(run, ['generate'])
  tiny_server.script = []
  pipeline.run_stages(run, ['generate'])
  assert shards(tmp_path / 'broken') == shards(tmp_path / 'whole')
  before = len(tiny_server.bodies)
  assert asked < before <= asked + 3  # no answer was asked for twice
  shutil.rmtree(tmp_path / 'broken' / 'd_cai')
  (tmp_path / 'broken' / 'manifest.json').unlink()
  pipeline.run_stages(run, ['generate'])  # all of it is in the journal
  assert len(tiny_server.bodies) == before
  assert shards(tmp_path / 'broken') == shards(tmp_path / 'whole')


def test_a_served_model_gives_a_text_only_dataset(tiny_server, tmp_path):
  """M_θ itself is served, by a server that gives text alone: its log-probabilities are unknown."""
  tiny_server.answers = 'text'
  run = served_run(tiny_server, tmp_path, stage='base', server='openai')
  pipeline.run_stages(run, ['generate'])
  rows = list(d_cai.read_rows(tmp_path / 'd_cai'))
  assert len(rows) == 9 and {row['model'] for row in rows} == {'served'}
  assert all(row['initial']['text'] and math.isnan(row['initial']['logprob']) for row in rows)
