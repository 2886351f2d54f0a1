"""Critics and revisers behind a chat API on loopback that fails, stalls, limits its rate and is
asked by a process that is killed.

Every answer of the server is a function of its messages and its seed, and the server counts tokens
in its own way, so rows and costs can be compared with those of another run to the last token.
"""

import collections
import dataclasses
import functools
import hashlib
import json
import math
import re
import sys
import threading
import time

import numpy as np
import pytest
from transformers import AutoTokenizer

from cai_jax import pipeline
from cai_jax.data import d_cai
from cai_jax.dialogue import ChatDialogue
from cai_jax.pipeline.costs import read_costs
from cai_jax.pipeline.served_plan import describe_served
from cai_jax.runtime.errors import UnreachableError, UserError
from cai_jax.sampling.remote import Remote, RemoteConfig
from cai_jax.sampling.remote.connection import Connection
from cai_jax.sampling.remote.costs import Costs
from cai_jax.sampling.remote.pace import Pace
from cai_jax.sampling.types import SamplingConfig, Turn
from cai_jax.tiny.files import MODELS
from configs import tiny
from tests.faults.servers import FOREVER, respond, serve
from tests.pipeline_setup import start_one

WORDS = ('the brake', 'look at', 'kind words', 'nobody is hurt')
PRICES = {'price_input': 2.0, 'price_cached_input': 0.5, 'price_output': 8.0}
TESTS = 2  # test requests at a start: one for the critic and one for the reviser


