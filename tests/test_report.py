"""Test the report of a run: texts stay data, numbers are exact, figures and the page work."""

import ast
import base64
import copy
import hashlib
import html.parser
import json
import math
import pathlib
import re
import shutil
import subprocess
import sys
import time
import xml.etree.ElementTree

import pytest

from cai_jax import report
from cai_jax.report import figures, inline_svg, page, run_page
from cai_jax.report.figure_data import Series
from cai_jax.report.numbers import columns, heading
from cai_jax.report.ticks import nice_ticks, thin, tick_labels
from cai_jax.runtime.errors import UserError
from configs import default

# What a report may use of the rest of the package; these modules use the standard library only.
OUR_MODULES = (
  'cai_jax.runtime.errors',
  'cai_jax.runtime.shapes',
  'cai_jax.runtime.terminal',
  'cai_jax.runtime.files',
)
HOSTILE = (
  '</script><script>document.title = "owned"</script>'
  '<img src=x onerror="document.title=\'owned\'"> ]]> <!-- <script> '
  '\u2028 \u2029 @@title@@ \ud83d &lt;'
)
RATES = {
  'violation_rate': 0.873,
  'violation_rate_interval': [0.8375, 0.9],
  'helpful_rate': 0.998,
  'mean_tokens': 54.25,
  'count': 1400,
}
SUMMARY = {
  'stages': {
    'initial': RATES,
    'revision_10': RATES | {'violation_rate': 0.107, 'violation_rate_interval': [0.05, 0.2]},
    'revision_2': RATES | {'violation_rate': 0.517, 'violation_rate_interval': [0.5, 0.6]},
  },
  'models': {'aligned': RATES | {'violation_rate': 0.0753}, 'base': RATES},
  'benign': {'base': {'violation_rate': 0.0, 'helpful_rate': 1.0, 'mean_tokens': 9.0, 'count': 3}},
}
TRAINING = [
  {'step': i, 'loss': 50.0 / i, 'learning_rate': 1e-3, 'grad_norm': 1.0} for i in range(1, 101)
]
MANIFEST = {
  'started': '2030-01-02T03:04:05Z',
  'versions': {'jax': '0.10'},
  'stages': {
    'generate': {
      'rows_in': 1234,
      'rows_kept': 1230,
      'rows_dropped': {'too <long>': 3, 'empty': 1},
      'seconds': 12.5,
      'tokens_per_second': 2048.4,
      'journal_hits': 17,
      'settings': {'seed': 5, 'feedback': {'rounds': 4}},
      'git_commit': 'abc',
    },
    'evaluate': {'aligned': {'rows': 600, 'mean_tokens': 54.2}},
  },
}


def _response(text, **more):
  return {'text': text, 'finish_reason': 'stop', 'logprob': -3.25, 'num_tokens': 7} | more


def _chain(i, before='Water it. You fool. Then rest.', after='Water it. Then rest.', **more):
  return {
    'id': f'p{i}',
    'prompt': [{'role': 'user', 'content': f'How do I water fern {i}?'}],
    'initial': _response(before),
    'rounds': [
      {
        'principle': f'rule-{i % 3}',
        'critique': _response('It says: You fool.'),
        'revision': _response(after),
      }
    ],
  } | more


def _write(path, **changes):
  arguments = {
    'title': 'A run',
    'config': default.get_config().to_dict() | {'seed': 5},
    'manifest': MANIFEST,
    'summary': SUMMARY,
    'training': TRAINING,
    'chains': [_chain(0)],
  }
  report.write_report(path, **(arguments | changes))
  return path.read_text('utf-8')


class _Page(html.parser.HTMLParser):
  """Collects the elements with their attributes, and the text inside scripts by type."""

  def __init__(self, text):
    super().__init__()
    self.elements, self.scripts, self._open = [], {}, None
    self.feed(text)

  def handle_starttag(self, tag, attrs):
    self.elements.append((tag, dict(attrs)))
    if tag == 'script':
      self._open = dict(attrs).get('type', 'run')
      self.scripts.setdefault(self._open, []).append('')

  def handle_endtag(self, tag):
    if tag == 'script':
      self._open = None

  def handle_data(self, data):
    if self._open:
      self.scripts[self._open][-1] += data


