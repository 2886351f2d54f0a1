"""Publishing: what is refused before anything is uploaded, and what the Hub gets."""

import base64
import contextlib
import dataclasses
import http.server
import json
import shutil
import threading

import huggingface_hub
import pytest
from huggingface_hub import constants

from cai_jax.publishing.command import make_request, publish, run_command, write_folder
from cai_jax.runtime.errors import UserError
from cai_jax.runtime.files import write_json
from tests.publishing_setup import (
  REQUEST,
  change,
  read_card,
)
from tests.publishing_setup import finished as finished
from tests.publishing_setup import run as run


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
