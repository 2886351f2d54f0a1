"""Test the page of an experiment in a browser: filters, keys and speed, and that no markup runs."""

import shutil
import time

import pytest

from cai_jax import report
from tests.experiment_report_setup import INJECTED, _chain, _hostile, _results


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
