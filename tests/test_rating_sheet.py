"""Test blind rating sheets: export, the page, simulated raters, and reading back."""

import csv
import json
import os
import random
import re
import shutil
import time

import pytest

from cai_jax.evaluation.human_ratings import read_ratings, summarize_ratings
from cai_jax.pipeline import rate
from cai_jax.report.rating_sheet import (
  COLUMNS,
  Pair,
  format_csv,
  make_sheet,
  protect_cell,
  restore_cell,
  write_sheet,
)
from cai_jax.runtime.errors import UserError
from tests.test_report_chains import write_dataset

INJECTED = (
  '</script><script>document.title = "owned"</script><img src=x onerror="document.title=\'owned\'">'
)
PLAYERS = ('aligned', 'base')


def make_pairs(count=200, player='good', opponent='bad'):
  return [
    Pair(
      f'prompt-{i}',
      ('harmful', 'helpful')[i % 2],
      f'Ask {i}?',
      (f'{player} {i}', f'{opponent} {i}'),
    )
    for i in range(count)
  ]


def write_rated(path, rows, **changes):
  """Write what a rater filled in who prefers answers that begin with 'good'."""
  filled = []
  for row in rows:
    good = 'A' if row['response_a'].startswith('good') else 'B'
    harmful = {'A': ('no', 'yes'), 'B': ('yes', 'no')}[good]
    filled.append({'harmful_a': harmful[0], 'harmful_b': harmful[1], 'better': good})
    filled[-1] = dict.fromkeys(COLUMNS, '') | row | filled[-1] | changes
  path.write_text(format_csv(filled), encoding='utf-8', newline='')
  return path


@pytest.fixture
def run(tmp_path):
  """The folder of a run with answers to 40 prompts; two are equal and one is blank."""
  texts = {f'p{i}': f'bad {i}' for i in range(40)}
  answers = {name: text.replace('bad', 'good') for name, text in texts.items()}
  answers |= {'p0': texts['p0'], 'p1': texts['p1'], 'p2': ' '}
  write_dataset(tmp_path / 'run/evaluation/base', texts, rounds=1)
  write_dataset(tmp_path / 'run/evaluation/aligned', answers)
  return tmp_path / 'run'


def read_sheet(folder):
  with open(folder / 'sheet.csv', encoding='utf-8-sig', newline='') as file:
    return list(csv.DictReader(file))


def test_raters_of_an_exported_sheet_recover_what_was_planted(run, tmp_path):
  key = rate.export_sheet(str(run), str(tmp_path / 'sheet'), 100)
  rows = read_sheet(tmp_path / 'sheet')
  assert len(rows) == len(key['pairs']) == 37 and key['left_out'] == {'equal': 2, 'blank': 1}
  items = [{'id': f'p{i}', 'log_odds': [3.0, -1.0], 'label_mass': None} for i in range(3, 40)]
  comparison = {'player': 'aligned', 'opponent': 'base', 'criterion': 'harmlessness'}
  judge = {'status': 'unvalidated', 'comparisons': [comparison | {'items': items}]}
  (run / 'evaluation/models.json').write_text(json.dumps({'judge': judge}))
  paths = [write_rated(tmp_path / f'{name}.csv', rows) for name in ('ann', 'ben')]
  results = rate.read_sheets(str(run), [str(path) for path in paths])
  assert results == json.loads((run / rate.RATINGS).read_text())
  assert results['win_rate']['rate'] == 1 and results['win_rate']['prompts'] == 37
  assert results['win_rate']['losses'] == 0 and results['win_rate']['interval'][0] > 0.9
  assert results['harmful']['player']['rate'] == 0 and results['harmful']['opponent']['rate'] == 1
  assert results['judge'][0]['same']['rate'] == 1 and results['judge'][0]['pairs'] == 37
  assert results['raters'] == {name: {'rated': 37, 'unrated': 0} for name in ('ann', 'ben')}
  text = rate.describe_ratings(run)
  assert 'aligned wins 100.0 %' in text and 'judge (unvalidated) on harmlessness' in text


def test_revisions_are_compared_with_the_initial_response(run, tmp_path):
  key = rate.export_sheet(str(run), str(tmp_path / 'sheet'), 5, 'revision_1')
  assert (key['player'], key['opponent'], len(key['pairs'])) == ('revision_1', 'initial', 5)
  for row, pair in zip(read_sheet(tmp_path / 'sheet'), key['pairs'], strict=True):
    shown = row[f'response_{pair["player_is"].lower()}']
    assert shown == f'bad {pair["prompt"][1:]} better 0'


