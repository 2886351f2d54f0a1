"""The folder of an experiment behind a URL: several runs in one workdir."""

import argparse
import json
import os
import shutil
import uuid

import pytest

from cai_jax.experiment import collect, define
from cai_jax.experiment import run as runner
from cai_jax.experiment.define import Arm, Experiment
from cai_jax.pipeline import import_results
from cai_jax.runtime.cloud import lease, workdir
from cai_jax.runtime.cloud.index import claim_order, is_claim, is_record
from cai_jax.runtime.cloud.mirror import Mirror
from cai_jax.runtime.cloud.nesting import check_outer, find_outer
from cai_jax.runtime.cloud.store import Store, open_store
from cai_jax.runtime.cloud.workdir import resolve_workdir
from cai_jax.runtime.errors import UserError
from cai_jax.runtime.manifest import Manifest
from cai_jax.tiny.files import MODELS
from tests.test_import_results import LM_EVAL

REVISIONS = str(define.ROOT / 'experiments' / 'revisions.py')


@pytest.fixture
def url(tmp_path, monkeypatch):
  monkeypatch.setenv(workdir.SCRATCH, str(tmp_path / 'scratch'))
  return f'memory://bucket/{uuid.uuid4().hex}/lab'


def options(**changes):
  names = dict.fromkeys(('arms', 'config', 'shared_model', 'dry_run'))
  return argparse.Namespace(**names | {'seeds': [0]} | changes)


def write(folder, name, content=b'{}'):
  path = folder / name
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_bytes(content)


def test_files_of_a_run_are_written_as_they_are_without_an_experiment(tmp_path, monkeypatch):
  """First what happened, then what it led to, then manifests in their order, and results last."""
  store, order = open_store(f'memory://bucket/{uuid.uuid4().hex}'), []
  names = [
    'runs/b/costs/generate-00000.json',
    'runs/b/model/model.safetensors',
    'runs/b/model/config.json',
    'runs/b/checkpoints/2/_CHECKPOINT_METADATA',
    'runs/b/manifest.json',
    'runs/a/manifest.json',  # it starts from the model of b
    'small/results.json',
  ]
  mirror = Mirror(store, tmp_path, 'job')
  mirror.pull()
  for number, name in enumerate(names):
    write(tmp_path, name)
    os.utime(tmp_path / name, ns=(10**18, 10**18 + number))
  write_object, upload = Store.write, Store.upload
  log = lambda name: order.append(name) if not name.startswith('.cai_jax/') else None  # noqa: E731
  monkeypatch.setattr(Store, 'write', lambda *a: log(a[1]) or write_object(*a))
  monkeypatch.setattr(Store, 'upload', lambda *a: log(a[1]) or upload(*a))
  mirror.push(still=True)
  assert order == names


def test_names_that_only_look_like_those_of_a_run_are_no_records_and_no_manifests():
  assert is_record('runs/a/costs/x.json') and is_record('costs/x.json')
  for name in ('other/costs/x.json', 'runs/costs/x.json', 'runs/a/model/manifest.json'):
    assert is_claim(name) and claim_order(name)[0] == 0


def test_a_url_inside_an_experiment_is_refused_and_leaves_nothing_there(url):
  place, inner = open_store(url), f'{url}/runs/one'
  with resolve_workdir(url).open():
    pass
  before = {*place.list()}
  for start in (resolve_workdir(inner).open, resolve_workdir(inner).look):
    with pytest.raises(UserError, match=f'{inner} is in the workdir {url}, which'), start():
      pass
  assert {*place.list()} == before
  with resolve_workdir(url).open(), resolve_workdir(f'{url}-2').open():
    pass


def test_an_experiment_above_the_workdir_of_a_run_is_refused(url):
  with resolve_workdir(f'{url}/runs/one').open():
    pass
  with pytest.raises(UserError, match=f'{url} contains the workdir {url}/runs/one'):
    runner.run_experiment(REVISIONS, url, options())


def test_a_folder_that_may_not_be_read_is_no_workdir(url, monkeypatch):
  errors = [OSError('Forbidden: x'), PermissionError(), TimeoutError('x'), FileNotFoundError()]

  def refuse(self, name):
    raise errors.pop()

  monkeypatch.setattr(Store, 'entry', refuse)
  with pytest.raises(UserError, match=f'{url} cannot be reached: TimeoutError'):
    check_outer(open_store(url))
  assert len(errors) == 2 and find_outer(open_store(url)) is None


