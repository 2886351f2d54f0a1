"""Files of examples: made once, by any number of workers, and made again if anything changes."""

import errno
import os
import pathlib
import re
import socket
import subprocess
import sys

import jax
import pytest

from cai_jax.data import d_cai, part_files
from cai_jax.data.example_maker import ExampleMaker
from cai_jax.data.examples import build_examples
from cai_jax.data.fingerprints import fingerprint
from cai_jax.data.part_files import delete_parts
from cai_jax.dialogue import Dialogue
from cai_jax.dialogue.plain import LABELS
from cai_jax.runtime import processes
from cai_jax.runtime.errors import StoppedError, UserError
from tests.test_d_cai import make_row

ROOT = pathlib.Path(__file__).parents[1]
OPTIONS = {'helpfulness_share': 0.2, 'seed': 3}


@pytest.fixture(scope='module')
def rows(tmp_path_factory):
  folder = tmp_path_factory.mktemp('rows')
  d_cai.write_shard(folder, 0, [make_row(i, 0 if i % 3 == 0 else 2) for i in range(25)])
  d_cai.write_metadata(folder, [25])
  return d_cai.read_rows(folder)


@pytest.fixture(scope='module')
def dialogue(tiny_tokenizer):
  return Dialogue(tiny_tokenizer)


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
  monkeypatch.setattr(part_files, 'PART_ROWS', 8)


def names(folder):
  return sorted(str(path.relative_to(folder)) for path in folder.rglob('*.safetensors'))


def test_examples_from_files_are_those_in_memory(rows, dialogue, tmp_path):
  expected = build_examples(rows, dialogue, **OPTIONS)
  built = build_examples(rows, dialogue, **OPTIONS, folder=tmp_path / 'examples')
  assert fingerprint(built.examples) == fingerprint(expected.examples)
  assert built.counts == expected.counts and built.counts['helpful'] == 4
  assert [e.id for e in built.examples] == [e.id for e in expected.examples]
  assert len(names(tmp_path)) == 4
  delete_parts(tmp_path / 'examples')
  assert not (tmp_path / 'examples').exists()


def test_a_second_start_makes_only_what_is_missing(rows, dialogue, tmp_path, monkeypatch):
  first = build_examples(rows, dialogue, **OPTIONS, folder=tmp_path)
  before, made = fingerprint(first.examples), []
  make_part = ExampleMaker.make_part

  def record(self, rows, begin, end):
    made.append((begin, end))
    return make_part(self, rows, begin, end)

  monkeypatch.setattr(ExampleMaker, 'make_part', record)
  again = build_examples(rows, dialogue, **OPTIONS, folder=tmp_path)
  assert made == [] and fingerprint(again.examples) == before and again.counts == first.counts
  (tmp_path / names(tmp_path)[1]).unlink()
  again = build_examples(rows, dialogue, **OPTIONS, folder=tmp_path)
  assert made == [(8, 16)] and fingerprint(again.examples) == before


@pytest.mark.parametrize('damage', ['changed', 'cut', 'empty'])
def test_a_damaged_part_is_made_again(rows, dialogue, tmp_path, capsys, damage):
  first = build_examples(rows, dialogue, **OPTIONS, folder=tmp_path)
  before = fingerprint(first.examples)
  path = tmp_path / names(tmp_path)[1]
  content = path.read_bytes()
  path.unlink()
  wrong = bytes([content[-5] ^ 1])
  made = {'changed': content[:-5] + wrong + content[-4:], 'cut': content[:-5], 'empty': b''}
  path.write_bytes(made[damage])
  again = build_examples(rows, dialogue, **OPTIONS, folder=tmp_path)
  assert fingerprint(again.examples) == before and path.read_bytes() == content
  assert f'{path} is damaged, and is made again' in capsys.readouterr().err


def test_other_files_in_the_folder_stay(rows, dialogue, tmp_path):
  folder = tmp_path / 'examples'
  (folder / 'my notes').mkdir(parents=True)
  build_examples(rows, dialogue, folder=folder)
  build_examples(rows, dialogue, folder=folder, target='all')
  delete_parts(folder)
  assert [path.name for path in folder.iterdir()] == ['my notes']


def test_very_many_rows_make_larger_parts(rows, dialogue, tmp_path, monkeypatch):
  expected = fingerprint(build_examples(rows, dialogue, **OPTIONS).examples)
  monkeypatch.setattr(part_files, 'MAX_PARTS', 2)
  built = build_examples(rows, dialogue, **OPTIONS, folder=tmp_path)
  assert len(names(tmp_path)) == 2 and fingerprint(built.examples) == expected


