"""Served models that lie, stall, flood or refuse: an error at once, a retry, or a recorded end."""

import gzip
import json
import os
import time

import numpy as np
import pytest

from cai_jax import pipeline
from cai_jax.runtime.errors import UnreachableError, UserError
from cai_jax.sampling.remote import Remote, RemoteConfig, connection
from cai_jax.sampling.remote.api_key import hide
from tests.faults import servers
from tests.faults.servers import complete, respond, serve
from tests.served_setup import (
  EOS,
  FLOODS,
  FOLDER,
  HONEST,
  KEY,
  KEY_NAME,
  TOKENIZER,
  TURN,
  ask,
  changed,
  config_of,
  served_run,
)

pytestmark = pytest.mark.usefixtures('single_device')


def test_an_honest_answer_is_taken():
  with serve(lambda body: respond(200, complete(body, TOKENIZER))) as server:
    completion = ask(server)
    assert (completion.text, completion.finish_reason) == ('look at the', 'stop')
    assert completion.tokens[-1] == EOS and completion.logprobs == [-0.5] * len(completion.tokens)


@pytest.mark.parametrize('lie', servers.LIES)
def test_an_answer_that_contradicts_its_request_is_refused_at_once(lie):
  with serve(lambda body: respond(200, changed(servers.LIES[lie]))) as server:
    with pytest.raises(UserError, match="contradicts chain 'row 7', turn 'initial'") as error:
      ask(server)
    assert len(server.bodies) == 1 and not isinstance(error.value, UnreachableError)


def test_a_cut_prompt_is_named_with_both_counts():
  """A server that cuts prompts, or wraps them in a template (case generation/11)."""
  for read in (4, 57):
    usage = {'prompt_tokens': read, 'completion_tokens': 3}
    choice = {'index': 0, 'text': 'look at the', 'finish_reason': 'stop'}
    answer = {'choices': [choice], 'usage': usage}
    with serve(lambda body, answer=answer: respond(200, answer)) as server:
      with pytest.raises(UserError, match=f'read {read} tokens of a prompt of 20.*max_positions'):
        ask(server, server='openai')
      assert len(server.bodies) == 1


@pytest.mark.parametrize('fault', servers.MALFORMED)
def test_an_answer_that_does_not_follow_the_api_is_retried(fault):
  content = changed(servers.MALFORMED[fault])
  with serve(lambda body: respond(200, content)) as server:
    with pytest.raises(UnreachableError, match='in 3 attempts.*does not follow the API'):
      ask(server)
    assert len(server.bodies) == 3


@pytest.mark.parametrize('data', [b'', b'[' * 10**5, b'\xff\xfe\x00', b'null', b'9' * 10**4])
def test_bytes_that_are_no_answer_are_retried(data):
  with serve(lambda body: respond(200, data)) as server:
    with pytest.raises(UnreachableError, match='does not follow the API'):
      ask(server, retries=1)
    assert len(server.bodies) == 2


def test_a_text_that_is_far_too_long_is_refused():
  choice = {'index': 0, 'text': 'look at the ' * 1000, 'finish_reason': 'length'}
  with serve(lambda body: respond(200, {'choices': [choice]})) as server:
    with pytest.raises(UserError, match='tokens, but the request asks for at most 40'):
      ask(server)


@pytest.mark.parametrize('stall', servers.stalls(b'{}'))
def test_a_whole_answer_has_a_deadline(stall):
  """A byte now and then keeps a socket's timeout from ending the request."""
  pieces = servers.stalls(json.dumps(HONEST).encode())[stall]
  with serve(lambda body: pieces) as server:
    begin = time.monotonic()
    with pytest.raises(UnreachableError, match='in 1 attempts'):
      ask(server, timeout_seconds=0.5, retries=0)
    assert time.monotonic() - begin < 3


@pytest.mark.parametrize('flood', FLOODS)
def test_the_size_of_an_answer_has_a_limit(flood):
  with serve(lambda body: FLOODS[flood]) as server:
    with pytest.raises(UnreachableError, match='more than [0-9]+ bytes'):
      ask(server, retries=0, timeout_seconds=20.0)


def test_a_compressed_answer_is_read():
  data = gzip.compress(json.dumps(HONEST).encode())
  with serve(lambda body: respond(200, data, {'Content-Encoding': 'gzip'})) as server:
    assert ask(server).text == 'look at the'
    for other, encoding in ((data[:-9], 'gzip'), (data, 'br'), (b'{}', 'gzip')):
      server.answer = lambda body, d=other, e=encoding: respond(200, d, {'Content-Encoding': e})
      with pytest.raises(UnreachableError, match='Content-Encoding|compress'):
        ask(server, retries=0)


