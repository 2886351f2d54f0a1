"""How fast is a step of supervised fine-tuning here, against other systems, and in how much memory?

Command:   python -m experiments.bench.training --model=M --workdir=runs/bench \\
             --peers=hf_padded,hf_packed
           python -m experiments.bench.training --model=M --workdir=runs/bench --rows=2 \\
             --peers=tunix --tunix_multiple=512   (16 GB; compiles one or two shapes)
           --model=tiny --hf_padded=32 --hf_packed=4 are the fastest batches there; several values
             are tried
           --dtype=bfloat16; --row_length=1024 for longer rows
Hardware:  any; RESULTS.md has results of two CPU cores
Systems:   ours: packed rows, best fit
           hf_padded: Hugging Face transformers with the step of its Trainer and torch's fused
             AdamW; micro-batches of 8 examples, padded to the longest
           hf_packed: the same with our rows, one by one and without padding, as TRL's `bfd` with
             batches of one; transformers masks by positions
           tunix: `PeftTrainer` of google-tunix 0.1.7, one padded batch per step, which needs its
             own environment (--tunix_python)
Method:    examples are sampled once, with lengths like those of D_CAI. Every system trains once on
           each of them, in the same number of AdamW steps with the same settings; systems that
           pack have the same examples in each step. First, all systems train on the same few steps
           and their losses must agree. Each system runs in its own process on the same cores, one
           at a time. After one warm-up each, the repetitions alternate between the systems, each
           with the next steps. Ratios compare tokens per second of the same repetition. No system
           uses gradient checkpointing; parameters and moments are f32 (with bfloat16, those of
           Tunix are bfloat16 too); memory is in huge pages for all.

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
SYSTEMS = {  # → the worker's name for it
  'ours': 'ours_training',
  'hf_padded': 'hf_training',
  'hf_packed': 'hf_training',
  'tunix': 'tunix_training',
}
AGREE_STEPS = 3
TOLERANCE = 1e-4  # relative difference of losses in f32


@dataclasses.dataclass(frozen=True)
class Work:
  """The training work of one repetition.

  Attributes:
    lengths: of the examples.
    row_length: tokens of a packed row.
    rows: rows of a step.
    accumulation: micro-batches of our step.
    steps: steps of a repetition.
  """

  lengths: ExampleSettings
  row_length: int
  rows: int
  accumulation: int
  steps: int


WORK = {
  'tiny': Work(examples_lib.EMBEDDED, row_length=256, rows=16, accumulation=4, steps=10),
  'S': Work(examples_lib.EMBEDDED, row_length=128, rows=4, accumulation=1, steps=2),
  'M': Work(examples_lib.DIALOGUES, row_length=512, rows=4, accumulation=4, steps=1),
}


def plan_steps(
  work: Work, repetitions: int, vocab_size: int
) -> tuple[tuple[Example, ...], list[Rows]]:
  """Return examples that fill all repetitions, and packed steps with each example once."""
  total = work.steps * repetitions
  bucket = packing.Bucket(work.row_length, work.rows)
  max_count = total * work.rows * work.row_length // 8
  examples = examples_lib.draw(work.lengths, max_count, vocab_size)
  lengths = [len(e.tokens) for e in examples]

  def steps(count):
    return packing.plan(lengths[:count], (bucket,), 1, 0)

  # The number of steps is not quite monotonic in the number of examples, so correct it at the end.
  count = examples_lib.largest_fit(lambda n: len(steps(n)) <= total, 1, max_count)
  while len(steps(count)) != total:
    count -= 1
  return examples[:count], [[list(row) for row in step.rows] for step in steps(count)]


def count_tokens(examples: Sequence[Example], steps: Sequence[Rows]) -> tuple[int, int]:
  """Return the number of tokens and of target tokens in some steps."""
  trained = [examples[i] for rows in steps for row in rows for i in row]
  tokens = sum(len(e.tokens) for e in trained)
  return tokens, tokens - sum(e.prompt for e in trained)


def system_options(system: str, args: argparse.Namespace, work: Work) -> dict:
  """Return the options of a system's constructor."""
  options = {
    'ours': {
      'rows': work.rows,
      'length': work.row_length,
      'train': {'accumulation': work.accumulation, **json.loads(args.train)},
    },
    'hf_padded': {'packed': False, 'attention': args.hf_attention},
    'hf_packed': {'packed': True, 'attention': args.hf_attention},
    'tunix': {'longest': work.lengths.longest, 'multiple': args.tunix_multiple},
  }[system]
  return {'optimizer': OPTIMIZER, **options}


