"""The property of every reader: any bytes give a value or a `UserError`, in time and memory.

A `Reader` describes one reader of files: valid inputs, the function that reads them, and what must
hold for a value that it accepts. An input is a folder of files, as a dict from relative name to
bytes. `check_reader` draws inputs with hypothesis, most of them valid inputs with a few mutations,
and reads each in a worker process. An input violates the property if

- the reader raises anything but a `UserError` (a traceback for the user),
- it takes more than `SECONDS`, or more than `MEMORY` bytes of memory, or kills its process,
- it returns a value that contradicts the input, which `Reader.check` decides, or
- the `UserError` does not name a file, is too long, or contains control characters.

Write one file `test_properties_of_<reader>.py` for each reader:

  PROMPTS = Reader(inputs=[{'prompts.jsonl': b'{"prompt": "Hi"}\n'}], read=read, check=check)

  def test_prompt_files():
    check_reader(f'{__name__}:PROMPTS')

  FAULTS = [Fault(f'{__name__}:PROMPTS', 'cai_jax.data.prompts', old='...', new='...')]

A `Fault` is a small mistake in the source of a reader. `test_planted_faults.py` plants one at a
time in the worker's copy of the module, and requires that `check_reader` finds a violation.

The number of inputs for each reader is 15, or the environment variable PROPERTY_EXAMPLES. They are
the same in every run, unless PROPERTY_SEED sets another seed.
"""

import collections
import dataclasses
import json
import multiprocessing
import multiprocessing.process
import os
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import hypothesis
from hypothesis import strategies as st

SECONDS = 5.0
MEMORY = 2**30
EXAMPLES = int(os.environ.get('PROPERTY_EXAMPLES', 15))

Files = dict[str, bytes]

# Accepted and refused inputs by reader, which conftest.py prints at the end.
COUNTS: dict[str, collections.Counter] = collections.defaultdict(collections.Counter)


@dataclasses.dataclass(frozen=True)
class Reader:
  """A reader of files and its property.

  Attributes:
    inputs: valid inputs. All of them must be accepted.
    read: reads the folder that contains the files and returns a value.
    check: called with the files and the value; raises AssertionError if the value is wrong, for
      example if a row was dropped without a word or the value does not survive a round trip.
    check_refusal: called with the files and the message of the UserError; raises AssertionError if
      the message is not good enough, for example if it names no row.
    fragments: pieces of text that mutations insert, in addition to `FRAGMENTS`.
    names_file: whether every refusal must name one of the files.
  """

  inputs: Sequence[Files]
  read: Callable[[pathlib.Path], Any]
  check: Callable[[Files, Any], None] = lambda files, value: None
  check_refusal: Callable[[Files, str], None] = lambda files, message: None
  fragments: Sequence[bytes] = ()
  names_file: bool = True


@dataclasses.dataclass(frozen=True)
class Fault:
  """A mistake planted in the source of a module.

  Attributes:
    reader: 'module:attribute' of the Reader that must find it.
    module: the module's name.
    old: a piece of the module's source, which occurs exactly once.
    new: its replacement.
  """

  reader: str
  module: str
  old: str
  new: str


class Violation(AssertionError):
  """An input for which a reader breaks its property."""


def check_reader(
  name: str, examples: int = EXAMPLES, fault: Fault | None = None, expected: bool = False
) -> None:
  """Check a reader on its valid inputs and on drawn ones.

  Args:
    name: 'module:attribute' of the Reader.
    examples: number of drawn inputs.
    fault: a fault to plant in the worker, which means that a violation is expected.
    expected: whether a violation is; then inputs are neither counted nor made smaller.

  Raises:
    Violation: with the smallest input that was found to break the property.
  """
  reader = load_reader(name)
  expected = expected or fault is not None
  counts = collections.Counter() if expected else COUNTS[name]
  with Worker(name, fault) as worker:
    for files in reader.inputs:
      kind, text = worker.read(files)
      if kind != 'value':
        raise Violation(f'{name} does not accept a valid input ({kind}): {text}\n{files!r:.2000}')

    def check(files: Files) -> None:
      kind, text = worker.read(files)
      counts[kind] += 1
      if kind not in ('value', 'refused'):
        raise Violation(f'{name}: {kind}\n{text}\ninput: {files!r:.4000}')

    phases = [hypothesis.Phase.generate, hypothesis.Phase.shrink]
    phases = phases[:1] if expected else phases
    test = hypothesis.given(inputs(reader))(check)
    test = hypothesis.settings(
      max_examples=examples,
      deadline=None,
      database=None,
      derandomize='PROPERTY_SEED' not in os.environ,
      suppress_health_check=list(hypothesis.HealthCheck),
      phases=phases,
    )(test)
    if 'PROPERTY_SEED' in os.environ:
      test = hypothesis.seed(int(os.environ['PROPERTY_SEED']))(test)
    test()


