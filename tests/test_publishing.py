"""Publishing: the files and the card of a run, and what is refused before anything is uploaded."""

import base64
import contextlib
import dataclasses
import http.server
import json
import re
import shutil
import threading

import datasets
import huggingface_hub
import pytest
from huggingface_hub import constants

import cai_jax
from cai_jax.constitution import ConstitutionConfig, load_constitution
from cai_jax.data import d_cai, quality, quality_summary
from cai_jax.data.preferences import write_preferences
from cai_jax.model.folder import folder_contents
from cai_jax.pipeline import build
from cai_jax.pipeline.relative_paths import relative_paths
from cai_jax.publishing import licences
from cai_jax.publishing.command import make_request, publish, run_command, write_folder
from cai_jax.publishing.licences import find_model_licence, list_origins
from cai_jax.publishing.markdown import code, escape
from cai_jax.publishing.names import public_name, public_values
from cai_jax.runtime.digests import digest_files
from cai_jax.runtime.errors import UserError
from cai_jax.runtime.files import write_json
from cai_jax.tiny.files import MODELS
from configs import tiny
from tests.test_report_chains import write_dataset

RATE = {'violation_rate': 0.5, 'violation_rate_interval': [0.25, 0.75], 'count': 8}
DIFFERENCE = {'to': 'base', 'value': -0.25, 'interval': [-0.5, -0.1], 'p_value': 0.01}
DIFFERENCE['adjusted_p_value'] = 0.02
SUMMARY = {
  'models': {
    'base': RATE | {'mean_tokens': 12.5},
    'aligned': RATE | {'mean_tokens': 9.5, 'differences': {'violation_rate': DIFFERENCE}},
  },
}
REQUEST = make_request('me/thing')


@pytest.fixture(scope='module')
def finished(tmp_path_factory):
  """The folder of a run as its stages leave it, with the embedded model in place of M_aligned."""
  folder = tmp_path_factory.mktemp('runs') / 'finished'
  config = tiny.get_config()
  config.prompts.harmful.limit = 3
  run = build(config, folder)
  texts = {'a': 'Fine <b>.', 'b': 'Worse.', 'c': 'Long.'}
  write_dataset(folder / 'd_cai', texts, rounds=2)
  d_cai.write_checksums(folder / 'd_cai')
  rows = d_cai.read_rows(folder / 'd_cai')
  counts = write_preferences(folder / 'preferences.jsonl', rows)
  references = quality.build_references({'p': ('Ask.', 'Ask again.')}, ())
  write_json(folder / 'quality.json', {'d_cai': quality_summary.summarize(rows, references)})
  shutil.copytree(MODELS['tiny'], folder / 'model')
  (folder / 'evaluation').mkdir()
  write_json(folder / 'evaluation' / 'summary.json', SUMMARY)
  write_json(folder / 'evaluation' / 'models.json', {})
  (folder / 'metrics.jsonl').write_text('{"step": 1, "loss": 2.0}\n')
  done = {'finished': '2030-01-01', 'seconds': 1.0, 'peak_memory_bytes': 1, 'git_commit': 'abc+'}
  done['environment'] = {
    'cai_jax': '1.2',
    'packages': {'jax': '0.10'},
    'devices': {'count': 8, 'kind': 'H100'},
  }
  done['paths'] = {}
  used = {'settings': {'constitution': run.constitution.fingerprint()}}
  stages = {
    'generate': used | {'d_cai': d_cai.content_digest(folder / 'd_cai'), 'preferences': counts},
    'train': {'model': folder_contents(folder / 'model'), 'examples': 3, 'steps': 1},
    'evaluate': {},
  }
  manifest = {
    'version': 2,
    'stages': {name: entry | done for name, entry in stages.items()},
    'versions': {'jax': '0.99'},  # of the last start, which wrote a report on another machine
    'devices': {'count': 1, 'kind': 'cpu'},
  }
  write_json(folder / 'config.json', run.values)
  write_json(folder / 'manifest.json', manifest)
  return folder


@pytest.fixture
def run(finished, tmp_path):
  """A copy of the run that a test may change."""
  shutil.copytree(finished, tmp_path / 'run')
  return tmp_path / 'run'


def change(path, edit):
  content = json.loads(path.read_text())
  edit(content)
  path.write_text(json.dumps(content))


