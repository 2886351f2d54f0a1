"""Test the benchmarks: their chains and examples, the agreement of systems, and the JSON."""

import functools
import itertools
import json
import os
import subprocess
import sys
import time

import numpy as np
import pytest

from experiments.bench import chains as chains_lib
from experiments.bench import driver, generation, limit, models, roofline, systems, training, worker
from experiments.bench import examples as examples_lib
from experiments.bench.chains import ChainSettings

SETTINGS = ChainSettings(chains=5, longest_prompt=12, longest_reply=4, prefix=3)
SHAPE = models.Shape(
  layers=2, d_model=16, d_ff=24, heads=2, kv_heads=1, head_dim=8, vocab=1024, positions=256
)


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  target = tmp_path_factory.mktemp('bench') / 'model'
  models.write_model(target, SHAPE)
  return target


@pytest.fixture(scope='module')
def loaded(folder):
  """Return functions that ask ours and transformers in this process, and the chains."""
  prefix, chains = chains_lib.draw(SETTINGS, SHAPE.vocab)
  asks = {}
  for system in ('ours', 'hf'):
    ask = functools.partial(lambda state, op, **r: worker.handle(state, {'op': op, **r}), {})
    ask('load', system=system, folder=str(folder), dtype='float32', platform='cpu', options={})
    ask('take', chains=worker.encode_chains(chains), prefix=prefix)
    asks[system] = ask
  return asks, chains


def test_chains_depend_only_on_settings_and_seed():
  assert chains_lib.draw(SETTINGS, 1024) == chains_lib.draw(SETTINGS, 1024)
  assert chains_lib.draw(SETTINGS, 1024) != chains_lib.draw(SETTINGS, 1024, seed=1)


def test_a_context_grows_by_the_reply_and_the_request():
  prefix, (chain, *_) = chains_lib.draw(SETTINGS, 1024)
  replies = [[1] * limit for limit in chain.limits]
  contexts = [chain.context(prefix, replies[:turn]) for turn in range(5)]
  assert contexts[0] == prefix + chain.prompt
  for turn, (before, after) in enumerate(itertools.pairwise(contexts)):
    assert after == before + replies[turn] + chain.requests[turn]
  assert [len(c) for c in contexts] == [chain.context_length(t, len(prefix)) for t in range(5)]
  assert len(chains_lib.turn_names(2)) == len(chain.limits) == 5


def test_lengths_are_skewed_and_within_bounds():
  settings = ChainSettings(chains=400)
  _, chains = chains_lib.draw(settings, 1024)
  lengths = chains_lib.describe(chains, 0)
  assert lengths['reply']['p50'] < lengths['reply']['mean'] < lengths['reply']['max'] / 2
  assert lengths['reply']['max'] == settings.longest_reply
  assert all(1 <= limit <= settings.longest_reply for c in chains for limit in c.limits)
  assert all(12 <= len(request) <= 30 for c in chains for request in c.requests)
  ids = [i for c in chains for i in c.prompt]
  assert min(ids) >= chains_lib.FIRST_ID and max(ids) < 1024


def test_systems_agree_and_force_lengths(loaded, tmp_path):
  asks, chains = loaded
  rows = {'ours': {'batch': 8}, 'hf': {'batch': 3}}
  comparison = generation.compare_models(asks, rows, SHAPE.vocab, tmp_path)
  generation.check_agreement(comparison, 'float32')
  assert comparison['hf']['equal_greedy_rows'] == comparison['hf']['rows']
  assert not list(tmp_path.iterdir())
  runs = generation.repeat(asks, rows, chains, repetitions=2)
  assert {system: len(r) for system, r in runs.items()} == {'ours': 2, 'hf': 2}
  summary = generation.summarize(chains, runs['ours'])
  tokens = sum(limit for chain in chains for limit in chain.limits)
  assert summary['stats']['sampled_tokens'] == tokens
  assert summary['stats']['chains'] == len(chains)
  assert json.loads(json.dumps(summary)) == summary


def test_a_reply_of_the_wrong_length_is_an_error(loaded):
  _, chains = loaded
  lengths = [list(chain.limits) for chain in chains]
  generation.check_lengths('hf', chains, lengths)
  lengths[1][2] += 1
  with pytest.raises(RuntimeError, match='hf: the replies of chain_1'):
    generation.check_lengths('hf', chains, lengths)


