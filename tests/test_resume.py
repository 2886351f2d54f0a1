"""Interrupted runs, and runs of several processes, end with the results of an uninterrupted one."""

import functools
import json
import os
import signal
import subprocess
import time

import numpy as np
import pytest
import safetensors.numpy

from cai_jax.data import d_cai
from cai_jax.data.quality import FLAGS
from tests.pipeline_setup import ROOT, launch_tiny, start_one, start_two


def command(random_model, workdir):
  fields = {
    'model.base': random_model,
    'feedback.shard_rows': 3,
    'sampling.initial.max_tokens': 24,
    'sampling.revision.max_tokens': 24,
    'sampling.critique.max_tokens': 24,
    'engine.slots': 8,
    'train.drop_truncated': False,
    'train.batch_size': 8,
    'train.checkpoint_every': 2,
    'train.helpfulness_share': 0.2,
    'train.epochs': 2,
    'prompts.harmful.limit': 60,
    'prompts.helpful.limit': 16,
    **{f'feedback.max_rate.{name}': 1.0 for name in FLAGS},  # a random model
  }
  return launch_tiny(workdir, 'generate,train', fields)


def results(workdir):
  """Bytes of all that a run makes for good: D_CAI's shards and the aligned model's weights."""
  paths = [*workdir.glob('d_cai/*.array_record-*'), *workdir.glob('model/*.safetensors')]
  return {path.name: path.read_bytes() for path in paths}


def progress(workdir):
  """Shards of D_CAI and logged training steps that are there."""
  metrics = workdir / 'metrics.jsonl'
  steps = len(metrics.read_bytes().splitlines()) if metrics.exists() else 0
  return len(list(workdir.glob('d_cai/*.array_record-*'))) + steps


@pytest.mark.parametrize(
  'moments', [(2, 28), pytest.param((13, 14, 25, 28, 29), marks=pytest.mark.slow)]
)
def test_a_killed_run_ends_with_the_same_bytes(random_model, tmp_path, moments):
  """SIGKILL after so many of 26 shards and of 6 steps, which are checkpointed by twos."""
  start = functools.partial(subprocess.Popen, cwd=ROOT, env=os.environ | {'XLA_FLAGS': ''})
  assert start(command(random_model, tmp_path / 'whole')).wait() == 0
  for moment in moments:
    process = start(command(random_model, tmp_path / 'killed'))
    while progress(tmp_path / 'killed') < moment:
      assert process.poll() is None
      time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
  assert start(command(random_model, tmp_path / 'killed')).wait() == 0
  assert results(tmp_path / 'killed') == results(tmp_path / 'whole')
  assert len(results(tmp_path / 'whole')) == 26 + 1


@pytest.mark.slow
@pytest.mark.parametrize('lost', [0, 1])
def test_next_start_finishes_what_a_lost_process_left(random_model, tmp_path, lost):
  """One of two is killed among 26 shards; then one process alone does what both left undone."""
  arguments = lambda name: [*command(random_model, tmp_path / name), '--stages=generate']  # noqa: E731
  assert start_one(arguments('whole'), 1).wait() == 0
  pair = start_two(arguments('cut'), 1)
  while progress(tmp_path / 'cut') < 6:
    assert [process.poll() for process in pair] == [None, None]
    time.sleep(0.005)
  for process in (pair[lost], pair[1 - lost]):  # the other cannot go on without it
    process.kill()
    process.wait()
  there = [name for name in results(tmp_path / 'cut') if not name.endswith('.tmp')]
  assert start_one(arguments('cut'), 1).wait() == 0
  assert results(tmp_path / 'cut') == results(tmp_path / 'whole')
  assert len(results(tmp_path / 'cut')) == 26
  counts = json.loads((tmp_path / 'cut' / 'manifest.json').read_text())['stages']['generate']
  missing = 3 * (26 - len(there)) - 2 * all('00025' not in name for name in there)  # of one row
  assert 0 < counts['sampled_rows'] == missing < 76
  assert len(list((tmp_path / 'cut' / 'journal').glob('turns-*'))) == 2


@pytest.mark.slow
def test_two_processes_give_the_results_of_one(random_model, tmp_path):
  """Two processes of two devices, each with its share of the prompts, against one of four."""
  arguments = lambda name: [*command(random_model, tmp_path / name), '--config.mesh.fsdp=2']  # noqa: E731
  assert start_one(arguments('one'), 4).wait() == 0
  pair = start_two(arguments('two'), 2)
  assert [process.wait() for process in pair] == [0, 0]
  assert len(list((tmp_path / 'two' / 'journal').glob('turns-*'))) == 2
  one, two = (d_cai.read_rows(tmp_path / name / 'd_cai') for name in ('one', 'two'))
  texts = lambda row: [row['initial']['text'], *(r['revision']['text'] for r in row['rounds'])]  # noqa: E731
  assert [(row['id'], texts(row)) for row in one] == [(row['id'], texts(row)) for row in two]
  weights = [
    safetensors.numpy.load_file(tmp_path / n / 'model' / 'model.safetensors')
    for n in ('one', 'two')
  ]
  for name, value in weights[0].items():
    np.testing.assert_allclose(value, weights[1][name], atol=1e-4)
