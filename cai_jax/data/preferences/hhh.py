"""The form of the published HHH questions: two transcripts, of which one has the better answer."""

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


@FORMS.register('hhh')
def read_hhh(path: str, pairs: str) -> Iterator[Item]:
  """Yield the comparisons of the published HHH questions (Askell et al. 2021).

  Each row of evals/438HHHEvaluations.jsonl (repository anthropics/ConstitutionalHarmlessnessPaper)
  has `text_correct` and `text_incorrect`, "\\n\\nHuman: ...\\n\\nAssistant: ...". Its question,
  which has a principle of its own, is not read.

  Args:
    path: the file.
    pairs: not used.
  """
  for place, row in read_rows(path):
    yield place, attempt(_parse, row)


def _parse(row: Mapping[str, Any]) -> Comparison | str:
  names = ('text_correct', 'text_incorrect')
  if missing := [name for name in names if not isinstance(row.get(name), str)]:
    raise UserError(f'An HHH question needs the text {missing[0]}, but has {show(list(row), 200)}.')
  (prompt, better), (other, worse) = (
    last_reply(name, parse_transcript(row[name])) for name in names
  )
  if prompt != other:
    return 'prompts_differ'
  reason = reason_to_leave_out(better, worse)
  content = [prompt, better, worse]
  return reason or Comparison(row_id(row, content), tuple(prompt), better, worse, source='hhh')
