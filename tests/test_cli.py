"""The command line: help, and errors in one line."""

import json
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

# To end a process takes Python longer than to parse flags, so these do it without cleaning up.
LEAVE = """
import json, os, sys, traceback
def leave_after(function):
  code = None
  try:
    function()
  except SystemExit as error:
    code = error.code
  except BaseException:
    code = traceback.format_exc()
  if isinstance(code, str):
    print(code, file=sys.stderr)
  for file in (sys.stdout, sys.stderr):
    file.flush()
  os._exit(code if isinstance(code, int) else int(code is not None))
"""
# Runs the command line of each line of its input in a process of its own, which is faster than to
# import the program for each. Its output goes to files.
RUN_LINES = (
  LEAVE
  + """
from cai_jax import cli, pipeline
for line in sys.stdin:
  arguments, *outputs = json.loads(line)
  if not os.fork():
    for number, path in enumerate(outputs, start=1):
      os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), number)
    sys.argv = ['launch.py', *arguments]
    leave_after(cli.run)
  print(os.waitstatus_to_exitcode(os.wait()[1]), flush=True)
"""
)


@pytest.fixture(scope='module')
def run_program(tmp_path_factory):
  """`run_program(*arguments)` runs the command line and returns its output and status."""
  folder = tmp_path_factory.mktemp('output')
  command = [sys.executable, '-c', RUN_LINES]
  with subprocess.Popen(
    command,
    cwd=ROOT,
    env=os.environ | {'PYTHONPATH': str(ROOT)},
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
    text=True,
    bufsize=1,
  ) as server:

    def run(*arguments):
      paths = [folder / f'{len(list(folder.iterdir()))}-{name}' for name in ('out', 'err')]
      server.stdin.write(json.dumps([arguments, *map(str, paths)]) + '\n')
      status = int(server.stdout.readline())
      return subprocess.CompletedProcess(arguments, status, *(path.read_text() for path in paths))

    yield run
    server.stdin.close()


@pytest.mark.parametrize(
  'flag, message',
  [
    ('--config.train.speed=3', 'error: The config has no field train.speed. Did you mean'),
    ('--config.feedback.variant=odd', "variant='odd'"),
    ('--config.train.learning_rate=fast', 'could not convert'),
  ],
)
def test_command_line_error_is_one_line(flag, message, tmp_path, run_program):
  done = run_program('--config=configs/tiny.py', f'--workdir={tmp_path}/run', flag)
  assert done.returncode != 0 and message in done.stderr and 'Traceback' not in done.stderr
  assert not (tmp_path / 'run').exists()


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


TINY = 'from configs import tiny\ndef get_config():\n  config = tiny.get_config()\n  '
SEED = '--config.seed=1'
# (text of a config file, a further flag, pattern of the error)
BAD_CONFIGS = [
  ("def get_config():\n  open('absent.txt')\n", '', "2: FileNotFoundError: .*'absent.txt'"),
  ("def get_config():\n  open('a.txt')\n", SEED, "2: FileNotFoundError: .*'a"),
  ("def get_config():\n  'text'.missing\n", '', "2: AttributeError: 'str' object has no attri"),
  ("def get_config():\n  raise ValueError('odd')\n", SEED, '2: ValueError: odd'),
  ('import nowhere\n', '', "1: ModuleNotFoundError: No module named 'nowhere'"),
  ('def get_config():\n  return 1 +\n', '', '2: SyntaxError: invalid syntax'),
  ('a\0b', '', ': SyntaxError: source code string cannot contain null bytes'),
  ('def get_config():\n  pass\n', '', 'in .*mine.py returns None. It must return'),
  ('def get_config():\n  pass\n', SEED, 'mine.py: .*NoneType'),
  (
    "def get_config():\n  return {'seed': 1}\n",
    (),
    'in .*mine.py returns a dict. It must return',
  ),
  ('get_config = 3\n', '', "cannot be loaded: 'int' object is not callable"),
  (TINY + 'config.train.epochs = "x"\n', '', "4: TypeError: Could not override field 'epochs'"),
  (
    TINY + 'config.train.clip_norm = None\n  return config',
    (),
    'train.clip_norm must be a number',
  ),
  (TINY + 'config.train.filters = None\n  return config', '', 'train.filters must be a tuple'),
  (TINY + 'config.prompts = None\n  return config', '', 'prompts is a section'),
]
# Parses the flags of each line of its input in a process of its own, which is faster than to start
# the program for each.
PARSE_LINES = (
  LEAVE
  + """
from cai_jax import cli
from cai_jax.pipeline import schema
def parse():
  cli.parse(sys.argv)
  with cli.short_errors():
    schema.from_config(cli._CONFIG.value)
for line in sys.stdin:
  if not os.fork():
    sys.argv = ['launch.py', *json.loads(line)]
    leave_after(parse)
  print('status', os.waitstatus_to_exitcode(os.wait()[1]), file=sys.stderr, flush=True)
"""
)


def test_an_error_in_a_config_is_one_line_with_its_place(tmp_path):
  lines = []
  for number, (text, flag, _) in enumerate(BAD_CONFIGS):
    (tmp_path / str(number)).mkdir()
    path = tmp_path / str(number) / 'mine.py'
    path.write_text(text)
    lines.append(
      json.dumps([f'--config={path}', f'--workdir={tmp_path}/run', flag][: 2 + bool(flag)])
    )
  done = subprocess.run(
    [sys.executable, '-c', PARSE_LINES],
    input='\n'.join(lines),
    cwd=ROOT,
    env=os.environ | {'PYTHONPATH': str(ROOT)},
    capture_output=True,
    text=True,
  )
  outputs = done.stderr.split('status ')
  assert 'Traceback' not in done.stderr and len(outputs) == len(BAD_CONFIGS) + 1, done.stderr
  for (_, _, message), output, status in zip(BAD_CONFIGS, outputs, outputs[1:], strict=False):
    errors = [line for line in output.splitlines() if line.startswith('error: ')]
    assert len(errors) == 1 and re.search(message, errors[0]), (message, output)
    assert status.startswith('1')


def test_a_config_without_get_config_is_refused(tmp_path, run_program):
  path = tmp_path / 'mine.py'
  path.write_text('')
  done = run_program(f'--config={path}', f'--workdir={tmp_path}/run')
  assert done.stderr == f'error: {path} does not define get_config().\n'


def test_help_names_stages_settings_and_examples(run_program):
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
    (('--config=', '--workdir=run'), r'empty string[\s\S]*Give the path of a config file'),
    (
      ('--config=configs/tiny.py:odd', '--workdir=run'),
      r'configs/tiny.py cannot be loaded: get_con',
    ),
    (('--config=configs/tiny.py', '--workdir=run', '--profile=-1'), r'error: flag --profile=-1'),
    (
      ('--config=configs/tiny.py', '--workdir=run', '--config.seed=1.5'),
      r'--config.seed=1.5: inva',
    ),
    (('--config=configs/tiny.py', '--workdir=run', 'train'), 'Unexpected arguments: train'),
  ],
)
def test_missing_and_unexpected_arguments_are_explained(arguments, message, run_program):
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