def test_noisy_raters_agree_less_and_the_rate_stays_near():
  _, key = make_sheet(make_pairs(), PLAYERS, 1)
  key['left_out'] = {'equal': 0, 'blank': 0}
  assert sum(pair['player_is'] == 'A' for pair in key['pairs']) == 100
  values = {}
  for noise in (0.1, 0.6):
    raters = {}
    for name in ('ann', 'ben', 'cyd'):
      rng, ratings = random.Random(f'{name}{noise}'), {}
      for pair in key['pairs']:
        points = rng.choice([1.0, 0.5, 0.0]) if rng.random() < noise else 1.0
        points = points if int(pair['prompt'][7:]) % 4 else 1 - points  # one in four is worse
        ratings[pair['id']] = {'points': points, 'player': None, 'opponent': None}
      raters[name] = ratings
    results = summarize_ratings(raters, key)
    low, high = results['win_rate']['interval']
    expected = 0.75 * (1 - noise / 2) + 0.25 * noise / 2
    assert low < expected < high and set(results['win_rate_by_kind']) == {'harmful', 'helpful'}
    assert results['agreement']['measure'] == "Krippendorff's alpha"
    assert results['harmful'] == {'player': None, 'opponent': None, 'difference': None}
    values[noise] = results['agreement']['value']
  assert values[0.1] > 0.6 > 0.3 > values[0.6] > 0


def test_neither_file_of_a_sheet_tells_the_models(run, tmp_path):
  key = rate.export_sheet(str(run), str(tmp_path / 'sheet'), 100)
  assert sorted(os.listdir(tmp_path / 'sheet')) == ['sheet.csv', 'sheet.html']
  for name in ('sheet.csv', 'sheet.html'):
    text = (tmp_path / 'sheet' / name).read_text('utf-8')
    text = text.replace('base-uri', '')  # of the page's policy
    for secret in ('aligned', 'base', 'player', 'opponent', key['digest'], str(run)):
      assert not re.search(rf'\b{secret}\b', text), (name, secret)
    assert not any(f'"{pair["prompt"]}"' in text for pair in key['pairs'])


def test_a_sheet_is_a_function_of_its_seed():
  pairs = make_pairs(50)
  assert make_sheet(pairs, PLAYERS, 3) == make_sheet(pairs, PLAYERS, 3)
  assert make_sheet(pairs, PLAYERS, 3)[0] != make_sheet(pairs, PLAYERS, 4)[0]


@pytest.mark.parametrize(
  'text', ('=1+1', '+1', '-1', '@SUM(A1)', "'=1", "''-x", "'tis", '\t=1', '＝1', 'plain', "'", '')
)
def test_no_cell_is_a_formula_and_reading_undoes_it(text):
  assert not protect_cell(text).startswith(('=', '+', '-', '@', '\t', '＝'))
  assert restore_cell(protect_cell(text)) == text


def test_texts_like_formulas_survive_the_sheet(tmp_path):
  pairs = make_pairs(6, '=HYPERLINK("x")\r\n"quoted", a;b', '-2\x00 \ud83d')
  rows, key = make_sheet(pairs, PLAYERS, 0)
  path = write_rated(tmp_path / 'r.csv', rows, better='tie')
  assert all(r['points'] == 0.5 for r in read_ratings(path, key).values())
  for delimiter in ';\t':  # as spreadsheets of other countries save it
    with open(path, encoding='utf-8', newline='') as file:
      table = list(csv.reader(file))
    with open(tmp_path / 'other.csv', 'w', encoding='utf-16', newline='') as file:
      csv.writer(file, delimiter=delimiter).writerows(table)
    assert read_ratings(tmp_path / 'other.csv', key) == read_ratings(path, key)


def test_missing_and_open_rows_are_unrated(tmp_path):
  rows, key = make_sheet(make_pairs(4), PLAYERS, 0)
  key['left_out'] = {'equal': 0, 'blank': 0}
  path = write_rated(tmp_path / 'r.csv', rows[:3], better='', harmful_a='')
  results = summarize_ratings({'ann': read_ratings(path, key)}, key)
  assert results['raters'] == {'ann': {'rated': 0, 'unrated': 4}}
  assert results['win_rate'] is None and results['agreement'] is None


@pytest.mark.parametrize(
  ('changes', 'message'),
  (
    ({'better': 'C'}, r"r\.csv, line 2: better is 'C'. It must be A, B or tie"),
    ({'harmful_b': '3'}, r"r\.csv, line 2: harmful_b is '3'. It must be yes or no"),
    ({'id': '00000000-001'}, r"r\.csv, line 2: the id '00000000-001' is not in the sheet"),
    (
      {'response_a': 'other'},
      r'r\.csv, line 2: the prompt or a response of \w+-001 is not the one',
    ),
  ),
)
def test_what_is_wrong_in_a_sheet_is_named_with_its_line(changes, message, tmp_path):
  rows, key = make_sheet(make_pairs(4), PLAYERS, 0)
  path = write_rated(tmp_path / 'r.csv', rows[:1], **changes)
  with pytest.raises(UserError, match=message):
    read_ratings(path, key)


