"""Inputs at URLs: local copies, their versions, and runs that read them."""

import json
import os
import pathlib
import subprocess
import sys
import uuid

import pytest

import cai_jax
from cai_jax.data import d_cai
from cai_jax.data.mixtures import parse_mixture
from cai_jax.data.prompts import PromptSource
from cai_jax.data.sets import PROMPT_SETS
from cai_jax.model.folder import find_folder
from cai_jax.pipeline import build, run_stages
from cai_jax.runtime.cloud import copies
from cai_jax.runtime.cloud.copies import local_copy
from cai_jax.runtime.cloud.store import Store, open_store
from cai_jax.runtime.errors import UserError
from cai_jax.runtime.manifest import Manifest
from cai_jax.tiny.files import CONSTITUTION, MODELS
from configs import tiny
from tests.pipeline_setup import small
from tests.test_report_chains import write_dataset

ROWS = [{'prompt': f'How do I fold shirt {i}?'} for i in range(4)]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
  """An empty cache directory, and no copy that this process knows."""
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))
  forget()
  yield tmp_path / 'cache' / 'cai_jax' / 'inputs'
  forget()


def forget():
  """Forget the copies, as a new process does."""
  copies._copies.clear()
  copies._origins.clear()


@pytest.fixture
def store():
  return open_store(f'memory://bucket/{uuid.uuid4().hex}')


def upload(store, name, path):
  """Put a file or folder into a store, and return its URL."""
  path = pathlib.Path(path)
  for file in path.rglob('*') if path.is_dir() else [path]:
    if file.is_file():
      inner = file.relative_to(path).as_posix()
      store.write(name if path.is_file() else f'{name}/{inner}', file.read_bytes())
  return f'{store.url}/{name}'


def count_downloads(monkeypatch):
  """Return a list that gets the name of each object that is downloaded."""
  names, download = [], Store.download

  def record(self, name, target):
    names.append(name)
    download(self, name, target)

  monkeypatch.setattr(Store, 'download', record)
  return names


def test_a_file_is_copied_once_and_again_when_it_changes(store, cache, monkeypatch, capsys):
  names = count_downloads(monkeypatch)
  store.write('asks.jsonl', b'first')
  url = f'{store.url}/asks.jsonl'
  first = local_copy(url)
  assert first.name == 'asks.jsonl' and first.read_bytes() == b'first'
  assert local_copy(url) == first and copies.origin(first) == url
  assert f'copying {url} (1 file,' in capsys.readouterr().out
  store.write('asks.jsonl', b'other')
  assert local_copy(url) == first  # a process uses one version
  forget()
  second = local_copy(url)
  assert second.read_bytes() == b'other' and first.read_bytes() == b'first'
  forget()
  assert local_copy(url) == second and len(names) == 2
  assert [path.name for path in cache.iterdir() if path.name.endswith('.part')] == []


def test_a_damaged_copy_is_made_again(store):
  store.write('asks.jsonl', b'first')
  copy = local_copy(f'{store.url}/asks.jsonl')
  copy.write_bytes(b'')
  forget()
  assert local_copy(f'{store.url}/asks.jsonl').read_bytes() == b'first'


def test_models_are_copied_without_pickles_and_subfolders(store):
  url = upload(store, 'my-model', MODELS['tiny'])
  for name in ('pytorch_model.bin', 'modeling.py', 'onnx/model.onnx', 'README.md'):
    store.write(f'my-model/{name}', b'code')
  copy = find_folder(url)
  assert copy.name == 'my-model'
  assert {path.name for path in copy.iterdir()} == {path.name for path in MODELS['tiny'].iterdir()}
  lm, original = cai_jax.load(url), cai_jax.load(MODELS['tiny'])
  assert lm.fingerprint == original.fingerprint and lm.name == url
  assert cai_jax.load(copy).name == url  # D_CAI names the URL, which is the same on every host