# ---- the page as text


def test_embedded_chains_parse_back_whatever_their_texts_contain(tmp_path):
  chains = [_chain(0, before=HOSTILE, after=HOSTILE * 2), _chain(1, metadata={HOSTILE: HOSTILE})]
  chains[0]['prompt'][0]['content'] = HOSTILE
  parsed = _Page(_write(tmp_path / 'report.html', chains=chains))
  assert set(parsed.scripts) == {'application/json', 'run'}
  (block,), (script,) = parsed.scripts['application/json'], parsed.scripts['run']
  assert json.loads(block) == chains
  assert block.isascii() and not set('<>&') & set(block)
  assert 'owned' not in script
  assert 'img' not in {tag for tag, _ in parsed.elements}


def test_every_other_text_is_escaped(tmp_path):
  summary = {'stages': {HOSTILE: RATES}, 'models': {'base': RATES | {HOSTILE: HOSTILE}}}
  manifest = {
    HOSTILE: HOSTILE,
    'stages': {HOSTILE: {'rows_dropped': {HOSTILE: 1}, HOSTILE: HOSTILE}},
  }
  config = {'seed': HOSTILE, 'model': {'base': HOSTILE}, HOSTILE: HOSTILE}
  config['train'] = {'loss_normalization': HOSTILE}
  text = _write(
    tmp_path / 'report.html', title=HOSTILE, config=config, manifest=manifest, summary=summary
  )
  parsed = _Page(text)
  assert len(parsed.scripts['run']) == len(parsed.scripts['application/json']) == 1
  assert 'img' not in {tag for tag, _ in parsed.elements}
  assert not [a for _, attrs in parsed.elements for a in attrs if a.startswith('on')]


def test_probes_and_remarks_are_text(tmp_path):
  """Also where a number belongs, if another program wrote the rows."""
  row = dict.fromkeys(('step', 'id', 'prompt', 'text'), HOSTILE)
  manifest = {'stages': {'train': {'remarks': [HOSTILE], 'exported_step': HOSTILE}}}
  parsed = _Page(
    _write(
      tmp_path / 'report.html',
      probes=[row, row | {'step': 2}],
      manifest=manifest,
      texts={HOSTILE: HOSTILE},
      held_out=[{'step': 1, 'loss': 1.0}],
    )
  )
  assert 'img' not in {tag for tag, _ in parsed.elements}
  assert len(parsed.scripts['run']) == len(parsed.scripts['application/json']) == 1
  assert not [a for _, attrs in parsed.elements for a in attrs if a.startswith('on')]


def test_many_rows_take_linear_time(tmp_path):
  """100,000 rows of metrics and probes, and 20,000 rounds; a quadratic step would take minutes."""
  count = 100_000
  training = [{'step': i, 'loss': 1.0 + i % 7, 'grad_norm': 1.0} for i in range(count)]
  probes = [{'step': i, 'id': str(i), 'prompt': 'Hi', 'text': 'ho'} for i in range(count)]
  stages = {f'revision_{i}': RATES for i in range(1, 20_001)} | {'initial': RATES}
  begin = time.process_time()
  text = _write(
    tmp_path / 'report.html', training=training, probes=probes, summary={'stages': stages}
  )
  assert time.process_time() - begin < 60
  assert text.count('<table class="probes">') == count


def test_running_means_are_exact_and_linear():
  values = (1e16, 1.0, -1e16, math.nan, 3.0, math.inf, 5.0)
  means = run_page.running_mean(values, 3)
  assert means[:4] == (1e16, (1e16 + 1) / 2, 1 / 3, 1 / 3)
  assert means[4] == means[5] == pytest.approx(-1e16 / 3)
  begin = time.process_time()
  run_page.running_mean((0.1,) * 200_000, 50_000)
  assert time.process_time() - begin < 5


