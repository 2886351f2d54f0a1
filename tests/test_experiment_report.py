"""Test the report of an experiment: its page, figures and table are exact and run no markup."""

import copy
import re
import shutil
import time
import xml.etree.ElementTree

import pytest

from cai_jax import report
from cai_jax.report import figures, inline_svg
from cai_jax.report.figure_data import Panel, Point, Series
from cai_jax.report.numbers import cell

CHARACTER = 0.56 * 12  # mean width of a character in a sans-serif font
INJECTED = '<script>document.title = "owned"</script><img src=x onerror="document.title=\'owned\'">'


def _number(value, half, seeds=None):
  number = {'value': value, 'interval': [value - half, value + half]}
  return number | ({'by_seed': seeds} if seeds else {})


def _arm(response, rate, tokens, differences=None, overrides=None):
  harmful = {
    'count': 1200,
    'metrics': {
      'violation_rate': _number(rate, 0.02, {'0': rate + 0.01, '1': rate - 0.01}),
      'mean_tokens': _number(tokens, 1.5, {'0': tokens, '1': tokens}),
    },
  }
  helpful = {'count': 300, 'metrics': {'violation_rate': _number(0.05, 0.01)}}
  if differences:
    harmful['differences'] = differences
  return {
    'response': response,
    'overrides': overrides or {},
    'facts': {'coverage': 4.0},
    'groups': {'harmful': harmful, 'helpful': helpful},
  }


def _results(**changes):
  lower = {'violation_rate': _number(-0.33, 0.03), 'mean_tokens': _number(-2.0, 3.0)}
  higher = {'violation_rate': _number(-0.01, 0.01), 'mean_tokens': _number(6.0, 1.0)}
  arms = {
    'initial': _arm('initial', 0.87, 54.0),
    'revision 1': _arm('revision_1', 0.54, 52.0, lower, {'feedback.rounds': 1}),
    'revision 2': _arm('revision_2', 0.86, 60.0, higher, {'feedback.rounds': 2}),
  }
  names = list(arms)
  line = {'name': 'breaks a rule', 'metric': 'violation_rate', 'arms': list(names), 'x': [0, 1, 2]}
  cost = {'run': 'r', 'seed': 0, 'stage': 'generate', 'turns': 5600, 'reused_turns': 700}
  cost |= {'tokens': 100_000, 'seconds': 13.25, 'peak_memory_bytes': 2**30}
  return {
    'name': 'revisions',
    'title': 'Does every further revision help?',
    'docstring': 'First paragraph.\n\nSecond paragraph,\n  indented.\n',
    'base': 'configs/tiny.py',
    'seeds': [0, 1],
    'reference': 'initial',
    'metrics': ['violation_rate', 'mean_tokens'],
    'arms': arms,
    'figures': [
      {'kind': 'line', 'caption': 'By round', 'group': 'harmful', 'series': [line]}
      | {'x_label': 'revisions', 'y_label': 'share of responses (%)'},
      {'kind': 'arms', 'caption': 'All arms', 'group': 'harmful', 'arms': list(names)}
      | {'metrics': ['violation_rate', 'mean_tokens']},
      {'kind': 'frontier', 'caption': 'Both', 'arms': list(names)}
      | {'x': ['harmful', 'violation_rate'], 'y': ['harmful', 'mean_tokens']},
    ],
    'config_differences': {'feedback.rounds': {'revision 1': 1, 'revision 2': 2}},
    'costs': [cost, cost | {'seed': 1, 'peak_memory_bytes': 2**31}, cost | {'stage': 'train'}],
    'notes': ['7 of 10 were mended by the first revision.'],
  } | changes


def _chain(i, arm='initial', before='Water it. You fool. Then rest.', after='Water it. Then rest.'):
  return {
    'id': f'p{i}',
    'arm': arm,
    'prompt': [{'role': 'user', 'content': f'How do I water fern {i}?'}],
    'initial': {'text': before, 'finish_reason': 'stop', 'logprob': -3.25, 'num_tokens': 7},
    'rounds': [
      {
        'principle': f'rule-{i % 3}',
        'critique': {'text': 'It says: You fool.'},
        'revision': {'text': after},
      }
    ],
    'violations': [['insult'], []],
  }


