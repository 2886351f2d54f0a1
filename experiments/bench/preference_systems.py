"""The systems of the preference benchmark: what each runs with, and how it is started."""

import argparse
import pathlib
import sys
from typing import Any

from experiments.bench import driver, training_systems

PRECOMPUTED = {  # → whether the reference's log-probabilities are computed before training
  'ours': True,
  'trl': True,
  'trl_default': False,
}
PEERS = ('trl', 'trl_default')


def add_flags(parser: argparse.ArgumentParser) -> None:
  """Add the flags of the systems."""
  for name, default in (('trl', '1,2,4,8'), ('trl_default', '8')):
    parser.add_argument(
      f'--{name}',
      type=driver.parse_integers,
      default=driver.parse_integers(default),
      help=f'pairs of a micro-batch of {name}; of several values the fastest is used',
    )
  parser.add_argument(
    '--no_sharing', action='store_true', help='ours computes the prompt once for each side'
  )
  parser.add_argument(
    '--trl_python', default=sys.executable, help='interpreter of an environment with TRL'
  )


def sizes_to_try(system: str, args: argparse.Namespace) -> list[int]:
  """Return the sizes of micro-batches to try; [0] if the system has no choice."""
  return [0] if system == 'ours' else getattr(args, system)


def optimizer(work: Any) -> dict[str, float]:
  """Return the settings of AdamW for the training work."""
  return {**training_systems.OPTIMIZER, 'learning_rate': work.learning_rate}


def start(
  system: str, args: argparse.Namespace, work: Any, folder: pathlib.Path
) -> tuple[driver.Process, dict]:
  """Start a worker, load its model, and return it with its reply to loading.

  Args:
    system: its name.
    args: the command line.
    work: the training work.
    folder: of the model.
  """
  options = {'optimizer': optimizer(work), 'beta': work.beta}
  if system == 'ours':
    options |= {'rows': work.rows, 'length': work.row_length, 'accumulation': work.accumulation}
    options['share_prompts'] = not args.no_sharing
    return training_systems.start_worker(
      'ours_preferences', sys.executable, args, system, folder, options
    )
  precomputed = PRECOMPUTED[system]
  options |= {'precomputed': precomputed, 'checkpointing': not precomputed, 'attention': 'sdpa'}
  return training_systems.start_worker(
    'trl_preferences', args.trl_python, args, system, folder, options
  )
