"""TRL's own trainers: the same losses on the same data, and our files in them as they are.

CAI_JAX_TRL names the Python of an environment with torch, transformers, datasets and trl.
"""

import dataclasses
import json
import math
import os
import pathlib
import subprocess

import numpy as np
import pytest

from cai_jax.data import packing
from cai_jax.data.preferences import Comparison, write_comparisons, write_preferences
from cai_jax.dialogue import Dialogue
from cai_jax.training.reference import compute_reference
from tests import preference_steps
from tests.preference_steps import ADAM, CONFIG, load

PYTHON = os.environ.get('CAI_JAX_TRL')
ROOT = pathlib.Path(__file__).resolve().parents[1]
STEPS, SIZE = 10, 8  # steps, and units of a step

pytestmark = [
  pytest.mark.slow,
  pytest.mark.skipif(not PYTHON, reason='set CAI_JAX_TRL to a Python with trl'),
]

DPO = {'per_device_train_batch_size': SIZE, 'precompute_ref_log_probs': True, 'max_length': None}
REWARD = {'per_device_train_batch_size': SIZE, 'max_length': None}
ONE = {'per_device_train_batch_size': 1, 'gradient_accumulation_steps': SIZE, 'max_length': 64}
SAME = {  # → TRL's trainer and options, our objective and options
  'dpo': ('dpo', DPO | {'beta': 0.2}, 'dpo', {'beta': 0.2}),
  'robust_dpo': (
    'dpo',
    DPO | {'beta': 0.2, 'loss_type': ['robust'], 'label_smoothing': 0.15},
    'robust_dpo',
    {'beta': 0.2, 'flip_rate': 0.15},
  ),
  'length_normalized_dpo': (
    'dpo',
    DPO | {'beta': 2.0, 'loss_type': ['sigmoid_norm']},
    'dpo',
    {'beta': 2.0, 'length_normalized': True},
  ),
  # TRL divides the log-ratios of IPO by lengths, which equation 17 of the paper does not.
  'ipo': (
    'dpo',
    DPO | {'beta': 0.5, 'loss_type': ['ipo']},
    'ipo',
    {'beta': 0.5, 'length_normalized': True},
  ),
  # TRL's imitation term has the prompt's tokens, too, and is a mean over the tokens of a
  # micro-batch. With prompts of one token and single pairs, it is that of the paper.
  'orpo': ('orpo', ONE | {'beta': 0.5}, 'orpo', {'weight': 0.5}),
  'simpo': (
    'cpo',
    ONE | {'loss_type': 'simpo', 'cpo_alpha': 0.0, 'beta': 2.0, 'simpo_gamma': 0.6},
    'simpo',
    {'beta': 2.0, 'gamma': 0.6},
  ),
  'kto': (
    'kto',
    DPO | {'beta': 0.2, 'undesirable_weight': 1.5},
    'kto',
    {'beta': 0.2, 'undesirable_weight': 1.5},
  ),
  'reward': (
    'reward',
    REWARD | {'center_rewards_coefficient': 0.1},
    'reward',
    {'centering': 0.1, 'margins': True},
  ),
}


@pytest.fixture(scope='module')
def folder(tmp_path_factory, tiny_tokenizer):
  path = tmp_path_factory.mktemp('model')
  preference_steps.save_model(path, tiny_tokenizer)
  return path


@pytest.fixture(scope='module')
def reward_folder(folder, tmp_path_factory):
  path = tmp_path_factory.mktemp('reward')
  preference_steps.save_reward_model(path, folder)
  return path


def make_units(name):
  """Return the units of all steps; those of KTO have the response before as their second one."""
  units = preference_steps.make_units(STEPS * SIZE, probability=1.0)
  if name == 'reward':
    return preference_steps.with_margins(units)
  if name == 'orpo':
    return [unit._replace(segments=tuple(map(_shorten, unit.segments))) for unit in units]
  if name != 'kto':
    return units
  judged = []
  for first in range(0, len(units), SIZE):
    responses = [unit.segments[i % 2] for i, unit in enumerate(units[first : first + SIZE])]
    for i, segment in enumerate(responses):
      other = responses[i - 1]
      prompt, reply = split(segment)[0], split(other)[1]
      tokens = np.array(prompt + reply, np.int32)
      mismatched = segment._replace(tokens=tokens, loss_mask=np.arange(len(tokens)) >= len(prompt))
      values = {'desirable': (float(i % 3 > 0), 0.0)}
      judged.append(units[first + i]._replace(segments=(segment, mismatched), values=values))
  return judged


def _shorten(segment):
  """Return a sequence whose prompt is only its last token."""
  start = int(segment.loss_mask.argmax()) - 1
  return segment._replace(tokens=segment.tokens[start:], loss_mask=segment.loss_mask[start:])


def split(segment):
  """Return the token ids of a sequence's prompt and response."""
  start = int(segment.loss_mask.argmax())
  return segment.tokens[:start].tolist(), segment.tokens[start:].tolist()


def make_row(unit):
  """Return TRL's row of a unit."""
  if 'margin' in unit.values:  # of a reward model, which reads whole sequences
    chosen, rejected = (segment.tokens.tolist() for segment in unit.segments)
    return {'chosen_ids': chosen, 'rejected_ids': rejected, 'margin': unit.values['margin'][0]}
  (prompt, first), (_, second) = map(split, unit.segments)
  if 'desirable' not in unit.values:
    return {'prompt_ids': prompt, 'chosen_ids': first, 'rejected_ids': second} | TEXTS
  label = bool(unit.values['desirable'][0])
  names = ('prompt_ids', 'completion_ids', 'KL_completion_ids', 'label')
  return dict(zip(names, (prompt, first, second, label), strict=True))


