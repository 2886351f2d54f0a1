"""Publishing: the files and the card of a run."""

import json
import re

import datasets
import pytest

import cai_jax
from cai_jax.constitution import ConstitutionConfig, load_constitution
from cai_jax.data import d_cai
from cai_jax.pipeline.relative_paths import relative_paths
from cai_jax.publishing import licences
from cai_jax.publishing.command import make_request, write_folder
from cai_jax.publishing.licences import find_model_licence, list_origins
from cai_jax.publishing.markdown import code, escape
from cai_jax.publishing.names import public_name, public_values
from cai_jax.runtime.digests import digest_files
from cai_jax.runtime.errors import UserError
from cai_jax.runtime.files import write_json
from cai_jax.tiny.files import MODELS
from tests.publishing_setup import (
  REQUEST,
  change,
  read_card,
)
from tests.publishing_setup import finished as finished
from tests.publishing_setup import run as run


def test_a_published_model_is_the_model_of_the_run(finished, tmp_path):
  out = write_folder(str(finished), 'model', REQUEST, str(tmp_path / 'out'))
  assert not any(path.is_symlink() for path in out.rglob('*'))
  for path in (finished / 'model').iterdir():
    assert (out / path.name).read_bytes() == path.read_bytes()
  lm = cai_jax.load(out)
  assert lm.config == cai_jax.load(MODELS['tiny']).config
  metadata, text = read_card(out)
  assert metadata == {
    'library_name': 'transformers',
    'license': 'apache-2.0',
    'pipeline_tag': 'text-generation',
    'tags': ['constitutional-ai', 'cai-jax'],
  }
  # Every figure has an interval: mean_tokens has none, so no table shows it.
  assert '| this model | 8 | 50.0 % [25.0, 75.0] |' in text and '12.5' not in text
  assert 'this model − base model | −25.0 [−50.0, −10.0] p=0.020' in text
  assert 'Does the answer tell a secret?' in text and '`abc+`' in text
  assert '| `feedback.rounds` |' not in text  # is at its default
  assert re.search(r'\*\*note\*\*: This run shows recovery of a grammar only', text)


def test_transformers_loads_a_published_model(finished, tmp_path):
  transformers = pytest.importorskip('transformers')
  pytest.importorskip('torch')
  out = write_folder(str(finished), 'model', REQUEST, str(tmp_path / 'out'))
  model = transformers.AutoModelForCausalLM.from_pretrained(out)
  assert model.config.vocab_size == len(transformers.AutoTokenizer.from_pretrained(out))


def test_datasets_loads_what_was_published(finished, tmp_path):
  for what in ('d_cai', 'preferences'):
    out = write_folder(str(finished), what, REQUEST, str(tmp_path / what))
    loaded = datasets.load_dataset(str(out), cache_dir=str(tmp_path / 'cache'))
    assert [*loaded] == ['train'] and loaded['train'].num_rows == 3
    metadata, text = read_card(out)
    assert metadata['license'] == 'apache-2.0' and metadata['size_categories'] == ['n<1K']
    assert '| `empty` | 0.0 % [0.0, ' in text
    if what == 'preferences':
      lines = (finished / 'preferences.jsonl').read_text('utf-8').splitlines()
      assert [*loaded['train']] == [json.loads(line) for line in lines]
      continue
    for row, original in zip(loaded['train'], d_cai.read_rows(finished / 'd_cai'), strict=True):
      reply = {'role': 'assistant', 'content': original['rounds'][-1]['revision']['text']}
      assert row.pop('completion') == [reply]
      assert row == original


def test_a_published_constitution_is_that_of_the_run(finished, tmp_path):
  out = write_folder(str(finished), 'model', REQUEST, str(tmp_path / 'out'))
  again = load_constitution(ConstitutionConfig(path=str(out / 'run' / 'constitution.yaml')))
  assert again.fingerprint() == load_constitution(ConstitutionConfig('tiny')).fingerprint()


def test_adapters_name_the_base_model_and_no_folder(run, tmp_path):
  (run / 'adapter').mkdir()
  (run / 'adapter' / 'adapter_model.safetensors').write_bytes(b'weights')
  write_json(run / 'adapter' / 'adapter_config.json', {'r': 4, 'base_model_name_or_path': '/a/b'})
  with pytest.raises(UserError, match='no digest.*Move the folder away'):
    write_folder(str(run), 'model', REQUEST, str(tmp_path / 'out'))
  digest = digest_files(run / 'adapter', ['adapter_config.json', 'adapter_model.safetensors'])
  change(run / 'manifest.json', lambda m: m['stages']['train'].update(adapter=digest))
  out = write_folder(str(run), 'model', REQUEST, str(tmp_path / 'out'))
  settings = json.loads((out / 'adapter' / 'adapter_config.json').read_text())
  assert settings == {'r': 4, 'base_model_name_or_path': 'tiny'}
  assert 'adapter/' in read_card(out)[1]
  (run / 'adapter' / 'adapter_model.safetensors').write_bytes(b'others')
  with pytest.raises(UserError, match='not have the adapters that stage train wrote'):
    write_folder(str(run), 'model', REQUEST, str(tmp_path / 'again'))


