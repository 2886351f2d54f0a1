"""A batch interface: a file of requests is written, and answers are read back when they are there.

The files have the form of OpenAI's Batch API, which vLLM's `run_batch` and others share: one JSON
object per line. A request is

  {"custom_id": KEY, "method": "POST", "url": "/v1/chat/completions", "body": {...}}

and an answer, in any order and in any number of files,

  {"custom_id": KEY, "response": {"status_code": 200, "body": {...}}, "error": null}

Seen in vllm-project/vllm, vllm/entrypoints/openai/run_batch.py at commit 0056ae7b. OpenAI's
reference limits a file to 50,000 requests and 200 MB (as quoted in async-openai 0.31).

The key of a request is that of its turn in the journal. A request that has been written is not
written again, unless its answer is an error.
"""

import collections
import itertools
import json
import os
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

from cai_jax.runtime.errors import UserError
from cai_jax.runtime.files import make_folder, replacing

MAX_REQUESTS, MAX_BYTES = 50_000, 190_000_000  # of a file


class Batch:
  """The files of requests and answers of one served model.

  Args:
    folder: holds both; it is created. Files of requests are `requests-NAME-NUMBER.jsonl`, and every
      other file `*.jsonl` has answers.
    name: tells the files of models apart.
    path: path of the API, such as '/chat/completions'.
    attempts: how many times a request is written at most.

  Attributes:
    folder: the folder.
    new: number of requests that have not been written yet.
    waiting: number of requests that were asked for here and are written, but not answered.

  Raises:
    UserError: if a file is damaged.
  """

  def __init__(self, folder: str | os.PathLike, name: str, path: str, attempts: int):
    self.folder, self._name, self._attempts = make_folder(folder), name, attempts
    self._url = f'/v1{path}'  # whatever the address of the server
    self._new: dict[str, str] = {}  # key → line
    self._waiting: set[str] = set()
    self._written: collections.Counter[str] = collections.Counter()
    self._answers: dict[str, tuple[pathlib.Path, int]] = {}  # key → file and offset of its line
    self._errors: dict[str, list[str]] = {}
    for place, line in _lines(sorted(self.folder.glob('*.jsonl'))):
      self._index(*place, line)

  @property
  def new(self) -> int:
    """See `Batch`."""
    return len(self._new)

  @property
  def waiting(self) -> int:
    """See `Batch`."""
    return len(self._waiting)

  def answer(self, key: str) -> bytes | None:
    """Return the body of the answer to a request; None if there is none.

    Args:
      key: the key of the request.
    """
    if key not in self._answers:
      return None
    path, offset = self._answers[key]
    with open(path, 'rb') as file:
      file.seek(offset)
      return json.dumps(json.loads(file.readline())['response']['body']).encode()

  def ask(self, key: str, body: Mapping[str, Any], name: str) -> None:
    """Ask for an answer: by the next file of requests, unless one that is written waits for it.

    Args:
      key: the key of the request.
      body: its JSON body.
      name: purpose of the request, for error messages.

    Raises:
      UserError: if each time that it was written its answer was an error.
    """
    errors = self._errors.get(key, [])
    if len(errors) >= self._attempts:
      raise UserError(
        f'{name}: the batch in {self.folder} has {len(errors)} errors for this request and no '
        f'answer. The last one: {errors[-1]}. Mend what it says, delete the lines of the errors, '
        'and start again.'
      )
    if self._written[key] > len(errors):
      self._waiting.add(key)
      return
    entry = {'custom_id': key, 'method': 'POST', 'url': self._url, 'body': dict(body)}
    self._new[key] = json.dumps(entry) + '\n'

  def write(self) -> list[pathlib.Path]:
    """Write the new requests to files, and return the files."""
    paths: list[pathlib.Path] = []
    for number in itertools.count(1):
      if not self._new:
        return paths
      path = self.folder / f'requests-{self._name}-{number:04d}.jsonl'
      if path.exists():
        continue
      size = 0
      lines: list[str] = []
      for key, line in list(self._new.items()):
        size += len(line.encode())
        if len(lines) == MAX_REQUESTS or (lines and size > MAX_BYTES):
          break
        lines.append(line)
        del self._new[key]
        self._written[key] += 1
        self._waiting.add(key)
      with replacing(path) as temporary, open(temporary, 'w', encoding='utf-8') as file:
        file.writelines(lines)
      paths.append(path)
    return paths

  def _index(self, path: pathlib.Path, number: int, offset: int, line: bytes) -> None:
    """Note what a line of a file says."""
    try:
      entry = json.loads(line)
      key = entry['custom_id']
      if not isinstance(key, str):
        raise TypeError('custom_id is not a text')
      if path.name.startswith('requests-'):
        self._written[key] += 1
        return
      response, error = entry.get('response') or {}, entry.get('error')
      if error is None and response.get('status_code') == 200:
        response['body'].items()  # is it an object?
        self._answers[key] = path, offset
      else:
        self._errors.setdefault(key, []).append(f'{json.dumps(error or response)[:300]}')
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
      raise UserError(
        f'{path}, line {number} is no line of a batch ({type(error).__name__}: {error}). Put only '
        'files of answers into the folder, as the server returned them.'
      ) from None


def _lines(paths: list[pathlib.Path]) -> Iterator[tuple[tuple[pathlib.Path, int, int], bytes]]:
  """Yield ((file, number of the line from 1, its byte offset), the line) of some files."""
  for path in paths:
    offset = 0
    with open(path, 'rb') as file:
      for number, line in enumerate(file, 1):
        if line.strip():
          yield (path, number, offset), line
        offset += len(line)