@pytest.mark.parametrize('name', ['../out', '/tmp/out', 'a/b', '..', '', 'a\\b', 'a\x1b[2J', '.'])
def test_figures_stay_in_their_folder(tmp_path, name):
  results = dict.fromkeys(('title', 'docstring', 'base'), '') | {'name': name, 'seeds': [0]}
  results |= {'reference': 'a', 'metrics': [], 'figures': [], 'config_differences': {}}
  arm = {'response': 'last', 'overrides': {}, 'facts': {}}
  arm['groups'] = {'harmful': {'count': 1, 'metrics': {}}}
  results |= {'arms': {'a': arm}, 'costs': [], 'notes': []}
  with pytest.raises(UserError, match='The name of the results is'):
    report.write_figures(tmp_path / 'figures', results)
  assert not (tmp_path / 'figures').exists()


def test_the_policy_allows_one_script_one_style_sheet_and_no_request(tmp_path):
  text = _write(tmp_path / 'report.html')
  (policy,) = [
    attrs['content']
    for tag, attrs in _Page(text).elements
    if tag == 'meta' and attrs.get('http-equiv') == 'Content-Security-Policy'
  ]
  assert "default-src 'none'" in policy and 'unsafe' not in policy
  for tag in ('script', 'style'):
    body = text[text.index(f'<{tag}>') + len(tag) + 2 : text.rindex(f'</{tag}>')]
    digest = base64.b64encode(hashlib.sha256(body.encode()).digest()).decode()
    assert f"{tag}-src 'sha256-{digest}'" in policy
  assert not re.search(r'\b(src|href)=|url\(|@import|https?://(?!www\.w3\.org/2000/svg)', text)
  assert ' style=' not in text


def test_nan_and_infinity_are_embedded_as_strings():
  value = {'a': [math.nan, (math.inf, -math.inf)], 'b': 0.5}
  assert json.loads(page.embedded_json(value)) == {
    'a': ['NaN', ['Infinity', '-Infinity']],
    'b': 0.5,
  }


def test_markers_inside_inserted_text_are_not_replaced():
  assert page.fill_template('@@a@@ @@b@@', a='@@b@@', b='x') == '@@b@@ x'
  with pytest.raises(ValueError, match="markers \\['a', 'b'\\], not \\['a'\\]"):
    page.fill_template('@@a@@ @@b@@', a='x')


def test_the_page_shows_the_manifest_and_the_main_result(tmp_path):
  text = _write(tmp_path / 'report.html')
  base = default.get_config().model.base
  for shown in (
    f'<dt>model</dt><dd>{base}</dd>',
    '2030-01-02T03:04:05Z',
    '1,234',
    '1,230',
    'too &lt;long&gt;: 3',
  ):
    assert shown in text
  assert 'journal hits: 17' in text and '>4<div class="reason">' in text and '2,048' in text
  assert '<b>87.3&nbsp;%</b> of the initial responses break a rule; after 10 rounds' in text
  table = text[text.index('<table class="stages">') :]
  table = table[: table.index('</table>')]
  assert 'aligned: rows 600, mean tokens 54.2' in table
  assert 'settings' not in table and 'git commit' not in table  # the folds below hold them


def test_a_run_without_a_scorer_shows_the_other_numbers(tmp_path):
  rows = {
    'initial': {'mean_tokens': 31.5, 'count': 9},
    'revision_1': {'mean_tokens': 2.0, 'count': 9},
  }
  text = _write(tmp_path / 'report.html', summary={'stages': rows})
  assert '31.5' in text and 'breaks a rule</th>' not in text and 'Rates over' not in text
  assert 'class="lead"' not in text and 'Loss over training' in text


