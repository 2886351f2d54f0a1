"""How much faster is a step of supervised fine-tuning here than in peers, and in what memory?

Command:   python -m experiments.bench.training --model=M --workdir=runs/bench
             --peers=hf_padded,hf_packed
           --model=M --rows=2 --peers=tunix --tunix_multiple=512, which takes 16 GB and compiles
             one or two shapes
           --model=tiny --hf_padded=32 --hf_packed=4, which are the fastest there; several are tried
           --dtype=bfloat16; --row_length=1024 for longer rows
Hardware:  any; RESULTS.md tells of two CPU cores
Systems:   ours: packed rows, best fit; Hugging Face transformers in the step of their Trainer, with
           AdamW of torch, fused: padded (micro-batches of 8 examples, filled up to the longest) and
           packed (our rows one by one, without padding, as TRL's `bfd` with batches of one; the
           positions tell transformers which tokens to mask); `PeftTrainer` of google-tunix 0.1.7
           (padded; a batch a step), which wants an environment of its own: --tunix_python
Method:    examples are drawn once, with lengths as D_CAI's, and all go over each of them once, in
           the same number of steps of AdamW with the same settings; those who pack have the same
           examples in each step. First all train on the same few steps, and their losses must
           agree. Each system has a process of its own, with the same cores; one works at a time.
           After one warm-up each, the repetitions go round the systems, each with the next steps;
           ratios are of tokens a second in the same round. No gradient checkpointing, f32
           parameters and moments (in bfloat16, Tunix has these in bfloat16 too), memory in huge
           pages for all.

Prints JSON, also written to the workdir, and a table on stderr.
"""

import argparse
import contextlib
import dataclasses
import json
import pathlib
import statistics
import sys
from collections.abc import Sequence

from cai_jax.data import packing
from experiments.bench import driver, models
from experiments.bench import examples as examples_lib
from experiments.bench.driver import Ask, log
from experiments.bench.examples import Example, ExampleSettings, Rows

OPTIMIZER = dict(learning_rate=1e-4, b1=0.9, b2=0.95, eps=1e-8, weight_decay=0.0, clip_norm=1.0)
SYSTEMS = {  # → that of the worker
  'ours': 'ours_training',
  'hf_padded': 'hf_training',
  'hf_packed': 'hf_training',
  'tunix': 'tunix_training',
}
AGREE_STEPS = 3
TOLERANCE = 1e-4  # of losses, relative, in f32


@dataclasses.dataclass(frozen=True)
class Work:
  """What is trained on."""

  lengths: ExampleSettings
  row_length: int  # tokens of a packed row
  rows: int  # of a step
  accumulation: int  # micro-batches of our step
  steps: int  # of a repetition


WORK = {
  'tiny': Work(examples_lib.EMBEDDED, row_length=256, rows=16, accumulation=4, steps=10),
  'S': Work(examples_lib.EMBEDDED, row_length=128, rows=4, accumulation=1, steps=2),
  'M': Work(examples_lib.DIALOGUES, row_length=512, rows=4, accumulation=4, steps=1),
}