def test_a_download_that_was_killed_is_continued(store, cache, tmp_path, monkeypatch):
  source = tmp_path / 'data'
  source.mkdir()
  for name in 'abc':
    (source / name).write_text(name * 1000)
  url = upload(store, 'data', source)
  names, download = [], Store.download

  def die(self, name, target):
    if names:
      (target.parent / f'.{target.name}.tmp').write_bytes(b'half')  # what a kill leaves behind
      raise KeyboardInterrupt
    names.append(name)
    download(self, name, target)

  monkeypatch.setattr(Store, 'download', die)
  with pytest.raises(KeyboardInterrupt):
    local_copy(url)
  assert not any(path.is_dir() and not path.name.startswith('.') for path in cache.iterdir())
  monkeypatch.setattr(Store, 'download', download)
  again = count_downloads(monkeypatch)
  copy = local_copy(url)
  assert len(again) == 2 and not {*again} & {*names}
  assert {path.name: path.read_text() for path in copy.iterdir()} == {n: n * 1000 for n in 'abc'}


def test_an_object_that_changes_meanwhile_is_refused(store, cache, monkeypatch):
  store.write('asks.jsonl', b'first')
  download = Store.download

  def change(self, name, target):
    download(self, name, target)
    self.write('', b'other')

  monkeypatch.setattr(Store, 'download', change)
  with pytest.raises(UserError, match='has changed while it was copied'):
    local_copy(f'{store.url}/asks.jsonl')
  assert [path.name for path in cache.iterdir() if not path.name.endswith('.lock')] == []


def test_what_cannot_be_copied_is_refused(store, monkeypatch):
  with pytest.raises(UserError, match='does not exist. Correct the URL'):
    local_copy(f'{store.url}/nothing')
  store.write('old/weights.bin', b'x')
  with pytest.raises(UserError, match='only files that are not read, such as weights.bin'):
    local_copy(f'{store.url}/old')
  store.write('big/x', b'x')
  monkeypatch.setattr(copies, 'free_bytes', lambda folder: 0)
  with pytest.raises(UserError, match='but the disk of .* has 0.0 GiB'):
    local_copy(f'{store.url}/big')

  def deny(self, folder=''):
    raise PermissionError('Access Denied')

  monkeypatch.setattr(Store, 'list', deny)
  with pytest.raises(UserError, match='permission denied'):
    local_copy(f'{store.url}/denied')


def test_an_object_cannot_leave_its_folder(store, monkeypatch):
  entry = copies.Entry(1, 'v')
  monkeypatch.setattr(Store, 'list', lambda self, folder='': {'a/../../b': entry})
  with pytest.raises(UserError, match='an object with the name'):
    local_copy(f'{store.url}/folder')
  monkeypatch.setattr(Store, 'list', lambda self, folder='': {'a': entry._replace(version='')})
  with pytest.raises(UserError, match='does not say when a file changes'):
    local_copy(f'{store.url}/folder')


def settings_of(run):
  return {stage: run.settings(stage) for stage in ('generate', 'train', 'evaluate')}


def test_a_run_has_the_same_identity_with_urls_and_with_files(store, tmp_path):
  files = {
    'model.base': MODELS['tiny'],
    'prompts.harmful.source': tmp_path / 'asks.jsonl',
    'constitution.path': CONSTITUTION,
    'data.d_cai': tmp_path / 'd_cai',
    'prefer.data': tmp_path / 'pairs.jsonl',
  }
  files['prompts.harmful.source'].write_text(''.join(json.dumps(row) + '\n' for row in ROWS))
  pair = {'prompt': 'Hi?', 'chosen': 'Yes.', 'rejected': 'No.'}
  files['prefer.data'].write_text(json.dumps(pair) + '\n')
  write_dataset(files['data.d_cai'], {'a': 'one', 'b': 'two'}, rounds=1)
  d_cai.write_checksums(files['data.d_cai'])
  urls = {name: upload(store, pathlib.Path(path).name, path) for name, path in files.items()}
  runs = []
  for values in (files, urls):
    config = tiny.get_config()
    config.prompts.harmful.update(name='', limit=-1)
    config.update_from_flattened_dict({name: str(value) for name, value in values.items()})
    runs.append(build(config, tmp_path / 'run'))
  local, remote = runs
  assert remote.values['model']['base'] == urls['model.base']
  manifest = Manifest(tmp_path)
  for stage, settings in settings_of(local).items():
    with manifest.stage(stage, settings):
      pass
    manifest.check(stage, remote.settings(stage))  # so a run continues when its inputs move
    assert remote.settings(stage)['contents'] == settings['contents']


