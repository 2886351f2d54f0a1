"""Generating D_CAI: its content, resuming, sharing turns, and several processes."""

import dataclasses
import json

import jax
import numpy as np
import pytest
import tensorflow_datasets as tfds
from jax.experimental import multihost_utils

from cai_jax.data.d_cai import read_rows, shard_path
from cai_jax.feedback import shards
from cai_jax.feedback.generate import finish_dataset, generate_shards
from cai_jax.runtime.errors import UserError
from cai_jax.runtime.replicas import Replica
from cai_jax.sampling.journal import Journal
from tests.feedback_setup import CONSTITUTION, ENGINE, PRINCIPLES, make_job, make_lm, shard_bytes


@pytest.fixture(scope='module')
def lm(tiny_tokenizer):
  return make_lm(tiny_tokenizer)


def generate(job, folder, journal):
  """Generate a whole dataset; return the counts and the rows."""
  counts = generate_shards(job, folder, journal, ENGINE)
  finish_dataset(job, folder)
  return counts, read_rows(folder)


def test_d_cai_is_a_tfds_dataset_with_every_text_of_its_chains(lm, tmp_path):
  counts, rows = generate(make_job(lm), tmp_path / 'd_cai', Journal(tmp_path / 'journal'))
  assert counts['rows'] == 8 and counts['turns'] == 6 * 5 + 2
  builder = tfds.builder_from_directory(tmp_path / 'd_cai')
  assert builder.info.splits['train'].num_examples == 8
  assert [row['id'] for row in rows] == [*(f'id-{i}' for i in range(6)), 'id-100', 'id-101']
  for row in rows:
    assert len(row['rounds']) == (2 if row['kind'] == 'harmful' else 0)
    turns = [row['initial']]
    turns += [step[part] for step in row['rounds'] for part in ('critique', 'revision')]
    assert len(row['logprobs']) == sum(turn['num_tokens'] for turn in turns)
    first = row['logprobs'][: turns[0]['num_tokens']]
    assert turns[0]['logprob'] == pytest.approx(sum(first), rel=1e-5)
    assert all(turn['finish_reason'] in ('stop', 'length') for turn in turns)
    assert row['model'] == row['critique_model'] == 'random' and row['seed'] == 0
    assert json.loads(row['metadata'])['n'] in row['id']
    assert row['constitution'] == CONSTITUTION.fingerprint()
  drawn = {step['principle'] for row in rows for step in row['rounds']}
  assert len(drawn) > 1 and drawn <= {p.id for p in PRINCIPLES}


def test_interrupted_run_resumes_to_the_same_bytes(lm, tmp_path):
  whole = tmp_path / 'whole'
  generate_shards(make_job(lm), whole, Journal(tmp_path / 'a'), ENGINE)

  class Interrupted(Exception):
    pass

  for stop_at in (1, 3, 5, 7):
    folder, journal = tmp_path / f'{stop_at}', Journal(tmp_path / f'journal-{stop_at}')

    def progress(done, total, tokens, stop_at=stop_at):
      if done == stop_at:
        raise Interrupted

    with pytest.raises(Interrupted):
      generate_shards(make_job(lm), folder, journal, ENGINE, progress)
    journal.close()
    journal = Journal(tmp_path / f'journal-{stop_at}')
    counts = generate_shards(make_job(lm), folder, journal, ENGINE)
    assert counts['turns'] < 32
    assert shard_bytes(folder) == shard_bytes(whole)


def test_jobs_share_the_turns_that_they_have_in_common(lm, tmp_path):
  journal = Journal(tmp_path / 'journal')
  generate_shards(make_job(lm), tmp_path / 'two', journal, ENGINE)
  three = generate_shards(make_job(lm, rounds=3), tmp_path / 'three', journal, ENGINE)
  assert three['replayed_turns'] == 6 * 5 + 2 and three['turns'] == 6 * 2
  direct = generate_shards(make_job(lm, variant='direct'), tmp_path / 'direct', journal, ENGINE)
  assert direct['replayed_turns'] == 8 and direct['turns'] == 6 * 2


def test_controls_share_initial_responses_and_do_not_revise_helpful_prompts(lm, tmp_path):
  journal = Journal(tmp_path / 'journal')
  generate_shards(make_job(lm), tmp_path / 'critique', journal, ENGINE)
  journal.refresh()
  for variant, turns in (('empty', 6 * 2), ('shuffled', 6 * (1 + 2 * 2 + 2))):
    counts, rows = generate(make_job(lm, variant=variant), tmp_path / variant, journal)
    assert (counts['turns'], counts['replayed_turns']) == (turns, 6 + 2)
    assert [len(row['rounds']) for row in rows] == [2] * 6 + [0] * 2


def test_another_model_can_write_the_critiques(lm, tmp_path):
  other = dataclasses.replace(
    lm, params=jax.tree.map(lambda x: -x, lm.params), name='other', fingerprint='other'
  )
  job = make_job(lm, models={'base': lm, 'critique': other})
  row = generate(job, tmp_path / 'two', Journal(tmp_path / 'journal'))[1][0]
  assert (row['model'], row['critique_model'], row['revision_model']) == (
    'random', 'other', 'random',
  )  # fmt: skip
  alone = generate(make_job(lm), tmp_path / 'one', Journal(tmp_path / 'journal2'))[1][0]
  assert row['initial'] == alone['initial']
  assert row['rounds'][0]['critique'] != alone['rounds'][0]['critique']


def test_principles_of_a_prompt_depend_on_its_id_and_not_on_other_prompts(lm, tmp_path):
  drawn = {}
  for name, job in (('more', make_job(lm)), ('fewer', make_job(lm, num_harmful=3))):
    _, rows = generate(job, tmp_path / name, Journal(tmp_path / 'journal'))
    drawn[name] = {r['id']: [step['principle'] for step in r['rounds']] for r in rows}
  assert drawn['fewer'].items() <= drawn['more'].items()