def test_columns_of_measures_stand_behind_those_of_every_run():
  row = {'count': 3, 'mean_tokens': 4.0, 'kl': 0.5, 'reward': 1.0, 'win_rate': 0.5, 'depth': 2}
  shown = columns({'models': {'base': row}})
  assert shown == ['mean_tokens', 'count', 'kl', 'reward', 'win_rate', 'depth']
  assert heading('kl') == 'KL from M_θ, nats' and heading('win_rate') == 'wins against M_θ'


def test_an_empty_run_makes_a_page(tmp_path):
  text = _write(
    tmp_path / 'report.html', config={}, manifest={}, summary={}, training=[], chains=[]
  )
  assert 'Nothing was evaluated' in text and 'No training loss' in text and 'names no stage' in text


def test_a_loss_that_is_not_finite_is_counted_and_makes_a_gap(tmp_path):
  training = [{'step': i, 'loss': math.nan if i in (3, 4) else 1.0 + i} for i in range(8)]
  text = _write(tmp_path / 'report.html', training=training, summary={})
  assert 'Loss over training (2 values not finite: gaps)' in text
  assert text.count('<g class="line">') == 2
  text = _write(tmp_path / 'report.html', training=[{'step': 1, 'loss': math.nan}], summary={})
  assert 'No finite training loss' in text


@pytest.mark.parametrize(
  'change, message',
  [
    (lambda c: c.pop('initial'), r"chain 0 \(id 'p0'\) has no 'initial'"),
    (lambda c: c['rounds'][0].pop('critique'), "round 1 has no 'critique'"),
    (lambda c: c.update(violations=[[]]), '2 responses and 1 lists of violations'),
    (lambda c: c.update(id='p1'), r"the same id: \['p1'\]"),
  ],
)
def test_a_malformed_chain_is_an_error_and_no_page_is_written(tmp_path, change, message):
  chain = copy.deepcopy(_chain(0))
  change(chain)
  with pytest.raises(UserError, match=message):
    _write(tmp_path / 'report.html', chains=[chain, _chain(1)])
  assert not list(tmp_path.iterdir())


# ---- figures and table


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


def test_the_table_lists_the_rows_in_reading_order():
  lines = report.summary_table(SUMMARY).splitlines()
  names = [line.split('  ')[0] or line.split()[0] for line in lines[1:-1]]
  assert names == [
    'Held-out prompts, round by round', 'initial', 'revision_2', 'revision_10',
    'Held-out prompts, models', 'base', 'aligned',
    'Held-out benign prompts, models', 'base',
  ]  # fmt: skip
  assert re.split(r'\s{2,}', lines[2].strip()) == [
    'initial', '87.3 % [83.8, 90.0]', '99.8 %', '54.2', '1,400'
  ]  # fmt: skip
  assert '7.5 %' in lines[7] and '10.7 % [5.0, 20.0]' in lines[4]
  assert len({line.index('%') for line in lines[:-1] if '%' in line}) == 1


def test_the_table_has_no_column_that_no_row_fills():
  text = report.summary_table(
    {'models': {'base': {'mean_tokens': 5.0, 'count': 1}, 'aligned': {'count': 2}}}
  )
  assert 'breaks' not in text and '95 %' not in text
  assert text.splitlines()[-1].split() == ['aligned', '–', '2']
  assert report.summary_table({}) == 'Nothing was evaluated in this run.'


@pytest.mark.parametrize(
  'summary, message',
  [
    ({'models': {'base': {'violation_rate': 87.3}}}, 'violation_rate is 87.3'),
    ({'models': {'base': {'violation_rate': math.nan}}}, 'violation_rate is nan'),
    ({'rounds': {'initial': RATES}}, r"groups \['rounds'\]"),
    (
      {'models': {'base': {'violation_rate': 0.5, 'violation_rate_interval': [0.6, 0.4]}}},
      'low, high',
    ),
  ],
)
def test_a_malformed_summary_is_an_error(summary, message):
  with pytest.raises(UserError, match=message):
    report.summary_table(summary)


