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


@pytest.mark.slow
def test_the_start_benchmark_measures_an_empty_and_a_full_cache(tmp_path, capsys, monkeypatch):
  from faults import program

  from experiments.bench import start

  monkeypatch.delenv('XLA_FLAGS')  # one device
  fields = [f'--config.{name}={value}' for name, value in program.FIELDS.items()]
  start.main([f'--workdir={tmp_path}', '--stages=generate', *fields])
  header, _, empty, full, _, commit = capsys.readouterr().out.splitlines()
  assert header.startswith('| cache | whole command | first row |')
  empty, full = ([cell.strip() for cell in row.split('|')[1:-1]] for row in (empty, full))
  assert len(empty) == len(full) == header.count('|') - 1 and commit.startswith('commit ')
  assert empty[0] == 'empty' and full[0] == 'full'
  assert 0 < float(full[2].split()[0]) < float(full[1].split()[0])
  assert full[4].startswith('0 and ') and empty[4].split(' and ')[0] == full[4].split()[2]
  assert list(tmp_path.iterdir()) == []
