"""Start the program on a run of seconds, do something to it, and compare what it wrote.

The run is the embedded world's, with few prompts and steps. JAX's persistent compilation cache
saves most of the compilation, so a start takes little longer than the imports.
"""

import contextlib
import os
import pathlib
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from cai_jax.runtime import compilation

ROOT = pathlib.Path(__file__).parents[2]
STAGES = ('generate', 'train', 'evaluate')
FIELDS: Mapping[str, Any] = {
  'prompts.harmful.limit': 24,
  'prompts.helpful.limit': 12,
  'prompts.eval_harmful.limit': 8,
  'prompts.eval_helpful.limit': 4,
  'feedback.rounds': 2,
  'feedback.shard_rows': 3,
  'sampling.initial.max_tokens': 24,
  'sampling.critique.max_tokens': 16,
  'sampling.revision.max_tokens': 24,
  'engine.slots': 8,
  'train.batch_size': 2,
  'train.max_length': 128,
  'train.epochs': 3,
  'train.checkpoint_every': 1,
  'train.helpfulness_share': 0.2,
  'train.drop_truncated': False,
}
TIMEOUT = 300.0  # seconds; a start takes a few on an idle machine


def command(
  workdir: pathlib.Path, stages: Sequence[str] = STAGES, **fields: Any
) -> list[str | pathlib.Path]:
  """Return the command line of the small run; `fields` have '__' for '.'."""
  changed = {name.replace('__', '.'): value for name, value in fields.items()}
  flags = [f'--config.{name}={value}' for name, value in {**FIELDS, **changed}.items()]
  return [
    *(sys.executable, 'launch.py', '--config=configs/tiny.py'),
    *(f'--workdir={workdir}', f'--stages={",".join(stages)}', *flags),
  ]


def environment(cache: pathlib.Path) -> dict[str, str]:
  """Return the environment of the program: one CPU device, and a compilation cache."""
  return os.environ | {
    'JAX_PLATFORMS': 'cpu',
    'XLA_FLAGS': '',
    'HF_HUB_OFFLINE': '1',
    'PYTHONUNBUFFERED': '1',
    **compilation.environment(cache),
  }


class Program:
  """A running program, whose output is read as it comes.

  Attributes:
    process: the process.
    output: what it has written to stdout.
    marks: time at which each stage began, by name, and 'start'; in seconds of `time.monotonic`.
  """

  def __init__(
    self, arguments: Sequence[Any], environment: Mapping[str, str], **options: Any
  ) -> None:
    self.output, self.marks, self._rest = '', {'start': time.monotonic()}, b''
    self._errors = tempfile.TemporaryFile()
    self.process = subprocess.Popen(
      [str(argument) for argument in arguments],
      cwd=ROOT,
      env=dict(environment),
      stdout=subprocess.PIPE,
      stderr=self._errors,
      **options,
    )

  @property
  def errors(self) -> str:
    """What it has written to stderr, without the messages of XLA."""
    self._errors.seek(0)
    lines = self._errors.read().decode(errors='replace').splitlines()
    return '\n'.join(line for line in lines if not _is_log(line))

  def read(self, seconds: float) -> bool:
    """Read output for at most some seconds; return whether there may be more."""
    assert self.process.stdout is not None
    readable, _, _ = select.select([self.process.stdout], [], [], max(seconds, 0))
    if not readable:
      return True
    data = os.read(self.process.stdout.fileno(), 1 << 16)
    *lines, self._rest = (self._rest + data).split(b'\n')
    for line in lines:
      text = line.decode(errors='replace')
      self.output += text + '\n'
      if text.endswith(' ...'):
        self.marks.setdefault(text[:-4], time.monotonic())
    return bool(data)

  def wait_for(self, stage: str, seconds: float = 0.0) -> bool:
    """Wait until some seconds after a stage began; return False if the program ended before."""
    deadline = time.monotonic() + TIMEOUT
    while stage not in self.marks or time.monotonic() < self.marks[stage] + seconds:
      if time.monotonic() > deadline:
        self.kill()
        raise TimeoutError(f'{stage} did not begin: {self.output}{self.errors}')
      left = self.marks[stage] + seconds - time.monotonic() if stage in self.marks else 0.05
      if not self.read(min(left, 0.05)):
        return False
    return self.process.poll() is None

  def wait(self, seconds: float = TIMEOUT) -> int:
    """Wait for the end and return the exit status."""
    deadline = time.monotonic() + seconds
    while self.read(0.02):
      if time.monotonic() > deadline:
        self.kill()
        raise TimeoutError(f'The program did not end: {self.output}{self.errors}')
    return self.process.wait()

  def kill(self) -> None:
    """End the process at once."""
    self.process.kill()
    self.process.wait()

  def signal(self, number: int) -> tuple[int, float]:
    """Send a signal; return the exit status, and the seconds that the exit took."""
    begin = time.monotonic()
    self.process.send_signal(number)
    return self.wait(), time.monotonic() - begin


def _is_log(line: str) -> bool:
  """Return whether a line is a log message of a library, such as 'W1126 13:14:03.069829 ...'."""
  return len(line) > 5 and line[0] in 'IWE' and line[1:5].isdigit()


@contextlib.contextmanager
def started(arguments: Sequence[Any], environment: Mapping[str, str], **options: Any) -> Iterator:
  """Yield the started program, and kill it if the block leaves it running."""
  program = Program(arguments, environment, **options)
  try:
    yield program
  finally:
    if program.process.poll() is None:
      program.process.send_signal(signal.SIGCONT)
      program.kill()


def contents(workdir: pathlib.Path) -> dict[str, bytes]:
  """Return all that a run makes for good, by path: D_CAI, evaluation and parameters."""
  patterns = ('d_cai/*', 'evaluation/**/*', 'model/*.safetensors', '*.jsonl', 'quality.json')
  paths = {path for pattern in patterns for path in workdir.glob(pattern) if path.is_file()}
  costs = {'costs.jsonl'}  # seconds and bytes of memory
  return {
    str(path.relative_to(workdir)): path.read_bytes()
    for path in sorted(paths)
    if path.name not in costs
  }


def differences(workdir: pathlib.Path, reference: Mapping[str, bytes]) -> list[str]:
  """Return the names of files that differ from a reference, are missing or are extra."""
  written = contents(workdir)
  names = sorted({*written, *reference})
  return [name for name in names if written.get(name) != reference.get(name)]


class Reference:
  """An uninterrupted run, with a copy of its folder before each stage.

  Args:
    folder: an empty folder.

  Attributes:
    environment: the environment to start the program in.
    seconds: length of each stage in seconds, with a warm compilation cache.
    contents: what the run had written after each stage, by stage.
  """

  def __init__(self, folder: pathlib.Path) -> None:
    self._folder, self.seconds, self.contents = folder, {}, {}
    self.environment = environment(folder / 'cache')
    for name in ('cold', 'warm'):  # the first run fills the compilation cache
      workdir = folder / name
      workdir.mkdir(parents=True)
      for stage in STAGES:
        if name == 'warm':
          shutil.copytree(workdir, self._before(stage))
        with started(command(workdir, [stage]), self.environment) as program:
          status = program.wait()
          assert status == 0, program.output + program.errors
        self.seconds[stage] = time.monotonic() - program.marks[stage]
        self.contents[stage] = contents(workdir)

  def _before(self, stage: str) -> pathlib.Path:
    return self._folder / f'before-{stage}'

  def copy(self, stage: str, workdir: pathlib.Path) -> pathlib.Path:
    """Make a folder as it was before a stage, and return its path."""
    return shutil.copytree(self._before(stage), workdir)
