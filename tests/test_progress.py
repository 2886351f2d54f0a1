"""Progress: what a log file shows of a loop, from its start or from where it was cut."""

import sys

import pytest

from cai_jax.runtime import progress


@pytest.mark.parametrize(('start', 'left'), [(0, '30 s left'), (40, '100 s left')])
def test_progress_without_a_terminal_is_occasional_plain_lines(monkeypatch, capsys, start, left):
  clock = iter([0.0, 20.0, 21.0, 30.0])  # made; two calls within a line's time; the last one
  monkeypatch.setattr(progress.time, 'monotonic', lambda: next(clock))
  monkeypatch.setattr(sys.stderr, 'isatty', lambda: False, raising=False)
  with progress.Progress('train', 'step', start) as show:
    show(50 if start else 40, 100, 4000, 'loss 2')
    show(60, 100, 5000, 'loss 1')
    show(100, 100, 6000)
  first, last = capsys.readouterr().out.splitlines()
  done = 50 if start else 40
  assert first == f'train: {done} of 100 steps, loss 2, 200 tokens/s, {left}'
  assert last == 'train: 100 of 100 steps, 200 tokens/s, 0 s left'


def test_a_loop_that_is_usually_short_shows_nothing_before_its_time(monkeypatch, capsys):
  clock = iter([0.0, 10.0, 20.0])
  monkeypatch.setattr(progress.time, 'monotonic', lambda: next(clock))
  monkeypatch.setattr(sys.stderr, 'isatty', lambda: False, raising=False)
  with progress.Progress('likelihoods', quiet_seconds=15.0) as show:
    show(50, 100, 500)
    assert not capsys.readouterr().out
    show(100, 100, 1000)
  assert capsys.readouterr().out == 'likelihoods: 100 of 100 rows, 50 tokens/s, 0 s left\n'
