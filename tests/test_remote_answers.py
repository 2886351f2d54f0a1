"""Served models that lie, stall, flood or refuse: an error at once, a retry, or a recorded end."""

import contextlib
import dataclasses
import gzip
import hashlib
import json
import os
import time

import numpy as np
import pytest
import transformers

from cai_jax import pipeline
from cai_jax.data import d_cai
from cai_jax.data.ended import read_ended
from cai_jax.model.folder import load_vocabulary
from cai_jax.runtime.errors import UnreachableError, UserError
from cai_jax.sampling.remote import Remote, RemoteConfig, connection
from cai_jax.sampling.remote.api_key import hide
from cai_jax.sampling.types import SamplingConfig, Turn
from cai_jax.tiny.files import MODELS as TINY
from configs import tiny
from tests.faults import servers
from tests.faults.servers import complete, respond, serve

FOLDER = str(TINY['tiny'])
TOKENIZER = transformers.PreTrainedTokenizerFast.from_pretrained(FOLDER)
EOS = TOKENIZER.eos_token_id
KEY_NAME, KEY = 'CAI_JAX_TEST_KEY', 'sk-never/to+be&seen-0123456789'
TURN = Turn('initial', list(range(30, 50)), SamplingConfig(max_tokens=40))
FLOODS = servers.floods()
HONEST = complete({'prompt': TURN.context, 'max_tokens': 40}, TOKENIZER)


def config_of(running, **fields):
  defaults = {'server': 'vllm', 'max_positions': 1024, 'backoff_seconds': 0.0, 'retries': 2}
  address = {'url': running.url, 'model': 'served', 'tokenizer': FOLDER}
  return RemoteConfig(**address | defaults | fields)


def ask(running, turn=TURN, **fields):
  with contextlib.closing(Remote(config_of(running, **fields))) as remote:
    key = np.array([5, 2], np.uint32)
    return remote.submit(turn, key, (EOS,), (), 'row 7').result(timeout=60)


def changed(change):
  answer = json.loads(json.dumps(HONEST))
  change(answer)
  return answer


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


# The start of a run.


def served_run(running, workdir, prompts='', role='critique', **fields):
  config = tiny.get_config()
  for name, limit in (('harmful', 4), ('helpful', 2), ('eval_harmful', 2), ('eval_helpful', 1)):
    config.prompts[name].limit = limit
  if prompts:
    config.prompts.harmful.update(source=str(prompts), name='', limit=-1)
  config.feedback.rounds = 1
  config.feedback.max_rate.update(
    dict.fromkeys(config.feedback.max_rate, 1.0)
  )  # texts of 12 tokens
  for turn in config.sampling.values():
    turn.max_tokens = 12
  config.engine.slots = 8
  config.train.helpfulness_share = 0.2
  address = {'url': running.url, 'model': 'served', 'tokenizer': FOLDER, 'server': 'vllm'}
  config.remote[role].update(address | {'max_positions': 256, 'backoff_seconds': 0.01} | fields)
  if role == 'base':
    config.model.update(base='', init='tiny')
  return pipeline.build(config, workdir)


def without_seed(body):
  """Answer as a server that refuses seeds (case generation/14)."""
  if 'seed' in body:
    message = 'a seed for one request is not supported on this platform'
    return respond(400, {'object': 'error', 'message': message, 'code': 400})
  return respond(200, complete(body, TOKENIZER))


def test_a_server_that_refuses_seeds_is_asked_without(tmp_path):
  lines = []
  with serve(without_seed) as server:
    run = served_run(server, tmp_path / 'fallback')
    pipeline.run_stages(run, ['generate'], lines.append)
    assert [('seed' in body) for body in server.bodies] == [True] + [False] * 5
    manifest = json.loads((tmp_path / 'fallback' / 'manifest.json').read_text())
    assert manifest['stages']['generate']['server_draws'] == ['critique']
    assert sum('refuses seeds' in line and 'remote.critique' in line for line in lines) == 1
    # A restart keeps the texts, because the journal has them.
    asked = len(server.bodies)
    (tmp_path / 'fallback' / 'manifest.json').unlink()
    pipeline.run_stages(run, ['generate'], lines.append)
    assert len(server.bodies) == asked + 2
    # Users who know it beforehand say so.
    known = served_run(server, tmp_path / 'known', seed='server')
    known = dataclasses.replace(known, journal=tmp_path / 'fallback' / 'journal')
    pipeline.run_stages(known, ['generate'], lines.append)
    assert len(server.bodies) == asked + 3 and 'seed' not in server.bodies[-1]
    with pytest.raises(UserError, match="set seed='server'"):
      ask(server)


