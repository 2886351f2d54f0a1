"""A run goes on while its store is away, and says so."""

import errno
import os
import time

import pytest

from cai_jax.runtime.cloud import keeper as keepers
from cai_jax.runtime.cloud.keeper import Keeper
from cai_jax.runtime.cloud.mirror import UNWRITTEN, Mirror
from cai_jax.runtime.errors import StoppedError
from tests.mirror_setup import files, make_store, start, write


@pytest.fixture
def store(monkeypatch):
  return make_store(monkeypatch)


@pytest.fixture
def quick(monkeypatch):
  monkeypatch.setattr(keepers, 'PERIOD_SECONDS', 0.01)
  monkeypatch.setattr(keepers, 'LONGEST_WAIT_SECONDS', 0.02)
  monkeypatch.setattr(keepers, 'LAST_WAITS_SECONDS', (0.01, 0.01))


def wait_for(condition):
  end = time.monotonic() + 10
  while not condition():
    assert time.monotonic() < end
    time.sleep(0.005)


def test_a_run_survives_a_store_that_is_away(store, tmp_path, quick, capsys):
  mirror = start(store, tmp_path)
  keeper = Keeper(mirror, store.url)
  write(tmp_path, {'a': b'1'})
  wait_for(lambda: 'a' in files(store))
  store.fs.away = True
  write(tmp_path, {'b': b'1'})
  wait_for((tmp_path / UNWRITTEN).exists)
  keeper.finish_stage()  # no error: the stage is done, here
  store.fs.away = False
  wait_for(lambda: 'b' in files(store) and not (tmp_path / UNWRITTEN).exists())
  keeper.close(join=True)
  said = capsys.readouterr().err.splitlines()
  assert len(said) == 2 and 'The run continues in' in said[0] and 'reached again' in said[1]


def test_a_full_disk_is_not_reported_as_a_store_that_is_away(
  store, tmp_path, quick, capsys, monkeypatch
):
  keeper = Keeper(start(store, tmp_path), store.url)

  def fail(self, *_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

  monkeypatch.setattr(Mirror, '_now', fail)
  monkeypatch.setattr(Mirror, 'mark_unwritten', fail)
  said = []
  wait_for(lambda: said.append(capsys.readouterr().err) or any(said))
  assert f'{tmp_path} cannot be used: No space left' in ''.join(said)
  monkeypatch.undo()
  keeper.close(join=True)


def test_a_run_whose_store_stays_away_ends_with_an_error(store, tmp_path, quick, capsys):
  keeper = Keeper(start(store, tmp_path), store.url)
  store.fs.away = True
  write(tmp_path, {'a': b'1'})
  with pytest.raises(StoppedError, match=rf'could not be written to s3://bucket/run.*{tmp_path}'):
    keeper.close(join=True)
  store.fs.away = False
  start(store, tmp_path)
  assert files(store) == {'a'}
