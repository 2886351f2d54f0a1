"""What does `model.layers='scan'` cost in a train step, against unrolled layers?

Command:   python -m experiments.bench.layers --model=M --workdir=runs/bench
Hardware:  any; RESULTS.md has results of two CPU cores
Method:    both train steps are compiled in one process, from the same parameters. After one warm-up
           step each, they take steps on the same batches in turn, and the one that goes first
           alternates. A ratio compares the two steps of a pair, in CPU seconds of the process and
           in wall time. In f32 the losses of the first pair must agree to 1e-5. Later ones differ
           more, because each step amplifies the rounding of those before it.

Prints JSON, also written to the workdir.
"""

import argparse
import json
import pathlib
import time
from collections.abc import Sequence
from typing import Any

from experiments.bench import driver, models
from experiments.bench.examples import Example, Rows
from experiments.bench.ours_training import System
from experiments.bench.training import WORK, plan_steps
from experiments.bench.training_systems import OPTIMIZER

NAMES = ('unrolled', 'scan')
TOLERANCE = 1e-5  # relative difference of the first losses in f32


def build(
  name: str,
  folder: pathlib.Path,
  args: argparse.Namespace,
  examples: list[Example],
  steps: list[Rows],
) -> tuple[System, dict[str, float]]:
  """Return a system that has taken one step, and what its program cost to compile.

  Args:
    name: a value of `model.layers`.
    folder: the model's folder.
    args: the command line.
    examples: of all steps.
    steps: the rows of each step.
  """
  work = WORK[args.model]
  parts = args.accumulation or work.accumulation
  train = {'layers': name, 'accumulation': parts, 'remat': args.remat}
  options = {'rows': work.rows, 'length': work.row_length, 'optimizer': OPTIMIZER, 'train': train}
  system = System(folder, args.dtype, 'cpu', options)
  system.take(examples, steps)
  wall, cpu = time.perf_counter(), time.process_time()
  system.train(0, 1, 0)
  return system, {
    'first_step_seconds': time.perf_counter() - wall,
    'first_step_cpu_seconds': time.process_time() - cpu,
  }


def take_step(system: System, number: int) -> dict[str, float]:
  """Take one step, and return its loss and costs."""
  wall, cpu = time.perf_counter(), time.process_time()
  (loss,), _ = system.train(number, number + 1, 0)
  return {
    'loss': loss,
    'seconds': time.perf_counter() - wall,
    'cpu_seconds': time.process_time() - cpu,
  }


def benchmark(args: argparse.Namespace) -> dict[str, Any]:
  """Return the costs of each step, and their ratios.

  Raises:
    RuntimeError: if the two compute different losses in f32.
  """
  folder = models.model_folder(args.model, args.workdir)
  work = WORK[args.model]
  vocab = json.loads((folder / 'config.json').read_text())['vocab_size']
  examples, packed = plan_steps(work, -(-(args.pairs + 1) // work.steps), vocab)
  systems, result = {}, driver.describe_machine()
  result |= {'model': args.model, 'dtype': args.dtype, 'remat': args.remat}
  result |= {'accumulation': args.accumulation or work.accumulation}
  for name in NAMES:
    systems[name], result[name] = build(name, folder, args, list(examples), packed)
    driver.log(f'{name}: {result[name]}')
  rows: dict[str, list[dict[str, float]]] = {name: [] for name in NAMES}
  for pair, name in driver.interleave(NAMES, args.pairs):
    rows[name].append(take_step(systems[name], pair + 1))
    driver.log(f'pair {pair + 1}, {name}: {rows[name][-1]}')
  for name in NAMES:
    result[name] |= {'steps': rows[name]}
  pairs = list(zip(rows['scan'], rows['unrolled'], strict=True))
  differences = [abs(a['loss'] / b['loss'] - 1) for a, b in pairs]
  result['loss_differences'] = differences
  if args.dtype == 'float32' and not differences[0] <= TOLERANCE:
    raise RuntimeError(f'scan and unrolled compute different losses: {result}')
  for cost in ('seconds', 'cpu_seconds'):
    result[f'{cost}_ratio'] = driver.spread([a[cost] / b[cost] for a, b in pairs])
  return result


def main(argv: Sequence[str] | None = None) -> None:
  """Run the benchmark that the command line describes."""
  parser = argparse.ArgumentParser(
    prog='python -m experiments.bench.layers',
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument('--model', default='M', choices=[name for name in WORK if name != '1B'])
  parser.add_argument('--workdir', type=pathlib.Path, default=pathlib.Path('runs/bench_layers'))
  parser.add_argument('--dtype', default='float32', choices=['float32', 'bfloat16'])
  parser.add_argument('--remat', default='none', help='as `train.remat`')
  parser.add_argument(
    '--accumulation', type=int, default=0, help='micro-batches of a step; 0 takes one for each row'
  )
  parser.add_argument('--pairs', type=int, default=15, help='pairs of steps')
  args = parser.parse_args(argv)
  args.workdir.mkdir(parents=True, exist_ok=True)
  result = benchmark(args)
  driver.log(f'CPU seconds, scan / unrolled: {driver.format_spread(result["cpu_seconds_ratio"])}')
  driver.write_result(result, args.workdir, 'bench_layers.json')


if __name__ == '__main__':
  main()
