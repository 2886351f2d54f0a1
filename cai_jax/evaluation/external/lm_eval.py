"""Results of lm-evaluation-harness: the file `results_DATE.json` in its `--output_path`.

`results` maps each task to its metrics. A metric is named NAME,FILTER and its standard error
NAME_stderr,FILTER, which is 'N/A' where there is none; other keys describe the task. `n-samples`
has the number of samples. Seen in files that lm-eval 0.4.13 wrote.
"""

from collections.abc import Mapping
from typing import Any

from cai_jax.evaluation.external.readers import READERS, Metric, Reader, number
from cai_jax.runtime.shapes import check_shape, optional

_SHAPE = {
  'results': {...: {...: object}},
  optional('n-samples'): {...: {'effective': int}},
}
_NO_FILTER = 'none'


def _recognizes(content: Mapping[str, Any]) -> bool:
  return {'results', 'configs', 'versions'} <= content.keys()


def _read(content: Mapping[str, Any], place: str) -> list[Metric]:
  check_shape(content, _SHAPE, place)
  counts = content.get('n-samples', {})
  metrics = []
  for task, values in content['results'].items():
    count = counts[task]['effective'] if task in counts else None
    for key, value in values.items():
      name, comma, filter_name = key.partition(',')
      if not comma or name.endswith('_stderr'):
        continue
      title = name if filter_name == _NO_FILTER else f'{name} ({filter_name})'
      error = number(values.get(f'{name}_stderr,{filter_name}'))
      metrics.append(Metric(task, title, number(value), error, count))
  return metrics


READERS.register('lm-eval')(Reader(_recognizes, _read))
