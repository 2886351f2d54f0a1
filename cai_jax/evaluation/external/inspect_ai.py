"""Logs of inspect: the JSON files that `inspect eval --log-format=json` writes.

`eval` describes the task and the models that have roles, such as a grader. `results.scores` has the
metrics of each scorer. Seen in logs of version 2 that inspect-ai 0.3.285 wrote. Its default format,
`.eval`, is an archive compressed with Zstandard, which Python reads from version 3.14 on.
"""

from collections.abc import Mapping
from typing import Any

from cai_jax.evaluation.external.readers import READERS, Metric, Reader, number
from cai_jax.runtime.errors import UserError
from cai_jax.runtime.shapes import check_shape, optional

_MODEL = {'model': str}
_SHAPE = {
  'status': str,
  'eval': {
    'task': str,
    optional('task_args_passed'): {...: object},
    optional('model_roles'): ({...: (_MODEL, [_MODEL])}, None),
  },
  'results': {
    'scores': [
      {
        'name': str,
        optional('reducer'): (str, None),
        optional('scored_samples'): (int, None),
        'metrics': {...: {'name': str, 'value': object}},
      }
    ]
  },
}
_ERROR = 'stderr'
_HAVE_ERROR = ('accuracy', 'mean')  # what `stderr` is the standard error of


def _recognizes(content: Mapping[str, Any]) -> bool:
  return {'eval', 'plan', 'status', 'version'} <= content.keys()


def _read(content: Mapping[str, Any], place: str) -> list[Metric]:
  if content['status'] != 'success':
    raise UserError(
      f'{place}: the evaluation has the status {content["status"]!r}. Read the log of one that '
      "has succeeded; 'inspect eval-retry' completes an evaluation."
    )
  check_shape(content, _SHAPE, place)
  described, scores = content['eval'], content['results']['scores']
  # A role takes the place of an argument that names no model.
  given = {k: v for k, v in described.get('task_args_passed', {}).items() if v is not None}
  given |= {role: _models(bound) for role, bound in (described.get('model_roles') or {}).items()}
  task = ' '.join(
    [described['task'].rpartition('/')[2], *(f'{name}={value}' for name, value in given.items())]
  )
  metrics = []
  for score in scores:
    values = score['metrics']
    with_error = [name for name in values if name in _HAVE_ERROR]
    error = number(values[_ERROR]['value']) if _ERROR in values else None
    reducer = f' {score["reducer"]}' if score.get('reducer') else ''  # of several epochs
    for name, metric in values.items():
      if name == _ERROR and with_error:
        continue
      title = name if len(scores) == 1 else f'{score["name"]}{reducer} {name}'
      own_error = error if with_error == [name] else None
      count = score.get('scored_samples')
      metrics.append(Metric(task, title, number(metric['value']), own_error, count))
  return metrics


def _models(bound: Any) -> str:
  """Return the names of the models that have a role."""
  return ','.join(one['model'] for one in (bound if isinstance(bound, list) else [bound]))


READERS.register('inspect')(Reader(_recognizes, _read))
