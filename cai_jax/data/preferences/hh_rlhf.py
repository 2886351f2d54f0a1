"""The form of HH-RLHF: two whole transcripts that differ in the assistant's last turn."""

from collections.abc import Iterator, Mapping
from typing import Any

from cai_jax.data.dialogues import parse_transcript
from cai_jax.data.preferences.comparisons import Comparison
from cai_jax.data.preferences.forms import (
  FORMS,
  Item,
  attempt,
  last_reply,
  read_rows,
  reason_to_leave_out,
  row_id,
)
from cai_jax.runtime.errors import UserError, show


@FORMS.register('hh_rlhf')
def read_hh_rlhf(path: str, pairs: str) -> Iterator[Item]:
  """Yield the comparisons of a file of HH-RLHF (anthropics/hh-rlhf).

  Each row has `chosen` and `rejected`, "\\n\\nHuman: ...\\n\\nAssistant: ...". Rows whose
  transcripts differ before the last turn, as a few published ones do, are 'prompts_differ'.

  Args:
    path: the file.
    pairs: not used.
  """
  for place, row in read_rows(path):
    yield place, attempt(_parse, row)


def _parse(row: Mapping[str, Any]) -> Comparison | str:
  (prompt, chosen), (other, rejected) = (_side(row, name) for name in ('chosen', 'rejected'))
  if prompt != other:
    return 'prompts_differ'
  reason = reason_to_leave_out(chosen, rejected)
  return reason or Comparison(
    row_id(row, [prompt, chosen, rejected]), tuple(prompt), chosen, rejected, source='hh_rlhf'
  )


def _side(row: Mapping[str, Any], name: str) -> tuple[list[dict[str, Any]], str]:
  """Return the prompt and the reply of one of a row's two transcripts."""
  if not isinstance(row.get(name), str):
    raise UserError(
      f'A row of HH-RLHF needs the transcripts chosen and rejected, but {name} is '
      f'{show(row.get(name))}.'
    )
  try:
    return last_reply(name, parse_transcript(row[name]))
  except UserError as error:
    raise UserError(f'{name}: {error}') from error