def start_worker(
  system: str, args: argparse.Namespace, work: Work, folder: pathlib.Path
) -> tuple[driver.Process, dict]:
  """Start a worker, load its model, and return it with its reply to loading."""
  python = args.tunix_python if system == 'tunix' else sys.executable
  process = driver.Process(
    SYSTEMS[system],
    python,
    args.platform,
    # All systems allocate temporary memory in each step. With small pages this takes a tenth of the
    # time or more, so large arrays use pages of 2 MB.
    GLIBC_TUNABLES='glibc.malloc.hugetlb=1',
    JAX_COMPILATION_CACHE_DIR=str(pathlib.Path(args.workdir).absolute() / f'compiled_{system}'),
  )
  loaded = process.ask(
    'load',
    system=SYSTEMS[system],
    folder=str(folder),
    dtype=args.dtype,
    platform=args.platform,
    options=system_options(system, args, work),
  )
  return process, loaded


def time_batches(
  system: str,
  args: argparse.Namespace,
  work: Work,
  folder: pathlib.Path,
  examples: Sequence[Example],
  steps: list[Rows],
  sizes: Sequence[int],
) -> dict[int, float]:
  """Return the seconds of the first repetition's steps with each size of micro-batches."""
  process, _ = start_worker(system, args, work, folder)
  seconds = {}
  try:
    process.ask('take_examples', examples=examples, steps=steps[: work.steps])
    for size in sizes:
      process.ask('warm', batch=size)
      seconds[size] = process.ask('train', first=0, stop=work.steps, batch=size)['seconds']
      log(f'{system}, trial with {size} rows at a time: {seconds[size]:.2f} s')
  finally:
    process.close()  # so that the trials do not count in the peak memory
  return seconds


def compare_losses(
  asks: dict[str, Ask], batches: dict[str, int], examples, packed: list[Rows], size: int
) -> dict[str, dict]:
  """Train all systems on the same few steps and compare their losses with ours.

  Args:
    asks: system → function that sends requests to its worker.
    batches: system → rows of a micro-batch.
    examples: all examples.
    packed: packed steps to take the examples from.
    size: examples per step.
  """
  common = examples_lib.common_steps(packed, size, AGREE_STEPS)
  losses = {}
  for system, ask in asks.items():
    steps = common if system in ('ours', 'hf_packed') else examples_lib.unpack_rows(common)
    ask('take_examples', examples=examples, steps=steps)
    losses[system] = ask('train', first=0, stop=AGREE_STEPS, batch=batches[system])['losses']
    log(f'{system}, losses: {losses[system]}')
  comparison = {}
  for system, theirs in losses.items():
    pairs = zip(theirs, losses['ours'], strict=True)
    comparison[system] = {'losses': theirs, 'largest': max(abs(a / b - 1) for a, b in pairs)}
  return comparison


def check_agreement(comparison: dict[str, dict], dtype: str) -> None:
  """Check, in f32, that every system computes the same losses as ours.

  Raises:
    RuntimeError: if one does not.
  """
  for system, row in comparison.items():
    if dtype == 'float32' and not row['largest'] <= TOLERANCE:
      raise RuntimeError(f'{system} does not compute the same losses: {comparison}')


def repeat(
  asks: dict[str, Ask], batches: dict[str, int], steps: int, repetitions: int
) -> dict[str, list[dict]]:
  """Run every system `repetitions` times, alternating, and return its workers' replies.

  Args:
    asks: system → function that sends requests to its worker.
    batches: system → rows of a micro-batch.
    steps: steps of a repetition; each repetition continues with the next ones.
    repetitions: number of repetitions.
  """
  runs: dict[str, list[dict]] = {system: [] for system in asks}
  for repetition, system in driver.interleave(list(asks), repetitions):
    first = repetition * steps
    reply = asks[system]('train', first=first, stop=first + steps, batch=batches[system])
    runs[system].append(reply)
    log(f'{system}, repetition {repetition + 1} of {repetitions}: {reply["seconds"]:.2f} s')
  return runs


def summarize(examples: Sequence[Example], steps: list[Rows], runs: list[dict]) -> dict:
  """Summarize a system's runs over its steps."""
  size = len(steps) // len(runs)
  counts = [count_tokens(examples, steps[i : i + size]) for i in range(0, len(steps), size)]
  token_rates = [tokens / run['seconds'] for (tokens, _), run in zip(counts, runs, strict=True)]
  target_rates = [targets / run['seconds'] for (_, targets), run in zip(counts, runs, strict=True)]
  return {
    'seconds': [run['seconds'] for run in runs],
    'cpu_seconds': [run['cpu_seconds'] for run in runs],
    'other_load': [run['other_load'] for run in runs],
    'tokens_per_second': token_rates,  # without padding
    'target_tokens_per_second': target_rates,
    'padding_share': 1 - sum(tokens for tokens, _ in counts) / sum(run['places'] for run in runs),
    'peak_bytes': driver.largest_peak(runs),
    'last_loss': runs[-1]['losses'][-1],
  }


def ratios(systems: dict[str, dict]) -> dict[str, dict[str, float]]:
  """Return the spread of our tokens per second divided by each peer's, paired by repetition."""
  rates = {system: row['tokens_per_second'] for system, row in systems.items()}
  ours = rates.pop('ours')
  return {
    system: driver.spread([a / b for a, b in zip(ours, theirs, strict=True)])
    for system, theirs in rates.items()
  }


