"""Test the generation benchmark's peers: the limit, time limits, rolling chains and the table."""

import functools
import json
import os
import subprocess
import sys
import time

import pytest
import torch

from experiments.bench import chains as chains_lib
from experiments.bench import driver, generation, limit, models, roofline, systems, worker
from experiments.bench.chains import ChainSettings

SETTINGS = ChainSettings(chains=5, longest_prompt=12, longest_reply=4, prefix=3)
SHAPE = models.Shape(
  layers=2, d_model=16, d_ff=24, heads=2, kv_heads=1, head_dim=8, vocab=1024, positions=256
)


def test_the_work_of_chains_is_what_no_program_can_avoid():
  # 'a' feeds 3 + 2 given tokens and 2 + 3 - 1 sampled ones. Its second token reads 3 tokens; after
  # 3 + 2 + 2 the first reply, the second and third of the next reply read 7 and 8.
  chains = [
    chains_lib.Chain('a', [20, 21, 22], [[23, 24]], [2, 3]),
    chains_lib.Chain('b', [20], [], [1]),  # feeds its prompt and reads nothing
  ]
  assert limit.count_work(chains, 0) == limit.Work(9 + 1, 6, 3 + 7 + 8)
  assert limit.count_work(chains, 100) == limit.Work(110, 6, 18)  # the prefix once, never read


def test_the_limit_is_products_and_reads_at_the_measured_rates():
  hf = models.hf_config(SHAPE)
  # q 16·16, k and v 16·8 each, o 16·16, gate, up and down 16·24 each; two layers
  matrices = 2 * (256 + 128 + 128 + 256 + 3 * 384)
  rates = {
    'layer_flops_per_second': 100.0,
    'output_flops_per_second': 200.0,
    'bytes_per_second': 50.0,
  }
  bound = limit.limit(limit.Work(10, 6, 18), hf, 'float32', rates)
  assert bound['layer_seconds'] == 2 * matrices * 10 / 100
  assert bound['output_seconds'] == 2 * 16 * 1024 * 6 / 200
  assert bound['read_seconds'] == (2 * 2 * 8 * 4) * 18 / 50  # K and V, layers, head, bytes
  parts = ('layer_seconds', 'output_seconds', 'read_seconds')
  assert bound['seconds'] == pytest.approx(sum(bound[part] for part in parts))
  half = limit.limit(limit.Work(10, 6, 18), hf, 'bfloat16', rates)
  assert half['read_seconds'] == bound['read_seconds'] / 2


def test_measured_rates_are_those_that_the_limit_needs():
  hf = models.hf_config(SHAPE)
  rates = roofline.layer_rate(limit.layer_shapes(hf), 8, 'bfloat16', 2)
  assert rates > 0
  shapes = {}

  def record(group, rows, dtype, layers):
    shapes[tuple(group), rows] = layers
    return float(rows)

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(roofline, 'layer_rate', record)
    patch.setattr(roofline, 'matmul_rate', lambda dtype: 1.0)
    patch.setattr(roofline, 'bandwidth', lambda: 2.0)
    measured = roofline.rates(limit.layer_shapes(hf), (16, 1024), 'float32')
  assert measured['layer_flops_per_second'] == max(roofline.ROWS['cpu'])
  joined = ((16, 32), (16, 16), (16, 48), (24, 16))
  assert {group for group, _ in shapes} == {
    tuple(limit.layer_shapes(hf)),
    joined,
    ((16, 1024),),
  }
  limit.limit(limit.Work(1, 1, 1), hf, 'float32', measured)  # has every rate


