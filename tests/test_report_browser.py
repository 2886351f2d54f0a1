"""The page of a report in a browser."""

import json
import re
import shutil
import subprocess

import pytest

from tests.report_setup import HOSTILE, _chain, _response, _write


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