def tokens_of(body):
  """Return the usage of a request, as only this server counts it, and the reply."""
  content = json.dumps(body['messages'])
  draw = hashlib.sha256(f'{content}{body.get("seed")}'.encode()).digest()
  text = ' '.join(WORDS[x % 4] for x in draw[: 1 + draw[5] % 3])
  read = 7 + len(content) // 3
  usage = {
    'prompt_tokens': read,
    'completion_tokens': len(text.split()) + 1,
    'prompt_tokens_details': {'cached_tokens': read // 4},
  }
  return usage, text


def answer(body):
  """An honest answer in a chat."""
  usage, text = tokens_of(body)
  message = {'role': 'assistant', 'content': text}
  choice = {'index': 0, 'message': message, 'finish_reason': 'stop'}
  return respond(200, {'choices': [choice], 'usage': usage})


def failures():
  """Responses that fail, one for each request until they are used up."""
  return [
    respond(429, {'error': {'message': 'slow down'}}, {'Retry-After': '0.05'}),
    [FOREVER],  # stalls
    respond(500, {'error': {'message': 'out of memory'}}),
    [b'HTTP/1.1 200 OK\r\nContent-Length: 500\r\n\r\n{"choices'],  # cut off
    respond(429, {'error': {'message': 'slow down'}}, {'Retry-After': '0.05'}),
    respond(200, {'choices': [{'finish_reason': 'stop', 'message': {'content': 3}}]}),
    respond(503, b'<html>busy</html>'),
  ]


def key_of(body):
  return json.dumps([body['messages'], body.get('seed')])


def expected_costs(bodies):
  """Return what the server counted for the requests that it answered."""
  costs = Costs()
  for body in bodies:
    usage, _ = tokens_of(body)
    costs.answers += 1
    costs.prompt_tokens += usage['prompt_tokens']
    costs.cached_tokens += usage['prompt_tokens_details']['cached_tokens']
    costs.completion_tokens += usage['completion_tokens']
  return costs


def counted(costs):
  """Return costs without the number of attempts, which failures change."""
  return dataclasses.replace(costs, attempts=0)


def chat_run(url, workdir, roles=('critique', 'revision'), **fields):
  """Return a small run whose critic and reviser are behind a chat API."""
  config = tiny.get_config()
  limits = {'harmful': 6, 'helpful': 3, 'eval_harmful': 2, 'eval_helpful': 1}
  for name, limit in limits.items():
    config.prompts[name].limit = limit
  config.feedback.rounds, config.feedback.shard_rows = 2, 2
  config.feedback.max_rate.update(dict.fromkeys(config.feedback.max_rate, 1.0))
  for turn in config.sampling.values():
    turn.max_tokens = 12
  config.engine.slots = 8
  config.train.update(helpfulness_share=0.2, batch_size=8, epochs=1, drop_truncated=False)
  address = {'url': url, 'model': 'served', 'tokenizer': str(MODELS['tiny']), 'prompt': 'chat'}
  quick = {'max_positions': 512, 'backoff_seconds': 0.01, 'max_concurrent': 4}
  for role in roles:
    config.remote[role].update(address | quick | PRICES | fields)
    if role == 'base':
      config.model.update(base='', init='tiny')
  return pipeline.build(config, workdir)


def rows_of(run):
  return list(d_cai.read_rows(run.workdir / 'd_cai'))


def show(rows):
  """Return rows in a form in which NaN equals NaN."""
  return json.dumps(rows)


def total(run):
  """Return what all served models of a run have cost, test requests included."""
  return functools.reduce(Costs.plus, read_costs(run).values(), Costs())


def test_a_run_with_a_chat_only_critic_that_fails_has_the_rows_and_costs_of_one_that_does_not(
  tmp_path,
):
  with serve(answer) as server:
    calm = chat_run(server.url, tmp_path / 'calm')
    pipeline.run_stages(calm, ['generate'])
    asked = list(server.bodies)
  faults, answered, lock = failures(), [], threading.Lock()

  def fail(body):
    with lock:
      fault = faults.pop() if faults and len(answered) >= TESTS else None
      if fault is None:
        answered.append(body)
    return fault or answer(body)

  with serve(fail) as server:
    rough = chat_run(server.url, tmp_path / 'rough', timeout_seconds=0.5)
    pipeline.run_stages(rough, ['generate'])
  rows = rows_of(calm)
  assert show(rows_of(rough)) == show(rows) and len(rows) == 9 and not faults
  assert collections.Counter(map(key_of, answered)) == collections.Counter(map(key_of, asked))
  # What is known, and what is not.
  for row in rows:
    assert row['initial']['ids_known'] and math.isfinite(row['initial']['logprob'])
    for step in row['rounds']:
      for turn in (step['critique'], step['revision']):
        assert not turn['ids_known'] and math.isnan(turn['logprob']) and turn['text']
  lengths = [row['initial']['num_tokens'] for row in rows]
  assert [sum(map(math.isfinite, row['logprobs'])) for row in rows] == lengths
  # Costs, to the token.
  for run, bodies in ((calm, asked), (rough, answered)):
    assert counted(total(run)) == expected_costs(bodies)
  assert total(rough).attempts == len(answered) + len(failures())
  manifest = json.loads((calm.workdir / 'manifest.json').read_text())
  assert manifest['stages']['generate']['ids_unknown'] == ['critique', 'revision']
  served = manifest['stages']['generate']['served']
  assert set(served) == {'critique', 'revision'}
  sums = served['critique']
  price = (sums['prompt_tokens'] - sums['cached_tokens']) * 2 + sums['cached_tokens'] * 0.5
  assert sums['price'] == pytest.approx((price + sums['completion_tokens'] * 8) / 1e6, rel=1e-12)
  assert sums['answers'] == 12 and sums['uncounted'] == 0


def test_messages_have_the_roles_of_chat_templates(tmp_path):
  with serve(answer) as server:
    run = chat_run(server.url, tmp_path)
    pipeline.run_stages(run, ['generate'])
  row = next(row for row in rows_of(run) if row['rounds'])
  principles = {p.id: p for p in run.constitution.principles}
  step = row['rounds'][0]
  principle = principles[step['principle']]
  contents = [row['initial']['text'], principle.critique_request, step['critique']['text']]
  contents.append(principle.revision_request)
  roles = ('assistant', 'user', 'assistant', 'user')
  prompt = [dict(message) for message in row['prompt']]
  expected = [*prompt, *({'role': r, 'content': c} for r, c in zip(roles, contents, strict=True))]
  sent = [body['messages'] for body in server.bodies]
  assert expected in sent and expected[:-2] in sent
  assert not any({'logprobs', 'prompt', 'return_token_ids'} & body.keys() for body in server.bodies)


def test_an_outage_ends_the_run_and_nothing_is_asked_twice(tmp_path):
  answered, lock = [], threading.Lock()

  def break_down(body):
    with lock:
      if len(answered) >= TESTS + 9:
        return respond(500, {'error': {'message': 'out of order'}})
      answered.append(body)
    return answer(body)

  with serve(break_down) as server:
    run = chat_run(server.url, tmp_path, retries=0)
    with pytest.raises(UnreachableError, match='out of order'):
      pipeline.run_stages(run, ['generate'])
  with serve(answer) as server:
    again = chat_run(server.url, tmp_path)
    pipeline.run_stages(again, ['generate'])
    everything = [*answered, *server.bodies]
    asked = collections.Counter(map(key_of, everything))
    repeated = {key for key, count in asked.items() if count > 1}
    tests = {key_of(body) for body in server.bodies[:TESTS]}
    assert repeated <= tests and len(rows_of(again)) == 9
    assert counted(total(again)) == expected_costs(everything)


PROGRAM = """
import sys
from cai_jax import pipeline
from tests.test_chat_servers import chat_run
pipeline.run_stages(chat_run(sys.argv[1], sys.argv[2], timeout_seconds=60.0), ['generate'])
"""


@pytest.mark.slow
def test_nothing_is_asked_twice_after_a_kill(tmp_path):
  """A process is killed while its next requests stall, and another one continues."""
  answered, lock, full = [], threading.Lock(), threading.Event()
  allowed = TESTS + 10

  def stall(body):
    with lock:
      if len(answered) == allowed:
        full.set()
        return [FOREVER]
      answered.append(body)
    return answer(body)

  def stored():
    paths = (tmp_path / 'run' / 'journal').glob('turns-*.jsonl')
    return sum(path.read_bytes().count(b'"usage"') for path in paths)

  with serve(stall) as server:
    process = start_one([sys.executable, '-c', PROGRAM, server.url, str(tmp_path / 'run')], 1)
    try:
      assert full.wait(120)
      deadline = time.monotonic() + 60
      while stored() < 10 and time.monotonic() < deadline:
        time.sleep(0.05)
    finally:
      process.kill()
      process.wait()
  assert stored() == 10
  with serve(answer) as server:
    run = chat_run(server.url, tmp_path / 'run')
    pipeline.run_stages(run, ['generate'])
    everything = [*answered, *server.bodies]
  with serve(answer) as server:
    whole = chat_run(server.url, tmp_path / 'whole')
    pipeline.run_stages(whole, ['generate'])
  assert show(rows_of(run)) == show(rows_of(whole))
  asked = collections.Counter(map(key_of, everything))
  tests = {key_of(body) for body in everything if len(body['messages']) == 1}
  assert {key for key, count in asked.items() if count > 1} <= tests
  assert counted(total(run)) == expected_costs(everything)


@pytest.mark.slow
def test_all_stages_work_when_every_reply_is_text_only(tmp_path):
  """M_θ is behind a chat API too: training, evaluation and report need no ids of replies."""
  with serve(answer) as server:
    run = chat_run(server.url, tmp_path, roles=('base',))
    pipeline.run_stages(run)
    assert counted(total(run)) == expected_costs(server.bodies)
  page = (tmp_path / 'report.html').read_text()
  assert 'Costs of served models' in page and 'remote.base (served)' in page
  assert 'NaN' not in re.search('(?s)"rounds":.*', page)[0]
  rows = [json.loads(x) for x in (tmp_path / 'quality_rows.jsonl').read_text().splitlines()]
  assert rows and not any('mean_logprob' in row['scores'] for row in rows)


def test_the_dry_run_gives_bounds_that_hold(tmp_path):
  with serve(answer) as server:
    run = chat_run(server.url, tmp_path)
    text = describe_served(run, ['generate'])
    assert not server.bodies and describe_served(run, ['train']) == ''
    pipeline.run_stages(run, ['generate'])
  dialogue = ChatDialogue(AutoTokenizer.from_pretrained(MODELS['tiny']))
  real = [body for body in server.bodies if len(body['messages']) > 1]
  read = sum(len(dialogue.prompt(body['messages'])) for body in real)
  lines = text.splitlines()
  assert [line.split(' (')[0] for line in lines] == ['remote.critique', 'remote.revision']
  numbers = [
    [int(n.replace(',', '')) for n in re.findall(r'(?<= )[\d,]*\d(?= )', x)] for x in lines
  ]
  assert [n[0] for n in numbers] == [12, 12] and len(real) == 24
  assert [n[2] for n in numbers] == [12 * 12] * 2  # each reply at its limit
  assert read <= sum(n[1] for n in numbers) < 2 * read
  price = (numbers[0][1] * PRICES['price_input'] + 144 * PRICES['price_output']) / 1e6
  assert lines[0].endswith(f'price up to about {price:.2g}')


def test_a_pace_spreads_requests_and_gives_tokens_back():
  now = [100.0]
  pace = Pace(requests_per_minute=60, tokens_per_minute=0, clock=lambda: now[0])
  assert [pace.start(5), pace.start(5), pace.start(5)] == [0, 1, 1]
  now[0] += 1
  assert [pace.start(5), pace.start(5)] == [0, 1]
  pace.pause(7)
  assert pace.start(5) == 7
  now[0] += 7
  assert [pace.start(5), pace.start(5)] == [0, 1]
  pace = Pace(requests_per_minute=0, tokens_per_minute=600, clock=lambda: now[0])
  assert [pace.start(100), pace.start(50)] == [0, 10]  # 100 tokens take 10 s
  pace.settle(reserved=100, used=20)
  assert pace.start(50) == pytest.approx(2)


def make_config(server, **fields):
  address = {'url': server.url, 'model': 'served', 'tokenizer': str(MODELS['tiny'])}
  return RemoteConfig(**address, prompt='chat', backoff_seconds=0.01, **fields)


def ask(server, text='Hello', **fields):
  """Ask a server one question, and return the completion."""
  remote = Remote(make_config(server, **fields))
  dialogue = ChatDialogue(remote.tokenizer)
  messages = [{'role': 'user', 'content': text}]
  sampling = SamplingConfig(max_tokens=9, stop=('brake',))
  turn = Turn('initial', dialogue.prompt(messages), sampling, 'base', dialogue.messages(messages))
  try:
    return remote.submit(turn, np.array([1, 2], np.uint32), (), sampling.stop).result(timeout=60)
  finally:
    remote.close()


def reply(**fields):
  """Return a server's response whose choice has some fields."""
  choice = {'message': {'content': 'kind words'}, 'finish_reason': 'stop'} | fields
  return lambda body: respond(200, {'choices': [choice]})


@pytest.mark.parametrize(
  ('fields', 'text', 'reason'),
  [
    ({}, 'kind words', 'stop'),
    ({'message': {'content': 'look at the brake now'}}, 'look at the ', 'stop_text'),
    ({'message': {'content': None, 'refusal': 'I will not.'}}, 'I will not.', 'stop'),
    ({'message': {'content': None}, 'finish_reason': 'length'}, '', 'length'),
    ({'message': None, 'finish_reason': 'content_filter'}, '', 'content_filter'),
  ],
)
def test_what_a_chat_answers(fields, text, reason):
  with serve(reply(**fields)) as server:
    completion = ask(server)
  assert (completion.text, completion.finish_reason) == (text, reason)
  assert len(completion.logprobs) == len(completion.tokens)
  assert all(map(math.isnan, completion.logprobs))
  assert completion.usage.total is None  # the server does not say


def test_requests_keep_the_pace_of_the_config_and_wait_when_the_server_asks(tmp_path):
  times, lock = [], threading.Lock()

  def limit(body):
    with lock:
      times.append(time.monotonic())
      first = len(times) == 1
    asks = respond(429, {'error': {'message': 'slow down'}}, {'Retry-After': '0.5'})
    return asks if first else answer(body)

  with serve(limit) as server:
    connection = Connection(make_config(server, requests_per_minute=1200.0, max_concurrent=8))
    body = {'messages': []}
    futures = [
      connection.submit(
        lambda: connection.post('/x', body, lambda data, n: n, 'a question', b'', 1 << 20)
      )
      for _ in range(8)
    ]
    assert sorted(future.result(timeout=60) for future in futures) == [1] * 7 + [2]
    connection.close()
  gaps = np.diff(times)
  assert gaps.min() > 0.03 and len(times) == 9  # 0.05 s apart, but for the server's threads
  assert sum(t - times[0] > 0.45 for t in times) >= 6  # some were sent before the answer came


def test_the_name_of_the_limit_is_that_of_the_config():
  with serve(answer) as server:
    ask(server)
    ask(server, limit_field='max_completion_tokens')
  first, second = server.bodies
  assert first['max_tokens'] == second['max_completion_tokens'] == 9
  assert 'max_tokens' not in second


def test_thoughts_in_a_text_are_refused_before_the_run(tmp_path):
  with serve(reply(message={'content': '<think>Hm.</think> kind'})) as server:
    with pytest.raises(UserError, match='remote.critique: .*parser for reasoning'):
      pipeline.run_stages(chat_run(server.url, tmp_path), ['generate'])


def test_a_reply_without_text_ends_its_chain(tmp_path):
  with serve(reply(message={'content': ''})) as server:
    with pytest.raises(UserError, match='No row remains|An earlier reply is empty'):
      run = chat_run(server.url, tmp_path)
      run = dataclasses.replace(run, prompts={**run.prompts, 'helpful': []})
      pipeline.run_stages(run, ['generate'])
