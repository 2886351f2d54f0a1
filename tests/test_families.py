"""Model families: configs and weight tables in both directions."""

import dataclasses
import itertools
import json
import pathlib
import re
import shutil

import jax
import numpy as np
import pytest
import safetensors.numpy
import transformers
from huggingface_hub.errors import StrictDataclassClassValidationError

import cai_jax
from cai_jax.model.checkpoint_checks import stored_weights
from cai_jax.model.config import Llama3Rope, ModelConfig, QueryGrowth
from cai_jax.model.families.family import FAMILIES, config_from_hf, config_to_hf
from cai_jax.model.families.weight_table import join_parts
from cai_jax.model.rope import YarnRope
from cai_jax.model.sharding import flatten_params
from cai_jax.model.supported import update_page
from cai_jax.model.transformer import abstract_model
from cai_jax.runtime.errors import UserError
from cai_jax.runtime.files import read_json
from cai_jax.runtime.mesh import make_mesh
from cai_jax.runtime.plugins import load_plugins
from cai_jax.sampling.engine import Engine
from tests.families import FAMILIES as LINES
from tests.families import make_config


def read_config(folder):
  return config_from_hf(read_json(folder / 'config.json'))


def ropes_of(config):
  return [config.rope(layer) for layer in range(config.num_layers)]


def test_configs_survive_a_round_trip(tiny_hf_folder, family):
  config = read_config(tiny_hf_folder(family))
  written = config_to_hf(config)
  assert config_from_hf(written) == config
  theirs = transformers.AutoConfig.for_model(**written)
  assert config_from_hf(theirs.to_dict()) == config
  # transformers 4 reads rope_theta and rope_scaling instead. It lacks families without them.
  older = {k: v for k, v in written.items() if k != 'rope_parameters'}
  if 'rope_theta' in older:
    assert ('rope_scaling' in older) == any(rope and rope.scaling for rope in ropes_of(config))
    assert config_from_hf(older) == config


def test_every_option_survives_a_round_trip_and_changes_config_json():
  base = ModelConfig('llama', 8, 16, 32, 2, 4, 2, 4, 64)
  rope = Llama3Rope(8.0, 1.0, 4.0, 32)
  configs = [
    base,
    dataclasses.replace(base, rope_scaling=rope),
    dataclasses.replace(base, rope_theta=5e5, norm_eps=1e-6, tied_embeddings=True),
    dataclasses.replace(base, head_dim=8, qkv_bias=True, output_bias=True),
    dataclasses.replace(base, family='mistral', windows=(7, 7)),
    dataclasses.replace(base, family='mistral'),
    dataclasses.replace(base, family='qwen2', qkv_bias=True, windows=(None, 7)),
    dataclasses.replace(base, family='qwen3', qk_norm=True, windows=(7, None)),
    dataclasses.replace(base, family='qwen3', qk_norm=True, qkv_bias=True, output_bias=True),
  ]
  for config in configs:
    assert config_from_hf(config_to_hf(config)) == config
  assert len({str(config_to_hf(config)) for config in configs}) == len(configs)


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    ({'model_type': 'gptj'}, "'gptj' is not supported"),
    ({'hidden_act': 'gelu'}, "hidden_act='gelu'"),
    ({'mlp_bias': True}, 'mlp_bias=True'),
    ({'quantization_config': {'bits': 4}}, 'quantization_config'),
    ({'rope_parameters': None, 'rope_scaling': {'type': 'yarn'}}, "rope_type 'yarn'"),
    (
      {'num_key_value_heads': 3},
      'num_attention_heads=4 is not a multiple of num_key_value_heads=3',
    ),
    ({'hidden_size': None}, 'hidden_size is None'),
    ({'partial_rotary_factor': 0.5}, 'partial_rotary_factor=0.5'),
    ({'rope_parameters': {'partial_rotary_factor': 0.5}}, 'partial_rotary_factor=0.5'),
    (
      {'rope_parameters': {'rope_type': 'llama3', 'factor': 8.0, 'low_freq_factor': None}},
      'low_freq_factor, high_freq_factor, original_max_position_embeddings is missing',
    ),
  ],
)
def test_unsupported_configs_are_refused(change, message):
  config = ModelConfig('llama', 8, 16, 32, 2, 4, 2, 4, 64)
  with pytest.raises(UserError, match=message):
    config_from_hf({**config_to_hf(config), **change})


