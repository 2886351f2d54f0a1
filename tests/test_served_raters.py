"""Judges and guards behind a server on loopback, which rate the candidates of a variant."""

import collections
import json

import pytest

from cai_jax import pipeline
from cai_jax.data import d_cai
from cai_jax.pipeline.costs import read_costs
from cai_jax.pipeline.raters import check_rater, make_rater
from cai_jax.pipeline.served_plan import describe_served
from cai_jax.pipeline.server_checks import check_rater_server
from cai_jax.runtime.errors import UnreadableError, UserError
from tests.faults.servers import respond, serve
from tests.pipeline_setup import set_fields, small
from tests.test_served_guards import PROMPT, reply

pytestmark = pytest.mark.usefixtures('single_device')

USAGE = {'prompt_tokens': 7, 'completion_tokens': 3, 'total_tokens': 10}


def counted(body):
  """The answer of `reply`, with the tokens that the server counted."""
  _, data = reply(body)
  return respond(200, json.loads(data) | {'usage': USAGE})


def build(folder, url, kind='guard', label='llama_guard_4', **fields):
  options = {'n': 2, 'scorer': kind, 'scorer_model': 'served', 'scorer_label': label}
  role = {'guard': 'guard_remote', 'judge': 'judge_remote'}.get(kind, kind)
  given = {'feedback__variant': 'best_revision', 'feedback__options': (*options.items(),)}
  if url:
    given |= {
      f'evaluation__{role}__url': url,
      f'evaluation__{role}__model': 'served',
      f'evaluation__{role}__backoff_seconds': 0.01,
    }
  config = small('tiny')
  set_fields(**given | {'feedback__rounds': 1} | fields)(config)
  return pipeline.build(config, folder)


def rate(run, texts):
  source = make_rater(run, {})
  return source.load()(PROMPT, texts, 'Which one is better?')


def test_a_served_guard_rates_candidates_and_is_asked_once(tmp_path):
  texts = ['With a needle.', 'Slowly.', 'With a needle.']
  with serve(counted) as server:
    run = build(tmp_path, server.url)
    check_rater(run)
    check_rater_server(run)
    assert len(server.bodies) == 1  # the test
    rater = make_rater(run, {}).load()
    first = rater(PROMPT, texts, '')
    assert first == pytest.approx([-0.65 / 0.95, -0.3 / 0.95, -0.65 / 0.95])
    assert len(server.bodies) == 3
    assert rater(PROMPT, texts[:1], '') == first[:1]  # from the journal, which is open
    assert rate(run, texts) == first  # from the journal, after a kill
    assert len(server.bodies) == 3
    with pytest.raises(UnreadableError, match='Candidate 2 is blank, or the answer to it has not'):
      rater(PROMPT, ['Slowly.', ' '], '')
  (costs,) = read_costs(run).values()
  assert costs.prompt_tokens == 3 * 7 and costs.completion_tokens == 3 * 3


def test_a_served_judge_compares_candidates_in_both_orders(tmp_path):
  def judge(body):
    (message,) = body['messages']
    asked = message['content']
    label = '(A)' if asked.index('Kindly.') < asked.index('Rudely.') else '(B)'
    choice = {'message': {'content': label}, 'finish_reason': 'stop'}
    return respond(200, {'choices': [choice]})

  with serve(judge) as server:
    verdict = {'evaluation__judge_remote__verdict': 'sampled'}
    run = build(tmp_path, server.url, 'judge', '', **verdict)
    rude, kind = rate(run, ['Rudely.', 'Kindly.'])
    assert rude < 0 < kind and len(server.bodies) == 2
    assert rate(run, ['Rudely.', 'Kindly.']) == [rude, kind]  # from the journal, after a kill
    assert len(server.bodies) == 2


