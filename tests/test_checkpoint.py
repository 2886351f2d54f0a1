"""Loading Hugging Face folders, refusing what does not fit, and saving models."""

import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import torch
import transformers

import cai_jax
from cai_jax.model import checkpoint, weight_files
from cai_jax.runtime.errors import UserError
from cai_jax.runtime.mesh import make_mesh

TOKENS = np.random.default_rng(0).integers(3, 300, (2, 12))


def one_device():
  return make_mesh(1, devices=jax.devices()[:1])


def load(folder, **kwargs):
  return cai_jax.load(folder, **{'mesh': one_device(), **kwargs})


def torch_logits(folder):
  model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
  with torch.no_grad():
    return model(torch.tensor(TOKENS)).logits.numpy()


@pytest.fixture
def folder(tiny_hf_folder, tmp_path) -> pathlib.Path:
  """A copy of the Qwen2 model's folder that a test may change."""
  return shutil.copytree(tiny_hf_folder('qwen2'), tmp_path / 'qwen2')


def rewrite(folder, change, file='model.safetensors'):
  """Replace the tensors of a file by `change(tensors)`."""
  tensors = change(safetensors.numpy.load_file(folder / file))
  tensors = {name: np.ascontiguousarray(x) for name, x in tensors.items()}
  safetensors.numpy.save_file(tensors, folder / file)


@pytest.mark.parametrize('dtype', ['bfloat16', 'float16'])
def test_half_precision_files_are_read_exactly(folder, dtype):
  exact = load(folder)
  rewrite(folder, lambda t: {n: x.astype(weight_files.DTYPES[dtype]) for n, x in t.items()})
  widened, kept = load(folder), load(folder, param_dtype=dtype)
  for f32, wide, half in zip(
    *map(jax.tree.leaves, (exact.params, widened.params, kept.params)), strict=True
  ):
    assert wide.dtype == jnp.float32 and half.dtype == jnp.dtype(dtype)
    np.testing.assert_array_equal(wide, np.asarray(f32).astype(half.dtype).astype(np.float32))
    np.testing.assert_array_equal(wide, np.asarray(half).astype(np.float32))


def test_sharded_checkpoints_of_torch_are_read(folder, tmp_path):
  model = transformers.AutoModelForCausalLM.from_pretrained(folder)
  model.save_pretrained(tmp_path / 'shards', max_shard_size='40KB')
  (tmp_path / 'shards' / 'tokenizer.json').write_bytes((folder / 'tokenizer.json').read_bytes())
  assert len(weight_files.list_weight_files(tmp_path / 'shards')) > 2
  jax.tree.map(np.testing.assert_array_equal, load(tmp_path / 'shards').params, load(folder).params)
  weight_files.list_weight_files(tmp_path / 'shards')
  next((tmp_path / 'shards').glob('model-00002*')).unlink()
  with pytest.raises(UserError, match='model-00002.*not in the folder'):
    load(tmp_path / 'shards')


def drop(name):
  return lambda tensors: {n: x for n, x in tensors.items() if n != name}


def put(name, change):
  return lambda tensors: {**tensors, name: change(tensors.get(name))}


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    (drop('model.layers.1.mlp.up_proj.weight'), r'layers\.1\.mlp\.up_proj\.weight.* missing'),
    (drop('lm_head.weight'), r'lm_head\.weight.* missing'),
    (put('model.layers.0.adapter', lambda _: np.zeros(3)), r'layers\.0\.adapter.* does not belong'),
    (put('model.norm.weight', lambda x: x[1:]), r'norm\.weight.* shape \(31,\).* \(32,\)'),
    (put('model.layers.2.mlp.down_proj.weight', lambda x: x.T), r'down_proj.* \(48, 32\).*'),
    (put('model.norm.weight', lambda x: x.astype(np.int8)), r'norm\.weight.* is I8'),
  ],
)
def test_errors_name_the_weight_that_does_not_fit(folder, change, message):
  rewrite(folder, change)
  with pytest.raises(UserError, match=message):
    load(folder)


def test_a_weight_in_two_files_is_refused(folder):
  name = 'model.norm.weight'
  tensors = safetensors.numpy.load_file(folder / 'model.safetensors')
  (folder / 'model.safetensors').unlink()
  safetensors.numpy.save_file(tensors, folder / 'a.safetensors')
  safetensors.numpy.save_file({name: tensors[name]}, folder / 'b.safetensors')
  index = {'weight_map': {**dict.fromkeys(tensors, 'a.safetensors'), name: 'b.safetensors'}}
  (folder / weight_files.INDEX).write_text(json.dumps(index))
  with pytest.raises(UserError, match='norm.weight.* both a.safetensors and b.safetensors'):
    load(folder)