def test_a_peer_with_a_different_model_is_an_error():
  row = {'largest_logit': 5.0, 'largest_difference': 0.1, 'equal_greedy_rows': 0, 'rows': 4}
  with pytest.raises(RuntimeError, match='not compute the same model'):
    generation.check_agreement({'hf': row}, 'float32')
  generation.check_agreement({'hf': row}, 'bfloat16')


def test_ratios_compare_runs_of_the_same_repetition():
  runs = {
    'ours': [{'seconds': s} for s in (1.0, 2.0, 4.0)],
    'hf': [{'seconds': s} for s in (3.0, 8.0, 8.0)],
  }
  assert driver.ratios(runs) == {'hf': {'median': 3.0, 'min': 2.0, 'max': 4.0}}


def test_a_decode_step_is_bound_by_reading_or_by_arithmetic():
  limits = {'bytes_per_second': 100.0, 'flops_per_second': 1000.0}
  assert roofline.bound(50, 4, 1, 300, limits) == pytest.approx(2.0 + 3.0)  # reading binds
  assert roofline.bound(50, 4, 32, 300, limits) == pytest.approx(3.2 + 96.0)  # arithmetic binds
  shares = roofline.shares([10.0, 9.0, 20.0], 50, 4, 1, 300, 600, limits)
  assert (shares['share'], shares['share_allocated']) == (pytest.approx(0.5), pytest.approx(0.8))


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
  with generation.reporting('vllm', row):
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
      'rates': rates | {'bytes_per_second': 4e10},
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


def test_static_and_continuous_peers_compute_the_same_model(folder, tmp_path):
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


def test_flags_set_the_sizes_of_chains():
  args = generation.make_parser().parse_args(['--occupancy', '--chains=7', '--prefix=2'])
  settings = generation.chain_settings(args)
  assert (settings.chains, settings.prefix, settings.longest_reply) == (7, 2, 128)


def test_random_matrices_have_the_stated_standard_deviation(folder):
  from safetensors.numpy import load_file

  table = load_file(folder / 'model.safetensors')['model.embed_tokens.weight']
  assert np.std(table) == pytest.approx(2 / SHAPE.d_model**0.5, rel=0.05)


WORK = training.Work(examples_lib.EMBEDDED, row_length=128, rows=8, accumulation=1, steps=2)


@pytest.fixture(scope='module')
def trained(folder):
  """Return functions that ask ours and transformers, and the examples and packed steps."""
  examples, packed = training.plan_steps(WORK, 2, SHAPE.vocab)
  args = training.make_parser().parse_args([])
  asks = {}
  for system in ('ours', 'hf_padded', 'hf_packed'):
    ask = functools.partial(lambda state, op, **r: worker.handle(state, {'op': op, **r}), {})
    ask(
      'load',
      system=training.SYSTEMS[system],
      folder=str(folder),
      dtype='float32',
      platform='cpu',
      options=training.system_options(system, args, WORK),
    )
    asks[system] = ask
  return asks, examples, packed


