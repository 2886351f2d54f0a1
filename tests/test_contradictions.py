"""Model folders that contradict themselves are refused; both sides and their files are named."""

import json
import math
import shutil
import struct

import jax
import numpy as np
import pytest
import safetensors.numpy

import cai_jax
from cai_jax.model import lm as models
from cai_jax.model.classifier import load_classifier
from cai_jax.model.config import Llama3Rope, ModelConfig
from cai_jax.model.families.family import config_from_hf, config_to_hf
from cai_jax.model.folder import load_vocabulary
from cai_jax.model.weight_files import INDEX
from cai_jax.runtime.errors import UserError
from cai_jax.runtime.files import read_json
from cai_jax.runtime.mesh import make_mesh

LLAMA = ModelConfig('llama', 8, 16, 32, 2, 4, 2, 4, 64)
DEFAULT = {'rope_type': 'default', 'rope_theta': 10_000.0}
LLAMA3 = {
  'rope_type': 'llama3',
  'factor': 8.0,
  'low_freq_factor': 1.0,
  'high_freq_factor': 4.0,
  'original_max_position_embeddings': 32,
}
SLIDING = {'use_sliding_window': True, 'sliding_window': 16}
MIXED = ['full_attention', 'sliding_attention']


def config(family='llama', **changes):
  """Return a config.json of two layers with changes; a change to `...` removes the entry."""
  names = {'qwen2': 'Qwen2', 'qwen3': 'Qwen3', 'mistral': 'Mistral', 'llama': 'Llama'}
  hf = config_to_hf(LLAMA) | {'model_type': family, 'sliding_window': None}
  hf |= {'architectures': [f'{names[family]}ForCausalLM'], **changes}
  return {key: value for key, value in hf.items() if value is not ...}


@pytest.mark.parametrize(
  ('hf', 'message'),
  [
    (
      config(rope_parameters=DEFAULT, rope_scaling={'type': 'yarn', 'factor': 4.0}),
      "yarn.*'default'",
    ),
    (config(rope_parameters=DEFAULT, rope_scaling=LLAMA3), 'rope_scaling=.*rope_parameters='),
    (config(rope_parameters=LLAMA3, rope_scaling={**LLAMA3, 'factor': 4.0}), 'rope_scaling=.*4.0'),
    (config(rope_theta=5e5), 'rope_theta=500000.0, rope_parameters.rope_theta=10000.0'),
    (
      config(rope_scaling={'rope_theta': 1e6, 'type': 'default'}),
      'rope_scaling.rope_theta=1000000',
    ),
    (
      config(rope_parameters={'type': 'yarn', 'rope_type': 'default'}),
      "rope_type='def.*type='yarn",
    ),
    (config(rope_parameters={'mrope_section': [1, 2]}), r'rope_parameters\.mrope_section'),
    (config(rope_parameters={'full_attention': DEFAULT}), r'rope_parameters\.full_attention'),
    (config(rope_parameters={**DEFAULT, 'factor': 4.0}), 'factor=4.0'),
    (config(rope_parameters={**LLAMA3, 'factor': '8'}), "factor is '8'"),
    (config(rope_parameters={**LLAMA3, 'low_freq_factor': 4.0}), 'low_freq_factor=4.0'),
    (config(rope_parameters=LLAMA3, original_max_position_embeddings=9), '=9 contradicts 32'),
    (config(rope_scaling='linear'), "rope_scaling is 'linear'"),
    (config(rope_theta=-1.0), 'rope_theta is -1.0'),
    (config(rope_theta=math.nan), 'rope_theta is nan'),
    (
      config('qwen3', layer_types=MIXED),
      'sliding_attention in layer 1.*use_sliding_window is None',
    ),
    (config('qwen2', layer_types=MIXED[:1], **SLIDING), 'has 1 entries for num_hidden_layers=2'),
    (config('qwen2', layer_types=['full_attention', 'chunked_attention']), 'chunked_attention'),
    (config('qwen2', layer_types='full_attention'), 'layer_types has'),
    (
      config('qwen2', layer_types=MIXED, max_window_layers=0, **SLIDING),
      'layer 0.*layers=0 means s',
    ),
    (
      config('qwen2', layer_types=MIXED, max_window_layers=2, **SLIDING),
      'layer 1.*layers=2 means f',
    ),
    (
      config('qwen2', use_sliding_window=True),
      'use_sliding_window is True.*sliding_window is None',
    ),
    (config('qwen2', use_sliding_window=True, sliding_window=0), 'sliding_window is 0'),
    (config('qwen2', use_sliding_window='yes'), "use_sliding_window is 'yes'"),
    (config('mistral', sliding_window=16, layer_types=MIXED), 'window=16.*full_attention'),
    (config('mistral', sliding_window=16, use_sliding_window=False), 'window=16.*window is False'),
    (config('mistral', use_sliding_window=True), 'sliding_window=None.*window is True'),
    (config(sliding_window=16), "'llama' has no attention window.*sliding_window=16"),
    (config(layer_types=MIXED), "'llama' has no attention window"),
    (config(num_key_value_heads=3), 'num_attention_heads=4 .*num_key_value_heads=3'),
    (config(num_key_value_heads=0), 'num_key_value_heads is 0'),
    (config(head_dim=3), 'head_dim is 3'),
    (config(head_dim=0), 'head_dim is 0'),
    (
      config(head_dim=..., hidden_size=18),
      'hidden_size=18 is not a multiple of num_attention_heads',
    ),
    (config(hidden_size=10**12), 'hidden_size is 1000000000000; .*at most'),
    (
      config('mistral', num_hidden_layers=10**9, sliding_window=4),
      'num_hidden_layers is 1000000000',
    ),
    (config(hidden_size='16'), "hidden_size is '16'"),
    (config(hidden_size=16.0), 'hidden_size is 16.0'),
    (config(vocab_size=True), 'vocab_size is True'),
    (config(num_hidden_layers=-2), 'num_hidden_layers is -2'),
    (config(rms_norm_eps='1e-5'), "rms_norm_eps is '1e-5'"),
    (config(rms_norm_eps=math.inf), 'rms_norm_eps is inf'),
    (config(rms_norm_eps=10**400), 'rms_norm_eps is'),
    (config(tie_word_embeddings='false'), "tie_word_embeddings is 'false'"),
    (config(attention_bias=1), 'attention_bias is 1'),
    (config(hidden_act=['silu']), "hidden_act=\\['silu'\\]"),
    (config(mlp_bias=0), 'mlp_bias=0'),
    (config(is_causal=False), 'is_causal=False'),
    (config(attn_logit_softcapping=50.0), 'attn_logit_softcapping=50.0'),
    (config(logits_scaling=8.0), 'logits_scaling=8.0'),
    (config(quantization_config={'quant_method': 'gptq'}), 'quantization_config'),
  ],
)
def test_configs_that_say_two_things_are_refused(hf, message):
  with pytest.raises(UserError, match=message):
    config_from_hf(hf)


