"""The samples published with Bai et al. 2022, read as rows of D_CAI for comparison.

The repository anthropics/ConstitutionalHarmlessnessPaper has them as samples/*_SLMADISON.jsonl.
"""

import json
import os
import re
from typing import Any

from cai_jax.runtime.errors import UserError

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
    UserError: if the file cannot be read, or a line is not a sample.
  """
  path = os.fspath(path)
  name = os.path.basename(path).partition('.')[0]
  try:
    with open(path, encoding='utf-8') as file:
      lines = file.read().splitlines()
  except (OSError, UnicodeDecodeError) as error:
    raise UserError(f'{path} cannot be read: {error}. Give a *_SLMADISON.jsonl file.') from error
  rows: list[dict[str, Any]] = []
  requests: Requests = {}
  for number, line in enumerate(lines, 1):
    try:
      sample = json.loads(line)
      rows.append(_row(sample, f'{name}/{number}'))
      requests |= _requests(sample)
    except (KeyError, IndexError, TypeError, ValueError) as error:
      raise UserError(
        f'{path}, line {number}: not a sample with rl_prompt, initial_response and cst '
        f'({type(error).__name__}: {error}). Give a *_SLMADISON.jsonl file.'
      ) from error
  return rows, requests


def _row(sample: dict[str, Any], row_id: str) -> dict[str, Any]:
  _, *parts = _LABEL.split(sample['rl_prompt'])
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


def _without_labels(request: str) -> str:
  return _LABEL.sub('', request).strip()
