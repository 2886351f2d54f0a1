"""How long does the main job take with an empty cache of compiled programs, and with a full one?

Command:   python -m experiments.bench.start --workdir=FOLDER [--config=configs/tiny.py] [...]
Hardware:  any; RESULTS.md has results
Method:    `launch.py` runs twice, each time in a new workdir: first with an empty folder of
           compiled programs, then with the one that the first run has filled. Further arguments
           are passed on to both. --repeat does all that several times.

Prints a Markdown table: seconds from the start of the process until it ends and until the first row
of D_CAI, the seconds of each stage, the programs that it compiled and loaded, the CPU time of the
run, and the other load of the machine: the mean number of busy cores beside the run.
"""

import argparse
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from typing import Any

from cai_jax.runtime.files import read_json
from cai_jax.runtime.terminal import say

ROOT = pathlib.Path(__file__).parents[2]
STAGES = ('generate', 'train', 'evaluate', 'report')


def run_once(folder: pathlib.Path, cache: pathlib.Path, arguments: Sequence[str]) -> dict[str, Any]:
  """Run the command in a new folder, and return what it took.

  Args:
    folder: folder of the run; it must not exist.
    cache: folder of the compiled programs.
    arguments: arguments of `launch.py`, without `--workdir`.

  Raises:
    RuntimeError: if the command fails.
  """
  environment = {k: v for k, v in os.environ.items() if k != 'JAX_COMPILATION_CACHE_DIR'}
  command = [sys.executable, '-u', str(ROOT / 'launch.py'), *arguments]
  command += [f'--workdir={folder}', f'--config.compilation.cache={cache}']
  busy, children, start = _busy_seconds(), _children_seconds(), time.perf_counter()
  process = subprocess.Popen(
    command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
  )
  assert process.stdout is not None
  first_row, lines = 0.0, []
  for line in process.stdout:
    lines.append(line)
    if line.startswith('generate: first row'):
      first_row = time.perf_counter() - start
  if process.wait():
    raise RuntimeError(''.join(lines[-20:]))
  seconds, cpu = time.perf_counter() - start, _children_seconds() - children
  manifest = read_json(folder / 'manifest.json')
  return {
    'seconds': seconds,
    'first_row': first_row,
    'cpu': cpu,
    'other': max(0.0, (_busy_seconds() - busy - cpu) / seconds),
    'stages': {name: manifest['stages'][name] for name in STAGES if name in manifest['stages']},
    'commit': manifest['git_commit'],
  }


def _children_seconds() -> float:
  """Return the CPU time of the processes that this one has started and waited for."""
  times = os.times()
  return times.children_user + times.children_system


def _busy_seconds() -> float:
  """Return the CPU time of all processes of the machine since its start; 0 if it does not say."""
  try:
    user, nice, system, _, _, irq, softirq, *_ = map(
      int, pathlib.Path('/proc/stat').read_text().split('\n')[0].split()[1:]
    )
  except OSError:
    return 0.0
  return (user + nice + system + irq + softirq) / os.sysconf('SC_CLK_TCK')


def format_row(cache: str, result: Mapping[str, Any]) -> str:
  """Return a row of the table.

  Args:
    cache: 'empty' or 'full'.
    result: from `run_once`.
  """
  stages = result['stages'].values()
  programs = [entry['programs'] for entry in stages]
  compiled, loaded = (sum(p[name] for p in programs) for name in ('compiled', 'loaded'))
  seconds = sum(p['seconds'] for p in programs)
  cells = [
    cache,
    f'{result["seconds"]:.1f} s',
    f'{result["first_row"]:.1f} s',
    ' + '.join(f'{entry["seconds"]:.1f}' for entry in stages),
    f'{compiled} and {loaded} in {seconds:.1f} s',
    f'{result["cpu"]:.1f} s',
    f'{result["other"]:.2f}',
  ]
  return f'| {" | ".join(cells)} |'


def main(argv: Sequence[str] | None = None) -> None:
  """Run the benchmark and print the table."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--workdir', type=pathlib.Path, required=True, help='created if missing')
  parser.add_argument('--config', default='configs/tiny.py', help='config file')
  parser.add_argument('--repeat', type=int, default=1, help='number of pairs of runs')
  options, arguments = parser.parse_known_args(argv)
  options.workdir.mkdir(parents=True, exist_ok=True)
  header = ('cache', 'whole command', 'first row', ' + '.join(STAGES), 'compiled and loaded')
  say(f'| {" | ".join(header)} | CPU | busy cores beside it |')
  say(f'|{"---|" * 7}')
  for _ in range(options.repeat):
    base = pathlib.Path(tempfile.mkdtemp(prefix='start-', dir=options.workdir)).absolute()
    for cache in ('empty', 'full'):
      result = run_once(base / cache, base / 'programs', [f'--config={options.config}', *arguments])
      say(format_row(cache, result))
    shutil.rmtree(base)
  say(f'\ncommit {result["commit"]}, {os.cpu_count()} cores')


if __name__ == '__main__':
  main()