@pytest.mark.parametrize(
  ('hf', 'fields'),
  [
    (config(rope_parameters=LLAMA3, rope_scaling={**LLAMA3, 'type': 'llama3'}), {}),
    (config(rope_parameters=DEFAULT, rope_scaling=None, rope_theta=10_000), {'rope_scaling': None}),
    (config(rope_parameters=..., rope_scaling={'type': 'default'}, rope_theta=5),
     {'rope_theta': 5.0}),
    (config(hidden_act='swish'), {}),
    (config(num_key_value_heads=None), {'num_kv_heads': 4}),
    (config('mistral', num_key_value_heads=..., num_attention_heads=16), {'num_kv_heads': 8}),
    (config('qwen3', head_dim=..., num_attention_heads=4), {'head_dim': 128}),
    (config('qwen2', use_sliding_window=False, sliding_window=4096), {'windows': ()}),
    (config('qwen2', layer_types=MIXED, max_window_layers=28, **SLIDING), {'windows': (None, 16)}),
    (config('qwen2', layer_types=MIXED, max_window_layers=1, **SLIDING), {'windows': (None, 16)}),
    (config('qwen2', use_sliding_window=True, sliding_window=..., max_window_layers=0),
     {'windows': (4096, 4096)}),
    (config('qwen2', num_hidden_layers=29, **SLIDING), {'windows': (None,) * 28 + (16,)}),
    (config('mistral', sliding_window=16, layer_types=MIXED[1:] * 2), {'windows': (16, 16)}),
    (config(use_sliding_window=False, sliding_window=4096), {}),
    (config(rope_interleaved=False, is_llama_config=True, pretraining_tp=2), {}),
    (config(attention_bias=None, tie_word_embeddings=None), {'tied_embeddings': False}),
  ],
)  # fmt: skip
def test_what_transformers_reads_in_the_same_way_is_accepted(hf, fields):
  read = config_from_hf(hf)
  assert {name: getattr(read, name) for name in fields} == fields


