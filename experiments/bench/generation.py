"""How much faster are critique chains here than in peers, and how near the machine's limits?

Command:   python -m experiments.bench.generation --model=M --dtype=float32 --workdir=runs/bench
           --prefix=512 for demonstrations in front of every turn; --model=tiny; --roofline;
           --occupancy for 1,000 skewed chains through our engine alone
Hardware:  any; RESULTS.md tells of two CPU cores
Systems:   ours; Hugging Face transformers `generate` (left padding, stage by stage); the sampler of
           google-tunix 0.1.7 (stage by stage), which wants an environment of its own:
           --tunix_python
Method:    chains and reply lengths are drawn once and forced on all. Each system has a process of
           its own, with the same cores; one works at a time. After one warm-up each, the
           repetitions go round the systems, so that what else the machine does hits all alike;
           ratios are of seconds in the same round.

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

# Lengths of the 1,000 chains of --occupancy: about 43 tokens a reply, 128 the longest.
OCCUPANCY = dict(chains=1000, reply_median=34.0, reply_sigma=0.8, longest_reply=128)


def check_lengths(system: str, chains: Sequence[chains_lib.Chain], lengths) -> None:
  """RuntimeError unless every reply has its forced length."""
  wanted = [chain.limits for chain in chains]
  if lengths != wanted:
    wrong = next(
      i for i, pair in enumerate(zip(lengths, wanted, strict=True)) if pair[0] != pair[1]
    )
    raise RuntimeError(
      f'{system}: the replies of {chains[wrong].id} have {lengths[wrong]} tokens, not the forced '
      f'{wanted[wrong]}.'
    )


def repeat(
  asks: dict[str, Ask],
  batches: dict[str, int],
  chains: Sequence[chains_lib.Chain],
  repetitions: int,
  seed: int = 0,
) -> dict[str, list[dict]]:
  """The replies of each system's runs; each round begins with another system."""
  runs: dict[str, list[dict]] = {system: [] for system in asks}
  for repetition, system in driver.in_turn(list(asks), repetitions):
    reply = asks[system]('run', batch=batches[system], seed=seed * 1000 + repetition, warm=False)
    check_lengths(system, chains, reply.pop('lengths'))
    runs[system].append(reply)
    log(f'{system}, repetition {repetition + 1} of {repetitions}: {reply["seconds"]:.1f} s')
  return runs


def summarise(chains: Sequence[chains_lib.Chain], runs: list[dict]) -> dict:
  """What a system's runs come to; rates are those of the median run."""
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


def agreement(asks: dict[str, Ask], vocab_size: int, workdir: pathlib.Path) -> dict[str, dict]:
  """Whether peers compute the same model: difference of logits, and of most likely tokens."""
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


def check_agreement(found: dict[str, dict], dtype: str) -> None:
  """RuntimeError if a peer computes another model than ours, in f32."""
  for system, row in found.items():
    if dtype == 'float32' and row['largest_difference'] > 1e-3 * row['largest_logit']:
      raise RuntimeError(f'{system} does not compute the same model: {row}')


def start(
  system: str, args: argparse.Namespace, folder, prefix, chains
) -> tuple[driver.Process, dict]:
  """A worker with its model and chains; what loading it told."""
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


def best_batch(system: str, args, folder, prefix, chains, sizes: Sequence[int]) -> dict[int, float]:
  """Seconds of one pass over the first `trial_chains` chains at each batch size."""
  process, _ = start(system, args, folder, prefix, chains[: args.trial_chains])
  seconds = {}
  try:
    for size in sizes:
      process.ask('run', batch=size, seed=0, warm=True)
      seconds[size] = process.ask('run', batch=size, seed=0, warm=False)['seconds']
      log(f'{system}, trial with {size} rows: {seconds[size]:.1f} s')
  finally:
    process.close()  # so that the trials are not in the peak of memory
  return seconds


def settings_of(args: argparse.Namespace) -> chains_lib.ChainSettings:
  """The chains that the flags ask for."""
  base = chains_lib.ChainSettings(**(OCCUPANCY if args.occupancy else {}))
  names = [field.name for field in dataclasses.fields(base)]
  given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
  return dataclasses.replace(base, **given)


