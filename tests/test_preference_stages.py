"""Stages `label` and `prefer`: what they write, what they check, and how they resume."""

import dataclasses
import json
import shutil

import numpy as np
import pytest

import cai_jax
from cai_jax import pipeline
from cai_jax.data import d_cai
from cai_jax.data.examples import build_examples
from cai_jax.data.preferences import Comparison
from cai_jax.dialogue import Dialogue
from cai_jax.evaluation.baselines import BASELINES
from cai_jax.experiment import estimate
from cai_jax.pipeline import space, stage_prefer
from cai_jax.pipeline.pairs import exchange_sides
from cai_jax.pipeline.policy_table import describe_trainings
from cai_jax.runtime.errors import UserError
from cai_jax.scoring import reward
from tests.pipeline_setup import set_fields, small

pytestmark = pytest.mark.usefixtures('single_device')

PREFERENCES = {
  'reward__data': 'implied',
  'reward__init': 'base',
  'reward__best_of_n': 2,
  'prefer__data': 'implied',
  'prefer__compare': ('base',),
  'evaluation__reward_model': 'trained',
  'evaluation__reward_labelled': 'tiny',
  'evaluation__judge_labelled_limit': 8,
  'evaluation__baselines': ('best_of_reward',),
  'evaluation__best_of_n': 2,
  'evaluation__scores': ('kl',),
  'evaluation__judge': 'tiny-oracle',
  'evaluation__loss': False,
  'feedback__rounds': 1,
}


def with_preferences(model, **fields):
  """The config of a run of seconds that trains a reward model and two policies."""
  config = small(model)
  sizes = {'max_length': 256, 'batch_size': 8, 'drop_truncated': False, 'checkpoint_every': 1}
  for section in ('reward', 'prefer'):
    set_fields(**{f'{section}__{name}': value for name, value in sizes.items()})(config)
  set_fields(**{**PREFERENCES, **fields})(config)
  return config


@pytest.fixture(scope='module')
def finished(random_model, tmp_path_factory):
  workdir = tmp_path_factory.mktemp('preferences')
  pipeline.run_stages(pipeline.build(with_preferences(random_model), workdir))
  return workdir


def test_a_run_that_asks_for_no_preferences_has_the_stages_and_settings_of_before(
  random_model, tmp_path
):
  run = pipeline.build(small(random_model), tmp_path)
  assert pipeline.default_stages(run) == ['generate', 'train', 'evaluate', 'report']
  for stage in pipeline.default_stages(run):
    assert not {'label', 'reward', 'prefer'} & set(run.settings(stage))
  for stage, field in (('label', 'label.responses'), ('prefer', 'prefer.data')):
    with pytest.raises(UserError, match=f'Stage {stage} has nothing to do. Set {field}'):
      pipeline.run_stages(run, [stage])


def test_labels_depend_on_what_the_feedback_model_is_asked(random_model, tmp_path):
  config = small(random_model)
  config.label.responses = 2
  run = pipeline.build(config, tmp_path)
  first, *others = run.constitution.principles
  edited = dataclasses.replace(first, comparison_request='Which response is kinder?')
  changed = dataclasses.replace(
    run, constitution=dataclasses.replace(run.constitution, principles=(edited, *others))
  )
  for stage in ('label', 'prefer', 'evaluate'):
    assert run.settings(stage) != changed.settings(stage), stage
  assert run.settings('generate') == changed.settings('generate')


def test_turns_of_labels_and_of_the_best_answers_are_counted(random_model, tmp_path):
  fields = {'label__responses': 3, 'label__principles': 2, 'label__thoughts': 5}
  run = pipeline.build(with_preferences(random_model, **fields), tmp_path)
  # 10 harmful prompts: 3 responses of 12 tokens; 3 pairs in 2 orders under 2 principles.
  turns = estimate.count_turns(run, ['label']).values()
  assert sorted((t.count, t.max_tokens) for t in turns) == [(30, 12), (120, 6)]
  # 2 answers to each of 16 prompts.
  (best,) = estimate.count_turns(run, ['prefer']).values()
  assert (best.count, best.max_tokens) == (32, 12)
  journal = space.journal_bytes(30 + 2 * 120 + 32, 30 * 12 + 120 * 6 + 32 * 12)
  needs = space.estimate_space(run, ['label', 'prefer'], None)
  assert next(need.bytes for need in needs if need.part == 'journal') == journal
  judged = with_preferences(random_model, label__responses=3, label__model='tiny-oracle')
  turns = estimate.count_turns(pipeline.build(judged, tmp_path), ['label']).values()
  assert [t.count for t in turns] == [30]


