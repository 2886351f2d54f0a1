"""The report of a run: texts stay data, numbers are exact, and the page is complete."""

import ast
import base64
import copy
import hashlib
import html.parser
import json
import math
import pathlib
import re
import sys
import time

import pytest

from cai_jax import report
from cai_jax.report import page, run_page
from cai_jax.report.numbers import columns, heading
from cai_jax.runtime.errors import UserError
from configs import default
from tests.report_setup import HOSTILE, RATES, SUMMARY, _chain, _write

# What a report may use of the rest of the package; these modules use the standard library only.
OUR_MODULES = (
  'cai_jax.runtime.errors',
  'cai_jax.runtime.shapes',
  'cai_jax.runtime.terminal',
  'cai_jax.runtime.files',
)


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
