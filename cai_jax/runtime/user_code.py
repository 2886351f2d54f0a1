"""Python files of the user, such as configs and experiments: load them and explain their errors."""

import importlib.util
import inspect
import pathlib
import traceback
from typing import Any

from cai_jax.runtime.errors import UserError


def call_function(file: pathlib.Path, name: str, argument: str = '') -> tuple[Any, str]:
  """Import a Python file and call one of its functions.

  Args:
    file: the file.
    name: name of the function.
    argument: a text for the function; '' calls it without arguments.

  Returns:
    What the function returns, and the docstring of the file.

  Raises:
    UserError: if the file is not Python, has no such function, or raises an error. The message
      names the file and the line.
  """
  spec = importlib.util.spec_from_file_location(file.stem, file)
  if spec is None or spec.loader is None:
    raise UserError(f'{file} is not a Python file. Its name must end in .py.')
  module = importlib.util.module_from_spec(spec)
  try:
    spec.loader.exec_module(module)
    function = getattr(module, name, None)
    if not callable(function):
      raise UserError(f'{file} does not define {name}(). Define it, or give another file.')
    if argument and not inspect.signature(function).parameters:
      raise UserError(f'{file} takes no text after a colon. Remove {":" + argument!r}.')
    return (function(argument) if argument else function()), inspect.getdoc(module) or ''
  except Exception as error:  # the file may raise anything
    explanation = explain_error(error, file)
    if explanation is None:
      raise
    raise UserError(explanation) from error


def explain_error(error: BaseException, file: pathlib.Path) -> str | None:
  """Return an error in a user's file as one sentence with the file and the line.

  Args:
    error: the error, or one that was raised while it was handled.
    file: the file.

  Returns:
    The explanation, or None if the file has no part in the error.
  """
  cause: BaseException | None = error
  while cause is not None:
    lines = [f.lineno for f in traceback.extract_tb(cause.__traceback__) if _is(f.filename, file)]
    # Python names no file for one with null bytes.
    if isinstance(cause, SyntaxError) and _is(cause.filename or str(file), file):
      lines = [cause.lineno]
    if lines:
      kind = '' if isinstance(cause, UserError) else f'{type(cause).__name__}: '
      text = cause.msg if isinstance(cause, SyntaxError) else str(cause)
      place = f'{file}, line {lines[-1]}' if lines[-1] else str(file)
      return f'{place}: {kind}{" ".join(text.split())}'
    cause = cause.__cause__ or cause.__context__
  return None


def _is(name: str, file: pathlib.Path) -> bool:
  return pathlib.Path(name).absolute() == file.absolute()
