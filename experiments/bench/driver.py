"""Code that the generation and training benchmarks share: workers, scheduling and statistics.

Each system runs in its own process on the same cores, and only one works at a time.
"""

import argparse
import contextlib
import dataclasses
import datetime
import json
import os
import pathlib
import platform
import select
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence

from experiments.bench import models

ROOT = pathlib.Path(__file__).resolve().parents[2]
Ask = Callable[..., dict]  # ask(operation, **arguments) → reply


class WorkerError(RuntimeError):
  """A worker failed; the message has its traceback."""


class TimeLimitError(WorkerError):
  """A system used up its time and was stopped."""


@dataclasses.dataclass
class Budget:
  """The time that the workers of one system may take to answer, in seconds.

  Attributes:
    limit: the whole time.
    left: what is left of it.
  """

  limit: float
  left: float = dataclasses.field(init=False)

  def __post_init__(self):
    self.left = self.limit


class Process:
  """A worker process, connected by pipes.

  Args:
    system: its name in messages.
    python: path of its interpreter.
    jax_platform: 'cpu' or 'cuda'.
    budget: the time that it may take; None is no limit.
    environment: additional environment variables.
  """

  def __init__(
    self,
    system: str,
    python: str,
    jax_platform: str,
    budget: Budget | None = None,
    **environment: str,
  ):
    variables = os.environ | {
      'PYTHONPATH': os.pathsep.join([str(ROOT), *filter(None, [os.environ.get('PYTHONPATH')])]),
      'JAX_PLATFORMS': jax_platform,
      'HF_HUB_OFFLINE': '1',
      'TOKENIZERS_PARALLELISM': 'false',
      'OMP_NUM_THREADS': str(len(os.sched_getaffinity(0))),
      'XLA_PYTHON_CLIENT_PREALLOCATE': 'false',
    }
    self._process = subprocess.Popen(
      [python, '-m', 'experiments.bench.worker', system],
      cwd=ROOT,
      env=variables | environment,
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      text=True,
    )
    self._system = system
    self._budget = budget

  def ask(self, op: str, **request) -> dict:
    """Send a request and return the worker's reply.

    Args:
      op: one of `worker.OPERATIONS`.
      **request: its arguments, as JSON data.

    Raises:
      WorkerError: with the worker's traceback, if it failed.
      TimeLimitError: if the budget is used up; the worker is then ended.
    """
    try:
      self._process.stdin.write(json.dumps({'op': op, **request}) + '\n')
      self._process.stdin.flush()
    except BrokenPipeError:
      pass  # it has ended, and so has its output
    self._wait(op)
    line = self._process.stdout.readline()
    if not line:
      raise WorkerError(f'{self._system}: the worker ended with status {self._process.wait()}.')
    reply = json.loads(line)
    if 'error' in reply:
      raise WorkerError(f'{self._system}, {op}: {reply["error"]}')
    return reply

  def _wait(self, op: str) -> None:
    """Wait for a reply, which is one line, as long as the budget allows."""
    if self._budget is None:
      return
    start = time.monotonic()
    ready, _, _ = select.select([self._process.stdout], [], [], max(0.0, self._budget.left))
    self._budget.left -= time.monotonic() - start
    if not ready:
      self._process.kill()
      raise TimeLimitError(
        f'{self._system}: stopped during {op!r}, after {self._budget.limit:.0f} s in all.'
      )

  def close(self) -> None:
    """End the worker and wait for it."""
    with contextlib.suppress(BrokenPipeError):  # it was stopped while it read a request
      self._process.stdin.close()
    self._process.wait()


@contextlib.contextmanager
def reporting(system: str, row: dict) -> Iterator[None]:
  """Write into a system's row of the result why it was stopped, if its worker is or fails."""
  try:
    yield
  except WorkerError as error:
    kind = 'stopped' if isinstance(error, TimeLimitError) else 'failed'
    row[kind] = str(error)
    log(f'{system} {kind}: {error}')


def interleave(names: Sequence[str], repetitions: int) -> Iterator[tuple[int, str]]:
  """Yield (repetition, name): every repetition has all names, and each starts with another one.

  Without names it yields nothing: every system failed, and the result says why.
  """
  for repetition in range(repetitions if names else 0):
    first = repetition % len(names)
    for name in [*names[first:], *names[:first]]:
      yield repetition, name


