"""The batch interface: requests are written to files, and a run continues with their answers."""

import collections
import dataclasses
import json
import re

import pytest

from cai_jax import cli, pipeline
from cai_jax.feedback.chain import Round, register_rounds, sample_critique, sample_revision
from cai_jax.feedback.variants import VARIANTS
from cai_jax.pipeline.costs import read_costs
from cai_jax.runtime.errors import UserError, WaitingError
from cai_jax.sampling.remote.batch import Batch
from tests.faults.servers import free_port, serve
from tests.test_chat_servers import (
  answer,
  chat_run,
  counted,
  expected_costs,
  key_of,
  rows_of,
  show,
  tokens_of,
)

pytestmark = pytest.mark.usefixtures('single_device')


def batch_run(workdir, **fields):
  """Return a run of one round in which a batch answers every turn; no server listens."""
  url = f'http://127.0.0.1:{free_port()}/v1'
  run = chat_run(url, workdir, roles=('base',), batch=str(workdir / 'batch'), **fields)
  return one_round(run)


def one_round(run, **changes):
  feedback = dataclasses.replace(run.config.feedback, rounds=1, **changes)
  return dataclasses.replace(run, config=dataclasses.replace(run.config, feedback=feedback))


def read_lines(path):
  return [json.loads(line) for line in path.read_text().splitlines()]


def answer_line(request, **fields):
  """Return the line of an honest answer, as vLLM's run_batch writes it."""
  usage, text = tokens_of(request['body'])
  choice = {'index': 0, 'message': {'content': text}, 'finish_reason': 'stop'}
  response = {'status_code': 200, 'request_id': 'x', 'body': {'choices': [choice], 'usage': usage}}
  line = {'id': 'y', 'custom_id': request['custom_id'], 'response': response, 'error': None}
  return json.dumps(line | fields) + '\n'


def answer_all(folder, done):
  """Answer the files of requests that are not in `done`, in reverse order; return the requests."""
  requests = []
  for path in sorted(folder.glob('requests-*.jsonl')):
    if path not in done:
      done.add(path)
      lines = read_lines(path)
      requests += lines
      (folder / f'answers-{len(done)}.jsonl').write_text(''.join(map(answer_line, lines[::-1])))
  return requests


def test_a_run_goes_on_batch_by_batch_to_the_rows_of_a_live_server(tmp_path):
  with serve(answer) as server:
    live = one_round(chat_run(server.url, tmp_path / 'live', roles=('base',)))
    pipeline.run_stages(live, ['generate'])
  run, done, batches = batch_run(tmp_path / 'run'), set(), []
  folder = run.workdir / 'batch'
  while len(batches) < 3:  # initial, critique, revision
    with pytest.raises(WaitingError, match='chains wait.* new requests.*start the same command'):
      pipeline.run_stages(run, ['generate'])
    with pytest.raises(WaitingError, match='written before have no answer'):
      pipeline.run_stages(run, ['generate'])  # nothing is written twice
    batches.append(answer_all(folder, done))
  pipeline.run_stages(run, ['generate'])
  assert show(rows_of(run)) == show(rows_of(live))
  assert [len(requests) for requests in batches] == [9, 6, 6]
  requests = [request for batch in batches for request in batch]
  bodies = [request['body'] for request in requests]
  assert max(collections.Counter(map(key_of, bodies)).values()) == 1
  assert {(r['method'], r['url']) for r in requests} == {('POST', '/v1/chat/completions')}
  assert all(len(request['custom_id']) <= 64 for request in requests)
  assert counted(read_costs(run)['base']) == expected_costs(bodies)
  for path in folder.iterdir():  # the journal is the memory
    path.unlink()
  (run.workdir / 'manifest.json').unlink()
  pipeline.run_stages(run, ['generate'])
  assert not list(folder.iterdir())


