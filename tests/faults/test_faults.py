"""Faults of the machine, done to the running program at random moments.

  python -m pytest tests/faults -m slow

`CAI_FAULTS_SEED` sets the seed, which the header of a failure prints. `tests/faults/kills.py` does
many more kills.
"""

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import time

import pytest

from cai_jax.tiny.files import MODELS
from tests.faults import kills
from tests.faults.program import STAGES, Program, Reference, command, differences, started
from tests.faults.servers import serve
from tests.pipeline_setup import start_two

pytestmark = pytest.mark.slow

SEED = int(os.environ.get('CAI_FAULTS_SEED', random.randrange(1 << 30)))


@pytest.fixture(scope='module')
def reference(tmp_path_factory):
  print(f'CAI_FAULTS_SEED={SEED}')
  return Reference(tmp_path_factory.mktemp('reference') / 'runs')


@pytest.fixture
def rng(request):
  print(f'CAI_FAULTS_SEED={SEED}')
  return random.Random(f'{SEED} {request.node.name}')


@contextlib.contextmanager
def mounted(folder, size):
  """Mount a small tmpfs on a folder, or skip the test."""
  folder.mkdir()
  options = ['-t', 'tmpfs', '-o', f'size={size}', 'tmpfs', str(folder)]
  if subprocess.run(['mount', *options], capture_output=True).returncode:
    pytest.skip('mounting a tmpfs is not permitted here')
  try:
    yield folder
  finally:
    subprocess.run(['umount', '-l', str(folder)], check=True)


def finish(reference, workdir, stage):
  """Start the same command again, and expect the bytes of the undisturbed run."""
  with started(command(workdir, [stage]), reference.environment) as program:
    assert program.wait() == 0, program.output + program.errors
  assert differences(workdir, reference.contents[stage]) == []


def reported_in_one_line(program, *parts):
  """Expect that the program ended with one line for the user, and no traceback."""
  lines = program.errors.splitlines()
  assert program.process.returncode == 1 and len(lines) == 1, program.errors
  assert lines[0].startswith('error: ') and all(part in lines[0] for part in parts), lines[0]


