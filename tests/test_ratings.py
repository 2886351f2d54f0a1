"""Win rates and Elo ratings of players whose odds are known."""

import itertools
import math

import numpy as np
import pytest

from cai_jax.evaluation.intervals import wilson_interval
from cai_jax.evaluation.ratings import elo_ratings, win_rate
from cai_jax.runtime.errors import UserError
from cai_jax.scoring.judge import Comparison


def make_comparison(prompt, first, second, points):
  """Return a comparison that gives `points` to the first player."""
  return Comparison(prompt, (first, second), {1.0: (1, 1), 0.5: (1, -1), 0.0: (-1, -1)}[points])


def test_win_rate_counts_ties_as_halves():
  comparisons = [
    make_comparison('p1', 'x', 'y', 1.0),
    make_comparison('p2', 'y', 'x', 1.0),
    make_comparison('p3', 'x', 'y', 0.5),
    make_comparison('p4', 'y', 'x', 0.0),
  ]
  result = win_rate(comparisons)
  assert (result['player'], result['rate'], result['prompts']) == ('x', 0.625, 4)
  assert (result['wins'], result['ties'], result['losses']) == (2, 1, 1)
  assert result['consistency'] == 0.75
  low, high = result['interval']
  assert low < 0.625 < high
  other = win_rate(comparisons, 'y')
  assert other['rate'] == 0.375 and (other['wins'], other['losses']) == (1, 2)


def test_the_prompts_of_a_win_rate_are_its_trials():
  # Ten comparisons of each of two prompts are two observations, not twenty.
  comparisons = [make_comparison(f'p{p}', 'x', 'y', float(p)) for p in (0, 1) for _ in range(10)]
  assert win_rate(comparisons)['interval'] == list(wilson_interval(1, 2))
  with pytest.raises(UserError, match=r"'z' is in no comparison. The players are \['x', 'y'\]"):
    win_rate(comparisons, 'z')
  with pytest.raises(UserError, match='no comparison'):
    win_rate([])
  with pytest.raises(UserError, match='meets itself'):
    win_rate([make_comparison('p', 'x', 'x', 1.0)])


@pytest.mark.parametrize(('wins', 'losses', 'ties'), [(30, 10, 0), (5, 0, 0), (0, 0, 4), (6, 2, 3)])
def test_ratings_of_two_players_follow_from_their_points(wins, losses, ties):
  results = [1.0] * wins + [0.0] * losses + [0.5] * ties
  comparisons = [make_comparison(f'p{i}', 'x', 'y', r) for i, r in enumerate(results)]
  ratings = elo_ratings(comparisons)['ratings']
  # The virtual half draw gives each player a quarter of a point.
  lead = 400 * math.log10((wins + ties / 2 + 0.25) / (losses + ties / 2 + 0.25))
  assert ratings['x'] - ratings['y'] == pytest.approx(lead, abs=1e-6)
  assert ratings['x'] + ratings['y'] == pytest.approx(0, abs=1e-9)
  anchored = elo_ratings(comparisons, anchor='y')
  assert anchored['ratings'] == {'x': pytest.approx(lead, abs=1e-6), 'y': 0}
  assert anchored['intervals']['y'] == [0, 0]


TRUE_RATINGS = {'a': 250.0, 'b': 40.0, 'c': -60.0, 'd': -230.0}


def simulate(prompts, seed, ties=0.0):
  """Return comparisons where every pair meets once per prompt, with the odds of `TRUE_RATINGS`."""
  rng = np.random.default_rng(seed)
  comparisons = []
  for prompt in range(prompts):
    for first, second in itertools.combinations(TRUE_RATINGS, 2):
      chance = 1 / (1 + 10 ** ((TRUE_RATINGS[second] - TRUE_RATINGS[first]) / 400))
      # Ties are drawn so that expected points stay the same; pairs of similar strength tie most.
      share = 2 * ties * min(chance, 1 - chance)
      points = 0.5 if rng.random() < share else None
      if points is None:
        points = float(rng.random() < (chance - share / 2) / (1 - share))
      comparisons.append(make_comparison(str(prompt), first, second, points))
  return comparisons


@pytest.mark.parametrize('ties', [0.0, 0.4])
def test_ratings_recover_known_odds(ties):
  result = elo_ratings(simulate(3000, 1, ties), samples=200)
  assert list(result['ratings']) == list(TRUE_RATINGS)  # best first
  for player, rating in TRUE_RATINGS.items():
    assert result['ratings'][player] == pytest.approx(rating, abs=15)
  assert (result['prompts'], result['comparisons']) == (3000, 18000)


def test_intervals_have_the_stated_coverage():
  covered = []
  for seed in range(40):
    result = elo_ratings(simulate(60, seed), samples=200)
    for player, (low, high) in result['intervals'].items():
      covered.append(low <= TRUE_RATINGS[player] <= high)
      assert low < result['ratings'][player] < high
  assert 0.87 <= np.mean(covered) <= 0.99


def test_a_player_that_always_wins_has_a_finite_rating():
  comparisons = [
    make_comparison(f'p{i}', first, second, 1.0)
    for i in range(200)
    for first, second in itertools.combinations('abcde', 2)
  ]
  result = elo_ratings(comparisons, samples=50)
  ratings = list(result['ratings'].values())
  assert list(result['ratings']) == list('abcde') and np.all(np.diff(ratings) < -100)
  assert np.all(np.abs(ratings) < 4000)
  single = elo_ratings([make_comparison('p', 'a', 'b', 1.0)], samples=10)['ratings']
  assert single['a'] == pytest.approx(200 * math.log10(1.25 / 0.25))


def test_comparisons_that_cannot_be_rated_are_rejected():
  with pytest.raises(UserError, match='no comparison'):
    elo_ratings([])
  with pytest.raises(UserError, match=r"No player of \['a', 'b'\] met one of \['c', 'd'\]"):
    elo_ratings([make_comparison('p', 'a', 'b', 1.0), make_comparison('p', 'c', 'd', 1.0)])
  with pytest.raises(UserError, match="anchor='z' is not a player"):
    elo_ratings([make_comparison('p', 'a', 'b', 1.0)], anchor='z')
  with pytest.raises(UserError, match='meets itself'):
    elo_ratings([make_comparison('p', 'a', 'a', 1.0)])