def test_a_request_whose_answer_is_an_error_is_written_again(tmp_path):
  batch = Batch(tmp_path, 'abc', '/chat/completions', attempts=2)
  batch.ask('key', {'model': 'm'}, 'a turn')
  batch.ask('other', {'model': 'm'}, 'another turn')
  [first] = batch.write()
  assert [line['url'] for line in read_lines(first)] == ['/v1/chat/completions'] * 2
  expired = {'response': None, 'error': {'code': 'batch_expired'}}
  for name in ('errors.jsonl', 'requests-abc-0001_error.jsonl'):  # the same error, in two files
    (tmp_path / name).write_text(json.dumps({'custom_id': 'key'} | expired) + '\n\n')
  batch = Batch(tmp_path, 'abc', '/chat/completions', attempts=2)
  batch.ask('key', {'model': 'm'}, 'a turn')
  batch.ask('other', {'model': 'm'}, 'another turn')
  assert (batch.new, batch.waiting) == (1, 1) and batch.answer('key') is None
  [second] = batch.write()
  assert [line['custom_id'] for line in read_lines(second)] == ['key-2'] and second != first
  (tmp_path / 'errors.jsonl').unlink()  # what a later attempt has replaced is not missed
  batch = Batch(tmp_path, 'abc', '/chat/completions', attempts=2)
  batch.ask('key', {'model': 'm'}, 'a turn')
  assert (batch.new, batch.waiting, batch.failures) == (0, 1, [])
  failed = {'custom_id': 'key-2', 'response': {'status_code': 500, 'body': {}}, 'error': None}
  (tmp_path / 'more.jsonl').write_text(json.dumps(failed) + '\n')
  batch = Batch(tmp_path, 'abc', '/chat/completions', attempts=2)
  batch.ask('key', {'model': 'm'}, 'a turn')
  assert (batch.new, batch.waiting) == (0, 0)
  assert re.search(
    "a turn: .*attempt 2.*status_code.*'key-2'.*delete the lines", batch.describe_failures()
  )
  # The message's advice helps: the request is written again.
  (tmp_path / 'more.jsonl').unlink()
  second.unlink()
  batch = Batch(tmp_path, 'abc', '/chat/completions', attempts=2)
  batch.ask('key', {'model': 'm'}, 'a turn')
  assert [json.loads(x)['custom_id'] for x in batch.write()[0].open()] == ['key-2']
  body = {'choices': []}
  right = {'custom_id': 'key', 'response': {'status_code': 200, 'body': body}}
  (tmp_path / 'right.jsonl').write_text(json.dumps(right) + '\n')
  batch = Batch(tmp_path, 'abc', '/chat/completions', attempts=2)
  assert json.loads(batch.answer('key')) == body


def test_answers_are_told_from_requests_by_their_content(tmp_path):
  batch = Batch(tmp_path, 'n', '/completions', attempts=1)
  batch.ask('key', {'model': 'm'}, 'a turn')
  [path] = batch.write()
  assert Batch(tmp_path, 'n', '/completions', attempts=1).answer('key') is None
  line = {'custom_id': 'key', 'response': {'status_code': 200, 'body': {'choices': [3]}}}
  (tmp_path / 'requests-n-0001_output.jsonl').write_text(json.dumps(line) + '\n')
  path.rename(tmp_path / 'asked.jsonl')
  batch = Batch(tmp_path, 'n', '/completions', attempts=1)
  assert json.loads(batch.answer('key')) == {'choices': [3]}


def error_line(request, code, status=400):
  """Return the line of an answer that is an error of the server."""
  response = {'status_code': status, 'body': {'error': {'code': code, 'message': 'no'}}}
  return answer_line(request, response=response)


