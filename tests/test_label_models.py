"""AI feedback: served feedback models, and demonstrations."""

import contextlib
import dataclasses
import json

import pytest

from cai_jax.dialogue import Dialogue
from cai_jax.feedback.comparisons.asking import THINK, FeedbackModel
from cai_jax.feedback.comparisons.config import LabelConfig
from cai_jax.feedback.stage import Stage
from cai_jax.runtime.errors import UserError
from cai_jax.sampling.remote import Remote, RemoteConfig
from cai_jax.sampling.types import LabelTurn
from tests.faults.servers import complete, respond, serve
from tests.label_setup import (
  PRINCIPLES,
  SHORT,
  make_job,
  run,
  sigmoid,
)
from tests.label_setup import lm as lm
from tests.label_setup import pairs_file as pairs_file
from tests.served_setup import FOLDER, TOKENIZER

# Served feedback models.


def served(running, **fields):
  address = {'url': running.url, 'model': 'served', 'tokenizer': FOLDER}
  quick = {'server': 'vllm', 'max_positions': 4096, 'backoff_seconds': 0.0, 'retries': 0}
  return RemoteConfig(**address | quick | fields)


def label_answer(body):
  """The answer of a server that applies biases, with a log-probability by the label."""
  content = complete(body, TOKENIZER)
  if 'logit_bias' in body:
    token = int(next(iter(body['logit_bias'])))
    content = complete(body, TOKENIZER, TOKENIZER.decode([token]))
    content['choices'][0]['token_ids'] = [token]
    value = -0.5 if TOKENIZER.decode([token]).strip() == 'A' else -1.5
    content['choices'][0]['logprobs'] = {'tokens': [''], 'token_logprobs': [value]}
  return respond(200, content)


def test_a_served_model_labels_by_token_ids(pairs_file, tmp_path):
  with serve(label_answer) as server:
    config = LabelConfig(comparisons=(pairs_file,), remote=served(server))
    with contextlib.closing(Remote(config.remote)) as remote:
      job = make_job({'feedback': remote}, config)
      (turns,) = job.test_turns().values()
      assert len(turns) == 2 and all(isinstance(turn, LabelTurn) for turn in turns)
      costs = []
      summary, rows = run(job, tmp_path, write_costs=costs.append)
      assert len(server.bodies) == 8 and all(isinstance(b['prompt'], list) for b in server.bodies)
      run(job, tmp_path)
      assert len(server.bodies) == 8  # nothing is asked twice
  assert summary['ties'] == 1.0 and summary['option_a'] == 1.0 and summary['consistent'] == 0.0
  assert rows[0]['readings'][0]['probability_a'] == pytest.approx(sigmoid(1))
  assert costs[0]['feedback'].answers == 8


def test_a_chat_gives_its_label_as_text_only(pairs_file, tmp_path):
  def answer(body):
    question = body['messages'][-1]['content']
    text = 'I cannot tell.'
    if 'rain' in question:
      is_first = question.index('No.') > question.index('I like')
      text = '(A)' if is_first else 'It is (B), the answer.'
    choice = {'index': 0, 'message': {'role': 'assistant', 'content': text}}
    usage = {'prompt_tokens': 9, 'completion_tokens': 3}
    return respond(200, {'choices': [choice | {'finish_reason': 'stop'}], 'usage': usage})

  with serve(answer) as server:
    config = LabelConfig(comparisons=(pairs_file,), remote=served(server, prompt='chat'))
    with contextlib.closing(Remote(config.remote)) as remote:
      with pytest.raises(UserError, match="needs log-probabilities .* Set label.verdict='text'"):
        make_job({'feedback': remote}, config)
      config = dataclasses.replace(config, verdict='text')
      summary, rows = run(make_job({'feedback': remote}, config), tmp_path)
  assert [row['probability'] for row in rows] == [1.0, 0.5]
  assert rows[0]['chosen'][0]['content'] == 'I like rain.'
  assert summary['unread'] == 0.5 and summary['ties'] == 0.5 and summary['label_mass'] is None