def test_only_the_files_of_a_saved_model_are_published(run, tmp_path):
  names = {path.name for path in (run / 'model').iterdir()}
  for name in ('README.md', 'optimizer.pkl', 'notes.txt'):
    (run / 'model' / name).write_text('my own')
  out = write_folder(str(run), 'model', REQUEST, str(tmp_path / 'out'))
  assert {path.name for path in out.iterdir()} == names | {'README.md', 'run'}
  assert (run / 'model' / 'README.md').read_text() == 'my own'


def test_no_credentials_of_urls_are_published(run, tmp_path):
  secret, url = 'user:pa55@', 'https://{}host/private/asks.jsonl{}'

  def edit(values):
    values['prompts']['harmful'] |= {'source': url.format(secret, '?X-Sig=abc#k'), 'name': ''}
    values['prompts']['eval_helpful']['mixture'] = [url.format(secret, '?X-Sig=abc') + ':2']
    values['remote']['critique']['url'] = url.format(secret, '?X-Sig=abc')

  change(run / 'config.json', edit)
  out = write_folder(str(run), 'preferences', REQUEST, str(tmp_path / 'out'))
  for path in (out / 'README.md', out / 'run' / 'config.json'):
    text = path.read_text()
    assert 'pa55' not in text and 'X-Sig' not in text and url.format('', '') in text
  shown = json.loads((out / 'run' / 'config.json').read_text())
  assert shown['prompts']['eval_helpful']['mixture'] == [url.format('', '') + ':2']


def test_a_relative_path_of_the_run_is_no_name_of_the_hub(run, tmp_path, monkeypatch):
  home = tmp_path / 'home'
  (home / 'models' / 'internal').mkdir(parents=True)
  (home / 'data').mkdir()
  (home / 'data' / 'own.txt').write_text('Why?')
  monkeypatch.chdir(home)
  values = json.loads((run / 'config.json').read_text())
  values['model'] |= {'base': 'models/internal', 'critique': 'on-hub/critic'}
  values['prompts']['helpful'] |= {'source': '', 'mixture': ['data/own.txt:2', 'xstest:1']}
  values['prompts']['helpful'] |= {'name': '', 'limit': -1}
  paths = relative_paths(values)
  expected = ('models/internal', 'data/own.txt')
  assert paths == {name: str(home / name) for name in expected}
  write_json(run / 'config.json', values)
  change(run / 'manifest.json', lambda m: m['stages']['train'].update(paths=paths))
  monkeypatch.chdir(tmp_path)
  (tmp_path / 'on-hub' / 'critic').mkdir(parents=True)  # was not there when the run was started
  asked = []
  monkeypatch.setattr(licences, '_fetch', lambda repo, name: asked.append(repo))
  out = write_folder(str(run), 'model', make_request('me/x', 'mit'), str(tmp_path / 'out'))
  metadata, text = read_card(out)
  assert 'base_model' not in metadata and {*asked} == {'on-hub/critic'}
  (tmp_path / 'on-hub' / 'critic').rmdir()
  assert '`internal`' in text and 'https://huggingface.co/on-hub/critic' in text
  assert 'models/internal' not in text and 'data/own.txt' not in text
  # An older cai_jax recorded no paths, so that any name may be that of a folder.
  change(run / 'manifest.json', lambda m: m['stages']['train'].pop('paths'))
  out = write_folder(str(run), 'model', make_request('me/x', 'mit'), str(tmp_path / 'old'))
  metadata, text = read_card(out)
  assert 'base_model' not in metadata and 'huggingface.co/' not in text
  assert {*asked} == {'on-hub/critic'}


def test_a_card_names_no_data_that_the_run_has_not_used(run, tmp_path):
  def edit(values):
    values['data']['d_cai'] = '/other/run/d_cai'
    values['prompts']['harmful'] |= {'source': 'advbench', 'name': '', 'limit': -1}
    values['model']['critique'] = 'unused/critic'

  change(run / 'config.json', edit)
  contents = {'contents': {'data.d_cai': {'rows': 'abc123'}}}

  def forget(manifest):
    del manifest['stages']['generate']
    manifest['stages']['train']['settings'] = contents

  change(run / 'manifest.json', forget)
  metadata, text = read_card(write_folder(str(run), 'model', REQUEST, str(tmp_path / 'out')))
  assert 'trained on `d_cai` (digest `abc123`), which another run has generated' in text
  assert 'datasets' not in metadata and 'AdvBench' not in text
  for part in ('principles below', 'critiques |', 'rounds of the', '`prompts.harmful.'):
    assert part not in text


