"""The systems of the generation benchmark: where each runs, with what, and how it is started."""

import argparse
import json
import os
import pathlib
import sys
from collections.abc import Sequence

from experiments.bench import driver, limit, worker
from experiments.bench.chains import Chain
from experiments.bench.driver import log

PEERS = ('hf', 'hf_static', 'hf_continuous', 'tunix', 'vllm', 'openvino')
DEFAULT_PEERS = {'cpu': 'hf', 'gpu': 'hf_static,hf_continuous'}  # they need no other environment
# Rows at once that are tried, if no flag says them.
ROWS = {
  'cpu': {
    'slots': [8],
    'hf_batches': [12],
    'tunix_batches': [12],
    'vllm_batches': [48, 96],
    'openvino_batches': [48, 96],
  },
  'gpu': {
    'slots': [64, 128],
    'hf_batches': [64, 128],
    'tunix_batches': [64],
    'vllm_batches': [64, 128],
    'openvino_batches': [64],
  },
}
FLAGS = {  # → the flag with its rows
  'ours': 'slots',
  'hf': 'hf_batches',
  'hf_static': 'hf_batches',
  'hf_continuous': 'hf_batches',
  'tunix': 'tunix_batches',
  'vllm': 'vllm_batches',
  'openvino': 'openvino_batches',
}
PYTHONS = {'tunix': 'tunix_python', 'vllm': 'vllm_python', 'openvino': 'openvino_python'}


def add_flags(parser: argparse.ArgumentParser) -> None:
  """Add the flags of the systems."""
  for flag, cpu in ROWS['cpu'].items():
    default = ','.join(map(str, cpu))
    on_gpu = ','.join(map(str, ROWS['gpu'][flag]))
    parser.add_argument(
      f'--{flag}',
      type=driver.parse_integers,
      help=f'rows at once, default {default}, and {on_gpu} on GPUs; of several values the fastest '
      'is used',
    )
  for system in ('vllm', 'openvino'):
    parser.add_argument(
      f'--{system}_python',
      default=sys.executable,
      help=f'interpreter of an environment with {system}',
    )
  parser.add_argument(
    '--vllm_preload', default='', help='libraries for LD_PRELOAD of vllm, separated by colons'
  )
  parser.add_argument(
    '--peer_cache_gib',
    type=int,
    default=2,
    help='for keys and values in vLLM, OpenVINO and hf_continuous, in GiB',
  )
  parser.add_argument(
    '--openvino_step_tokens', type=int, default=256, help='most tokens of a step in OpenVINO'
  )
  parser.add_argument(
    '--time_limit',
    type=float,
    default=3600.0,
    help='seconds that each system may take in all; it is then stopped, and reported as such',
  )
  parser.add_argument(
    '--engine', default='{}', help='JSON with fields of EngineConfig other than slots'
  )


def device(args: argparse.Namespace) -> str:
  """Return 'cpu' or 'gpu'."""
  return 'cpu' if args.platform == 'cpu' else 'gpu'


def select(args: argparse.Namespace) -> list[str]:
  """Return the systems that the command line asks for, ours first.

  Raises:
    ValueError: if one is unknown.
  """
  if args.occupancy:
    return ['ours']
  text = DEFAULT_PEERS[device(args)] if args.peers is None else args.peers
  peers = [name for name in text.split(',') if name]
  if unknown := [name for name in peers if name not in PEERS]:
    raise ValueError(f'--peers has {", ".join(unknown)}; use some of {", ".join(PEERS)}.')
  return ['ours', *peers]


def rows_to_try(system: str, args: argparse.Namespace) -> list[int]:
  """Return the rows at once to choose from."""
  flag = FLAGS[system]
  return getattr(args, flag) or ROWS[device(args)][flag]


def system_options(system: str, args: argparse.Namespace, folder: pathlib.Path) -> dict:
  """Return what the worker's `load` passes to a system."""
  shared = {'cache_gib': args.peer_cache_gib}
  export = pathlib.Path(args.workdir) / f'openvino_{folder.name}'
  return {
    'ours': json.loads(args.engine),
    'hf_static': {'cache': 'static'},
    'hf_continuous': shared,
    'vllm': shared,
    'openvino': {
      **shared,
      'step_tokens': args.openvino_step_tokens,
      'export': str(export.resolve()),
    },
  }.get(system, {})


def environment(system: str, args: argparse.Namespace) -> dict[str, str]:
  """Return the environment variables that a system needs."""
  if system != 'vllm':
    return {}
  variables = {
    'VLLM_CPU_KVCACHE_SPACE': str(args.peer_cache_gib),
    'VLLM_ENABLE_V1_MULTIPROCESSING': '0',  # one process, whose time and memory can be measured
  }
  return variables | ({'LD_PRELOAD': args.vllm_preload} if args.vllm_preload else {})


def start(
  system: str,
  args: argparse.Namespace,
  folder: pathlib.Path,
  prefix: Sequence[int],
  chains: Sequence[Chain],
  budget: driver.Budget,
) -> tuple[driver.Process, dict]:
  """Start a worker, load its model and chains, and return it with its reply to loading."""
  python = getattr(args, PYTHONS[system]) if system in PYTHONS else sys.executable
  if os.sep in python:
    python = os.path.abspath(python)  # not resolved, because an environment's python is a link
  process = driver.Process(
    system, python, args.platform, budget=budget, **environment(system, args)
  )
  try:
    loaded = process.ask(
      'load',
      system=system,
      folder=str(folder.resolve()),
      dtype=args.dtype,
      platform=args.platform,
      options=system_options(system, args, folder),
    )
    process.ask('take', chains=worker.encode_chains(chains), prefix=prefix)
  except driver.WorkerError:
    process.close()
    raise
  return process, loaded


def time_rows(
  system: str,
  args: argparse.Namespace,
  folder: pathlib.Path,
  prefix: Sequence[int],
  chains: Sequence[Chain],
  budget: driver.Budget,
) -> dict[int, float]:
  """Return the seconds of one pass over the first `trial_chains` chains, by rows at once."""
  sizes = rows_to_try(system, args)
  count = args.trial_chains or 2 * max(sizes)
  process, _ = start(system, args, folder, prefix, chains[:count], budget)
  seconds = {}
  try:
    for size in sizes:
      process.ask('run', batch=size, seed=0, warm=True)
      seconds[size] = process.ask('run', batch=size, seed=0, warm=False)['seconds']
      log(f'{system}, trial with {size} rows: {seconds[size]:.1f} s')
  finally:
    process.close()  # so that the trials do not count in the peak memory
  return seconds


def measure_rates(args: argparse.Namespace, hf: dict) -> dict[str, float]:
  """Measure the machine's rates in a process of its own, so that their arrays are freed.

  Args:
    args: the command line.
    hf: the content of the model's config.json.
  """
  process = driver.Process('rates', sys.executable, args.platform)
  try:
    output = (hf['hidden_size'], hf['vocab_size'])
    rates = process.ask('rates', shapes=limit.layer_shapes(hf), output=output, dtype=args.dtype)
  finally:
    process.close()
  rates.pop('seconds')
  return rates