def test_closing_ends_requests_in_flight():
  with serve(lambda body: [servers.FOREVER]) as server:
    remote = Remote(config_of(server, timeout_seconds=servers.FOREVER))
    future = remote.submit(TURN, np.array([5, 2], np.uint32))
    while not server.bodies:
      time.sleep(0.005)
    begin = time.monotonic()
    remote.close()
    with pytest.raises(UnreachableError, match='closed'):
      future.result(timeout=60)
    assert time.monotonic() - begin < 1


# Refusals and waits.


@pytest.mark.parametrize(
  ('status', 'error', 'advice'),
  [
    (401, {'message': 'no'}, 'Check that api_key_env names'),
    (403, {'message': 'no'}, 'Check that api_key_env names'),
    (404, {'message': 'The model `served` does not exist.'}, 'Check url and model'),
    (402, {'message': 'Insufficient balance'}, 'quota'),
    (429, {'message': 'You exceeded', 'code': 'insufficient_quota'}, 'quota'),
    (400, {'message': 'maximum context length is 512 tokens'}, 'Lower max_positions'),
    (422, {'message': '`inputs` must have less than 1024 tokens, too long'}, 'max_positions'),
    (400, {'message': 'Torch XLA does not support per-request seed.'}, "set seed='server'"),
    (400, {'message': 'top_k must be -1'}, 'status 400: top_k must be -1'),
    (501, {'message': 'no logprobs here'}, 'status 501'),
    (200, {'message': 'bad key', 'code': 401}, 'Check that api_key_env names'),
  ],
)
def test_a_lasting_refusal_ends_at_once_and_says_what_to_do(status, error, advice):
  with serve(lambda body: respond(status, {'error': error})) as server:
    with pytest.raises(UserError, match=advice) as caught:
      ask(server)
    assert len(server.bodies) == 1 and not isinstance(caught.value, UnreachableError)
    assert 'row 7' in str(caught.value)


@pytest.mark.parametrize(
  ('status', 'body'),
  [
    (200, {'error': {'message': 'engine is starting'}}),
    (200, {'object': 'error', 'message': 'overloaded', 'code': 503}),
    (200, b'<html>proxy error</html>'),
    (429, {'error': {'message': 'rate limit', 'code': 'rate_limit_exceeded'}}),
    (502, b'<html>bad gateway</html>'),
  ],
)
def test_a_passing_failure_is_retried(status, body):
  script = [respond(status, body), respond(200, HONEST)]
  with serve(lambda _: script.pop(0)) as server:
    assert ask(server).text == 'look at the'
    assert len(server.bodies) == 2


@pytest.mark.parametrize('status', [301, 302, 307, 308])
def test_a_redirect_is_not_followed(status, monkeypatch):
  monkeypatch.setenv(KEY_NAME, KEY)
  with serve(lambda body: respond(200, HONEST)) as other:
    target = {'Location': f'{other.url}/completions?key={KEY}'}
    with serve(lambda body: respond(status, b'', target)) as server:
      with pytest.raises(UserError, match='Redirects are not followed') as error:
        ask(server, api_key_env=KEY_NAME)
      assert f'to {other.url}/completions' in str(error.value) and KEY not in str(error.value)
    assert not other.headers


def test_a_wait_of_a_day_is_refused_and_a_malformed_one_is_ignored():
  for value in ('86400', '9' * 400, 'Fri, 31 Dec 9999 23:59:59 GMT'):
    with serve(lambda body, v=value: respond(429, {}, {'Retry-After': v})) as server:
      with pytest.raises(UnreachableError, match='asks to wait .* s .Retry-After.'):
        ask(server)
      assert len(server.bodies) == 1
  for value in (
    '-5',
    'soon',
    'nan',
    '1e9',
    'Thu, 01 Jan 1970 00:00:00 GMT',
    '',
    'Mon, 99 Xyz 2026',
  ):
    assert connection.parse_retry_after(value) == 0.0


def test_retries_end_after_a_time():
  with serve(lambda body: respond(503, {})) as server:
    with pytest.raises(UnreachableError, match='in 1 attempts'):
      ask(server, backoff_seconds=30.0, retries=8, give_up_seconds=5.0)
    server.answer = lambda body: respond(503, {}, {'Retry-After': '30'})
    with pytest.raises(UnreachableError, match='in 1 attempts'):
      ask(server, retries=8, give_up_seconds=5.0)


