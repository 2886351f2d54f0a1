"""Errors that a user can fix. Every other exception is a bug and keeps its traceback."""


class UserError(ValueError):
  """Something that the user can fix: a setting, an input file, a folder, a model or a server.

  The message says what was wrong, what is allowed and what to do. The command-line program prints
  it without a traceback and exits with status 1.
  """


class StoppedError(UserError):
  """An interruption of a run after it has done work; the work is kept."""


class NonFiniteError(StoppedError, FloatingPointError):
  """A loss or gradient that became NaN or infinite during training."""


class UnreachableError(StoppedError, ConnectionError):
  """A served model that stopped answering, after every retry failed."""