def test_harmless_extra_weights_are_ignored(tiny_hf_folder, folder, tmp_path, caplog):
  """These are old rotary buffers and the copy of a tied embedding; the latter is logged."""
  buffer = put('model.layers.0.self_attn.rotary_emb.inv_freq', lambda _: np.zeros(4, np.float32))
  plain = load(folder)
  rewrite(folder, buffer)
  jax.tree.map(np.testing.assert_array_equal, load(folder).params, plain.params)
  tied = shutil.copytree(tiny_hf_folder('smollm2'), tmp_path / 'tied')
  rewrite(tied, lambda t: {**t, 'lm_head.weight': t['model.embed_tokens.weight']})
  with caplog.at_level('INFO'):
    assert 'head' not in load(tied).params
  assert 'lm_head.weight is not read' in caplog.text


def test_pickles_are_refused(folder):
  (folder / 'model.safetensors').rename(folder / 'pytorch_model.bin')
  with pytest.raises(UserError, match=r'(?s)pytorch_model\.bin.*any code.*save_pretrained'):
    load(folder)
  (folder / 'pytorch_model.bin').unlink()
  with pytest.raises(UserError, match=r'neither model\.safetensors nor'):
    load(folder)


def test_truncated_files_are_refused(folder):
  whole = (folder / 'model.safetensors').read_bytes()
  (folder / 'model.safetensors').write_bytes(whole[:-100])
  with pytest.raises(UserError, match=r'model\.safetensors is not a readable.*Download it again'):
    load(folder)


def test_folders_without_a_supported_model_are_refused(folder, tmp_path):
  def edit(**changes):
    config = json.loads((folder / 'config.json').read_text())
    (folder / 'config.json').write_text(json.dumps({**config, **changes}))

  edit(model_type='mamba', auto_map={'AutoModelForCausalLM': 'modeling.Model'})
  (folder / 'modeling.py').write_text('raise SystemExit("remote code ran")')
  with pytest.raises(UserError, match="'mamba' is not supported. .*llama.*qwen3"):
    load(folder)
  edit(model_type='qwen2', vocab_size=None)
  with pytest.raises(UserError, match='vocab_size is None'):
    load(folder)
  edit(vocab_size=200)
  with pytest.raises(UserError, match='tokenizer has .* model embeds 200'):
    load(folder)
  (folder / 'config.json').write_text('{')
  with pytest.raises(UserError, match=r'config\.json is not valid JSON'):
    load(folder)
  (folder / 'config.json').unlink()
  with pytest.raises(UserError, match='has no config.json'):
    load(folder)
  with pytest.raises(UserError, match='neither a local folder nor a model'):
    load(tmp_path / 'absent')


def test_folders_without_a_tokenizer_are_refused(folder):
  for file in folder.glob('tokenizer*'):
    file.unlink()
  with pytest.raises(UserError, match=r'no tokenizer\. Put its tokenizer\.json'):
    load(folder)
  (folder / 'tokenizer.json').write_text('{}')
  with pytest.raises(UserError, match='no tokenizer that can be read'):
    load(folder)


def test_unknown_dtypes_are_refused(tiny_hf_folder, tmp_path):
  with pytest.raises(UserError, match="dtype='int8'.*float32"):
    load(tiny_hf_folder('qwen2'), dtype='int8')
  with pytest.raises(UserError, match="param_dtype='f32'.*float32"):
    load(tiny_hf_folder('qwen2'), param_dtype='f32')
  with pytest.raises(UserError, match="dtype='float8'.*float32"):
    cai_jax.save(load(tiny_hf_folder('qwen2')), tmp_path / 'out', dtype='float8')


def test_saved_folders_have_what_transformers_reads(folder, tmp_path):
  lm = load(folder)
  cai_jax.save(lm, tmp_path / 'out', dtype='bfloat16', max_shard_bytes=20_000)
  files = sorted(f.name for f in (tmp_path / 'out').iterdir())
  shards = [f for f in files if f.startswith('model-')]
  assert [f for f in files if f not in shards] == [
    'chat_template.jinja',
    'config.json',
    'generation_config.json',
    'model.safetensors.index.json',
    'tokenizer.json',
    'tokenizer_config.json',
  ]
  sizes = [(tmp_path / 'out' / f).stat().st_size for f in shards]
  assert len(shards) > 3 and max(sizes) < 20_000 + 384 * 32 * 2 + 2_000  # one weight may exceed
  config = transformers.AutoConfig.from_pretrained(tmp_path / 'out')
  assert config.dtype == torch.bfloat16 and config.pad_token_id == 0
  written = json.loads((tmp_path / 'out/config.json').read_text())
  assert written['dtype'] == written['torch_dtype'] == 'bfloat16'  # transformers 5 and 4
  assert config.eos_token_id == [2, 0]
  generation = transformers.GenerationConfig.from_pretrained(tmp_path / 'out')
  assert generation.eos_token_id == [2, 0] and generation.pad_token_id == 0
  tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / 'out')
  messages = [{'role': 'user', 'content': 'Repair 123 bicycles, <|im_end|> please.'}]
  for options in ({'tokenize': False}, {'add_generation_prompt': True, 'return_dict': False}):
    ours = lm.tokenizer.apply_chat_template(messages, **options)
    assert tokenizer.apply_chat_template(messages, **options) == ours
  rounded = jax.tree.map(lambda x: x.astype(jnp.bfloat16).astype(jnp.float32), lm.params)
  jax.tree.map(np.testing.assert_array_equal, load(tmp_path / 'out').params, rounded)
  np.testing.assert_allclose(
    torch_logits(tmp_path / 'out'), load(tmp_path / 'out').logits(TOKENS), atol=1e-4
  )