def test_errors_name_the_field_before_anything_runs(store, tmp_path):
  for field in ('model.aligned', 'prompts.eval_harmful.source', 'constitution.path'):
    config = tiny.get_config()
    config.update_from_flattened_dict({field: f'{store.url}/missing.jsonl'})
    with pytest.raises(UserError, match=f'^{field}: {store.url}/missing.jsonl does not exist'):
      build(config, tmp_path / 'run')
  config = tiny.get_config()
  config.model.base = 'nosuchstore://bucket/model'
  with pytest.raises(UserError, match='^model.base: .*there is no store for nosuchstore'):
    build(config, tmp_path / 'run')
  config = tiny.get_config()
  config.plugins = (f'{store.url}/plugin.py',)
  with pytest.raises(UserError, match='plugins: .* is not a Python file'):
    build(config, tmp_path / 'run')


def test_a_mixture_may_have_files_at_urls(store, tmp_path):
  store.write('asks.jsonl', b'{"prompt": "Why?"}\n')
  source = PromptSource(mixture=(f'{store.url}/asks.jsonl:2', f'xstest={store.url}/asks.jsonl:1'))
  first, second = parse_mixture(source, PROMPT_SETS)
  assert first.source.source == second.source.path == str(local_copy(f'{store.url}/asks.jsonl'))
  assert first.label == 'asks' and first.weight == 2


def test_a_folder_that_a_run_writes_is_not_copied(store, tmp_path):
  config = tiny.get_config()
  config.compilation.cache = f'{store.url}/programs'
  assert build(config, tmp_path / 'run').config.compilation.cache == f'{store.url}/programs'


@pytest.mark.slow
def test_a_run_continues_when_its_inputs_move_to_a_store(store, random_model, tmp_path):
  asks = tmp_path / 'asks.jsonl'
  asks.write_text(''.join(json.dumps({'prompt': f'Say {i}.'}) + '\n' for i in range(6)))
  local = {'model.base': random_model, 'prompts.harmful.source': asks}
  moved = {name: upload(store, path.name, path) for name, path in local.items()}
  workdirs = {'stayed': (local, local), 'moved': (local, moved)}
  for name, inputs in workdirs.items():
    for stage, values in zip(('generate', 'train'), inputs, strict=True):
      config = small(random_model)
      config.prompts.harmful.update(name='', limit=-1)
      config.update_from_flattened_dict({field: str(value) for field, value in values.items()})
      run_stages(build(config, tmp_path / name), [stage])
  first, second = (tmp_path / name / 'model' for name in workdirs)
  assert (first / 'model.safetensors').read_bytes() == (second / 'model.safetensors').read_bytes()


@pytest.mark.slow
def test_processes_copy_once(cache, tmp_path):
  """Three processes ask at once for the same folder of a store that they share."""
  (tmp_path / 'data').mkdir()
  for number in range(50):
    (tmp_path / 'data' / f'{number}').write_bytes(os.urandom(100_000))
  script = (
    'import fsspec, sys\n'
    'from fsspec.implementations.local import LocalFileSystem\n'
    'class Shared(LocalFileSystem):\n'
    "  protocol = ('shared',)\n"
    '  @classmethod\n'
    '  def _strip_protocol(cls, path):\n'
    "    return LocalFileSystem._strip_protocol(path.removeprefix('shared://'))\n"
    "fsspec.register_implementation('shared', Shared)\n"
    'from cai_jax.runtime.cloud.copies import local_copy\n'
    'print(local_copy(sys.argv[1]))\n'
  )
  command = [sys.executable, '-c', script, f'shared://{tmp_path / "data"}']
  started = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
  outputs = [process.communicate(timeout=120)[0].splitlines() for process in started]
  assert {lines[-1] for lines in outputs} == {outputs[0][-1]}
  assert sum(line.startswith('copying') for lines in outputs for line in lines) == 1
  copied = {p.name: p.read_bytes() for p in pathlib.Path(outputs[0][-1]).iterdir()}
  assert copied == {p.name: p.read_bytes() for p in (tmp_path / 'data').iterdir()}
