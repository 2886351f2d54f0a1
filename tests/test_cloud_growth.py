"""A file that grows is written to a store in parts, and no line is lost."""

import os

import pytest

from cai_jax.runtime.cloud import objects, parts
from cai_jax.runtime.cloud.mirror import Mirror
from cai_jax.runtime.errors import UserError
from tests.mirror_setup import append, make_store, read, start, write


@pytest.fixture
def store(monkeypatch):
  return make_store(monkeypatch)


def test_a_growing_file_is_written_in_parts_of_whole_lines(store, tmp_path):
  mirror = start(store, tmp_path / 'one')
  path, text = tmp_path / 'one' / 'journal' / 'turns-00000.jsonl', b''
  write(tmp_path / 'one', {'journal/turns-00000.jsonl': b'x' * 999 + b'\n'})
  mirror.push()
  for number in range(20):
    append(path, b'%04d' % number + b'y' * 45 + b'\nhalf a line')
    mirror.push()
    Mirror(store, tmp_path / 'two', 'other').pull()
    text = (tmp_path / 'two' / 'journal' / 'turns-00000.jsonl').read_bytes()
    whole = path.read_bytes()
    assert whole.startswith(text) and text.endswith(b'\n') and len(whole) - len(text) == 11
    mirror = start(store, tmp_path / 'one', 'other')
  written = sum(len(store.read(name)) for name in store.list('journal'))
  assert written == 1000  # the first object was not written again
  assert 1 <= len(store.list(parts.PARTS)) <= 6
  mirror.push(join=True)
  assert store.list(parts.PARTS) == {} and store.read('journal/turns-00000.jsonl') == whole


@pytest.mark.parametrize('changes', range(9))
def test_a_kill_while_parts_are_joined_loses_no_line(store, tmp_path, changes):
  path = tmp_path / 'one' / 'turns.jsonl'
  mirror = start(store, tmp_path / 'one')
  write(tmp_path / 'one', {'turns.jsonl': b'x' * 999 + b'\n'})
  mirror.push()
  for size in (200, 100, 50):
    append(path, b'y' * size + b'\n')
    mirror.push()
  whole = path.read_bytes()
  assert len(store.list(parts.PARTS)) == 3
  store.fs.left = changes
  append(path, b'z' * 70 + b'\n')  # becomes one part with the last one
  try:
    mirror.push()
    mirror.push(join=True)
  except ConnectionError:
    pass
  store.fs.left = 10**9
  Mirror(store, tmp_path / 'two', 'other').pull()
  found = (tmp_path / 'two' / 'turns.jsonl').read_bytes()
  assert found in (whole, path.read_bytes())
  chain = parts.group_parts(store.list())
  assert len(chain) <= 1  # parts that nothing needs are deleted


def test_a_file_that_was_replaced_or_cut_is_written_anew(store, tmp_path):
  path = tmp_path / 'metrics.jsonl'
  mirror = start(store, tmp_path)
  path.write_bytes(b'1\n' * 100)
  mirror.push()
  append(path, b'2\n' * 10)
  mirror.push()
  assert len(store.list(parts.PARTS)) == 1
  os.truncate(path, 150)
  append(path, b'3\n' * 80)
  mirror.push()
  assert store.read('metrics.jsonl') == path.read_bytes() and not store.list(parts.PARTS)
  write(tmp_path, {'metrics.jsonl': path.read_bytes() + b'4\n'})
  mirror.push()
  assert store.read('metrics.jsonl') == path.read_bytes() and not store.list(parts.PARTS)


def test_pieces_stay_few_and_small():
  pieces, written = [(0, 10)], 0
  for number in range(1000):
    end = pieces[-1][1]
    kept, new = parts.merge(pieces, (end, end + 10))
    assert pieces[: len(kept)] == kept and new[1] == end + 10
    assert new[0] == (kept[-1][1] if kept else 0)
    pieces, written = [*kept, new], written + new[1] - new[0]
    assert len(pieces) <= 2 + (number + 2).bit_length()
  assert written < 12 * 10_000
  large = [(0, parts.LARGEST), (parts.LARGEST, parts.LARGEST + 5)]
  assert parts.merge(large, (large[1][1], 2 * parts.LARGEST)) == (
    large[:1],
    (parts.LARGEST, 2 * parts.LARGEST),
  )


def test_parts_are_followed_without_gaps():
  assert parts.follow(10, [(10, 20), (10, 30), (20, 30), (30, 35), (50, 60)]) == [
    (10, 30),
    (30, 35),
  ]
  assert parts.follow(10, [(20, 30)]) == parts.follow(0, []) == []


def test_a_file_that_is_appended_to_all_the_time_is_written(store, tmp_path, monkeypatch):
  monkeypatch.undo()  # the clock of the disk
  mirror = start(store, tmp_path)
  path = tmp_path / 'turns.jsonl'
  mirror_scan = objects.scan

  def scan_late(folder):  # a folder with many files
    append(path, b'half')
    append(path, b' a line and the rest\nhalf')
    return mirror_scan(folder)

  monkeypatch.setattr(objects, 'scan', scan_late)
  for _ in range(3):
    size = path.stat().st_size if path.exists() else 0
    mirror.push()
    Mirror(store, tmp_path / 'two', '').fetch()
    there = (tmp_path / 'two/turns.jsonl').read_bytes()
    assert len(there) > size and path.read_bytes().startswith(there) and there.endswith(b'\n')


def test_growth_larger_than_a_part_is_written_as_a_whole(store, tmp_path, monkeypatch):
  monkeypatch.setattr(parts, 'LARGEST', 1000)
  mirror = start(store, tmp_path / 'one')
  write(tmp_path / 'one', {'turns.jsonl': b'x' * 99 + b'\n'})
  mirror.push()
  append(tmp_path / 'one/turns.jsonl', (b'y' * 99 + b'\n') * 45)
  mirror.push(still=True)
  Mirror(store, tmp_path / 'two', '').fetch()
  assert read(tmp_path / 'two') == read(tmp_path / 'one')


@pytest.mark.parametrize('times', [1, 2])
def test_a_look_lists_again_when_a_job_joins_parts_meanwhile(store, tmp_path, times):
  mirror, left = start(store, tmp_path / 'one'), [times]
  path = tmp_path / 'one' / 'turns.jsonl'
  write(tmp_path / 'one', {'turns.jsonl': b'x' * 999 + b'\n'})
  mirror.push()
  append(path, b'1\n')
  mirror.push()
  get_file = store.fs.get_file

  def join_meanwhile(name, target, **options):
    get_file(name, target, **options)
    if left[0]:
      left[0] -= 1
      mirror.push(still=True, join=True)
      append(path, b'2\n')
      mirror.push(still=True)

  store.fs.get_file = join_meanwhile
  look = Mirror(store, tmp_path / 'two', '')
  if times == 1:
    look.fetch()
    assert read(tmp_path / 'two') == read(tmp_path / 'one')
  else:
    with pytest.raises(UserError, match='changed while it was fetched'):
      look.fetch()
