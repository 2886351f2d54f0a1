"""Sampling settings that a config takes from generation_config.json."""

import json
import shutil

import pytest
from absl import flags
from ml_collections import config_flags

from cai_jax import pipeline
from cai_jax.experiment.define import override_config
from cai_jax.feedback.config import StageSampling
from cai_jax.pipeline.schema import AS_RECOMMENDED, complete_config, default_config
from cai_jax.runtime.errors import UserError
from cai_jax.sampling.types import SamplingConfig
from configs import default
from tests.pipeline_setup import small

RECOMMENDED = {'do_sample': True, 'temperature': 0.6, 'top_p': 0.95, 'top_k': 20}


@pytest.fixture
def make_model(random_model, tmp_path):
  """`make_model(name, entries)` copies a model and adds to its generation_config.json."""

  def make(name, entries):
    folder = tmp_path / name
    shutil.copytree(random_model, folder)
    path = folder / 'generation_config.json'
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))
    return folder

  return make


def build(model, workdir, **fields):
  """Build a small run on a model, with fields of sampling.initial."""
  config = small(model)
  config.sampling.initial.update(fields)
  return pipeline.build(config, workdir)


def parse(*arguments):
  """Return the default config with the changes that command-line arguments make."""
  values = flags.FlagValues()
  argv = ['program', f'--config={default.__file__}', *arguments]
  config_flags.DEFINE_config_file('config', flag_values=values, sys_argv=argv)
  values(argv)
  return values.config


def test_a_config_can_be_updated_with_another():
  config, other = default.get_config(), default.get_config()
  other.sampling.initial.update(top_p='model', temperature=0.5)
  other.seed = 3
  config.update(other)
  assert complete_config(config).to_dict() == complete_config(other).to_dict()
  config.sampling.initial.top_p = 0.9
  assert other.sampling.initial.top_p == 'model'  # no value is shared


def test_each_stage_takes_the_values_of_the_model_that_samples_it(make_model, tmp_path):
  base = make_model('base', RECOMMENDED)
  critic = make_model('critic', {'temperature': 0.2})
  config = small(base)
  config.model.critique = str(critic)
  for stage in config.sampling.values():
    stage.update(AS_RECOMMENDED)
  run = pipeline.build(config, tmp_path / 'run')
  sampling = run.config.sampling
  assert sampling.initial == SamplingConfig(0.6, 20, 0.95, max_tokens=12)
  assert sampling.critique == SamplingConfig(0.2, 0, 1.0, max_tokens=9)
  assert sampling.revision == SamplingConfig(0.6, 20, 0.95, max_tokens=12)
  assert [note.partition(' from ')[0] for note in run.notes] == [
    'sampling.initial',
    'sampling.critique',
    'sampling.revision',
  ]
  assert 'temperature=0.6, top_k=20, top_p=0.95' in run.notes[0]
  assert f'{critic}: temperature=0.2; neutral' in run.notes[1]


def test_a_config_with_words_and_one_with_their_numbers_are_the_same_run(make_model, tmp_path):
  model = make_model('base', RECOMMENDED)
  words = build(model, tmp_path, **AS_RECOMMENDED)
  numbers = build(model, tmp_path, temperature=0.6, top_p=0.95, top_k=20)
  assert words.values == numbers.values and words.config == numbers.config
  assert words.settings('report') == numbers.settings('report')
  assert json.loads(json.dumps(words.values))['sampling']['initial']['top_k'] == 20
  assert numbers.notes == ()


@pytest.mark.parametrize(
  ('entries', 'expected'),
  [
    ({}, (1.0, 0, 1.0)),
    ({'temperature': 0.5}, (0.5, 0, 1.0)),
    (RECOMMENDED | {'do_sample': None}, (0.6, 20, 0.95)),
    (RECOMMENDED | {'do_sample': False}, (1.0, 0, 1.0)),
    ({'top_k': -1, 'temperature': 0}, (0.0, 0, 1.0)),
  ],
)
def test_what_the_file_does_not_state_is_neutral(entries, expected, make_model, tmp_path):
  run = build(make_model('base', entries), tmp_path, **AS_RECOMMENDED)
  initial = run.config.sampling.initial
  assert (initial.temperature, initial.top_k, initial.top_p) == expected
  assert type(initial.temperature) is float and type(initial.top_k) is int


def test_the_length_and_the_stop_texts_can_come_from_the_model(make_model, tmp_path):
  model = make_model('base', {'max_new_tokens': 10, 'stop_strings': 'END'})
  run = build(model, tmp_path, max_tokens='model', stop='model', stop_token_ids='model')
  assert run.config.sampling.initial == SamplingConfig(max_tokens=10, stop=('END',))


@pytest.mark.parametrize(
  ('entries', 'fields', 'message'),
  [
    ({}, {'max_tokens': 'model'}, r"initial.max_tokens='model', but .*base does not state max_new"),
    ({'top_p': 0.0}, {'top_p': 'model'}, r"initial.top_p='model', but in .*base: top_p=0.0 must"),
    ({'stop_strings': 3}, {'stop': 'model'}, r"initial.stop='model', but in .*base: stop must be"),
    ({'top_k': 'x'}, {'top_k': 'model'}, r"generation_config.json: top_k is 'x'"),
    ({}, {'temperature': 'warm'}, "temperature must be a number or 'model', but got 'warm'"),
    ({}, {'stop': 'models'}, r"stop must be a tuple, such as \(\) or \(x,\) or 'model', but got"),
  ],
)
def test_values_that_sampling_does_not_allow_are_named(
  entries, fields, message, make_model, tmp_path
):
  with pytest.raises(UserError, match=message):
    build(make_model('base', entries), tmp_path, **fields)


def test_the_embedded_and_a_served_model_are_neutral_and_the_run_says_so(tmp_path):
  config = small('tiny')
  for stage in config.sampling.values():
    stage.update(temperature='model', top_k='model')
  config.remote.critique.update(url='http://localhost:1/v1', model='m', tokenizer='tiny')
  run = pipeline.build(config, tmp_path)
  sampling = run.config.sampling
  assert sampling == StageSampling(
    SamplingConfig(max_tokens=12), SamplingConfig(max_tokens=9), SamplingConfig(max_tokens=12)
  )
  assert 'a served model, whose generation_config.json is not read: neutral' in run.notes[1]
  assert 'generation_config.json of tiny: neutral' in run.notes[2]


def test_the_command_line_takes_the_word_and_numbers():
  initial = parse('--config.sampling.initial.temperature=model').sampling.initial
  assert initial.temperature == 'model' and initial.top_p == 1.0
  initial = complete_config(
    parse(
      '--config.sampling.initial.temperature=1',
      '--config.sampling.initial.top_p=9e-1',
      '--config.sampling.initial.max_tokens=64',
      "--config.sampling.initial.stop=('a', 'b')",
    )
  ).sampling.initial
  values = initial.temperature, initial.top_p, initial.max_tokens, initial.stop
  assert values == (1.0, 0.9, 64, ('a', 'b')) and type(initial.temperature) is float
  with pytest.raises(UserError, match="max_tokens must be an integer or 'model', but got '6x'"):
    complete_config(parse('--config.sampling.initial.max_tokens=6x'))


def test_an_arm_of_an_experiment_can_take_the_word():
  config = complete_config(default_config())
  arm = override_config(config, {'sampling.critique.temperature': 'model'})
  assert arm.sampling.critique.temperature == 'model'
  again = override_config(arm, {'sampling.critique.temperature': 0.5})
  assert again.sampling.critique.temperature == 0.5