def test_the_report_imports_only_matplotlib_and_the_standard_library():
  folder = pathlib.Path(report.__file__).parent
  for file in (*folder.glob('*.py'), folder.parent / 'runtime' / 'files.py'):
    for node in ast.walk(ast.parse(file.read_text('utf-8'))):
      names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
      names += [node.module] if isinstance(node, ast.ImportFrom) else []
      for name in names:
        ours = name.startswith('cai_jax.report') or name in OUR_MODULES
        assert ours or name.split('.')[0] in {'matplotlib', *sys.stdlib_module_names}


# ---- the page in a browser


@pytest.fixture(scope='module')
def browser(tmp_path_factory):
  """Returns a function from a file and an optional fragment to the page's final HTML."""
  names = ('chromium', 'chromium-browser', 'google-chrome')
  command = next(filter(None, map(shutil.which, names)), None)
  if command is None:
    pytest.skip(f'no browser: none of {", ".join(names)} is installed')
  profile = tmp_path_factory.mktemp('profile')

  def dump(path, fragment=''):
    arguments = ['--headless', '--no-sandbox', '--disable-gpu', '--window-size=1200,900']
    arguments += [f'--user-data-dir={profile}', '--dump-dom', path.as_uri() + fragment]
    return subprocess.run(
      [command, *arguments], capture_output=True, text=True, check=True, timeout=120
    ).stdout

  return dump


def test_a_browser_lists_the_chains_and_runs_none_of_their_markup(tmp_path, browser):
  chains = [_chain(i, violations=[['insult'], []]) for i in range(3000)]
  chains[0] |= _chain(0, before=HOSTILE, after='<b onclick=x>bold</b>')
  chains[0]['prompt'][0]['content'] = HOSTILE
  path = tmp_path / 'report.html'
  _write(path, chains=chains)
  shown = browser(path)
  body = shown[: shown.index('<script type="application/json"')]
  assert '<title>A run</title>' in shown
  assert '3,000 chains' in body and 'breaks: insult' in body
  assert 5 < body.count('class="row"') < 60, 'the list draws only the rows in sight'
  assert 'aria-setsize="3000"' in body and 'rule-1 (1,000)' in body
  assert '&lt;script&gt;document.title = "owned"' in body
  assert '<img' not in body and '<b onclick' not in body


def test_a_browser_shows_the_chain_of_a_link_with_its_changes(tmp_path, browser):
  before = 'Water it. You fool, Jonas.\n\nThen let it rest for 5 minutes.'
  after = 'Water it. Be kind to Jonas. Then let it rest for 6 minutes. 你好'
  chains = [_chain(i) for i in range(200)]
  chains += [_chain(7) | _chain(0, before, after) | {'id': 'näher & "x"'}]
  path = tmp_path / 'report.html'
  _write(path, chains=chains)
  shown = browser(path, '#chain=n%C3%A4her%20%26%20%22x%22')
  article = shown[shown.index('<article') : shown.index('</article>')]
  assert 'näher &amp; "x"' in article and 'It says: You fool.' in article
  revision = article[article.index('Revision 1') :]
  paragraph = re.search(r'<p class="text">(.*?)</p>', revision, re.DOTALL)[1]
  left = re.sub(r'<del>.*?</del>', '', paragraph, flags=re.DOTALL)
  was = re.sub(r'<ins>.*?</ins>', '', paragraph, flags=re.DOTALL)
  assert re.sub(r'</?ins>', '', left) == after
  assert re.sub(r'</?del>', '', was).split() == before.split()
  assert re.search(r'<del>5 ?</del><ins>6 ?</ins>', paragraph)