# Entries of published models that decide what they compute; sizes are as published.
PUBLISHED = {
  'Llama-3.2-1B': (
    config(
      rope_parameters=..., rope_theta=500000.0, num_attention_heads=32, num_key_value_heads=8,
      head_dim=64, hidden_size=2048, attention_bias=False, mlp_bias=False, pretraining_tp=1,
      rope_scaling={**LLAMA3, 'factor': 32.0, 'original_max_position_embeddings': 8192},
    ),
    dict(rope_scaling=Llama3Rope(32.0, 1.0, 4.0, 8192), rope_theta=5e5, windows=()),
  ),
  'Mistral-7B-v0.1': (
    config('mistral', rope_parameters=..., rope_theta=10000.0, sliding_window=4096, head_dim=...),
    dict(windows=(4096, 4096), head_dim=4),
  ),
  'Mistral-7B-v0.3': (
    config('mistral', rope_parameters=..., rope_theta=1000000.0, sliding_window=None),
    dict(windows=(), rope_theta=1e6),
  ),
  'Mistral-Nemo': (
    config('mistral', head_dim=128, hidden_size=5120, num_attention_heads=32, rope_theta=1e6,
           rope_parameters=..., num_key_value_heads=8, sliding_window=None),
    dict(head_dim=128, num_kv_heads=8),
  ),
  'Qwen2.5-7B': (
    config('qwen2', rope_parameters=..., rope_theta=1000000.0, max_window_layers=28,
           sliding_window=131072, use_sliding_window=False, use_mrope=False),
    dict(windows=(), qkv_bias=True),
  ),
  'Qwen3-8B': (
    config('qwen3', rope_parameters=..., rope_theta=1000000, rope_scaling=None, head_dim=128,
           max_window_layers=36, sliding_window=None, use_sliding_window=False),
    dict(windows=(), qk_norm=True, rope_theta=1e6),
  ),
  'SmolLM2': (
    config(rope_parameters=..., rope_theta=100000, rope_interleaved=False, rope_scaling=None,
           is_llama_config=True, tie_word_embeddings=True, **{'transformers.js_config': {}}),
    dict(tied_embeddings=True, rope_theta=1e5),
  ),
}  # fmt: skip


@pytest.mark.parametrize('name', list(PUBLISHED))
def test_configs_in_the_form_of_published_models_are_accepted(name):
  hf, fields = PUBLISHED[name]
  read = config_from_hf(hf)
  assert {field: getattr(read, field) for field in fields} == fields


# Folders


def load(folder):
  return cai_jax.load(folder, mesh=make_mesh(1, devices=jax.devices()[:1]))


@pytest.fixture
def folder(tiny_hf_folder, tmp_path):
  """Return a copy of an untied Llama's folder that a test may change."""
  return shutil.copytree(tiny_hf_folder('llama2'), tmp_path / 'model')


def edit_json(path, **changes):
  content = read_json(path) if path.exists() else {}
  path.write_text(json.dumps({**content, **changes}))


def edit_weights(folder, **changes):
  """Replace or add tensors, whose names have `__` for dots."""
  path = folder / 'model.safetensors'
  tensors = safetensors.numpy.load_file(path)
  tensors |= {name.replace('__', '.'): x for name, x in changes.items()}
  safetensors.numpy.save_file({n: np.ascontiguousarray(x) for n, x in tensors.items()}, path)


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'architectures': ['MistralForCausalLM']}, "Mistral.*model_type='llama'.*LlamaForCausalLM"),
    ({'architectures': 5}, 'architectures=5'),
    ({'eos_token_id': 384}, r'config\.json: eos_token_id is 384.*vocab_size of config.json, 384'),
    ({'eos_token_id': [2, '3']}, 'eos_token_id is .*token id'),
    ({'eos_token_id': True}, 'eos_token_id is True'),
    ({'pad_token_id': 1024}, r'config\.json: pad_token_id is 1024'),
    ({'bos_token_id': -1}, 'bos_token_id is -1'),
    ({'vocab_size': 400}, r'embed_tokens.*\(384, .*\(400, .*vocab_size, hidden_size'),
    ({'num_attention_heads': 8}, r'\(32, 64\) \(hidden_size, num_attention_heads × head_dim\)'),
    ({'num_hidden_layers': 9_000}, 'describes a llama model of .* the weight files hold'),
    ({'hidden_size': 2**30}, 'describes a llama model of .* the weight files hold'),
    ({'tie_word_embeddings': True}, r'lm_head\.weight differs from model\.embed_tokens.*=true'),
  ],
)
def test_folders_whose_files_disagree_are_refused(folder, changes, message):
  edit_json(folder / 'config.json', **changes)
  for read in (load, models.inspect_model):
    with pytest.raises(UserError, match=message):
      read(folder)


