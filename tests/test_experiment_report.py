"""Test the report of an experiment: its page, figures and table are exact and run no markup."""

import copy
import re
import xml.etree.ElementTree

import pytest

from cai_jax import report
from cai_jax.report import figures, inline_svg
from cai_jax.report.figure_data import Panel, Point, Series
from cai_jax.report.numbers import cell
from tests.experiment_report_setup import _chain, _hostile, _results, _write

CHARACTER = 0.56 * 12  # mean width of a character in a sans-serif font


def _table(text, name):
  """Return the text of each cell of a table, row by row."""
  part = text[re.search(rf'<table class="[^"]*{name}"', text).start() :]
  part = re.sub(r'<svg.*?</svg>', '', part[: part.index('</table>')])
  rows = re.findall(r'<tr>(.*?)</tr>', part)
  cells = [re.findall(r'<t[hd][^>]*>(.*?)</t[hd]>', row) for row in rows]
  return [[re.sub(r'<[^>]*>', '', cell).replace('&nbsp;', ' ') for cell in row] for row in cells]


def test_the_page_marks_differences_that_exclude_zero_with_a_word(tmp_path):
  rows = _table(_write(tmp_path / 'e.html'), 'arms')
  assert rows[0] == ['', 'scored', 'coverage', 'count', 'breaks a rule', 'mean tokens']
  assert rows[1] == ['Harmful prompts'] and rows[5] == ['Helpful prompts']
  assert rows[2][:4] == ['initial', 'initial', '4', '1,200']
  assert rows[2][4:] == ['87.0 % [85.0, 89.0]', '54.0 [52.5, 55.5]']
  assert rows[3][4] == '54.0 % [52.0, 56.0]−33.0 pp [−36.0, −30.0] ▼ lower'
  assert rows[3][5] == '52.0 [50.5, 53.5]−2.0 [−5.0, +1.0]'
  # An interval that ends at zero does not exclude it.
  assert rows[4][4] == '86.0 % [84.0, 88.0]−1.0 pp [−2.0, 0.0]'
  assert rows[4][5] == '60.0 [58.5, 61.5]+6.0 [+5.0, +7.0] ▲ higher'
  assert rows[6] == ['initial', 'initial', '4', '300', '5.0 % [4.0, 6.0]', '–']


def test_the_text_table_has_the_same_numbers_in_aligned_columns():
  lines = report.experiment_table(_results()).splitlines()
  assert [line[:15].strip() for line in lines[1:-1]] == [
    'Harmful prompts', 'initial', 'revision 1', 'revision 2',
    'Helpful prompts', 'initial', 'revision 1', 'revision 2',
  ]  # fmt: skip
  assert re.split(r'\s{3,}', lines[3].strip()) == [
    'revision 1', '4', '1,200', '54.0 % [52.0, 56.0]', '−33.0 [−36.0, −30.0] *',
    '52.0 [50.5, 53.5]', '−2.0 [−5.0, +1.0]',
  ]  # fmt: skip
  assert [line.count('*') for line in lines[2:5]] == [0, 1, 1]
  assert len({line.index('%') for line in lines[1:-1] if '%' in line}) == 1
  assert "to 'initial'" in lines[-1]


def test_seeds_settings_and_costs_are_in_tables(tmp_path):
  text = _write(tmp_path / 'e.html')
  seeds = _table(text[text.index('Values by seed') :], 'results')
  assert seeds[1] == ['seed', '0', '1', '0', '1']
  assert seeds[4] == ['revision 1', '55.0 %', '53.0 %', '52.0', '52.0']
  settings = _table(text, 'settings')
  assert settings == [
    ['arm', 'feedback.rounds'], ['initial', '–'], ['revision 1', '1'], ['revision 2', '2']
  ]  # fmt: skip
  costs = _table(text, 'costs')
  assert costs[1] == ['generate', '11,200', '1,400', '200,000', '26.5', '2.0 GiB']
  assert costs[-1] == ['all', '16,800', '2,100', '300,000', '39.8', '2.0 GiB']
  assert '<p class="lead">First paragraph.</p>' in text
  assert '<pre>Second paragraph,\n  indented.</pre>' in text
  assert '<li>7 of 10 were mended by the first revision.</li>' in text


def test_overrides_are_shown_even_without_config_differences(tmp_path):
  rows = _table(_write(tmp_path / 'e.html', config_differences={}), 'settings')
  assert rows[0] == ['arm', 'feedback.rounds'] and rows[2] == ['revision 1', '1']