def plan(work: Work, repetitions: int, vocab_size: int) -> tuple[tuple[Example, ...], list[Rows]]:
  """(examples, steps of packed rows over each of them once): as many as fill all repetitions."""
  total = work.steps * repetitions
  bucket = packing.Bucket(work.row_length, work.rows)
  drawn = examples_lib.draw(work.lengths, total * work.rows * work.row_length // 8, vocab_size)
  lengths = [len(e.tokens) for e in drawn]

  def steps(count):
    return packing.plan(lengths[:count], (bucket,), 1, 0)

  # Packing is nearly, but not quite, monotonic; what is taken in the end is checked.
  count = examples_lib.largest(lambda n: len(steps(n)) <= total, 1, len(drawn))
  while len(steps(count)) != total:
    count -= 1
  return drawn[:count], [[list(row) for row in step.rows] for step in steps(count)]


def tokens_of(examples: Sequence[Example], steps: Sequence[Rows]) -> tuple[int, int]:
  """(tokens, tokens to learn) of some steps."""
  held = [examples[i] for rows in steps for row in rows for i in row]
  tokens = sum(len(e.tokens) for e in held)
  return tokens, tokens - sum(e.prompt for e in held)


def options_of(system: str, args: argparse.Namespace, work: Work) -> dict:
  """What the system's constructor is told."""
  own = {
    'ours': {
      'rows': work.rows,
      'length': work.row_length,
      'train': {'accumulation': work.accumulation, **json.loads(args.train)},
    },
    'hf_padded': {'packed': False, 'attention': args.hf_attention},
    'hf_packed': {'packed': True, 'attention': args.hf_attention},
    'tunix': {'longest': work.lengths.longest, 'multiple': args.tunix_multiple},
  }[system]
  return {'optimizer': OPTIMIZER, **own}


def start(system: str, args: argparse.Namespace, work: Work, folder) -> tuple[driver.Process, dict]:
  """A worker with its model; what loading it told."""
  python = args.tunix_python if system == 'tunix' else sys.executable
  process = driver.Process(
    SYSTEMS[system],
    python,
    args.platform,
    # Large arrays come in pages of 2 MB: else the pages of each step's temporary memory, which all
    # systems ask for anew, take a tenth of its time or more.
    GLIBC_TUNABLES='glibc.malloc.hugetlb=1',
    JAX_COMPILATION_CACHE_DIR=str(pathlib.Path(args.workdir).absolute() / f'compiled_{system}'),
  )
  loaded = process.ask(
    'load',
    system=SYSTEMS[system],
    folder=str(folder),
    dtype=args.dtype,
    platform=args.platform,
    options=options_of(system, args, work),
  )
  return process, loaded


def best_batch(system, args, work, folder, examples, steps: list[Rows], sizes) -> dict[int, float]:
  """Seconds of the first repetition's steps with each size of micro-batches."""
  process, _ = start(system, args, work, folder)
  seconds = {}
  try:
    process.ask('take_examples', examples=examples, steps=steps[: work.steps])
    for size in sizes:
      process.ask('warm', batch=size)
      seconds[size] = process.ask('train', first=0, stop=work.steps, batch=size)['seconds']
      log(f'{system}, trial with {size} rows at a time: {seconds[size]:.2f} s')
  finally:
    process.close()  # so that the trials are not in the peak of memory
  return seconds


def agreement(
  asks: dict[str, Ask], batches: dict[str, int], examples, packed: list[Rows], size: int
) -> dict[str, dict]:
  """Losses of all systems over the same few steps of `size` examples; peers' distance from ours."""
  common = examples_lib.common_steps(packed, size, AGREE_STEPS)
  losses = {}
  for system, ask in asks.items():
    steps = common if system in ('ours', 'hf_packed') else examples_lib.one_a_row(common)
    ask('take_examples', examples=examples, steps=steps)
    losses[system] = ask('train', first=0, stop=AGREE_STEPS, batch=batches[system])['losses']
    log(f'{system}, losses: {losses[system]}')
  found = {}
  for system, theirs in losses.items():
    pairs = zip(theirs, losses['ours'], strict=True)
    found[system] = {'losses': theirs, 'largest': max(abs(a / b - 1) for a, b in pairs)}
  return found


def check_agreement(found: dict[str, dict], dtype: str) -> None:
  """RuntimeError if a peer's losses are not ours, in f32."""
  for system, row in found.items():
    if dtype == 'float32' and not row['largest'] <= TOLERANCE:
      raise RuntimeError(f'{system} does not compute the same losses: {found}')


def repeat(
  asks: dict[str, Ask], batches: dict[str, int], steps: int, repetitions: int
) -> dict[str, list[dict]]:
  """The replies of each system's runs; each round has the next steps."""
  runs: dict[str, list[dict]] = {system: [] for system in asks}
  for repetition, system in driver.in_turn(list(asks), repetitions):
    first = repetition * steps
    reply = asks[system]('train', first=first, stop=first + steps, batch=batches[system])
    runs[system].append(reply)
    log(f'{system}, repetition {repetition + 1} of {repetitions}: {reply["seconds"]:.2f} s')
  return runs


def summarise(examples: Sequence[Example], steps: list[Rows], runs: list[dict]) -> dict:
  """What a system's runs over its steps come to."""
  each = len(steps) // len(runs)
  counted = [tokens_of(examples, steps[at : at + each]) for at in range(0, len(steps), each)]
  rates = [tokens / run['seconds'] for (tokens, _), run in zip(counted, runs, strict=True)]
  targets = [learnt / run['seconds'] for (_, learnt), run in zip(counted, runs, strict=True)]
  return {
    'seconds': [run['seconds'] for run in runs],
    'cpu_seconds': [run['cpu_seconds'] for run in runs],
    'other_load': [run['other_load'] for run in runs],
    'tokens_per_second': rates,  # without padding
    'target_tokens_per_second': targets,
    'padding_share': 1 - sum(t for t, _ in counted) / sum(run['places'] for run in runs),
    'peak_bytes': driver.largest_peak(runs),
    'last_loss': runs[-1]['losses'][-1],
  }


def ratios(systems: dict[str, dict]) -> dict[str, dict[str, float]]:
  """How many times as many tokens a second ours does as each peer, in the same round."""
  rates = {system: row['tokens_per_second'] for system, row in systems.items()}
  ours = rates.pop('ours')
  return {
    system: driver.spread([a / b for a, b in zip(ours, theirs, strict=True)])
    for system, theirs in rates.items()
  }


def work_of(args: argparse.Namespace) -> Work:
  """The model's work, with what the flags say of it.

  Raises:
    ValueError: for a model without one, or examples that are longer than rows.
  """
  if args.model not in WORK:
    raise ValueError(f'--model={args.model} has no training work; one of {tuple(WORK)} has.')
  work = WORK[args.model]
  names = ('row_length', 'rows', 'accumulation', 'steps')
  given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
  if 'rows' in given:  # a row a micro-batch, unless it is said
    given = {'accumulation': min(work.accumulation, given['rows']), **given}
  work = dataclasses.replace(work, **given)
  if work.lengths.longest > work.row_length:
    raise ValueError(
      f'--row_length={work.row_length} is less than the longest example, {work.lengths.longest}.'
    )
  return work


def benchmark(args: argparse.Namespace) -> dict:
  """The whole run, as JSON."""
  workdir = pathlib.Path(args.workdir)
  workdir.mkdir(parents=True, exist_ok=True)
  work = work_of(args)
  folder = models.folder(args.model, workdir)
  hf = json.loads((folder / 'config.json').read_text())
  examples, packed = plan(work, args.repetitions, hf['vocab_size'])
  padded = examples_lib.padded_steps(len(examples), len(packed))
  steps = {'ours': packed, 'hf_packed': packed, 'hf_padded': padded, 'tunix': padded}
  systems = ['ours', *(name for name in args.peers.split(',') if name)]
  result = {
    'model': args.model,
    'dtype': args.dtype,
    'work': dataclasses.asdict(work),
    'optimizer': OPTIMIZER,
    'train': json.loads(args.train),
    'examples': {'count': len(examples), **examples_lib.describe(examples)},
    'machine': driver.machine(),
    'systems': {system: {} for system in systems},
  }
  sizes = {'hf_padded': args.hf_padded, 'hf_packed': args.hf_packed}
  chosen = {}
  for system in systems:
    tried, trials = sizes.get(system, [0]), {}
    if len(tried) > 1:
      trials = best_batch(system, args, work, folder, examples, steps[system], tried)
    chosen[system] = min(trials, key=trials.get) if trials else tried[0]
    result['systems'][system] |= {'rows_at_once': chosen[system], 'trial_seconds': trials}
  with contextlib.ExitStack() as stack:
    asks = {}
    for system in systems:
      process, loaded = start(system, args, work, folder)
      stack.callback(process.close)
      asks[system] = process.ask
      result['systems'][system]['versions'] = loaded['versions']
    result['agreement'] = agreement(asks, chosen, examples, packed, len(examples) // len(packed))
    check_agreement(result['agreement'], args.dtype)
    for system, ask in asks.items():
      ask('take_examples', examples=examples, steps=steps[system])
      warm = ask('warm', batch=chosen[system])
      result['systems'][system] |= {'warm_up_seconds': warm['seconds'], 'shapes': warm['shapes']}
      log(f'{system}, warm-up of {warm["shapes"]} shapes: {warm["seconds"]:.1f} s')
    runs = repeat(asks, chosen, work.steps, args.repetitions)
    for system in systems:
      result['systems'][system] |= summarise(examples, steps[system], runs[system])
      memory = asks[system]('memory')
      memory.pop('seconds')
      result['systems'][system] |= memory
  result['ratios'] = ratios(result['systems'])
  return result


def table(result: dict) -> str:
  """The result, for people."""
  work = result['work']
  lines = [
    f'{result["model"]}, {result["dtype"]}, {result["examples"]["count"]} examples, '
    f'{len(result["systems"]["ours"]["seconds"])} × {work["steps"]} steps; ours: {work["rows"]} '
    f'rows of {work["row_length"]}; {result["machine"]["cores"]} cores',
    f'{"system":10}{"seconds":>9}{"tokens/s":>10}{"targets/s":>11}{"padding":>9}{"GB":>7}'
    f'{"others":>8}{"ours ×":>21}{"loss off":>10}',
  ]
  for system, row in result['systems'].items():
    peak = row['peak_bytes'] or row['life_peak_bytes']
    lines.append(
      f'{system:10}{statistics.median(row["seconds"]):9.2f}'
      f'{statistics.median(row["tokens_per_second"]):10.1f}'
      f'{statistics.median(row["target_tokens_per_second"]):11.1f}'
      f'{row["padding_share"]:9.3f}{peak / 1e9:7.2f}{max(row["other_load"]):8.2f}'
      f'{driver.spread_text(result["ratios"].get(system)):>21}'
      f'{result["agreement"][system]["largest"]:10.1e}'
    )
  return '\n'.join(lines)


def parser() -> argparse.ArgumentParser:
  """The flags."""
  peers = [system for system in SYSTEMS if system != 'ours']
  flags = driver.parser(__doc__, 'runs/bench_training', list(WORK), peers)
  flags.add_argument('--row_length', type=int, help='tokens of our rows; default by the model')
  flags.add_argument('--rows', type=int, help='of a step; default by the model')
  flags.add_argument('--accumulation', type=int, help='of our step; default by the model')
  flags.add_argument('--steps', type=int, help='of a repetition; default by the model')
  flags.add_argument('--train', default='{}', help='JSON: further fields of TrainConfig')
  flags.add_argument(
    '--hf_padded', type=driver.integers, default=[8], help='examples at once; 0 is a whole step'
  )
  flags.add_argument(
    '--hf_packed', type=driver.integers, default=[1], help='rows at once, as a single one'
  )
  flags.add_argument('--hf_attention', default='sdpa', choices=('sdpa', 'eager'))
  flags.add_argument('--tunix_multiple', type=int, default=128, help='of tokens, to round up to')
  return flags


def main(argv: Sequence[str] | None = None) -> None:
  args = parser().parse_args(argv)
  driver.take_cores(args.cores)
  result = benchmark(args)
  log(table(result))
  driver.write(result, args.workdir, 'bench_training.json')


if __name__ == '__main__':
  main()
