"""The lock of a workdir: one running job at a time, also after kills and suspended processes."""

import concurrent.futures
import json
import os
import signal
import subprocess
import sys
import textwrap
import time

import pytest

from cai_jax import pipeline
from cai_jax.runtime import lock
from cai_jax.runtime.errors import UserError
from tests.pipeline_setup import small, start_one, start_two

# Holds a folder and appends a line to a file every few milliseconds.
HOLDER = """
import sys, time
from cai_jax.runtime import lock
lock.HEARTBEAT_SECONDS = 0.05
with lock.hold(sys.argv[1]), open(sys.argv[1] + '/lines', 'ab', buffering=0) as lines:
  while True:
    lines.write(b'line\\n')
    time.sleep(0.005)
"""


def start_holder(folder):
  """Return a process that holds a folder, once it does."""
  options = dict(stderr=subprocess.PIPE, text=True)
  holder = start_one([sys.executable, '-c', textwrap.dedent(HOLDER), str(folder)], 1, options)
  while not (folder / 'lines').exists():
    assert holder.poll() is None
    time.sleep(0.02)
  return holder


def write_lock(folder, **fields):
  """Write the lock of another job, as `fields` describe it."""
  (folder / lock.FOLDER).mkdir(exist_ok=True)
  path = folder / lock.FOLDER / '000007'
  path.write_text(json.dumps({'job': 'abc', 'since': 'noon'} | lock.describe_process() | fields))
  return path


def test_a_held_folder_is_refused_and_free_afterwards(tmp_path):
  with lock.hold(tmp_path) as job:
    assert len(job) == 12
    message = rf'{tmp_path} belongs to job {job} \(process {os.getpid()} on \S+, since 20'
    with pytest.raises(UserError, match=message), lock.hold(tmp_path):
      pass
  with lock.hold(tmp_path) as other:
    assert other != job
  assert [path.name for path in (tmp_path / lock.FOLDER).iterdir()] == ['000002.free']


def test_an_error_frees_the_folder(tmp_path):
  with pytest.raises(ZeroDivisionError), lock.hold(tmp_path):
    raise ZeroDivisionError
  with lock.hold(tmp_path):
    pass


def test_the_folder_of_a_killed_process_is_free_at_once(tmp_path):
  holder = start_holder(tmp_path)
  with pytest.raises(UserError, match=f'process {holder.pid} on'), lock.hold(tmp_path):
    pass
  holder.kill()
  time.sleep(0.1)  # the process is dead, but its parent has not asked for its status
  with lock.hold(tmp_path):
    pass
  holder.communicate()


def test_another_process_with_the_same_id_is_not_the_holder(tmp_path):
  write_lock(tmp_path, process_start='1')
  with lock.hold(tmp_path):
    pass


@pytest.mark.parametrize('changes', [{'host': 'elsewhere'}, {'machine': 'another boot'}])
def test_a_process_of_another_machine_counts_as_running_until_its_lock_is_stale(tmp_path, changes):
  path = write_lock(tmp_path, process_start='1', **changes)
  with pytest.raises(UserError, match=r'start again in 6\d s'), lock.hold(tmp_path):
    pass
  os.utime(path, (time.time() - 70,) * 2)
  with lock.hold(tmp_path):
    assert not path.exists()


@pytest.mark.parametrize('content', [b'', b'{', b'[]', b'\xff', b'{"pid": []}', b'{"pid": "../x"}'])
def test_a_damaged_lock_counts_as_running_until_it_is_stale(tmp_path, content):
  path = write_lock(tmp_path)
  path.write_bytes(content)
  with pytest.raises(UserError, match='belongs to'), lock.hold(tmp_path):
    pass
  os.utime(path, (0, 0))
  with lock.hold(tmp_path):
    pass


@pytest.mark.parametrize('state', ['new', 'free', 'stale'])
def test_one_of_several_jobs_that_start_at_once_wins(tmp_path, state):
  with concurrent.futures.ThreadPoolExecutor(8) as pool:
    for attempt in range(20):
      folder = tmp_path / str(attempt)
      folder.mkdir()
      if state == 'free':
        with lock.hold(folder):
          pass
      elif state == 'stale':
        os.utime(write_lock(folder, host='elsewhere'), (0, 0))
      starts = [pool.submit(lock._acquire, folder / lock.FOLDER, str(n), {}) for n in range(8)]
      errors = [start.exception() for start in starts]
      assert errors.count(None) == 1
      assert all(error is None or isinstance(error, UserError) for error in errors)


def test_a_suspended_job_whose_folder_was_taken_ends_and_writes_nothing_more(tmp_path, monkeypatch):
  holder = start_holder(tmp_path)
  holder.send_signal(signal.SIGSTOP)
  monkeypatch.setattr(lock, 'STALE_SECONDS', 0.3)
  with pytest.raises(UserError, match='belongs to'), lock.hold(tmp_path):
    pass
  time.sleep(0.5)
  with lock.hold(tmp_path) as job:
    size = (tmp_path / 'lines').stat().st_size
    holder.send_signal(signal.SIGCONT)
    error = holder.communicate(timeout=20)[1]
    assert holder.returncode == 1 and f'was taken over by job {job}' in error
    assert (tmp_path / 'lines').stat().st_size - size <= 20 * len('line\n')
    with pytest.raises(UserError, match=f'belongs to job {job}'), lock.hold(tmp_path):
      pass


def test_a_suspended_job_whose_folder_was_not_taken_continues(tmp_path, monkeypatch):
  holder = start_holder(tmp_path)
  holder.send_signal(signal.SIGSTOP)
  time.sleep(0.5)
  holder.send_signal(signal.SIGCONT)
  time.sleep(0.3)
  monkeypatch.setattr(lock, 'STALE_SECONDS', 0.3)
  with pytest.raises(UserError, match='belongs to'), lock.hold(tmp_path):
    pass
  assert holder.poll() is None
  holder.kill()
  holder.communicate()


def test_a_job_whose_lock_was_deleted_ends(tmp_path):
  holder = start_holder(tmp_path)
  for path in (tmp_path / lock.FOLDER).iterdir():
    path.unlink()
  error = holder.communicate(timeout=20)[1]
  assert holder.returncode == 1 and 'was deleted' in error


def test_a_job_whose_lock_was_deleted_ends_also_without_a_terminal(tmp_path):
  holder = start_holder(tmp_path)
  holder.stderr.close()
  for path in (tmp_path / lock.FOLDER).iterdir():
    path.unlink()
  assert holder.wait(timeout=20) == 1


def test_the_processes_of_a_job_share_its_id(tmp_path):
  code = """
    import sys
    from cai_jax.runtime import lock, processes
    processes.initialize()
    with lock.hold(sys.argv[1]) as job:
      print(job)
  """
  arguments = [sys.executable, '-c', textwrap.dedent(code), str(tmp_path)]
  started = start_two(arguments, 1, stdout=subprocess.PIPE, text=True)
  outputs = [process.communicate(timeout=120)[0] for process in started]
  jobs = [output.split()[-1] for output in outputs]  # gloo prints a line of its own
  assert len(jobs[0]) == 12 and jobs[0] == jobs[1]


def test_a_run_in_the_workdir_of_a_running_job_is_refused_and_changes_nothing(
  random_model, tmp_path
):
  run = pipeline.build(small(random_model), tmp_path)
  with lock.hold(tmp_path), pytest.raises(UserError, match='belongs to job'):
    pipeline.run_stages(run, ['generate'])
  assert {path.name for path in tmp_path.iterdir()} == {lock.FOLDER}
