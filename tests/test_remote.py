"""`Remote` against an HTTP server on loopback that fails on request."""

import concurrent.futures
import math
import shutil
import time

import numpy as np
import pytest
import transformers

from cai_jax import pipeline
from cai_jax.data import d_cai
from cai_jax.runtime.errors import UnreachableError, UserError
from cai_jax.sampling.remote import RemoteConfig, connection, protocol
from cai_jax.tiny.files import MODELS
from tests.remote_setup import FAILURES, KEY, KEY_NAME, ask, make_key, make_turn
from tests.remote_setup import connect as connect
from tests.remote_setup import server as server
from tests.remote_setup import vocabulary as vocabulary
from tests.served_setup import serve_stage, small_config

pytestmark = pytest.mark.usefixtures('single_device')


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


PROBES = 1  # test requests at each start of a run, if all turns have the same sampling settings


def served_run(test_server, workdir, rounds=2, stage='critique', **fields):
  """Return a small run with the model of one stage on the test's server."""
  config = small_config((6, 3, 2, 1))
  config.feedback.rounds, config.feedback.shard_rows = rounds, 2
  serve_stage(config, stage, test_server.url, **fields)
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
