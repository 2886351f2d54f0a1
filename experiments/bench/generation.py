"""How fast are critique chains here, against other systems and against the machine's limits?

Command:   python -m experiments.bench.generation --model=M --dtype=float32 --workdir=runs/bench
           --prefix=512 puts demonstrations in front of every turn
           --occupancy runs 1,000 chains of skewed lengths through our engine alone
           --model=tiny uses the embedded model; --roofline measures the machine's limits
Hardware:  any; RESULTS.md has results of two CPU cores
Systems:   ours; `generate` of Hugging Face transformers (left padding, stage by stage); the sampler
           of google-tunix 0.1.7 (stage by stage), which needs its own environment (--tunix_python)
Method:    chains and reply lengths are sampled once, and every system is forced to use them. Each
           system runs in its own process on the same cores, one at a time. After one warm-up run
           each, the repetitions alternate between the systems, so that other load on the machine
           affects all alike. Ratios compare runs of the same repetition.

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

import numpy as np

from experiments.bench import chains as chains_lib
from experiments.bench import driver, models, worker
from experiments.bench.driver import Ask, log

# The chains of --occupancy: replies of about 43 tokens on average and at most 128.
OCCUPANCY = dict(chains=1000, reply_median=34.0, reply_sigma=0.8, longest_reply=128)


def check_lengths(system: str, chains: Sequence[chains_lib.Chain], lengths) -> None:
  """Check that every reply has its forced length.

  Raises:
    RuntimeError: if one does not.
  """
  expected = [chain.limits for chain in chains]
  if lengths != expected:
    wrong = next(
      i for i, pair in enumerate(zip(lengths, expected, strict=True)) if pair[0] != pair[1]
    )
    raise RuntimeError(
      f'{system}: the replies of {chains[wrong].id} have {lengths[wrong]} tokens, not the forced '
      f'{expected[wrong]}.'
    )


def repeat(
  asks: dict[str, Ask],
  batches: dict[str, int],
  chains: Sequence[chains_lib.Chain],
  repetitions: int,
  seed: int = 0,
) -> dict[str, list[dict]]:
  """Run every system `repetitions` times, alternating, and return its workers' replies."""
  runs: dict[str, list[dict]] = {system: [] for system in asks}
  for repetition, system in driver.interleave(list(asks), repetitions):
    reply = asks[system]('run', batch=batches[system], seed=seed * 1000 + repetition, warm=False)
    check_lengths(system, chains, reply.pop('lengths'))
    runs[system].append(reply)
    log(f'{system}, repetition {repetition + 1} of {repetitions}: {reply["seconds"]:.1f} s')
  return runs


def summarize(chains: Sequence[chains_lib.Chain], runs: list[dict]) -> dict:
  """Summarize a system's runs. Rates are those of the run with the median time."""
  seconds = [run['seconds'] for run in runs]
  tokens = sum(limit for chain in chains for limit in chain.limits)
  return {
    'seconds': seconds,
    'cpu_seconds': [run['cpu_seconds'] for run in runs],
    'other_load': [run['other_load'] for run in runs],
    'chains_per_second': len(chains) / statistics.median(seconds),
    'tokens_per_second': tokens / statistics.median(seconds),
    'peak_bytes': driver.largest_peak(runs),
    'stats': runs[-1]['stats'],
  }


def compare_models(asks: dict[str, Ask], vocab_size: int, workdir: pathlib.Path) -> dict[str, dict]:
  """Compare each peer's logits and greedy tokens with ours on random tokens."""
  rng = np.random.default_rng(1)
  tokens = rng.integers(chains_lib.FIRST_ID, vocab_size, (8, 24)).tolist()
  logits, greedy = {}, {}
  for system, ask in asks.items():
    file = workdir / f'logits_{system}.npy'
    greedy[system] = ask('agree', tokens=tokens, count=16, file=str(file))['greedy']
    logits[system] = np.load(file)
    file.unlink()
  rows = lambda system: zip(greedy[system], greedy['ours'], strict=True)  # noqa: E731
  return {
    system: {
      'largest_logit': float(np.abs(logits['ours']).max()),
      'largest_difference': float(np.abs(logits[system] - logits['ours']).max()),
      'equal_greedy_rows': sum(theirs == ours for theirs, ours in rows(system)),
      'rows': len(tokens),
    }
    for system in asks.keys() - {'ours'}
  }


