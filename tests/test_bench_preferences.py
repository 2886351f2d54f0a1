"""The benchmark of preference training: its pairs, its steps and what it divides."""

import json
import os
import subprocess
import sys

import pytest

from experiments.bench import examples as examples_lib
from experiments.bench import pairs, preferences, step_profile

WORK = preferences.WORK['S']


def test_the_sides_of_a_pair_share_a_prompt_and_depend_on_the_seed_alone():
  examples = pairs.draw(examples_lib.EMBEDDED, 20, 300)
  assert examples == pairs.draw(examples_lib.EMBEDDED, 30, 300)[:40]
  for chosen, rejected in pairs.pair_up(examples):
    assert chosen.prompt == rejected.prompt
    assert chosen.tokens[: chosen.prompt] == rejected.tokens[: chosen.prompt]
    assert chosen.tokens != rejected.tokens
    assert max(len(chosen.tokens), len(rejected.tokens)) <= examples_lib.EMBEDDED.longest


@pytest.mark.parametrize('shared', [True, False])
def test_every_pair_is_trained_on_once(shared):
  examples, steps = preferences.plan_steps(WORK, repetitions=3, vocab_size=300, shared=shared)
  assert len(steps) == 3 * WORK.steps and all(len(rows) <= WORK.rows for rows in steps)
  indices = [i for rows in steps for row in rows for i in row]
  assert sorted(indices) == list(range(len(examples) // 2))
  lengths = pairs.pair_lengths(examples, shared)
  rows = [sum(lengths[i] for i in row) for rows in steps for row in rows]
  assert max(rows) <= WORK.row_length and sum(rows) > 0.8 * len(rows) * WORK.row_length


def test_rates_count_pairs_and_ratios_are_paired_by_repetition():
  examples = pairs.draw(examples_lib.EMBEDDED, 4, 300)
  steps = [[[0, 1], [2]], [[3]]]
  run = {'cpu_seconds': 1, 'other_load': 0, 'places': 1000, 'peak_bytes': 5, 'losses': [0.7]}
  runs = [run | {'seconds': 2.0, 'reference_seconds': 1.0}]
  runs.append(run | {'seconds': 0.5, 'reference_seconds': 0.5})
  row = preferences.summarize(pairs.pair_lengths(examples), steps, runs, 1)
  assert row['pairs_per_second'] == [1.5, 2.0]
  assert row['pairs_per_second_with_reference'] == [1.0, 1.0]
  assert row['padding_share'] == 1 - sum(pairs.pair_lengths(examples)) / 2000
  peer = row | {'pairs_per_second': [0.5, 1.0]}
  ratios = preferences.ratios({'ours': row, 'trl': peer}, 'pairs_per_second')
  assert ratios == {'trl': {'median': 2.5, 'min': 2.0, 'max': 3.0}}


def test_rows_hold_the_longest_pair():
  args = preferences.make_parser().parse_args(['--model=S', '--row_length=150'])
  with pytest.raises(ValueError, match='less than the longest pair, 192'):
    preferences.select_work(args)


@pytest.mark.slow
def test_the_benchmark_runs_and_writes_json(tmp_path):
  """With TRL as well, if CAI_JAX_TRL names the Python of an environment with it."""
  python = os.environ.get('CAI_JAX_TRL')
  peers = 'trl,trl_default' if python else ''
  flags = f'--model=S --repetitions=2 --trl=2,4 --peers={peers} --workdir={tmp_path} '
  flags += f'--trl_python={python}' if python else ''
  environment = {k: v for k, v in os.environ.items() if k != 'XLA_FLAGS'}  # one device
  done = subprocess.run(
    [sys.executable, '-m', 'experiments.bench.preferences', *flags.split()],
    capture_output=True,
    text=True,
    env=environment,
  )
  assert done.returncode == 0, done.stderr
  result = json.loads(done.stdout)
  assert result == json.loads((tmp_path / 'bench_preferences.json').read_text())
  systems = result['systems']
  assert list(systems) == ['ours', *filter(None, peers.split(','))]
  assert set(result['ratios']) == set(systems) - {'ours'}
  assert len(systems['ours']['pairs_per_second']) == 2
  assert all(row['peak_bytes'] > 0 for row in systems.values())


def test_operations_count_without_those_inside_them():
  events = [(0, 10, 'loop'), (1, 3, 'product'), (4, 2, 'product'), (7, 1, 'sum'), (10, 5, 'sum')]
  assert step_profile.own_times(events) == {'loop': 4, 'product': 5, 'sum': 6}
