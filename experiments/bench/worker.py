"""One system of the benchmark in a process of its own: a JSON line in, a JSON line out.

Started by the driver as `python -m experiments.bench.worker SYSTEM`, with a system of `SYSTEMS`.
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

from experiments.bench.chains import Chain
from experiments.bench.examples import Example

SYSTEMS = {  # → module
  'ours': 'ours',
  'hf': 'hf',
  'tunix': 'tunix_sampler',
  'ours_training': 'ours_training',
  'hf_training': 'hf_training',
  'tunix_training': 'tunix_training',
}


def handle(state: dict, request: dict) -> dict:
  """The reply to a request of the driver; `state` keeps the loaded system between requests."""
  start = time.perf_counter()
  reply = OPERATIONS[request['op']](state, request)
  return {'seconds': time.perf_counter() - start, **reply}


def load(state: dict, request: dict) -> dict:
  """Loads the model; versions of what the system is made of."""
  module = importlib.import_module(f'experiments.bench.{SYSTEMS[request["system"]]}')
  state['system'] = module.System(
    pathlib.Path(request['folder']), request['dtype'], request['platform'], request['options']
  )
  versions = {name: importlib.metadata.version(name) for name in module.PACKAGES}
  return {'versions': {'python': platform.python_version()} | versions}


def take(state: dict, request: dict) -> dict:
  """Keeps the chains and the prefix for the runs to come."""
  state['chains'] = [Chain(**chain) for chain in request['chains']]
  state['prefix'] = request['prefix']
  return {}


def run(state: dict, request: dict) -> dict:
  """Lengths of all replies of a run over the chains kept, and what `measured` tells of it."""
  (replies, stats), measures = measured(
    state,
    lambda: state['system'].run(
      state['chains'], state['prefix'], request['batch'], request['seed'], request['warm']
    ),
  )
  lengths = [[len(reply) for reply in chain] for chain in replies]
  return {**measures, 'lengths': lengths, 'stats': stats}


def measured(state: dict, work: Callable[[], object]) -> tuple[object, dict]:
  """(what `work` gives; seconds, load and peak memory meanwhile).

  `other_load` is how many cores all other processes kept busy meanwhile: times are worth something
  where it is near 0 only. Torch suffers most, as its threads spin while they wait for each other.
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
  """Writes the logits after some rows to a file; the most likely tokens after them."""
  tokens = np.array(request['tokens'], np.int32)
  np.save(request['file'], state['system'].logits(tokens))
  return {'greedy': state['system'].greedy(tokens, request['count'])}


def roofline(state: dict, request: dict) -> dict:
  """Our decode step against the machine's limits."""
  return state['system'].roofline(request['batches'], request['repetitions'])


def take_examples(state: dict, request: dict) -> dict:
  """Keeps the examples and the steps over them for training to come."""
  state['system'].take([Example(*example) for example in request['examples']], request['steps'])
  return {}


def warm(state: dict, request: dict) -> dict:
  """Trains on one batch of each shape in the steps kept, and so compiles what they need."""
  return {'shapes': state['system'].warm(request['batch'])}


def train(state: dict, request: dict) -> dict:
  """Losses of some of the steps kept, tokens computed with the padding, and what was measured."""
  (losses, places), measures = measured(
    state, lambda: state['system'].train(request['first'], request['stop'], request['batch'])
  )
  return {**measures, 'losses': losses, 'places': places}


def memory(state: dict, request: dict) -> dict:
  """Peak memory of the process since it started, and of the accelerator."""
  return {
    'life_peak_bytes': max(peak_bytes(), state.get('life_peak_bytes', 0)),
    'device_peak_bytes': state['system'].device_peak_bytes(),
  }


OPERATIONS = {
  f.__name__: f for f in (load, take, run, agree, roofline, take_examples, warm, train, memory)
}


def peak_bytes() -> int:
  """Most resident memory of this process since `_reset_peak`."""
  # getrusage would not do: it begins with the peak of the process that started this one.
  status = pathlib.Path('/proc/self/status').read_text()
  return int(status.split('VmHWM:')[1].split()[0]) * 1024


def _busy_seconds() -> float:
  """Seconds that the cores of this machine have worked since it started, summed."""
  fields = pathlib.Path('/proc/stat').read_text().split('\n', 1)[0].split()[1:]
  user, nice, system, _, _, irq, softirq = map(int, fields[:7])
  return (user + nice + system + irq + softirq) / os.sysconf('SC_CLK_TCK')


def _reset_peak(state: dict) -> bool:
  """Starts the peak of resident memory anew; False where the system does not let us.

  What is free already, such as what compiling has left, goes back to the system before that.
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
  """Chains for a request."""
  return [dataclasses.asdict(chain) for chain in chains]


def main() -> None:
  # Libraries print to stdout; replies go where they cannot.
  replies = os.fdopen(os.dup(1), 'w')
  os.dup2(2, 1)
  state: dict = {}
  for line in sys.stdin:
    try:
      reply = handle(state, json.loads(line))
    except Exception:  # the driver tells, with the whole of it
      reply = {'error': traceback.format_exc()}
    print(json.dumps(reply), file=replies, flush=True)


if __name__ == '__main__':
  main()