def test_a_refused_prompt_ends_its_chain_and_other_requests_are_written(tmp_path):
  run = batch_run(tmp_path)
  with pytest.raises(WaitingError):
    pipeline.run_stages(run, ['generate'])
  folder = tmp_path / 'batch'
  [path] = folder.glob('requests-*.jsonl')
  requests = read_lines(path)  # 6 harmful and 3 helpful prompts
  withheld, refused, *others = requests
  lines = [error_line(withheld, 'content_filter'), error_line(refused, 'invalid_prompt')]
  (folder / 'answers.jsonl').write_text(''.join([*lines, *map(answer_line, others)]))
  with pytest.raises(UserError, match='invalid_prompt.*custom_id.* new requests') as error:
    pipeline.run_stages(run, ['generate'])
  assert not isinstance(error.value, WaitingError)
  [_, later] = sorted(folder.glob('requests-*.jsonl'))
  critiques = read_lines(later)  # of all chains but two
  harmful = sum(len(r['body']['messages']) > 1 for r in critiques)
  assert len(critiques) == harmful == 4
  ids = {r['custom_id'] for r in critiques}
  assert not ids & {r['custom_id'] for r in requests}  # the refused one is not written again


@pytest.fixture
def refused_prompts():
  """Texts of prompts; the variant 'picky' fails after the critique of such a prompt."""
  texts: set[str] = set()

  @register_rounds('picky', 'critique', 'revision')
  def revise(number, principle, context, stages):
    critique = yield from sample_critique(number, principle, context, stages)
    if context[0]['content'] in texts:
      raise UserError('the reply is none of the labels.')
    revision = yield from sample_revision(number, principle, context, stages)
    return Round(principle, critique, revision)

  yield texts
  VARIANTS.unregister('picky')


def test_a_chain_that_fails_does_not_keep_requests_of_others_from_being_written(
  refused_prompts, tmp_path
):
  run, done = one_round(batch_run(tmp_path), variant='picky'), set()
  for _ in range(2):  # initial, critique
    with pytest.raises(WaitingError):
      pipeline.run_stages(run, ['generate'])
    answer_all(tmp_path / 'batch', done)
  refused_prompts |= {prompt.messages[0]['content'] for prompt in run.prompts['harmful'][:3]}
  expected = "Chain '.*': the reply is none .*failed: 1. 3 chains wait.* 3 new requests"
  with pytest.raises(UserError, match=expected) as error:
    pipeline.run_stages(run, ['generate'])
  assert not isinstance(error.value, WaitingError)
  assert len(answer_all(tmp_path / 'batch', done)) == 3
  refused_prompts.clear()
  with pytest.raises(WaitingError, match='3 chains wait.* 3 new requests'):
    pipeline.run_stages(run, ['generate'])
  answer_all(tmp_path / 'batch', done)
  pipeline.run_stages(run, ['generate'])
  assert len(rows_of(run)) == 9


@pytest.mark.parametrize(
  'line',
  ['{"custom_id": 3}', '[]', 'nonsense', '{"error": null}', '{"custom_id": "k", "error": null}'],
)
def test_a_file_that_is_no_batch_is_named_with_its_line(line, tmp_path):
  (tmp_path / 'answers.jsonl').write_text('\n' + line + '\n')
  with pytest.raises(UserError, match='answers.jsonl, line 2 is no line of a batch'):
    Batch(tmp_path, 'abc', '/completions', attempts=1)


def test_an_answer_that_contradicts_its_request_is_named(tmp_path):
  run = batch_run(tmp_path)
  with pytest.raises(WaitingError):
    pipeline.run_stages(run, ['generate'])
  [path] = (tmp_path / 'batch').glob('requests-*.jsonl')
  requests = read_lines(path)
  body = {'choices': [{'message': {'content': 'x'}, 'finish_reason': 'tool_calls'}]}
  response = {'status_code': 200, 'body': body}
  lines = ''.join(answer_line(request, response=response) for request in requests)
  (tmp_path / 'batch' / 'answers.jsonl').write_text(lines)
  with pytest.raises(UserError, match='does not fit its request.*tool_calls.*custom_id.*7 more'):
    pipeline.run_stages(run, ['generate'])


def test_the_program_ends_with_a_status_of_its_own(capsys):
  with pytest.raises(SystemExit) as ended, cli.short_errors():
    raise WaitingError('9 chains wait for the answers of a batch.')
  assert ended.value.code == 75
  assert capsys.readouterr().err == '9 chains wait for the answers of a batch.\n'