def check_agreement(comparison: dict[str, dict], dtype: str) -> None:
  """Check, in f32, that every peer computes the same model as ours.

  Raises:
    RuntimeError: if one does not.
  """
  for system, row in comparison.items():
    if dtype == 'float32' and row['largest_difference'] > 1e-3 * row['largest_logit']:
      raise RuntimeError(f'{system} does not compute the same model: {row}')


def start_worker(
  system: str, args: argparse.Namespace, folder, prefix, chains
) -> tuple[driver.Process, dict]:
  """Start a worker, load its model and chains, and return it with its reply to loading."""
  python = args.tunix_python if system == 'tunix' else sys.executable
  process = driver.Process(system, python, args.platform)
  loaded = process.ask(
    'load',
    system=system,
    folder=str(folder),
    dtype=args.dtype,
    platform=args.platform,
    options=json.loads(args.engine),
  )
  process.ask('take', chains=worker.encode_chains(chains), prefix=prefix)
  return process, loaded


def time_batches(
  system: str, args: argparse.Namespace, folder, prefix, chains, sizes: Sequence[int]
) -> dict[int, float]:
  """Return the seconds of one pass over the first `trial_chains` chains at each batch size."""
  process, _ = start_worker(system, args, folder, prefix, chains[: args.trial_chains])
  seconds = {}
  try:
    for size in sizes:
      process.ask('run', batch=size, seed=0, warm=True)
      seconds[size] = process.ask('run', batch=size, seed=0, warm=False)['seconds']
      log(f'{system}, trial with {size} rows: {seconds[size]:.1f} s')
  finally:
    process.close()  # so that the trials do not count in the peak memory
  return seconds


def chain_settings(args: argparse.Namespace) -> chains_lib.ChainSettings:
  """Return the sizes of the chains that the flags describe."""
  base = chains_lib.ChainSettings(**(OCCUPANCY if args.occupancy else {}))
  names = [field.name for field in dataclasses.fields(base)]
  changes = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
  return dataclasses.replace(base, **changes)


def benchmark(args: argparse.Namespace) -> dict:
  """Run the benchmark and return its result as JSON data.

  Raises:
    ValueError: if the chains are longer than the model's context.
  """
  workdir = pathlib.Path(args.workdir)
  workdir.mkdir(parents=True, exist_ok=True)
  folder = models.model_folder(args.model, workdir)
  hf = json.loads((folder / 'config.json').read_text())
  settings = chain_settings(args)
  prefix, chains = chains_lib.draw(settings, hf['vocab_size'])
  longest = chains_lib.longest(chains, len(prefix))
  if longest > hf['max_position_embeddings']:
    raise ValueError(
      f'The longest chain has {longest} tokens but the context of model {args.model} has '
      f'{hf["max_position_embeddings"]}. Lower --longest_prompt, --longest_reply or --prefix.'
    )
  peers = [name for name in args.peers.split(',') if name]
  systems = ['ours'] if args.occupancy else ['ours', *peers]
  result = {
    'model': args.model,
    'dtype': args.dtype,
    'chains': dataclasses.asdict(settings),
    'lengths': chains_lib.describe(chains, len(prefix)),
    'machine': driver.describe_machine(),
    'systems': {system: {} for system in systems},
  }
  sizes = {'ours': args.slots, 'hf': args.hf_batches, 'tunix': args.tunix_batches}
  chosen = {}
  for system in systems:
    trials = {}
    if len(sizes[system]) > 1:
      trials = time_batches(system, args, folder, prefix, chains, sizes[system])
    chosen[system] = min(trials, key=trials.get) if trials else sizes[system][0]
    result['systems'][system] |= {'batch': chosen[system], 'trial_seconds': trials}
  with contextlib.ExitStack() as stack:
    asks = {}
    for system in systems:
      process, loaded = start_worker(system, args, folder, prefix, chains)
      stack.callback(process.close)
      asks[system] = process.ask
      result['systems'][system] |= {
        'versions': loaded['versions'],
        'load_seconds': loaded['seconds'],
      }
    if len(asks) > 1:
      result['agreement'] = compare_models(asks, hf['vocab_size'], workdir)
      check_agreement(result['agreement'], args.dtype)
    if args.repetitions:
      for system, ask in asks.items():
        warm = ask('run', batch=chosen[system], seed=0, warm=True)['seconds']
        result['systems'][system]['warm_up_seconds'] = warm
        log(f'{system}, warm-up: {warm:.1f} s')
      runs = repeat(asks, chosen, chains, args.repetitions)
      for system in systems:
        result['systems'][system] |= summarize(chains, runs[system])
        memory = asks[system]('memory')
        memory.pop('seconds')
        result['systems'][system] |= memory
      result['ratios'] = driver.ratios(runs)
      stats = result['systems']['ours']['stats']
      result['host_share'] = stats['host_seconds'] / stats['seconds']
    if args.roofline:
      result['roofline'] = asks['ours'](
        'roofline', batches=args.roofline_batches, repetitions=max(args.repetitions, 3)
      )
  return result