def test_a_card_has_the_devices_of_each_stage(run, finished, tmp_path):
  text = read_card(write_folder(str(finished), 'model', REQUEST, str(tmp_path / 'out')))[1]
  assert '- `generate`, `train` and `evaluate`: cai_jax 1.2; commit `abc+`' in text
  assert '8 × H100; jax 0.10' in text
  assert '1 × cpu' not in text and '0.99' not in text
  for stage in ('generate', 'train', 'evaluate'):  # as an older cai_jax wrote it
    change(run / 'manifest.json', lambda m, name=stage: m['stages'][name].pop('environment'))
  text = read_card(write_folder(str(run), 'model', REQUEST, str(tmp_path / 'old')))[1]
  assert 'commit `abc+`' in text and '×' not in text and 'jax 0.' not in text


def test_a_run_without_evaluation_says_so(run, tmp_path):
  change(run / 'manifest.json', lambda m: m['stages'].pop('evaluate'))
  (run / 'evaluation' / 'summary.json').unlink()
  out = write_folder(str(run), 'model', REQUEST, str(tmp_path / 'out'))
  assert 'This run was not evaluated.' in read_card(out)[1]
  assert not (out / 'run' / 'summary.json').exists()


def test_no_folder_of_this_machine_is_published(run, tmp_path):
  base = tmp_path / 'secret' / 'my-base'
  base.mkdir(parents=True)
  place = str(tmp_path / 'secret')

  def edit(values):
    values['model']['base'] = str(base)
    values['prompts']['harmful'] |= {'source': f'{place}/asks.jsonl', 'name': '', 'limit': -1}
    values['prompts']['helpful'] |= {'source': '', 'name': '', 'limit': -1}
    values['prompts']['helpful']['mixture'] = [f'xstest={place}/x.csv:1', f'{place}/own.txt:2']

  change(run / 'config.json', edit)
  request = make_request('me/thing', 'mit', 'en,de')
  for what in ('model', 'd_cai'):
    out = write_folder(str(run), what, request, str(tmp_path / f'out-{what}'))
    for path in (out / 'README.md', out / 'run' / 'config.json'):
      assert str(tmp_path) not in path.read_text('utf-8')
  metadata, text = read_card(out)
  assert metadata['license'] == 'mit' and metadata['language'] == ['en', 'de']
  assert '`my-base`' in text and 'asks.jsonl | unknown' in text
  assert 'XSTest (Röttger et al. 2024) | CC BY 4.0' in text


def test_licences_come_from_cards_and_files(tmp_path):
  assert find_model_licence('tiny').id == 'apache-2.0'
  assert find_model_licence(str(tmp_path)).id == ''
  (tmp_path / 'LICENSE.txt').write_text('You may not.')
  found = find_model_licence(str(tmp_path))
  assert (found.id, found.link, found.describe()) == (
    'other',
    'LICENSE.txt',
    f'that of {tmp_path.name}',
  )
  (tmp_path / 'README.md').write_text('---\nlicense: llama3.2\n---\nA model.\n')
  found = find_model_licence(str(tmp_path))
  assert found.id == 'llama3.2' and [file.name for file in found.files] == ['LICENSE.txt']
  (tmp_path / 'README.md').write_text('---\nlicense: [\n---\n')
  assert find_model_licence(str(tmp_path)).id == 'other'
  assert find_model_licence('no-one/no-model', is_on_hub=True).id == ''  # without a network
  (origin,) = list_origins({'source': 'hub', 'name': 'some/set'})
  assert (origin.hub, origin.licence) == ('some/set', 'unknown')


def test_public_names_keep_hub_names_and_urls(tmp_path):
  names = ('Qwen/Qwen2.5-0.5B', 'tiny', 'gs://bucket/model', 'general', '')
  assert [public_name(name) for name in names] == [*names[:-1], '']
  assert public_name(str(MODELS['tiny-1'])) == 'tiny-1'
  assert public_name(str(tmp_path)) == tmp_path.name
  values = {'sampling': {'initial': {'stop': ['/home/x']}}, 'model': {'base': '/home/x/y'}}
  assert public_values(values) == values | {'model': {'base': 'y'}}


def test_texts_are_no_markup():
  assert escape('a *b* <i>\n| `c` [x](y)') == r'a \*b\* &lt;i&gt; \| \`c\` [x]\(y)'
  assert code('a`b|c') == '`` a`b\\|c ``' and code('') == "`''`" and code(3) == '`3`'