def test_rolling_chains_start_a_turn_when_the_last_has_ended():
  prefix, chains = chains_lib.draw(SETTINGS, 1024)
  left, most, contexts = {}, 0, {}

  def submit(request, context, count):
    contexts[request] = context
    left[request] = count

  def poll():  # a step of a system: one token for each request
    nonlocal most
    most = max(most, len(left))
    for request in left:
      left[request] -= 1
    ended = [request for request, count in left.items() if count == 0]
    for request in ended:
      del left[request]
    by_id = {chain.id: chain for chain in chains}
    turn = lambda request: int(request.split('/')[1])  # noqa: E731
    return [(r, [turn(r)] * by_id[r.split('/')[0]].limits[turn(r)]) for r in ended]

  replies = chains_lib.run_rolling(chains, prefix, 3, submit, poll)
  assert most == 3 and not left
  for chain, reply in zip(chains, replies, strict=True):
    assert reply == [[turn] * limit for turn, limit in enumerate(chain.limits)]
    for turn in range(len(chain.limits)):
      assert contexts[f'{chain.id}/{turn}'] == chain.context(prefix, reply[:turn])


def test_a_system_that_exceeds_its_time_is_stopped(tmp_path, monkeypatch):
  (tmp_path / 'experiments' / 'bench').mkdir(parents=True)
  sleeper = 'import sys, time\nfor line in sys.stdin:\n  time.sleep(60)\n'
  (tmp_path / 'experiments' / 'bench' / 'worker.py').write_text(sleeper)
  monkeypatch.setattr(driver, 'ROOT', tmp_path)
  budget = driver.Budget(0.2)
  process = driver.Process('vllm', sys.executable, 'cpu', budget=budget)
  row = {}
  start = time.monotonic()
  with driver.reporting('vllm', row):
    process.ask('run')
  process.close()
  assert time.monotonic() - start < 30
  assert row == {'stopped': "vllm: stopped during 'run', after 0 s in all."}
  assert budget.left <= 0 and generation.unfinished(row)


def test_a_stopped_system_keeps_its_repetitions_and_the_others_go_on():
  chains = chains_lib.draw(SETTINGS, 1024)[1]
  calls = []

  def answer(system, op, **request):
    calls.append((system, op))
    if calls.count(('slow', 'run')) == 2 and system == 'slow':
      raise driver.TimeLimitError('slow: stopped')
    if op == 'memory':
      return {'life_peak_bytes': 1, 'device_peak_bytes': None}
    return {'seconds': 1.0 + request['seed'], 'lengths': [chain.limits for chain in chains]}

  names = ('ours', 'hf', 'slow')
  asks = {system: functools.partial(answer, system) for system in names}
  rows = {system: {'batch': 1} for system in names}
  runs = generation.repeat(asks, rows, chains, repetitions=3)
  assert {system: len(r) for system, r in runs.items()} == {'ours': 3, 'hf': 3, 'slow': 1}
  assert rows['slow']['stopped'] == 'slow: stopped' and 'stopped' not in rows['hf']
  assert calls.count(('slow', 'run')) == 2  # and never asked again
  assert set(driver.ratios(runs)) == {'hf', 'slow'}
  assert driver.ratios({'ours': runs['ours'], 'slow': []}) == {}


def test_the_table_has_the_limit_and_says_who_was_stopped():
  row = {'batch': 8, 'seconds': [2.0, 4.0, 5.0], 'other_load': [0.1], 'peak_bytes': 3e9}
  row |= {'chains_per_second': 1.0, 'tokens_per_second': 2.0, 'share_of_limit': 0.7}
  rates = dict.fromkeys(('layer_flops_per_second', 'output_flops_per_second'), 4e11)
  result = {
    'model': 'M',
    'dtype': 'float32',
    'chains': {'chains': 24, 'prefix': 0},
    'machine': {'cores': 2},
    'systems': {'ours': row, 'vllm': {'batch': 8, 'stopped': 'vllm: stopped in all.'}},
    'ratios': {},
    'limit': {
      'seconds': 2.8,
      'layer_seconds': 2.0,
      'output_seconds': 0.5,
      'read_seconds': 0.3,
      'rates': rates | {'bytes_per_second': 4e10, 'other_load': 0.0},
    },
  }
  lines = generation.format_table(result).splitlines()
  assert lines[2].split() == ['ours', '8', '4.0', '1.000', '2.0', '3.00', '0.10', '0.70']
  assert lines[3].split(maxsplit=1) == ['vllm', 'vllm: stopped in all.']
  assert lines[4].startswith('limit: 2.8 s = layers 2.0 (at 400 GFLOP/s)')