def read_card(folder):
  """Return the metadata and the text of a card."""
  text = (folder / 'README.md').read_text('utf-8')
  metadata = huggingface_hub.RepoCard(text).data.to_dict()
  return metadata, text.split('---\n', 2)[2]


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


class Hub:
  """A client that records what it is asked to do."""

  def __init__(self, files=(), private=False, error=None):
    self.files, self.private, self.error, self.calls = files, private, error, []

  def whoami(self):
    if self.error:
      raise self.error
    return {'name': 'me', 'orgs': [{'name': 'us'}]}

  def repo_info(self, repo, repo_type):
    names = [huggingface_hub.hf_api.RepoSibling(rfilename=name) for name in self.files]
    return type('Info', (), {'private': self.private, 'siblings': names})

  def create_repo(self, *args, **options):
    self.calls.append('create')
    return 'https://hub/me/thing'

  def upload_folder(self, **options):
    self.calls.append(options)


@pytest.mark.parametrize(
  ('hub', 'repo', 'options', 'part'),
  [
    (Hub(), 'you/thing', {}, "not a member of 'you'. Choose one of me, us"),
    (Hub(['.gitattributes', 'a']), 'me/thing', {}, 'has 1 file already, such as a'),
    (Hub(), 'us/thing', {'private': True}, 'exists and is public'),
    (Hub(error=OSError('no route')), 'me/thing', {}, 'no route.*--out=FOLDER needs no network'),
    (
      Hub(error=huggingface_hub.errors.LocalTokenNotFoundError('none')),
      'me/thing',
      {},
      'hf auth login',
    ),
  ],
)
def test_what_the_hub_would_refuse_is_refused_before(finished, hub, repo, options, part):
  with pytest.raises(UserError, match=part):
    publish(str(finished), 'model', make_request(repo), hub, **options)
  assert hub.calls == []


def test_replacing_removes_the_other_files(finished):
  hub = Hub(['old.safetensors'])
  publish(str(finished), 'preferences', REQUEST, hub, replace=True)
  create, upload = hub.calls
  assert create == 'create' and upload['delete_patterns'] == '*'
  assert upload['repo_type'] == 'dataset'


def test_unfinished_and_changed_runs_are_refused(run, finished, tmp_path):
  def refuse(what, part, request=REQUEST):
    hub = Hub()
    with pytest.raises(UserError, match=part):
      publish(str(run), what, request, hub)
    assert hub.calls == []

  shard = next((run / 'd_cai').glob('*.array_record*'))
  shard.write_bytes(shard.read_bytes()[:-1])
  refuse('d_cai', 'has changed since it was written')
  shutil.copy(next((finished / 'd_cai').glob('*.array_record*')), shard)
  text = (run / 'preferences.jsonl').read_text('utf-8')
  (run / 'preferences.jsonl').write_text(text + text, 'utf-8')
  refuse('preferences', 'does not have the pairs of')
  (run / 'model' / 'generation_config.json').write_text('{}')
  refuse('model', 'its config has changed')
  recorded = json.loads((run / 'manifest.json').read_text())
  change(run / 'manifest.json', lambda m: m['stages']['train'].pop('model'))
  refuse('model', 'has no digests of the model')
  write_json(run / 'manifest.json', recorded)
  change(run / 'config.json', lambda v: v['constitution'].update(ids=['lie']))
  refuse('model', 'has changed since the run')
  shutil.copy(finished / 'config.json', run)
  change(run / 'manifest.json', lambda m: m['stages']['generate'].pop('finished'))
  refuse('d_cai', 'its stage generate is not done')
  change(run / 'config.json', lambda v: v['model'].update(aligned='/a/other'))
  change(run / 'manifest.json', lambda m: m['stages'].pop('train'))
  refuse('model', 'evaluates other, which it has not trained')
  (run / 'manifest.json').unlink()
  refuse('model', 'is not the folder of a run')


def test_an_unknown_licence_is_refused_but_written(run, tmp_path):
  base = tmp_path / 'base'
  base.mkdir()
  change(run / 'config.json', lambda v: v['model'].update(base=str(base)))
  for what in ('model', 'd_cai'):
    hub = Hub()
    with pytest.raises(UserError, match='licence of this .* is not known.*--license='):
      publish(str(run), what, REQUEST, hub)
    assert hub.calls == []
    metadata, text = read_card(write_folder(str(run), what, REQUEST, str(tmp_path / what)))
    assert 'license' not in metadata and 'Unknown: check the licence' in text
    publish(str(run), what, make_request('me/thing', 'mit'), hub)
    assert len(hub.calls) == 2