def test_the_policy_holds_where_escaping_would_fail(tmp_path, browser):
  path = tmp_path / 'report.html'
  text = _write(path)
  hole = '<script>document.title = "owned"</script><img src=x onerror="document.title=\'owned\'">'
  path.write_text(text.replace('</header>', hole + '</header>'), 'utf-8')
  shown = browser(path)
  assert hole[:20] in shown and '<title>A run</title>' in shown and '1 chain<' in shown
  path.write_text(path.read_text('utf-8').replace('http-equiv', 'data-off'), 'utf-8')
  assert '<title>owned</title>' in browser(path), 'without the policy the script would have run'


def test_many_scores_stand_in_tables_that_fit_the_page(tmp_path):
  rates = {f'score_{i}_rate': 0.5 for i in range(7)}
  change = {'value': 0.0, 'interval': [-0.1, 0.1], 'p_value': 1.0, 'adjusted_p_value': 1.0}
  compared = rates | {'differences': dict.fromkeys(rates, change)}
  for aligned, heads in ((rates, [4, 3]), (compared, [3, 3, 1])):
    summary = {'models': {'base': rates, 'aligned': aligned}}
    text = _write(tmp_path / 'report.html', summary=summary)
    tables = re.findall(r'<table class="results">.*?</table>', text, re.DOTALL)
    assert [table.count('<th scope="col">') for table in tables] == heads
    assert all('aligned' in table and 'models' in table for table in tables)


def _answers(i):
  """Return the answers to a held-out prompt. Every third one of M_aligned loops."""
  flags = ['looping'] if i % 3 == 0 else []
  answer = _response(f'Rest the fern {i}.', flags=flags, scores={'topic': (7 * i) % 10 / 10})
  return _chain(i, f'Water the fern {i}.', rounds=[], answers={'aligned': answer}) | {'id': f'e{i}'}


def _use(path, *changes):
  """Add a script to a page that chooses an option of a filter by its label."""
  text = path.read_text('utf-8').replace('http-equiv="Content-Security-Policy"', 'data-off')
  script = """<script>
  for (const [id, group, label] of CHANGES) {
    const node = document.getElementById(id);
    const fits = (o) => o.text.startsWith(label) && (!group || o.parentNode.label === group);
    node.value = [...node.options].find(fits).value;
    node.dispatchEvent(new Event('change'));
  }
  </script>"""
  text = text.replace('</body>', script.replace('CHANGES', json.dumps(changes)) + '</body>')
  path.write_text(text, 'utf-8')


def test_a_browser_shows_held_out_answers_side_by_side_with_their_differences(tmp_path, browser):
  path = tmp_path / 'report.html'
  _write(path, chains=[_chain(0), *map(_answers, range(5))])
  shown = browser(path, '#answer=e3')
  article = shown[shown.index('<article') : shown.index('</article>')]
  columns = article[article.index('class="answers"') :].split('class="turn response"')[1:]
  assert [re.search('<b>(.*?)</b>', column)[1] for column in columns] == ['base', 'aligned']
  assert re.search(r'<p class="text"><del>Water ?</del>the fern 3\.</p>', columns[0])
  assert re.search(r'<p class="text"><ins>Rest ?</ins>the fern 3\.</p>', columns[1])
  assert 'looping' in columns[1] and 'looping' not in columns[0]
  assert 'log p -3.25' in columns[0]


def test_a_browser_filters_answers_by_flags_and_sorts_them_by_scores(tmp_path, browser):
  path = tmp_path / 'report.html'
  _write(path, chains=[_chain(0), *map(_answers, range(10))])
  changes = [
    ('view', '', 'held-out'),
    ('flag', 'aligned', 'looping'),
    ('order', 'aligned', 'topic'),
  ]
  _use(path, *changes, ('order', 'aligned', 'topic'))
  shown = browser(path)
  rows = re.findall(r'class="which"><div[^>]*>(e\d)</div><span class="value">(.*?)</span>', shown)
  assert rows == [('e9', '0.3'), ('e6', '0.2'), ('e3', '0.1'), ('e0', '0')]
  assert '4 of 10 prompts' in shown[: shown.index('<script type')]
