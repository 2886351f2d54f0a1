"""Test the benchmarks: their chains and examples, the agreement of systems, and the JSON."""

import functools
import itertools
import json
import os
import subprocess
import sys

import numpy as np
import pytest

from experiments.bench import chains as chains_lib
from experiments.bench import (
  driver,
  generation,
  models,
  roofline,
  training,
  training_systems,
  worker,
)
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


@pytest.mark.slow
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
      system=training_systems.SYSTEMS[system],
      folder=str(folder),
      dtype='float32',
      platform='cpu',
      options=training_systems.options(system, args, WORK),
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


@pytest.mark.slow
def test_all_systems_have_the_same_losses_padded_or_packed(trained):
  asks, examples, packed = trained
  batches = {'ours': 0, 'hf_padded': 4, 'hf_packed': 2}
  size = len(examples) // len(packed)
  losses = training.common_losses(asks, batches, examples, packed, size)
  comparison = training.compare_losses(losses)
  training.check_agreement(comparison, 'float32')
  assert len(set(comparison['ours']['losses'])) == training.AGREE_STEPS  # steps were taken
  padded = examples_lib.padded_steps(len(examples), len(packed))
  for system, ask in asks.items():
    steps = padded if system == 'hf_padded' else packed
    ask('take_examples', examples=examples, steps=steps)
    assert ask('warm', batch=batches[system])['shapes'] == 1
  runs = training.repeat(asks, batches, WORK.steps, 2, {system: {} for system in asks})
  rows = {}
  for system, done in runs.items():
    steps = padded if system == 'hf_padded' else packed
    rows[system] = training.summarize(examples, steps, done, WORK.steps)
  assert rows['hf_packed']['padding_share'] == 0.0 < rows['ours']['padding_share'] < 0.2
  assert rows['hf_padded']['padding_share'] > rows['ours']['padding_share']
  tokens = [training.count_tokens(examples, packed[at : at + 2])[0] for at in (0, 2)]
  rates = rows['ours']['tokens_per_second']
  assert rates == [t / s for t, s in zip(tokens, rows['ours']['seconds'], strict=True)]
  assert set(training.ratios(rows)) == {'hf_padded', 'hf_packed'}
  assert json.loads(json.dumps(rows)) == rows


def test_a_system_that_is_stopped_keeps_its_repetitions_and_the_others_go_on(trained):
  asks, examples, packed = trained
  asks['ours']('take_examples', examples=examples, steps=packed)
  calls = iter([False, True])

  def stop_at_the_second(op, **request):
    if next(calls):
      raise driver.TimeLimitError('stopped after 5 s in all.')
    return asks['ours'](op, **request)

  rows = {'ours': {}, 'trl': {}}
  asks = {'ours': asks['ours'], 'trl': stop_at_the_second}
  runs = training.repeat(asks, {'ours': 0, 'trl': 1}, 1, 3, rows)
  assert [len(runs[system]) for system in ('ours', 'trl')] == [3, 1]
  assert rows == {'ours': {}, 'trl': {'stopped': 'stopped after 5 s in all.'}}
  size = {system: training.summarize(examples, packed, runs[system], 1) for system in runs}
  assert len(size['trl']['seconds']) == 1
  assert size['trl']['tokens_per_second'][0] * size['trl']['seconds'][0] == pytest.approx(
    training.count_tokens(examples, packed[:1])[0]
  )
  assert set(training.ratios(size)) == {'trl'}


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
