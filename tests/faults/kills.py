"""Kill and stop the program at random moments, and compare what it writes in the end.

  python -m tests.faults.kills --runs 100 --terminations 20 --seed 0

Each run is killed up to `--kills-per-run` times within one stage, at moments uniform over its
length, and then finishes. It must end with the bytes of a run that nothing disturbed. The last line
is the verdict, and the exit status is 1 if anything was wrong.
"""

import argparse
import collections
import concurrent.futures
import pathlib
import random
import shutil
import signal
import statistics
import tempfile

from tests.faults.program import STAGES, Reference, command, differences, started

LIMIT = 10.0  # seconds from SIGTERM to the exit


class Tally:
  """Counts by stage, and seconds from a signal to the exit."""

  def __init__(self) -> None:
    self.counts = {stage: collections.Counter() for stage in STAGES}
    self.seconds: dict[str, list[float]] = {stage: [] for stage in STAGES}
    self.faults: list[str] = []

  def table(self) -> str:
    """Return the table that the command prints."""
    names = ('kills', 'terminations', 'runs', 'mismatches')
    header = f'{"stage":10}' + ''.join(f'{name:>14}' for name in names)
    lines = [header + f'{"exit s, median":>16}{"max":>8}']
    for stage in (*STAGES, 'all'):
      stages = STAGES if stage == 'all' else (stage,)
      counts = sum((self.counts[name] for name in stages), collections.Counter())
      seconds = [second for name in stages for second in self.seconds[name]]
      times = f'{statistics.median(seconds):16.2f}{max(seconds):8.2f}' if seconds else ''
      lines.append(f'{stage:10}' + ''.join(f'{counts[name]:14}' for name in names) + times)
    return '\n'.join(lines)


def disturb(
  reference: Reference,
  workdir: pathlib.Path,
  stage: str,
  moments: list[float],
  number: int,
  tally: Tally,
) -> None:
  """Send a signal at each moment, let the run finish, and compare.

  Args:
    reference: the undisturbed run.
    workdir: a folder that does not exist.
    stage: the stage to run.
    moments: shares of the stage's length.
    number: the signal.
    tally: where the results go.
  """
  reference.copy(stage, workdir)
  arguments = command(workdir, [stage])
  kind = 'kills' if number == signal.SIGKILL else 'terminations'
  for moment in moments:
    with started(arguments, reference.environment) as program:
      if not program.wait_for(stage, moment * reference.seconds[stage]):
        break  # it is done
      status, seconds = program.signal(number)
      if status == 0:
        break
      tally.counts[stage][kind] += 1
      place = f'{stage}, {moment:.3f} of {reference.seconds[stage]:.1f} s'
      if kind == 'kills':
        continue
      tally.seconds[stage].append(seconds)
      if status == -number and f'\n{stage}: ' in program.output:
        continue  # the work was done, and Python had given up its handlers
      if status != 128 + number or seconds > LIMIT or len(program.errors.splitlines()) != 1:
        tally.faults.append(f'{place}: status {status}, {seconds:.1f} s, {program.errors!r}')
  with started(arguments, reference.environment) as program:
    status = program.wait()
  wrong = differences(workdir, reference.contents[stage])
  tally.counts[stage]['runs'] += 1
  if status or wrong:
    tally.counts[stage]['mismatches'] += 1
    kept = workdir.rename(workdir.with_name(f'{workdir.name}-mismatch'))
    tally.faults.append(f'{kept}: status {status}, {wrong}, {moments}: {program.errors}')
  else:
    shutil.rmtree(workdir)


def run(folder: pathlib.Path, options: argparse.Namespace) -> int:
  """Do what the command line asks, and return the exit status."""
  rng = random.Random(options.seed)
  print(f'seed {options.seed}, folder {folder}; two undisturbed runs first', flush=True)
  reference, tally = Reference(folder), Tally()
  print(
    'length of a stage in s:', {k: round(v, 1) for k, v in reference.seconds.items()}, flush=True
  )
  wanted = {signal.SIGKILL: options.runs, signal.SIGTERM: options.terminations}
  attempts = 0
  with concurrent.futures.ThreadPoolExecutor(options.jobs) as pool:
    for number, count in wanted.items():
      kind = 'kills' if number == signal.SIGKILL else 'terminations'
      per_run = options.kills_per_run if number == signal.SIGKILL else 1
      while (left := count - sum(c[kind] for c in tally.counts.values())) > 0:
        batch = []
        for _ in range(-(-left // per_run)):
          stage = STAGES[attempts % len(STAGES)]
          moments = [rng.random() for _ in range(per_run)]
          workdir = folder / f'run-{attempts}'
          batch.append(pool.submit(disturb, reference, workdir, stage, moments, number, tally))
          attempts += 1
        for future in concurrent.futures.as_completed(batch):
          future.result()
        print(tally.table(), flush=True)
        for fault in tally.faults:
          print(fault, flush=True)
  mismatches = sum(counts['mismatches'] for counts in tally.counts.values())
  print(
    f'{"wrong" if tally.faults else "right"}: {mismatches} mismatches, {len(tally.faults)} faults'
  )
  return bool(tally.faults)


def main() -> int:
  """Parse the command line and run."""
  parser = argparse.ArgumentParser(
    prog='python -m tests.faults.kills',
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument('--runs', type=int, default=100, help='number of SIGKILLs')
  parser.add_argument('--terminations', type=int, default=20, help='number of SIGTERMs')
  parser.add_argument('--seed', type=int, default=0, help='seed of the moments')
  parser.add_argument('--kills-per-run', type=int, default=3, help='SIGKILLs before a run finishes')
  parser.add_argument('--jobs', type=int, default=2, help='runs at a time')
  parser.add_argument('--folder', type=pathlib.Path, help='kept; the default is temporary')
  options = parser.parse_args()
  if options.folder is not None:
    options.folder.mkdir(parents=True)
    return run(options.folder, options)
  with tempfile.TemporaryDirectory() as folder:
    return run(pathlib.Path(folder), options)


if __name__ == '__main__':
  raise SystemExit(main())
