"""Any bytes in the files of a model's folder give the model they describe, or are refused."""

import json
import math
import pathlib
import tempfile

import jax
import numpy as np
import safetensors.numpy
import tokenizers
from harness import Fault, Files, Reader, check_reader

from cai_jax.model import lm as models
from cai_jax.model.checkpoint_checks import stored_weights
from cai_jax.model.classifier import SCORE, Classifier, inspect_classifier, load_classifier
from cai_jax.model.config import Llama3Rope, ModelConfig
from cai_jax.model.families.family import config_from_hf, config_to_hf
from cai_jax.model.folder import load_vocabulary
from cai_jax.model.rope import LongRope, YarnRope
from cai_jax.model.sharding import flatten_params
from cai_jax.model.transformer import abstract_model
from cai_jax.model.weight_files import INDEX, SINGLE
from cai_jax.runtime.files import read_json
from cai_jax.runtime.mesh import make_mesh

LLAMA = ModelConfig('llama', 40, 4, 6, 1, 2, 1, 2, 64)
MODELS = [
  ModelConfig('llama', 40, 4, 6, 1, 2, 1, 2, 64, rope_scaling=Llama3Rope(8.0, 1.0, 4.0, 32)),
  ModelConfig('llama', 40, 4, 6, 1, 2, 1, 2, 64, rope_scaling=YarnRope(2.0, 32, 4.0)),
  ModelConfig(
    'qwen3', 40, 4, 6, 1, 2, 1, 2, 32, qk_norm=True, rope_scaling=LongRope((1.5,), (4.0,), 32, 64)
  ),
  ModelConfig('qwen2', 40, 4, 6, 2, 2, 2, 2, 64, qkv_bias=True, windows=(None, 8)),
  ModelConfig('mistral', 40, 4, 6, 2, 2, 1, 2, 64, tied_embeddings=True, windows=(8, 8)),
]
SPECIAL = ('<pad>', '<s>', '</s>')


def text(value) -> bytes:
  return json.dumps(value).encode()


def tokenizer_files() -> Files:
  """Return the files of a tokenizer of single letters."""
  vocabulary = {token: number for number, token in enumerate([*SPECIAL, *'abcdefghijklmnopqrst '])}
  tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, [], unk_token='<pad>'))
  tokenizer.add_special_tokens(list(SPECIAL))
  end = {'content': '</s>', 'special': True, 'lstrip': False, 'rstrip': False}
  end |= {'normalized': False, 'single_word': False}
  settings = {
    'bos_token': '<s>',
    'eos_token': '</s>',
    'model_max_length': 64,
    'tokenizer_class': 'PreTrainedTokenizerFast',
    'added_tokens_decoder': {'2': end},
    'chat_template': '{% for m in messages %}{{ m.content }}</s>{% endfor %}',
  }
  return {'tokenizer.json': tokenizer.to_str().encode(), 'tokenizer_config.json': text(settings)}


def weights(config: ModelConfig) -> dict[str, np.ndarray]:
  """Return random tensors of a model by their names in the files."""
  random = np.random.default_rng(0)
  tensors = {}
  for stored in stored_weights(config).values():
    tensors[stored.names[0]] = random.normal(size=stored.stored_shape).astype(np.float16)
  return tensors


def folder_of(config: ModelConfig) -> Files:
  """Return a valid folder. That of Qwen2 has two files of weights with an index."""
  hf = config_to_hf(config) | {'bos_token_id': 1, 'eos_token_id': 2, 'dtype': 'float16'}
  generation = {'eos_token_id': [2, 0], 'pad_token_id': 0, 'temperature': 0.7, 'top_k': 20}
  files = {'config.json': text(hf), 'generation_config.json': text(generation)}
  tensors = weights(config)
  if config.family != 'qwen2':
    return files | tokenizer_files() | {SINGLE: safetensors.numpy.save(tensors)}
  names, weight_map = sorted(tensors), {}
  for file, part in (('a.safetensors', names[::2]), ('b.safetensors', names[1::2])):
    files[file] = safetensors.numpy.save({name: tensors[name] for name in part})
    weight_map |= dict.fromkeys(part, file)
  return files | tokenizer_files() | {INDEX: text({'weight_map': weight_map})}