def benchmark(args: argparse.Namespace) -> dict:
  """The whole run, as JSON."""
  workdir = pathlib.Path(args.workdir)
  workdir.mkdir(parents=True, exist_ok=True)
  folder = models.folder(args.model, workdir)
  hf = json.loads((folder / 'config.json').read_text())
  settings = settings_of(args)
  prefix, chains = chains_lib.draw(settings, hf['vocab_size'])
  needed = chains_lib.longest(chains, len(prefix))
  if needed > hf['max_position_embeddings']:
    raise ValueError(
      f'the longest chain has {needed} tokens and model {args.model} was made for '
      f'{hf["max_position_embeddings"]}; lower --longest_prompt, --longest_reply or --prefix.'
    )
  peers = [name for name in args.peers.split(',') if name]
  systems = ['ours'] if args.occupancy else ['ours', *peers]
  result = {
    'model': args.model,
    'dtype': args.dtype,
    'chains': dataclasses.asdict(settings),
    'lengths': chains_lib.describe(chains, len(prefix)),
    'machine': driver.machine(),
    'systems': {system: {} for system in systems},
  }
  sizes = {'ours': args.slots, 'hf': args.hf_batches, 'tunix': args.tunix_batches}
  chosen = {}
  for system in systems:
    trials = {}
    if len(sizes[system]) > 1:
      trials = best_batch(system, args, folder, prefix, chains, sizes[system])
    chosen[system] = min(trials, key=trials.get) if trials else sizes[system][0]
    result['systems'][system] |= {'batch': chosen[system], 'trial_seconds': trials}
  with contextlib.ExitStack() as stack:
    asks = {}
    for system in systems:
      process, loaded = start(system, args, folder, prefix, chains)
      stack.callback(process.close)
      asks[system] = process.ask
      result['systems'][system] |= {
        'versions': loaded['versions'],
        'load_seconds': loaded['seconds'],
      }
    if len(asks) > 1:
      result['agreement'] = agreement(asks, hf['vocab_size'], workdir)
      check_agreement(result['agreement'], args.dtype)
    if args.repetitions:
      for system, ask in asks.items():
        warm = ask('run', batch=chosen[system], seed=0, warm=True)['seconds']
        result['systems'][system]['warm_up_seconds'] = warm
        log(f'{system}, warm-up: {warm:.1f} s')
      runs = repeat(asks, chosen, chains, args.repetitions)
      for system in systems:
        result['systems'][system] |= summarise(chains, runs[system])
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


def table(result: dict) -> str:
  """The result, for people."""
  lines = [
    f'{result["model"]}, {result["dtype"]}, {result["chains"]["chains"]} chains, '
    f'prefix {result["chains"]["prefix"]}; {result["machine"]["cores"]} cores',
    f'{"system":8}{"rows":>6}{"seconds":>10}{"chains/s":>10}{"tokens/s":>10}{"GB":>7}'
    f'{"others":>7}{"× ours":>21}',
  ]
  for system, row in result['systems'].items():
    if 'seconds' not in row:
      continue
    spread = driver.spread_text(result['ratios'].get(system))
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


def parser() -> argparse.ArgumentParser:
  """The flags."""
  flags = driver.parser(__doc__, 'runs/bench_generation', ['tiny', *models.SHAPES], ['hf', 'tunix'])
  flags.add_argument('--slots', type=driver.integers, default=[8], help='several are tried')
  flags.add_argument('--hf_batches', type=driver.integers, default=[12], help='several are tried')
  flags.add_argument(
    '--tunix_batches', type=driver.integers, default=[12], help='several are tried'
  )
  flags.add_argument('--trial_chains', type=int, default=24, help='chains of a trial')
  flags.add_argument('--engine', default='{}', help='JSON: fields of EngineConfig but slots')
  flags.add_argument('--roofline', action='store_true')
  flags.add_argument('--roofline_batches', type=driver.integers, default=[1, 32])
  flags.add_argument('--occupancy', action='store_true', help='our engine alone, 1,000 chains')
  for field in dataclasses.fields(chains_lib.ChainSettings):
    flags.add_argument(f'--{field.name}', type=field.type, help=f'default {field.default}')
  return flags


def main(argv: Sequence[str] | None = None) -> None:
  args = parser().parse_args(argv)
  driver.take_cores(args.cores)
  result = benchmark(args)
  log(table(result))
  driver.write(result, args.workdir, 'bench_generation.json')


if __name__ == '__main__':
  main()
