"""File formats of prompts, registered as sources under their suffixes.

Every reader yields (place, row); the place is the file with the line or row. Files may be
compressed with gzip, whatever their name.
"""

import csv
import json
from collections.abc import Iterator
from typing import Any

from cai_jax.data.prompt_sources import (
  DIALOGUE_FIELDS,
  ROW_FORM,
  SOURCES,
  PromptSource,
  Row,
  reject_settings,
)
from cai_jax.runtime.errors import UserError, show
from cai_jax.runtime.text_files import open_bytes, parse_json, read_lines, read_text

MAX_JSON = 2**28  # characters in a .json file
MAX_ROWS = 10**7  # of a Parquet file, whose rows may take almost no space


@SOURCES.register('.jsonl')
@SOURCES.register('.ndjson')
def read_jsonl(source: PromptSource, seed: int) -> Iterator[Row]:
  """Yield one row per line of a JSON Lines file. Blank lines are skipped.

  Args:
    source: names the file.
    seed: not used.

  Raises:
    UserError: if the file cannot be read, or a line is not JSON.
  """
  reject_settings(source, 'name', 'subset')
  for number, line in read_lines(source.source):
    if not (line := line.strip()):
      continue
    place = f'{source.source}, line {number}'
    try:
      row = parse_json(line)
    except ValueError as error:
      hint = 'End the name of a file that is one array in .json. ' if line[0] == '[' else ''
      raise UserError(
        f'{place}: {show(line)} is not valid JSON ({error}). {hint}{ROW_FORM}'
      ) from error
    yield place, row


@SOURCES.register('.json')
def read_json_array(source: PromptSource, seed: int) -> Iterator[Row]:
  """Yield the elements of the array in a JSON file. The file may also be JSON Lines.

  Args:
    source: names the file.
    seed: not used.

  Raises:
    UserError: if the file cannot be read, or is neither.
  """
  reject_settings(source, 'name', 'subset')
  text = read_text(source.source, MAX_JSON)
  if not text.strip():
    return
  try:
    rows = parse_json(text)
  except json.JSONDecodeError as error:
    if error.msg == 'Extra data':  # a second value follows the first one, on the next line
      yield from read_jsonl(source, seed)
      return
    raise _not_an_array(source, f'it is not valid JSON: {error}') from error
  except ValueError as error:
    raise _not_an_array(source, f'it is not valid JSON: {error}') from error
  if isinstance(rows, dict) and any(name in rows for name in (*DIALOGUE_FIELDS, source.field)):
    rows = [rows]  # JSON Lines with a single line
  if not isinstance(rows, list):
    raise _not_an_array(source, f'it contains {show(rows)}')
  for number, row in enumerate(rows, 1):
    yield f'{source.source}, row {number}', row


@SOURCES.register('.txt')
def read_text_lines(source: PromptSource, seed: int) -> Iterator[Row]:
  """Yield one row per line of a text file. Blank lines are skipped.

  Args:
    source: names the file.
    seed: not used.

  Raises:
    UserError: if the file cannot be read.
  """
  reject_settings(source, 'name', 'subset')
  for number, line in read_lines(source.source):
    if line.strip():
      yield f'{source.source}, line {number}', {'prompt': line.strip()}


@SOURCES.register('.csv')
@SOURCES.register('.tsv')
def read_table(source: PromptSource, seed: int) -> Iterator[Row]:
  """Yield the rows of a table whose first line names its columns.

  Commas separate the cells of a `.csv` file, and tabs those of a `.tsv` file.

  Args:
    source: names the file.
    seed: not used.

  Raises:
    UserError: if the file cannot be read, or a row has another number of cells.
  """
  reject_settings(source, 'name', 'subset')
  is_tsv = source.source.lower().removesuffix('.gz').endswith('.tsv')
  lines = (line for _, line in read_lines(source.source, keep_ends=True))
  reader = csv.reader(lines, delimiter='\t' if is_tsv else ',', strict=True)
  columns: list[str] = []
  number = 0
  try:
    for cells in reader:
      if not any(cells):
        continue
      place = f'{source.source}, row {number + 1} (line {reader.line_num})'
      if not columns:
        columns = cells
        if len(set(columns)) < len(columns):
          raise UserError(f'{place}: a column occurs twice in {show(columns)}. Rename one.')
        continue
      number += 1
      if len(cells) != len(columns):
        raise UserError(
          f'{place}: the row has {len(cells)} cells, but the first line has {len(columns)} '
          f'columns: {show(columns)}. Put cells that contain the separator or quotes into quotes.'
        )
      yield place, _row_of_cells(dict(zip(columns, cells, strict=True)))
  except csv.Error as error:
    raise UserError(
      f'{source.source}, line {reader.line_num}: the table cannot be read: {error}. Put cells that '
      'contain the separator, line ends or quotes into quotes, and double each quote in them.'
    ) from error


@SOURCES.register('.parquet')
def read_parquet(source: PromptSource, seed: int) -> Iterator[Row]:
  """Yield the rows of a Parquet file.

  Args:
    source: names the file.
    seed: not used.

  Raises:
    UserError: if the file cannot be read.
  """
  reject_settings(source, 'name', 'subset')
  import pyarrow as pa  # imported here because it takes a second
  import pyarrow.parquet as pq

  number = 0
  with open_bytes(source.source) as file:
    data = file.read()
  try:
    table = pq.ParquetFile(pa.BufferReader(data))
    if table.metadata.num_rows > MAX_ROWS:
      raise UserError(f'{source.source} has more than {MAX_ROWS} rows. Split it.')
    for batch in table.iter_batches(batch_size=1000):
      for row in batch.to_pylist():
        number += 1
        yield f'{source.source}, row {number}', row
  except (pa.ArrowException, OSError, MemoryError, UnicodeDecodeError) as error:
    raise UserError(
      f'{source.source}, after row {number}: the Parquet file is damaged: {show(str(error), 200)}. '
      'Write or download it again.'
    ) from error


def _row_of_cells(cells: dict[str, str]) -> dict[str, Any]:
  """Return a row of texts, in which an empty cell of a dialogue or of metadata is absent."""
  optional = (*DIALOGUE_FIELDS, 'system', 'metadata')
  return {name: cell for name, cell in cells.items() if cell or name not in optional}


def _not_an_array(source: PromptSource, reason: str) -> UserError:
  return UserError(
    f'{source.source} is not a JSON array of rows: {reason}. Write [{{"prompt": "Hi"}}, ..], or '
    f'one object per line. {ROW_FORM}'
  )
