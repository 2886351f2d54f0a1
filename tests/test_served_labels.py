"""Servers that choose between labels are tested for it before the run."""

import dataclasses

import pytest

from cai_jax.pipeline import run as runs
from cai_jax.pipeline.served_stages import served_stages
from cai_jax.pipeline.server_checks import check_servers
from cai_jax.runtime.errors import UserError
from tests.faults.servers import complete, respond, serve
from tests.served_setup import TOKENIZER, served_run

DECIDES = {'variant': 'if_needed', 'options': (('decide', 'labels'),)}


def labels_run(running, workdir, feedback=None, **fields):
  """Return a run whose critic, or M_θ, is served and chooses between labels."""
  run = served_run(running, workdir, **fields)
  section = dataclasses.replace(run.config.feedback, **(feedback or DECIDES))
  return dataclasses.replace(run, config=dataclasses.replace(run.config, feedback=section))


def label_answer(logprob=-0.5, ignore_bias=False):
  """Return the answers of a server that applies biases."""

  def answer(body):
    content = complete(body, TOKENIZER)
    if 'logit_bias' in body and not ignore_bias:
      token = int(next(iter(body['logit_bias'])))
      content = complete(body, TOKENIZER, TOKENIZER.decode([token]))
      content['choices'][0]['token_ids'] = [token]
      content['choices'][0]['logprobs'] = {'tokens': [''], 'token_logprobs': [logprob]}
    return respond(200, content)

  return answer


@pytest.mark.parametrize('role', ['critique', 'base'])
def test_the_stages_of_a_variant_are_tested_at_its_server(role, tmp_path):
  with serve(label_answer()) as server:
    run = labels_run(server, tmp_path, role=role)
    names = ['critique', 'decision']
    if role == 'base':
      names = ['initial', 'critique', 'revision', 'decision']
    assert list(served_stages(run.config)[role]) == names
    check_servers(run, ['generate'])
    asked = [body for body in server.bodies if 'logit_bias' in body]
  assert [(body['max_tokens'], {*body['logit_bias'].values()}) for body in asked] == [(1, {100.0})]
  spelled = {TOKENIZER.decode([int(token)]).strip() for token in asked[0]['logit_bias']}
  assert len(spelled) == 2 and all(
    x and ('Yes'.startswith(x) or 'No'.startswith(x)) for x in spelled
  )


def test_stages_that_the_options_leave_out_are_not_tested(tmp_path):
  with serve(label_answer()) as server:
    run = labels_run(server, tmp_path, {'variant': 'if_needed'})
    check_servers(run, ['generate'])
    assert not any('logit_bias' in body for body in server.bodies)


@pytest.mark.parametrize(
  ('fields', 'message'),
  [
    ({'logprob': None}, 'remote.critique: .*without the log-probability'),
    ({'ignore_bias': True}, 'remote.critique: .*ignores logit_bias'),
  ],
)
def test_a_server_that_cannot_choose_is_refused_before_the_run(fields, message, tmp_path):
  with serve(label_answer(**fields)) as server:
    with pytest.raises(UserError, match=message):
      check_servers(labels_run(server, tmp_path), ['generate'])


def test_log_probabilities_after_the_bias_are_refused(tmp_path):
  with serve(label_answer()) as server:
    run = labels_run(server, tmp_path, server='sglang')
  with pytest.raises(UserError, match="remote.critique: server='sglang' .*choose between labels"):
    runs._check_sampling(run.config)
  runs._check_sampling(served_run(server, tmp_path, server='sglang').config)
