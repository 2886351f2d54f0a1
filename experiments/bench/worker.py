"""Run one system of a benchmark in its own process: it reads JSON lines and writes JSON lines.

The driver starts it with `python -m experiments.bench.worker SYSTEM`, where SYSTEM is in `SYSTEMS`.
"""

import ctypes
import dataclasses
import gc
import importlib
import importlib.metadata
import json
import os
import pathlib
import platform
import sys
import time
import traceback
from collections.abc import Callable

import numpy as np

from experiments.bench.chains import Chain, longest
from experiments.bench.examples import Example

SYSTEMS = {  # → module
  'ours': 'ours',
  'hf': 'hf',
  'hf_static': 'hf',
  'hf_continuous': 'hf_continuous',
  'vllm': 'vllm_engine',
  'openvino': 'openvino_engine',
  'tunix': 'tunix_sampler',
  'ours_training': 'ours_training',
  'hf_training': 'hf_training',
  'trl_training': 'trl_training',
  'tunix_training': 'tunix_training',
  'ours_preferences': 'ours_preferences',
  'trl_preferences': 'trl_preferences',
}


def handle(state: dict, request: dict) -> dict:
  """Return the reply to a request of the driver.

  Args:
    state: holds the loaded system between requests.
    request: `op`, one of OPERATIONS, and its arguments.
  """
  start = time.perf_counter()
  reply = OPERATIONS[request['op']](state, request)
  return {'seconds': time.perf_counter() - start, **reply}


def load(state: dict, request: dict) -> dict:
  """Load the model and return the versions of the system's packages."""
  module = importlib.import_module(f'experiments.bench.{SYSTEMS[request["system"]]}')
  state['system'] = module.System(
    pathlib.Path(request['folder']), request['dtype'], request['platform'], request['options']
  )
  versions = {name: importlib.metadata.version(name) for name in module.PACKAGES}
  return {'versions': {'python': platform.python_version()} | versions}


def take(state: dict, request: dict) -> dict:
  """Store the chains and the prefix for later runs."""
  state['chains'] = [Chain(**chain) for chain in request['chains']]
  state['prefix'] = request['prefix']
  return {}


def run(state: dict, request: dict) -> dict:
  """Run the stored chains and return the lengths of all replies and the measurements.

  What a system prepares first is not timed.
  """
  state['system'].prepare(request['batch'], len(state['prefix']) + longest(state['chains'], 0))
  (replies, stats), measures = measure(
    state,
    lambda: state['system'].run(
      state['chains'], state['prefix'], request['batch'], request['seed'], request['warm']
    ),
  )
  lengths = [[len(reply) for reply in chain] for chain in replies]
  return {**measures, 'lengths': lengths, 'stats': stats}


def measure(state: dict, work: Callable[[], object]) -> tuple[object, dict]:
  """Call `work` and return its result and measurements of the call.

  `other_load` is the number of cores that other processes kept busy. Times are reliable only if it
  is near 0. Torch suffers most, because its threads spin while they wait for each other.
  """
  reset = _reset_peak(state)
  start, cpu, busy = time.perf_counter(), time.process_time(), _busy_seconds()
  result = work()
  seconds = time.perf_counter() - start
  cpu, busy = time.process_time() - cpu, _busy_seconds() - busy
  return result, {
    'seconds': seconds,
    'cpu_seconds': cpu,
    'other_load': max(0.0, (busy - cpu) / seconds),
    'peak_bytes': peak_bytes() if reset else None,
  }


def agree(state: dict, request: dict) -> dict:
  """Write the logits after some rows to a file, and return greedily decoded tokens after them."""
  tokens = np.array(request['tokens'], np.int32)
  np.save(request['file'], state['system'].logits(tokens))
  return {'greedy': state['system'].greedy(tokens, request['count'])}


def rates(state: dict, request: dict) -> dict:
  """Return the machine's rates of products and of reading, for a model's shapes."""
  roofline_lib = importlib.import_module('experiments.bench.roofline')  # not in peers' environments
  rates, measures = measure(
    state, lambda: roofline_lib.rates(request['shapes'], request['output'], request['dtype'])
  )
  return rates | {'other_load': measures['other_load']}


def roofline(state: dict, request: dict) -> dict:
  """Return our decode step's time and the machine's limits."""
  return state['system'].roofline(request['batches'], request['repetitions'])


def take_examples(state: dict, request: dict) -> dict:
  """Store the examples and the steps for later training."""
  state['system'].take([Example(*example) for example in request['examples']], request['steps'])
  return {}


def warm(state: dict, request: dict) -> dict:
  """Train on one batch of each shape in the stored steps, so that everything is compiled."""
  return {'shapes': state['system'].warm(request['batch'])}


def train(state: dict, request: dict) -> dict:
  """Train on some of the stored steps.

  Returns the losses, the number of tokens computed (`places`, with padding) and measurements.
  """
  (losses, places), measures = measure(
    state, lambda: state['system'].train(request['first'], request['stop'], request['batch'])
  )
  return {**measures, 'losses': losses, 'places': places}


def reference(state: dict, request: dict) -> dict:
  """Compute the reference's log-probabilities of some of the stored steps, and measure it."""
  _, measures = measure(
    state, lambda: state['system'].reference(request['first'], request['stop'], request['batch'])
  )
  return measures


def memory(state: dict, request: dict) -> dict:
  """Return the peak memory of the process since its start, and of the accelerator, in bytes."""
  return {
    'life_peak_bytes': max(peak_bytes(), state.get('life_peak_bytes', 0)),
    'device_peak_bytes': state['system'].device_peak_bytes(),
  }


OPERATIONS = {
  f.__name__: f
  for f in (load, take, run, agree, rates, roofline, take_examples, warm, train, reference, memory)
}


def peak_bytes() -> int:
  """Return the peak resident memory of this process since `_reset_peak`."""
  # The value of getrusage starts with the peak of the parent process.
  status = pathlib.Path('/proc/self/status').read_text()
  return int(status.split('VmHWM:')[1].split()[0]) * 1024


def _busy_seconds() -> float:
  """Return the busy seconds of all cores since the machine started, summed."""
  fields = pathlib.Path('/proc/stat').read_text().split('\n', 1)[0].split()[1:]
  user, nice, system, _, _, irq, softirq = map(int, fields[:7])
  return (user + nice + system + irq + softirq) / os.sysconf('SC_CLK_TCK')


def _reset_peak(state: dict) -> bool:
  """Reset the peak of resident memory, and return whether the system allows it.

  Free memory, such as that left by compilation, is returned to the system first.
  """
  gc.collect()
  library = ctypes.CDLL(None)
  if hasattr(library, 'malloc_trim'):
    library.malloc_trim(0)
  state['life_peak_bytes'] = max(peak_bytes(), state.get('life_peak_bytes', 0))
  try:
    pathlib.Path('/proc/self/clear_refs').write_text('5')
  except OSError:
    return False
  return True


def encode_chains(chains: list[Chain]) -> list[dict]:
  """Return the chains as JSON data for a request."""
  return [dataclasses.asdict(chain) for chain in chains]


def main() -> None:
  """Answer requests from stdin until it is closed."""
  # Libraries print to stdout, so replies use a copy of it and stdout is redirected to stderr.
  replies = os.fdopen(os.dup(1), 'w')
  os.dup2(2, 1)
  state: dict = {}
  for line in sys.stdin:
    try:
      reply = handle(state, json.loads(line))
    except Exception:  # the driver raises it with the traceback
      reply = {'error': traceback.format_exc()}
    print(json.dumps(reply), file=replies, flush=True)


if __name__ == '__main__':
  main()