def check_config(files: Files, config: ModelConfig) -> None:
  """Check that a config is what config.json says, as far as it says something."""
  hf = json.loads(files['config.json'])
  sizes = {'vocab_size': config.vocab_size, 'hidden_size': config.d_model}
  sizes |= {'intermediate_size': config.d_ff, 'num_hidden_layers': config.num_layers}
  sizes |= {'num_attention_heads': config.num_heads, 'num_key_value_heads': config.num_kv_heads}
  sizes |= {'head_dim': config.head_dim, 'max_position_embeddings': whole_context(config)}
  for name, value in sizes.items():
    assert type(value) is int and hf.get(name) in (None, value), name
  flags = (config.tied_embeddings, config.qkv_bias, config.output_bias)
  assert all(type(flag) is bool for flag in flags)
  assert math.isfinite(config.norm_eps) and 0 < config.rope_theta < math.inf
  check_rope(hf, config)
  kinds = hf.get('layer_types')
  if kinds is not None:
    assert kinds == [
      'full_attention' if config.window(layer) is None else 'sliding_attention'
      for layer in range(config.num_layers)
    ]
  assert config_from_hf(config_to_hf(config)) == config


def whole_context(config: ModelConfig) -> int:
  """Return the context that config.json states; that of longrope's short factors is shorter."""
  longrope = isinstance(config.rope_scaling, LongRope)
  return config.rope_scaling.max_positions if longrope else config.max_positions


def check_rope(hf: dict, config: ModelConfig) -> None:
  """Check that each entry of config.json agrees with the rotary embeddings."""
  names = {'original_max_position_embeddings': 'original_max_positions'}
  names |= {'short_factor': 'short_factors', 'long_factor': 'long_factors'}
  names |= {'partial_rotary_factor': 'fraction'}
  for entry in filter(None, (hf.get('rope_parameters'), hf.get('rope_scaling'))):
    assert entry.get('rope_theta') in (None, config.rope_theta)
    kind = entry.get('rope_type', entry.get('type'))
    if config.rope_scaling is None:
      assert kind in (None, 'default')
      continue
    assert type(config.rope_scaling).__name__ == f'{CLASSES[kind]}Rope'
    for name, value in entry.items():
      if name not in ('rope_theta', 'rope_type', 'type') and value is not None:
        ours = getattr(config.rope_scaling, names.get(name, name), None)
        whole = name == 'partial_rotary_factor' and ours is None
        assert value == (1.0 if whole else list(ours) if isinstance(ours, tuple) else ours), name
  assert hf.get('rope_theta') in (None, config.rope_theta)


CLASSES = {'linear': 'Linear', 'dynamic': 'Dynamic', 'llama3': 'Llama3', 'yarn': 'Yarn'}
CLASSES |= {'longrope': 'Long', 'proportional': 'Proportional'}


def check_token_ids(vocab_size: int, tokenizer, eos: tuple[int, ...]) -> None:
  """Check that all token ids are in the vocabulary, and each belongs to one token."""
  ids = list(tokenizer.get_vocab().values())
  assert len(set(ids)) == len(ids) and 0 <= min(ids) <= max(ids) < vocab_size
  assert all(type(token) is int and 0 <= token < vocab_size for token in eos)


def read(folder: pathlib.Path) -> models.LM:
  models.inspect_model(folder)
  return models.load(folder, mesh=make_mesh(devices=jax.devices()[:1]))


def check(files: Files, lm: models.LM) -> None:
  check_config(files, lm.config)
  check_token_ids(lm.config.vocab_size, lm.tokenizer, lm.eos_token_ids)
  for path, leaf in flatten_params(abstract_model(lm.config)[1]).items():
    value = np.asarray(flatten_params(lm.params)[path])
    assert value.shape == leaf.shape and np.isfinite(value).all(), path
  with tempfile.TemporaryDirectory() as folder:
    models.save(lm, folder)
    saved = json.loads((pathlib.Path(folder) / 'generation_config.json').read_text())
    again = models.inspect_model(folder)
  assert (again.config, again.eos_token_ids) == (lm.config, lm.eos_token_ids)
  before = json.loads(files.get('generation_config.json', b'{}'))
  kept = before.keys() - {'bos_token_id', 'eos_token_id', 'pad_token_id'}
  assert json.dumps({k: saved.get(k) for k in kept}) == json.dumps({k: before[k] for k in kept})