def test_who_draws_is_part_of_the_journal_key_and_other_keys_stay():
  with serve(without_seed) as server:
    plain, drawn = (Remote(config_of(server, seed=seed)) for seed in ('turn', 'server'))
    before = ['remote', 'served', '', 'vllm', 'tokens', load_vocabulary(FOLDER).fingerprint]
    assert plain.fingerprint == hashlib.sha256(json.dumps(before).encode()).hexdigest()
    assert drawn.fingerprint != plain.fingerprint
    assert 'seed' not in plain.config.identity() and drawn.config.identity()['seed'] == 'server'
    plain.close(), drawn.close()


def test_a_test_request_has_the_settings_of_the_run(tmp_path):
  with serve(lambda body: respond(200, complete(body, TOKENIZER))) as server:
    run = served_run(server, tmp_path)
    pipeline.run_stages(run, ['generate'])
    probe, *others = server.bodies
    assert set(probe) == set(others[0]) and len(others) == 4
    assert probe['stop_token_ids'] == others[0]['stop_token_ids']
    control = set(TOKENIZER.all_special_ids)
    assert control & set(probe['prompt']) == control & set(others[0]['prompt'])


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    (servers.LIES['prompt in a template'], 'remote.critique: .*contradicts a test request'),
    (servers.LIES['ids of another text'], 'Set tokenizer to that of the served model'),
  ],
)
def test_a_lying_server_is_found_before_sampling(change, message, tmp_path):
  def answer(body):
    content = complete(body, TOKENIZER)
    change(content)
    return respond(200, content)

  with serve(answer) as server:
    with pytest.raises(UserError, match=message):
      pipeline.run_stages(served_run(server, tmp_path), ['generate'])
    assert len(server.bodies) == 1 and not (tmp_path / 'journal').exists()


def test_a_server_that_cuts_long_contexts_is_found_before_sampling(tmp_path):
  """It does not say how long its contexts may be, so a long one is tried."""

  def answer(body):
    content = complete(body, TOKENIZER)
    content['usage']['prompt_tokens'] = min(len(body['prompt']), 200)
    return respond(200, content)

  with serve(answer, {'data': [{'id': 'served'}]}) as server:
    with pytest.raises(UserError, match='read 200 tokens of a prompt of 244'):
      pipeline.run_stages(served_run(server, tmp_path), ['generate'])
    pipeline.run_stages(served_run(server, tmp_path, max_positions=200), ['generate'])


def test_a_tokenizer_of_another_model_is_found_before_sampling(tmp_path):
  """The server returns no ids, so only the number of tokens of a text tells."""

  def answer(body):
    prompt = body['prompt']
    read = len(prompt) if isinstance(prompt, list) else len(prompt.split())
    choice = {'index': 0, 'text': 'look at the', 'finish_reason': 'stop'}
    return respond(200, {'choices': [choice], 'usage': {'prompt_tokens': read}})

  with serve(answer) as server:
    with pytest.raises(UserError, match='Set tokenizer to that of the served model'):
      pipeline.run_stages(served_run(server, tmp_path, server='openai'), ['generate'])
    assert len(server.bodies) == 2


def test_a_context_that_the_server_cannot_read_is_not_sent():
  with serve(lambda body: respond(200, complete(body, TOKENIZER))) as server:
    with contextlib.closing(Remote(config_of(server, max_positions=59))) as remote:
      with pytest.raises(UserError, match='20 tokens and a reply of up to 40 exceed max_positions'):
        remote.check_turn(TURN)
      remote.check_turn(dataclasses.replace(TURN, context=TURN.context[1:]))
    spelled = TOKENIZER.encode('<|end|>', add_special_tokens=False, split_special_tokens=True)
    with contextlib.closing(Remote(config_of(server, prompt='text'))) as remote:
      with pytest.raises(UserError, match='spells a control token'):
        remote.check_turn(dataclasses.replace(TURN, context=[*TURN.context, *spelled]))