@pytest.mark.slow
def test_all_policies_are_evaluated_beside_the_models(finished):
  summary = json.loads((finished / 'evaluation' / 'summary.json').read_text())
  models = ['base', 'aligned', 'best_of_reward', 'policy', 'policy_base']
  for group in ('models', 'benign'):
    assert list(summary[group]) == models
    compared = {
      name: row['differences']['mean_tokens']['to']
      for name, row in summary[group].items()
      if name != 'base'
    }
    assert compared == dict.fromkeys(models[1:], 'base') | {'policy': 'aligned'}
    assert all(np.isfinite(row['reward']) for row in summary[group].values())
  results = json.loads((finished / 'evaluation' / 'models.json').read_text())
  assert set(results['kl']['policies']) == {'policy', 'policy_base'}
  for kl in (results['kl'], *results['kl']['policies'].values()):
    assert np.mean(list(kl['items'].values())) == pytest.approx(kl['per_response'])
  assert results['reward_labelled']['count'] == 8
  pairs = {(c['player'], c['opponent']) for c in results['judge']['comparisons']}
  assert {('policy', 'base'), ('policy', 'aligned'), ('policy_base', 'base')} <= pairs
  report = (finished / 'report.html').read_text()
  for label in ('SL-CAI + DPO', 'DPO alone', 'best of 2 by the reward model'):
    assert label in report


@pytest.mark.slow
def test_trained_models_have_folders_with_manifests(finished, random_model):
  assert json.loads((finished / 'manifest.json').read_text())['stages'].keys() == {
    'generate',
    'train',
    'prefer',
    'evaluate',
    'report',
  }
  base, tokens = cai_jax.load(random_model), np.arange(5, 21)[None]
  for folder in ('policy', 'policies/base'):
    policy = cai_jax.load(finished / folder)
    assert policy.config == base.config
    assert np.abs(policy.logits(tokens) - base.logits(tokens)).max() > 0
    manifest = json.loads((finished / folder / 'manifest.json').read_text())
    assert manifest['identity']['settings']['objective'] == 'dpo'
    assert manifest['result']['pairs']['kept'] > 0
  model = reward.load(finished / 'reward_model')
  conversation = [{'role': 'user', 'content': 'Hi'}, {'role': 'assistant', 'content': 'Hello.'}]
  assert np.isfinite(model.scores([conversation])).all()


@pytest.mark.slow
def test_the_best_answers_to_training_prompts_can_be_fine_tuned_on(finished, random_model):
  rows = d_cai.read_rows(finished / 'best_of_n')
  candidates = {row['id']: row for row in d_cai.read_rows(finished / 'prefer' / 'best_of_n')}
  assert len(rows) == 16 and len(candidates) == 32
  texts = {row['initial']['text'] for row in candidates.values()}
  assert {row['initial']['text'] for row in rows} <= texts
  lm = cai_jax.load(random_model)
  dialogue = Dialogue(lm.tokenizer, 'chat', lm.eos_token_ids)
  built = build_examples(rows, dialogue, target='initial', drop_truncated=False)
  assert built.counts['kept'] == 10  # harmful prompts


