"""Configs: a default stands in configs/default.py and in a dataclass, and is the same in both."""

import dataclasses
import importlib
import pathlib

import pytest

from cai_jax import pipeline
from cai_jax.constitution import ConstitutionConfig
from cai_jax.data import quality
from cai_jax.data.prompts import PromptSource
from cai_jax.feedback.config import FeedbackConfig
from cai_jax.runtime.settings import flatten
from cai_jax.sampling.config import EngineConfig
from cai_jax.sampling.remote import RemoteConfig
from cai_jax.sampling.types import SamplingConfig
from cai_jax.training.config import MAY_CHANGE_ON_RESUME, TrainConfig
from configs import bai2022_sl_cai, default

CONFIG = default.get_config()
OTHERS = sorted(path.stem for path in pathlib.Path(default.__file__).parent.glob('*.py'))


@pytest.mark.parametrize(
  ('section', 'component'),
  [
    (CONFIG.feedback, FeedbackConfig()),
    (CONFIG.sampling.initial, SamplingConfig()),
    (CONFIG.sampling.critique, SamplingConfig()),
    (CONFIG.sampling.revision, SamplingConfig()),
    (CONFIG.engine, EngineConfig()),
    (CONFIG.train, TrainConfig()),
    (CONFIG.constitution, ConstitutionConfig()),
    (CONFIG.prompts.harmful, PromptSource()),
    (CONFIG.prompts.eval_helpful, PromptSource()),
  ],
  ids=(
    'feedback',
    'initial',
    'critique',
    'revision',
    'engine',
    'train',
    'constitution',
    'harmful',
    'eval_helpful',
  ),
)
def test_defaults_are_those_of_the_component(section, component):
  fields = dataclasses.asdict(component)
  if isinstance(component, TrainConfig):
    assert fields.pop('seed') == CONFIG.seed  # one seed for the whole run
  assert section.to_dict() == fields


@pytest.mark.parametrize('name', OTHERS)
def test_a_config_has_the_fields_of_the_default_and_values_that_components_take(name):
  config = importlib.import_module(f'configs.{name}').get_config()
  assert set(flatten(config.to_dict())) == set(flatten(CONFIG.to_dict()))
  TrainConfig(seed=config.seed, **config.train)
  EngineConfig(**config.engine)
  FeedbackConfig(**config.feedback)
  for stage in config.sampling.values():
    SamplingConfig(**stage)


def test_defaults_of_remotes():
  none = {'url': '', 'model': '', 'tokenizer': ''}
  component = dataclasses.asdict(RemoteConfig('http://localhost/v1', 'model', 'tokenizer')) | none
  assert set(CONFIG.remote) == {'base', 'critique', 'revision'}
  for section in CONFIG.remote.values():
    assert section.to_dict() == component


def test_fields_that_may_change_on_resume_exist():
  assert set(MAY_CHANGE_ON_RESUME) < {field.name for field in dataclasses.fields(TrainConfig)}


def test_template_options_come_from_a_command_line():
  """As config_flags sets a tuple: its type is kept, and pairs reach the component as they are."""
  config = default.get_config()
  config.feedback.template_options = (('enable_thinking', False),)
  assert FeedbackConfig(**config.feedback).template_options == (('enable_thinking', False),)


def test_limits_are_of_all_defects():
  assert CONFIG.feedback.max_rate.to_dict() == dict.fromkeys(quality.FLAGS, 1.0)
  with pytest.raises(ValueError, match=r'max_rate.odd=0.5; .*preamble'):
    FeedbackConfig(max_rate={'odd': 0.5})
  with pytest.raises(ValueError, match=r'max_rate.preamble=5'):
    FeedbackConfig(max_rate={'preamble': 5})


@pytest.mark.parametrize('filters', [('odd',), 'preamble'])
def test_filters_are_names_of_defects(filters):
  with pytest.raises(ValueError, match='train.filters=.*must be a tuple of names of .*preamble'):
    TrainConfig(filters=filters)


def test_the_papers_recipe_is_built_and_has_its_counts(data_dir, tmp_path):
  config = bai2022_sl_cai.get_config()
  harmful, helpful = config.prompts.harmful.limit, config.prompts.helpful.limit
  assert (harmful, helpful) == (182_831, 135_296)
  share = config.train.helpfulness_share
  revisions = harmful * config.feedback.rounds
  assert (
    round(share * revisions / (1 - share)) == 270_592 == config.feedback.helpful_samples * helpful
  )
  for name in ('harmful', 'helpful', 'eval_harmful'):
    source = tmp_path / f'{name}.txt'
    source.write_text(f'The {name} one.\nThe {name} other.\n')
    config.prompts[name].source = str(source)
  config.constitution.path = str(data_dir('cai_paper') / 'prompts')
  run = pipeline.build(config, tmp_path / 'run')
  assert len(run.constitution.principles) == 16 and len(run.constitution.demonstrations) == 5
  assert [len(run.prompts[name]) for name in ('harmful', 'helpful')] == [2, 2]
  assert {s.temperature for s in (run.config.sampling.initial, run.config.sampling.critique)} == {
    1.0
  }
