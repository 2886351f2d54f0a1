"""Specifications of figures that experiments share."""

from collections.abc import Mapping, Sequence
from typing import Any

RATES = (('breaks a rule', 'violation_rate'), ('still answers', 'helpful_rate'))


def rates_line(
  caption: str,
  arms: Sequence[str],
  x: Sequence[float],
  x_label: str,
  group: str = 'harmful',
  y_label: str = 'share of responses (%)',
) -> dict[str, Any]:
  """Return the specification of a line figure of the violation rate and the helpful rate.

  Args:
    caption: the figure's caption.
    arms: names of the arms; each is one point on each line.
    x: the x coordinate of each arm.
    x_label, y_label: axis labels with units.
    group: 'harmful' or 'helpful' prompts.
  """
  points = {'arms': list(arms), 'x': list(x)}
  series = [{'name': name, 'metric': metric, **points} for name, metric in RATES]
  return {
    'kind': 'line',
    'caption': caption,
    'group': group,
    'x_label': x_label,
    'y_label': y_label,
    'series': series,
  }


def rates_by_arm(caption: str, arms: Sequence[str], group: str = 'harmful') -> dict[str, Any]:
  """Return the specification of a figure with one row per arm and one panel per rate.

  Args:
    caption: the figure's caption.
    arms: names of arms, from top to bottom.
    group: 'harmful' or 'helpful' prompts.
  """
  return {
    'kind': 'arms',
    'caption': caption,
    'group': group,
    'metrics': [metric for _, metric in RATES],
    'arms': list(arms),
  }


def rate_differences(caption: str, arms: Sequence[str], group: str = 'harmful') -> dict[str, Any]:
  """Return the specification of a figure with the paired differences of both rates.

  Args:
    caption: the figure's caption.
    arms: names of arms that are compared with another response or arm, from top to bottom.
    group: 'harmful' or 'helpful' prompts.
  """
  return rates_by_arm(caption, arms, group) | {'kind': 'differences'}


def figure_arms(figure: Mapping[str, Any]) -> set[str]:
  """Return the names of the arms that a figure specification shows.

  Args:
    figure: a figure specification, as `cai_jax.report.results` describes.
  """
  return {name for series in figure.get('series', [figure]) for name in series['arms']}
