"""The registry of programs whose results can be read, and what is read of them."""

import dataclasses
import math
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

from cai_jax.runtime.errors import UserError
from cai_jax.runtime.files import read_json
from cai_jax.runtime.registry import Registry

NORMAL_QUANTILE = 1.959964  # 97.5 % of the standard normal distribution


@dataclasses.dataclass(frozen=True)
class Metric:
  """A number that another program has measured of a model.

  Attributes:
    task: name of the task, with what distinguishes it from its variants.
    name: name of the metric, in the words of the program.
    value: its value, in the unit of the program; None if the program could not tell.
    error: its standard error, if the program gives one.
    count: number of samples of the task, if the program says so.
  """

  task: str
  name: str
  value: float | None
  error: float | None = None
  count: int | None = None

  @property
  def title(self) -> str:
    """The title of the metric in a table, such as 'xstest: refusal rate'."""
    return f'{self.task}: {self.name}'.replace('_', ' ')

  @property
  def interval(self) -> tuple[float, float] | None:
    """The 95 % interval that follows from the standard error, if there is one.

    A standard error of 0 comes from samples that all agree, and says nothing about others.
    """
    if self.value is None or not self.error:
      return None
    half = NORMAL_QUANTILE * self.error
    return self.value - half, self.value + half


@dataclasses.dataclass(frozen=True)
class Reader:
  """A reader of the results of a program.

  Attributes:
    recognizes: whether a JSON object has the form of the program's results.
    read: maps such an object and the name of its file, for error messages, to the metrics.
  """

  recognizes: Callable[[Mapping[str, Any]], bool]
  read: Callable[[Mapping[str, Any], str], list[Metric]]


READERS: Registry[Reader] = Registry('evaluation program')


def read_results(path: str | pathlib.Path) -> tuple[str, list[Metric]]:
  """Return the name of the program that wrote a file, and the metrics in it.

  Args:
    path: the file.

  Raises:
    UserError: if the file is missing, is of no known program, or has no metric.
  """
  path = pathlib.Path(path)
  if path.suffix == '.eval':
    raise UserError(
      f"{path} is a log of inspect in its binary format. Convert it with 'inspect log convert "
      f"{path} --to=json --output-dir=FOLDER', or write JSON with --log-format=json."
    )
  content = read_json(path)
  for program, reader in READERS.items():
    if isinstance(content, dict) and reader.recognizes(content):
      metrics = reader.read(content, str(path))
      if not metrics:
        raise UserError(f'{path} has no metric. Give the results of an evaluation that is done.')
      return program, metrics
  raise UserError(
    f'{path} is not in the form of a known evaluation program. They are {", ".join(READERS)}.'
  )


def number(value: Any) -> float | None:
  """Return a number of JSON as a float; None for NaN, infinities and everything else.

  Args:
    value: a value of JSON.
  """
  if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
    return None
  return float(value)