def load_reader(name: str) -> Reader:
  """Return the Reader that 'module:attribute' names."""
  module, attribute = name.split(':')
  return getattr(__import__(module), attribute)


class Worker:
  """A process that reads inputs, as a context manager. It is replaced when it hangs or dies.

  Args:
    name: 'module:attribute' of the Reader.
    fault: a fault to plant.
  """

  def __init__(self, name: str, fault: Fault | None = None):
    self._name, self._fault = name, fault
    self._process: multiprocessing.process.BaseProcess | None = None

  def __enter__(self) -> 'Worker':
    return self

  def __exit__(self, *_) -> None:
    self._stop()

  def read(self, files: Files) -> tuple[str, str]:
    """Read an input.

    Returns:
      The kind of the outcome and a text: 'value', 'refused' (the message), 'traceback',
      'contradiction', 'bad refusal', 'hang' or 'crash'.
    """
    if self._process is None:
      self._start()
    self._connection.send(files)
    if not self._connection.poll(SECONDS):
      self._stop()
      return 'hang', f'The reader took more than {SECONDS} s.'
    try:
      return self._connection.recv()
    except (EOFError, ConnectionResetError):
      self._process.join()
      code = self._process.exitcode
      self._stop()
      return 'crash', f'The process of the reader ended with status {code}.'

  def _start(self) -> None:
    import worker

    # Most of a start is imports. So processes are copies of one that has imported the library,
    # unless a fault must be planted before.
    context = multiprocessing.get_context('spawn' if self._fault else 'forkserver')
    if not self._fault:
      context.set_forkserver_preload(['harness', 'pytest', 'cai_jax.pipeline'])
    self._connection, theirs = context.Pipe()
    arguments = (theirs, self._name, self._fault)
    self._process = context.Process(target=worker.serve, args=arguments, daemon=True)
    self._process.start()
    theirs.close()
    try:
      self._connection.recv()  # the start takes seconds, which count for no input
    except EOFError as error:
      raise AssertionError(f'the worker of {self._name} does not start') from error

  def _stop(self) -> None:
    if self._process is not None:
      self._process.kill()
      self._process.join()
      self._connection.close()
      self._process = None


# Inputs

HOSTILE_VALUES = [
  None, True, False, 0, -1, 1, 2**31, -(2**63), 10**12, 10**400, 0.5, -0.0, 1e308, float('nan'),
  float('inf'), '', ' ', 'x', '0', 'true', '\x00', '\x1b[2J', '\ud800', '‮', '../../etc/passwd',
  '/dev/zero', '~', 'a' * 100_000, '<script>', '{{ 7 * 7 }}', [], {}, [[]], [None], {'': None},
  {'role': 'user', 'content': 'Hi'}, [1, 'a', None], ['a'] * 1000,
]  # fmt: skip
# Values that json.dumps cannot write: nesting beyond Python's limit, and integers with many digits.
MARKERS = {'(deep)': b'[' * 3000 + b']' * 3000, '(long)': b'9' * 5000}
HOSTILE_VALUES += 3 * [*MARKERS]
FRAGMENTS = [
  b'\x00', b'\xff', b'\xef\xbb\xbf', b'\xff\xfe', b'\xfe\xff', b'\r', b'\n', b'\r\n', b'\n\n',
  b'"', b'\\', b'\\ud800', b'{', b'}', b'[', b']', b',', b':', b'null', b'NaN', b'1e999', b'-',
  b'[' * 3000, b'{"a":' * 3000, b'9' * 5000, b' ' * 1000, b'\t', b'&a ', b'*a', b'!!python/none ',
  b'---\n', b'# ', b'\xe2\x80\xa8', b'\xc2\x85', b'\x1f\x8b', b'\x1b[31m',
]  # fmt: skip


