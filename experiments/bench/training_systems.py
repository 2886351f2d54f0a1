"""The systems of the training benchmark: what each runs with, and how it is started."""

import argparse
import json
import pathlib
import sys
from collections.abc import Callable, Sequence
from typing import Any

from experiments.bench import driver
from experiments.bench.driver import log
from experiments.bench.examples import Example, Rows

OPTIMIZER = dict(learning_rate=1e-4, b1=0.9, b2=0.95, eps=1e-8, weight_decay=0.0, clip_norm=1.0)
SYSTEMS = {  # → the worker's name for it
  'ours': 'ours_training',
  'hf_padded': 'hf_training',
  'hf_packed': 'hf_training',
  'trl': 'trl_training',
  'tunix': 'tunix_training',
}
PACKED = ('ours', 'hf_packed', 'trl')  # the others have one example in a row
PYTHONS = {'tunix': 'tunix_python', 'trl': 'trl_python'}
SIZES = ('hf_padded', 'hf_packed', 'trl')  # systems whose rows at once a flag of this name sets


def add_flags(parser: argparse.ArgumentParser) -> None:
  """Add the flags of the systems."""
  for name, default, meaning in (
    ('hf_padded', 8, 'examples of a padded micro-batch'),
    ('hf_packed', 1, 'rows of a packed micro-batch'),
    ('trl', 1, 'rows of a packed micro-batch of TRL'),
  ):
    parser.add_argument(
      f'--{name}',
      type=driver.parse_integers,
      default=[default],
      help=f'{meaning}; 0 means the whole step; of several values the fastest is used',
    )
  parser.add_argument(
    '--hf_attention',
    default='sdpa',
    help="attention of the systems on torch: 'sdpa', 'eager', or with its package on a GPU "
    "'flash_attention_2'",
  )
  parser.add_argument(
    '--trl_python', default=sys.executable, help='interpreter of an environment with TRL'
  )
  parser.add_argument(
    '--tunix_multiple', type=int, default=128, help='round lengths up to a multiple, in tokens'
  )


def sizes_to_try(system: str, args: argparse.Namespace) -> list[int]:
  """Return the sizes of micro-batches to try; [0] if the system has no choice."""
  return getattr(args, system) if system in SIZES else [0]


def options(system: str, args: argparse.Namespace, work: Any) -> dict:
  """Return the options of a system's constructor; `work` is the training work."""
  own = {
    'ours': {
      'rows': work.rows,
      'length': work.row_length,
      'train': {'accumulation': work.accumulation, **json.loads(args.train)},
    },
    'hf_padded': {'packed': False, 'attention': args.hf_attention},
    'hf_packed': {'packed': True, 'attention': args.hf_attention},
    'trl': {'attention': args.hf_attention},
    'tunix': {'longest': work.lengths.longest, 'multiple': args.tunix_multiple},
  }[system]
  return {'optimizer': OPTIMIZER, **own}


def start(
  system: str,
  args: argparse.Namespace,
  work: Any,
  folder: pathlib.Path,
  budget: driver.Budget | None = None,
) -> tuple[driver.Process, dict]:
  """Start a worker, load its model, and return it with its reply to loading."""
  python = getattr(args, PYTHONS[system]) if system in PYTHONS else sys.executable
  return start_worker(
    SYSTEMS[system], python, args, system, folder, options(system, args, work), budget
  )


def start_worker(
  worker: str,
  python: str,
  args: argparse.Namespace,
  system: str,
  folder: pathlib.Path,
  options: dict,
  budget: driver.Budget | None = None,
) -> tuple[driver.Process, dict]:
  """Start a worker, load its model, and return it with its reply to loading.

  Args:
    worker: the worker's name for the system.
    python: path of its interpreter.
    args: the command line.
    system: name of the system, of which each has compiled programs of its own.
    folder: of the model.
    options: what the system's constructor gets.
    budget: the time that it may take; None is no limit.
  """
  process = driver.Process(
    worker,
    python,
    args.platform,
    budget,
    # All systems allocate temporary memory in each step. With small pages this takes a tenth of the
    # time or more, so large arrays use pages of 2 MB.
    GLIBC_TUNABLES='glibc.malloc.hugetlb=1',
    JAX_COMPILATION_CACHE_DIR=str(pathlib.Path(args.workdir).absolute() / f'compiled_{system}'),
  )
  try:
    loaded = process.ask(
      'load',
      system=worker,
      folder=str(folder),
      dtype=args.dtype,
      platform=args.platform,
      options=options,
    )
  except driver.WorkerError:
    process.close()
    raise
  return process, loaded


def time_batches(
  system: str,
  start: Callable[[], tuple[driver.Process, dict]],
  examples: Sequence[Example],
  steps: list[Rows],
  sizes: Sequence[int],
) -> dict[int, float]:
  """Return the seconds of some steps with each size of micro-batches.

  Args:
    system: its name.
    start: starts a worker.
    examples: all examples.
    steps: the steps.
    sizes: rows of a micro-batch.
  """
  process, _ = start()
  seconds = {}
  try:
    process.ask('take_examples', examples=examples, steps=steps)
    for size in sizes:
      process.ask('warm', batch=size)
      seconds[size] = process.ask('train', first=0, stop=len(steps), batch=size)['seconds']
      log(f'{system}, trial with {size} rows at a time: {seconds[size]:.2f} s')
  finally:
    process.close()  # so that the trials do not count in the peak memory
  return seconds