def test_small_numbers_keep_their_digits_and_their_interval():
  row = {'loss': 0.01234, 'loss_interval': [0.0115, 0.013]}
  assert cell(row, 'loss') == '0.0123 [0.0115, 0.0130]'


@pytest.mark.parametrize(
  'change, message',
  [
    (lambda r: r.pop('notes'), "results has no 'notes'"),
    (lambda r: r.update(reference='base'), "reference 'base' is not an arm"),
    (lambda r: r['arms']['initial']['groups'].pop('harmful'), "groups \\['helpful'\\]"),
    (lambda r: r['figures'][0].update(kind='pie'), "figure 1 is of kind 'pie'"),
    (lambda r: r['figures'][2].pop('x'), "figure 3 \\(frontier\\) has no 'x'"),
    (lambda r: r['figures'][1]['arms'].append('gone'), "shows 'gone', which does not exist"),
    (
      lambda r: r['figures'][2].update(y=['helpful', 'mean_tokens']),
      "lack \\['helpful', 'mean_tokens'\\]",
    ),
    (lambda r: r['figures'][0]['series'][0].update(metric='typo_rate'), "shows 'typo_rate'"),
    (lambda r: r['figures'][0]['series'][0]['x'].pop(), 'Give one number for each arm'),
    (
      lambda r: r['arms']['initial']['groups']['harmful']['metrics'].update(
        violation_rate={'value': 87.0, 'interval': None}
      ),
      'violation_rate is 87.0',
    ),
    (
      lambda r: r['arms']['revision 1']['groups']['harmful']['differences'].update(
        violation_rate={'value': 0.1, 'interval': [0.2, 0.1]}
      ),
      'interval of a difference',
    ),
  ],
)
def test_malformed_results_are_an_error_and_no_page_is_written(tmp_path, change, message):
  results = copy.deepcopy(_results())
  change(results)
  with pytest.raises(ValueError, match=message):
    report.write_experiment(tmp_path / 'e.html', results, [])
  assert not list(tmp_path.iterdir())


def test_a_chain_of_an_unknown_arm_is_an_error(tmp_path):
  with pytest.raises(ValueError, match="Chain 'p0' has the arm 'other'. It must be one of"):
    _write(tmp_path / 'e.html', [_chain(0, arm='other')])


def _svg(text):
  root = xml.etree.ElementTree.fromstring(text)
  for node in root.iter():
    node.tag = node.tag.split('}')[1]
  return root


def _numbers(text):
  return [float(number) for number in re.findall(r'-?[\d.]+', text)]


def _groups(root, name):
  return [node for node in root.iter('g') if node.get('class') == name]


def _markers(root):
  """Return the (x, y) of each point."""
  return [tuple(_numbers(node.find('path').get('transform'))) for node in _groups(root, 'marker')]


def _x_ticks(root):
  """Return the x position of each number on the x axis."""
  return {
    float(node.text): float(node.get('x'))
    for node in root.iter('text')
    if node.get('text-anchor') == 'middle' and re.fullmatch(r'[\d.]+', node.text)
  }


def _y_ticks(root):
  """Return the y position of the grid line of each number on the y axis."""
  labels = [
    float(node.text)
    for node in root.iter('text')
    if node.get('text-anchor') == 'end' and re.fullmatch(r'[\d.]+', node.text)
  ]
  lines = [_numbers(node.find('path').get('d'))[1] for node in _groups(root, 'ygrid')]
  return dict(zip(sorted(labels), sorted(lines, reverse=True), strict=True))


def test_arms_are_on_their_rows_where_the_axis_says():
  panel = Panel('rate (%)', (0.0, 50.0, None), (None, 25.0, None), (None, 75.0, None), 1)
  root = _svg(inline_svg(figures.arms_figure(['a', 'b <', 'c'], [panel], description='d')))
  ticks = _x_ticks(root)
  rows = {n.text: float(n.get('y')) - 4 for n in root.iter('text') if n.text in ('a', 'b <')}
  markers = _markers(root)
  unit = (ticks[80] - ticks[0]) / 80
  assert markers[0] == pytest.approx((ticks[0], rows['a']), abs=0.2)
  assert markers[1] == pytest.approx((ticks[0] + 50 * unit, rows['b <']), abs=0.2)
  (interval,) = _groups(root, 'interval')
  low, _, high, _ = _numbers(interval.find('path').get('d'))
  assert 'c1' in interval.find('path').get('class')
  assert (low, high) == pytest.approx((ticks[0] + 25 * unit, ticks[0] + 75 * unit), abs=0.2)
  titles = [n.text for n in root.iter('title')]
  assert titles == ['a, rate (%): 0', 'b <, rate (%): 50'], 'an absent value has no dot'


