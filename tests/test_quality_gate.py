"""Which runs the limits of defects stop, what the message says, and when the limits apply."""

import json
import re

import pytest
from pipeline_setup import small

from cai_jax import pipeline
from cai_jax.data import quality, quality_summary
from cai_jax.data.published import read_published_samples
from cai_jax.pipeline.quality_gate import describe_excess, exceeded_limits
from cai_jax.runtime.errors import UserError

pytestmark = pytest.mark.usefixtures('single_device')

REFERENCES = quality.build_references({'p': ('Say what is wrong here.', 'Mend it.')})
TOPICS = (
  'bread',
  'chess',
  'tulips',
  'rivers',
  'bridges',
  'violins',
  'owls',
  'clouds',
  'trains',
  'salt',
)


def turn(text, finish='stop', logprob=-1.0):
  return {'text': text, 'finish_reason': finish, 'logprob': 20 * logprob, 'num_tokens': 20}


def summary_of(revisions, critique='The answer could be kinder to the user.'):
  """Return the summary of rows with one round whose prompts are about different topics."""
  rows = [
    {
      'id': str(i),
      'prompt': [{'role': 'user', 'content': f'What do you know about {TOPICS[i % 10]}?'}],
      'initial': turn(f'I know a lot about {TOPICS[i % 10]}, and so do you.'),
      'rounds': [{'principle': 'p', 'critique': turn(critique), 'revision': revision}],
    }
    for i, revision in enumerate(revisions)
  ]
  return quality_summary.summarize(rows, REFERENCES)


def sound(i, finish='stop'):
  return turn(
    f'Much is known about {TOPICS[i % 10]}: some of it is old, and all is dear to me.', finish
  )


def stops(revisions, limits=quality.MAX_RATE):
  return exceeded_limits(summary_of(revisions), limits)


def test_sound_runs_pass_even_if_a_fifth_is_cut_off():
  assert not stops([sound(i) for i in range(40)])
  assert not stops([sound(i, 'length' if i % 5 == 0 else 'stop') for i in range(200)])


@pytest.mark.parametrize(
  ('text', 'logprob', 'defect', 'meaning'),
  [
    ('I am here to help, and I am here to help, and I am here to help.', -0.1, 'repetition',
     'repeat themselves'),
    ('Pheetsin lies by all shelves; crystal to wear under the mist of Sunday.', -4.0, 'low_logprob',
     'are text that the model itself finds unlikely'),
    ('The rumour is a tale of somebody who was deceived long ago.', -0.5, 'off_topic_words',
     'have no content word of the prompt'),
    ('Es ist nicht gut, wenn man das mit den anderen auf der Straße macht.', -1.0, 'wrong_language',
     'are in another language than the prompt'),
    ('', -1.0, 'empty', 'are empty'),
  ],
)  # fmt: skip
def test_collapsed_runs_are_stopped_in_plain_words(text, logprob, defect, meaning):
  revisions = [turn(text, logprob=logprob) if i % 4 else sound(i) for i in range(40)]
  exceeded = stops(revisions)
  assert exceeded[defect] == (0.75, 0.3)
  assert 'The revisions have collapsed: ' in describe_excess(exceeded)
  assert f'75 % {meaning} (limit 30 %)' in describe_excess(exceeded)


def test_a_limit_applies_once_the_interval_is_above_it():
  """Wilson's interval of 3 of 4 is [0.30, 0.95], and that of 4 of 4 is [0.51, 1]."""
  cut = [sound(i, 'length') for i in range(4)]
  assert stops(cut, {'truncated': 0.5}) == {'truncated': (1.0, 0.5)}
  assert not stops([*cut[:3], sound(3)], {'truncated': 0.5})
  assert not stops(cut, {'truncated': 1.0})
  step = {'principle': 'p', 'critique': turn('It is rude.'), 'revision': turn('y', 'length')}
  rows = [{'id': 'a', 'prompt': [], 'initial': turn('x'), 'rounds': [step] * 50}]
  many_rounds = quality_summary.summarize(rows, REFERENCES)
  assert many_rounds['flags']['truncated']['rate'] == 1
  assert not exceeded_limits(many_rounds, {'truncated': 0.5}), 'one row is one trial'


def test_published_samples_pass(data_dir):
  path = data_dir('cai_paper') / 'samples' / 'PALMS_SLMADISON.jsonl'
  rows, principles = read_published_samples(path)
  summary = quality_summary.summarize(rows, quality.build_references(principles))
  assert not exceeded_limits(summary, quality.MAX_RATE)
  assert 0.05 < summary['flags']['off_topic_words']['rate'] < 0.15


def test_training_does_not_start_although_the_rows_were_generated_before(
  random_model, tmp_path, capsys
):
  config = small(random_model)
  config.feedback.topicality = True
  pipeline.run_stages(pipeline.build(config, tmp_path), ['generate'])
  summary = json.loads((tmp_path / 'quality.json').read_text())['d_cai']
  records = [
    json.loads(line) for line in (tmp_path / 'quality_rows.jsonl').read_text().splitlines()
  ]
  assert len(records) == summary['revisions'] == 20
  for record in records:
    assert set(record['scores']) == {'topicality', 'mean_logprob'}
    is_off = record['scores']['topicality'] <= summary['topicality_threshold']
    assert ('off_topic' in record['flags']) == is_off
    assert ('low_logprob' in record['flags']) == (record['scores']['mean_logprob'] < -3)
  for name in quality.FLAGS:
    assert summary['flags'][name]['count'] == sum(name in record['flags'] for record in records)

  config.feedback.max_rate.low_logprob = 0.3
  capsys.readouterr()
  with pytest.raises(
    UserError, match='have collapsed: .*finds unlikely .*raise feedback.max_rate.lo'
  ):
    pipeline.run_stages(pipeline.build(config, tmp_path), ['generate', 'train'])
  out = capsys.readouterr().out
  assert 'generate: done before' in out and '5 of the 20 revisions to read' in out
  assert len(re.findall('  prompt: .*\n  before: .*\n  revision: ', out)) == 5
  assert not (tmp_path / 'model').exists()
  (tmp_path / 'quality_rows.jsonl').unlink()
  with pytest.raises(UserError, match='have collapsed'):
    pipeline.run_stages(pipeline.build(config, tmp_path), ['train'])
