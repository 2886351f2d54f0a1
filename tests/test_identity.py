"""Models and files are identified by what they contain, and the rows name no path of a machine."""

import json
import os
import pathlib
import shutil

import numpy as np
import pytest
import safetensors.numpy

from cai_jax import pipeline
from cai_jax.data import d_cai
from cai_jax.evaluation.measures.multiple_choice import _by_file_name
from cai_jax.pipeline import schema
from cai_jax.runtime import digests
from cai_jax.runtime.digests import digest_file, load_digests, save_digests
from cai_jax.runtime.errors import UserError
from cai_jax.runtime.files import expand_path
from tests.pipeline_setup import small

pytestmark = pytest.mark.usefixtures('single_device')


def perturb(model):
  """Change the weights of a model in place, and keep the size and the date of the file."""
  path = pathlib.Path(model) / 'model.safetensors'
  stat, weights = path.stat(), safetensors.numpy.load_file(path)
  name = sorted(weights)[0]
  weights[name] = np.ascontiguousarray(weights[name] + weights[name].dtype.type(0.5))
  safetensors.numpy.save_file(weights, path, {'format': 'pt'})
  os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def tiny_run(model, workdir):
  """Return a run of few rows."""
  config = small(model)
  config.prompts.harmful.limit, config.prompts.helpful.limit = 5, 2
  config.feedback.rounds = 1
  return pipeline.build(config, workdir)


@pytest.fixture(scope='module')
def two_runs(random_model, tmp_path_factory):
  """Two finished runs with equal inputs, each with its own folder and its own copy of the model."""
  runs = []
  for name in ('first', 'second'):
    folder = tmp_path_factory.mktemp(name)
    shutil.copytree(random_model, folder / f'model of {name}')
    pipeline.run_stages(tiny_run(folder / f'model of {name}', folder / name))
    runs.append((folder / name, folder / f'model of {name}'))
  return runs


@pytest.fixture
def copied(two_runs, tmp_path):
  """Return a copy of a finished run and of its model, with the stages that a test wants done."""
  workdir, model = two_runs[0]

  def copy(*stages):
    shutil.copytree(model, tmp_path / 'base')
    shutil.copytree(workdir, tmp_path / 'run')
    path = tmp_path / 'run/manifest.json'
    manifest = json.loads(path.read_text())
    manifest['stages'] = {name: manifest['stages'][name] for name in stages}
    path.write_text(json.dumps(manifest))
    return tiny_run(tmp_path / 'base', tmp_path / 'run')

  return copy


def contents(folder):
  """Return the bytes of every file of a folder, by its path in the folder."""
  files = (path for path in folder.glob('**/*') if path.is_file())
  return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def test_two_runs_in_two_folders_write_the_same_bytes(two_runs):
  first, second = two_runs[0][0], two_runs[1][0]
  assert contents(first / 'd_cai') == contents(second / 'd_cai')
  assert contents(first / 'evaluation') == contents(second / 'evaluation')
  assert (first / 'preferences.jsonl').read_bytes() == (second / 'preferences.jsonl').read_bytes()
  for folder in ('d_cai', 'evaluation/base', 'evaluation/aligned'):
    row = d_cai.read_rows(first / folder)[0]
    assert all(row[n].startswith('sha256:') for n in ('model', 'critique_model', 'revision_model'))
  for path in (first / 'evaluation').glob('**/*'):
    assert path.is_dir() or str(first.parent).encode() not in path.read_bytes()


@pytest.mark.parametrize(
  ('name', 'added', 'part'),
  [
    ('model.safetensors', '', 'weights'),
    ('tokenizer.json', ' ', 'tokenizer'),
    ('chat_template.jinja', '{# changed #}', 'chat_template'),
    ('generation_config.json', ' ', 'config'),
  ],
)
def test_a_model_that_is_replaced_in_place_between_stages_is_named(copied, name, added, part):
  run = copied('generate')
  path = pathlib.Path(run.config.model.base) / name
  if part == 'weights':
    perturb(path.parent)
  else:
    path.write_text((path.read_text() if path.exists() else '{}') + added)
  with pytest.raises(UserError, match=rf"stage 'generate'.*what is in model\.base\.{part}: '\w"):
    pipeline.run_stages(run)


def test_a_model_that_is_replaced_while_a_job_runs_is_named(copied, monkeypatch):
  run = copied('generate')

  def train(run, manifest):
    perturb(run.config.model.base)
    return {}

  monkeypatch.setitem(pipeline.STAGES, 'train', train)
  with pytest.raises(UserError, match=r'what is in model\.base\.weights'):
    pipeline.run_stages(run)


