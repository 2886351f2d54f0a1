"""Two processes label, train and choose like one."""

import json
import sys

import numpy as np
import pytest
import safetensors.numpy

from cai_jax.data import d_cai
from tests.pipeline_setup import start_one, start_two


def command(model, workdir):
  fields = {
    'model.base': model,
    'model.aligned': model,
    'sampling.initial.max_tokens': 12,
    'engine.slots': 8,
    'prompts.harmful.limit': 12,
    'prompts.helpful.limit': 4,
    'label.responses': 2,
    'label.thoughts': 4,
    'reward.data': 'labels',
    'reward.init': 'base',
    'reward.best_of_n': 2,
    'prefer.data': 'labels',
    'prefer.init': 'base',
  }
  sizes = {'max_length': 256, 'batch_size': 8, 'drop_truncated': False, 'learning_rate': 1e-3}
  for section in ('reward', 'prefer'):
    fields |= {f'{section}.{name}': value for name, value in sizes.items()}
  return [
    sys.executable, 'launch.py', '--config=configs/tiny.py', f'--workdir={workdir}',
    '--stages=label,prefer', *(f'--config.{name}={value}' for name, value in fields.items()),
  ]  # fmt: skip


def read_labels(workdir):
  return [json.loads(x) for x in (workdir / 'labels/comparisons.jsonl').read_text().splitlines()]


@pytest.mark.slow
def test_two_processes_give_the_labels_and_models_of_one(random_model, tmp_path):
  """Two processes of a device each, against one of two devices."""
  assert start_one(command(random_model, tmp_path / 'one'), 2).wait() == 0
  pair = start_two(command(random_model, tmp_path / 'two'), 1)
  assert [process.wait() for process in pair] == [0, 0]
  assert len(list((tmp_path / 'two' / 'journal').glob('turns-*'))) == 2
  one, two = (read_labels(tmp_path / name) for name in ('one', 'two'))
  assert len(one) == len(two) > 6
  for first, second in zip(one, two, strict=True):
    assert first['probability'] == pytest.approx(second['probability'], rel=1e-5)
    for name in ('id', 'prompt', 'chosen', 'rejected', 'truncated', 'responses'):
      assert first[name] == second[name], name
  answers = [d_cai.read_rows(tmp_path / name / 'best_of_n') for name in ('one', 'two')]
  texts = [[(row['id'], row['initial']['text']) for row in rows] for rows in answers]
  assert texts[0] == texts[1] and len(texts[0]) == 16
  for folder in ('reward_model', 'policy'):
    first, second = (
      safetensors.numpy.load_file(tmp_path / name / folder / 'model.safetensors')
      for name in ('one', 'two')
    )
    assert first.keys() == second.keys()
    for name, value in first.items():
      np.testing.assert_allclose(value, second[name], atol=1e-4, err_msg=name)
  stored = [
    json.loads((tmp_path / name / 'prefer/policy/reference.json').read_text())['logprobs']
    for name in ('one', 'two')
  ]
  np.testing.assert_allclose(*stored, rtol=1e-5)
