"""Configs: the default, its reference page and the shipped configs follow the dataclasses."""

import dataclasses
import functools
import importlib
import json
import math
import pathlib
import re

import numpy as np
import pytest
from ml_collections import ConfigDict, config_dict

from cai_jax import pipeline
from cai_jax.constitution import ConstitutionConfig
from cai_jax.data import quality
from cai_jax.data.prompts import PromptSource
from cai_jax.evaluation.config import EvaluationConfig
from cai_jax.feedback.config import FeedbackConfig, StageSampling
from cai_jax.pipeline.configuration import configuration_markdown
from cai_jax.pipeline.preference_config import PolicyConfig, RewardConfig
from cai_jax.pipeline.schema import from_config, section_fields
from cai_jax.pipeline.sections import (
  DataConfig,
  MeshConfig,
  ModelSelection,
  ReportConfig,
  RunConfig,
)
from cai_jax.runtime.errors import UserError
from cai_jax.runtime.settings import flatten
from cai_jax.sampling.config import SIZES, EngineConfig
from cai_jax.sampling.remote import RemoteConfig
from cai_jax.sampling.types import SamplingConfig
from cai_jax.scoring.judge_server import JudgeServer
from cai_jax.training.config import TrainConfig
from cai_jax.training.fit_config import MAY_CHANGE_ON_RESUME, FitConfig
from configs import bai2022_sl_cai, default

CONFIG = default.get_config()
REMOTES = ('base', 'critique', 'revision')
REAL = (
  'smollm2_135m',
  'qwen3_4b',
  'llama3_8b',
  'gemma3_4b',
  'olmo3_7b',
  'smollm3_3b',
  'qwen3_30b_a3b',
)
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
    (CONFIG.evaluation, EvaluationConfig()),
    (CONFIG.model, ModelSelection()),
    (CONFIG.mesh, MeshConfig()),
    (CONFIG.data, DataConfig()),
    (CONFIG.report, ReportConfig()),
    (CONFIG.reward, RewardConfig()),
    (CONFIG.prefer, PolicyConfig()),
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
    'evaluation',
    'model',
    'mesh',
    'data',
    'report',
    'reward',
    'prefer',
  ),
)
def test_defaults_are_those_of_the_component(section, component):
  fields = dataclasses.asdict(component)
  if isinstance(component, FitConfig):
    assert fields.pop('seed') == CONFIG.seed  # one seed for the whole run
    assert fields.pop('layers') == CONFIG.model.layers
  if isinstance(component, EvaluationConfig):
    server = dataclasses.asdict(JudgeServer('http://localhost/v1', 'model'))
    for name in ('judge_remote', 'guard_remote'):
      assert fields[name] is None  # a section without a URL
      fields[name] = server | {'url': '', 'model': ''}
  assert section.to_dict() == fields


@pytest.mark.parametrize('name', OTHERS)
def test_shipped_config_has_the_default_fields_and_valid_values(name):
  config = importlib.import_module(f'configs.{name}').get_config()
  assert set(flatten(config.to_dict())) == set(flatten(CONFIG.to_dict()))
  TrainConfig(seed=config.seed, **config.train)
  RewardConfig(seed=config.seed, **config.reward)
  PolicyConfig(seed=config.seed, **config.prefer)
  EngineConfig(**config.engine)
  FeedbackConfig(**config.feedback)
  for stage in config.sampling.values():  # 'model' stands for what the model's file says
    SamplingConfig(**{name: value for name, value in stage.items() if value != 'model'})


def test_each_remote_has_the_defaults_of_its_component_and_no_server():
  none = {'url': '', 'model': '', 'tokenizer': ''}
  component = dataclasses.asdict(RemoteConfig('http://localhost/v1', 'model', 'tokenizer')) | none
  assert set(CONFIG.remote) == {'base', 'critique', 'revision'}
  for section in CONFIG.remote.values():
    assert section.to_dict() == component


def test_fields_that_may_change_on_resume_exist():
  assert set(MAY_CHANGE_ON_RESUME) < {field.name for field in dataclasses.fields(TrainConfig)}


def test_template_options_can_be_set_on_the_command_line():
  """As config_flags sets a tuple: its type is kept, and pairs reach the component as they are."""
  config = default.get_config()
  config.feedback.template_options = (('enable_thinking', False),)
  assert FeedbackConfig(**config.feedback).template_options == (('enable_thinking', False),)


