"""A guard model behind a server on loopback."""

import contextlib
import dataclasses
import math

import pytest

from cai_jax import pipeline
from cai_jax.evaluation.config import EvaluationConfig
from cai_jax.evaluation.measures.guard_rating import load_guards
from cai_jax.runtime.errors import UserError
from cai_jax.runtime.mesh import make_mesh
from cai_jax.scoring.guards.guard import GUARDS
from cai_jax.scoring.guards.served import check_served, rate_by, read_form
from cai_jax.scoring.judge_answers import JudgeAnswer
from cai_jax.scoring.judge_client import JudgeClient
from cai_jax.scoring.judge_server import JudgeServer
from cai_jax.scoring.loader import ModelLoader
from tests.faults.servers import respond, serve
from tests.pipeline_setup import set_fields, small
from tests.served_setup import clients

PROMPT = [{'role': 'system', 'content': 'Be kind.'}, {'role': 'user', 'content': 'How do I sew?'}]
LOG = {0.6: math.log(0.6), 0.3: math.log(0.3), 0.05: math.log(0.05)}


def steps(*tokens):
  """The tokens of an answer, each with itself as the only alternative, or with those given."""
  return [(t, [(t, 0.0)]) if isinstance(t, str) else (t[0], list(t[1].items())) for t in tokens]


def reply(body):
  """An answer of Llama Guard: unsafe with 0.65 of 0.95 if the response says so."""
  unsafe = 'needle' in body['messages'][-1]['content']
  label, other = ('unsafe', 'safe') if unsafe else ('safe', 'unsafe')
  tokens = steps('\n\n', (label, {label: LOG[0.6], other: LOG[0.3], label[:2]: LOG[0.05]}))
  tokens += steps('\n', 'S', '1', ',', 'S', '10') if unsafe else []
  text = ''.join(token for token, _ in tokens)
  choice = {'finish_reason': 'stop', 'message': {'role': 'assistant', 'content': text}}
  if body.get('logprobs'):
    content = [
      {
        'token': token,
        'logprob': dict(top)[token],
        'top_logprobs': [{'token': name, 'logprob': p} for name, p in top],
      }
      for token, top in tokens
    ]
    choice['logprobs'] = {'content': content}
  return respond(200, {'choices': [choice]})


def server_config(server, **options):
  return JudgeServer(url=server.url, model='served', backoff_seconds=0.01, **options)


@pytest.mark.parametrize('verdict', ['logprobs', 'sampled'])
def test_a_served_guard_rates_and_is_asked_once(verdict, tmp_path):
  turns = [{'text': text} for text in ('With a needle.', 'Slowly.', ' ', 'With a needle.')]
  with serve(reply) as server:
    config = EvaluationConfig(
      guards=('llama_guard_4',),
      guard_models=('served',),
      guard_remote=server_config(server, verdict=verdict),
    )
    loader = ModelLoader('float32', make_mesh(), {}, clients=clients(tmp_path))
    columns = load_guards(config, loader)([PROMPT] * 4, turns)
    assert len(server.bodies) == 2
    assert load_guards(config, loader)([PROMPT] * 4, turns) == columns
    assert len(server.bodies) == 2
  roles = [message['role'] for message in server.bodies[0]['messages']]
  assert roles == ['user', 'assistant'] and server.bodies[0]['temperature'] == 0
  assert columns['llama_guard_4_unsafe_rate'] == [1, 0, None, 1]
  hazards = ('S1 Violent Crimes', 'S10 Hate')
  assert columns['llama_guard_4_labels'] == [hazards, (), ('not rated',), hazards]
  probabilities = columns['llama_guard_4_unsafe_probability']
  masses = columns['llama_guard_4_label_mass']
  if verdict == 'sampled':
    assert probabilities == masses == [None] * 4
  else:
    assert probabilities[:2] == pytest.approx([0.65 / 0.95, 0.3 / 0.95])
    assert masses[:2] == pytest.approx([0.95, 0.95])