def test_token_ids_of_generation_config_must_be_in_the_vocabulary(folder):
  for changes in ({'eos_token_id': [2, 384]}, {'temperature': 'hot'}, {'top_p': math.nan}):
    (name,) = changes
    edit_json(folder / 'generation_config.json', **{'eos_token_id': 2, **changes})
    with pytest.raises(UserError, match=rf'generation_config\.json: {name}'):
      load(folder)
    with pytest.raises(UserError, match=rf'generation_config\.json: {name}'):
      load_vocabulary(folder)
    edit_json(folder / 'generation_config.json', **{name: None})
  edit_json(folder / 'generation_config.json', eos_token_id=2, temperature=0.5)
  edit_json(folder / 'config.json', pad_token_id=-1)  # as in early Llama checkpoints
  assert load(folder).eos_token_ids == (2,)


def test_an_untied_model_needs_its_output_layer(folder):
  tensors = safetensors.numpy.load_file(folder / 'model.safetensors')
  del tensors['lm_head.weight']
  safetensors.numpy.save_file(tensors, folder / 'model.safetensors')
  with pytest.raises(UserError, match=r"'lm_head\.weight' is missing.*tie_word_embeddings=false"):
    load(folder)


def test_weights_that_are_not_finite_are_refused(folder):
  scale = np.ones(32, np.float32)
  for value in (np.nan, np.inf):
    scale[3] = value
    edit_weights(folder, model__norm__weight=scale)
    with pytest.raises(
      UserError, match=r"model\.safetensors: weight 'model\.norm\.weight' has a NaN"
    ):
      load(folder)
  scale[3] = 1e6
  edit_weights(folder, model__norm__weight=scale)
  assert load(folder).config.d_model == 32
  with pytest.raises(UserError, match='as float16'):
    cai_jax.load(folder, dtype='float16')


def shards(folder):
  """Split the weights into two files with an index, and return the index."""
  tensors = safetensors.numpy.load_file(folder / 'model.safetensors')
  (folder / 'model.safetensors').unlink()
  weight_map = {}
  for file, part in (('a.safetensors', 0), ('b.safetensors', 1)):
    names = [name for i, name in enumerate(sorted(tensors)) if i % 2 == part]
    safetensors.numpy.save_file({name: tensors[name] for name in names}, folder / file)
    weight_map |= dict.fromkeys(names, file)
  (folder / INDEX).write_text(json.dumps({'weight_map': weight_map}))
  return weight_map


@pytest.mark.parametrize(
  ('file', 'message'),
  [
    ('b.safetensors', r"'lm_head\.weight' is in b\.safetensors, but it is in a\.safetensors"),
    ('c.safetensors', 'c.safetensors.*not in the folder'),
    ('../a.safetensors', 'weight_map has .* for .lm_head.weight.; it must be the name'),
    ('..', 'must be the name of a safetensors file in the same folder'),
    ('', 'must be the name'),
    ('tokenizer.json', 'must be the name'),
    (['a.safetensors'], 'must be the name'),
    (7, 'must be the name'),
    (None, 'must be the name'),
    ('a' * 5000 + '.safetensors', 'not in the folder'),
  ],
)
def test_an_index_that_does_not_fit_the_files_is_refused(folder, file, message):
  weight_map = shards(folder)
  assert load(folder).config.num_layers == 3 and weight_map['lm_head.weight'] == 'a.safetensors'
  (folder / INDEX).write_text(json.dumps({'weight_map': {**weight_map, 'lm_head.weight': file}}))
  with pytest.raises(UserError, match=message):
    load(folder)


def test_two_sets_of_weights_are_refused(folder):
  whole = (folder / 'model.safetensors').read_bytes()
  weight_map = shards(folder)
  (folder / 'model.safetensors').write_bytes(whole)
  with pytest.raises(UserError, match=r'both model\.safetensors and a\.safetensors'):
    load(folder)
  (folder / 'model.safetensors').unlink()
  (folder / INDEX).write_text(json.dumps({'weight_map': {**weight_map, 'x': 'a.safetensors'}}))
  with pytest.raises(UserError, match="'x' is in a.safetensors, but that file has no such weight"):
    load(folder)


def test_an_adapter_is_not_passed_over(folder):
  (folder / 'adapter_config.json').write_text('{}')
  with pytest.raises(UserError, match='holds an adapter .* Merge it into its model'):
    load(folder)


def header(entry, data=b'\0' * 64):
  text = json.dumps({'x': entry}).encode()
  return struct.pack('<Q', len(text)) + text + data


