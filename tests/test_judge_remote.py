"""A judge behind a server on loopback that fails, stalls and is killed."""

import copy
import hashlib
import json
import math
import re
import sys
import threading
import time

import pytest

from cai_jax import pipeline
from cai_jax.evaluation.config import EvaluationConfig
from cai_jax.pipeline.served_plan import describe_served
from cai_jax.runtime.errors import UnreachableError, UserError
from cai_jax.scoring import judge_remote as judges
from cai_jax.scoring.judge import Match
from cai_jax.scoring.judge_answers import (
  SAMPLED_LOG_ODDS,
  JudgeAnswer,
  label_log_probabilities,
  sampled_log_odds,
)
from cai_jax.scoring.judge_client import JudgeClient
from cai_jax.scoring.judge_local import judge_dialogue, tokenize_question
from cai_jax.scoring.judge_questions import build_questions
from cai_jax.scoring.judge_server import JudgeServer
from configs import tiny
from tests.dialogue_setup import get_tokenizer
from tests.faults.servers import FOREVER, free_port, respond, serve
from tests.pipeline_setup import set_fields, small, start_one

pytestmark = pytest.mark.usefixtures('single_device')

KEY_NAME, KEY = 'CAI_JAX_JUDGE_KEY', 'sk-never-to-be-seen'
MATCHES = [
  Match(
    f'prompt {i}',
    [{'role': 'user', 'content': f'Question {i}?'}],
    'Choose the better answer.',
    ('x', 'y'),
    (f'Yes {i}.', f'No {i}.'),
  )
  for i in range(8)
]
APIS = ('chat', 'completions')


def question_of(body):
  text = body['messages'][0]['content'] if 'messages' in body else body['prompt']
  return text.rpartition('\n\n')[0]


def probability(question, label):
  """The probability that the server's judge gives to a label; together they have less than 1."""
  digest = hashlib.sha256(question.encode()).digest()
  share = 0.1 + 0.8 * digest[0] / 255
  return 0.9 * (share if label == 'A' else 1 - share)


def answer(body):
  """An honest answer of the judge: ' (', then one of the labels, then ')'."""
  question = question_of(body)
  p = {label: probability(question, label) for label in 'AB'}
  best = max(p, key=p.get)
  text = f' ({best})'
  steps = [
    (' (', {' (': math.log(0.8), ' The': math.log(0.1)}),
    (best, {label: math.log(value / 0.9) for label, value in p.items()} | {'a': -9.0}),
    (')', {')': -0.01}),
  ]
  choice = {'index': 0, 'finish_reason': 'stop'}
  if 'messages' in body:
    choice['message'] = {'role': 'assistant', 'content': text}
    if body.get('logprobs'):
      content = [
        {
          'token': token,
          'logprob': top[token],
          'top_logprobs': [{'token': name, 'logprob': value} for name, value in top.items()],
        }
        for token, top in steps
      ]
      choice['logprobs'] = {'content': content}
  else:
    choice['text'] = text
    if body.get('logprobs'):
      choice['logprobs'] = {
        'tokens': [token for token, _ in steps],
        'token_logprobs': [top[token] for token, top in steps],
        'top_logprobs': [top for _, top in steps],
      }
  return respond(200, {'choices': [choice]})


def server_config(server, api='chat', **options):
  url = server if isinstance(server, str) else server.url
  quick = {'backoff_seconds': 0.01, 'timeout_seconds': 2.0, 'max_concurrent': 4}
  return JudgeServer(url=url, model='served', api=api, **(quick | options))


def ask(server, folder, api='chat', matches=MATCHES, **options):
  client = JudgeClient(server_config(server, api, **options), folder)
  return judges.remote_judge(client)(matches)


@pytest.mark.parametrize('api', APIS)
def test_log_odds_and_mass_are_those_of_the_server(api, tmp_path):
  with serve(answer) as server:
    comparisons = ask(server, tmp_path, api)
  assert [c.prompt for c in comparisons] == [m.prompt for m in MATCHES]
  for match, comparison in zip(MATCHES, comparisons, strict=True):
    assert comparison.players == match.players
    expected = []
    for question, sign in zip(build_questions(match), (1, -1), strict=True):
      odds = math.log(probability(question, 'A') / probability(question, 'B'))
      expected.append(sign * odds)
    assert comparison.log_odds == pytest.approx(expected, abs=1e-9)
    assert comparison.label_mass == pytest.approx((0.8, 0.8), abs=1e-9)
  bodies = server.bodies
  assert len(bodies) == 2 * len(MATCHES)
  assert {body['temperature'] for body in bodies} == {0}
  tops = {body['top_logprobs'] if api == 'chat' else body['logprobs'] for body in bodies}
  assert tops == {20 if api == 'chat' else 5}