def test_saving_again_replaces_only_the_model(tiny_hf_folder, tmp_path):
  out = tmp_path / 'out'
  cai_jax.save(load(tiny_hf_folder('qwen2')), out, max_shard_bytes=20_000)
  (out / 'notes.txt').write_text('mine')
  (out / 'special_tokens_map.json').write_text('{"eos_token": "<|endoftext|>"}')
  (out / '.partial').mkdir()  # left behind by a save that was killed
  (out / '.partial' / 'model.safetensors').write_text('half')
  lm = load(tiny_hf_folder('smollm2'), mesh=make_mesh(4, 2, 1))
  cai_jax.save(lm, out)
  jax.tree.map(np.testing.assert_array_equal, load(out).params, lm.params)
  names = {f.name for f in out.iterdir()}
  assert 'notes.txt' in names and 'model.safetensors' in names
  assert not [n for n in names if n.startswith('model-') or 'index' in n or 'special' in n]
  assert '.partial' not in names
  (tmp_path / 'file').write_text('')
  with pytest.raises(UserError, match='is a file'):
    cai_jax.save(lm, tmp_path / 'file')


def test_parameters_that_do_not_fit_the_config_are_not_saved(tiny_hf_folder, tmp_path):
  lm = load(tiny_hf_folder('qwen2'))
  params = {**lm.params, 'norm': {'scale': jnp.ones(31)}}
  with pytest.raises(ValueError, match=r'norm/scale: the shape is \(31,\) and should be \(32,\)'):
    checkpoint.save_params(tmp_path, params, lm.config)
  assert not list(tmp_path.iterdir())


def test_fingerprint_depends_on_content_only(tiny_hf_folder, folder, tmp_path):
  """It is the same for equal files anywhere, and any change of the model changes it."""
  base = load(folder).fingerprint
  fingerprints = [base, load(folder, dtype='bfloat16').fingerprint]
  fingerprints.append(load(folder, param_dtype='bfloat16').fingerprint)
  fingerprints.append(load(tiny_hf_folder('qwen3')).fingerprint)
  assert load(tiny_hf_folder('qwen2')).fingerprint == base
  assert load(shutil.copytree(folder, tmp_path / 'x'), mesh=None).fingerprint == base

  def changed(file, old, new):
    text = (folder / file).read_text()
    assert old in text
    (folder / file).write_text(text.replace(old, new))
    fingerprints.append(load(folder).fingerprint)

  changed('chat_template.jinja', 'assistant', 'helper')
  changed('config.json', '"rms_norm_eps": 1e-06', '"rms_norm_eps": 1e-05')
  changed('generation_config.json', '0\n  ],', '1\n  ],')
  rewrite(folder, put('model.norm.weight', lambda x: x * np.float32(1.0000002)))
  fingerprints.append(load(folder).fingerprint)
  assert len(set(fingerprints)) == len(fingerprints)


def test_eos_falls_back_to_config_and_tokenizer(folder):
  (folder / 'generation_config.json').unlink()
  assert load(folder).eos_token_ids == (2,)
  config = json.loads((folder / 'config.json').read_text())
  (folder / 'config.json').write_text(json.dumps({**config, 'eos_token_id': [7, 2]}))
  assert load(folder).eos_token_ids == (7, 2)
  (folder / 'config.json').write_text(json.dumps({**config, 'eos_token_id': None}))
  assert load(folder).eos_token_ids == (2,)
  assert load(folder).tokenizer.eos_token_id == 2


def test_tokenizer_json_is_used_unchanged(folder):
  """AutoTokenizer of transformers would give a Qwen2 folder Qwen2's rules for numbers."""
  import tokenizers

  plain = tokenizers.Tokenizer.from_file(str(folder / 'tokenizer.json'))
  text = "It's 12345 bicycles…  ﬁne\n\nnext"
  assert load(folder).tokenizer.encode(text) == plain.encode(text).ids
