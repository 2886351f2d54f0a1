"""Bad input of preference training is refused by its name before a stage runs or writes a file."""

import json
import pathlib

import numpy as np
import pytest
import safetensors.numpy

import cai_jax
from cai_jax import pipeline
from cai_jax.model.classifier import save_classifier
from cai_jax.pipeline import stages
from cai_jax.runtime.errors import UserError
from cai_jax.training import reward_model
from tests.pipeline_setup import set_fields, small

ASKED = {'role': 'user', 'content': 'How do I pack the boot for Omar?'}


def reply(text):
  return {'role': 'assistant', 'content': text}


ROW = {'prompt': [ASKED], 'chosen': [reply('Take a bag.')], 'rejected': [reply('No.')]}
OTHER = {'role': 'user', 'content': 'How do I pack the boot for Anna?'}
ROWS = {
  'equal texts': (
    ROW | {'rejected': [reply(' Take a bag. ')]},
    "none of 1 rows is left.*'identical",
  ),
  'a missing field': (
    {name: ROW[name] for name in ('prompt', 'chosen')},
    r'pairs.jsonl, line 1: The row lacks rejected. It has .*docs/preferences.md',
  ),
  'prompts that differ': (
    {'chosen': [ASKED, reply('Take a bag.')], 'rejected': [OTHER, reply('No.')]},
    'pairs.jsonl, line 1: The prompts of chosen and rejected differ.*Omar.*Anna',
  ),
  'another prompt beside the sides': (
    ROW | {'chosen': [OTHER, reply('Take a bag.')]},
    'line 1: chosen begins with another prompt than the field prompt',
  ),
}
BETAS = [('dpo', 0.0), ('robust_dpo', -0.1), ('ipo', 0.0), ('simpo', -1.0), ('kto', -0.5)]


@pytest.fixture
def refused(random_model, tmp_path, monkeypatch):
  """`refused(message, **fields)` starts a run with these fields, which must end in its checks."""

  def fail(run, manifest):
    raise AssertionError('a stage runs')

  monkeypatch.setattr(stages, 'STAGES', dict.fromkeys(stages.STAGES, fail))

  def start(message, **fields):
    config, workdir = small(random_model), tmp_path / 'run'
    set_fields(**fields)(config)
    with pytest.raises(UserError, match=message):
      pipeline.run_stages(pipeline.build(config, workdir))
    assert not any(path.is_file() for path in workdir.rglob('*'))

  return start


@pytest.mark.parametrize('name', ROWS)
@pytest.mark.parametrize('section', ['prefer', 'reward'])
def test_comparisons_that_are_none(name, section, refused, tmp_path):
  row, message = ROWS[name]
  path = tmp_path / 'pairs.jsonl'
  path.write_text(json.dumps(row) + '\n')
  refused(f'{section}.data=.*{message}', **{f'{section}__data': str(path)})


def test_a_reference_with_another_tokenizer(refused, tiny_hf_folder):
  other = str(tiny_hf_folder('llama3'))
  message = 'prefer.reference=.*has another tokenizer than the model that prefer trains'
  refused(message, prefer__data='implied', prefer__reference=other)


@pytest.fixture(scope='module')
def head_folder(random_model, tmp_path_factory):
  """`head_folder(shape, labels)` saves a reward model whose head has another shape."""
  good = tmp_path_factory.mktemp('good')
  start = reward_model.add_head(cai_jax.load(random_model), 0)
  save_classifier(start.classifier, good)
  tensors = safetensors.numpy.load_file(good / 'model.safetensors')
  config = json.loads((good / 'config.json').read_text())

  def save(shape, labels):
    folder = pathlib.Path(tmp_path_factory.mktemp('head'))
    for path in good.iterdir():
      (folder / path.name).write_bytes(path.read_bytes())
    changed = {**tensors, 'score.weight': np.zeros(shape, np.float32)}
    safetensors.numpy.save_file(changed, folder / 'model.safetensors')
    ids = {'id2label': {str(i): f'l{i}' for i in range(labels)}, 'label2id': None}
    (folder / 'config.json').write_text(json.dumps(config | ids | {'num_labels': labels}))
    return str(folder)

  return save


@pytest.mark.parametrize(
  ('shape', 'labels', 'message'),
  [
    ((1, 48), 1, r"'score.weight' has shape \(1, 48\), but config.json implies \(1, 32\)"),
    ((3, 32), 1, r"'score.weight' has shape \(3, 32\), but config.json implies \(1, 32\)"),
    ((3, 32), 3, r'is a classifier with 3 labels .* A reward model starts from'),
  ],
)
def test_a_reward_head_of_the_wrong_shape(shape, labels, message, refused, head_folder):
  folder = head_folder(shape, labels)
  refused(f'reward.init=.*{message}', reward__data='implied', reward__init=folder)


@pytest.mark.parametrize(('objective', 'beta'), BETAS)
def test_a_beta_that_is_not_positive(objective, beta, refused):
  fields = {'prefer__objective': objective, 'prefer__options': (('beta', beta),)}
  refused(
    f'prefer.options: beta={beta} must be a positive number', prefer__data='implied', **fields
  )