@pytest.mark.parametrize('stage', STAGES)
@pytest.mark.parametrize('number', [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_disturbed_stage_ends_with_the_same_bytes(reference, tmp_path, rng, stage, number):
  """Three random moments; SIGTERM (143) and SIGINT (130) end in one line, within 10 s."""
  tally = kills.Tally()
  moments = [rng.random() for _ in range(3)]
  kills.disturb(reference, tmp_path / 'run', stage, moments, number, tally)
  assert not tally.faults and tally.counts[stage]['runs'] == 1


def test_a_second_signal_ends_the_program_during_a_compilation(reference, tmp_path):
  environment = reference.environment | {'JAX_COMPILATION_CACHE_DIR': str(tmp_path / 'cold')}
  workdir = reference.copy('train', tmp_path / 'run')
  with started(command(workdir, ['train']), environment) as program:
    assert program.wait_for('train', 1.0)
    program.process.send_signal(signal.SIGTERM)
    status, seconds = program.signal(signal.SIGTERM)
    assert status == 143 and seconds < 2
  finish(reference, workdir, 'train')


def test_a_stopped_and_continued_program_notices_nothing(reference, tmp_path, rng):
  workdir = reference.copy('generate', tmp_path / 'run')
  with started(command(workdir, ['generate']), reference.environment) as program:
    assert program.wait_for('generate', rng.random() / 8 * reference.seconds['generate'])
    program.process.send_signal(signal.SIGSTOP)
    time.sleep(rng.uniform(0.5, 2))
    program.process.send_signal(signal.SIGCONT)
    assert program.wait() == 0, program.errors
  assert differences(workdir, reference.contents['generate']) == []


@pytest.mark.parametrize('stage', STAGES)
def test_a_full_disk_is_one_line_and_the_run_continues(reference, tmp_path, rng, stage):
  with mounted(tmp_path / 'disk', '400m') as disk:
    workdir = reference.copy(stage, disk / 'run')
    free = shutil.disk_usage(disk).free
    with started(command(workdir, [stage]), reference.environment) as program:
      assert program.wait_for(stage)
      with open(disk / 'ballast', 'wb') as ballast:
        os.posix_fallocate(ballast.fileno(), 0, free - rng.randrange(1 << 16))
      program.wait()
      reported_in_one_line(program, 'No space left on device', str(workdir), 'Free some space')
    (disk / 'ballast').unlink()
    finish(reference, workdir, stage)


@pytest.mark.parametrize('stage', STAGES)
def test_a_read_only_folder_is_reported_before_the_work(reference, tmp_path, stage):
  with mounted(tmp_path / 'disk', '400m') as disk:
    workdir = reference.copy(stage, disk / 'run')
    subprocess.run(['mount', '-o', 'remount,ro', str(disk)], check=True)
    with started(command(workdir, [stage]), reference.environment) as program:
      program.wait()
      reported_in_one_line(program, str(workdir), 'Read-only')
    subprocess.run(['mount', '-o', 'remount,rw', str(disk)], check=True)
    finish(reference, workdir, stage)


@pytest.mark.parametrize('stage', STAGES)
def test_a_deleted_folder_is_reported(reference, tmp_path, stage):
  workdir = reference.copy(stage, tmp_path / 'run')
  with started(command(workdir, [stage]), reference.environment) as program:
    assert program.wait_for(stage)
    workdir.rename(tmp_path / 'elsewhere')
    program.wait()
    reported_in_one_line(program, str(workdir))
  shutil.rmtree(workdir, ignore_errors=True)
  (tmp_path / 'elsewhere').rename(workdir)
  finish(reference, workdir, stage)


def test_of_two_starts_at_once_one_is_refused(reference, tmp_path):
  workdir = reference.copy('generate', tmp_path / 'run')
  pair = [Program(command(workdir, ['generate']), reference.environment) for _ in range(2)]
  statuses = [program.wait() for program in pair]
  assert sorted(statuses) == [0, 1]
  reported_in_one_line(pair[statuses.index(1)], f'{workdir} belongs to job')
  assert differences(workdir, reference.contents['generate']) == []


def test_weights_that_are_replaced_between_stages_are_noticed(reference, tmp_path):
  model, workdir = shutil.copytree(MODELS['tiny'], tmp_path / 'model'), tmp_path / 'run'
  with started(command(workdir, ['generate'], model__base=model), reference.environment) as program:
    assert program.wait() == 0, program.errors
  weights = next(model.glob('*.safetensors'))
  content = bytearray(weights.read_bytes())
  content[-1] ^= 1
  weights.write_bytes(content)
  with started(command(workdir, ['train'], model__base=model), reference.environment) as program:
    program.wait()
    reported_in_one_line(program, str(workdir))


@pytest.mark.parametrize(
  ('stage', 'file'), [('train', 'metrics.jsonl'), ('train', 'manifest.json')]
)
@pytest.mark.parametrize('content', [b'{', b'[]\n', b'\xff\xfe\n', b'{"step": "a"}\n'])
def test_a_damaged_file_is_named(reference, tmp_path, stage, file, content):
  workdir = reference.copy('evaluate', tmp_path / 'run')
  manifest = workdir / 'manifest.json'
  if file == 'manifest.json':
    manifest.write_bytes(content)
  else:  # as if the train stage had been killed
    recorded = json.loads(manifest.read_text())
    del recorded['stages']['train']['finished']
    manifest.write_text(json.dumps(recorded))
    (workdir / file).write_bytes(content + b'{"step": 1}\n')
  with started(command(workdir, [stage]), reference.environment) as program:
    program.wait()
    reported_in_one_line(program, str(workdir / file))


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_wait_for_a_stalling_server(reference, tmp_path, number):
  with serve(lambda body: [60.0]) as server:
    fields = {
      'model__base': '',
      'remote__base__url': server.url,
      'remote__base__model': 'served',
      'remote__base__tokenizer': MODELS['tiny'],
      'remote__base__max_positions': 512,
    }
    arguments = command(tmp_path / 'run', ['generate'], **fields)
    with started(arguments, reference.environment) as program:
      while not server.bodies:
        assert program.read(0.05), program.errors
      status, seconds = program.signal(number)
      assert status == 128 + number and seconds < kills.LIMIT
      assert len(program.errors.splitlines()) == 1


@pytest.mark.parametrize('which', [(0,), (1,), (0, 1)])
def test_a_signal_ends_all_processes_of_a_run(reference, tmp_path, which):
  """To process 0, to process 1, and to both, as a scheduler sends it."""
  workdir = tmp_path / 'run'
  options = {'stdout': subprocess.PIPE, 'stderr': subprocess.STDOUT, 'text': True}
  arguments = [str(argument) for argument in command(workdir, ['generate'])]
  pair = start_two(arguments, 1, **options)
  try:
    while not list(workdir.glob('d_cai/job.json')):
      assert [process.poll() for process in pair] == [None, None]
      time.sleep(0.05)
    for index in which:
      pair[index].send_signal(signal.SIGTERM)
    begin = time.monotonic()
    outputs = [process.communicate(timeout=120)[0] for process in pair]
    assert [process.returncode for process in pair] == [143, 143], outputs
    assert all('SIGTERM: ' in text for text in outputs) and time.monotonic() < begin + 30
  finally:
    for process in pair:
      process.kill()
  finish(reference, workdir, 'generate')
