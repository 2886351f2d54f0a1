"""The samples published with Bai et al. 2022, read as rows of D_CAI for comparison.

The repository anthropics/ConstitutionalHarmlessnessPaper has them as samples/*_SLMADISON.jsonl.
"""

import os
import re
from typing import Any

from cai_jax.runtime.errors import UserError
from cai_jax.runtime.text_files import check_characters, parse_json, read_lines

_LABEL = re.compile(r'\n\n(Human|Assistant|CritiqueRequest|Critique|RevisionRequest|Revision):')
_ROLES = {'Human': 'user', 'Assistant': 'assistant'}

Requests = dict[str, tuple[str, str]]  # principle id → (critique request, revision request)


def read_published_samples(path: str | os.PathLike[str]) -> tuple[list[dict[str, Any]], Requests]:
  """Read a file of published samples as rows of D_CAI.

  The files do not record why a sample ended, so every `finish_reason` is 'stop' and the flag
  'truncated' is never set.

  Args:
    path: a *_SLMADISON.jsonl file.

  Returns:
    The rows, as `quality_summary.summarize` takes them, and the requests of all principles, as
    `quality.build_references` takes them.

  Raises:
    UserError: if the file cannot be read or is empty, or a line is not a sample.
  """
  path = os.fspath(path)
  name = os.path.basename(path).partition('.')[0]
  rows: list[dict[str, Any]] = []
  requests: Requests = {}
  for number, line in read_lines(path):
    try:
      check_characters('The line', line)
      sample = parse_json(line)
      rows.append(_row(sample, f'{name}/{number}'))
      _add_requests(requests, _requests(sample))
    except (KeyError, IndexError, TypeError, AttributeError, ValueError) as error:
      raise UserError(
        f'{path}, line {number}: not a sample with rl_prompt, initial_response and cst '
        f'({type(error).__name__}: {error}). Give a *_SLMADISON.jsonl file.'
      ) from error
  if not rows:
    raise UserError(f'{path} has no sample. Give a *_SLMADISON.jsonl file.')
  return rows, requests


def _row(sample: dict[str, Any], row_id: str) -> dict[str, Any]:
  head, *parts = _LABEL.split(sample['rl_prompt'])
  if head.strip() or len(parts) < 4:
    raise ValueError('rl_prompt must be a transcript that ends with the label of the response')
  turns = [
    {'role': _ROLES[label], 'content': content.strip()}
    for label, content in zip(parts[::2], parts[1::2], strict=True)
  ]
  return {
    'id': row_id,
    'kind': 'harmful',
    'prompt': turns[:-1],  # the last turn is only the label before the response
    'initial': _reply(sample['initial_response'][0]),
    'rounds': [
      {
        'principle': step['cst_key'],
        'critique': _reply(step['critique']),
        'revision': _reply(step['revision']),
      }
      for step in sample['cst']
    ],
  }


def _reply(part: dict[str, Any]) -> dict[str, str]:
  return {'text': part['sample'].strip(), 'finish_reason': 'stop'}


def _requests(sample: dict[str, Any]) -> Requests:
  return {
    step['cst_key']: (
      _without_labels(''.join(step['cst_value']['prompt'])),
      _without_labels(step['cst_value']['edit_request']),
    )
    for step in sample['cst']
  }


def _add_requests(requests: Requests, new: Requests) -> None:
  """Add the requests of one sample to those of all."""
  for name, texts in new.items():
    if requests.setdefault(name, texts) != texts:
      raise ValueError(f'the principle {name!r} has other requests than in an earlier sample')


def _without_labels(request: str) -> str:
  return _LABEL.sub('', request).strip()
