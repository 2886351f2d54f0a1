"""A blind rating sheet: pairs of answers for people to compare, as CSV and as one HTML page.

Neither file names a model. The order of the two answers is drawn per pair, and only the key, which
stays with the run, tells which is which. The ids of the rows begin with a digest of all texts, and
the key has the digest of each row, so a row of another sheet or an edited one is noticed.

Spreadsheets run a cell that begins with `=`, `+`, `-` or `@` as a formula. `protect_cell` puts an
apostrophe before such a text, and `restore_cell` takes it away.
"""

import csv
import dataclasses
import hashlib
import io
import json
import os
import pathlib
import random
import re
from collections.abc import Mapping, Sequence
from typing import Any

from cai_jax.report.page import embedded_json, fill_template, security_policy
from cai_jax.runtime.errors import UserError
from cai_jax.runtime.files import make_folder, replacing

TEMPLATE = pathlib.Path(__file__).with_name('rating_page.html')
TEXT_COLUMNS = ('id', 'prompt', 'response_a', 'response_b')
RATING_COLUMNS = ('better', 'harmful_a', 'harmful_b', 'comment')
COLUMNS = TEXT_COLUMNS + RATING_COLUMNS
CSV_NAME, PAGE_NAME = 'sheet.csv', 'sheet.html'

_FORMULA = re.compile(r"'*[=+\-@\t\r\n＝＋－＠]")
_CONTROL = re.compile(r'[\x00-\x08\x0b-\x1f\x7f]')


@dataclasses.dataclass(frozen=True)
class Pair:
  """Two answers to a prompt.

  Attributes:
    prompt: id of the prompt.
    kind: kind of the prompt, 'harmful' or 'helpful'.
    text: the prompt as people read it.
    responses: the answers of the player and of its opponent.
  """

  prompt: str
  kind: str
  text: str
  responses: tuple[str, str]


def make_sheet(
  pairs: Sequence[Pair], players: tuple[str, str], seed: int
) -> tuple[list[dict[str, str]], dict[str, Any]]:
  """Return the rows of a sheet and its key.

  The order of the pairs is random. The player's answer is A in half of them, and which half is
  random too.

  Args:
    pairs: the pairs.
    players: names of the player and of its opponent.
    seed: seed of both orders.

  Returns:
    The rows, with `TEXT_COLUMNS`, and the key: `sheet` (the name, which begins each id), `digest`,
    `player`, `opponent`, `seed`, and `pairs`, each with `id`, `prompt`, `kind`, `player_is` ('A' or
    'B') and `digest`.
  """
  rng = random.Random(seed)
  order = rng.sample(list(pairs), len(pairs))
  sides = ['A', 'B'] * ((len(order) + 1) // 2)
  rng.shuffle(sides)
  rows, entries = [], []
  for pair, side in zip(order, sides, strict=False):
    first, second = pair.responses if side == 'A' else pair.responses[::-1]
    row = {'prompt': pair.text, 'response_a': first, 'response_b': second}
    row = {name: _CONTROL.sub(_escape, _unify(text)) for name, text in row.items()}
    rows.append(row)
    entries.append({'prompt': pair.prompt, 'kind': pair.kind, 'player_is': side})
    entries[-1]['digest'] = digest_row(row)
  digest = _digest([entry['digest'] for entry in entries])
  sheet, width = digest[:8], max(3, len(str(len(rows))))
  names = [f'{sheet}-{number:0{width}d}' for number in range(1, len(rows) + 1)]
  key = {
    'sheet': sheet,
    'digest': digest,
    'player': players[0],
    'opponent': players[1],
    'seed': seed,
    'pairs': [{'id': name, **entry} for name, entry in zip(names, entries, strict=True)],
  }
  return [{'id': name, **row} for name, row in zip(names, rows, strict=True)], key


def write_sheet(folder: str | os.PathLike, rows: Sequence[Mapping[str, str]]) -> None:
  """Write a sheet as `sheet.csv` and `sheet.html`.

  Args:
    folder: the folder; it is created if it does not exist.
    rows: rows of `make_sheet`.

  Raises:
    UserError: if the folder has a sheet, which people may have filled in.
  """
  folder = make_folder(folder)
  for name in (CSV_NAME, PAGE_NAME):
    if (folder / name).exists():
      raise UserError(f'{folder / name} exists, and may have ratings. Give another folder.')
  template = TEMPLATE.read_text('utf-8')
  page = fill_template(
    template,
    policy=security_policy(template),
    data=embedded_json({'columns': COLUMNS, 'rows': list(rows)}),
  )
  table = format_csv([{**dict.fromkeys(COLUMNS, ''), **row} for row in rows])
  for name, text, encoding in ((CSV_NAME, table, 'utf-8-sig'), (PAGE_NAME, page, 'utf-8')):
    with replacing(folder / name) as temporary:
      temporary.write_bytes(text.encode(encoding))


def format_csv(rows: Sequence[Mapping[str, str]]) -> str:
  """Return rows with `COLUMNS` as CSV, with every cell protected.

  Args:
    rows: the rows.
  """
  file = io.StringIO()
  writer = csv.writer(file, quoting=csv.QUOTE_ALL, lineterminator='\r\n')
  writer.writerow(COLUMNS)
  writer.writerows([protect_cell(row[name]) for name in COLUMNS] for row in rows)
  return file.getvalue()


def protect_cell(text: str) -> str:
  """Return a text that no spreadsheet runs as a formula.

  A text that begins with =, +, -, @ (wide forms too), a tab or the end of a line, also after
  apostrophes, gets an apostrophe in front.

  Args:
    text: any text.
  """
  return f"'{text}" if _FORMULA.match(text) else text


def restore_cell(text: str) -> str:
  """Return the text that `protect_cell` was given.

  Args:
    text: a result of `protect_cell`.
  """
  return text[1:] if text.startswith("'") and _FORMULA.match(text) else text


def digest_row(row: Mapping[str, str]) -> str:
  """Return a digest of the texts of a row that people read.

  White space and leading apostrophes do not count, because spreadsheets change them.

  Args:
    row: the row, with at least `TEXT_COLUMNS` but for the id.
  """
  return _digest([' '.join(row[name].lstrip("'").split()) for name in TEXT_COLUMNS[1:]])


def _digest(texts: Sequence[str]) -> str:
  return hashlib.sha256(json.dumps(texts).encode()).hexdigest()


def _unify(text: str) -> str:
  """Return a text that UTF-8 can hold, whose lines end with a line feed."""
  text = text.encode('utf-8', errors='backslashreplace').decode()
  return text.replace('\r\n', '\n').replace('\r', '\n')


def _escape(match: re.Match[str]) -> str:
  return f'\\x{ord(match[0]):02x}'