def failures():
  """Responses that fail, one for each request until they are used up."""
  return [
    respond(500, {'error': {'message': 'out of memory'}}),
    respond(429, {'error': {'message': 'slow down'}}, {'Retry-After': '0.01'}),
    [b'HTTP/1.1 200 OK\r\nContent-Length: 500\r\n\r\n{"choices'],  # cut off
    [FOREVER],  # stalls
    respond(200, {'choices': []}),
    respond(503, b'<html>busy</html>'),
  ]


@pytest.mark.parametrize('verdict', ['logprobs', 'sampled'])
@pytest.mark.parametrize('api', APIS)
def test_a_server_that_fails_and_stalls_gives_the_same_verdicts(api, verdict, tmp_path):
  faults, lock = failures(), threading.Lock()

  def fail(body):
    with lock:
      fault = faults.pop() if faults else None
    return fault or answer(body)

  with serve(answer) as server:
    expected = ask(server, tmp_path / 'calm', api, verdict=verdict)
  with serve(fail) as server:
    options = {'verdict': verdict, 'timeout_seconds': 0.3}
    assert ask(server, tmp_path / 'rough', api, **options) == expected
    assert not faults
    assert len(server.bodies) >= 2 * len(MATCHES) + 5


PROGRAM = """
import sys
from tests.test_judge_remote import ask
ask(sys.argv[1], sys.argv[2], sys.argv[3], max_concurrent=1, timeout_seconds=60.0)
"""


def count_lines(folder):
  """Return the number of lines of the journals in a folder."""
  return sum(path.read_bytes().count(b'\n') for path in folder.rglob('turns-*.jsonl'))


@pytest.mark.parametrize('api', ['chat', pytest.param('completions', marks=pytest.mark.slow)])
def test_nothing_is_asked_twice_after_a_kill(api, tmp_path):
  """A process is killed in its sixth question. Another one asks all but the first five."""
  sixth = threading.Event()

  def stall(body):
    if len(server.bodies) == 6:
      sixth.set()
      return [FOREVER]
    return answer(body)

  with serve(stall) as server:
    process = start_one([sys.executable, '-c', PROGRAM, server.url, str(tmp_path), api], 1)
    try:
      assert sixth.wait(60)
      # The client may ask again a moment before it has stored the answer before.
      deadline = time.monotonic() + 60
      while count_lines(tmp_path) < 5 and time.monotonic() < deadline:
        time.sleep(0.05)
    finally:
      process.kill()
      process.wait()
  answered = [question_of(body) for body in server.bodies[:5]]
  with serve(answer) as server:
    comparisons = ask(server, tmp_path, api)
    again = [question_of(body) for body in server.bodies]
    expected = ask(server, tmp_path / 'calm', api)
  assert comparisons == expected
  assert len(again) == 2 * len(MATCHES) - 5
  assert not {*again} & {*answered}


@pytest.mark.parametrize('api', APIS)
def test_answers_before_a_refusal_are_kept(api, tmp_path):
  """The server refuses after five answers; another judge on the same folder asks only the rest."""
  with serve(answer) as server:
    expected = ask(server, tmp_path / 'calm', api)
  answered, lock = [], threading.Lock()

  def refuse(body):
    with lock:
      if len(answered) == 5:
        return respond(400, {'error': {'message': 'no more'}})
      answered.append(question_of(body))
    return answer(body)

  with serve(refuse) as server:
    with pytest.raises(UserError, match='no more'):
      ask(server, tmp_path / 'refused', api, max_concurrent=1)
  with serve(answer) as server:
    assert ask(server, tmp_path / 'refused', api) == expected
    again = [question_of(body) for body in server.bodies]
    assert len(again) == 2 * len(MATCHES) - 5
    assert not {*again} & {*answered}
    assert ask(server, tmp_path / 'refused', api) == expected
    assert len(server.bodies) == len(again)


def test_equal_questions_are_asked_once_and_other_settings_ask_anew(tmp_path):
  with serve(answer) as server:
    both = ask(server, tmp_path, matches=[MATCHES[0], MATCHES[0]])
    assert both[0] == both[1]
    assert len(server.bodies) == 2
    for options in ({'revision': 'two'}, {'api': 'completions'}, {'verdict': 'sampled'}):
      before = len(server.bodies)
      ask(server, tmp_path, matches=MATCHES[:1], **options)
      assert len(server.bodies) == before + 2
    sampled = server_config(server, verdict='sampled', temperature=1.0)
    for seed, requests in ((0, 2), (1, 2), (0, 0)):
      before = len(server.bodies)
      judges.remote_judge(JudgeClient(sampled, tmp_path), seed=seed)(MATCHES[:1])
      assert len(server.bodies) == before + requests
  with serve(answer) as server:  # at another address
    ask(server, tmp_path, matches=MATCHES[:1])
    assert not server.bodies