def test_all_processes_fail_together_if_one_cannot_map(rows, dialogue, tmp_path, monkeypatch):
  together = []

  def run(name, work):
    together.append(name)
    result = work()
    together.append('done')
    return result

  def fail(path):
    raise OSError(errno.EMFILE, os.strerror(errno.EMFILE), str(path))

  monkeypatch.setattr(processes, 'run_on_all_processes', run)
  monkeypatch.setattr(part_files, 'map_part', fail)
  with pytest.raises(StoppedError, match=re.escape(str(tmp_path))):
    build_examples(rows, dialogue, folder=tmp_path)
  assert together[-3:] == ['prepare the examples', 'done', 'map the examples']


def test_a_process_with_another_digest_is_told(rows, dialogue, tmp_path, monkeypatch):
  monkeypatch.setattr(processes, 'is_same_everywhere', lambda text: False)
  with pytest.raises(StoppedError, match='differs between the processes'):
    build_examples(rows, dialogue, folder=tmp_path)
  assert not names(tmp_path)


def test_a_container_limits_the_workers(tmp_path, monkeypatch):
  limit = tmp_path / 'cpu.max'
  monkeypatch.setattr(part_files, '_CPU_LIMIT', limit)
  monkeypatch.setattr(part_files.os, 'sched_getaffinity', lambda _: range(64), raising=False)
  monkeypatch.setattr(part_files.os, 'cpu_count', lambda: 64)
  monkeypatch.setattr(part_files, 'host_memory', lambda: 10**12)
  assert part_files._count_cores() == 64
  for text, count in (('max 100000', 64), ('400000 100000', 4), ('50000 100000', 1)):
    limit.write_text(text)
    assert part_files._count_cores() == count
  limit.write_text('max 100000')
  monkeypatch.setattr(part_files, 'host_memory', lambda: 16 << 30)
  assert part_files._count_cores() == 16


def test_a_plugin_that_fails_in_a_worker_is_named(rows, monkeypatch):
  def fail(_):
    raise UserError('plugin.py cannot be loaded')

  monkeypatch.setattr(part_files, 'load_plugins', fail)
  monkeypatch.setattr(part_files, '_shared', [])
  monkeypatch.setattr(part_files.signal, 'signal', lambda *_: None)
  monkeypatch.setattr(part_files.multiprocessing, 'parent_process', lambda: True)
  monkeypatch.setattr(part_files.threading.Thread, 'start', lambda self: None)
  updates = []
  monkeypatch.setattr(jax.config, 'update', lambda *update: updates.append(update))
  part_files._start_worker(None, ('plugin.py',))
  assert updates == [('jax_platforms', 'cpu')]
  with pytest.raises(UserError, match='plugin.py cannot be loaded'):
    part_files._work(pathlib.Path('unused'), (rows, 0, 1))


def test_other_settings_or_rows_make_other_files(rows, dialogue, tiny_tokenizer, tmp_path):
  plain = Dialogue(tiny_tokenizer, 'plain')
  other = tmp_path / 'other rows'
  other.mkdir()
  d_cai.write_shard(other, 0, [make_row(i, 1) for i in range(3)])
  d_cai.write_metadata(other, [3])
  seen = set()
  for case in (
    lambda folder: build_examples(rows, dialogue, folder=folder),
    lambda folder: build_examples(rows, dialogue, folder=folder, target='all'),
    lambda folder: build_examples(rows, dialogue, folder=folder, max_length=512),
    lambda folder: build_examples(rows, dialogue, folder=folder, drop_truncated=False),
    lambda folder: build_examples(rows, dialogue, folder=folder, filters=('empty',)),
    lambda folder: build_examples(rows, plain, folder=folder),
    lambda folder: build_examples(d_cai.read_rows(other), dialogue, folder=folder),
  ):
    case(tmp_path / 'examples')
    (key,) = {name.split('/')[0] for name in names(tmp_path / 'examples')}  # others are deleted
    seen.add(key)
  assert len(seen) == 7


def test_a_format_of_the_same_name_that_writes_something_else_has_another_digest(
  tiny_tokenizer, monkeypatch
):
  before = Dialogue(tiny_tokenizer, 'plain').digest
  assert Dialogue(tiny_tokenizer, 'plain').digest == before
  monkeypatch.setitem(LABELS, 'user', LABELS['assistant'] + ' not')
  assert Dialogue(tiny_tokenizer, 'plain').digest != before


