"""Test that the host benchmark runs every turn of every chain in each mode."""

import pytest

from cai_jax.data import d_cai
from cai_jax.sampling.journal import Journal
from experiments.bench import host


@pytest.fixture(scope='module')
def job():
  return host.make_job(9)


@pytest.mark.parametrize('mode', ['tokens', 'turns', 'run'])
def test_every_mode_runs_all_turns(job, mode, tmp_path):
  journal = Journal(tmp_path / 'journal')
  stub = host.Stub(host.replies(job))
  with stub.installed():
    watch = host.run_chains(mode, job, tmp_path, journal)
  assert watch.done == 9
  assert len(journal) == 9 * (1 + 2 * host.ROUNDS)
  assert d_cai.shard_path(tmp_path / 'd_cai', 0).exists() == (mode == 'run')