def test_shards_of_another_job_are_an_error(lm, tmp_path):
  generate_shards(make_job(lm), tmp_path, Journal(tmp_path / 'journal'), ENGINE)
  other = dataclasses.replace(lm, fingerprint='trained since')
  with pytest.raises(UserError, match='shards of another job'):
    generate_shards(make_job(other), tmp_path, Journal(tmp_path / 'journal'), ENGINE)


class Lost(Exception):
  """A process died."""


@pytest.fixture
def start(lm, tmp_path, monkeypatch):
  """`start(process, count, ...)` does the work of one of several processes, one after another.

  Process 0 must start first. The others receive its list of shards, as a broadcast would send it.
  """
  sent = []

  def broadcast(array):
    if jax.process_index() == 0:
      sent[:] = [np.array(array)]
    return sent[0]

  monkeypatch.setattr(multihost_utils, 'broadcast_one_to_all', broadcast)
  monkeypatch.setattr(multihost_utils, 'process_allgather', lambda outcome: np.array([outcome]))

  def run(process, count, folder='d_cai', lost_after=None, job=None):
    monkeypatch.setattr(jax, 'process_index', lambda: process)
    monkeypatch.setattr(jax, 'process_count', lambda: count)

    def progress(done, total, tokens):
      if done == lost_after:
        raise Lost

    job = job or make_job(lm, num_harmful=13, num_helpful=2)
    journal = Journal(tmp_path / f'journal-{folder}', process)
    return generate_shards(job, tmp_path / folder, journal, ENGINE, progress)

  return run


def test_shards_of_lost_processes_are_divided_among_those_that_start_next(lm, start, tmp_path):
  start(0, 1, 'whole')
  whole = shard_bytes(tmp_path / 'whole')
  assert len(whole) == 5
  # Of four processes, the first finishes its two shards, the second dies on its way, and the others
  # never start.
  assert start(0, 4)['sampled_rows'] == 6
  with pytest.raises(Lost):
    start(1, 4, lost_after=2)
  assert len(shard_bytes(tmp_path / 'd_cai')) == 2
  # Then two processes divide the missing shards. A division by shard index would give one of them
  # all but one. The second process learns what was missing before the first one started.
  first, second = start(0, 2), start(1, 2)
  assert (first['sampled_rows'], second['sampled_rows']) == (6, 3)
  # Both read the journal of the lost process.
  assert first['replayed_turns'] + second['replayed_turns'] >= 2
  assert shard_bytes(tmp_path / 'd_cai') == whole
  assert [path.name for path in (tmp_path / 'd_cai').glob('*.tmp')] == []
  finish_dataset(make_job(lm, num_harmful=13, num_helpful=2), tmp_path / 'd_cai')
  assert len(read_rows(tmp_path / 'd_cai')) == 15
  assert start(0, 3)['sampled_rows'] == 0


def test_processes_without_a_missing_shard_sample_nothing(start, tmp_path):
  start(0, 1, 'whole')
  assert [start(i, 7)['sampled_rows'] for i in range(7)] == [3, 3, 3, 3, 3, 0, 0]
  assert shard_bytes(tmp_path / 'd_cai') == shard_bytes(tmp_path / 'whole')


def test_every_process_checks_that_it_works_on_the_same_job(lm, start, tmp_path):
  start(0, 2)
  with pytest.raises(UserError, match='shards of another job'):
    start(1, 2, job=make_job(lm, num_harmful=12, num_helpful=3))
  (tmp_path / 'd_cai' / 'job.json').unlink()
  with pytest.raises(UserError, match='Process 1 does not see .* filesystem that they share'):
    start(1, 2)


@pytest.mark.parametrize('process', [0, 1])
def test_no_process_broadcasts_if_process_0_cannot_write(lm, tmp_path, monkeypatch, process):
  """A broadcast that process 0 does not reach would never end."""

  def broadcast(array):
    raise AssertionError('the other process does not broadcast')

  monkeypatch.setattr(jax, 'process_index', lambda: process)
  monkeypatch.setattr(jax, 'process_count', lambda: 2)
  monkeypatch.setattr(multihost_utils, 'process_allgather', lambda _: np.array([2, 0]))
  monkeypatch.setattr(multihost_utils, 'broadcast_one_to_all', broadcast)
  (tmp_path / 'file').write_text('')
  with pytest.raises((OSError, UserError), match='Not a directory|Process 0 could not write to'):
    generate_shards(make_job(lm), tmp_path / 'file' / 'd_cai', Journal(tmp_path / 'j'), ENGINE)


def test_replica_0_waits_for_a_damaged_shard_of_another_launch(lm, tmp_path, monkeypatch, capsys):
  job, folder = make_job(lm, num_harmful=13, num_helpful=2), tmp_path / 'd_cai'
  generate_shards(job, folder, Journal(tmp_path / 'journal'), ENGINE)
  valid = set()
  assert shards.find_unwritten(folder, job, valid) == [] and valid == set(range(5))
  for number in (1, 2):
    path = shard_path(folder, number)
    path.write_bytes(path.read_bytes()[:-40])
  assert shards.find_unwritten(folder, job, set()) == [1, 2]
  assert shards.find_unwritten(folder, job, valid) == []  # what has been read is not read again
  monkeypatch.setattr(shards, 'launched_replica', lambda: (0, 2))
  assert shards.claim_shards(folder, job, Replica(0, 2)) == [2]
  assert 'd_cai' in (output := capsys.readouterr().out) and output.count('It is written again') == 1