def test_a_filtered_reply_is_a_completion_without_text():
  """Case generation/12, and a server that refuses the prompt itself."""
  choice = {'index': 0, 'text': 'look at the', 'finish_reason': 'content_filter'}
  refusal = {'error': {'message': 'filtered', 'code': 'content_filter'}}
  for answer in (respond(200, {'choices': [choice]}), respond(400, refusal)):
    with serve(lambda body, answer=answer: answer) as server:
      completion = ask(server)
      assert (completion.tokens, completion.text, completion.logprobs) == ([], '', [])
      assert completion.finish_reason == 'content_filter' and len(server.bodies) == 1


# The API key.


@pytest.mark.parametrize('key', ['sk-secret\n', 'sk secret', '\x1b[31msk-secret', 'sk-sécret', ' '])
def test_a_key_that_cannot_be_sent_is_refused_without_showing_it(key, monkeypatch):
  monkeypatch.setenv(KEY_NAME, key)
  with serve(lambda body: respond(200, HONEST)) as server:
    with pytest.raises(UserError, match=f'{KEY_NAME}.*not shown') as error:
      ask(server, api_key_env=KEY_NAME)
    assert 'cret' not in str(error.value) and not server.headers


@pytest.mark.parametrize(
  'url',
  [
    f'http://me:{KEY}@host/v1',
    f'http://{KEY}@host/v1',
    f'http://host/v1?api_key={KEY}',
    f'http://host/v1#{KEY}',
    f'me:{KEY}@host',
    'http://[::1',
    'http://host:99999/v1',
    'http://ho st/v1',
    'http://host/v1\r\nX-Header: 1',
    'http://hóst/v1',
  ],
)
def test_a_url_that_cannot_be_used_or_holds_a_secret_is_refused(url):
  with pytest.raises(UserError, match='remote: url=.*must be the base URL') as error:
    RemoteConfig(url, 'served', FOLDER)
  assert KEY not in str(error.value)


def test_a_url_with_the_key_and_a_key_for_a_name_are_not_shown(monkeypatch):
  monkeypatch.setenv(KEY_NAME, KEY)
  config = RemoteConfig(f'http://host/{KEY}/v1', 'served', FOLDER, api_key_env=KEY_NAME)
  with pytest.raises(UserError, match='url .not shown. contains the API key') as error:
    Remote(config)
  assert KEY not in str(error.value)
  with pytest.raises(UserError, match='never the key itself') as error:
    RemoteConfig('http://host/v1', 'served', FOLDER, api_key_env='gsk_0aBcDeF')
  assert 'gsk_0aBcDeF' not in str(error.value)


def test_a_key_is_hidden_whole_or_in_part():
  for quoted in (KEY, KEY[:12], KEY[5:], f'{KEY}{KEY}'):
    assert hide(f'wrong key {quoted}!', KEY) == 'wrong key (key)!'
  assert hide('seen', KEY) == 'seen' and hide('key abc', 'abc') == 'key (key)'


def test_a_key_reaches_no_file_and_no_output(monkeypatch, tmp_path, capfd):
  """Neither from the environment, nor echoed by the server in its errors and answers."""
  monkeypatch.setenv(KEY_NAME, KEY)
  script = [respond(500, {'error': {'message': f'bad {KEY}'}}), respond(503, KEY.encode())]

  def answer(body):
    return script.pop(0) if script else respond(200, complete(body, TOKENIZER))

  with serve(answer) as server:
    run = served_run(server, tmp_path, api_key_env=KEY_NAME)
    pipeline.run_stages(run, ['generate'])
    assert {h['authorization'] for h in server.headers} == {f'Bearer {KEY}'}
    script[:] = [respond(401, f'<p>Unknown key {KEY}</p>'.encode())]
    errors = []
    for reply in (None, f'your key is {KEY}'):
      if reply:
        server.answer = lambda body: respond(200, complete(body, TOKENIZER) | {'note': reply})  # noqa: B023
      with pytest.raises(UserError) as error:
        ask(server, api_key_env=KEY_NAME)
      errors.append(str(error.value))
  assert 'Unknown key (key)' in errors[0] and 'API key in its answer' in errors[1]
  output = capfd.readouterr()
  shown = [output.out, output.err, *errors, repr(run)]
  assert not any(KEY in text for text in shown)
  files = [path for path in tmp_path.rglob('*') if path.is_file()]
  assert len(files) > 5 and not any(KEY.encode() in path.read_bytes() for path in files)


def test_the_environment_of_the_tests_has_no_key():
  assert KEY_NAME not in os.environ
