"""Settings: flat names, identities, and changes between starts."""

import dataclasses
import json
from collections.abc import Mapping

import pytest

from cai_jax.constitution import ConstitutionConfig
from cai_jax.data.prompt_sources import PromptSource
from cai_jax.feedback.config import FeedbackConfig, StageSampling
from cai_jax.model.config import DeltaRule, Experts, Llama3Rope, ModelConfig, QueryGrowth, Rope
from cai_jax.runtime.settings import changed_settings, flatten, identity, setting
from cai_jax.sampling.types import SamplingConfig
from cai_jax.training.config import TrainConfig


def test_a_missing_saved_setting_counts_as_its_default():
  defaults = {'train.loss': 'nll', 'train.filters': ()}
  current = {'train.epochs': 1, 'train.loss': 'nll', 'train.filters': ()}
  assert changed_settings({'train.epochs': 1}, current, defaults) == {}
  changed = changed_settings({'train.epochs': 2}, current | {'train.loss': 'dpo'}, defaults)
  assert changed == {'train.epochs': (2, 1), 'train.loss': ('nll', 'dpo')}


def test_settings_without_a_default_must_be_equal():
  assert changed_settings({}, {'data': 'a'}, {}) == {'data': (None, 'a')}
  assert changed_settings({'data': 'a'}, {}, {}) == {'data': ('a', None)}


def test_flatten_joins_nested_names_with_dots():
  assert flatten({'train': {'epochs': 1}, 'seed': 0}) == {'train.epochs': 1, 'seed': 0}


@dataclasses.dataclass(frozen=True)
class Grown:
  """Settings with a field that a later version added."""

  old: int = 1
  new: float = setting(0.0, 'A penalty.', added=True)


def test_an_added_field_changes_no_identity_while_it_has_its_default():
  assert identity(Grown()) == {'old': 1}
  assert identity(Grown(old=2, new=0.5)) == {'old': 2, 'new': 0.5}


@dataclasses.dataclass(frozen=True)
class Nested:
  """Settings that contain other settings."""

  one: Grown = Grown()
  many: tuple = (Grown(), (Grown(new=1.0), 'text'))
  by_name: Mapping = dataclasses.field(default_factory=lambda: {'a': Grown()})


def test_added_fields_of_nested_settings_leave_identities_alone():
  assert identity(Nested()) == {
    'one': {'old': 1},
    'many': ({'old': 1}, ({'old': 1, 'new': 1.0}, 'text')),
    'by_name': {'a': {'old': 1}},
  }


PENALIZED = SamplingConfig(
  min_p=0.1,
  repetition_penalty=1.1,
  presence_penalty=0.1,
  frequency_penalty=0.1,
  logit_bias=((1, 1.0),),
  max_thought_tokens=8,
)


PROMPTS = PromptSource(
  path='copy.csv',
  where=('label=safe',),
  expand='every_turn',
  invalid='skip',
  plain=True,
  system_field='rules',
  message_keys=('speaker', 'text'),
  roles=('agent=assistant',),
  drop_answer=True,
)
# No real source has it beside a path.
object.__setattr__(PROMPTS, 'mixture', ('xstest:1',))


MODEL = ModelConfig(
  'llama', 9, 4, 4, 2, 1, 1, 4, 8, 1e4, Llama3Rope(8.0, 1.0, 4.0, 32), qk_norm=True,
  rope_channels=2, rope_interleaved=True, ropes=(Rope(), None), learned_positions=True,
  norm_offset=1.0, pre_norm=False, post_norm=True, parallel_blocks=True, qk_norm_over_heads=True,
  activation='gelu', gated=False, mlp_bias=True, query_scale=0.5, attention_cap=50.0,
  embedding_scale=2.0, residual_scale=0.5, logit_divisor=2.0, logit_cap=30.0,
  head_dims=(4, 2), kv_heads=(1, 1), value_norm=True, values_from_keys=(True, False),
  layer_scalar=True, query_growth=QueryGrowth(0.5, 4), sinks=True, attention_gate=True,
)  # fmt: skip
# No real model has these beside norm_offset and mlp_bias.
object.__setattr__(MODEL, 'norm', 'layer')
EXPERTS = Experts(4, 2, 8, False, False, (1,), bias=True, limit=7.0, up_offset=1.0)
object.__setattr__(MODEL, 'experts', EXPERTS)
object.__setattr__(MODEL, 'delta', DeltaRule((0,), 1, 2, 4, 4, 3))


@pytest.mark.parametrize(
  'settings',
  [
    FeedbackConfig(
      template_options=(('thinking', False),),
      topicality=False,
      variant='debate',
      options=(('statements', 2),),
    ),
    StageSampling(PENALIZED, PENALIZED, PENALIZED),
    ConstitutionConfig(leave_out=('a',)),
    MODEL,
    PROMPTS,
    TrainConfig(
      export_dtype='float32',
      deterministic=False,
      reasoning='keep',
      balance_loss=0.1,
      lora_rank=2,
      base_weights='int8',
      lora_init='adapter',
      lora_export=True,
      layers='scan',
    ),
  ],
)
def test_identity_of_settings_is_all_their_fields(settings):
  """No field that was added has its default here, so digests cover all fields."""
  assert json.dumps(identity(settings)) == json.dumps(dataclasses.asdict(settings))
