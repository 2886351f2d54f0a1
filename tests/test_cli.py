"""The command line: help, and errors in one line."""

import os
import re
import signal
import subprocess
import sys

import pytest

from cai_jax import cli
from cai_jax.pipeline import STAGES
from cai_jax.pipeline.schema import default_config
from cai_jax.runtime.errors import NonFiniteError, UserError
from cai_jax.runtime.interruption import Interrupted
from cai_jax.runtime.settings import flatten
from tests.pipeline_setup import ROOT


@pytest.mark.parametrize(
  'flag, message',
  [
    ('--config.train.speed=3', 'unknown config field'),
    ('--config.feedback.variant=odd', "variant='odd'"),
    ('--config.train.learning_rate=fast', 'could not convert'),
  ],
)
def test_command_line_error_is_one_line(flag, message, tmp_path):
  command = [sys.executable, 'launch.py', '--config=configs/tiny.py', f'--workdir={tmp_path}/run']
  done = subprocess.run([*command, flag], cwd=ROOT, capture_output=True, text=True)
  assert done.returncode != 0 and message in done.stderr and 'Traceback' not in done.stderr
  assert not (tmp_path / 'run').exists()


def run_program(*arguments):
  command = [sys.executable, 'launch.py', *arguments]
  return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_the_installed_command_loads_a_shipped_config(tmp_path):
  for folder in ('bin', 'site'):
    (tmp_path / folder).mkdir()
  (tmp_path / 'site' / 'cai_jax').symlink_to(ROOT / 'cai_jax')
  command = tmp_path / 'bin' / 'cai-jax'
  command.write_text('from cai_jax.cli import run\nrun()\n')
  done = subprocess.run(
    [sys.executable, command, '--config=configs/tiny.py', '--workdir=run', '--stages=odd'],
    cwd=ROOT,
    env=os.environ | {'PYTHONPATH': str(tmp_path / 'site')},
    capture_output=True,
    text=True,
  )
  assert done.stderr.startswith('error: There is no stage odd'), done.stderr


@pytest.mark.parametrize(
  ('body', 'flags', 'message'),
  [
    ("open('absent.txt')", (), "FileNotFoundError: .*'absent.txt'"),
    ("open('absent.txt')", ('--config.seed=1',), "FileNotFoundError: .*'absent.txt'"),
    ("'text'.missing", (), "AttributeError: 'str' object has no attribute 'missing'"),
  ],
)
def test_a_bug_in_a_config_keeps_its_traceback(tmp_path, body, flags, message):
  path = tmp_path / 'mine.py'
  path.write_text(f'def get_config():\n  {body}\n')
  done = run_program(f'--config={path}', f'--workdir={tmp_path}/run', *flags)
  assert done.returncode == 1 and 'mine.py", line 2, in get_config' in done.stderr
  assert re.search(message, done.stderr)


def test_a_config_without_get_config_is_refused(tmp_path):
  path = tmp_path / 'mine.py'
  path.write_text('')
  done = run_program(f'--config={path}', f'--workdir={tmp_path}/run')
  assert done.stderr == f'error: {path} does not define get_config().\n'


def test_help_names_stages_settings_and_examples():
  done = run_program('--help')
  assert done.returncode == 0 and not done.stderr
  for part in (*STAGES, '--config.model.base', '--config.data.d_cai', 'docs/configuration.md'):
    assert part in done.stdout
  assert 'python launch.py --config=configs/tiny.py --workdir=runs/tiny\n' in done.stdout
  assert all(len(line) <= 100 for line in done.stdout.splitlines())


def test_help_names_fields_that_exist():
  fields = flatten(default_config().to_dict())
  named = re.findall(r'--config\.([\w.]+)', cli.HELP)
  assert named and all(name in fields for name in named if name != 'FIELD')
  assert all((ROOT / page).exists() for page in re.findall(r'[\w/]+\.md', cli.HELP))


@pytest.mark.parametrize(
  ('arguments', 'message'),
  [
    ((), r'missing --config=... .* and --workdir=... '),
    (('--config=configs/tiny.py',), r'error: missing --workdir=... \(the folder of the run\)'),
    (('--config=nowhere.py', '--workdir=run'), r'nowhere.py[\s\S]*Give the path of a config file'),
    (('--config=configs/tiny.py', '--workdir=run', 'train'), 'Unexpected arguments: train'),
  ],
)
def test_missing_and_unexpected_arguments_are_explained(arguments, message):
  done = run_program(*arguments)
  assert done.returncode == 1 and re.search(message, done.stderr)
  assert 'error: ' in done.stderr


@pytest.mark.parametrize(
  ('error', 'status'),
  [
    (UserError('wrong. Set it.'), 'error: wrong. Set it.'),
    (NonFiniteError('NaN.'), 'error: NaN.'),
    (Interrupted(signal.SIGTERM, 'Saved.'), 143),
    (Interrupted(signal.SIGINT, 'Saved.'), 130),
  ],
)
def test_user_errors_end_the_program_without_a_traceback(error, status):
  with pytest.raises(SystemExit) as ended, cli.short_errors():
    raise error
  assert ended.value.code == status


@pytest.mark.parametrize('error', [ValueError('bug'), FloatingPointError('bug'), OSError('bug')])
def test_other_errors_keep_their_traceback(error):
  with pytest.raises(type(error), match='bug'), cli.short_errors():
    raise error
