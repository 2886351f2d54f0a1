"""Files of metrics: damaged rows are refused with their line, and texts of models are code."""

import json

import pytest

from cai_jax.runtime.errors import UserError
from cai_jax.training.metrics import MetricsWriter, read_rows


@pytest.mark.parametrize('line', ['{', '[]', '1' * 5000, '{"loss": 1.0}'])
def test_damaged_row_of_metrics_is_refused_with_its_line(tmp_path, line):
  path = tmp_path / 'metrics.jsonl'
  path.write_text('{"step": 1}\n' + line + '\n{"step": 3')
  with pytest.raises(UserError, match='metrics.jsonl, line 2 is not'):
    read_rows(path)


@pytest.mark.parametrize(
  ('file', 'row'),
  [
    ('metrics.jsonl', {'step': 2, 'loss': 'low'}),
    ('metrics.jsonl', {'step': 2, 'loss': 10**400}),
    ('metrics.jsonl', {'step': True}),
    ('held_out.jsonl', {'step': 2}),
    ('probes.jsonl', {'step': 2, 'id': 'a', 'prompt': 'x'}),
    ('probes.jsonl', {'step': 2, 'id': 'a', 'prompt': ['x'], 'text': 'y'}),
  ],
)
def test_rows_with_other_types_are_refused_with_their_line_and_key(tmp_path, file, row):
  good = {'step': 1, 'id': 'a', 'prompt': 'x', 'text': 'y'}
  good = good if file == 'probes.jsonl' else {'step': 1, 'loss': 1.0}
  (tmp_path / file).write_text(f'{json.dumps(good)}\n{json.dumps(row)}\n')
  with pytest.raises(UserError, match=rf'{file}, line 2.* must be '):
    read_rows(tmp_path / file)


def test_tensorboard_shows_the_texts_of_models_as_code(tmp_path):
  writer, written = MetricsWriter(tmp_path, 0, '', {}), []
  writer._events.add_text = lambda *row: written.append(row)
  writer.write_texts('probes/a', ['# Hi', '![x](http://example.com/x.png)\n\n<b>'], 3)
  writer.close(succeeded=True)
  ((_, text, _),) = written
  assert all(not line or line == '---' or line.startswith('    ') for line in text.split('\n'))
