"""What preferences will take is known before a run: comparisons, parameters, bytes and FLOPs."""

import json

import pytest

import cai_jax
from cai_jax import pipeline
from cai_jax.model.classifier import save_classifier
from cai_jax.pipeline import space
from cai_jax.pipeline.preference_sizes import REFERENCE_BYTES, UNIT_BYTES, measure_trainings
from cai_jax.training import reward_model
from tests.pipeline_setup import set_fields, small


def measure(model, workdir, **fields):
  config = small(model)  # 10 harmful prompts, 2 rounds
  set_fields(**fields)(config)
  run = pipeline.build(config, workdir)
  return run, {size.training.name: size for size in measure_trainings(run)}


@pytest.mark.parametrize(
  ('fields', 'units'),
  [
    ({'prefer__data': 'implied'}, 10),
    ({'prefer__data': 'rounds'}, 20),
    ({'prefer__data': 'every_pair'}, 30),
    ({'prefer__data': 'every_pair', 'prefer__objective': 'kto'}, 60),
    ({'prefer__data': 'labels', 'label__responses': 3}, 30),
  ],
)
def test_comparisons_are_counted_by_their_source(fields, units, random_model, tmp_path):
  _, sizes = measure(random_model, tmp_path, **fields)
  assert sizes['policy'].units == units
  assert sizes['policy'].reference_bytes == units * REFERENCE_BYTES


def test_a_file_counts_with_what_is_left_of_it(random_model, tmp_path):
  rows = [{'prompt': f'Why {i}?', 'chosen': 'Yes.', 'rejected': 'No.'} for i in range(4)]
  path = tmp_path / 'pairs.jsonl'
  path.write_text(''.join(json.dumps(row) + '\n' for row in [*rows, rows[0]]))
  run, sizes = measure(random_model, tmp_path / 'run', prefer__data=str(path))
  assert sizes['policy'].units == 4
  (needed,) = [n for n in space.estimate_space(run, ['prefer'], None) if n.part == 'units']
  assert needed.bytes == 2 * path.stat().st_size


def test_a_reward_model_counts_its_head_and_no_reference(random_model, tmp_path):
  lm = cai_jax.load(random_model)
  save_classifier(reward_model.add_head(lm, 0).classifier, tmp_path / 'reward')
  fields = {'prefer__data': 'implied', 'reward__data': 'implied'}
  for start in ('base', str(tmp_path / 'reward')):
    run, sizes = measure(random_model, tmp_path / 'run', **fields, reward__init=start)
    policy, reward = sizes['policy'], sizes['reward_model']
    assert reward.num_params == policy.num_params + 32 == lm.config.num_params + 32
    assert reward.reference_bytes == 0
    assert reward.host_bytes == policy.host_bytes == 10 * UNIT_BYTES
    # The reference is a third of a step, and a reward model has no products with the vocabulary.
    logits = 6 * lm.config.vocab_size * lm.config.d_model * 40 * 10
    assert reward.flops(20) == pytest.approx(policy.flops(20) * 3 / 4 - logits)
    needs = space.estimate_space(run, ['prefer'], None)
    written = {need.folder: need.bytes for need in needs}
    assert written[run.workdir / 'reward_model'] == 4 * reward.num_params
    assert written[run.workdir / 'prefer/policy/reference.json'] == 10 * REFERENCE_BYTES


def test_answers_of_a_judge_are_journal_entries(random_model, tmp_path):
  fields = {'label__responses': 3, 'label__principles': 2, 'label__model': 'tiny-oracle'}
  run, _ = measure(random_model, tmp_path, **fields)
  needs = space.estimate_space(run, ['label'], None)
  journal = next(need.bytes for need in needs if need.part == 'journal')
  assert journal == space.journal_bytes(30 + 2 * 30, 30 * 12)
