"""Errors that a user can fix. Every other exception is a bug and keeps its traceback."""

import reprlib
from typing import Any

from cai_jax.runtime.terminal import printable

MAX_MESSAGE = 1600  # characters; a longer message is cut in its middle


class UserError(ValueError):
  """Something that the user can fix: a setting, an input file, a folder, a model or a server.

  The message says what was wrong, what is allowed and what to do. The command-line program prints
  it without a traceback and exits with status 1. Names of files and texts of servers may contain
  anything, so control characters in the message are escaped and a long message is cut.

  Args:
    message: the message.
    *args: further attributes of the exception.
  """

  def __init__(self, message: object = '', *args: object):
    super().__init__(_shortened(printable(str(message))), *args)


class UnreadableError(UserError):
  """A text that a model cannot read: too long, blank, or with a control token. Others it can."""


class SampledError(UserError):
  """A turn or reply that cannot be used because of what was sampled, or how it is sampled.

  All processes of a replica sample the same, so all of them raise it at the same point.
  """


class StoppedError(UserError):
  """An interruption of a run after it has done work; the work is kept."""


class WaitingError(StoppedError):
  """A run that waits for something outside, such as the answers of a batch.

  The command-line program exits with `STATUS`, so that a script can tell this from a failure.
  """

  STATUS = 75  # EX_TEMPFAIL of sysexits.h: try again later


class NonFiniteError(StoppedError, FloatingPointError):
  """A loss or gradient that became NaN or infinite during training."""


class UnreachableError(StoppedError, ConnectionError):
  """A served model that stopped answering, after every retry failed."""


def show(value: Any, length: int = 100) -> str:
  """Return a value as an error message quotes it: like `repr`, but short.

  It takes little time and memory for every value, also for nested, huge or cyclic ones.

  Args:
    value: any value.
    length: maximum number of characters.
  """
  shortener = reprlib.Repr()
  shortener.maxstring = shortener.maxother = shortener.maxlong = length
  shortener.maxlevel, shortener.maxlist, shortener.maxtuple, shortener.maxdict = 3, 20, 20, 20
  try:
    text = shortener.repr(value[: length + 1] if isinstance(value, str | bytes) else value)
  except ValueError:  # Python does not print an integer of more than 4300 digits
    text = f'<a {type(value).__name__} that is too long to print>'
  return text if len(text) <= length else f'{text[: length - 3]}...'


def _shortened(message: str) -> str:
  if len(message) > MAX_MESSAGE:
    message = f'{message[: MAX_MESSAGE - 500]} [...] {message[-490:]}'
  return message