def test_qwen3_5_is_read_from_the_text_half():
  """Its entries for images and for drafts change no text."""
  rope = {'rope_type': 'default', 'rope_theta': 1e7, 'partial_rotary_factor': 0.25}
  text = {
    'model_type': 'qwen3_5_text',
    'vocab_size': 248_320,
    'hidden_size': 5120,
    'intermediate_size': 17_408,
    'num_hidden_layers': 64,
    'num_attention_heads': 24,
    'linear_num_value_heads': 48,
    'attn_output_gate': True,
    'full_attention_interval': 4,
    'max_position_embeddings': 262_144,
    'mtp_num_hidden_layers': 1,
    'rope_parameters': rope | {'mrope_interleaved': True, 'mrope_section': [11, 11, 10]},
  }
  config = config_from_hf({'model_type': 'qwen3_5', 'text_config': text})
  assert config.rope_channels == 64 and config.num_params == 26_895_998_464
  assert [i for i in range(64) if not config.recurrent(i)] == list(range(3, 64, 4))
  theirs = transformers.AutoConfig.for_model(**config_to_hf(config))
  assert config_from_hf(theirs.to_dict()) == config
  assert config_from_hf({**text, 'layer_types': ['full_attention'] * 64}).delta is None
  for change, message in (
    ({'attn_output_gate': False}, 'attn_output_gate=False is not supported'),
    (
      {'layer_types': ['full_attention', 'mamba'] * 32},
      'one of full_attention and linear_attention',
    ),
    ({'linear_num_value_heads': 17}, '17 value heads and 16 key heads'),
    ({'model_type': 'qwen3'}, 'attn_output_gate=True is not supported'),
  ):
    with pytest.raises(UserError, match=message):
      config_from_hf({**text, **change})


def test_ministral_3_has_the_rotary_positions_of_transformers_by_default():
  absent = transformers.AutoConfig.for_model('ministral3').to_dict()
  config = config_from_hf(absent)
  assert config.query_growth == QueryGrowth(0.1, 16_384)
  absent['rope_parameters'] = None
  assert config_from_hf(absent) == config
  rope = {'rope_type': 'default', 'rope_theta': 1e6}
  assert config_from_hf(absent | {'rope_parameters': rope}).query_growth is None
  rope |= {'llama_4_scaling_beta': 0.2, 'original_max_position_embeddings': 100}
  grown = config_from_hf(absent | {'rope_parameters': rope})
  assert grown.query_growth == QueryGrowth(0.2, 100) and grown.rope_scaling is None
  for each in (grown, dataclasses.replace(grown, query_growth=None)):
    assert config_from_hf(config_to_hf(each)) == each


def test_gpt_oss_has_the_defaults_of_transformers():
  absent = transformers.AutoConfig.for_model('gpt_oss').to_dict()
  config = config_from_hf(absent)
  assert config.windows[:3] == (128, None, 128) and config.experts.limit == 7.0
  assert config.rope_scaling == YarnRope(32.0, 4096, truncate=False) and config.rope_theta == 15e4
  for key in ('rope_parameters', 'layer_types', 'sliding_window', 'attention_bias', 'head_dim'):
    del absent[key]
  for key in ('swiglu_limit', 'swiglu_alpha', 'num_local_experts', 'num_experts_per_tok'):
    del absent[key]
  assert config_from_hf(absent) == config
  with pytest.raises(UserError, match=r'swiglu_alpha=1.5 is not supported; only 1.702 is'):
    config_from_hf(absent | {'swiglu_alpha': 1.5})
  with pytest.raises(UserError, match='experts=.* cannot be written'):
    config_to_hf(
      dataclasses.replace(config, experts=dataclasses.replace(config.experts, bias=False))
    )


@pytest.mark.parametrize(
  'entry',
  [
    {'router_jitter_noise': 0.01},
    {'shared_expert_intermediate_size': 64},
    {'n_shared_experts': 1},
    {'routed_scaling_factor': 2.5},
    {'scoring_func': 'sigmoid'},
    {'first_k_dense_replace': 1},
  ],
)
def test_other_mixtures_are_refused(entry):
  """What only reports routing, or weighs the loss of transformers, is read and not used."""
  same = {'output_router_logits': True, 'router_aux_loss_coef': 0.5, 'router_jitter_noise': 0.0}
  for name in ('mixtral', 'qwen3_moe', 'olmoe'):
    hf = transformers.AutoConfig.for_model(name).to_dict()
    assert config_from_hf(hf | same) == config_from_hf(hf)
    with pytest.raises(UserError, match=f'{next(iter(entry))}=.* is not supported'):
      config_from_hf(hf | entry)