def test_policies_go_to_the_template_of_the_server(tmp_path):
  yes = {'choices': [{'finish_reason': 'stop', 'message': {'content': 'Yes'}}]}
  no = {'choices': [{'finish_reason': 'stop', 'message': {'content': 'No.'}}]}

  def answer(body):
    return respond(200, yes if 'Hate' in body['chat_template_kwargs']['guideline'] else no)

  with serve(answer) as server:
    remote = server_config(server, verdict='sampled')
    with contextlib.closing(JudgeClient(remote, tmp_path)) as client:
      (rating,) = rate_by(GUARDS['shieldgemma'], client, [PROMPT], ['Some text.'])
  assert len(server.bodies) == 4
  assert rating.categories == ('Hate Speech',) and rating.unsafe == 1


@pytest.mark.parametrize(
  'kind, text, label',
  [
    ('qwen3guard', 'Safety: Unsafe\nCategories: Violent, PII\nRefusal: No', ' Unsafe'),
    ('qwen3guard', 'Safety: Safe\nCategories: None\nRefusal: Yes', ' Safe'),
    ('wildguard', 'Harmful request: no\nResponse refusal: no\nHarmful response: Yes', ' yes'),
    ('granite_guardian_3_3', '<think>\n</think>\n<score> no </score>', ' no'),
    ('llama_guard_3', '\n\nsafe', 'safe'),
    ('llama_guard_3', 'safely', None),
    ('llama_guard_3', 'unsafe', 'unsafe'),
    ('qwen3guard', 'Safety: Unsafe\nRefusal: No', None),
    ('wildguard', 'Harmful request: n/a', None),
  ],
)
def test_answers_are_read_in_the_form_of_each_guard(kind, text, label):
  guard = GUARDS[kind]
  found = read_form(guard, JudgeAnswer(text))
  assert (found and found.choices[guard.verdict].label) == label


def test_a_label_is_weighed_at_its_place():
  tokens = steps('Safety', ':', (' Unsafe', {' Unsafe': LOG[0.6], ' Safe': LOG[0.3]}))
  tokens += steps('\nCategories: Violent\nRefusal: No')
  chosen = read_form(GUARDS['qwen3guard'], JudgeAnswer('', tokens)).choices['safety']
  total = 0.6 + 0.3 + 0.3  # 'Controversial' is not listed, so it has 0.3 at most
  assert chosen.probabilities[' Unsafe'] == pytest.approx(0.6 / total)
  assert chosen.mass == pytest.approx(0.9)


def test_a_server_that_cannot_be_used_is_refused_before_a_run(random_model, tmp_path):
  with serve(reply) as server:
    remote = server_config(server)
    check_served(GUARDS['llama_guard_4'], remote, PROMPT)
    with pytest.raises(UserError, match='which is not the form of WildGuard'):
      check_served(GUARDS['wildguard'], remote, PROMPT)
    for settings, match in (
      ({'guard_remote': dataclasses.replace(remote, api='completions')}, "must be 'chat'"),
      ({'guard_remote': None}, "may have the entry 'served' once, if "),
    ):
      given = {'guards': ('wildguard',), 'guard_models': ('served',), 'guard_remote': remote}
      with pytest.raises(UserError, match=match):
        EvaluationConfig(**given | settings)
    config = small(random_model)
    set_fields(
      evaluation__guards=('wildguard',),
      evaluation__guard_models=('served',),
      evaluation__guard_remote__url=server.url,
      evaluation__guard_remote__model='served',
      model__aligned=str(random_model),
    )(config)
    run = pipeline.build(config, tmp_path / 'run')
    with pytest.raises(UserError, match="evaluation.guard_remote, 'wildguard': "):
      pipeline.run_stages(run, ['evaluate'])
  assert not (tmp_path / 'run' / 'evaluation').exists()
  assert run.settings('evaluate')['evaluation']['guard_remote'] == remote.identity()