def select_work(args: argparse.Namespace) -> Work:
  """Return the model's training work with the changes that the flags describe.

  Raises:
    ValueError: if the model has none, or examples are longer than rows.
  """
  if args.model not in WORK:
    raise ValueError(f'--model={args.model} has no training work; use one of {tuple(WORK)}.')
  work = WORK[args.model]
  names = ('row_length', 'rows', 'accumulation', 'steps')
  changes = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
  if 'rows' in changes:  # by default, at most one micro-batch per row
    changes = {'accumulation': min(work.accumulation, changes['rows']), **changes}
  work = dataclasses.replace(work, **changes)
  if work.lengths.longest > work.row_length:
    raise ValueError(
      f'--row_length={work.row_length} is less than the longest example, {work.lengths.longest}.'
    )
  return work


def benchmark(args: argparse.Namespace) -> dict:
  """Run the benchmark and return its result as JSON data."""
  workdir = pathlib.Path(args.workdir)
  workdir.mkdir(parents=True, exist_ok=True)
  work = select_work(args)
  folder = models.model_folder(args.model, workdir)
  hf = json.loads((folder / 'config.json').read_text())
  examples, packed = plan_steps(work, args.repetitions, hf['vocab_size'])
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
    'machine': driver.describe_machine(),
    'systems': {system: {} for system in systems},
  }
  sizes = {'hf_padded': args.hf_padded, 'hf_packed': args.hf_packed}
  chosen = {}
  for system in systems:
    candidates, trials = sizes.get(system, [0]), {}
    if len(candidates) > 1:
      trials = time_batches(system, args, work, folder, examples, steps[system], candidates)
    chosen[system] = min(trials, key=trials.get) if trials else candidates[0]
    result['systems'][system] |= {'rows_at_once': chosen[system], 'trial_seconds': trials}
  with contextlib.ExitStack() as stack:
    asks = {}
    for system in systems:
      process, loaded = start_worker(system, args, work, folder)
      stack.callback(process.close)
      asks[system] = process.ask
      result['systems'][system]['versions'] = loaded['versions']
    size = len(examples) // len(packed)
    result['agreement'] = compare_losses(asks, chosen, examples, packed, size)
    check_agreement(result['agreement'], args.dtype)
    for system, ask in asks.items():
      ask('take_examples', examples=examples, steps=steps[system])
      warm = ask('warm', batch=chosen[system])
      result['systems'][system] |= {'warm_up_seconds': warm['seconds'], 'shapes': warm['shapes']}
      log(f'{system}, warm-up of {warm["shapes"]} shapes: {warm["seconds"]:.1f} s')
    runs = repeat(asks, chosen, work.steps, args.repetitions)
    for system in systems:
      result['systems'][system] |= summarize(examples, steps[system], runs[system])
      memory = asks[system]('memory')
      memory.pop('seconds')
      result['systems'][system] |= memory
  result['ratios'] = ratios(result['systems'])
  return result


def format_table(result: dict) -> str:
  """Return the result as a text table."""
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
      f'{driver.format_spread(result["ratios"].get(system)):>21}'
      f'{result["agreement"][system]["largest"]:10.1e}'
    )
  return '\n'.join(lines)


def make_parser() -> argparse.ArgumentParser:
  """Return the parser of the command line."""
  peers = [system for system in SYSTEMS if system != 'ours']
  parser = driver.make_parser(
    'experiments.bench.training', __doc__, 'runs/bench_training', list(WORK), peers
  )
  for name, meaning in (
    ('row_length', 'tokens of our rows'),
    ('rows', 'rows of our step'),
    ('accumulation', 'micro-batches of our step'),
    ('steps', 'steps of a repetition'),
  ):
    parser.add_argument(f'--{name}', type=int, help=f'{meaning}; the default depends on the model')
  parser.add_argument('--train', default='{}', help='JSON with further fields of TrainConfig')
  parser.add_argument(
    '--hf_padded',
    type=driver.parse_integers,
    default=[8],
    help='examples of a padded micro-batch; 0 means the whole step',
  )
  parser.add_argument(
    '--hf_packed', type=driver.parse_integers, default=[1], help='rows of a packed micro-batch'
  )
  parser.add_argument('--hf_attention', default='sdpa', choices=('sdpa', 'eager'))
  parser.add_argument(
    '--tunix_multiple', type=int, default=128, help='round lengths up to a multiple, in tokens'
  )
  return parser


def main(argv: Sequence[str] | None = None) -> None:
  """Run the benchmark that the command line describes."""
  args = make_parser().parse_args(argv)
  driver.limit_cores(args.cores)
  result = benchmark(args)
  log(format_table(result))
  driver.write_result(result, args.workdir, 'bench_training.json')


if __name__ == '__main__':
  main()
