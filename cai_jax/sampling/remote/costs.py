"""What served models have cost: the tokens that servers counted, and their price."""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

from cai_jax.runtime.shapes import check_shape
from cai_jax.sampling.remote.config import RemoteConfig
from cai_jax.sampling.types import Usage


@dataclasses.dataclass
class Costs:
  """Sums over the answers of one served model, in the tokens of the server.

  Attributes:
    answers: number of answers.
    attempts: requests that were sent for them. What a server charges for those that failed is not
      known.
    prompt_tokens: tokens of contexts, those from the server's cache included.
    cached_tokens: tokens of contexts from the server's cache, where it says so.
    completion_tokens: sampled tokens, those of hidden reasoning included.
    uncounted: answers whose tokens the server did not count. They are missing in the sums.
  """

  answers: int = 0
  attempts: int = 0
  prompt_tokens: int = 0
  cached_tokens: int = 0
  completion_tokens: int = 0
  uncounted: int = 0

  def add(self, usage: Usage) -> None:
    """Add an answer."""
    self.answers += 1
    self.attempts += usage.attempts
    self.uncounted += usage.total is None
    self.prompt_tokens += usage.prompt_tokens or 0
    self.cached_tokens += usage.cached_tokens or 0
    self.completion_tokens += usage.completion_tokens or 0

  def plus(self, other: 'Costs') -> 'Costs':
    """Return the sums over the answers of both."""
    return Costs(
      *(a + b for a, b in zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True))
    )

  def price(self, config: RemoteConfig) -> float | None:
    """Return the price of the counted tokens, in the currency of the config; None without one."""
    counts = self.prompt_tokens, self.cached_tokens, self.completion_tokens
    return config.price(*counts) if config.has_price else None

  def describe(self, config: RemoteConfig) -> str:
    """Return the sums and their price in words."""
    text = (
      f'{self.answers:,} answers, {self.prompt_tokens:,} tokens of contexts '
      f'({self.cached_tokens:,} cached), {self.completion_tokens:,} sampled tokens'
    )
    price = self.price(config)
    text += '' if price is None else f', price {format_price(price)}'
    if self.attempts > self.answers:
      failed = self.attempts - self.answers
      text += f'; {failed:,} requests failed, and what they cost is not known'
    if self.uncounted:
      text += f'; the server did not count the tokens of {self.uncounted:,} answers'
    return text


CostsByModel = dict[str, Costs]  # by role
_SHAPE = {...: {field.name: int for field in dataclasses.fields(Costs)}}


def sum_usage(usages: Iterable[tuple[str, Usage]]) -> CostsByModel:
  """Return the sums over some answers, each given with the role of its model."""
  sums: CostsByModel = {}
  for model, usage in usages:
    sums.setdefault(model, Costs()).add(usage)
  return dict(sorted(sums.items()))


def sum_costs(parts: Iterable[CostsByModel]) -> CostsByModel:
  """Return the sums of sums."""
  total: CostsByModel = {}
  for part in parts:
    for model, costs in part.items():
      total[model] = total.get(model, Costs()).plus(costs)
  return dict(sorted(total.items()))


def costs_from_json(value: Any, place: str) -> CostsByModel:
  """Return sums as a file has them.

  Args:
    value: the content of the file.
    place: the file, for error messages.

  Raises:
    UserError: if it has another form.
  """
  check_shape(value, _SHAPE, place)
  return {model: Costs(**sums) for model, sums in value.items()}


def costs_to_json(costs: Mapping[str, Costs]) -> dict[str, dict[str, int]]:
  """Return sums as a file has them."""
  return {model: dataclasses.asdict(sums) for model, sums in costs.items()}


def format_price(price: float) -> str:
  """Return a price with two digits after the point, or with two significant ones below 1."""
  return f'{price:,.2f}' if price >= 1 or not price else f'{price:.2g}'