def test_a_kill_leaves_whole_parts(rows, dialogue, tmp_path, monkeypatch):
  make_part = ExampleMaker.make_part

  def killed(self, rows, begin, end):
    if begin == 16:
      raise KeyboardInterrupt
    return make_part(self, rows, begin, end)

  with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
    patch.setattr(ExampleMaker, 'make_part', killed)
    build_examples(rows, dialogue, **OPTIONS, folder=tmp_path)
  assert len(names(tmp_path)) == 2
  built = build_examples(rows, dialogue, **OPTIONS, folder=tmp_path)
  assert fingerprint(built.examples) == fingerprint(
    build_examples(rows, dialogue, **OPTIONS).examples
  )


def test_workers_write_the_bytes_of_one_process(rows, dialogue, tmp_path, monkeypatch):
  """The pool is replaced by one that starts its worker here; the slow test starts real ones."""

  class Pool:
    def __init__(self, workers, context, start, arguments):
      assert workers == 2 and context.get_start_method() == 'spawn'
      monkeypatch.setattr(part_files.multiprocessing, 'parent_process', lambda: self)
      monkeypatch.setattr(part_files.signal, 'signal', lambda *_: None)
      monkeypatch.setattr(part_files.threading, 'Thread', lambda **_: self)
      start(*arguments)

    def start(self):
      pass

    def submit(self, function, *arguments):
      job = part_files.concurrent.futures.Future()
      job.set_result(function(*arguments))
      return job

    def shutdown(self, cancel_futures):
      assert cancel_futures

  def contents(folder):
    return [(folder / name).read_bytes() for name in names(folder)]

  build_examples(rows, dialogue, **OPTIONS, folder=tmp_path / 'one')
  monkeypatch.setattr(part_files.concurrent.futures, 'ProcessPoolExecutor', Pool)
  monkeypatch.setattr(part_files, 'POOL_ROWS', 20)
  monkeypatch.setattr(part_files, '_count_cores', lambda: 2)
  build_examples(rows, dialogue, **OPTIONS, folder=tmp_path / 'two')
  assert contents(tmp_path / 'one') == contents(tmp_path / 'two')


def test_a_row_with_a_fault_is_named(dialogue, tmp_path):
  folder = tmp_path / 'rows'
  folder.mkdir()
  row = make_row(1, 1)
  row['prompt'][0]['role'] = 'nobody'
  d_cai.write_shard(folder, 0, [make_row(0, 1), row])
  d_cai.write_metadata(folder, [2])
  with pytest.raises(UserError, match=r"row 1 \(id '1'\): .*nobody"):
    build_examples(d_cai.read_rows(folder), dialogue, folder=tmp_path / 'examples')


RUN = """
import sys
from cai_jax.data import d_cai, part_files
from cai_jax.data.examples import build_examples
from cai_jax.data.fingerprints import fingerprint
from cai_jax.dialogue import Dialogue
from cai_jax.model import lm as models
from cai_jax.runtime import processes
from cai_jax.tiny.files import MODELS
if __name__ == '__main__':
  processes.initialize()
  part_files.PART_ROWS, part_files.POOL_ROWS = 8, int(sys.argv[3])
  part_files._count_cores = lambda: 2
  rows, lm = d_cai.read_rows(sys.argv[1]), models.describe(MODELS['tiny'])
  built = build_examples(rows, Dialogue(lm.tokenizer), folder=sys.argv[2])
  print(fingerprint(built.examples), flush=True)
"""


def start(script, rows, folder, pool_rows, **environment):
  environment = {**os.environ, 'PYTHONPATH': str(ROOT), 'JAX_PLATFORMS': 'cpu'} | environment
  command = [sys.executable, str(script), rows.folder, str(folder), str(pool_rows)]
  return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)


@pytest.mark.slow
def test_worker_processes_and_processes_of_a_run_make_the_same_files(rows, tmp_path):
  with socket.socket() as free:
    free.bind(('localhost', 0))
    address = f'localhost:{free.getsockname()[1]}'
  script = tmp_path / 'script.py'
  script.write_text(RUN)
  jobs = [start(script, rows, tmp_path / 'alone', 1000), start(script, rows, tmp_path / 'pool', 8)]
  run = {'COORDINATOR_ADDRESS': address, 'NUM_PROCESSES': '2'}
  jobs += [start(script, rows, tmp_path / 'two', 1000, **run, PROCESS_ID=str(i)) for i in range(2)]
  printed = [job.communicate()[0].split()[-1] for job in jobs]
  assert [job.returncode for job in jobs] == [0] * 4 and len({*printed}) == 1
  alone, pool, two = (
    {name: (tmp_path / folder / name).read_bytes() for name in names(tmp_path / folder)}
    for folder in ('alone', 'pool', 'two')
  )
  assert alone == pool == two and len(alone) == 4