def test_a_control_token_in_a_prompt_is_found_before_a_text_server_is_asked(tmp_path):
  """Case generation/16: the server would read the text as that token."""
  control = next(iter(TOKENIZER.added_tokens_decoder.values())).content
  rows = ['How do I paint the bed?', 'How do I wash the cup?', f'What does {control} do?']
  prompts = tmp_path / 'prompts.jsonl'
  prompts.write_text(''.join(json.dumps({'prompt': row}) + '\n' for row in rows))
  text = {'prompt': 'text', 'server': 'tgi', 'model': 'tgi'}
  with serve(lambda body: respond(200, {}), {'data': [{'id': 'tgi'}]}) as server:
    with pytest.raises(
      UserError, match='remote.critique: prompts.harmful: .*prompts.jsonl.*3.*control token'
    ):
      pipeline.run_stages(served_run(server, tmp_path / 'run', prompts, **text), ['generate'])
    assert not server.headers and not (tmp_path / 'run' / 'journal').exists()


def test_a_withheld_reply_ends_its_chain_and_not_the_run(tmp_path):
  """A red-team prompt is passed over, and stays so after a restart."""

  def answer(body):
    if len(server.bodies) == 3:
      choice = {'index': 0, 'text': '', 'finish_reason': 'content_filter'}
      return respond(200, {'choices': [choice]})
    return respond(200, complete(body, TOKENIZER))

  with serve(answer) as server:
    run = served_run(server, tmp_path, max_concurrent=1)
    pipeline.run_stages(run, ['generate'])
    [ended] = read_ended(tmp_path / 'd_cai')
    assert ended['turn'] == 'critique_1' and 'content_filter' in ended['reason']
    rows = list(d_cai.read_rows(tmp_path / 'd_cai'))
    assert len(rows) == 5 and ended['id'] not in {row['id'] for row in rows}
    (tmp_path / 'manifest.json').unlink()
    pipeline.run_stages(run, ['generate'])
    assert read_ended(tmp_path / 'd_cai') == [ended] and len(server.bodies) == 1 + 4 + 1


def test_a_reply_that_a_text_server_would_misread_ends_its_chain(tmp_path):
  control = TOKENIZER.decode([EOS])

  def answer(body):
    text = f'say {control} now' if len(server.bodies) == 3 else 'look at the'
    choice = {'index': 0, 'text': text, 'finish_reason': 'eos_token'}
    return respond(200, {'choices': [choice]})

  with serve(answer, {'data': [{'id': 'tgi'}]}) as server:
    text = {'prompt': 'text', 'server': 'tgi', 'model': 'tgi', 'max_concurrent': 1}
    run = served_run(server, tmp_path, role='base', **text)
    pipeline.run_stages(run, ['generate'])
    [ended] = read_ended(tmp_path / 'd_cai')
    assert ended['turn'] == 'critique_1' and 'spells a control token' in ended['reason']


def test_servers_listed_strangely_are_refused():
  for models in ([], {'data': [{'id': ['x']}]}, {'data': 7}, {}, [[]]):
    with serve(lambda body: respond(200, HONEST), respond(200, models)) as server:
      with contextlib.closing(Remote(config_of(server))) as remote, pytest.raises(UserError):
        remote.check()
  for pieces in (
    [servers.FOREVER],
    respond(401, {'error': 'who?'}),
    respond(302, b'', {'Location': 'http://elsewhere/'}),
    servers.stalls(b'{}')['a dripping header'],
  ):
    with serve(lambda body: respond(200, HONEST), pieces) as server:
      config = config_of(server, timeout_seconds=0.5)
      with contextlib.closing(Remote(config)) as remote, pytest.raises(UserError):
        remote.check()


def test_the_environment_of_the_tests_has_no_key():
  assert KEY_NAME not in os.environ
