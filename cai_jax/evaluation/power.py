"""The smallest difference between two arms that a planned number of prompts can show."""

import math

from scipy import special

from cai_jax.runtime.errors import UserError

AGREEMENT = 0.5  # assumed correlation of the two arms' responses to a prompt
BASE_RATES = (0.05, 0.5)


def power_of_pairs(count: float, gains: float, losses: float, alpha: float = 0.05) -> float:
  """Return the power of McNemar's two-sided test (Connor 1987; Miettinen 1968).

  It is Φ((|d| √N - z √ψ) / √(ψ - d²)), with d = gains - losses, the discordance ψ = gains + losses
  and the normal quantile z of 1 - alpha / 2.

  Args:
    count: number of prompts N.
    gains: probability that only the first arm is 1.
    losses: probability that only the second arm is 1.
    alpha: level of the test.
  """
  difference, discordance = abs(gains - losses), gains + losses
  spread = math.sqrt(max(discordance - difference**2, 1e-12))
  z = float(special.ndtri(1 - alpha / 2))
  return float(special.ndtr((difference * math.sqrt(count) - z * math.sqrt(discordance)) / spread))


def smallest_difference(
  count: int, rate: float, agreement: float = AGREEMENT, power: float = 0.8, alpha: float = 0.05
) -> float | None:
  """Return the smallest drop of a rate that McNemar's test shows with the given power.

  The arms are assumed to be correlated by prompt: P(both 1) = p q + agreement √(p (1-p) q (1-q)),
  at most q, with the rate p of the reference and q = p - d of the arm.

  Args:
    count: number of prompts.
    rate: rate p of the reference, in (0, 1).
    agreement: correlation of the arms.
    power: the wanted power.
    alpha: level of the two-sided test.

  Returns:
    The difference d, in (0, p], or None if not even a drop to 0 can be shown.

  Raises:
    UserError: if there are no prompts.
  """
  if count < 1:
    raise UserError('There are no prompts to compare. Give at least one.')

  def reached(drop: float) -> bool:
    lower = rate - drop
    spread = math.sqrt(rate * (1 - rate) * lower * (1 - lower))
    both = min(rate * lower + agreement * spread, lower)
    return power_of_pairs(count, lower - both, rate - both, alpha) >= power

  if not reached(rate):
    return None
  low, high = 0.0, rate
  for _ in range(50):  # halving
    middle = (low + high) / 2
    low, high = (low, middle) if reached(middle) else (middle, high)
  return high


def describe_power(count: int, seeds: int = 1) -> str:
  """Return one line on the differences that a number of held-out prompts and seeds can show.

  Args:
    count: number of prompts per seed.
    seeds: number of seeds, whose responses are assumed to be independent.
  """
  parts = []
  for rate in BASE_RATES:
    drop = smallest_difference(count * seeds, rate)
    found = 'nothing, not even a drop to 0' if drop is None else f'{100 * drop:.1f} points'
    parts.append(f'{found} at a rate of {100 * rate:.0f} %')
  per_seed = f' x {seeds} seeds' if seeds > 1 else ''
  return (
    f'smallest paired difference that {count:,} prompts{per_seed} can show: {"; ".join(parts)} '
    f'(80 % power, 5 % two-sided, assumed correlation of the two responses to a prompt '
    f'{AGREEMENT})'
  )