FOLDERS = Reader(inputs=[folder_of(config) for config in MODELS], read=read, check=check)


CONFIGS = Reader(
  inputs=[{'config.json': folder_of(config)['config.json']} for config in MODELS],
  read=lambda folder: config_from_hf(read_json(folder / 'config.json')),
  check=check_config,
)


def classifier_folder() -> Files:
  files = folder_of(LLAMA)
  tensors = safetensors.numpy.load(files[SINGLE])
  del tensors['lm_head.weight']
  tensors[SCORE] = np.ones((2, 4), np.float32)
  hf = json.loads(files['config.json']) | {'architectures': ['LlamaForSequenceClassification']}
  hf |= {'id2label': {'0': 'accepts', '1': 'refuses'}, 'label2id': {'accepts': 0, 'refuses': 1}}
  return files | {SINGLE: safetensors.numpy.save(tensors), 'config.json': text(hf)}


def check_classifier(files: Files, classifier: Classifier) -> None:
  hf = json.loads(files['config.json'])
  labels = hf.get('id2label') or {'0': 'LABEL_0', '1': 'LABEL_1'}
  info = classifier.info
  assert info.labels == tuple(str(labels[str(i)]) for i in range(len(labels)))
  assert classifier.score.shape == (len(labels), info.config.d_model)
  assert np.isfinite(classifier.score).all() and len(set(info.labels)) == len(labels)
  check_token_ids(info.config.vocab_size, info.tokenizer, info.eos_token_ids)


def read_classifier(folder: pathlib.Path) -> Classifier:
  inspect_classifier(folder)
  return load_classifier(folder, mesh=make_mesh(devices=jax.devices()[:1]))


CLASSIFIERS = Reader(
  inputs=[classifier_folder()],
  read=read_classifier,
  check=check_classifier,
)


def vocabulary_folder() -> Files:
  files = folder_of(LLAMA)
  return {name: data for name, data in files.items() if name != SINGLE}


def check_vocabulary(files: Files, vocabulary) -> None:
  check_token_ids(vocabulary.size, vocabulary.tokenizer, vocabulary.eos_token_ids)


VOCABULARIES = Reader(
  inputs=[vocabulary_folder(), tokenizer_files()], read=load_vocabulary, check=check_vocabulary
)


def test_model_folders():
  check_reader(f'{__name__}:FOLDERS')


def test_configs():
  check_reader(f'{__name__}:CONFIGS')


def test_classifier_folders():
  check_reader(f'{__name__}:CLASSIFIERS')


def test_tokenizer_folders():
  check_reader(f'{__name__}:VOCABULARIES')


FAULTS = [
  Fault(
    f'{__name__}:FOLDERS',
    'cai_jax.model.families.fields',
    'if isinstance(value, bool) or not isinstance(value, int | float):',
    'if value is None:',
  ),
  Fault(
    f'{__name__}:CONFIGS',
    'cai_jax.model.families.fields',
    'if not isinstance(value, bool):',
    'if value == 2:',
  ),
  Fault(
    f'{__name__}:CONFIGS',
    'cai_jax.model.families.shared',
    'for kind in kinds or by_number',
    'for kind in by_number',
  ),
  Fault(
    f'{__name__}:FOLDERS',
    'cai_jax.model.weight_files',
    'except (safetensors.SafetensorError, OSError)',
    'except OSError',
  ),
  Fault(
    f'{__name__}:VOCABULARIES',
    'cai_jax.model.generation_config',
    'if isinstance(token, bool) or not isinstance(token, int):',
    'if token is None:',
  ),
  Fault(
    f'{__name__}:VOCABULARIES',
    'cai_jax.model.tokenizer',
    'except Exception as error:  # the type depends',
    'except OSError as error:  # the type depends',
  ),
  Fault(
    f'{__name__}:CLASSIFIERS',
    'cai_jax.model.classifier',
    'not names or {*names} != {str(i) for i in range(len(names))}',
    'not names',
  ),
]