def test_former_names_of_defects_are_read_and_named(tmp_path, capsys):
  run = pipeline.build(ConfigDict({'feedback': {'max_rate': {'no_finding': 0.25}}}), tmp_path)
  assert run.config.feedback.max_rate == quality.MAX_RATE | {'no_finding_phrase': 0.25}
  assert 'no_finding is now called feedback.max_rate.no_finding_phrase' in capsys.readouterr().out
  both = {'feedback': {'max_rate': {'no_finding': 0.25, 'no_finding_phrase': 0.5}}}
  with pytest.raises(UserError, match='no field feedback.max_rate.no_finding. Did you mean feedb'):
    pipeline.build(ConfigDict(both), tmp_path)
  assert TrainConfig(filters=('preamble', 'empty')).filters == ('preamble', 'empty')
  with pytest.raises(UserError, match='must be a tuple of names'):
    TrainConfig(filters=('off_topic',))  # it needs a model


def test_max_rate_has_a_limit_for_each_defect():
  assert CONFIG.feedback.max_rate.to_dict() == quality.MAX_RATE
  assert quality.MAX_RATE.keys() == quality.FLAGS.keys()
  with pytest.raises(UserError, match=r'max_rate.odd=0.5 .*preamble_phrase'):
    FeedbackConfig(max_rate={'odd': 0.5})
  with pytest.raises(UserError, match=r'max_rate.preamble_phrase=5'):
    FeedbackConfig(max_rate={'preamble_phrase': 5})


@pytest.mark.parametrize('filters', [('odd',), 'preamble_phrase'])
def test_filters_that_are_not_names_of_defects_are_refused(filters):
  with pytest.raises(
    UserError, match='train.filters=.*must be a tuple of names from .*preamble_phrase'
  ):
    TrainConfig(filters=filters)


def test_the_paper_config_has_the_counts_of_the_paper(data_dir, tmp_path):
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
  assert run.config.sampling == StageSampling() and SamplingConfig().temperature == 1.0


@pytest.mark.parametrize('name', REAL)
def test_a_preset_of_a_real_model_builds_with_prompts_for_its_share(name, random_model, tmp_path):
  config = importlib.import_module(f'configs.{name}').get_config()
  config.model.base = str(random_model)
  for prompts in ('harmful', 'helpful', 'eval_harmful'):
    if name == 'smollm2_135m' and prompts == 'helpful':
      continue  # it comes with helpful prompts
    path = tmp_path / f'{prompts}.txt'
    path.write_text(''.join(f'The {prompts} request {i}.\n' for i in range(36)))
    config.prompts[prompts].source = str(path)
  config.feedback.template_options = ()  # this model has another template
  config.mesh.update(data=-1, tensor=min(config.mesh.tensor, 2))  # and two key and value heads
  # What this model and the tests' eight CPU devices can hold.
  config.train.update(max_length=256, attention='blocks', batch_size=32, accumulation=1)
  config.sampling.initial.max_tokens = 96
  run = pipeline.build(config, tmp_path / 'run')
  pipeline.check_run(run, ['generate', 'train'])
  for field in dataclasses.fields(run.config.sampling):
    assert isinstance(getattr(run.config.sampling, field.name), SamplingConfig)


def test_fields_and_defaults_of_version_1_are_kept():
  path = pathlib.Path(__file__).parent / 'data' / 'config_version_1.json'
  fields = flatten(json.loads(CONFIG.to_json_best_effort()))
  before = json.loads(path.read_text())
  # Defects have other limits since 0.2.0, and two have other names.
  limits = [name for name in before if name.startswith('feedback.max_rate.')]
  for name in limits:
    del before[name]
    *_, defect = name.split('.')
    del fields[f'feedback.max_rate.{quality.RENAMED.get(defect, defect)}']
  # The device chooses the kernel since 0.2.0, and runs that have begun keep theirs.
  assert before.pop('train.attention') == 'blocks' and fields.pop('train.attention') == 'auto'
  assert before.pop('engine.spans') == 4  # without effect since the cache has pages
  # So it does the engine's sizes, and a run that has begun keeps those of its config.json.
  for name in SIZES:
    assert before.pop(f'engine.{name}', 0) != fields.pop(f'engine.{name}') == 'auto'
  assert {name: fields.get(name) for name in before} == before
  added = {'version', 'plugins', 'model.aligned', 'model.long_context', 'data.d_cai', 'train.loss'}
  added |= {'mesh.expert', 'mesh.sequence', 'train.balance_loss', 'constitution.leave_out'}
  added.add('model.layers')
  rows = ('plain', 'system_field', 'message_keys', 'roles', 'drop_answer', 'invalid')
  for name in CONFIG.prompts:
    added |= {f'prompts.{name}.{f}' for f in ('path', 'mixture', 'where', 'expand', *rows)}
  served = ('seed', 'give_up_seconds', 'limit_field', 'batch')
  served += ('requests_per_minute', 'tokens_per_minute')
  served += ('price_input', 'price_cached_input', 'price_output')
  added |= {f'remote.{r}.{f}' for r in REMOTES for f in served}
  judge = ('helpful_principles', 'labelled', 'labelled_limit', 'checks', 'reasoning')
  added |= {f'evaluation.judge_{name}' for name in judge}
  added |= {
    f'evaluation.{name}.{field.name}'
    for name in ('judge_remote', 'guard_remote')
    for field in dataclasses.fields(JudgeServer)
  }
  penalties = {f'{name}_penalty' for name in ('repetition', 'presence', 'frequency')}
  added |= {
    f'sampling.{stage}.{name}'
    for stage in CONFIG.sampling
    for name in penalties | {'min_p', 'logit_bias', 'max_thought_tokens'}
  }
  added |= {
    'train.export_dtype',
    'train.base_weights',
    'train.lora_init',
    'train.lora_export',
    'model.weights',
    'train.reasoning',
    'train.deterministic',
    'evaluation.scores',
    'evaluation.baselines',
    'evaluation.best_of_n',
    'evaluation.guards',
    'evaluation.guard_models',
    'evaluation.rubrics',
    'compilation.cache',
    'compilation.cache_gib',
    'engine.draft_tokens',
    'evaluation.reward_labelled',
  }
  whole = ('label.', 'reward.', 'prefer.', 'mesh_sampling.')  # sections that are added as a whole
  added |= {name for name in fields if name.startswith(whole)}
  defects = ('not_a_critique', 'critique_copied', 'wrong_language', 'off_topic_words')
  added.add('engine.attention')
  added |= {f'feedback.max_rate.{name}' for name in (*defects, 'off_topic', 'low_logprob')}
  assert set(fields) - set(before) == added | {'feedback.topicality', 'feedback.options'}