@pytest.mark.parametrize(
  'kind, label, requests',
  [('guard', 'llama_guard_4', 3), ('judge', '', 3 * 2)],  # candidates; pairs in both orders
)
def test_the_dry_run_counts_the_questions_about_candidates(kind, label, requests, tmp_path):
  options = {'n': 3, 'scorer': kind, 'scorer_model': 'served', 'scorer_label': label}
  fields = {'feedback__options': (*options.items(),), 'prompts__harmful__limit': 5}
  fields |= {'feedback__rounds': 2}
  run = build(tmp_path, 'http://127.0.0.1:9/v1', kind, label, **fields)
  plan = describe_served(run, ['generate'])
  count = 5 * 2 * requests  # prompts and rounds
  assert plan.startswith(f'evaluation.{kind}_remote (served): {count} requests with up to ')


def test_the_identity_of_a_run_is_that_of_the_model_and_not_of_its_address(tmp_path):
  def settings(url, **fields):
    run = build(tmp_path, url, **fields)
    return json.dumps([run.settings('generate'), make_rater(run, {}).identity])

  first = settings('http://127.0.0.1:9/v1')
  assert first == settings('http://127.0.0.1:8/v1')
  assert first != settings('http://127.0.0.1:9/v1', evaluation__guard_remote__revision='2')


@pytest.mark.parametrize(
  'kind, label, fields, match',
  [
    ('guard', 'llama_guard_9', {}, "scorer='guard' .*no guard model named 'llama_guard_9'"),
    ('judge', 'x', {}, "'judge' has no labels, but got the label 'x'"),
    ('reward', '', {}, "scorer='reward' .*no served rater of candidates named 'reward'"),
    ('judge', '', None, 'needs a server. Give evaluation.judge_remote.url'),
    ('guard', 'wildguard', {'feedback__variant': 'critique', 'feedback__options': ()}, 'nothing'),
  ],
)
def test_what_cannot_rate_is_refused_before_a_run(kind, label, fields, match, tmp_path):
  url = '' if fields is None or kind == 'reward' else 'http://127.0.0.1:9/v1'
  with pytest.raises(UserError, match=match):
    build(tmp_path, url, kind, label, **fields or {})


def test_a_server_that_cannot_rate_the_longest_candidate_is_refused_before_a_run(tmp_path):
  def answer(body):
    words = sum(len(message['content'].split()) for message in body['messages'])
    if words < 300:
      return reply(body)
    return respond(400, {'error': {'message': 'The context has 300 tokens.'}})

  with serve(answer) as server:
    check_rater_server(build(tmp_path / 'short', server.url))
    long = build(tmp_path / 'long', server.url, sampling__revision__max_tokens=300)
    with pytest.raises(UserError, match='guard_remote, which rates candidates: .*has 300 tokens'):
      check_rater_server(long)


@pytest.mark.slow
def test_a_run_keeps_the_revision_that_its_served_guard_prefers(tmp_path):
  """The evaluation by the same guard asks for no answer again, and neither does a second run."""

  def answer(body):
    is_unsafe = len(body['messages'][-1]['content']) % 2
    return reply(body | {'messages': [{'content': 'needle' if is_unsafe else 'x'}]})

  with serve(answer) as server:
    evaluated = {'evaluation__guards': ('llama_guard_4',), 'evaluation__guard_models': ('served',)}
    whole = {f'sampling__{stage}__max_tokens': 64 for stage in ('initial', 'critique', 'revision')}
    run = build(tmp_path, server.url, **evaluated, **whole)
    pipeline.run_stages(run)
    questions = collections.Counter(json.dumps(body) for body in server.bodies)
  rows = [row for row in d_cai.read_rows(tmp_path / 'd_cai') if row['kind'] == 'harmful']
  chosen = set()
  for row in rows:
    details = json.loads(row['rounds'][0]['details'])
    texts = [candidate['revision']['text'] for candidate in details['candidates']]
    expected = [-0.65 / 0.95 if len(text) % 2 else -0.3 / 0.95 for text in texts]
    assert details['ratings'] == pytest.approx(expected)
    assert row['rounds'][0]['revision']['text'] == texts[expected.index(max(expected))]
    chosen.add(expected.index(max(expected)))
  assert chosen == {0, 1}
  repeated = [count for count in questions.values() if count > 1]
  assert len(repeated) <= 2  # the test requests of the rater and of the evaluation