def inputs(reader: Reader) -> st.SearchStrategy[Files]:
  """Return the strategy of a reader's inputs: most are mutated valid inputs, a few arbitrary."""
  valid = st.sampled_from(list(reader.inputs))
  fragments = [*FRAGMENTS, *reader.fragments]
  mutated = st.builds(_mutate, valid, st.lists(_mutations(fragments), min_size=1, max_size=3))
  arbitrary = st.builds(
    lambda files, name, data: files | {sorted(files)[name % len(files)]: data},
    valid,
    st.integers(0, 100),
    st.one_of(
      st.binary(max_size=200), st.text(max_size=100).map(lambda t: t.encode('utf-8', 'replace'))
    ),
  )
  # Hypothesis draws each branch equally often, so mutated inputs are three quarters of all.
  return st.one_of(mutated, mutated, mutated, arbitrary)


def _mutations(fragments: Sequence[bytes]) -> st.SearchStrategy[tuple]:
  """Return the strategy of mutations, each as (file, kind, position, second position, material)."""
  where = st.integers(0, 10**6)
  kinds = {
    'insert': st.sampled_from(fragments),
    'replace byte': st.integers(0, 255).map(lambda byte: bytes([byte])),
    'cut': st.none(),
    'remove': st.none(),
    'repeat': st.none(),
    'drop line': st.none(),
    'swap lines': st.none(),
    'remove file': st.none(),
    'json value': st.sampled_from(HOSTILE_VALUES),
    'json key': st.sampled_from(['', 'x', 'role', 'prompt', 'id', '\x1b', 'A' * 5000]),
    'json delete': st.none(),
    'json repeat': st.none(),
  }
  weights = [kind for kind in kinds for _ in range(4 if kind.startswith('json') else 1)]
  return st.sampled_from(weights).flatmap(
    lambda kind: st.tuples(where, st.just(kind), where, where, kinds[kind])
  )


def _mutate(files: Files, mutations: Sequence[tuple]) -> Files:
  """Return the files after some mutations."""
  files = dict(files)
  for file, kind, position, second, material in mutations:
    names = sorted(files)
    if not names:
      break
    name = names[file % len(names)]
    data = files.pop(name)
    if kind == 'remove file':
      continue
    if kind.startswith('json'):
      files[name] = _mutate_json(data, kind.split()[1], position, second, material)
    else:
      files[name] = _mutate_bytes(data, kind, position, second, material)
  return files


def _mutate_bytes(data: bytes, kind: str, position: int, second: int, material: bytes) -> bytes:
  start, end = sorted((position % (len(data) + 1), second % (len(data) + 1)))
  if kind == 'insert':
    return data[:start] + material + data[start:]
  if kind == 'replace byte':
    return data[:start] + material + data[start + 1 :]
  if kind == 'cut':
    return data[:start]
  if kind == 'remove':
    return data[:start] + data[end:]
  if kind == 'repeat':
    return data[:end] + data[start:]
  lines = data.splitlines(keepends=True)
  if lines:
    first, other = position % len(lines), second % len(lines)
    if kind == 'drop line':
      del lines[first]
    else:
      lines[first], lines[other] = lines[other], lines[first]
  return b''.join(lines)


def _mutate_json(data: bytes, kind: str, position: int, second: int, material: Any) -> bytes:
  """Mutate a JSON file, or one line of a JSON Lines file; other files get the value as text."""
  try:
    return _dump(_mutate_value(json.loads(data), kind, position, material))
  except (ValueError, RecursionError):
    pass
  lines = data.splitlines(keepends=True)
  index = second % len(lines) if lines else 0
  try:
    lines[index] = _dump(_mutate_value(json.loads(lines[index]), kind, position, material)) + b'\n'
    return b''.join(lines)
  except (ValueError, RecursionError, IndexError):
    return _mutate_bytes(data, 'insert', position, second, _dump(material))


def _dump(value: Any) -> bytes:
  text = json.dumps(value).encode()
  for marker, replacement in MARKERS.items():
    text = text.replace(json.dumps(marker).encode(), replacement)
  return text


def _mutate_value(value: Any, kind: str, position: int, material: Any) -> Any:
  """Return a JSON value after one mutation at one of its places."""
  places: list[tuple[Any, Any]] = []  # (container, key or index)

  def collect(container: Any) -> None:
    keys = container if isinstance(container, dict) else range(len(container))
    for key in keys:
      places.append((container, key))
      if isinstance(container[key], dict | list):
        collect(container[key])

  root = [value]
  collect(root)
  container, key = places[position % len(places)]
  if kind == 'value':
    container[key] = material
  elif kind == 'delete':
    del container[key]
  elif kind == 'key' and isinstance(container, dict):
    container[material] = container.pop(key)
  elif kind == 'repeat' and isinstance(container, list):
    container.insert(key, container[key])
  return root[0] if root else None
