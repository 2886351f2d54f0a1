"""Small figures of every score over the rounds of revision, with M_aligned beside them."""

from typing import Any

from cai_jax.report.elements import figure, figure_grid
from cai_jax.report.figure_data import MAX_MARKERS, Series
from cai_jax.report.figures import line_figure
from cai_jax.report.finding_numbers import is_number
from cai_jax.report.numbers import columns, heading, interval, round_number
from cai_jax.report.palette import COLOURS, OTHER_COLOUR, RATE_COLOURS
from cai_jax.report.svg import inline_svg

SIZE = (260, 190)  # points
ALIGNED_COLOUR = 3
MOST = 40  # figures; a page with more is not read


def score_figures(summary: dict[str, Any]) -> str:
  """Return one small figure per score: its mean in each round, then that of M_aligned.

  Rates are in per cent. Scores with fewer than two values over the rounds are left out.

  Args:
    summary: the summary of a run.

  Returns:
    HTML; '' if there is no score of rounds.

  Raises:
    UserError: if a rate is not in [0, 1], or an interval is not (low, high).
  """
  stages = summary.get('stages') or {}
  rows = {n: row for name, row in stages.items() if (n := round_number(name)) is not None}
  aligned = (summary.get('models') or {}).get('aligned') or {}
  keys = [key for key in columns({'stages': stages}) if key != 'count'] if rows else []
  drawn = [svg for key in keys if (svg := _draw(key, rows, aligned))][:MOST]
  return figure_grid(drawn, 'multiples') if drawn else ''


def _draw(key: str, rows: dict[int, dict[str, Any]], aligned: dict[str, Any]) -> str:
  rounds = sorted(n for n, row in rows.items() if is_number(row.get(key)))
  if len(rounds) < 2:
    return ''
  factor = 100 if key.endswith('_rate') else 1
  colour = RATE_COLOURS.get(key, OTHER_COLOUR)
  series = [_series('M_θ, by round', key, rounds, [rows[n] for n in rounds], factor, colour)]
  ticks = [(n, f'{n:g}') for n in rounds]
  if is_number(aligned.get(key)):
    place = rounds[-1] + 1
    series.append(_series('M_aligned', key, [place], [aligned], factor, ALIGNED_COLOUR))
    ticks.append((place, 'aligned'))
  drawing = line_figure(
    series,
    'round',
    '%' if factor == 100 else 'mean',
    description=f'{heading(key)}: the mean in each round, and of M_aligned',
    x_ticks=ticks if len(rounds) <= min(MAX_MARKERS, 9) else None,
    size=SIZE,
    legend=False,
  )
  return figure(heading(key), inline_svg(drawing))


def _series(
  name: str,
  key: str,
  x: list[int],
  rows: list[dict[str, Any]],
  factor: int,
  colour: int,
) -> Series:
  bounds = [interval(row, key) for row in rows]
  low, high = (
    tuple(factor * b[side] if b else None for b in bounds) if any(bounds) else None
    for side in (0, 1)
  )
  y = tuple(factor * row[key] for row in rows)
  return Series(name, tuple(x), y, low, high, colour % len(COLOURS))