def test_configs_of_transformers_4_are_read():
  """They store rope_theta beside rope_scaling, and Qwen2's windows by the number of the layer."""
  config = ModelConfig('llama', 8, 16, 32, 3, 4, 2, 4, 64)
  hf = config_to_hf(config)
  scaling = {'factor': 8, 'low_freq_factor': 1, 'high_freq_factor': 4, 'rope_type': 'llama3'}
  scaling['original_max_position_embeddings'] = 32
  old = config_from_hf(
    {**hf, 'rope_parameters': None, 'rope_theta': 5e5} | {'rope_scaling': scaling}
  )
  assert old.rope_theta == 5e5 and old.rope_scaling == Llama3Rope(8.0, 1.0, 4.0, 32)
  qwen = {**hf, 'model_type': 'qwen2', 'sliding_window': 6, 'max_window_layers': 1}
  assert config_from_hf(qwen).windows == ()
  assert config_from_hf({**qwen, 'use_sliding_window': True}).windows == (None, 6, 6)
  assert config_from_hf({**hf, 'rope_parameters': None, 'rope_theta': None}).rope_theta == 1e4
  mistral = {**hf, 'model_type': 'mistral'}
  theirs = transformers.AutoConfig.for_model(**mistral).sliding_window
  assert config_from_hf(mistral).windows == (theirs,) * 3
  assert config_from_hf({**mistral, 'sliding_window': None}).windows == ()
  del hf['num_key_value_heads'], hf['head_dim']
  assert config_from_hf(hf).num_kv_heads == 4


EPS = ('rms_norm_eps', 'layer_norm_eps', 'layer_norm_epsilon')


@pytest.mark.parametrize('name', list(FAMILIES))
def test_norms_without_an_eps_have_that_of_transformers(name):
  line = next(line for line, (kind, _) in LINES.items() if kind == name)
  absent = make_config(line).to_dict()
  key = next(key for key in EPS if key in absent)
  del absent[key]
  eps = getattr(transformers.CONFIG_MAPPING[name](), key)
  assert config_from_hf(absent).norm_eps == eps
  assert config_from_hf(absent | {key: None}).norm_eps == eps


def outcome(hf):
  """Return the ModelConfig of a config.json and '', or None and the error."""
  try:
    return config_from_hf(hf), ''
  except UserError as error:
    return None, str(error)


@pytest.mark.parametrize('line', [name for name, (kind, _) in LINES.items() if kind in FAMILIES])
def test_absent_entries_have_the_defaults_of_transformers(line):
  """For each entry that transformers writes, but for sizes that we require."""
  full = make_config(line).to_dict()
  for name in full.keys() - {'model_type'}:
    absent = {key: value for key, value in full.items() if key != name}
    try:
      theirs = transformers.AutoConfig.for_model(**absent).to_dict()
    except StrictDataclassClassValidationError:  # the default contradicts another entry
      continue
    ours, error = outcome(absent)
    if f'{name} is None; it must be a positive integer' not in error:
      assert ours == outcome(theirs)[0], name


# Whether attention_bias means biases on query, key and value, and on the output.
BIASES = {
  'llama': (True, True),
  'mistral': (True, False),
  'qwen2': (True, False),
  'qwen3': (True, True),
  'olmo2': (True, True),
  'olmo3': (True, True),
  'smollm3': (True, True),
  'granite': (True, True),
  'granitemoehybrid': (True, True),
  'glm4': (True, False),
  'gpt_neox': (True, True),
}


@pytest.mark.parametrize('family', [name for name, (kind, _) in LINES.items() if kind in BIASES])
def test_attention_bias_is_read_and_written(tiny_hf_folder, family):
  hf = read_json(tiny_hf_folder(family) / 'config.json')
  without = config_from_hf(hf | {'attention_bias': False})
  assert (without.qkv_bias, without.output_bias) == (hf['model_type'] == 'qwen2', False)
  config = config_from_hf(hf | {'attention_bias': True})
  assert (config.qkv_bias, config.output_bias) == BIASES[hf['model_type']]
  assert config_from_hf(config_to_hf(config)) == config
  same = dataclasses.replace(config, qkv_bias=without.qkv_bias, output_bias=False)
  assert same == without