def test_config_of_version_1_builds_the_run_of_the_default_config(tmp_path, capsys):
  path = pathlib.Path(__file__).parent / 'data' / 'config_version_1.json'
  tree = {}
  for name, value in json.loads(path.read_text()).items():
    *sections, last = name.split('.')
    functools.reduce(lambda node, key: node.setdefault(key, {}), sections, tree)[last] = value
  run = pipeline.build(ConfigDict(tree), tmp_path)
  config = default.get_config()
  for name, limit in tree['feedback']['max_rate'].items():  # 1 in version 1
    config.feedback.max_rate[quality.RENAMED.get(name, name)] = limit
  config.train.attention = tree['train']['attention']  # 'auto' by now, as the engine's sizes
  config.engine.update({name: value for name, value in tree['engine'].items() if name in SIZES})
  expected = pipeline.build(config, tmp_path)
  assert 'version' not in tree and run.config == expected.config
  assert run.values == expected.values and run.settings('report') == expected.settings('report')
  assert 'engine.spans has no effect any more' in capsys.readouterr().out


def test_absent_fields_and_sections_have_their_defaults(tmp_path):
  run = pipeline.build(ConfigDict({'train': {'epochs': 3}, 'remote': {}}), tmp_path)
  assert run.config.train.epochs == 3 and run.config.seed == 0 and run.plugins == {}
  assert run.config.feedback == FeedbackConfig()


def test_reference_page_is_up_to_date():
  page = pathlib.Path(__file__).parents[1] / 'docs' / 'configuration.md'
  update = 'run `python -m cai_jax.pipeline.configuration > docs/configuration.md`'
  assert page.read_text() == configuration_markdown(), update


def test_reference_page_names_every_field():
  rows = re.findall(r'^\| `([\w.]+)` ', configuration_markdown(), re.M)
  for name in flatten(CONFIG.to_dict()):
    shared = name.startswith(('remote.', 'prompts.', 'sampling.'))
    shared |= '_remote.' in name or '.remote.' in name
    assert (name.split('.')[-1] if shared else name) in rows


def documented(section, path=''):
  """Yield (path, whether it is documented) of each value of a section and its subsections."""
  for field in section_fields(section):
    name = f'{path}.{field.name}'.strip('.')
    if field.section is None:
      yield name, bool(field.doc)
    else:
      yield from documented(field.section, name)


def test_every_field_is_documented():
  missing = [name for name, is_documented in documented(RunConfig) if not is_documented]
  assert not missing


def test_config_becomes_the_dataclasses_with_its_values():
  config = default.get_config()
  config.seed, config.train.epochs, config.sampling.critique.top_k = 7, 3, 5
  run_config = from_config(config)
  assert (run_config.seed, run_config.train.seed, run_config.train.epochs) == (7, 7, 3)
  assert run_config.sampling.critique.top_k == 5 and run_config.sampling.initial.top_k == 0
  assert run_config.remote.base is None


