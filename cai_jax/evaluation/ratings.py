"""Win rates and Elo ratings of models from pairwise comparisons."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from cai_jax.evaluation.intervals import paired_difference, paired_p_value, rate_interval
from cai_jax.runtime.errors import UserError
from cai_jax.scoring.judge import Comparison

VIRTUAL_DRAWS = 0.5  # draws added between any two players that met, so that ratings stay finite
ELO_PER_NAT = 400 / math.log(10)  # rating points per nat of log-odds


def win_rate(comparisons: Sequence[Comparison], player: str | None = None) -> dict[str, Any]:
  """Return a player's share of points, where a tie counts as half a win.

  Args:
    comparisons: results of a `judge.Judge`. Those without the player are ignored.
    player: name of the player. None means the first player of the first comparison.

  Returns:
    A dict with

    - `player`: the name;
    - `rate`: the mean over prompts of the player's mean points on that prompt;
    - `interval`: its 95 % Wilson interval [low, high] over prompts, see `intervals.rate_interval`;
    - `wins`, `ties`, `losses`: numbers of comparisons;
    - `wins_minus_losses`: the mean over prompts of the share of wins minus that of losses, which is
      twice the distance of `rate` from ½, with its interval [low, high] under
      `wins_minus_losses_interval`, see `intervals.paired_difference`;
    - `p_value`: of no difference between wins and losses, see `intervals.paired_p_value`;
    - `consistency`: share of comparisons whose two orders agree;
    - `prompts`: number of prompts.

  Raises:
    UserError: if no comparison has the player, or the player meets itself.
  """
  if player is None and comparisons:
    player = comparisons[0].players[0]
  played = [c for c in comparisons if player in c.players]
  if not played:
    players = sorted({name for c in comparisons for name in c.players})
    raise UserError(f'{player!r} is in no comparison. The players are {players}.')
  _check_distinct_players(played)
  points = [c.points if c.players[0] == player else 1 - c.points for c in played]
  by_prompt: dict[str, list[float]] = {}
  for comparison, value in zip(played, points, strict=True):
    by_prompt.setdefault(comparison.prompt, []).append(value)
  means = [float(np.mean(values)) for values in by_prompt.values()]
  wins, losses = (
    [float(np.mean(np.equal(values, outcome))) for values in by_prompt.values()]
    for outcome in (1.0, 0.0)
  )
  difference = paired_difference(wins, losses)
  return {
    'player': player,
    'rate': float(np.mean(means)),
    'interval': list(rate_interval(means)),
    'wins': points.count(1.0),
    'ties': points.count(0.5),
    'losses': points.count(0.0),
    'wins_minus_losses': difference.value,
    'wins_minus_losses_interval': [difference.low, difference.high],
    'p_value': paired_p_value(wins, losses),
    'consistency': float(np.mean([c.consistent for c in played])),
    'prompts': len(means),
  }


def elo_ratings(
  comparisons: Sequence[Comparison],
  anchor: str | None = None,
  *,
  seed: int = 0,
  samples: int = 1000,
  level: float = 0.95,
) -> dict[str, Any]:
  """Return the ratings of all players on the Elo scale.

  A player whose rating is d points higher wins with odds of 10^(d / 400). Ratings maximize the
  likelihood of the model of Bradley and Terry (1952), where a tie counts as half a win for each
  player. `VIRTUAL_DRAWS` are added between any two players that met, so that a player that always
  wins gets a finite rating. They pull ratings based on few comparisons slightly towards each other.

  Args:
    comparisons: results of a `judge.Judge`.
    anchor: name of the player whose rating is 0. None makes the mean of all ratings 0.
    seed: seed of the resampling.
    samples: number of resamples.
    level: coverage of the intervals, in (0, 1).

  Returns:
    A dict with

    - `ratings`: rating by player, best first;
    - `intervals`: [low, high] by player, from the percentile bootstrap over prompts. The anchor's
      interval is [0, 0];
    - `prompts`, `comparisons`: their numbers.

  Raises:
    UserError: if there are no comparisons, a player meets itself, the anchor is not a player, or
      some players are not connected to the others by comparisons.
  """
  if not comparisons:
    raise UserError('There is no comparison to rate players by. Judge at least one match.')
  _check_distinct_players(comparisons)
  names = sorted({name for c in comparisons for name in c.players})
  if anchor is not None and anchor not in names:
    raise UserError(f'anchor={anchor!r} is not a player. The players are {names}.')
  wins = _count_wins(comparisons, names)
  total = wins.sum(axis=0)
  met = total + total.T > 0
  _check_connected(met, names)
  virtual = met * (VIRTUAL_DRAWS / 2)
  prompts = len(wins)
  rng = np.random.default_rng(seed)
  draws = rng.multinomial(prompts, np.full(prompts, 1 / prompts), samples)
  # Fit the comparisons themselves, and every resample of their prompts, in one batch.
  resampled = np.concatenate([total[None], np.tensordot(draws.astype(float), wins, axes=1)])
  ratings = ELO_PER_NAT * _fit_bradley_terry(resampled + virtual)
  zero = ratings.mean(axis=1) if anchor is None else ratings[:, names.index(anchor)]
  ratings = ratings - zero[:, None]
  low, high = np.quantile(ratings[1:], [(1 - level) / 2, (1 + level) / 2], axis=0)
  order = np.argsort(-ratings[0], kind='stable')
  return {
    'ratings': {names[i]: float(ratings[0, i]) for i in order},
    'intervals': {names[i]: [float(low[i]), float(high[i])] for i in order},
    'prompts': prompts,
    'comparisons': len(comparisons),
  }


def _count_wins(comparisons: Sequence[Comparison], names: Sequence[str]) -> np.ndarray:
  """Return f64[prompt,winner,loser], the points that each player took from each other."""
  prompts = {prompt: i for i, prompt in enumerate(dict.fromkeys(c.prompt for c in comparisons))}
  prompt = np.array([prompts[c.prompt] for c in comparisons])
  first, second = np.array([[names.index(name) for name in c.players] for c in comparisons]).T
  points = np.array([c.points for c in comparisons])
  wins = np.zeros((len(prompts), len(names), len(names)))
  np.add.at(wins, (prompt, first, second), points)
  np.add.at(wins, (prompt, second, first), 1 - points)
  return wins


def _fit_bradley_terry(wins: np.ndarray) -> np.ndarray:
  """Return the strengths that maximize the likelihood of S tables of wins, by Newton's method.

  The log-likelihood is concave. Steps are limited to 1 nat to prevent overshooting.

  Args:
    wins: f64[S,K,K], points that player i took from player j.

  Returns:
    f64[S,K], strengths in nats with mean 0.
  """
  games = wins + wins.transpose(0, 2, 1)
  players = wins.shape[1]
  strengths = np.zeros(wins.shape[:2])
  for _ in range(200):
    gaps = strengths[:, :, None] - strengths[:, None, :]
    chance = 0.5 + 0.5 * np.tanh(gaps / 2)
    gradient = (wins - games * chance).sum(axis=2)
    weights = games * chance * (1 - chance)
    # Adding 1 / players makes the Hessian invertible: its null space is a constant shift of all
    # strengths, and the gradient has no component there.
    hessian = weights.sum(axis=2)[:, :, None] * np.eye(players) - weights + 1 / players
    step = np.linalg.solve(hessian, gradient[..., None])[..., 0]
    largest = np.abs(step).max(axis=1, keepdims=True)
    strengths += step / np.maximum(largest, 1)
    if largest.max() < 1e-9:
      return strengths - strengths.mean(axis=1, keepdims=True)
  raise RuntimeError(f'Ratings did not converge: the last step was {largest.max():.3g} nats.')


def _check_distinct_players(comparisons: Sequence[Comparison]) -> None:
  for c in comparisons:
    if c.players[0] == c.players[1]:
      raise UserError(
        f'{c.players[0]!r} meets itself on prompt {c.prompt!r}. Give the two players different '
        'names.'
      )


def _check_connected(met: np.ndarray, names: Sequence[str]) -> None:
  """Check that comparisons connect all players, directly or through others.

  Args:
    met: bool[K,K], whether two players met.
    names: the players.

  Raises:
    UserError: if they do not.
  """
  reached = np.zeros(len(names), bool)
  reached[0] = True
  for _ in names:
    reached |= met[reached].any(axis=0)
  if not reached.all():
    inside, outside = (
      [name for name, r in zip(names, reached, strict=True) if r == side] for side in (True, False)
    )
    raise UserError(
      f'No player of {inside} met one of {outside}, so their ratings cannot be compared. Judge a '
      'match between the two groups, or rate each group alone.'
    )