@pytest.mark.parametrize(
  'content',
  [
    b'',
    b'\0' * 4,
    struct.pack('<Q', 2**62) + b'{}',
    header({'dtype': 'F99', 'shape': [4, 4], 'data_offsets': [0, 64]}),
    header({'dtype': 'F32', 'shape': [2**40, 2**40], 'data_offsets': [0, 64]}),
    header({'dtype': 'F32', 'shape': [4, 4], 'data_offsets': [0, 640]}),
    header({'dtype': 'F32', 'shape': [2, 4], 'data_offsets': [0, 32]}),
    header({'dtype': 'F32', 'shape': [4, -4], 'data_offsets': [0, 64]}),
  ],
)
def test_damaged_headers_are_refused_with_the_file(folder, content):
  (folder / 'model.safetensors').write_bytes(content)
  with pytest.raises(UserError, match=r'model\.safetensors is not a readable safetensors file'):
    load(folder)


def test_a_tensor_that_a_header_describes_twice_is_refused(folder):
  content = (folder / 'model.safetensors').read_bytes()
  (size,) = struct.unpack('<Q', content[:8])
  head, data = content[8 : 8 + size].rstrip(), content[8 + size :]
  entry = json.dumps(json.loads(head)['model.norm.weight']).replace('[32]', '[32, 1]')
  head = b'{"model.norm.weight": ' + entry.encode() + b',' + head[1:]
  (folder / 'model.safetensors').write_bytes(struct.pack('<Q', len(head)) + head + data)
  with pytest.raises(
    UserError, match="model.safetensors: in the header.*'model.norm.weight' twice"
  ):
    load(folder)


def test_a_key_that_a_file_has_twice_is_refused(folder):
  content = (folder / 'config.json').read_text()
  (folder / 'config.json').write_text('{"rms_norm_eps": 1e-5,' + content[1:])
  with pytest.raises(UserError, match=r"config\.json is not valid.* key 'rms_norm_eps' twice"):
    load(folder)


# Tokenizers


@pytest.mark.parametrize(
  ('file', 'changes', 'message'),
  [
    ('tokenizer_config.json', {'eos_token': 5}, r'eos_token.*tokenizer_config\.json'),
    ('tokenizer_config.json', {'model_max_length': 'x'}, "json: model_max_length is 'x'"),
    ('tokenizer_config.json', {'clean_up_tokenization_spaces': 2}, 'json: clean_up.* is 2'),
    (
      'tokenizer_config.json',
      {'added_tokens_decoder': {'7': {'content': '<|im_end|>', 'special': True}}},
      "'<|im_end|>' is token '7', but tokenizer.json has it as 2",
    ),
    ('tokenizer_config.json', {'chat_template': 'x'}, 'differs from that of chat_template.jinja'),
    ('added_tokens.json', {'<|im_end|>': 9}, r"added_tokens\.json: '<\|im_end\|>' is token 9"),
    ('special_tokens_map.json', {'eos_token': '<|endoftext|>'}, 'special_tokens_map.*eos_token'),
    ('tokenizer.json', {'model': {}}, r'tokenizer\.json: no tokenizer that can be read'),
    ('tokenizer.json', {'added_tokens': 5}, r'tokenizer\.json: no tokenizer that can be read'),
  ],
)
def test_tokenizer_files_that_are_wrong_are_refused(folder, file, changes, message):
  edit_json(folder / file, **changes)
  with pytest.raises(UserError, match=message):
    load(folder)
  with pytest.raises(UserError, match=message):
    load_vocabulary(folder)


def test_two_tokens_with_one_id_are_refused(folder):
  content = read_json(folder / 'tokenizer.json')
  content['model']['vocab']['zzzz'] = 7
  (folder / 'tokenizer.json').write_text(json.dumps(content))
  with pytest.raises(UserError, match=r"tokenizer\.json has '.*' and '.*' as token 7"):
    load(folder)


# Classifiers


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'id2label': {'0': 'a', '1': 'a'}}, 'the same name twice'),
    ({'id2label': {'0': 'a', '1': 'b'}, 'num_labels': 3}, 'num_labels=3.* 2 names'),
    ({'id2label': {'0': 'a'}, 'label2id': {'a': 1}}, 'label2id=.*contradicts id2label'),
    ({'id2label': ['a']}, 'id2label='),
    ({'num_labels': 10**12}, 'num_labels is 1000000000000'),
    ({'num_labels': True}, 'num_labels is True'),
    ({'rope_scaling': {'type': 'yarn'}}, r'config\.json: .*yarn'),
  ],
)
def test_classifiers_come_through_the_same_door(folder, changes, message):
  edit_json(folder / 'config.json', architectures=['LlamaForSequenceClassification'], **changes)
  with pytest.raises(UserError, match=message):
    load_classifier(folder)