def ratios(runs: dict[str, list[dict]]) -> dict[str, dict[str, float]]:
  """Return the spread of each peer's time divided by ours, paired by repetition.

  A system that was stopped has fewer repetitions than the others, or none and then no ratio.
  """
  spreads = {}
  for system in (name for name in runs if name != 'ours'):
    pairs = zip(runs[system], runs['ours'], strict=False)
    if values := [peer['seconds'] / ours['seconds'] for peer, ours in pairs]:
      spreads[system] = spread(values)
  return spreads


def spread(values: Sequence[float]) -> dict[str, float]:
  """Return the median, the minimum and the maximum."""
  return {'median': statistics.median(values), 'min': min(values), 'max': max(values)}


def format_spread(ratio: dict[str, float] | None) -> str:
  """Return a text such as '2.00 [1.90, 2.10]', or '' for None."""
  return f'{ratio["median"]:.2f} [{ratio["min"]:.2f}, {ratio["max"]:.2f}]' if ratio else ''


def largest_peak(runs: Sequence[dict]) -> int | None:
  """Return the peak memory of any run in bytes, without loading and compiling.

  Returns None if it was not measured.
  """
  return max((run['peak_bytes'] for run in runs if run['peak_bytes'] is not None), default=None)


def describe_machine() -> dict:
  """Return a description of the machine, its load and the time."""
  info = pathlib.Path('/proc/cpuinfo').read_text()
  names = [line.split(':')[1].strip() for line in info.splitlines() if 'model name' in line]
  return {
    'platform': platform.platform(),
    'cpu': names[0] if names else platform.machine(),
    'cores': len(os.sched_getaffinity(0)),
    'memory_bytes': os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES'),
    'load_average_at_start': os.getloadavg()[0],
    'time': datetime.datetime.now(datetime.UTC).isoformat(timespec='seconds'),
  }


def make_parser(
  module: str, description: str, workdir: str, names: Sequence[str], peers: Sequence[str]
) -> argparse.ArgumentParser:
  """Return a parser with the flags that both benchmarks have.

  Args:
    module: the benchmark's module, for the usage line.
    description: its docstring.
    workdir: the default workdir.
    names: models to choose from.
    peers: peers to choose from.
  """
  parser = argparse.ArgumentParser(
    prog=f'python -m {module}',
    description=description,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument('--workdir', default=workdir, help='folder for models and results')
  parser.add_argument('--model', default='M', help=f'one of {tuple(names)}')
  parser.add_argument('--dtype', default='float32', choices=tuple(models.DTYPES))
  parser.add_argument('--platform', default='cpu', help='cpu or cuda')
  parser.add_argument('--cores', type=int, default=2, help='CPU cores of each system')
  parser.add_argument('--repetitions', type=int, default=5, help='timed runs of each system')
  parser.add_argument(
    '--peers', default=','.join(peers), help=f'some of {", ".join(peers)}, separated by commas'
  )
  parser.add_argument(
    '--tunix_python', default=sys.executable, help='interpreter of an environment with Tunix'
  )
  return parser


def add_step_flags(parser: argparse.ArgumentParser) -> None:
  """Add the flags for the sizes of our train step."""
  for name, meaning in (
    ('row_length', 'tokens of our rows'),
    ('rows', 'rows of our step'),
    ('accumulation', 'micro-batches of our step'),
    ('steps', 'steps of a repetition'),
  ):
    parser.add_argument(f'--{name}', type=int, help=f'{meaning}; the default depends on the model')


def limit_cores(count: int) -> None:
  """Restrict this process and the workers that it starts to `count` cores."""
  os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:count])


def log(text: str) -> None:
  """Print a line to stderr."""
  print(text, file=sys.stderr, flush=True)


def parse_integers(text: str) -> list[int]:
  """Return the integers of a flag, which are separated by commas."""
  return [int(part) for part in text.split(',')]


def write_result(result: dict, workdir: str | os.PathLike, name: str) -> None:
  """Write the result as JSON to stdout and to a file in the workdir."""
  text = json.dumps(result, indent=2)
  (pathlib.Path(workdir) / name).write_text(text + '\n')
  print(text)