def test_steps_have_each_example_once():
  examples, packed = training.plan_steps(WORK, 3, 1024)
  padded = examples_lib.padded_steps(len(examples), len(packed))
  assert len(packed) == len(padded) == 6
  for steps in (packed, padded):
    assert sorted(i for rows in steps for row in rows for i in row) == list(range(len(examples)))
  assert {len(rows) for rows in padded} <= {len(examples) // 6, len(examples) // 6 + 1}
  for row in (row for rows in packed for row in rows):
    assert sum(len(examples[i].tokens) for i in row) <= WORK.row_length
  assert training.plan_steps(WORK, 3, 1024) == (examples, packed)
  assert examples_lib.draw(WORK.lengths, 7, 1024) == examples[:7]


def test_common_steps_have_the_same_examples():
  packed = [[[0, 1], [2]], [[3], [4]], [[5, 6], [7, 8], [9]]]
  common = examples_lib.common_steps(packed, 3, 3)
  assert common == [[[0, 1], [2]], [[5, 6], [7]], [[0, 1], [2]]]
  assert examples_lib.unpack_rows(common)[1] == [[5], [6], [7]]
  with pytest.raises(ValueError, match='no step has 6'):
    examples_lib.common_steps(packed, 6, 1)


def test_a_step_is_split_evenly():
  rows = [[i] for i in range(10)]
  assert [len(part) for part in examples_lib.split(rows, 4)] == [3, 4, 3]
  assert examples_lib.split(rows, 0) == [rows]
  assert [i for part in examples_lib.split(rows, 4) for i in part] == rows


def test_padding_is_neither_real_nor_a_target():
  example = examples_lib.Example([20, 21, 22], prompt=2)
  tokens, real, targets = examples_lib.pad([example], 5)
  assert tokens.tolist() == [[20, 21, 22, 0, 0]]
  assert real.tolist() == [[1, 1, 1, 0, 0]] and targets.tolist() == [[0, 0, 1, 0, 0]]


def test_all_systems_have_the_same_losses_padded_or_packed(trained):
  asks, examples, packed = trained
  batches = {'ours': 0, 'hf_padded': 4, 'hf_packed': 2}
  size = len(examples) // len(packed)
  comparison = training.compare_losses(asks, batches, examples, packed, size)
  training.check_agreement(comparison, 'float32')
  assert len(set(comparison['ours']['losses'])) == training.AGREE_STEPS  # steps were taken
  padded = examples_lib.padded_steps(len(examples), len(packed))
  for system, ask in asks.items():
    steps = padded if system == 'hf_padded' else packed
    ask('take_examples', examples=examples, steps=steps)
    assert ask('warm', batch=batches[system])['shapes'] == 1
  runs = training.repeat(asks, batches, WORK.steps, 2)
  rows = {
    system: training.summarize(examples, padded if system == 'hf_padded' else packed, runs[system])
    for system in asks
  }
  assert rows['hf_packed']['padding_share'] == 0.0 < rows['ours']['padding_share'] < 0.2
  assert rows['hf_padded']['padding_share'] > rows['ours']['padding_share']
  tokens = [training.count_tokens(examples, packed[at : at + 2])[0] for at in (0, 2)]
  rates = rows['ours']['tokens_per_second']
  assert rates == [t / s for t, s in zip(tokens, rows['ours']['seconds'], strict=True)]
  assert set(training.ratios(rows)) == {'hf_padded', 'hf_packed'}
  assert json.loads(json.dumps(rows)) == rows


def test_a_peer_with_different_losses_is_an_error():
  row = {'losses': [1.0], 'largest': 2e-4}
  with pytest.raises(RuntimeError, match='not compute the same losses'):
    training.check_agreement({'hf_padded': row}, 'float32')
  training.check_agreement({'hf_padded': row}, 'bfloat16')


def test_flags_set_the_training_work():
  args = training.make_parser().parse_args(['--model=S', '--rows=6', '--row_length=200'])
  work = training.select_work(args)
  assert (work.rows, work.row_length, work.steps) == (6, 200, 2)
  args.row_length = 90
  with pytest.raises(ValueError, match='less than the longest example, 96'):
    training.select_work(args)


@pytest.mark.slow
def test_the_training_benchmark_runs_and_writes_json(tmp_path):
  flags = '--model=tiny --peers=hf_padded,hf_packed --steps=2 --repetitions=1 --hf_padded=8,0 '
  command = [sys.executable, '-m', 'experiments.bench.training', *flags.split()]
  environment = {k: v for k, v in os.environ.items() if k != 'XLA_FLAGS'}  # one device
  done = subprocess.run(
    [*command, f'--workdir={tmp_path}'], capture_output=True, text=True, env=environment
  )
  assert done.returncode == 0, done.stderr
  result = json.loads(done.stdout)
  assert result == json.loads((tmp_path / 'bench_training.json').read_text())
  assert set(result['ratios']) == {'hf_padded', 'hf_packed'}
  assert result['systems']['hf_padded']['rows_at_once'] in (8, 0)
  assert all(row['peak_bytes'] > 0 for row in result['systems'].values())


@pytest.mark.slow
def test_the_generation_benchmark_runs_and_writes_json(tmp_path):
  flags = '--model=tiny --peers=hf --chains=3 --longest_reply=4 --repetitions=1 --slots=2 '
  flags += f'--hf_batches=1,3 --trial_chains=2 --workdir={tmp_path}'
  command = [sys.executable, '-m', 'experiments.bench.generation', *flags.split()]
  environment = {k: v for k, v in os.environ.items() if k != 'XLA_FLAGS'}  # one device
  done = subprocess.run(command, capture_output=True, text=True, env=environment)
  assert done.returncode == 0, done.stderr
  result = json.loads(done.stdout)
  assert result == json.loads((tmp_path / 'bench_generation.json').read_text())
  assert set(result['ratios']) == {'hf'}
  assert result['systems']['hf']['batch'] in (1, 3)
  assert result['systems']['ours']['peak_bytes'] > 0
  assert 0 < result['systems']['ours']['share_of_limit']
  assert result['limit']['sampled_tokens'] <= 3 * 5 * 4
