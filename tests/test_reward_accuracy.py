"""The accuracy of a reward model on labelled pairs."""

import json
import types

from cai_jax.evaluation.config import EvaluationConfig
from cai_jax.evaluation.measures.reward_accuracy import create_reward_accuracy


def test_rows_that_are_no_pair_are_counted_beside_the_accuracy(tmp_path):
  rows = [
    {'prompt': 'Why?', 'chosen': 'Rain falls.', 'rejected': 'No.'},
    {'prompt': 'Why?', 'chosen': 'No.', 'rejected': 'No.'},
    {'prompt': 'Who?', 'chosen': ' ', 'rejected': 'No.'},
  ]
  path = tmp_path / 'pairs.jsonl'
  path.write_text(''.join(json.dumps(row) + '\n' for row in rows))
  model = types.SimpleNamespace(
    label_index=lambda name: 0,
    scores=lambda texts, label: [float(len(messages[-1]['content'])) for messages in texts],
  )
  loader = types.SimpleNamespace(reward_model=lambda name, style: model)
  config = EvaluationConfig(reward_model='some', reward_labelled=str(path))
  measure = create_reward_accuracy(config)
  result = measure.compare(loader, [], [], 0)
  assert (result['count'], result['accuracy']) == (1, 1.0)
  assert result['left_out'] == {'equal responses': 1, 'blank response': 1}
  (line,) = measure.describe(result)
  assert line.endswith('of 1 labelled pairs; 2 rows are no pair')
  assert measure.describe(result | {'left_out': {}})[0].endswith('of 1 labelled pairs')
