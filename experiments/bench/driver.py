"""What the benchmarks' drivers share: workers, rounds in turn, spreads, the machine.

Each system has a process of its own, with the same cores, and one works at a time.
"""

import argparse
import datetime
import json
import os
import pathlib
import platform
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence

from experiments.bench import models

ROOT = pathlib.Path(__file__).resolve().parents[2]
Ask = Callable[..., dict]  # ask(op, **request) → reply


class Process:
  """A worker at the other end of a pipe.

  Args:
    system: one of `worker.SYSTEMS`.
    python: the interpreter that it is run by.
    jax_platform: 'cpu' or 'cuda'.
    environment: further variables.
  """

  def __init__(self, system: str, python: str, jax_platform: str, **environment: str):
    variables = os.environ | {
      'PYTHONPATH': str(ROOT),
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

  def ask(self, op: str, **request) -> dict:
    """The worker's reply. RuntimeError, with its traceback, if it failed."""
    self._process.stdin.write(json.dumps({'op': op, **request}) + '\n')
    self._process.stdin.flush()
    line = self._process.stdout.readline()
    if not line:
      raise RuntimeError(f'{self._system}: its process ended with {self._process.wait()}.')
    reply = json.loads(line)
    if 'error' in reply:
      raise RuntimeError(f'{self._system}, {op}: {reply["error"]}')
    return reply

  def close(self) -> None:
    """Lets the worker end."""
    self._process.stdin.close()
    self._process.wait()


def in_turn(names: Sequence[str], repetitions: int) -> Iterator[tuple[int, str]]:
  """(repetition, name) so that each round has all names and begins with another one."""
  for repetition in range(repetitions):
    turn = repetition % len(names)
    for name in [*names[turn:], *names[:turn]]:
      yield repetition, name


def ratios(runs: dict[str, list[dict]]) -> dict[str, dict[str, float]]:
  """How many times as long as ours each peer takes, pair by pair of the same round."""
  found = {}
  for system in runs.keys() - {'ours'}:
    pairs = zip(runs[system], runs['ours'], strict=True)
    found[system] = spread([peer['seconds'] / ours['seconds'] for peer, ours in pairs])
  return found


def spread(values: Sequence[float]) -> dict[str, float]:
  """Median, least and most."""
  return {'median': statistics.median(values), 'min': min(values), 'max': max(values)}


def spread_text(ratio: dict[str, float] | None) -> str:
  """'2.00 [1.90, 2.10]'; '' for None."""
  return f'{ratio["median"]:.2f} [{ratio["min"]:.2f}, {ratio["max"]:.2f}]' if ratio else ''


def largest_peak(runs: Sequence[dict]) -> int | None:
  """Most bytes of any run: loading and compiling are not in it. None where it was not measured."""
  return max((run['peak_bytes'] for run in runs if run['peak_bytes'] is not None), default=None)


def machine() -> dict:
  """What the benchmark ran on."""
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


def parser(
  description: str, workdir: str, names: Sequence[str], peers: Sequence[str]
) -> argparse.ArgumentParser:
  """The flags that all drivers have, for these models and peers."""
  flags = argparse.ArgumentParser(
    description=description, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  flags.add_argument('--workdir', default=workdir)
  flags.add_argument('--model', default='M', help=f'one of {tuple(names)}')
  flags.add_argument('--dtype', default='float32', choices=tuple(models.DTYPES))
  flags.add_argument('--platform', default='cpu', help='cpu or cuda')
  flags.add_argument('--cores', type=int, default=2, help='CPU cores of each system')
  flags.add_argument('--repetitions', type=int, default=5)
  flags.add_argument('--peers', default=','.join(peers), help=f'of {", ".join(peers)}, with commas')
  flags.add_argument('--tunix_python', default=sys.executable)
  return flags


def take_cores(count: int) -> None:
  """Keeps this process, and the workers that it starts, on so many cores."""
  os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:count])


def log(text: str) -> None:
  """A line on stderr."""
  print(text, file=sys.stderr, flush=True)


def integers(text: str) -> list[int]:
  """A flag's integers, with commas between."""
  return [int(part) for part in text.split(',')]


def write(result: dict, workdir: str | os.PathLike, name: str) -> None:
  """The result as JSON on stdout and in the workdir."""
  text = json.dumps(result, indent=2)
  (pathlib.Path(workdir) / name).write_text(text + '\n')
  print(text)