def test_numbers_are_imported_into_a_run_while_its_experiment_does_not_work(url, tmp_path):
  with resolve_workdir(url).open() as stage_ended:
    folder = tmp_path / 'scratch'
    write(folder / resolve_workdir(url).folder, 'runs/a/manifest.json')
    write(
      folder / resolve_workdir(url).folder,
      'runs/a/evaluation/summary.json',
      b'{"models": {"base": {}}}',
    )
    stage_ended()
    (tmp_path / 'results.json').write_text(json.dumps(LM_EVAL))
    command = [f'{url}/runs/a', str(tmp_path / 'results.json'), '--model=base']
    with pytest.raises(UserError, match=f'{url} belongs to job'):
      import_results.run_command('import', command)
  import_results.run_command('import', command)
  assert not [*open_store(f'{url}/runs/a').list(lease.LEASE)]
  place = resolve_workdir(url)
  with place.open():  # and the experiment gets them
    imported = tmp_path / place.folder / 'runs/a/evaluation/imported.json'
    assert json.loads(imported.read_bytes())['base']


def test_a_job_that_holds_the_url_keeps_others_away(url):
  with lease.hold(open_store(url)), pytest.raises(UserError, match=f'{url} belongs to job'):
    runner.run_experiment(REVISIONS, url, options())


def test_a_dry_run_writes_nothing_to_the_store(url, monkeypatch, capsys):
  place = open_store(url)
  place.write('journal/known.json', b'["abc"]')
  before, seen = place.list(), []
  monkeypatch.setattr(
    runner.estimate, 'describe', lambda *a: seen.append((a[2].digests, *a[1])) or 'estimate'
  )
  runner.run_experiment(REVISIONS, url, options(dry_run=True))
  ((digests, folder),) = seen
  assert digests == {'abc'} and not folder.exists()
  assert place.list() == before and 'harmful prompts: smallest' in capsys.readouterr().out
  assert not os.path.exists(resolve_workdir(url).folder)


def test_each_stage_and_the_results_reach_the_store_and_messages_name_it(url, monkeypatch, capsys):
  place = open_store(url)

  def run_stages(run, stages, log, stage_ended):
    log(f'reads {run.workdir}/x')
    Manifest(run.workdir)._write()
    run.journal.mkdir(exist_ok=True)
    (run.journal / 'turns-00000.jsonl').write_bytes(b'{}\n')
    stage_ended()
    assert {'journal/turns-00000.jsonl', f'runs/{run.workdir.name}/manifest.json'} < {*place.list()}

  def write_results(name, *arguments):
    write(arguments[-1], f'{name}/results.json')

  monkeypatch.setattr(runner.pipeline, 'run_stages', run_stages)
  monkeypatch.setattr(runner, '_write_results', write_results)
  runner.run_experiment(REVISIONS, url, options())
  output = capsys.readouterr().out.splitlines()
  assert output[-1] == f'report: {url}/revisions/report.html'
  assert any(line.startswith(f'reads {url}/runs/') for line in output)
  assert {'revisions/results.json', 'journal/known.json'} < {*place.list()}


def test_runs_record_the_url_of_the_model_that_they_start_from(url, tmp_path, monkeypatch):
  """So the next machine, which has another folder, finds the settings that it has itself."""
  experiment = Experiment(
    {'one': Arm({}, 'aligned'), 'two': Arm({}, 'aligned', start='one')}, 'one', seeds=(0,)
  )
  config, recorded = define.load_config('configs/tiny.py'), []
  for number in range(3):  # before the model exists, and on two machines
    monkeypatch.setenv(workdir.SCRATCH, str(tmp_path / str(number)))
    place = resolve_workdir(url)
    folder = tmp_path / place.folder
    first, second = (
      folders[0] for folders in collect.run_folders(experiment, folder / 'runs', config).values()
    )
    if number:
      shutil.copytree(MODELS['tiny-small'], first / 'model')
      entry = {'finished': 'now', 'seconds': 1, 'peak_memory_bytes': 1}
      write(first, 'manifest.json', json.dumps({'version': 2, 'stages': {'train': entry}}).encode())
    run, _ = runner.plan_runs(experiment, config, folder, place.show)[second]
    name = f'{url}/runs/{first.name}/model'
    assert run.values['model']['base'] == name
    assert run.config.model.base == (str(first / 'model') if number else 'tiny')
    recorded.append(run.settings('generate'))
  assert recorded[1] == recorded[2] != recorded[0]
  assert recorded[0]['model'] == recorded[1]['model']