@pytest.mark.slow
def test_a_stage_that_was_killed_continues_with_the_training_that_is_missing(
  finished, random_model, tmp_path, capsys
):
  shutil.copytree(finished, tmp_path / 'run')
  workdir = tmp_path / 'run'
  before = (workdir / 'policy' / 'model.safetensors').read_bytes()
  shutil.rmtree(workdir / 'policy')
  shutil.rmtree(workdir / 'prefer' / 'policy' / 'checkpoints')
  manifest = json.loads((workdir / 'manifest.json').read_text())
  for name in ('prefer', 'evaluate', 'report'):
    del manifest['stages'][name]
  (workdir / 'manifest.json').write_text(json.dumps(manifest))
  pipeline.run_stages(pipeline.build(with_preferences(random_model), workdir), ['prefer'])
  assert (workdir / 'policy' / 'model.safetensors').read_bytes() == before
  said = capsys.readouterr().out
  assert 'reward_model: done before' in said and 'policy_base: done before' in said
  assert 'policy: dpo from aligned ...' in said


@pytest.mark.slow
def test_a_policy_that_was_replaced_is_named(finished, random_model, tmp_path):
  shutil.copytree(finished, tmp_path / 'run')
  workdir = tmp_path / 'run'
  shutil.copy(workdir / 'model' / 'model.safetensors', workdir / 'policy' / 'model.safetensors')
  manifest = json.loads((workdir / 'manifest.json').read_text())
  del manifest['stages']['evaluate'], manifest['stages']['report']
  (workdir / 'manifest.json').write_text(json.dumps(manifest))
  with pytest.raises(UserError, match='policy is not the model that stage prefer wrote'):
    pipeline.run_stages(pipeline.build(with_preferences(random_model), workdir), ['evaluate'])


def test_the_report_says_what_was_learned_and_left_out(random_model, tmp_path):
  fields = {'prefer__objective': 'kto', 'prefer__compare': ('init',)}
  run = pipeline.build(with_preferences(random_model, **fields), tmp_path)
  counts = {'kept': 6, 'read': {'dropped': {'near_held_out': 1}}, 'dropped': {'too_long': 2}}
  entry = {name: {'pairs': counts} for name in ('reward_model', 'policy', 'policy_init')}
  lines = describe_trainings(run, {'stages': {'prefer': entry}}).splitlines()
  assert lines[:3] == [
    "reward_model: reward from base, on 6 comparisons of 'implied'",
    'reward_model: left out of comparisons that were read: 1 near_held_out',
    'reward_model: left out of comparisons: 2 too_long',
  ]
  learned = "on 6 judged responses of 'implied'; differences are to"
  assert lines[3::3] == [
    f'policy: kto from aligned, {learned} SL-CAI',
    f'policy_init: kto from init, {learned} M_θ',
  ]


def write(path, **row):
  user = [{'role': 'user', 'content': 'How do I pack the boot for Omar?'}]
  whole = {'prompt': user, 'chosen': 'Take a bag.', 'rejected': 'No.'} | row
  for side in ('chosen', 'rejected'):
    if side in whole:
      whole[side] = [{'role': 'assistant', 'content': whole[side]}]
  path.write_text(json.dumps(whole) + '\n')
  return str(path)


