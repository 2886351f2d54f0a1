"""The process that reads inputs for harness.py."""

import importlib
import importlib.machinery
import importlib.util
import os
import pathlib
import resource
import sys
import tempfile
import traceback
import unicodedata
from multiprocessing.connection import Connection

import harness
from harness import MEMORY, Fault, Files, Reader


class PlantedLoader(importlib.machinery.SourceFileLoader):
  """Loads a module from its source after a fault has been planted in it."""

  fault: Fault

  def get_code(self, fullname):
    source = self.get_source(fullname)
    assert source.count(self.fault.old) == 1, f'{self.fault.old!r} must occur once in {fullname}'
    return compile(source.replace(self.fault.old, self.fault.new), self.path, 'exec')


class PlantedFinder:
  """Finds the module of a fault, before Python's own finders do."""

  def __init__(self, fault: Fault):
    self._fault = fault

  def find_spec(self, name, path, target=None):
    if name != self._fault.module:
      return None
    spec = importlib.machinery.PathFinder.find_spec(name, path, target)
    spec.loader = PlantedLoader(spec.loader.name, spec.loader.path)
    spec.loader.fault = self._fault
    return spec


def serve(connection: Connection, name: str, fault: Fault | None) -> None:
  """Answer inputs until the connection is closed; a first message says that they can come.

  Args:
    connection: brings inputs and takes their outcomes.
    name: 'module:attribute' of the Reader.
    fault: a fault to plant.
  """
  os.environ['XLA_FLAGS'] = ''  # one device
  if fault:
    sys.meta_path.insert(0, PlantedFinder(fault))
  reader = harness.load_reader(name)
  with tempfile.TemporaryDirectory() as folder:
    outcome(reader, pathlib.Path(folder), reader.inputs[0])  # imports what is imported late
  limit = _address_space() + MEMORY
  resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
  connection.send('ready')
  while True:
    try:
      files = connection.recv()
    except EOFError:
      return
    with tempfile.TemporaryDirectory() as folder:
      connection.send(outcome(reader, pathlib.Path(folder), files))


def outcome(reader: Reader, folder: pathlib.Path, files: Files) -> tuple[str, str]:
  """Write an input to a folder, read it, and return the kind of the outcome and a text."""
  from cai_jax.runtime.errors import UserError

  for name, data in files.items():
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
  try:
    value = reader.read(folder)
  except UserError as error:
    return _judge_refusal(reader, files, str(error))
  except BaseException:
    return 'traceback', traceback.format_exc()
  try:
    reader.check(files, value)
  except Exception:
    return 'contradiction', f'{value!r:.1000}\n{traceback.format_exc()}'
  return 'value', ''


def _judge_refusal(reader: Reader, files: Files, message: str) -> tuple[str, str]:
  names = {part for name in [*files, *reader.inputs[0]] for part in pathlib.Path(name).parts}
  if reader.names_file and not any(name in message for name in names):
    return 'bad refusal', f'It names none of the files: {message}'
  if len(message) > 2000:
    return 'bad refusal', f'It has {len(message)} characters: {message:.500}'
  if any(unicodedata.category(c) in ('Cc', 'Cs') and c != '\n' for c in message):
    return 'bad refusal', f'It contains control characters: {message!r}'
  try:
    reader.check_refusal(files, message)
  except Exception:
    return 'bad refusal', f'{message}\n{traceback.format_exc()}'
  return 'refused', message


def _address_space() -> int:
  """Return the size of this process's address space in bytes."""
  pages = int(pathlib.Path('/proc/self/statm').read_text().split()[0])
  return pages * resource.getpagesize()