def test_invalid_value_is_refused_with_its_full_name():
  config = default.get_config()
  config.sampling.critique.top_p = 2.0
  with pytest.raises(UserError, match=r'^sampling.critique: top_p=2.0'):
    from_config(config)


def config_with(**fields):
  """The default config with some fields, given as section__field, at any value of any type."""
  config = default.get_config()
  with config.unlocked(), config.ignore_type():
    for name, value in fields.items():
      *sections, last = name.split('__')
      functools.reduce(lambda node, key: node[key], sections, config)[last] = value
  return config


@pytest.mark.parametrize(
  ('fields', 'message'),
  [
    ({'train__clip_norm': None}, 'train.clip_norm must be a number, but got None.'),
    ({'train__filters': None}, 'train.filters must be a tuple, such as () or (x,), but got None.'),
    ({'train': None}, 'train is a section with fields of its own, but got None.'),
    ({'train__epochs': 2.0}, 'train.epochs must be an integer, but got 2.0 (a float).'),
    ({'train__epochs': True}, 'train.epochs must be an integer, but got True (a bool).'),
    ({'train__learning_rate': '1'}, "train.learning_rate must be a number, but got '1' (a str)."),
    ({'train__learning_rate': math.inf}, 'train.learning_rate=inf must be a finite number'),
    ({'train__keep': 10**4000}, 'train.keep=(more than 18 digits) must'),
    (
      {'engine__slots': 10**12},
      'engine.slots=1000000000000 must be a finite number of at most 100,000',
    ),
    (
      {'feedback__rounds': 10**6},
      'feedback.rounds=1000000 must be a finite number of at most 1,000',
    ),
    (
      {'prompts__harmful__limit': 2**31},
      'prompts.harmful.limit=2147483648 must be a finite number of at',
    ),
    (
      {'seed': 2**63},
      'seed=(more than 18 digits) must be a finite number of at most 9,223,372,036,854,775,807',
    ),
    ({'seed': ConfigDict({'a': 1})}, 'seed must be an integer, but got a section.'),
    ({'sampling__initial__stop': (1,)}, 'sampling.initial.stop[0] must be a text, but got 1'),
    ({'sampling__initial__stop': 'a'}, 'sampling.initial.stop must be a tuple'),
    ({'model__base': 'a\0b'}, 'model.base contains a null character'),
    ({'model__base': 'a\ud800'}, 'model.base contains a null character or an unpaired surrogate'),
    ({'remote__base__url': b'secret'}, 'remote.base.url must be a text, but got a bytes.'),
    ({'remote__base__api_key_env': 12345}, 'api_key_env must be a text, but got an int.'),
    ({'feedback__max_rate': 0.5}, 'feedback.max_rate is a section'),
    ({'feedback__max_rate__odd': 0.5}, 'The config has no field feedback.max_rate.odd.'),
    ({'feedback__max_rate__empty': None}, 'feedback.max_rate.empty must be a number'),
    ({'feedback__template_options': (('a',),)}, 'template_options[0] must be a tuple of 2 values'),
    ({'feedback__template_options': (('a', [1]),)}, 'template_options[0][1] must be a text, a num'),
    ({'train__lerning_rate': 1}, 'no field train.lerning_rate. Did you mean train.learning_rate?'),
    ({'learning_rate': 1}, 'no field learning_rate. Did you mean train.learning_rate?'),
    ({'plugins': 'a.py'}, 'plugins must be a tuple'),
    ({'version': True}, 'version must be an integer, but got True (a bool).'),
    ({'seed': config_dict.placeholder(int, required=True)}, 'seed is required. Set --config.seed'),
  ],
)
def test_value_of_a_wrong_type_or_size_is_refused_with_its_field(fields, message):
  with pytest.raises(UserError) as refused:
    from_config(config_with(**fields))
  assert message in str(refused.value)


@pytest.mark.parametrize('config', [None, {}, 3])
def test_what_is_no_config_is_refused(config):
  with pytest.raises(UserError, match='It must be an ml_collections.ConfigDict'):
    from_config(config)


def test_equal_values_of_other_types_are_converted():
  lists = {'sampling__initial__stop': ['a', 'b'], 'feedback__template_options': [['think', False]]}
  numbers = {
    'train__learning_rate': 1,
    'train__epochs': np.int64(3),
    'engine__cache_gib': np.float32(2),
  }
  config = from_config(config_with(**lists, **numbers))
  assert config.sampling.initial.stop == ('a', 'b')
  assert config.feedback.template_options == (('think', False),)
  values = config.train.learning_rate, config.train.epochs, config.engine.cache_gib
  assert values == (1.0, 3, 2.0) and [type(v) for v in values] == [float, int, float]