def test_exchanged_responses_exchange_the_orders(tmp_path):
  def exchange(match):
    return Match(match.prompt, match.messages, match.principle, ('y', 'x'), match.responses[::-1])

  with serve(answer) as server:
    one = ask(server, tmp_path)
    other = ask(server, tmp_path, matches=[exchange(match) for match in MATCHES])
    assert len(server.bodies) == 2 * len(MATCHES)
  for a, b in zip(one, other, strict=True):
    assert b.log_odds == (-a.log_odds[1], -a.log_odds[0])


def test_a_sampled_verdict_has_no_mass_and_a_constant(tmp_path):
  with serve(answer) as server:
    comparisons = ask(server, tmp_path, verdict='sampled')
  assert {abs(odds) for c in comparisons for odds in c.log_odds} == {SAMPLED_LOG_ODDS}
  assert {c.label_mass for c in comparisons} == {None}


@pytest.mark.parametrize(
  ('text', 'sign'),
  [
    ('(A)', 1),
    (' (B) ', -1),
    ('Option (A) is rude. The answer is: (B)', -1),
    ('The answer is: (A), not (B).', 1),
    ('**Answer:** (B)', -1),
    ('<think>The answer is: (A)?</think>\n(B)', -1),
    ('<think>It could be (A), but', 0),
    ('Both (A) and (B) are fine.', 0),
    ('A better answer is hard to find.', 0),
    ('', 0),
  ],
)
def test_verdicts_in_texts(text, sign):
  assert sampled_log_odds(text) == sign * SAMPLED_LOG_ODDS


def test_labels_that_are_not_listed_have_an_upper_bound_and_no_mass():
  log = math.log
  only_a = JudgeAnswer('', [(' (', [(' (', log(0.5))]), ('A', [('A', log(0.9)), ('C', log(0.02))])])
  (a, b), mass = label_log_probabilities(only_a)
  assert (a, b, mass) == pytest.approx((log(0.45), log(0.01), 0.45))
  prose = JudgeAnswer('', [('Well', [('Well', log(0.6)), ('A', log(0.3))])])
  (a, b), mass = label_log_probabilities(prose)  # 'A' may begin a sentence
  assert (a == b, mass) == (True, 0)
  # Whole labels, in two spellings, before and on the most likely path.
  top = [('(A', log(0.5)), (' (A', log(0.1)), ('(B', log(0.2)), ('The', log(0.1))]
  (a, b), mass = label_log_probabilities(JudgeAnswer('', [('(A', top), (')', [(')', 0.0)])]))
  assert (a, b, mass) == pytest.approx((log(0.6), log(0.2), 0.8))
  assert label_log_probabilities(JudgeAnswer('')) == ((0.0, 0.0), 0.0)


def strip_logprobs(body):
  return answer({name: value for name, value in body.items() if name != 'logprobs'})


@pytest.mark.parametrize('api', APIS)
def test_what_can_be_known_is_refused_before_the_run(api):
  with pytest.raises(UserError, match='unreachable'):
    judges.check_judge(server_config(f'http://127.0.0.1:{free_port()}/v1', api))
  with serve(answer, {'data': [{'id': 'another'}]}) as server:
    with pytest.raises(UserError, match="does not serve 'served'"):
      judges.check_judge(server_config(server, api))
  with serve(strip_logprobs) as server:
    with pytest.raises(UserError, match=r"no log-probabilities.*verdict='sampled'"):
      judges.check_judge(server_config(server, api))
    judges.check_judge(server_config(server, api, verdict='sampled'))
  with serve(answer) as server:
    judges.check_judge(server_config(server, api), MATCHES)
    assert len(server.bodies) == 1


def test_a_used_up_server_names_itself_and_keeps_what_it_answered(tmp_path):
  with serve(lambda body: respond(500, {'error': 'down'})) as server:
    with pytest.raises(UnreachableError, match='status 500'):
      ask(server, tmp_path, retries=1)


def test_the_key_is_sent_and_stored_nowhere(tmp_path, monkeypatch):
  monkeypatch.setenv(KEY_NAME, KEY)
  with serve(answer) as server:
    ask(server, tmp_path, api_key_env=KEY_NAME)
  assert {headers['authorization'] for headers in server.headers} == {f'Bearer {KEY}'}
  assert all(KEY not in path.read_text() for path in tmp_path.rglob('*') if path.is_file())