def _write(path, chains=(), **changes):
  report.write_experiment(path, _results(**changes), list(chains))
  return path.read_text('utf-8')


def _table(text, name):
  """Return the text of each cell of a table, row by row."""
  part = text[re.search(rf'<table class="[^"]*{name}"', text).start() :]
  part = re.sub(r'<svg.*?</svg>', '', part[: part.index('</table>')])
  rows = re.findall(r'<tr>(.*?)</tr>', part)
  cells = [re.findall(r'<t[hd][^>]*>(.*?)</t[hd]>', row) for row in rows]
  return [[re.sub(r'<[^>]*>', '', cell).replace('&nbsp;', ' ') for cell in row] for row in cells]


# ---- the numbers


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


# ---- figures


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


# ---- the page in a browser


def _hostile():
  results = _results(title=INJECTED, docstring=f'{INJECTED}\n\n{INJECTED}', notes=[INJECTED])
  results['arms'][INJECTED] = copy.deepcopy(results['arms']['revision 1'])
  results['arms'][INJECTED]['facts'] = {INJECTED: INJECTED}
  results['config_differences'] = {INJECTED: {INJECTED: INJECTED}}
  results['costs'] = [{'run': INJECTED, 'seed': INJECTED, 'stage': INJECTED, 'turns': 1}]
  for figure in results['figures'][1:]:
    figure['arms'].append(INJECTED)
  return results


def test_all_texts_of_the_results_are_escaped(tmp_path):
  report.write_experiment(tmp_path / 'e.html', _hostile(), [])
  text = (tmp_path / 'e.html').read_text('utf-8')
  assert '<img' not in text and text.count('<script') == 2
  for path in report.write_figures(tmp_path, _hostile())[::2]:
    assert not {'script', 'img'} & {node.tag for node in _svg(path.read_text('utf-8')).iter()}


@pytest.fixture(scope='module')
def driver():
  """Yield a headless Chromium that records the console."""
  webdriver = pytest.importorskip('selenium.webdriver', reason="selenium: pip install -e '.[test]'")
  from selenium.webdriver.chrome.service import Service

  names = ('chromium', 'chromium-browser', 'google-chrome')
  binary = next(filter(None, map(shutil.which, names)), None)
  service = shutil.which('chromedriver')
  if binary is None or service is None:
    pytest.skip(f'no browser: needs chromedriver and one of {", ".join(names)}')
  options = webdriver.ChromeOptions()
  options.binary_location = binary
  for argument in ('--headless', '--no-sandbox', '--disable-gpu', '--window-size=1200,900'):
    options.add_argument(argument)
  options.set_capability('goog:loggingPrefs', {'browser': 'ALL'})
  browser = webdriver.Chrome(options=options, service=Service(service))
  yield browser
  browser.quit()


@pytest.fixture
def opened(driver, tmp_path):
  """Return a function that opens an experiment's page with the given chains."""

  def open_page(chains, results=None):
    report.write_experiment(tmp_path / 'e.html', results or _results(), chains)
    driver.get('about:blank')
    driver.get_log('browser')
    driver.get((tmp_path / 'e.html').as_uri())
    return driver

  yield open_page
  assert driver.get_log('browser') == [], 'the page wrote to the console'


def _find(driver, selector):
  return driver.find_elements('css selector', selector)


def _choose(driver, name, start):
  """Choose the option whose text starts with `start`."""
  for option in _find(driver, f'#{name} option'):
    if option.text.startswith(start):
      return option.click()
  raise AssertionError(f'{name} has no option {start!r}')


def _counted(driver, text):
  """Wait until the count of chains is `text`: a search starts shortly after the last key."""
  end = time.monotonic() + 10
  while time.monotonic() < end and (shown := _find(driver, '#count')[0].text) != text:
    time.sleep(0.02)
  assert shown == text