TEXTS = {'prompt': 'a', 'chosen': 'b', 'rejected': 'c'}  # what experimental trainers ask for


def run_trl(requests, folder):
  """Return TRL's results; see `trl_steps`."""
  (folder / 'requests.json').write_text(json.dumps(requests))
  command = [PYTHON, '-m', 'tests.trl_steps', str(folder / 'requests.json')]
  environment = {k: v for k, v in os.environ.items() if not k.startswith(('PYTHON', 'XLA'))}
  environment |= {'HF_HUB_OFFLINE': '1', 'HF_DATASETS_CACHE': str(folder / 'cache')}
  environment |= {'TRL_EXPERIMENTAL_SILENCE': '1', 'PYTHONPATH': str(ROOT)}
  subprocess.run([*command, str(folder / 'results.json')], env=environment, check=True, cwd=folder)
  return json.loads((folder / 'results.json').read_text())


PAIRS = [
  Comparison(
    f'pair {i}', ({'role': 'user', 'content': question},), answer, f'No {answer}', p, margin
  )
  for i, (question, answer, p, margin) in enumerate(
    [
      ('How do I repair a bicycle?', 'First look at the brake.', 1.0, 2.0),
      ('Is the last answer unkind?', 'It is kind.', 0.8, 0.5),
      ('What helps?', 'A few plain words.', 0.5, 0.0),
      ('Who asks?', 'The human.', 0.3, -0.5),
    ]
  )
]


def write_files(folder):
  """Return files in each form that we write: implied pairs, labels, and labels with margins."""
  turn = lambda text: {'text': text, 'finish_reason': 'stop'}  # noqa: E731
  chains = [
    {
      'id': pair.id,
      'prompt': list(pair.prompt),
      'initial': turn(pair.rejected),
      'rounds': [{'revision': turn(pair.chosen)}],
    }
    for pair in PAIRS
  ]
  files = {name: folder / f'{name}.jsonl' for name in ('preferences', 'labels', 'margins')}
  write_preferences(files['preferences'], chains)
  write_comparisons(files['labels'], [dataclasses.replace(pair, margin=None) for pair in PAIRS])
  write_comparisons(files['margins'], PAIRS)
  return files


@pytest.fixture(scope='module')
def results(folder, reward_folder, tmp_path_factory):
  """TRL's results: of objectives by name, and of files by the trainer and the file's name."""
  work = tmp_path_factory.mktemp('trl')
  shared = {'folder': str(folder), 'optimizer': ADAM | {'weight_decay': 0.0}}
  requests = {}
  for name, (trainer, options, _, _) in SAME.items():
    rows = [make_row(unit) for unit in make_units(name)]
    requests[name] = {'trainer': trainer, 'options': options, 'rows': rows, **shared}
  requests['reward']['folder'] = str(reward_folder)
  for name, path in write_files(work).items():
    file = {'file': str(path), 'options': {'per_device_train_batch_size': 2}, **shared}
    requests['dpo', name] = {'trainer': 'dpo', **file}
    requests['reward', name] = {'trainer': 'reward', 'model': {'num_labels': 1}, **file}
  return dict(zip(requests, run_trl(list(requests.values()), work), strict=True))


@pytest.mark.parametrize('name', SAME)
def test_ten_steps_agree_with_trl(name, results, folder, reward_folder):
  _, _, objective, options = SAME[name]
  config = dataclasses.replace(CONFIG, objective=objective, options=tuple(options.items()))
  units = make_units(name)
  is_reward = objective == 'reward'
  lm = preference_steps.load_reward_model(reward_folder) if is_reward else load(folder)
  if config.registered_loss.needs_reference:
    references = compute_reference(lm, units, config)
    units = [
      unit._replace(values={**unit.values, 'reference': tuple(numbers)})
      for unit, numbers in zip(units, references, strict=True)
    ]
  bucket = packing.Bucket(CONFIG.max_length, SIZE)
  plan = [
    packing.Step(bucket, tuple((first + i,) for i in range(SIZE)))
    for first in range(0, len(units), SIZE)
  ]
  losses, _, _ = preference_steps.train(lm, units, plan, config)
  theirs = results[name]
  np.testing.assert_allclose(losses, theirs['losses'], rtol=1e-3)


@pytest.mark.parametrize('name', ['preferences', 'labels', 'margins'])
def test_files_load_in_trl_as_they_are(name, results, folder):
  """TRL reads our token ids, behind which it keeps what the template adds to a reply."""
  dpo = results['dpo', name]
  assert len(dpo['losses']) == 2 and dpo['losses'][0] == pytest.approx(math.log(2), rel=1e-5)
  lm = load(folder)
  dialogue = Dialogue(lm.tokenizer)
  for row, pair in zip(dpo['rows'], PAIRS, strict=True):
    for side, text in zip(('chosen_ids', 'rejected_ids'), pair.texts, strict=True):
      prompt, reply = list(dialogue.prompt(pair.prompt)), list(dialogue.reply(text))
      assert row['prompt_ids'] == prompt and row[side][: len(reply)] == reply
      assert lm.tokenizer.decode(row[side][len(reply) :]).strip() == ''
  reward = results['reward', name]
  assert len(reward['losses']) == 2 and np.isfinite(reward['losses']).all()
  if name == 'margins':  # TRL's reward trainer reads them
    assert reward['losses'] != results['reward', 'labels']['losses']