def test_long_names_of_arms_are_wrapped_and_not_cut():
  name = 'a name that goes on for much longer than one line of a figure could ever hold'
  panel = Panel('p', (1.0,), (None,), (None,))
  root = _svg(inline_svg(figures.arms_figure([name], [panel], description='d')))
  lines = [n.text for n in root.iter('text') if n.get('text-anchor') == 'end']
  assert len(lines) > 1 and ' '.join(lines) == name


def test_names_on_a_frontier_cover_neither_points_nor_each_other():
  points = [
    Point(f'arm number {i}', 10 + 3.0 * i, 90 + (i * 7 % 5), (9 + 3.0 * i, 11 + 3.0 * i))
    for i in range(10)
  ]
  root = _svg(inline_svg(figures.frontier_figure(points, 'x', 'y', description='d')))
  width = float(root.get('viewBox').split()[2])
  names = [n for n in root.iter('text') if n.text.startswith('arm number')]
  assert sorted(n.text for n in names) == sorted(p.name for p in points)
  boxes = []
  for node in names:
    x, y = float(node.get('x')), float(node.get('y'))
    long = CHARACTER * len(node.text)
    start = x - {'start': 0, 'middle': long / 2, 'end': long}[node.get('text-anchor')]
    assert 0 <= start and start + long <= width + 4
    boxes.append((start, y - 9, start + long - 4, y + 2))
  marks = _markers(root)
  assert len(marks) == 10
  for i, a in enumerate(boxes):
    for b in boxes[:i]:
      assert a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1]
    for x, y in marks:
      assert not (a[0] < x < a[2] and a[1] < y < a[3])
  ys, xs = _y_ticks(root), _x_ticks(root)
  unit = (xs[40] - xs[20]) / 20
  assert marks[0] == pytest.approx((xs[40] - 30 * unit, ys[90]), abs=0.3)


def test_a_legend_with_many_series_takes_several_rows():
  series = [Series(f'a rather long name {i}', (0, 1), (1.0, 2.0), colour=i) for i in range(6)]
  root = _svg(inline_svg(figures.line_figure(series, 'x', 'y', description='d')))
  names = [node for node in root.iter('text') if node.text.startswith('a rather')]
  assert len(names) == 6
  for node in names:
    assert float(node.get('x')) + CHARACTER * len(node.text) <= figures.WIDTH
  assert len({node.get('y') for node in names}) > 1


def test_figures_in_files_have_their_own_colours_fonts_and_size(tmp_path):
  paths = report.write_figures(tmp_path / 'new', _results())
  assert [path.name for path in paths] == [
    f'revisions_{n}.{suffix}' for n in (1, 2, 3) for suffix in ('svg', 'pdf')
  ]
  for path in paths[::2]:
    text = path.read_text('utf-8')
    root = _svg(text)
    assert root.get('color') == '#000000' and 'Helvetica' in root.get('font-family')
    assert next(iter(root)).tag == 'rect' and next(iter(root)).get('fill') == '#ffffff'
    assert root.get('viewBox').split()[2:] == [root.get('width'), root.get('height')]
    assert 'inherit' not in text and 'var(' not in text
  for path in paths[1::2]:
    content = path.read_bytes()
    assert content.startswith(b'%PDF') and b'CreationDate' not in content
  again = report.write_figures(tmp_path / 'again', _results())
  assert [path.read_bytes() for path in again] == [path.read_bytes() for path in paths]


def test_missing_values_are_a_dash_or_a_gap_in_figures(tmp_path):
  results = _results()
  del results['arms']['revision 1']['groups']['harmful']['metrics']['violation_rate']
  results['arms']['revision 1']['groups']['harmful']['differences'] = {}
  results['figures'].pop()
  paths = report.write_figures(tmp_path, results)
  line, dots = (path.read_text('utf-8') for path in paths[::2])
  assert len([n for n in _svg(line).iter('title') if ': ' in n.text]) == 2
  assert [n.text for n in _svg(dots).iter('text')].count('–') == 1


def test_all_texts_of_the_results_are_escaped(tmp_path):
  report.write_experiment(tmp_path / 'e.html', _hostile(), [])
  text = (tmp_path / 'e.html').read_text('utf-8')
  assert '<img' not in text and text.count('<script') == 2
  for path in report.write_figures(tmp_path, _hostile())[::2]:
    assert not {'script', 'img'} & {node.tag for node in _svg(path.read_text('utf-8')).iter()}