@pytest.mark.parametrize(
  ('fields', 'message'),
  [
    ({'prefer__options': (('beta', 0.0),)}, r'prefer.options: beta=0.0 must be'),
    ({'prefer__objective': 'reward'}, r"prefer.objective='reward' does not train a language model"),
    ({'reward__objective': 'dpo'}, r"reward.objective='dpo' does not train a reward model"),
    ({'prefer__objective': 'nll'}, r"prefer.objective='nll'"),
    (
      {'prefer__compare': ('aligned',)},
      r"prefer.compare=\('aligned',\) must be a tuple of",
    ),
    ({'prefer__data': '', 'prefer__compare': ('base',)}, 'prefer.compare=.*has no effect'),
    ({'reward__probes': 2}, 'reward.probes=2 has no effect'),
    ({'reward__reference': 'tiny'}, "reward.reference='tiny' has no effect"),
    ({'reward__options': (('margins', True),)}, "reward.data='implied' has none"),
    (
      {'label__responses': 2, 'label__model': 'tiny-oracle', 'label__thoughts': 8},
      'label.thoughts=8 has no effect',
    ),
    ({'prefer__data': 'labels'}, "prefer.data='labels' needs what stage label writes"),
    ({'prefer__data': 'none.jsonl'}, "prefer.data='none.jsonl'"),
    ({'prefer__invalid': 'skip'}, "prefer.invalid='skip' has no effect"),
    ({'prefer__filters': ('rude',)}, 'prefer.filters=.*must be a tuple of names from'),
    ({'prefer__form': 'hh_rlhf'}, "prefer.form='hh_rlhf' has no effect"),
    ({'reward__data': ''}, 'reward.best_of_n=2 needs a reward model'),
    ({'reward__data': '', 'reward__best_of_n': 0}, "reward_model='trained' is the reward model of"),
    ({'evaluation__style': 'plain'}, "evaluation.style='plain' is the form"),
    ({'reward__best_of_n': 1}, 'reward.best_of_n=1 must be 0 or at least 2'),
    ({'model__aligned': 'tiny'}, "reward.data='implied' reads D_CAI, but model.aligned replaces"),
  ],
)
def test_settings_that_cannot_work_are_refused_before_the_run(
  fields, message, random_model, tmp_path
):
  config = with_preferences(random_model, **fields)
  with pytest.raises(UserError, match=message):
    run = pipeline.build(config, tmp_path)
    pipeline.check_run(run, pipeline.default_stages(run))


@pytest.mark.parametrize(
  ('row', 'message'),
  [
    ({'rejected': 'Take a bag.'}, 'none of 1 rows is left.*identical'),
    ({'chosen': 'steps ' * 300}, 'prefer.max_length=256: No preference remains.*too_long'),
  ],
)
def test_a_file_of_comparisons_is_read_before_the_run(row, message, random_model, tmp_path):
  data = write(tmp_path / 'pairs.jsonl', **row)
  run = pipeline.build(with_preferences(random_model, prefer__data=data), tmp_path / 'run')
  with pytest.raises(UserError, match=message):
    pipeline.check_run(run, pipeline.default_stages(run))


@pytest.mark.parametrize(
  ('fields', 'message'),
  [
    ({'prefer__objective': 'kto'}, 'judged responses answer the same prompt'),
    ({'reward__options': (('margins', True),)}, "options: margins=True.*'0' has no margin"),
    ({'prefer__drop_truncated': True}, "No preference remains.*'truncated': 1"),
  ],
)
def test_the_units_of_a_file_are_built_before_the_run(fields, message, random_model, tmp_path):
  data = write(tmp_path / 'pairs.jsonl', id='0', truncated=[True, False])
  section = next(iter(fields)).partition('__')[0]
  fields = {f'{section}__data': data} | fields
  run = pipeline.build(with_preferences(random_model, **fields), tmp_path / 'run')
  with pytest.raises(UserError, match=f'{section}.data=.*{message}'):
    pipeline.check_run(run, pipeline.default_stages(run))


def test_filters_and_rows_to_skip_are_settings_of_a_run(random_model, tmp_path):
  data = write(tmp_path / 'pairs.jsonl', chosen='Human: take a bag.')
  config = with_preferences(
    random_model, prefer__data=data, prefer__invalid='skip', prefer__filters=('role_marker',)
  )
  with open(data, 'a') as file:
    file.write('{}\n')
  message = "prefer.data=.*none of 2 rows.*'filtered_role_marker': 1, 'invalid': 1"
  with pytest.raises(UserError, match=message):
    run = pipeline.build(config, tmp_path / 'run')
    pipeline.check_run(run, pipeline.default_stages(run))


def test_labelled_pairs_that_the_reward_model_cannot_read_are_named(random_model, tmp_path):
  data = write(tmp_path / 'pairs.jsonl', chosen='steps ' * 3000)
  run = pipeline.build(with_preferences(random_model, evaluation__reward_labelled=data), tmp_path)
  with pytest.raises(UserError, match='Leave the pair out of evaluation.reward_labelled'):
    pipeline.check_run(run, pipeline.default_stages(run))


