"""Nothing that the package prints can control the terminal."""

import ast
import pathlib

import pytest

import cai_jax
from cai_jax.report import experiment_table, summary_table
from cai_jax.runtime import processes
from cai_jax.runtime.progress import Progress
from cai_jax.runtime.terminal import printable, say

ROOT = pathlib.Path(cai_jax.__file__).parent
HOSTILE = '\x1b]0;owned\x07\x1b[2J\x9b31m\u202egnp.exe\u2066\r\b\x00\ud800\ufeff'
ESCAPED = '\\x1b]0;owned\\x07\\x1b[2J\\x9b31m\\u202egnp.exe\\u2066\\r\\x08\\x00\\ud800\\ufeff'


def test_control_bidi_and_surrogate_characters_are_escaped(capsys):
  assert printable(HOSTILE + '\nnext é 漢 שלום') == ESCAPED + '\nnext é 漢 שלום'
  say(HOSTILE)
  assert capsys.readouterr().out == ESCAPED + '\n'


@pytest.mark.parametrize('name', ['print', 'stdout.write', 'stderr.write'])
def test_everything_is_printed_by_one_function(name):
  """Besides it, only modules that generate pages of the docs, and a program that writes a file."""
  pages = {'pipeline/configuration.py', 'feedback/variant_table.py'}
  allowed = {'runtime/terminal.py', 'tiny/simulate.py', *pages}
  found = [
    f'{path.relative_to(ROOT)}:{node.lineno}'
    for path in sorted(ROOT.rglob('*.py'))
    if str(path.relative_to(ROOT)) not in allowed
    for node in ast.walk(ast.parse(path.read_text()))
    if isinstance(node, ast.Call) and ast.unparse(node.func).removeprefix('sys.') == name
  ]
  assert not found


def test_tables_progress_and_errors_are_escaped(capsys):
  say(summary_table({'models': {HOSTILE: {HOSTILE: HOSTILE, 'count': 3}}}))
  number = {'value': 0.5, 'interval': [0.4, 0.6]}
  groups = {'harmful': {'count': 1, 'metrics': {HOSTILE: number}}}
  arm = {'response': 'last', 'overrides': {}, 'facts': {HOSTILE: HOSTILE}, 'groups': groups}
  results = dict.fromkeys(('name', 'title', 'docstring', 'base', 'reference'), HOSTILE)
  results |= {'seeds': [0], 'metrics': [HOSTILE], 'figures': [], 'notes': [], 'costs': []}
  results |= {'arms': {HOSTILE: arm}, 'config_differences': {}}
  say(experiment_table(results))
  Progress(HOSTILE)(1, 1, 1, HOSTILE)
  processes._print_error(HOSTILE, OSError(HOSTILE))
  output = ''.join(capsys.readouterr())
  assert ESCAPED in output and all(c.isprintable() or c == '\n' for c in output)