def format_table(result: dict) -> str:
  """Return the result as a text table."""
  lines = [
    f'{result["model"]}, {result["dtype"]}, {result["chains"]["chains"]} chains, '
    f'prefix {result["chains"]["prefix"]}; {result["machine"]["cores"]} cores',
    f'{"system":8}{"rows":>6}{"seconds":>10}{"chains/s":>10}{"tokens/s":>10}{"GB":>7}'
    f'{"others":>7}{"× ours":>21}',
  ]
  for system, row in result['systems'].items():
    if 'seconds' not in row:
      continue
    spread = driver.format_spread(result['ratios'].get(system))
    peak = row['peak_bytes'] or row['life_peak_bytes']
    lines.append(
      f'{system:8}{row["batch"]:6}{statistics.median(row["seconds"]):10.1f}'
      f'{row["chains_per_second"]:10.3f}{row["tokens_per_second"]:10.1f}{peak / 1e9:7.2f}'
      f'{max(row["other_load"]):7.2f}{spread:>21}'
    )
  if 'host_share' in result:
    stats = result['systems']['ours']['stats']
    lines.append(f'ours: occupancy {stats["occupancy"]:.3f}, host {result["host_share"]:.3f}')
  for system, row in result.get('agreement', {}).items():
    lines.append(
      f'{system}: logits differ by {row["largest_difference"]:.2g} of {row["largest_logit"]:.2g}; '
      f'greedy tokens equal in {row["equal_greedy_rows"]} of {row["rows"]} rows'
    )
  if 'roofline' in result:
    limits = result['roofline']['limits']
    lines.append(
      f'limits: {limits["bytes_per_second"] / 1e9:.1f} GB/s, '
      f'{limits["flops_per_second"] / 1e9:.0f} GFLOP/s'
    )
    for batch, row in result['roofline']['decode'].items():
      lines.append(
        f'decode, {batch} rows: {1e3 * row["step_seconds"]:.1f} ms a step, {row["share"]:.2f} of '
        f'the roofline ({row["share_allocated"]:.2f} by the allocated cache)'
      )
  return '\n'.join(lines)


def make_parser() -> argparse.ArgumentParser:
  """Return the parser of the command line."""
  parser = driver.make_parser(
    'experiments.bench.generation',
    __doc__,
    'runs/bench_generation',
    ['tiny', *models.SHAPES],
    ['hf', 'tunix'],
  )
  for name, default in (('slots', 8), ('hf_batches', 12), ('tunix_batches', 12)):
    parser.add_argument(
      f'--{name}',
      type=driver.parse_integers,
      default=[default],
      help=f'rows at once, default {default}; of several values the fastest is used',
    )
  parser.add_argument('--trial_chains', type=int, default=24, help='chains of such a trial')
  parser.add_argument(
    '--engine', default='{}', help='JSON with fields of EngineConfig other than slots'
  )
  parser.add_argument('--roofline', action='store_true', help="measure the machine's limits")
  parser.add_argument(
    '--roofline_batches', type=driver.parse_integers, default=[1, 32], help='rows of a decode step'
  )
  parser.add_argument('--occupancy', action='store_true', help='only our engine, 1,000 chains')
  for field in dataclasses.fields(chains_lib.ChainSettings):
    parser.add_argument(f'--{field.name}', type=field.type, help=f'default {field.default}')
  return parser


def main(argv: Sequence[str] | None = None) -> None:
  """Run the benchmark that the command line describes."""
  args = make_parser().parse_args(argv)
  driver.limit_cores(args.cores)
  result = benchmark(args)
  log(format_table(result))
  driver.write_result(result, args.workdir, 'bench_generation.json')


if __name__ == '__main__':
  main()
