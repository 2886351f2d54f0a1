"""Config.json of Gemma 4: the heads of its layers, and what is refused."""

import json

import pytest
import transformers

from cai_jax.model.classifier import inspect_classifier
from cai_jax.model.families.family import config_from_hf, config_to_hf
from cai_jax.model.rope import ProportionalRope, Rope
from cai_jax.runtime.errors import UserError

FULL, SLIDING = 'full_attention', 'sliding_attention'
CONFIG = {
  'model_type': 'gemma4_text',
  'hidden_size': 32,
  'intermediate_size': 48,
  'num_hidden_layers': 7,
  'num_attention_heads': 4,
  'hidden_size_per_layer_input': 0,
}
OWN_HEADS = {'head_dim': 512, 'num_key_value_heads': 1}


def read(**entries):
  return config_from_hf({**CONFIG, **entries})


def test_absent_entries_have_the_defaults_of_transformers():
  config = read()
  assert config.windows == (512,) * 5 + (None, None)  # the last layer is always full
  assert (config.head_dim, config.head_dims) == (256, (256,) * 5 + (512, 512))
  assert (config.num_kv_heads, config.kv_heads, config.values_from_keys) == (4, (), ())
  assert config.query_scale == 1.0 and config.tied_embeddings and config.logit_cap is None
  assert config.rope(0) == Rope(1e4) and config.rope(6) == Rope(1e6, ProportionalRope(0.25))
  assert config_from_hf(config_to_hf(config)) == config


def test_the_last_layer_is_full_whatever_layer_types_says():
  assert read(layer_types=[SLIDING] * 7).windows == (512,) * 6 + (None,)


def test_heads_of_full_layers_have_two_forms():
  old = read(attention_k_eq_v=True, num_global_key_value_heads=1)
  assert old.kv_heads == (4,) * 5 + (1, 1) and old.values_from_keys == (False,) * 5 + (True, True)
  assert read(attention_k_eq_v=True, per_layer_config={'5': OWN_HEADS, '6': OWN_HEADS}) == old
  both = {'global_head_dim': 512, 'per_layer_config': {'5': OWN_HEADS, '6': OWN_HEADS}}
  assert read(attention_k_eq_v=True, **both) == old
  assert config_from_hf(config_to_hf(old)) == old
  # Without attention_k_eq_v, transformers does not read the number.
  assert read(num_global_key_value_heads=1).kv_heads == ()


def test_what_transformers_writes_for_the_heads_of_many_layers_is_read():
  """It writes '05' for layer 5 of 12."""
  hf = {**CONFIG, 'num_hidden_layers': 12, 'attention_k_eq_v': True}
  hf['num_global_key_value_heads'] = 1
  theirs = transformers.AutoConfig.for_model(**hf).to_dict()
  assert theirs['per_layer_config'].keys() == {'05', '11'}
  assert config_from_hf(theirs) == config_from_hf(hf)


def test_equal_heads_need_no_entry_for_each_layer():
  assert read(global_head_dim=256).head_dims == () == read(per_layer_config={}).head_dims


def test_a_partly_stated_rotation_is_completed():
  assert read(rope_parameters={FULL: {'rope_type': 'default'}}).rope(6) == Rope(1e6)
  assert read(rope_parameters={FULL: {'rope_type': 'default'}}).rope(0) == Rope(1e4)


@pytest.mark.parametrize(
  ('entries', 'message'),
  [
    (
      {'hidden_size_per_layer_input': None},
      r'per-layer embeddings \(hidden_size_per_layer_input=2',
    ),
    ({'num_kv_shared_layers': 2}, r'keys and values shared across layers \(num_kv_shared_layers=2'),
    ({'use_double_wide_mlp': True}, r'double-wide feed-forward layers \(use_double_wide_mlp'),
    ({'enable_moe_block': True}, 'mixtures of experts beside a feed-forward layer'),
    ({'num_experts': 8}, r'mixtures of experts \(num_experts=8'),
    ({'use_bidirectional_attention': 'all'}, "only False or 'vision' is"),
    ({'attn_logit_softcapping': 50.0}, 'attn_logit_softcapping=50.0 is not supported'),
    ({'query_pre_attn_scalar': 256}, 'query_pre_attn_scalar=256 is not supported'),
    ({'sliding_window': None}, 'sliding_window is None'),
    ({'per_layer_config': [1]}, 'per_layer_config is .*It must be an object'),
    ({'per_layer_config': {'last': OWN_HEADS}}, 'per_layer_config is .*It must be an object'),
    ({'per_layer_config': {'6': OWN_HEADS}}, 'and for no other: 5, 6'),
    ({'per_layer_config': {str(layer): OWN_HEADS for layer in range(7)}}, 'for no other: 5, 6'),
    ({'per_layer_config': {'5': {'skip': []}, '6': {'skip': []}}}, "has 'skip', which is not"),
    ({'per_layer_config': {'5': OWN_HEADS, '6': OWN_HEADS}}, 'only with attention_k_eq_v=true'),
    (
      {'per_layer_config': {'5': {}, '6': {}}, 'global_head_dim': 512},
      'head_dim=256, but global_head_dim=512',
    ),
    ({'attention_k_eq_v': True, 'num_global_key_value_heads': 3}, 'is not a multiple of'),
    ({'rope_theta': 5e5}, 'contradict'),
  ],
)
def test_what_is_not_implemented_is_refused(entries, message):
  with pytest.raises(UserError, match=message):
    read(**entries)


def test_images_may_see_each_other():
  """Which no text shows."""
  assert read(use_bidirectional_attention='vision') == read()


def test_there_is_no_classifier(tiny_hf_folder):
  with pytest.raises(UserError, match='no sequence classifier of the family gemma4_text'):
    inspect_classifier(tiny_hf_folder('gemma4'))


def test_other_families_do_not_have_these_options(tiny_hf_folder):
  entries = json.loads((tiny_hf_folder('llama2') / 'config.json').read_text())
  for option in ({'enable_moe_block': True}, {'per_layer_config': {'1': {'head_dim': 4}}}):
    with pytest.raises(UserError, match=f'{next(iter(option))}=.* is not supported'):
      config_from_hf({**entries, **option})
