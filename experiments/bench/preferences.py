"""How many DPO pairs per second does a training step take here and in TRL, in how much memory?

Command:   python -m experiments.bench.preferences --model=M --workdir=runs/bench \\
             --trl_python=T/bin/python
           --model=tiny, --dtype=bfloat16, --trl=4 (one size of micro-batch, tried no others)
           --no_sharing (our rows hold the prompt of each side)
Hardware:  any; RESULTS.md has results of two CPU cores
Systems:   ours: packed rows of pairs that share their prompt; log-probabilities of the reference
             computed before training
           trl: `DPOTrainer` of TRL 1.13 at its fastest settings: the reference computed before
             training, no gradient checkpointing, micro-batches of pairs of similar length, whose
             size is the fastest of --trl, and torch's fused AdamW
           trl_default: the same trainer with what it does by default: a reference model in memory,
             computed in every step, and gradient checkpointing; --trl_default pairs at a time
           TRL needs its own environment:
             python -m venv T && T/bin/pip install torch==2.13.0 trl==1.13.0 transformers==5.24.0
           (for CPUs with --index-url https://download.pytorch.org/whl/cpu for torch)
Method:    pairs are sampled once: prompts and two responses with lengths like those of D_CAI. Every
           system trains once on each pair, in the same number of AdamW steps with the same
           settings. First, all systems train on the same few steps and their losses must agree.
           Each system runs in its own process on the same cores, one at a time. After one warm-up
           each, the repetitions alternate between the systems, each with the next steps. A
           repetition times two things: the steps, and the pass over the same pairs that computes
           the reference; `trl_default` has no such pass. `ratios` compare pairs per second of
           steps, and `ratios_with_reference` those of both together, which is what a run over the
           data once costs. Parameters and moments are f32; memory is in huge pages for all.

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
from experiments.bench import driver, models, pairs, preference_systems, training
from experiments.bench import examples as examples_lib
from experiments.bench.driver import Ask, log
from experiments.bench.examples import Example, ExampleSettings, Rows

AGREE_STEPS = 3


@dataclasses.dataclass(frozen=True)
class Work:
  """The training work of one repetition.

  Attributes:
    lengths: of the examples; both sides of a pair may have the longest.
    row_length: tokens of a packed row.
    rows: rows of a step.
    accumulation: micro-batches of our step.
    steps: steps of a repetition.
    beta: of the loss.
    learning_rate: of the optimizer.
  """

  lengths: ExampleSettings
  row_length: int
  rows: int
  accumulation: int
  steps: int
  beta: float = 0.1
  learning_rate: float = 1e-4


# M has random weights and 30 layers. A step of 1e-4 changes the log-probabilities of its responses
# by hundreds of nats, so that rounding errors become differences of losses. With steps of 1e-8 its
# losses compare the forward passes only; those of the other models also compare the steps.
WORK = {
  'tiny': Work(examples_lib.EMBEDDED, row_length=256, rows=16, accumulation=4, steps=10),
  'S': Work(examples_lib.EMBEDDED, row_length=256, rows=4, accumulation=1, steps=2),
  'M': Work(
    examples_lib.DIALOGUES, row_length=1024, rows=4, accumulation=4, steps=1, learning_rate=1e-8
  ),
}


def plan_steps(
  work: Work, repetitions: int, vocab_size: int, shared: bool
) -> tuple[tuple[Example, ...], list[Rows]]:
  """Return examples of pairs that fill all repetitions, and packed steps with each pair once.

  Args:
    work: the training work of a repetition.
    repetitions: their number.
    vocab_size: number of token ids.
    shared: whether the sides of a pair share their prompt.
  """
  total = work.steps * repetitions
  bucket = packing.Bucket(work.row_length, work.rows)
  most = total * work.rows * work.row_length // 16
  examples = pairs.draw(work.lengths, most, vocab_size)
  lengths = pairs.pair_lengths(examples, shared)

  def steps(count):
    return packing.plan(lengths[:count], (bucket,), 1, 0)

  # The number of steps is not quite monotonic in the number of pairs, so correct it at the end.
  count = examples_lib.largest_fit(lambda n: len(steps(n)) <= total, 1, most)
  while len(steps(count)) != total:
    count -= 1
  return examples[: 2 * count], [[list(row) for row in step.rows] for step in steps(count)]


def common_losses(asks: dict[str, Ask], examples, packed: list[Rows]) -> dict[str, list[float]]:
  """Train all systems on the same few steps and return their losses.

  TRL takes single pairs as micro-batches, because its loss is a mean of their means.
  """
  size = min(sum(map(len, rows)) for rows in packed)
  common = examples_lib.common_steps(packed, size, AGREE_STEPS)
  losses = {}
  for system, ask in asks.items():
    steps = common if system == 'ours' else examples_lib.unpack_rows(common)
    ask('take_examples', examples=examples, steps=steps)
    losses[system] = ask('train', first=0, stop=AGREE_STEPS, batch=1)['losses']
    log(f'{system}, losses: {losses[system]}')
  return losses


def repeat(
  asks: dict[str, Ask], batches: dict[str, int], steps: int, repetitions: int
) -> dict[str, list[dict]]:
  """Run every system `repetitions` times, alternating, and return its workers' replies.

  A reply has the measurements of the steps, and the seconds of the `reference` pass.
  """
  runs: dict[str, list[dict]] = {system: [] for system in asks}
  for repetition, system in driver.interleave(list(asks), repetitions):
    part = dict(first=repetition * steps, stop=(repetition + 1) * steps, batch=batches[system])
    reference = {'seconds': 0.0}
    if preference_systems.PRECOMPUTED[system]:
      reference = asks[system]('reference', **part)
    reply = asks[system]('train', **part)
    runs[system].append({**reply, 'reference_seconds': reference['seconds']})
    log(
      f'{system}, repetition {repetition + 1} of {repetitions}: {reply["seconds"]:.2f} s and '
      f'{reference["seconds"]:.2f} s for the reference'
    )
  return runs


def summarize(
  lengths: Sequence[int], steps: list[Rows], runs: list[dict], size: int
) -> dict[str, object]:
  """Summarize a system's runs, each over the next `size` of its steps.

  Args:
    lengths: tokens that the system computes of each pair, without padding.
    steps: its steps.
    runs: what the worker returned for each run.
    size: steps of a run.
  """
  taken = [
    [i for rows in steps[at : at + size] for row in rows for i in row]
    for at in range(0, size * len(runs), size)
  ]
  rates, whole = [], []
  for indices, run in zip(taken, runs, strict=True):
    rates.append(len(indices) / run['seconds'])
    whole.append(len(indices) / (run['seconds'] + run['reference_seconds']))
  tokens = sum(lengths[i] for indices in taken for i in indices)
  return {
    'seconds': [run['seconds'] for run in runs],
    'reference_seconds': [run['reference_seconds'] for run in runs],
    'cpu_seconds': [run['cpu_seconds'] for run in runs],
    'other_load': [run['other_load'] for run in runs],
    'pairs_per_second': rates,
    'pairs_per_second_with_reference': whole,
    'padding_share': 1 - tokens / sum(run['places'] for run in runs),
    'peak_bytes': driver.largest_peak(runs),
    'last_loss': runs[-1]['losses'][-1],
  }


def ratios(systems: dict[str, dict], rate: str) -> dict[str, dict[str, float]]:
  """Return the spread of our rate divided by each peer's, paired by repetition.

  Args:
    systems: the result of each system.
    rate: the name of the rate in it.
  """
  ours = systems['ours'][rate]
  return {
    system: driver.spread([a / b for a, b in zip(ours, row[rate], strict=True)])
    for system, row in systems.items()
    if system != 'ours'
  }


def select_work(args: argparse.Namespace) -> Work:
  """Return the model's training work with the changes that the flags describe.

  Raises:
    ValueError: if the model has none, or pairs can be longer than rows.
  """
  if args.model not in WORK:
    raise ValueError(f'--model={args.model} has no work; use one of {tuple(WORK)}.')
  names = ('row_length', 'rows', 'accumulation', 'steps')
  changes = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
  work = dataclasses.replace(WORK[args.model], **changes)
  if 2 * work.lengths.longest > work.row_length:
    raise ValueError(
      f'--row_length={work.row_length} is less than the longest pair, {2 * work.lengths.longest}.'
    )
  return work


def benchmark(args: argparse.Namespace) -> dict:
  """Run the benchmark and return its result as JSON data."""
  workdir = pathlib.Path(args.workdir)
  workdir.mkdir(parents=True, exist_ok=True)
  work = select_work(args)
  folder = models.model_folder(args.model, workdir)
  vocab_size = json.loads((folder / 'config.json').read_text())['vocab_size']
  examples, packed = plan_steps(work, args.repetitions, vocab_size, not args.no_sharing)
  result = {
    'model': args.model,
    'dtype': args.dtype,
    'work': dataclasses.asdict(work),
    'optimizer': preference_systems.optimizer(work),
    'shared_prompts': not args.no_sharing,
    'pairs': {'count': len(examples) // 2, **examples_lib.describe(examples)},
    'machine': driver.describe_machine(),
    'systems': {system: {} for system in ('ours', *filter(None, args.peers.split(',')))},
  }
  result['agreement'] = run_together(args, work, folder, examples, packed, result['systems'])
  for name, rate in (
    ('ratios', 'pairs_per_second'),
    ('ratios_with_reference', 'pairs_per_second_with_reference'),
  ):
    result[name] = ratios(result['systems'], rate)
  return result


def run_together(
  args: argparse.Namespace,
  work: Work,
  folder: pathlib.Path,
  examples: Sequence[Example],
  packed: list[Rows],
  systems: dict[str, dict],
) -> dict[str, dict]:
  """Time all systems, whose repetitions alternate, and return how well their losses agree.

  Args:
    args: the command line.
    work: the training work.
    folder: of the model.
    examples: those of all pairs.
    packed: all packed steps.
    systems: the result of each system, which is added to.
  """
  count = len(examples) // 2
  steps = dict.fromkeys(systems, examples_lib.padded_steps(count, len(packed))) | {'ours': packed}
  asks, batches = {}, {}
  with contextlib.ExitStack() as stack:
    for system, row in systems.items():
      start = functools.partial(preference_systems.start, system, args, work, folder)
      sizes = preference_systems.sizes_to_try(system, args)
      trials = {}
      if len(sizes) > 1:
        trials = training.training_systems.time_batches(
          system, start, examples, steps[system][: work.steps], sizes
        )
      batches[system] = min(trials, key=trials.get) if trials else sizes[0]
      process, loaded = start()
      stack.callback(process.close)
      asks[system] = process.ask
      row |= {'pairs_at_once': batches[system], 'trial_seconds': trials, **loaded}
    agreement = training.compare_losses(common_losses(asks, examples, packed))
    training.check_agreement(agreement, args.dtype)
    for system, ask in asks.items():
      ask('take_examples', examples=examples, steps=steps[system])
      warm = ask('warm', batch=batches[system])
      systems[system]['warm_up_seconds'] = warm['seconds']
    runs = repeat(asks, batches, work.steps, args.repetitions)
    for system, ask in asks.items():
      memory = ask('memory')
      memory.pop('seconds')
      lengths = pairs.pair_lengths(examples, system == 'ours' and not args.no_sharing)
      systems[system] |= summarize(lengths, steps[system], runs[system], work.steps) | memory
  return agreement


def format_table(result: dict) -> str:
  """Return the result as a text table."""
  work = result['work']
  lines = [
    f'{result["model"]}, {result["dtype"]}, {result["pairs"]["count"]} pairs, {work["steps"]} '
    f'steps at a time; ours: {work["rows"]} rows of {work["row_length"]}; '
    f'{result["machine"]["cores"]} cores',
    f'{"system":12}{"seconds":>9}{"pairs/s":>9}{"reference":>11}{"padding":>9}{"GB":>7}'
    f'{"others":>8}{"ours ×":>20}{"with reference ×":>20}{"loss off":>10}',
  ]
  for system, row in result['systems'].items():
    peak = row.get('device_peak_bytes') or row['peak_bytes'] or row['life_peak_bytes']
    lines.append(
      f'{system:12}{statistics.median(row["seconds"]):9.2f}'
      f'{statistics.median(row["pairs_per_second"]):9.2f}'
      f'{statistics.median(row["reference_seconds"]):11.2f}'
      f'{row["padding_share"]:9.3f}{peak / 1e9:7.2f}{max(row["other_load"]):8.2f}'
      f'{driver.format_spread(result["ratios"].get(system)):>20}'
      f'{driver.format_spread(result["ratios_with_reference"].get(system)):>20}'
      f'{result["agreement"][system]["largest"]:10.1e}'
    )
  return '\n'.join(lines)


def make_parser() -> argparse.ArgumentParser:
  """Return the parser of the command line."""
  parser = driver.make_parser(
    'experiments.bench.preferences',
    __doc__,
    'runs/bench_preferences',
    list(WORK),
    preference_systems.PEERS,
  )
  driver.add_step_flags(parser)
  preference_systems.add_flags(parser)
  return parser


def main(argv: Sequence[str] | None = None) -> None:
  """Run the benchmark that the command line describes."""
  args = make_parser().parse_args(argv)
  driver.limit_cores(args.cores)
  result = benchmark(args)
  log(format_table(result))
  driver.write_result(result, args.workdir, 'bench_preferences.json')


if __name__ == '__main__':
  main()