def test_a_trained_model_that_was_replaced_is_named(copied):
  run = copied('generate', 'train')
  perturb(run.workdir / 'model')
  with pytest.raises(UserError, match='not the model that stage train wrote: its weights'):
    pipeline.run_stages(run)


def test_the_same_model_may_have_another_path(copied, tmp_path):
  run = copied('generate', 'train', 'evaluate', 'report')
  assert 'model of first' in (run.workdir / 'manifest.json').read_text()
  lines = []
  pipeline.run_stages(run, log=lines.append)
  assert lines == [f'{name}: done before' for name in pipeline.default_stages(run)]
  with pytest.raises(UserError, match=r'model\.critique'):
    config = small(tmp_path / 'base')
    config.prompts.harmful.limit, config.prompts.helpful.limit = 5, 2
    config.feedback.rounds = 1
    config.model.critique = 'tiny'
    pipeline.run_stages(pipeline.build(config, run.workdir), ['generate'])


def test_the_manifest_of_an_earlier_version_records_no_content(copied):
  run = copied('generate')
  path = run.workdir / 'manifest.json'
  manifest = json.loads(path.read_text())
  entry = manifest['stages']['generate']
  del entry['settings']['contents'], entry['d_cai']
  entry['settings']['model']['base'] = run.config.model.base
  path.write_text(json.dumps(manifest))
  (run.workdir / 'd_cai' / d_cai.CHECKSUMS).unlink()
  lines = []
  pipeline.run_stages(run, ['generate'], lines.append)
  assert lines == ['generate: done before']


def _cut(path):
  path.write_bytes(path.read_bytes()[:-50])