def test_a_server_whose_log_probabilities_follow_the_bias_is_refused(pairs_file):
  with serve(label_answer) as server:
    config = LabelConfig(comparisons=(pairs_file,), remote=served(server, server='sglang'))
    with contextlib.closing(Remote(config.remote)) as remote:
      with pytest.raises(UserError, match="label.remote: server='sglang'"):
        make_job({'feedback': remote}, config)


# Demonstrations.

PUBLISHED = {
  'prompt': '\n\nHuman: Who are you?\n\nAssistant: A program.\n\nHuman: Really?\n\nAssistant:',
  'corrects': ['Yes, really.'],
  'incorrects': ['No, I lied.'],
}
THINKING = (
  '\n\nHuman: Consider a conversation between a human (H) and an assistant (A):\n\n'
  'H: Who are you?\n\nA:  A program.\n\nH:  Really?\n\n{}\n (A) [[[No, I lied.]]]\n'
  " (B) [[[Yes, really.]]]\n\nAssistant: Let's think step by step:\n(A) admits a lie.\n\nSo no."
  '\n\nHuman:\nSo the answer is: (B)'
)
OURS = {'prompt': 'Who?', 'chosen': 'I.', 'rejected': 'You.', 'thoughts': 'I am I.'}


def demonstrated(lm, path, thoughts=0):
  """Return what precedes a question, as (question, answer) pairs."""
  config = LabelConfig(comparisons=(), responses=2, demonstrations=str(path), thoughts=thoughts)
  job = make_job({'responses': lm, 'feedback': lm}, config)
  model = FeedbackModel(
    Stage('feedback', Dialogue(lm.tokenizer), SHORT), 'logprobs', thoughts, job.demonstrations
  )
  return [
    tuple(message['content'] for message in model._demonstrate(d, PRINCIPLES[0], ''))
    for d in model.demonstrations
  ]


def test_demonstrations_of_each_form_precede_the_question(lm, tmp_path):
  path = tmp_path / 'demonstrations.json'
  path.write_text(json.dumps([PUBLISHED, PUBLISHED]))
  (first, answer), (second, other) = demonstrated(lm, path)
  assert 'Human: Really?\n\nChoose the kinder one. Options:\n (A) Yes, really.\n (B) No, I' in first
  assert 'Human: Who are you?\n\nAssistant: A program.' in first
  assert ' (A) No, I lied.\n (B) Yes, really.' in second
  assert (answer, other) == ('The answer is: (A)', 'The answer is: (B)')
  path.write_text(json.dumps([{'prompt': THINKING}]))
  ((question, answer),) = demonstrated(lm, path, thoughts=8)
  assert ' (A) No, I lied.\n (B) Yes, really.' in question
  assert answer == f'{THINK} (A) admits a lie.\n\nSo no.\n\nThe answer is: (B)'
  path.write_text(json.dumps(OURS) + '\n' + json.dumps(OURS | {'principle': 'Choose I.'}))
  assert [q.partition('\n\n')[2].count('Choose I.') for q, _ in demonstrated(lm, path)] == [0, 1]


@pytest.mark.parametrize(
  ('content', 'thoughts', 'message'),
  [
    ('', 0, 'has no demonstration'),
    ('{', 0, 'neither a JSON list nor JSON Lines'),
    ('[3]', 0, 'demonstration 1: it must be an object'),
    ('{"prompt": "Who?", "chosen": "I."}', 0, "demonstration 1: it has no 'rejected'"),
    ('[{"prompt": "Human: a"}]', 0, 'demonstration 1: a text must have a conversation'),
    (json.dumps([PUBLISHED | {'corrects': []}]), 0, "'corrects' must be a list of one text"),
    (json.dumps(OURS | {'rejected': ' '}), 0, 'rejected must be non-blank text'),
    (json.dumps([PUBLISHED]), 8, 'demonstration 1 has no thoughts, but label.thoughts=8'),
  ],
)
def test_wrong_demonstrations_are_refused_by_number(lm, tmp_path, content, thoughts, message):
  path = tmp_path / 'demonstrations.json'
  path.write_text(content)
  with pytest.raises(UserError, match=message):
    demonstrated(lm, path, thoughts)
