"""Checks of the options of losses, whose messages the section of the config completes."""

import math
from typing import Any

from cai_jax.runtime.errors import UserError


def check_positive(options: Any, *names: str) -> None:
  """Check that options are positive numbers.

  Args:
    options: dataclass of the options of a loss.
    *names: names of its fields.

  Raises:
    UserError: if one is not.
  """
  for name in names:
    if not 0 < getattr(options, name) < math.inf:
      raise UserError(f'options: {name}={getattr(options, name)} must be a positive number.')


def check_share_of_labels(options: Any, name: str) -> None:
  """Check that an option is a share of labels below one half.

  Args:
    options: dataclass of the options of a loss.
    name: name of its field.

  Raises:
    UserError: if it is not.
  """
  if not 0 <= getattr(options, name) < 0.5:
    raise UserError(f'options: {name}={getattr(options, name)} must be in [0, 0.5).')


def check_not_negative(options: Any, name: str) -> None:
  """Check that an option is a finite number of at least 0.

  Args:
    options: dataclass of the options of a loss.
    name: name of its field.

  Raises:
    UserError: if it is not.
  """
  if not 0 <= getattr(options, name) < math.inf:
    raise UserError(f'options: {name}={getattr(options, name)} must be a number of at least 0.')