def test_gpus_have_their_own_peers_and_rows():
  parse = lambda text: generation.make_parser().parse_args(text.split())  # noqa: E731
  assert systems.select(parse('')) == ['ours', 'hf']
  gpu = parse('--platform=cuda')
  assert systems.select(gpu) == ['ours', 'hf_static', 'hf_continuous']
  assert all(systems.rows_to_try(system, gpu) == [64, 128] for system in systems.select(gpu))
  assert systems.rows_to_try('vllm', parse('--platform=cuda --vllm_batches=256')) == [256]
  assert systems.select(parse('--occupancy --peers=vllm')) == ['ours']
  with pytest.raises(ValueError, match='has llama; use some of hf, '):
    systems.select(parse('--peers=vllm,llama'))


@pytest.fixture
def one_thread():
  """Let torch use one thread: beside other work, several mostly wait for each other."""
  threads = torch.get_num_threads()
  torch.set_num_threads(1)
  yield
  torch.set_num_threads(threads)


@pytest.mark.slow
def test_static_and_continuous_peers_compute_the_same_model(tmp_path, one_thread):
  folder = tmp_path / 'model'
  models.write_model(folder, SHAPE)
  settings = ChainSettings(chains=3, rounds=1, longest_prompt=12, longest_reply=3, prefix=3)
  prefix, chains = chains_lib.draw(settings, SHAPE.vocab)
  asks, rows = {}, {}
  args = generation.make_parser().parse_args([])
  for system in ('ours', 'hf_static', 'hf_continuous'):
    ask = functools.partial(lambda state, op, **r: worker.handle(state, {'op': op, **r}), {})
    options = systems.system_options(system, args, folder)
    if system == 'hf_continuous':
      options = {'cache_gib': 0.01}
    ask('load', system=system, folder=str(folder), dtype='float32', platform='cpu', options=options)
    ask('take', chains=worker.encode_chains(chains), prefix=prefix)
    asks[system], rows[system] = ask, {'batch': 2}
  comparison = generation.compare_models(asks, rows, SHAPE.vocab, tmp_path)
  assert [row['equal_greedy_rows'] for row in comparison.values()] == [8, 8]
  del asks['ours']
  runs = generation.repeat(asks, rows, chains, repetitions=1)  # checks the lengths
  assert all(len(r) == 1 for r in runs.values()) and not any(
    map(generation.unfinished, rows.values())
  )


@pytest.mark.slow
@pytest.mark.parametrize('peer', ['vllm', 'openvino'])
def test_the_generation_benchmark_runs_with_peers_of_other_environments(tmp_path, peer):
  variable = f'{peer.upper()}_PYTHON'
  if variable not in os.environ:
    pytest.skip(f'${variable} names no interpreter of an environment with {peer}')
  flags = f'--model=S --peers={peer} --chains=3 --repetitions=1 --slots=2 --{peer}_batches=1,2 '
  flags += f'--{peer}_python={os.environ[variable]} --workdir={tmp_path}'
  command = [sys.executable, '-m', 'experiments.bench.generation', *flags.split()]
  environment = {k: v for k, v in os.environ.items() if k != 'XLA_FLAGS'}  # one device
  done = subprocess.run(command, capture_output=True, text=True, env=environment)
  assert done.returncode == 0, done.stderr
  result = json.loads(done.stdout)
  assert set(result['ratios']) == {peer}
  assert set(result['systems'][peer]['trial_seconds']) == {'1', '2'}
  agreement = result['agreement'][peer]
  assert agreement['equal_greedy_rows'] == agreement['rows']
