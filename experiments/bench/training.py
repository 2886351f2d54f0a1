"""How fast is a step of supervised fine-tuning here, against other systems, and in how much memory?

Command:   python -m experiments.bench.training --model=M --workdir=runs/bench \\
             --peers=hf_padded,hf_packed
           python -m experiments.bench.training --model=M --workdir=runs/bench --rows=2 \\
             --peers=tunix --tunix_multiple=512   (16 GB; compiles one or two shapes)
           --model=tiny --hf_padded=32 --hf_packed=4 are the fastest batches there; several values
             are tried
           --dtype=bfloat16; --row_length=1024 for longer rows
           --peers=trl --trl_python=T/bin/python
           --platform=cuda --model=1B --dtype=bfloat16 --peers=hf_packed,hf_padded --time_limit=90
Hardware:  any; RESULTS.md has results of two CPU cores
Systems:   ours: packed rows, best fit
           hf_padded: Hugging Face transformers with the step of its Trainer and torch's fused
             AdamW; micro-batches of 8 examples, padded to the longest
           hf_packed: the same with our rows, one by one and without padding, as TRL's `bfd` with
             batches of one; transformers masks by positions
           trl: `SFTTrainer` of TRL 1.16 at its fastest settings: our rows, packed without padding
             (`bfd`), and no gradient checkpointing. It needs its own environment:
               python -m venv T && T/bin/pip install torch==2.13.0 trl==1.16.0 transformers==5.24.0
             (for CPUs with --index-url https://download.pytorch.org/whl/cpu for torch)
           tunix: `PeftTrainer` of google-tunix 0.1.7, one padded batch per step, which needs its
             own environment (--tunix_python)
Method:    examples are sampled once, with lengths like those of D_CAI. Every system trains once on
           each of them, in the same number of AdamW steps with the same settings; systems that
           pack have the same examples in each step. First, all systems train on the same few steps
           and their losses must agree. Each system runs in its own process on the same cores, one
           at a time. After one warm-up each, the repetitions alternate between the systems, each
           with the next steps. Ratios compare tokens per second of the same repetition. No system
           uses gradient checkpointing; parameters and moments are f32 (with bfloat16, those of
           Tunix are bfloat16 too); memory is in huge pages for all. On a GPU, each system runs
           alone from start to end, ours first, because its memory does not hold them all. A system
           that has used --time_limit seconds in all is stopped, and the others go on.

Prints JSON, also written to the workdir, and a table on stderr.
"""

import argparse
import contextlib
import dataclasses
import functools
import json
import pathlib
import statistics
from collections.abc import Sequence

from cai_jax.data import packing
from experiments.bench import driver, models, training_systems
from experiments.bench import examples as examples_lib
from experiments.bench.driver import Ask, log
from experiments.bench.examples import Example, ExampleSettings, Rows
from experiments.bench.training_systems import PACKED

DEFAULT_PEERS = ('hf_padded', 'hf_packed')  # they need no other environment
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
  '1B': Work(examples_lib.LONG_DIALOGUES, row_length=2048, rows=8, accumulation=1, steps=4),
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