def test_filters_and_search_narrow_the_list(opened):
  arms = list(_results()['arms'])
  chains = [_chain(i, arms[i % 3]) for i in range(30)]
  chains += [_chain(30 + i, arms[0], after='Water it. You fool. Then rest.') for i in range(5)]
  chains[7]['initial']['text'] += ' Marvellous.'
  driver = opened(chains)
  _counted(driver, '35 chains')
  assert [option.text for option in _find(driver, '#arm option')] == [
    'any', 'initial (15)', 'revision 1 (10)', 'revision 2 (10)'
  ]  # fmt: skip
  _choose(driver, 'arm', 'initial')
  _counted(driver, '15 of 35 chains')
  assert _find(driver, '.tag.arm')[0].text == 'initial'
  _choose(driver, 'change', 'last is the initial')
  _counted(driver, '5 of 35 chains')
  assert _find(driver, '#detail h3')[0].text == 'p30'
  _choose(driver, 'arm', 'revision 1')
  _counted(driver, '0 of 35 chains')
  assert 'No chain fits' in _find(driver, '#detail')[0].text
  _choose(driver, 'change', 'any')
  _choose(driver, 'principle', 'rule-1')
  _counted(driver, '10 of 35 chains')
  _choose(driver, 'violation', 'kept at first and')
  _counted(driver, '0 of 35 chains')
  _choose(driver, 'violation', 'any')
  _find(driver, '#search')[0].send_keys('marvellous fern')
  _counted(driver, '1 of 35 chains')
  assert _find(driver, '#detail h3')[0].text == 'p7'


def test_changes_are_marked_by_word_and_keys_move_the_selection(opened):
  driver = opened([_chain(i) for i in range(4)])
  body = _find(driver, 'body')[0]

  def shown():
    return _find(driver, '#detail h3')[0].text

  assert shown() == 'p0'
  assert [node.text.strip() for node in _find(driver, '#detail del')] == ['You fool.']
  assert _find(driver, '#detail ins') == []
  body.send_keys('j')
  body.send_keys('j')
  assert shown() == 'p2'
  body.send_keys('k')
  assert shown() == 'p1'
  body.send_keys('d')
  assert _find(driver, '#detail del') == []
  body.send_keys('/')
  assert driver.switch_to.active_element.get_attribute('id') == 'search'
  driver.switch_to.active_element.send_keys('fern 3', '\ue007')  # Enter
  _counted(driver, '1 of 4 chains')
  assert shown() == 'p3'


def test_markup_in_texts_and_names_is_shown_and_not_run(opened):
  chain = _chain(0, INJECTED, before=INJECTED, after=INJECTED + ' Done.')
  chain['prompt'][0]['content'] = INJECTED
  driver = opened([chain], _hostile())
  driver.execute_script("document.querySelectorAll('details').forEach((d) => { d.open = true; })")
  assert driver.title == INJECTED
  assert _find(driver, 'img') == [] and len(_find(driver, 'script')) == 2
  for place in ('h1', '.lead', 'header pre', '.notes', '.arms', '.settings', '.costs', '.tag.arm'):
    assert INJECTED in _find(driver, place)[0].text, place
  for place in _find(driver, '#detail .text')[:2]:
    assert place.text == INJECTED
  _choose(driver, 'arm', INJECTED)
  _counted(driver, '1 chain')
  assert driver.title == INJECTED


def test_five_thousand_chains_are_painted_within_two_seconds(opened):
  words = 'Let the soil dry before you water the fern again, for roots rot in standing water. ' * 5
  arms = list(_results()['arms'])
  chains = [_chain(i, arms[i % 3], words + f'You fool {i}.', words) for i in range(5000)]
  driver = opened(chains)
  _counted(driver, '5,000 chains')
  assert 5 < len(_find(driver, '.row')) < 60, 'the list draws only the rows in sight'
  paint = "return performance.getEntriesByName('first-contentful-paint').map((e) => e.startTime)"
  end = time.monotonic() + 10
  while not (painted := driver.execute_script(paint)) and time.monotonic() < end:
    time.sleep(0.05)
  # In milliseconds; 5,000 chains of 18.7 MB took 64 to 220 on two shared cores.
  assert len(painted) == 1 and painted[0] < 2000
