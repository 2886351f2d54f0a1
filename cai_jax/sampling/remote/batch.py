"""A batch interface: a file of requests is written, and answers are read back when they are there.

The files have the form of OpenAI's Batch API, which vLLM's `run_batch` and others share: one JSON
object per line. A request is

  {"custom_id": KEY, "method": "POST", "url": "/v1/chat/completions", "body": {...}}

and an answer, in any order and in any number of files,

  {"custom_id": KEY, "response": {"status_code": 200, "body": {...}}, "error": null}

Seen in vllm-project/vllm, vllm/entrypoints/openai/run_batch.py at commit 0056ae7b. OpenAI's
reference limits a file to 50,000 requests and 200 MB (as quoted in async-openai 0.31).

The key of a request is that of its turn in the journal. A request that has been written is not
written again, unless its answer is an error that may pass. The second attempt has the custom_id
KEY-2, and so on, so each error belongs to one attempt, however many files have it.
"""

import itertools
import json
import os
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from cai_jax.runtime.errors import UserError
from cai_jax.runtime.files import make_folder, replacing
from cai_jax.sampling.remote import refusals

MAX_REQUESTS, MAX_BYTES = 50_000, 190_000_000  # of a file
UNKNOWN_STATUS = 500  # of an error that came without a response, such as of a batch that expired
LISTED_FAILURES = 2  # of all failures, how many a message describes


class _Error(NamedTuple):
  """The answer to an attempt that is an error: status, code, and the start of its text."""

  status: int
  code: str
  text: str


class Batch:
  """The files of requests and answers of one served model.

  Args:
    folder: holds both; it is created. New files of requests are `requests-NAME-NUMBER.jsonl`.
      Answers are read from all files `*.jsonl`; their lines tell requests and answers apart.
    name: tells the files of models apart.
    path: path of the API, such as '/chat/completions'.
    attempts: how many times a request is written at most.

  Attributes:
    folder: the folder.
    new: number of requests that have not been written yet.
    waiting: number of requests that were asked for here and are written, but not answered.
    failures: messages about requests that were asked for here and cannot be answered.

  Raises:
    UserError: if a file is damaged.
  """

  def __init__(self, folder: str | os.PathLike, name: str, path: str, attempts: int):
    self.folder, self._name, self._attempts = make_folder(folder), name, attempts
    self._url = f'/v1{path}'  # whatever the address of the server
    self._new: dict[str, tuple[int, str]] = {}  # key → attempt and line
    self._waiting: set[str] = set()
    self.failures: list[str] = []
    self._written: dict[str, int] = {}  # key → its last attempt in a file of requests
    self._answers: dict[str, tuple[pathlib.Path, int, int]] = {}  # key → file, offset, attempt
    self._errors: dict[str, dict[int, _Error]] = {}  # key → attempt → its answer
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
    path, offset, _ = self._answers[key]
    with open(path, 'rb') as file:
      file.seek(offset)
      return json.dumps(json.loads(file.readline())['response']['body']).encode()

  def withheld(self, key: str) -> bool:
    """Return whether the server's filter of contents refused a request.

    Args:
      key: the key of the request.
    """
    return any(e.code in refusals.FILTER_CODES for e in self._errors.get(key, {}).values())

  def ask(self, key: str, body: Mapping[str, Any], name: str) -> None:
    """Ask for an answer: by the next file of requests, unless one that is written waits for it.

    A request whose last error does not pass, and one that has been written as often as allowed, is
    added to `failures` instead.

    Args:
      key: the key of the request.
      body: its JSON body.
      name: purpose of the request, for error messages.
    """
    errors = self._errors.get(key, {})
    last = max(self._written.get(key, 0), *errors, 0)  # the last attempt; 0 without any
    error = errors.get(last)
    if last and error is None:
      self._waiting.add(key)
      return
    if error and (last >= self._attempts or not refusals.may_pass(error.status, error.code)):
      self.fail(key, f'{name}: the batch answers attempt {last} with an error: {error.text}')
      return
    custom_id = _custom_id(key, last + 1)
    entry = {'custom_id': custom_id, 'method': 'POST', 'url': self._url, 'body': dict(body)}
    self._new[key] = last + 1, json.dumps(entry) + '\n'

  def fail(self, key: str, text: str) -> None:
    """Add a message to `failures`.

    Args:
      key: the key of the request that cannot be answered.
      text: what was wrong.
    """
    if key in self._answers:
      attempt = self._answers[key][2]
    else:
      attempt = max(self._errors.get(key, {}), default=1)
    self.failures.append(f'{text.rstrip(".")} (custom_id {_custom_id(key, attempt)!r}).')

  def describe_failures(self) -> str:
    """Return the first messages of `failures`, and what to do; '' without any."""
    if not self.failures:
      return ''
    more = len(self.failures) - LISTED_FAILURES
    rest = [f'{more:,} more requests failed.'] if more > 0 else []
    return ' '.join(
      [
        *self.failures[:LISTED_FAILURES],
        *rest,
        'Mend what the errors say, delete the lines with these custom_ids from the files of '
        f'requests and answers in {self.folder}, and start again.',
      ]
    )

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
      for key, (attempt, line) in list(self._new.items()):
        size += len(line.encode())
        if len(lines) == MAX_REQUESTS or (lines and size > MAX_BYTES):
          break
        lines.append(line)
        del self._new[key]
        self._written[key] = attempt
        self._waiting.add(key)
      with replacing(path) as temporary, open(temporary, 'w', encoding='utf-8') as file:
        file.writelines(lines)
      paths.append(path)
    return paths

  def _index(self, path: pathlib.Path, number: int, offset: int, line: bytes) -> None:
    """Note what a line of a file says."""
    try:
      entry = json.loads(line)
      if not isinstance(entry['custom_id'], str):
        raise TypeError('custom_id is not a text')
      key, attempt = _attempt_of(entry['custom_id'])
      if 'response' not in entry and 'error' not in entry:
        entry['body'].items()  # is it an object?
        self._written[key] = max(attempt, self._written.get(key, 0))
      elif (error := _error_of(entry)) is not None:
        self._errors.setdefault(key, {})[attempt] = error
      else:
        self._answers[key] = path, offset, attempt
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
      raise UserError(
        f'{path}, line {number} is no line of a batch ({type(error).__name__}: {error}). Put only '
        'files of answers into the folder, as the server returned them.'
      ) from None


