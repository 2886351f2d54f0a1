"""One generator that stands between a chain and whoever answers it."""

from collections.abc import Callable, Generator
from typing import Any

from cai_jax.runtime.errors import UserError


def forward(
  chain: Generator[Any, Any, Any], answer: Callable[[Any], Generator[Any, Any, Any]]
) -> Generator[Any, Any, Any]:
  """Return the result of a chain, with a function between it and whoever answers.

  A UserError that is raised in `answer`, such as the engine's refusal of a turn, is raised in the
  chain, which may end there in order. Every other exception ends both.

  Args:
    chain: a new chain.
    answer: a generator function that takes what the chain yields. What it yields is passed on, and
      what it returns is sent to the chain.
  """
  value: Any = None  # starts the chain
  error: UserError | None = None
  while True:
    try:
      item = chain.send(value) if error is None else chain.throw(error)
    except StopIteration as done:
      return done.value
    value = error = None
    try:
      value = yield from answer(item)
    except UserError as refusal:
      error = refusal
