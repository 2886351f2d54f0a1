"""The chains of a dataset that ended without a row, in files beside its shards.

The file of a shard is written before the shard, and only if a chain of the shard ended early. Like
the shard, it depends on the job alone.
"""

import json
import os
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from cai_jax.data.prompts import Prompt
from cai_jax.runtime.errors import UserError

FIELDS = ('id', 'kind', 'turn', 'reason')  # of an entry; all are texts


def write_ended(
  folder: str | os.PathLike, shard: int, entries: Sequence[Mapping[str, str]]
) -> None:
  """Write the entries of a shard atomically; without entries, remove an earlier file.

  Args:
    folder: the folder of the dataset.
    shard: the index of the shard.
    entries: one for each chain that ended without a row, with `FIELDS`.
  """
  path = _path(folder, shard)
  if not entries:
    path.unlink(missing_ok=True)
    return
  path.parent.mkdir(parents=True, exist_ok=True)
  temporary = path.with_name(f'.{path.name}.tmp')
  with open(temporary, 'w', encoding='utf-8') as file:
    file.writelines(json.dumps({name: entry[name] for name in FIELDS}) + '\n' for entry in entries)
    file.flush()
    os.fsync(file.fileno())
  os.replace(temporary, path)


def read_ended(folder: str | os.PathLike, shard: int | None = None) -> list[dict[str, Any]]:
  """Return the entries of a shard, or of the whole dataset.

  Args:
    folder: the folder of the dataset.
    shard: the index of the shard; None means all.

  Raises:
    UserError: if a file is damaged.
  """
  paths = (
    sorted(pathlib.Path(folder).glob('ended-*.jsonl'))
    if shard is None
    else [path for path in [_path(folder, shard)] if path.exists()]
  )
  entries = []
  for path in paths:
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
      try:
        entry = json.loads(line)
        is_valid = set(entry) == set(FIELDS) and all(isinstance(v, str) for v in entry.values())
      except (ValueError, TypeError, AttributeError, RecursionError):
        is_valid = False
      if not is_valid:
        raise UserError(
          f'{path}, line {number} is damaged. Delete the folder {path.parent.name}/ and start '
          'again; its turns are taken from the journal.'
        )
      entries.append(entry)
  return entries


def describe_ended(
  folder: str | os.PathLike, num_chains: int, prompts: Iterable[Prompt] = ()
) -> str:
  """Return a sentence about the chains that ended without a row, or '' if there is none.

  Args:
    folder: the folder of the dataset.
    num_chains: number of all chains.
    prompts: the prompts of the chains, which know the places of their rows.
  """
  entries = read_ended(folder)
  if not entries:
    return ''
  first = entries[0]
  place = next((str(p) for p in prompts if p.id == first['id']), f'prompt {first["id"]!r}')
  return (
    f'{len(entries)} of {num_chains} chains ended without a row (see ended-*.jsonl in '
    f'{pathlib.Path(folder).name}/). The first: {place}, turn {first["turn"]!r}: '
    f'{first["reason"]}'
  )


def _path(folder: str | os.PathLike, shard: int) -> pathlib.Path:
  return pathlib.Path(folder) / f'ended-{shard:05d}.jsonl'