def common_losses(
  asks: dict[str, Ask], batches: dict[str, int], examples, packed: list[Rows], size: int
) -> dict[str, list[float]]:
  """Train all systems on the same few steps and return their losses.

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
    steps = common if system in PACKED else examples_lib.unpack_rows(common)
    ask('take_examples', examples=examples, steps=steps)
    losses[system] = ask('train', first=0, stop=AGREE_STEPS, batch=batches[system])['losses']
    log(f'{system}, losses: {losses[system]}')
  return losses


def compare_losses(losses: dict[str, list[float]]) -> dict[str, dict]:
  """Return the losses of each system with their largest relative difference from ours."""
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
  asks: dict[str, Ask],
  batches: dict[str, int],
  steps: int,
  repetitions: int,
  rows: dict[str, dict],
) -> dict[str, list[dict]]:
  """Run every system `repetitions` times, alternating, and return its workers' replies.

  Args:
    asks: system → function that sends requests to its worker.
    batches: system → rows of a micro-batch.
    steps: steps of a repetition; each repetition continues with the next ones.
    repetitions: number of repetitions.
    rows: the result of each system; that of one that fails or uses up its time says so.
  """
  runs: dict[str, list[dict]] = {system: [] for system in asks}
  for repetition, system in driver.interleave(list(asks), repetitions):
    if len(runs[system]) < repetition:
      continue  # it was stopped
    first = repetition * steps
    with driver.reporting(system, rows[system]):
      reply = asks[system]('train', first=first, stop=first + steps, batch=batches[system])
      runs[system].append(reply)
      log(f'{system}, repetition {repetition + 1} of {repetitions}: {reply["seconds"]:.2f} s')
  return runs


def summarize(examples: Sequence[Example], steps: list[Rows], runs: list[dict], size: int) -> dict:
  """Summarize a system's runs, each over the next `size` of its steps."""
  counts = [count_tokens(examples, steps[i : i + size]) for i in range(0, size * len(runs), size)]
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
  rates = {system: row.get('tokens_per_second', []) for system, row in systems.items()}
  ours = rates.pop('ours')
  pairs = {system: list(zip(ours, theirs, strict=False)) for system, theirs in rates.items()}
  return {
    system: driver.spread([a / b for a, b in paired]) for system, paired in pairs.items() if paired
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
  systems = ['ours', *(name for name in args.peers.split(',') if name)]
  result = {
    'model': args.model,
    'dtype': args.dtype,
    'work': dataclasses.asdict(work),
    'optimizer': training_systems.OPTIMIZER,
    'train': json.loads(args.train),
    'examples': {'count': len(examples), **examples_lib.describe(examples)},
    'machine': driver.describe_machine(),
    'time_limit': args.time_limit,
    'systems': {system: {} for system in systems},
  }
  losses = {}
  groups = [systems] if args.platform == 'cpu' else [[system] for system in systems]
  for group in groups:
    rows = {system: result['systems'][system] for system in group}
    losses |= run_together(args, work, folder, examples, packed, rows)
    if 'ours' in losses:
      result['agreement'] = compare_losses(losses)
      check_agreement(result['agreement'], args.dtype)
  result['ratios'] = ratios(result['systems'])
  return result


def run_together(
  args: argparse.Namespace,
  work: Work,
  folder: pathlib.Path,
  examples: Sequence[Example],
  packed: list[Rows],
  rows: dict[str, dict],
) -> dict[str, list[float]]:
  """Time some systems, whose repetitions alternate, and return their losses of the same steps.

  Args:
    args: the command line.
    work: the training work.
    folder: of the model.
    examples: all examples.
    packed: all packed steps.
    rows: the result of each system, which is added to. A system that fails or uses up its time is
      left out of the rest, and its row says why.
  """
  padded = examples_lib.padded_steps(len(examples), len(packed))
  steps = {system: packed if system in PACKED else padded for system in rows}
  asks, chosen, losses, runs = {}, {}, {}, {system: [] for system in rows}
  with contextlib.ExitStack() as stack:
    for system, row in rows.items():
      with driver.reporting(system, row):
        budget = driver.Budget(args.time_limit)
        start = functools.partial(training_systems.start, system, args, work, folder, budget)
        sizes, trials = training_systems.sizes_to_try(system, args), {}
        if len(sizes) > 1:
          trial = steps[system][: work.steps]
          trials = training_systems.time_batches(system, start, examples, trial, sizes)
        chosen[system] = min(trials, key=trials.get) if trials else sizes[0]
        row |= {'rows_at_once': chosen[system], 'trial_seconds': trials}
        process, loaded = start()
        stack.callback(process.close)
        row['versions'] = loaded['versions']
        size = len(examples) // len(packed)
        losses |= common_losses({system: process.ask}, chosen, examples, packed, size)
        process.ask('take_examples', examples=examples, steps=steps[system])
        warm = process.ask('warm', batch=chosen[system])
        row |= {'warm_up_seconds': warm['seconds'], 'shapes': warm['shapes']}
        log(f'{system}, warm-up of {warm["shapes"]} shapes: {warm["seconds"]:.1f} s')
        asks[system] = process.ask
    runs = repeat(asks, chosen, work.steps, args.repetitions, rows)
    for system, ask in asks.items():
      if runs[system]:
        rows[system] |= summarize(examples, steps[system], runs[system], work.steps)
        with driver.reporting(system, rows[system]):
          memory = ask('memory')
          memory.pop('seconds')
          rows[system] |= memory
  return losses


def format_table(result: dict) -> str:
  """Return the result as a text table."""
  work = result['work']
  lines = [
    f'{result["model"]}, {result["dtype"]}, {result["examples"]["count"]} examples, '
    f'{work["steps"]} steps at a time; ours: {work["rows"]} '
    f'rows of {work["row_length"]}; {result["machine"]["cores"]} cores',
    f'{"system":10}{"seconds":>9}{"tokens/s":>10}{"targets/s":>11}{"padding":>9}{"GB":>7}'
    f'{"others":>8}{"ours ×":>21}{"loss off":>10}',
  ]
  for system, row in result['systems'].items():
    if 'seconds' not in row:
      lines.append(f'{system:10} {row.get("stopped") or row.get("failed")}')
      continue
    peak = row.get('device_peak_bytes') or row['peak_bytes'] or row.get('life_peak_bytes', 0)
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
  parser = driver.make_parser(
    'experiments.bench.training', __doc__, 'runs/bench_training', list(WORK), DEFAULT_PEERS
  )
  driver.add_step_flags(parser)
  parser.add_argument('--train', default='{}', help='JSON with further fields of TrainConfig')
  parser.add_argument(
    '--time_limit', type=float, default=1800.0, help='seconds that each system may take in all'
  )
  training_systems.add_flags(parser)
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