def _change(path):
  content = bytearray(path.read_bytes())
  content[len(content) // 2] ^= 1
  path.write_bytes(content)


@pytest.mark.parametrize(
  ('name', 'change', 'message'),
  [
    ('d_cai-train.array_record-00001', _cut, 'has changed'),
    ('d_cai-train.array_record-00000', _change, 'has changed'),
    ('d_cai-train.array_record-00001', pathlib.Path.unlink, 'is missing'),
    ('features.json', _change, 'has changed'),
    ('dataset_info.json', pathlib.Path.unlink, 'is missing'),
    ('d_cai-train.array_record-00002', lambda path: path.write_bytes(b'x'), 'does not belong'),
    ('checksums.json', pathlib.Path.unlink, None),
    ('checksums.json', lambda path: path.write_text('{}'), 'does not belong'),
  ],
)
def test_training_stops_at_a_damaged_dataset_and_names_the_file(copied, name, change, message):
  run = copied('generate')
  folder = run.workdir / 'd_cai'
  change(folder / name)
  with pytest.raises(UserError) as error:
    pipeline.run_stages(run, ['train'])
  if message is None:
    assert 'is not the dataset that stage generate wrote' in str(error.value)
  else:
    shard = name if name != d_cai.CHECKSUMS else 'd_cai-train'
    assert shard in str(error.value) and message in str(error.value)
  assert not (run.workdir / 'manifest.json').read_text().count('"train"')


def test_a_foreign_shard_of_the_same_size_stops_training_on_the_dataset_of_another_run(
  copied, tmp_path, random_model
):
  run = copied('generate')
  shards = sorted((run.workdir / 'd_cai').glob('*.array_record-*'))
  shutil.copy(shards[0], shards[1])
  config = small(random_model)
  config.data.d_cai = str(run.workdir / 'd_cai')
  with pytest.raises(UserError, match=f'{shards[1].name} has changed'):
    pipeline.run_stages(pipeline.build(config, tmp_path / 'other'), ['train'])


def test_paths_are_expanded_once(random_model, tmp_path, monkeypatch):
  (tmp_path / 'real').mkdir()
  shutil.copytree(random_model, tmp_path / 'real/model')
  (tmp_path / 'real/held out.txt').write_text('Be rude.\n')
  (tmp_path / 'linked').symlink_to('real')
  monkeypatch.setenv('HOME', str(tmp_path))
  monkeypatch.chdir(tmp_path / 'real')
  config = small('~/linked/model')
  config.prompts.eval_harmful.source = 'held out.txt'
  config.prompts.eval_harmful.name, config.prompts.eval_harmful.limit = '', -1
  config.prompts.eval_helpful.source = config.prompts.eval_helpful.name = ''
  run = pipeline.build(config, '~/linked/run')
  assert run.workdir == tmp_path / 'real/run'
  assert run.config.model.base == str(tmp_path / 'real/model')
  assert run.config.prompts.eval_harmful.source == str(tmp_path / 'real/held out.txt')
  assert run.config.constitution.path == 'tiny' and run.config.prompts.harmful.source == 'tiny'
  with pytest.raises(UserError, match='names no user'):
    pipeline.build(config, '~nobody-of-this-name/run')


def test_names_and_links_to_files_stay(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  for name in ('tiny', 'rules', 'org/model'):
    assert expand_path(name) == name and schema.expand_paths((name,)) == (name,)
  (tmp_path / 'tiny').mkdir()
  assert schema.expand_paths('tiny') == 'tiny'
  (tmp_path / 'blob').touch()
  (tmp_path / 'prompts.jsonl').symlink_to('blob')
  assert schema.expand_paths('prompts.jsonl') == str(tmp_path / 'prompts.jsonl')


def test_results_name_files_of_questions_without_their_folder():
  assert _by_file_name(('/a/x.jsonl', '/b/y.jsonl')) == {
    'x.jsonl': '/a/x.jsonl',
    'y.jsonl': '/b/y.jsonl',
  }
  assert list(_by_file_name(('/a/x', '/b/x'))) == ['x (1)', 'x (2)']


def test_a_digest_is_remembered_until_the_file_is_touched(tmp_path, monkeypatch):
  monkeypatch.setattr(digests, '_SETTLED_SECONDS', -1.0)
  monkeypatch.setattr(digests, '_known', {})
  path, saved = tmp_path / 'weights', tmp_path / 'digests.json'
  path.write_bytes(b'old')
  old = digest_file(path)
  save_digests(saved)
  digests._known.clear()
  load_digests(saved)
  with monkeypatch.context() as patch:
    patch.setattr(digests.hashlib, 'file_digest', None)  # is not called
    assert digest_file(path) == old
  stat = path.stat()
  path.write_bytes(b'new')  # the same size, and below the same date
  os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
  assert digest_file(path) != old
  for content in ('[', '[]', '{"x": [1]}', f'{{"{path}": [1, 2, 3, 4, 5]}}'):
    saved.write_text(content)
    load_digests(saved)
  load_digests(tmp_path / 'none')


def test_damaged_turns_are_sampled_again_and_the_run_says_so(copied, capsys):
  run = copied()
  rows = contents(run.workdir / 'd_cai')
  shutil.rmtree(run.workdir / 'd_cai')
  path = run.workdir / 'journal/turns-00000.jsonl'
  lines = path.read_bytes().splitlines(keepends=True)
  assert b'"text"' in lines[0]
  lines[0] = lines[0].replace(b'"text"', b'"texts"')
  path.write_bytes(b''.join(lines[:3]) + lines[3][:-60])
  pipeline.run_stages(run, ['generate'])
  output = capsys.readouterr().out
  assert 'journal: 2 damaged entries, whose turns are sampled again' in output
  assert f'{path}, line 1: its checksum does not match' in output
  assert f'{path}, line 4: it is cut short' in output
  stage = json.loads((run.workdir / 'manifest.json').read_text())['stages']['generate']
  assert stage['journal_faults'] == 2 and stage['turns'] > 0 and stage['replayed_turns'] > 0
  assert contents(run.workdir / 'd_cai') == rows


def test_shards_of_a_resumed_run_are_checked(copied, capsys):
  run = copied()
  folder = run.workdir / 'd_cai'
  rows, shards = contents(folder), sorted(folder.glob('*.array_record-*'))
  _cut(shards[0])
  shutil.copy(shards[0], folder / f'{shards[0].name[:-1]}9')
  with pytest.raises(UserError, match=r'array_record-00009, which does not belong'):
    pipeline.run_stages(run, ['generate'])
  assert f'{shards[0]} is damaged. It is written again' in capsys.readouterr().out
  (folder / f'{shards[0].name[:-1]}9').unlink()
  shutil.copy(shards[0], shards[1])
  pipeline.run_stages(run, ['generate'])
  assert f'{shards[1]} holds other rows. It is written again' in capsys.readouterr().out
  assert contents(folder) == rows
  stage = json.loads((run.workdir / 'manifest.json').read_text())['stages']['generate']
  assert stage['turns'] == 0
