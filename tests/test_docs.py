"""Every command and code block of the README and of docs/ runs.

The blocks of a page run in their order, in a folder that has the checkout's files and a file
`questions.jsonl`. Launches of configs/tiny.py get a few prompts only. An HTML comment in front of a
block changes that:

  <!-- not run: REASON -->           the block is not executed
  <!-- file: NAME -->                the block is written to a file, which later blocks can use
  <!-- tested with: --dry_run -->    its commands get this flag too
"""

import ast
import functools
import os
import pathlib
import re
import shlex
import subprocess
import sys
from typing import NamedTuple

import pytest

from tests.conftest import LONG_FILES

ROOT = pathlib.Path(__file__).resolve().parents[1]
PAGES = [ROOT / 'README.md', ROOT / 'CONTRIBUTING.md', *sorted((ROOT / 'docs').rglob('*.md'))]
BLOCK = re.compile(
  r'(?:<!-- (?P<note>[^>]*?) -->\n)?^```(?P<language>\w*)\n(?P<code>.*?)^```', re.M | re.S
)
EXECUTED = ('bash', 'python')
SHOWN = ('text', 'yaml', 'json', '')  # languages of blocks that are not code to execute

# The embedded prompt sets of configs/tiny.py, cut to a few prompts, and fewer rounds.
SMALL = [
  '--config.prompts.harmful.limit=12',
  '--config.prompts.helpful.limit=8',
  '--config.prompts.eval_harmful.limit=6',
  '--config.prompts.eval_helpful.limit=4',
  '--config.engine.slots=8',
]
# The same for the tour: its second run has the prompts and the programs of the first one.
TOUR = {'harmful.limit = 60': 'harmful.limit = 4', 'engine.slots = 32': 'engine.slots = 2'}
QUESTION = '{"prompt": "Is water wet? Answer:", "corrects": [" yes"], "incorrects": [" no"]}\n'


class Block(NamedTuple):
  """A code block of a page."""

  page: str  # relative to the checkout
  line: int
  note: str  # of the comment in front of the block
  language: str
  code: str


def blocks(path: pathlib.Path) -> list[Block]:
  """Return the code blocks of a page."""
  text = path.read_text(encoding='utf-8')
  return [
    Block(
      str(path.relative_to(ROOT)),
      text[: match.start('code')].count('\n'),
      match['note'] or '',
      match['language'],
      match['code'],
    )
    for match in BLOCK.finditer(text)
  ]


ALL = [block for page in PAGES if page.exists() for block in blocks(page)]


def runs(block: Block) -> bool:
  """Return whether a block is executed."""
  return block.language in EXECUTED and not block.note.startswith('not run:')


@pytest.fixture(scope='module')
def checkout(tmp_path_factory):
  """A folder with the files that commands need, in which they may write."""
  folder = tmp_path_factory.mktemp('checkout')
  for name in ('cai_jax', 'configs', 'experiments', 'launch.py'):
    (folder / name).symlink_to(ROOT / name)
  (folder / 'questions.jsonl').write_text(QUESTION * 2)
  return folder


def small_run(command: str) -> str:
  """Return a launch command with the embedded prompt sets cut to a few prompts."""
  if 'launch.py' not in command or 'configs/tiny.py' not in command:
    return command
  program = shlex.quote(sys.executable)
  return command.replace('python launch.py', f'{program} launch.py') + ' ' + ' '.join(SMALL)


def run_command(block: Block, command: str, folder: pathlib.Path) -> None:
  """Run a command of a block in a folder; fail with its output unless it succeeds."""
  command = small_run(command)
  if block.note == 'tested with: --dry_run':
    command += ' --dry_run'
  path = f'{pathlib.Path(sys.executable).parent}:{os.environ["PATH"]}'
  done = subprocess.run(
    command,
    shell=True,
    cwd=folder,
    capture_output=True,
    text=True,
    env=os.environ | {'XLA_FLAGS': '', 'PATH': path},
  )
  assert done.returncode == 0, f'{block.page}:{block.line}\n{command}\n{done.stdout}{done.stderr}'


# Pages that launch whole runs, which takes up to a minute and a half each. Other pages always run.
LAUNCH_RUNS = ('running', 'training', 'evaluations', 'configuration', 'experiments', 'preferences')


def page_parameters() -> list:
  """Return the pages with blocks that run, those that launch whole runs marked slow."""
  pages = dict.fromkeys(b.page for b in ALL if runs(b))
  slow = [f'docs/{name}.md' for name in LAUNCH_RUNS]
  return [pytest.param(page, marks=pytest.mark.slow) if page in slow else page for page in pages]