@pytest.mark.parametrize(
  ('arguments', 'part'),
  [
    (['--repo=thing'], 'owner is missing'),
    (['--repo=a/b/c'], "must be 'owner/name'"),
    (['--repo=me/x', '--license=My Licence'], 'identifier of the hub'),
    (['--repo=me/x', '--language=English'], "codes such as 'en'"),
    (['--repo=me/x', '--out=.'], 'exists already'),
  ],
)
def test_flags_are_checked(finished, arguments, part):
  with pytest.raises(UserError, match=part):
    run_command('launch.py publish', [str(finished), *arguments])


def test_the_command_says_what_it_would_upload(finished, tmp_path, capsys):
  run_command(
    'launch.py publish', [str(finished), '--repo=me/x', '--what=d_cai', f'--out={tmp_path / "o"}']
  )
  assert 'data/train-00000-of-00001.parquet' in capsys.readouterr().out


@dataclasses.dataclass
class Served:
  """What a stand-in of the hub was sent."""

  files: dict = dataclasses.field(default_factory=dict)
  deleted: list = dataclasses.field(default_factory=list)
  commits: int = 0
  card: str = ''  # which the hub is asked to validate


@contextlib.contextmanager
def serve_hub(served):
  """A stand-in of the part of the hub's API that creates a repository and takes one commit."""

  class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
      if self.path == '/api/whoami-v2':
        return self.answer({'name': 'me', 'orgs': []})
      if '/tree/' in self.path:
        return self.answer([{'type': 'file', 'path': 'old.jsonl', 'size': 1, 'oid': '0'}])
      self.send_response(404)
      self.send_header('X-Error-Code', 'RepoNotFound')
      self.send_header('Content-Length', '0')
      self.end_headers()

    def do_POST(self):
      body = self.rfile.read(int(self.headers['Content-Length']))
      if self.path == '/api/repos/create':
        return self.answer({'url': f'http://{self.headers["Host"]}/datasets/me/thing'})
      if '/preupload/' in self.path:
        names = [file['path'] for file in json.loads(body)['files']]
        modes = {'uploadMode': 'regular', 'shouldIgnore': False}
        return self.answer({'files': [{'path': name} | modes for name in names]})
      if self.path == '/api/validate-yaml':
        served.card = json.loads(body)['content']
        return self.answer({'errors': [], 'warnings': []})
      assert '/commit/' in self.path
      served.commits += 1
      for line in map(json.loads, body.splitlines()):
        if line['key'] == 'file':
          served.files[line['value']['path']] = base64.b64decode(line['value']['content'])
        elif line['key'] == 'deletedFile':
          served.deleted.append(line['value']['path'])
      url = f'http://{self.headers["Host"]}/datasets/me/thing/commit/1'
      self.answer({'commitUrl': url, 'commitOid': '1', 'hookOutput': ''})

    def answer(self, content):
      body = json.dumps(content).encode()
      self.send_response(200)
      self.send_header('Content-Length', str(len(body)))
      self.end_headers()
      self.wfile.write(body)

    def log_message(self, *args):
      pass

  server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler)
  threading.Thread(target=server.serve_forever, daemon=True).start()
  try:
    yield f'http://127.0.0.1:{server.server_port}'
  finally:
    server.shutdown()
    server.server_close()


def test_the_hub_gets_the_files_in_one_commit(finished, tmp_path, monkeypatch):
  monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', False)
  served = Served()
  with serve_hub(served) as address:
    api = huggingface_hub.HfApi(endpoint=address, token='hf_none')
    publish(str(finished), 'd_cai', REQUEST, api, private=True)
  out = write_folder(str(finished), 'd_cai', REQUEST, str(tmp_path / 'out'))
  written = {str(p.relative_to(out)): p.read_bytes() for p in out.rglob('*') if p.is_file()}
  assert served.card == written['README.md'].decode()
  assert served.files == written and served.deleted == ['old.jsonl'] and served.commits == 1