@pytest.mark.parametrize(
  ('entries', 'message'),
  [
    ({'num_local_experts': 4}, 'num_local_experts is 4'),
    ({'num_local_experts': None}, 'num_local_experts is 8'),  # transformers' default
    ({'layer_types': ['attention', 'mamba', 'attention']}, 'layer_types has .mamba.'),
    ({'layer_types': None}, 'layers_block_type is None'),
    ({'layer_types': ['attention']}, 'for each layer'),
    ({'position_embedding_type': 'alibi'}, 'position_embedding_type=.alibi.'),
  ],
)
def test_granite_4_is_read_without_experts_and_state_space_layers(tiny_hf_folder, entries, message):
  hf = read_json(tiny_hf_folder('granite4') / 'config.json')
  old = {**hf, 'layer_types': None, 'layers_block_type': ['attention'] * 3}
  assert config_from_hf(old) == config_from_hf(hf)
  with pytest.raises(UserError, match=message):
    config_from_hf(hf | entries)


def test_windows_of_smollm3_are_in_the_layers_without_rotary_positions(tiny_hf_folder):
  hf = read_json(tiny_hf_folder('smollm3_windows') / 'config.json')
  assert config_from_hf({**hf, 'layer_types': None}).windows == (None, 5, None)
  assert config_from_hf({**hf, 'layer_types': None, 'use_sliding_window': False}).windows == ()
  assert config_from_hf({**hf, 'no_rope_layers': None}).ropes == ()  # every fourth of three layers
  with pytest.raises(UserError, match='layer_types has sliding_attention in layer 1'):
    config_from_hf({**hf, 'use_sliding_window': False})


def test_configs_that_the_family_cannot_describe_are_not_written(tiny_hf_folder):
  config = read_config(tiny_hf_folder('llama2'))
  with pytest.raises(UserError, match='qkv_bias=True cannot be written'):
    config_to_hf(dataclasses.replace(config, qkv_bias=True))


def test_the_weight_table_gives_the_names_and_shapes_that_torch_writes(tiny_hf_folder, family):
  folder = tiny_hf_folder(family)
  config = read_config(folder)
  ours = {}
  for stored in stored_weights(config).values():
    ours |= dict.fromkeys(stored.names, stored.stored_shape)
  model = FAMILIES[config.family]
  file = safetensors.numpy.load_file(folder / 'model.safetensors')
  file = {model.canonical_name(name): x for name, x in file.items() if not model.ignores(name)}
  assert ours == {name: x.shape for name, x in file.items()}
  assert config.num_params == sum(x.size for x in file.values())


@pytest.mark.parametrize('name', list(FAMILIES))
def test_every_row_of_a_weight_table_names_a_parameter(tiny_hf_folder, name):
  """Together, the models that the family's config.json can describe use every row."""
  configs = [read_config(tiny_hf_folder(line)) for line in LINES]
  bases = [config for config in configs if config.family == name]
  assert bases, f'tests/families.py has no line for {name}'
  options = [{}, {'qkv_bias': True}, {'qk_norm': True}, {'qkv_bias': True, 'output_bias': True}]
  options += [{**options[-1], 'qk_norm': True}, {**options[-1], 'mlp_bias': True}]
  options += [{**fields, 'tied_embeddings': False} for fields in options]
  paths = set()
  for base, fields in itertools.product(bases, options):
    config = dataclasses.replace(base, **fields)
    try:
      config_to_hf(config)
    except UserError:  # the family has no such model
      continue
    paths |= flatten_params(abstract_model(config)[1]).keys()
  paths = {re.sub(r'layers/\d+/', 'layers/{}/', path) for path in paths}
  assert {weight.path for weight in FAMILIES[name].weights} == paths


@pytest.mark.parametrize('line', ['gpt_neox', 'gpt2'])
def test_masks_in_old_files_are_not_read(tiny_hf_folder, tmp_path, line):
  """GPT-2's old files have no prefix either."""
  folder = shutil.copytree(tiny_hf_folder(line), tmp_path / 'old')
  weights = safetensors.numpy.load_file(folder / 'model.safetensors')
  mask = np.tril(np.ones((1, 1, 4, 4), np.uint8))
  if line == 'gpt2':
    weights = {name.removeprefix('transformer.'): x for name, x in weights.items()}
    masks = ['h.0.attn.bias', 'h.0.attn.masked_bias']
  else:
    layer = 'gpt_neox.layers.0.attention.'
    masks = [f'{layer}bias', f'{layer}masked_bias']
    weights[f'{layer}rotary_emb.inv_freq'] = np.ones(2, np.float32)
  weights |= dict.fromkeys(masks, mask)
  safetensors.numpy.save_file(weights, folder / 'model.safetensors', metadata={'format': 'pt'})
  mesh = make_mesh(devices=jax.devices()[:1])
  old, new = (cai_jax.load(path, mesh=mesh) for path in (folder, tiny_hf_folder(line)))
  jax.tree.map(np.testing.assert_array_equal, old.params, new.params)