@pytest.mark.parametrize('page', page_parameters())
def test_blocks_of_a_page_run_in_their_order(page, checkout, monkeypatch, restored_registries):
  monkeypatch.chdir(checkout)
  namespace: dict = {}
  for block in (b for b in ALL if b.page == page and runs(b)):
    if block.note.startswith('file: '):
      (checkout / block.note.removeprefix('file: ')).write_text(block.code, encoding='utf-8')
      continue
    if block.language == 'python':
      exec(compile(block.code, f'{page}:{block.line}', 'exec'), namespace)
      continue
    for command in block.code.replace('\\\n', ' ').splitlines():
      if command.strip() and not command.startswith('#'):
        run_command(block, command, checkout)


def test_blocks_that_do_not_run_say_why():
  for block in ALL:
    where = f'{block.page}:{block.line}'
    assert block.language in (*EXECUTED, *SHOWN), f'{where}: language {block.language!r}'
    if block.note.startswith('not run:'):
      assert len(block.note) > len('not run: '), f'{where} gives no reason'


def test_links_between_pages_exist():
  for page in PAGES:
    text = page.read_text(encoding='utf-8')
    for target in re.findall(r'\]\((?!https?:|#|mailto:)([^)#]+)', text):
      assert (page.parent / target).exists(), f'{page.relative_to(ROOT)} links to {target}'


def test_the_tour_runs(checkout, monkeypatch):
  monkeypatch.setenv('XLA_FLAGS', '')  # one device, as for a reader
  nbclient = pytest.importorskip('nbclient')
  nbformat = pytest.importorskip('nbformat')
  notebook = nbformat.read(ROOT / 'docs' / 'tour.ipynb', as_version=4)
  for long, short in TOUR.items():
    (cell,) = (cell for cell in notebook.cells if long in cell.source)
    cell.source = cell.source.replace(long, short)
  nbclient.NotebookClient(
    notebook, timeout=300, resources={'metadata': {'path': str(checkout)}}
  ).execute()
  outputs = [output for cell in notebook.cells for output in cell.get('outputs', [])]
  assert any('image/svg+xml' in output.get('data', {}) for output in outputs), 'shows no figure'


def test_the_tests_that_guarantees_name_exist():
  text = (ROOT / 'docs' / 'guarantees.md').read_text()
  tests = re.findall(r'`((?:\w+/)?test_\w+\.py)(?:::(\w+))?`', text)
  assert len(tests) > 30
  for file, name in tests:
    source = (ROOT / 'tests' / file).read_text()
    assert not name or f'def {name}(' in source, f'{file}::{name}'


@functools.cache
def slow_tests(file):
  """Map the names of a file's tests to whether all cases of the test are slow."""
  tree = ast.parse((ROOT / 'tests' / file).read_text())
  marks = {'pytestmark': ''} | {
    ast.unparse(node.targets[0]): ast.unparse(node.value)
    for node in tree.body
    if isinstance(node, ast.Assign)
  }
  slow_file = 'pytest.mark.slow' in marks['pytestmark']
  return {
    test.name: slow_file or 'pytest.mark.slow' in map(ast.unparse, test.decorator_list)
    for test in tree.body
    if isinstance(test, ast.FunctionDef)
  }


def test_the_tests_that_guarantees_call_slow_are_slow():
  """`*slow*` holds to the end of a cell; `(*slow*)` holds for the test in front of it."""
  rows = (ROOT / 'docs' / 'guarantees.md').read_text().splitlines()
  cited = []
  for cell in (row.rpartition(' | ')[2] for row in rows if row.startswith('|')):
    quick, *_ = re.split(r'(?<!\()\*slow\*(?!\))', re.sub(r'\([^*)]+\*slow\*\)', '', cell))
    for match in re.finditer(r'`(test_\w+\.py)::(\w+)`( \(\*slow\*\))?', cell):
      file, name, is_slow = match.groups()
      cited.append((f'{file}::{name}', bool(is_slow) or match[0] not in quick))
      assert cited[-1][1] == slow_tests(file)[name], cited[-1]
  assert {is_slow for _, is_slow in cited} == {True, False}


def test_the_files_that_run_first_exist():
  """So that a file that is renamed or split does not lose its place in the order."""
  assert [name for name in LONG_FILES if not (ROOT / 'tests' / name).exists()] == []