@pytest.mark.parametrize(
  ('fields', 'message'),
  [
    ({'api': 'messages'}, "api='messages' must be one of 'chat', 'completions'"),
    ({'verdict': 'guess'}, "verdict='guess' must be one of"),
    ({'temperature': 1.0}, 'log-probabilities need no temperature'),
    ({'model': ''}, "model='' must be the name"),
    ({'url': 'localhost'}, "url='localhost' must be the base URL"),
  ],
)
def test_settings_that_are_not_allowed_are_refused(fields, message):
  with pytest.raises(UserError, match=message):
    JudgeServer(**({'url': 'http://localhost/v1', 'model': 'served'} | fields))


def test_settings_that_contradict_are_refused(tmp_path):
  served = JudgeServer('http://localhost/v1', 'served')
  with pytest.raises(UserError, match='only one judges'):
    EvaluationConfig(judge='base', judge_remote=served)
  with pytest.raises(UserError, match="judge_remote.verdict='sampled'"):
    EvaluationConfig(judge_remote=served, judge_reasoning=8)
  config = tiny.get_config()
  config.evaluation.judge_remote.model = 'served'
  with pytest.raises(UserError, match='evaluation.judge_remote.model has no effect'):
    pipeline.build(config, tmp_path)


def test_a_run_with_a_served_judge(tmp_path, tiny_hf_folder):
  """The judge gets a test question first. The results show its validity, and the plan was right."""
  config = small(tiny_hf_folder('qwen3'))
  with serve(answer) as server:
    set_fields(
      evaluation__judge_remote__url=server.url,
      evaluation__judge_remote__model='served',
      evaluation__judge_labelled='tiny',
      evaluation__judge_labelled_limit=4,
      evaluation__judge_checks=0,
      evaluation__judge_remote__price_output=2.0,
      evaluation__scorer='none',
      evaluation__scores=(),
    )(config)
    run = pipeline.build(config, tmp_path / 'run')
    plan = describe_served(run, ['generate', 'evaluate'])
    assert not server.bodies and not describe_served(run, ['generate'])
    pipeline.run_stages(run)
    asked = server.bodies[1:]  # without the test question
  found = re.fullmatch(
    r'evaluation.judge_remote \(served\): ([\d,]+) requests with up to about ([\d,]+) tokens of '
    r'contexts and ([\d,]+) sampled tokens, price up to about (\S+)',
    plan,
  )
  requests, read, sampled = (int(number.replace(',', '')) for number in found.groups()[:3])
  assert len(asked) <= requests <= 2 * len(asked)
  assert sum(len(question_of(body).encode()) for body in asked) / 4 <= read
  assert sampled == requests * asked[0]['max_tokens']
  assert float(found[4]) == pytest.approx(sampled * 2e-6, rel=0.05)
  results = json.loads((tmp_path / 'run' / 'evaluation' / 'models.json').read_text())['judge']
  assert (results['judge'], results['status']) == ('served', 'cannot tell')
  assert results['validity']['labelled']['count'] == 4
  assert results['validity']['labelled']['answers']['label_mass'] == pytest.approx(0.8)
  assert len(list((tmp_path / 'run' / 'journal' / 'judge').glob('turns-*.jsonl'))) == 1
  manifest = json.loads((tmp_path / 'run' / 'manifest.json').read_text())
  recorded = manifest['stages']['evaluate']['settings']['evaluation']['judge_remote']
  assert recorded == run.config.evaluation.judge_remote.identity()
  assert len(asked) > 2 * 4


@pytest.mark.parametrize('reply_has_thought', [True, False])
def test_a_thought_that_the_template_opens_is_closed_or_refused(reply_has_thought):
  """The verdict of a judge in memory must not be read inside of a thought."""
  tokenizer = copy.deepcopy(get_tokenizer('reasoning'))
  opened = "'<|im_start|>assistant\n<think>\n'"
  template = tokenizer.chat_template.replace("'<|im_start|>assistant\n'", opened)
  if not reply_has_thought:
    template = template.replace("{{ '<think>\n' + thought + '\n</think>\n\n' }}", '')
  tokenizer.chat_template = template
  think, end = tokenizer.convert_tokens_to_ids(['<think>', '</think>'])
  if not reply_has_thought:
    with pytest.raises(UserError, match='reasoning that it opens must be in the reply too'):
      tokenize_question(tokenizer, judge_dialogue(tokenizer), 'Which?')
    return
  dialogue = judge_dialogue(tokenizer)
  for before, _ in tokenize_question(tokenizer, dialogue, build_questions(MATCHES[0])[0]):
    assert [t for t in before if t in (think, end)] == [think, end]