def test_files_to_label_and_learn_have_no_held_out_prompt(random_model, tmp_path):
  run = pipeline.build(with_preferences(random_model), tmp_path)
  prompt = [dict(message) for message in run.prompts['eval_helpful'][0].messages]
  data = write(tmp_path / 'pairs.jsonl', prompt=prompt)
  fields = {'label__comparisons': (data,), 'label__model': 'tiny-oracle', 'prefer__data': 'labels'}
  run = pipeline.build(with_preferences(random_model, **fields), tmp_path / 'run')
  with pytest.raises(UserError, match='label.comparisons: .*pairs.jsonl'):
    pipeline.check_run(run, pipeline.default_stages(run))


def test_a_file_with_a_held_out_prompt_is_refused(random_model, tmp_path):
  run = pipeline.build(with_preferences(random_model), tmp_path / 'run')
  prompt = [dict(message) for message in run.prompts['eval_harmful'][0].messages]
  data = write(tmp_path / 'pairs.jsonl', prompt=prompt)
  run = pipeline.build(with_preferences(random_model, prefer__data=data), tmp_path / 'run')
  with pytest.raises(UserError, match='prefer.data='):
    pipeline.check_run(run, pipeline.default_stages(run))


def test_a_reference_with_another_tokenizer_is_refused(random_model, tiny_hf_folder, tmp_path):
  other = str(tiny_hf_folder('llama3'))
  run = pipeline.build(with_preferences(random_model, prefer__reference=other), tmp_path)
  with pytest.raises(UserError, match='prefer.reference=.*has another tokenizer'):
    pipeline.check_run(run, pipeline.default_stages(run))


def test_sides_are_exchanged_with_all_that_belongs_to_them():
  pair = Comparison(
    'a',
    ({'role': 'user', 'content': 'Hi'},),
    'x',
    'y',
    0.9,
    scores=(3.0, 1.0),
    truncated=(True, False),
  )
  seen = [exchange_sides(pair, seed) for seed in range(20)]
  others = [other for other in seen if other != pair]
  assert 0 < len(others) < 20 and all(other == others[0] for other in others)
  other = others[0]
  assert (other.chosen, other.rejected, other.margin, other.scores) == ('y', 'x', -2.0, (1.0, 3.0))
  assert other.truncated == (False, True) and other.probability == 0.9


def test_best_of_reward_takes_the_highest_and_reads_no_blank_answer():
  prompt = [{'role': 'user', 'content': 'Hi'}]

  def rows(*texts):
    return [{'id': 'x', 'prompt': prompt, 'initial': {'text': text}} for text in texts]

  read = []

  def longest(conversations):
    read.extend(c[-1]['content'] for c in conversations)
    return [len(c[-1]['content']) for c in conversations]

  candidates = [rows('a', 'bbb', 'cc'), rows('aa', 'bb'), rows(' ', ''), rows('', 'a')]
  best, comparisons = BASELINES['best_of_reward'].choose(
    longest, candidates, {}, np.random.default_rng(0)
  )
  assert best == [1, 0, 0, 1] and comparisons == []
  assert all(text.strip() for text in read)


def test_settings_of_later_versions_make_no_trained_policy_another():
  """While they have their defaults: a manifest may be older than they are."""
  defaults = {'beta': 0.1, 'base_weights': 'full', 'lora_init': ''}
  recorded = {'name': 'policy', 'settings': {'beta': 0.2}}
  ours = {'name': 'policy', 'settings': {**defaults, 'beta': 0.2}}
  assert stage_prefer.is_same(recorded, ours, defaults)
  assert stage_prefer.is_same(ours, recorded, defaults)
  for name, value in (('beta', 0.1), ('base_weights', 'nf4'), ('lora_init', 'adapter')):
    other = {**ours, 'settings': {**ours['settings'], name: value}}
    assert not stage_prefer.is_same(recorded, other, defaults), name
  assert not stage_prefer.is_same({**recorded, 'name': 'other'}, ours, defaults)
  assert not stage_prefer.is_same(None, ours, defaults)
