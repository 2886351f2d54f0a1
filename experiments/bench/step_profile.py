"""Where does the time of a DPO step go: layers, attention, output layer or optimizer?

Command:   python -m experiments.bench.step_profile --model=M --workdir=runs/bench
           --steps=3, --no_sharing, --dtype=bfloat16
Hardware:  CPUs; RESULTS.md has results of two CPU cores
Method:    the model, the pairs and the step are those of `experiments.bench.preferences`. After one
           step that compiles and warms up, a profiler trace records each operation of the next
           steps. An operation counts without those inside it, such as the body of a loop. The
           compiled program names the line of source of each operation, which gives its part, and
           says whether it belongs to a backward pass. A fused operation counts as its last one.

Prints JSON: the seconds of a step, and those of its operations, by part and pass.
"""

import argparse
import collections
import json
import pathlib
import re
import tempfile
import time
from collections.abc import Iterable, Mapping

import jax

from cai_jax.data import packing
from cai_jax.training.step import place_batch
from experiments.bench import driver, models, preference_systems
from experiments.bench.ours_preferences import System
from experiments.bench.preferences import WORK, plan_steps

PARTS = {  # → files; the innermost line of source in one of them says the part
  'output layer': ('training/losses/cross_entropy', 'training/losses/logprobs', 'model/logits'),
  'attention': ('cai_jax/model/attention/',),
  'other layers': ('cai_jax/model/layers', 'cai_jax/model/transformer', 'cai_jax/model/rope')
  + ('cai_jax/model/elementwise',),
  'optimizer': ('/optax/', 'training/optimizer', 'training/step'),
}
OTHER = 'other'

Events = Iterable[tuple[int, int, str]]  # first nanosecond, duration, name of the operation


def read_operations(text: str) -> dict[str, tuple[str, str]]:
  """Return the part and the pass of each operation of a compiled program, by its name.

  Args:
    text: the program, with tables of file names, file locations and stack frames.
  """
  files = dict(re.findall(r'^(\d+) "(.*)"$', _table(text, 'FileNames'), re.M))
  row = r'^(\d+) \{file_name_id=(\d+)'
  locations = dict(re.findall(row, _table(text, 'FileLocations'), re.M))
  row = r'^(\d+) \{file_location_id=(\d+)(?: parent_frame_id=(\d+))?'
  frames = {i: rest for i, *rest in re.findall(row, _table(text, 'StackFrames'), re.M)}

  def find_part(frame: str) -> str:
    while frame in frames:
      location, parent = frames[frame]
      file = files[locations[location]]
      for part, patterns in PARTS.items():
        if any(pattern in file for pattern in patterns):
          return part
      frame = str(int(parent or 1) - 1)  # parents are counted from 1, and 1 is none
    return OTHER

  row = r'^\s*(?:ROOT )?%(\S+) = .*metadata=\{op_name="([^"]*)"(?:.*?stack_frame_id=(\d+))?'
  return {
    name: (find_part(frame), 'backward' if 'transpose(' in source else 'forward')
    for name, source, frame in re.findall(row, text, re.M)
  }


def _table(text: str, name: str) -> str:
  """Return the rows of one of the tables of a program."""
  return text.partition(f'\n{name}\n')[2].partition('\n\n')[0]


def own_times(events: Events) -> dict[str, int]:
  """Return the nanoseconds of each operation of one thread, without operations inside it.

  Args:
    events: the operations; of two that overlap, one contains the other.
  """
  times: collections.Counter[str] = collections.Counter()
  open_events: list[tuple[int, str]] = []  # end and name, the outermost first
  for start, duration, name in sorted(events, key=lambda event: (event[0], -event[1])):
    while open_events and open_events[-1][0] <= start:
      open_events.pop()
    if open_events:
      times[open_events[-1][1]] -= duration
    times[name] += duration
    open_events.append((start + duration, name))
  return dict(times)


def read_trace(folder: pathlib.Path, module: str) -> dict[str, int]:
  """Return the nanoseconds of each operation of a program in a trace.

  Args:
    folder: of the trace.
    module: name of the program.
  """
  (path,) = folder.rglob('*.xplane.pb')
  times: collections.Counter[str] = collections.Counter()
  for plane in jax.profiler.ProfileData.from_file(str(path)).planes:
    for line in plane.lines:
      events = []
      for event in line.events:
        stats = dict(event.stats)
        if stats.get('hlo_module') == module:
          events.append((int(event.start_ns), int(event.duration_ns), stats['hlo_op']))
      times.update(own_times(events))
  return dict(times)


def summarize(times: Mapping[str, int], operations: Mapping[str, tuple[str, str]]) -> dict:
  """Return the nanoseconds by part, and by pass within a part.

  Args:
    times: nanoseconds of each operation.
    operations: part and pass of each operation.
  """
  parts: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
  for name, spent in times.items():
    part, direction = operations.get(name, (OTHER, 'forward'))
    parts[part][direction] += spent
  return {part: dict(spent) for part, spent in parts.items()}


def profile(args: argparse.Namespace) -> dict:
  """Return where the time of the steps went, as JSON data."""
  work, workdir = WORK[args.model], pathlib.Path(args.workdir)
  workdir.mkdir(parents=True, exist_ok=True)
  folder = models.model_folder(args.model, workdir)
  vocab_size = json.loads((folder / 'config.json').read_text())['vocab_size']
  examples, packed = plan_steps(work, args.steps + 1, vocab_size, not args.no_sharing)
  system = System(
    folder,
    args.dtype,
    'cpu',
    {
      'rows': work.rows,
      'length': work.row_length,
      'accumulation': work.accumulation,
      'share_prompts': not args.no_sharing,
      'beta': work.beta,
      'optimizer': preference_systems.optimizer(work),
    },
  )
  system.take(list(examples), packed)
  plan = [packing.Step(system.bucket, tuple(map(tuple, rows))) for rows in packed]
  batches = packing.Batches(system.units, plan)
  first = place_batch(batches[0], system.sharding)
  compiled = system.step.lower(system.state, first).compile()
  system.train(0, 1, 0)
  start, cpu_start = time.perf_counter(), time.process_time()
  with tempfile.TemporaryDirectory() as trace:
    with jax.profiler.trace(trace):
      system.train(1, args.steps + 1, 0)
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
    text = compiled.as_text()
    module = re.match(r'HloModule (\w+)', text)[1]
    times = read_trace(pathlib.Path(trace), module)
  parts = summarize(times, read_operations(text))
  whole = sum(times.values())
  return {
    'model': args.model,
    'dtype': args.dtype,
    'shared_prompts': not args.no_sharing,
    'steps': args.steps,
    'seconds': seconds / args.steps,
    'cpu_seconds': cpu_seconds / args.steps,
    'operation_seconds': whole / 1e9 / args.steps,
    'shares': {
      part: {direction: spent / whole for direction, spent in passes.items()}
      for part, passes in parts.items()
    },
    'machine': driver.describe_machine(),
  }


def main() -> None:
  """Profile the steps and print the result."""
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--model', choices=list(WORK), default='S')
  parser.add_argument('--workdir', default='runs/bench_preferences')
  parser.add_argument('--dtype', choices=('float32', 'bfloat16'), default='float32')
  parser.add_argument('--steps', type=int, default=1, help='steps to profile, after the first one')
  parser.add_argument('--no_sharing', action='store_true', help='each side has its own prompt')
  print(json.dumps(profile(parser.parse_args()), indent=2))


if __name__ == '__main__':
  main()
