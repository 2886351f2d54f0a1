"""The figures of a report show every point where the axes say."""

import math
import re
import xml.etree.ElementTree

import pytest

from cai_jax.report import figures, inline_svg, run_page
from cai_jax.report.figure_data import Series
from cai_jax.report.ticks import nice_ticks, thin, tick_labels
from cai_jax.runtime.errors import UserError
from tests.report_setup import _write


def _numbers(text):
  return [float(number) for number in re.findall(r'-?[\d.]+', text)]


def _draw(*arguments, **options):
  """Draw lines and return the root of the SVG, without namespaces."""
  root = xml.etree.ElementTree.fromstring(inline_svg(figures.line_figure(*arguments, **options)))
  for node in root.iter():
    node.tag = node.tag.split('}')[1]
  return root


def test_figures_are_well_formed_and_show_every_point():
  rate = Series(
    'breaks <&"\x00', (0, 1, 2), (87.0, 50.0, math.nan), (80.0, None, 1.0), (90.0, None, 2.0)
  )
  other = Series('helps', (0, 1, 2), (99.0, 98.0, 97.0), colour=1)
  root = _draw([rate, other], 'round <', 'share (%)', description='a "b" <c>')
  texts = [node.text for node in root.iter('text')]
  assert 'round <' in texts and 'share (%)' in texts and 'breaks <&"\ufffd' in texts
  titles = [node.text for node in root.iter('title')]
  assert sum(': ' in title for title in titles) == 5
  lines = [node.find('path').get('d') for node in root.iter('g') if node.get('class') == 'line']
  assert [len(_numbers(d)) // 2 for d in lines] == [2, 3]
  assert root.get('role') == 'img' and root.get('aria-label') == 'a "b" <c>'


def test_points_and_intervals_are_where_the_axis_says():
  series = Series('s', (0, 10), (0.0, 100.0), (0.0, 50.0), (100.0, 100.0))
  root = _draw([series], 'x', 'y', description='d', y_range=(0, 100))
  groups = {name: [] for name in ('line', 'interval', 'ygrid', 'marker')}
  for node in root.iter('g'):
    groups[node.get('class')].append(node.findall('path'))
  x0, y0, x1, y1 = _numbers(groups['line'][0][0].get('d'))
  grid = sorted((_numbers(paths[0].get('d'))[1] for paths in groups['ygrid']), reverse=True)
  labels = [n for n in root.iter('text') if n.get('text-anchor') == 'end']
  assert [n.text for n in labels] == ['0', '20', '40', '60', '80', '100']
  for node, y in zip(labels, grid, strict=True):  # text is centred on its line
    assert 2 < float(node.get('y')) - y < 6
  assert y0 == pytest.approx(grid[0], abs=0.1)
  assert y1 == pytest.approx(grid[-1], abs=0.1)
  intervals = [_numbers(paths[0].get('d')) for paths in groups['interval']]
  assert intervals[0] == pytest.approx([x0, grid[0], x0, grid[-1]], abs=0.1)
  assert intervals[1] == pytest.approx([x1, (y0 + y1) / 2, x1, grid[-1]], abs=0.1)
  markers = [_numbers(paths[0].get('transform')) for paths in groups['marker']]
  assert markers == [pytest.approx([x0, y0], abs=0.1), pytest.approx([x1, y1], abs=0.1)]


def test_figures_are_the_same_bytes_each_time():
  series = [Series(f's{i}', (0, 1), (1.0, 2.0), colour=i) for i in range(2)]
  first, second = (
    inline_svg(figures.line_figure(series, 'x', 'y', description='d')) for _ in range(2)
  )
  assert first == second


def test_figures_take_the_colour_of_the_page_and_can_be_restyled():
  series = Series('$a_1$', (0, 1), (1.0, 2.0), (0.5, 1.5), (1.5, 2.5), colour=1)
  text = inline_svg(figures.line_figure([series], '$x$', 'y', description='d'))
  assert 'class="c1 stroke"' in text and 'class="c1 fill"' in text and '$x$' in text
  assert '#000' not in text and 'black' not in text and 'style' not in text and 'id=' not in text


@pytest.mark.parametrize(
  'low, high', [(0, 1), (3, 3), (0, 0), (-5, 17), (1e-6, 2e-3), (0.98, 1.01), (0, 123456)]
)
def test_ticks_enclose_the_data_and_have_distinct_labels(low, high):
  ticks = nice_ticks(low, high)
  assert ticks[0] <= low and high <= ticks[-1] and 2 <= len(ticks) <= 12
  labels = tick_labels(ticks)
  assert len(set(labels)) == len(ticks)
  assert [float(label.replace(',', '')) for label in labels] == pytest.approx(ticks, rel=1e-6)


def test_thinning_keeps_the_extremes():
  y = [math.sin(i / 50) for i in range(10_000)]
  y[4321], y[77] = 9.0, -9.0
  xs, ys = thin(tuple(range(10_000)), tuple(y))
  assert (
    len(xs) <= 800
    and (4321, 9.0) in zip(xs, ys, strict=True)
    and (77, -9.0) in zip(xs, ys, strict=True)
  )
  assert list(xs) == sorted(set(xs))


def test_a_long_loss_curve_stays_small(tmp_path):
  training = [{'step': i, 'loss': 1.0 + i % 7} for i in range(50_000)]
  assert len(_write(tmp_path / 'report.html', training=training)) < 300_000


def test_the_running_mean_skips_values_that_are_not_finite():
  means = run_page.running_mean((math.nan, 1.0, 3.0, math.inf, 5.0, 7.0), 2)
  assert math.isnan(means[0]) and means[1:] == (1.0, 2.0, 2.0, 4.0, 6.0)


def test_series_of_unequal_length_and_empty_figures_are_errors():
  with pytest.raises(UserError, match='2 x and 1 y'):
    Series('s', (0, 1), (0.0,))
  with pytest.raises(UserError, match='no finite point'):
    figures.line_figure([Series('s', (0,), (math.nan,))], 'x', 'y', description='d')