def _custom_id(key: str, attempt: int) -> str:
  """Return the name of an attempt to ask a request, from 1."""
  return key if attempt == 1 else f'{key}-{attempt}'


def _attempt_of(custom_id: str) -> tuple[str, int]:
  """Return the key and the number of the attempt that `_custom_id` names."""
  key, _, number = custom_id.rpartition('-')
  return (key, int(number)) if key and number.isdecimal() else (custom_id, 1)


def _error_of(entry: Mapping[str, Any]) -> _Error | None:
  """Return the error in the line of an answer; None if it has an answer.

  Raises:
    AttributeError: if it has neither, or one of them is not an object.
    KeyError: if a field of them is missing.
  """
  response, error = entry.get('response') or {}, entry.get('error')
  if not response and error is None:
    raise KeyError('response')
  status, body = response.get('status_code'), json.dumps(response.get('body')).encode()
  if error is None and status == 200:
    response['body'].items()  # is it an object?
    status = refusals.hidden_status(body)
    if status == 200:
      return None
  code = refusals.error_code(body) or refusals.error_code(json.dumps(error).encode())
  known = status if type(status) is int and status >= 300 else UNKNOWN_STATUS
  return _Error(known, code, json.dumps(error or response)[:300])


def _lines(paths: list[pathlib.Path]) -> Iterator[tuple[tuple[pathlib.Path, int, int], bytes]]:
  """Yield ((file, number of the line from 1, its byte offset), the line) of some files."""
  for path in paths:
    offset = 0
    with open(path, 'rb') as file:
      for number, line in enumerate(file, 1):
        if line.strip():
          yield (path, number, offset), line
        offset += len(line)
