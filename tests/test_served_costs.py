"""Whose costs are counted: those of the run's own models and shards, old turns as uncounted."""

import contextlib
import dataclasses
import shutil

import pytest

from cai_jax import pipeline
from cai_jax.feedback import generate
from cai_jax.pipeline.costs import read_costs
from cai_jax.pipeline.models import judge_journal
from cai_jax.sampling.journal import Journal, read_usage
from cai_jax.sampling.remote.costs import Costs, sum_usage
from cai_jax.sampling.types import Completion, SamplingConfig, Turn
from cai_jax.scoring import judge_client
from cai_jax.scoring.judge_answers import JudgeAnswer
from cai_jax.scoring.judge_client import JudgeClient
from cai_jax.scoring.judge_remote import remote_judge
from cai_jax.scoring.judge_server import JudgeServer
from tests.faults.servers import respond, serve
from tests.test_chat_servers import (
  answer,
  chat_run,
  counted,
  expected_costs,
  tokens_of,
)
from tests.test_judge_remote import MATCHES

pytestmark = pytest.mark.usefixtures('single_device')

MODEL_NAMES = ('first', 'second')  # of two judges


def test_the_costs_of_a_judge_are_those_of_its_journal(tmp_path):
  def judge(body):
    choice = {'message': {'content': '(A)'}, 'finish_reason': 'stop'}
    return respond(200, {'choices': [choice], 'usage': tokens_of(body)[0]})

  with serve(judge) as server:
    config = JudgeServer(server.url, 'served', verdict='sampled', price_output=3.0)
    for _ in range(2):  # the second time, the journal answers
      remote_judge(JudgeClient(config, tmp_path))(MATCHES)
  costs = sum_usage(('judge', usage) for usage in read_usage(tmp_path))['judge']
  assert counted(costs) == expected_costs(server.bodies) and costs.answers == 2 * len(MATCHES)
  assert costs.price(config.connection_config()) == costs.completion_tokens * 3 / 1e6


def test_the_costs_of_a_judge_are_those_of_its_model(tmp_path):
  """Two judges share a journal, and one of them also answers a rubric."""

  def judge(body):
    choice = {'message': {'content': '(A)'}, 'finish_reason': 'stop'}
    return respond(200, {'choices': [choice], 'usage': tokens_of(body)[0]})

  with serve(judge, {'data': [{'id': 'first'}, {'id': 'second'}]}) as server:
    first, second = (JudgeServer(server.url, name, verdict='sampled') for name in MODEL_NAMES)
    run = chat_run(server.url, tmp_path)
    for judged, matches in ((first, MATCHES), (second, MATCHES[:1])):
      remote_judge(JudgeClient(judged, judge_journal(run)))(matches)
    rubric = {'messages': [{'role': 'user', 'content': 'Is it kind?'}], 'max_tokens': 3}
    warm = dataclasses.replace(first, temperature=0.5)
    with contextlib.closing(JudgeClient(warm, judge_journal(run))) as client:
      client.answer([rubric])
    asked = server.bodies
  for judged, bodies in ((first, asked[:-3] + asked[-1:]), (second, asked[-3:-1])):
    section = dataclasses.replace(run.config.evaluation, judge='', judge_remote=judged)
    config = dataclasses.replace(run.config, evaluation=section)
    costs = read_costs(dataclasses.replace(run, config=config))
    assert {*costs} == {'judge'} and counted(costs['judge']) == expected_costs(bodies)


def test_an_answer_of_a_judge_without_a_prefix_is_found(tmp_path):
  """Keys of version 0.1.0 name no model."""
  server, body = JudgeServer('http://127.0.0.1:9/v1', 'first', verdict='sampled'), {'max_tokens': 1}
  key = judge_client._digest(server, body).removeprefix(server.key_prefix())
  with contextlib.closing(Journal(tmp_path)) as journal:
    journal.put([(key, Completion([], JudgeAnswer('yes').to_json(), [], 'stop'))])
  with contextlib.closing(JudgeClient(server, tmp_path)) as client:
    assert [answer.text for answer in client.answer([body])] == ['yes']


def test_costs_of_deleted_shards_go_when_the_dataset_is_begun_again(tmp_path):
  with serve(answer) as server:
    run = chat_run(server.url, tmp_path, roles=('base',))
    pipeline.run_stages(run, ['generate'])
    asked = len(server.bodies)
    old = read_costs(run, 'generate')
    assert old['base'].answers == 6 * 5 + 3
    shutil.rmtree(tmp_path / 'd_cai')
    (tmp_path / 'manifest.json').unlink()
    config = dataclasses.replace(run.config.feedback, shard_rows=100)
    run = dataclasses.replace(run, config=dataclasses.replace(run.config, feedback=config))
    pipeline.run_stages(run, ['generate'])
    tests = asked - old['base'].answers
    assert len(server.bodies) == asked + tests  # the journal answers
  assert [path.name for path in (tmp_path / 'costs').glob('generate-*')] == ['generate-00000.json']
  assert read_costs(run, 'generate') == old


def test_turns_of_an_old_journal_count_as_uncounted():
  usages = []

  def chain():
    yield Turn('initial', [1], SamplingConfig(), 'base')
    yield Turn('critique_1', [1], SamplingConfig(), 'critique')

  metered = generate._metered(chain(), usages, {'critique'})
  metered.send(None)
  metered.send(Completion([], '', [], 'stop'))
  with pytest.raises(StopIteration):
    metered.send(Completion([], '', [], 'stop'))
  assert sum_usage(usages) == {'critique': Costs(answers=1, attempts=1, uncounted=1)}