def test_rows_beyond_learned_positions_are_refused(tiny_hf_folder):
  lm = cai_jax.load(tiny_hf_folder('gpt2'), mesh=make_mesh(devices=jax.devices()[:1]))
  with pytest.raises(UserError, match='row of 257 tokens is longer .* holds 256: later positions'):
    lm.logits(np.ones((1, 257), np.int32))
  with pytest.raises(UserError, match='257 tokens is longer than the 256 positions'):
    Engine({'base': lm}, length=257, seed=0)


def test_reading_a_block_reads_only_its_rows():
  read_shapes = []

  class File:
    def __init__(self, x):
      self.x = x

    def __getitem__(self, region):
      read_shapes.append(self.x[region].shape)
      return self.x[region]

  x = np.arange(6 * 4 * 5).reshape(6, 4, 5)  # [D,N,H]
  path = 'layers/0/attention/query/kernel'
  stored = FAMILIES['llama'].find_weights({path: x.shape})[path]
  tensor = join_parts([(stored, x)])
  assert tensor.shape == (20, 6) and tensor.flags.c_contiguous
  block = stored.read_block(lambda name: File(tensor), (2, 1, 2), (4, 3, 5))
  np.testing.assert_array_equal(block, x[2:4, 1:3, 2:5])
  assert read_shapes == [(10, 2)]


@pytest.mark.parametrize('page', ['README.md', 'docs/models.md'])
def test_tables_of_families_are_up_to_date(page):
  text = (pathlib.Path(__file__).parents[1] / page).read_text()
  update = 'run `python -m cai_jax.model.supported README.md docs/models.md`'
  assert update_page(text) == text, update


def test_every_family_has_a_title_and_an_example():
  for name, family in FAMILIES.items():
    assert family.title and family.examples, name
    assert all(re.fullmatch(r'[\w-]+/[\w.-]+', example) for example in family.examples), name


@pytest.mark.parametrize('name', list(FAMILIES))
def test_transformers_has_the_classes_that_a_family_names(name):
  family = FAMILIES[name]
  for named in (family.causal_lm, family.classifier, *family.multimodal.values()):
    assert named is None or hasattr(transformers, named), named
  if family.classifier is None:
    stem = family.causal_lm.removesuffix('ForCausalLM')
    assert not hasattr(transformers, f'{stem}ForSequenceClassification')


def test_a_family_can_be_registered_from_a_users_file(
  tiny_hf_folder, tmp_path, restored_registries
):
  """The file gives a new model_type the weights of Llama without an output layer."""
  plugin = tmp_path / 'small_llama.py'
  plugin.write_text(PLUGIN)
  load_plugins([str(plugin)])
  folder = shutil.copytree(tiny_hf_folder('smollm2'), tmp_path / 'model')
  config = read_json(folder / 'config.json') | {'model_type': 'small_llama'}
  config['architectures'] = ['SmallLlama']
  (folder / 'config.json').write_text(json.dumps(config))
  lm = cai_jax.load(folder, mesh=make_mesh(devices=jax.devices()[:1]))
  assert lm.config.family == 'small_llama'
  cai_jax.save(lm, tmp_path / 'saved')
  saved = read_json(tmp_path / 'saved' / 'config.json')
  assert saved['model_type'] == 'small_llama' and saved['architectures'] == ['SmallLlama']


PLUGIN = """
import dataclasses

from cai_jax.model.families import llama
from cai_jax.model.families.family import FAMILIES, Family


def read_config(hf):
  return dataclasses.replace(llama.read_config(hf), family='small_llama', tied_embeddings=True)


FAMILIES.register('small_llama')(
  Family(
    read_config=read_config,
    write_config=llama.write_config,
    weights=tuple(w for w in FAMILIES['llama'].weights if w.path != 'head/table'),
    causal_lm='SmallLlama',
    classifier='SmallLlamaForSequenceClassification',
  )
)
"""