def test_damaged_files_are_refused(tmp_path):
  rows, key = make_sheet(make_pairs(4, 'good\ntext'), PLAYERS, 0)
  path = write_rated(tmp_path / 'r.csv', [*rows, rows[0]])
  with pytest.raises(UserError, match=r'line 10: the id \w+-001 occurs twice'):
    read_ratings(path, key)  # the four rows above have two lines each
  path.write_text('id,prompt\n1,2\n')
  with pytest.raises(UserError, match="line 1: the header lacks the column 'response_a'"):
    read_ratings(path, key)
  path.write_text(','.join(COLUMNS) + '\na,b\n')
  with pytest.raises(UserError, match='line 2: the row has 2 cells'):
    read_ratings(path, key)


def test_a_sheet_of_another_run_is_refused(run, tmp_path):
  rate.export_sheet(str(run), str(tmp_path / 'sheet'), 5)
  rows, _ = make_sheet(make_pairs(5), PLAYERS, 0)
  path = write_rated(tmp_path / 'other.csv', rows)
  with pytest.raises(UserError, match='other.csv is not a sheet of .*run'):
    rate.read_sheets(str(run), [str(path)])
  with pytest.raises(UserError, match='given twice'):
    rate.read_sheets(str(run), [str(path), str(path)])
  with pytest.raises(UserError, match='exists, and may have ratings'):
    rate.export_sheet(str(run), str(tmp_path / 'sheet'), 5)
  for compare, message in (('base', "must be 'aligned'"), ('revision_3', 'no revision_3 answers')):
    with pytest.raises(UserError, match=message):
      rate.export_sheet(str(run), str(tmp_path / 'new'), 5, compare)
  with pytest.raises(UserError, match='no answers of the base model'):
    rate.export_sheet(str(tmp_path), str(tmp_path / 'new'), 5)


def test_new_ratings_make_the_report_stale(run):
  report, ratings = run / 'report.html', run / rate.RATINGS
  assert not rate.has_new_ratings(run) and rate.describe_ratings(run) == ''
  ratings.write_text('{}')
  report.write_text('')
  os.utime(ratings, (1, 1))
  assert not rate.has_new_ratings(run)
  os.utime(ratings, (2e9, 2e9))
  assert rate.has_new_ratings(run)
  with pytest.raises(UserError, match=r'ratings\.json'):
    rate.describe_ratings(run)


def wait_until(condition, retry=lambda: None, seconds=20):
  end = time.monotonic() + seconds
  while not condition() and time.monotonic() < end:
    time.sleep(0.2)
    retry()
  return condition()


def test_the_page_rates_by_keys_and_keeps_texts_inert(tmp_path):
  """Rate in Chromium, reload, go on, and read the downloaded file."""
  webdriver = pytest.importorskip('selenium.webdriver', reason="selenium: pip install -e '.[test]'")
  from selenium.webdriver.chrome.service import Service

  binary, service = shutil.which('chromium'), shutil.which('chromedriver')
  if binary is None or service is None:
    pytest.skip('no browser: needs chromium and chromedriver')
  options = webdriver.ChromeOptions()
  options.binary_location = binary
  for argument in ('--headless', '--no-sandbox', '--disable-gpu'):
    options.add_argument(argument)
  options.add_experimental_option('prefs', {'download.default_directory': str(tmp_path)})
  rows, key = make_sheet(make_pairs(3, INJECTED, '=1+1'), PLAYERS, 0)
  write_sheet(tmp_path / 'sheet', rows)
  driver = webdriver.Chrome(options=options, service=Service(service))
  try:
    driver.get((tmp_path / 'sheet/sheet.html').as_uri())
    body = driver.find_element('css selector', 'body')
    body.send_keys('a12')
    body.send_keys('2')  # once more: no
    driver.find_element('id', 'comment').send_keys('-b t')  # keys are text there
    body.send_keys('\ue014t\ue014')  # the right arrow
    # Chromium may handle keys, and store what a page saves, a moment later.
    is_third = lambda: driver.find_element('id', 'progress').text == 'pair 3 of 3 · 2 rated'  # noqa: E731
    assert wait_until(is_third)
    driver.refresh()
    assert wait_until(is_third, driver.refresh)
    assert driver.find_element('id', 'response_a').text == rows[2]['response_a']
    assert driver.title == 'Rating sheet' and not driver.find_elements('css selector', 'img')
    assert len(driver.find_elements('css selector', 'script')) == 2
    driver.find_element('css selector', 'body').send_keys('b')
    driver.find_element('id', 'download').click()
    path = tmp_path / 'ratings.csv'
    # Chromium reserves the name with an empty file, and replaces it by the complete one.
    assert wait_until(lambda: path.exists() and path.stat().st_size > 0)
  finally:
    driver.quit()
  sides = [pair['player_is'] for pair in key['pairs']]
  ratings = list(read_ratings(path, key).values())
  assert [r['points'] for r in ratings] == [float(sides[0] == 'A'), 0.5, float(sides[2] == 'B')]
  assert (ratings[0]['player'], ratings[0]['opponent']) == ((1, 0) if sides[0] == 'A' else (0, 1))
  text = path.read_text('utf-8-sig')
  assert '"\'-b t"' in text and text.splitlines()[0] == ','.join(f'"{name}"' for name in COLUMNS)
