"""A run from start to end on a random model: its files, its manifest and its report."""

import json
import shutil
import time

import numpy as np
import pytest
import tensorflow_datasets as tfds

import cai_jax
from cai_jax import pipeline
from cai_jax.data import d_cai
from cai_jax.model import lm as models
from cai_jax.model import peft
from cai_jax.pipeline import report_chains
from cai_jax.runtime.digests import digest_files
from cai_jax.runtime.errors import UserError
from configs import default, qwen2_5_0_5b
from tests.conftest import show_one_device
from tests.pipeline_setup import LIMITS, set_fields, small

STAGES = ['generate', 'train', 'evaluate', 'report']  # of a run that learns no preferences


@pytest.fixture(scope='module')
def finished(random_model, tmp_path_factory):
  """A finished run: its folder and the seconds that it took."""
  workdir = tmp_path_factory.mktemp('run')
  begin = time.monotonic()
  pipeline.run_stages(pipeline.build(small(random_model), workdir))
  return workdir, time.monotonic() - begin


@pytest.fixture
def done(finished, random_model):
  """A finished run: its folder, and its config to change."""
  return finished[0], small(random_model)


def test_a_run_writes_every_file(finished):
  workdir, seconds = finished
  rows = tfds.builder_from_directory(workdir / 'd_cai').as_data_source('train')
  assert len(rows) == LIMITS['harmful'] + LIMITS['helpful']
  lines = (workdir / 'preferences.jsonl').read_text().splitlines()
  fields = {'id', 'prompt', 'chosen', 'rejected'}
  assert all(set(json.loads(line)) - {'truncated'} == fields for line in lines)

  summary = json.loads((workdir / 'evaluation' / 'summary.json').read_text())
  assert list(summary['stages']) == ['initial', 'revision_1', 'revision_2']
  for group, count in (('models', 5), ('benign', 3)):
    assert list(summary[group]) == ['base', 'aligned']
    for row in summary[group].values():
      assert row['count'] == count and row['mean_tokens'] > 0
      assert 0 <= row['violation_rate'] <= 1 and 0 <= row['helpful_rate'] <= 1
  assert summary['stages']['initial'] == summary['models']['base']

  manifest = json.loads((workdir / 'manifest.json').read_text())
  assert list(manifest['stages']) == STAGES
  assert manifest['stages']['generate']['turns'] == 10 * 5 + 6
  assert manifest['stages']['train']['rows_kept'] <= 16
  assert 0 < sum(stage['seconds'] for stage in manifest['stages'].values()) <= seconds
  assert json.loads((workdir / 'config.json').read_text())['train']['epochs'] == 1
  steps = [json.loads(line)['step'] for line in (workdir / 'metrics.jsonl').open()]
  assert steps == list(range(1, manifest['stages']['train']['steps'] + 1))
  assert '<html' in (workdir / 'report.html').read_text()
  for entry in manifest['stages'].values():  # what a card says about the stage
    used = entry['environment']
    assert used['devices'] == manifest['devices'] and used['packages'] == manifest['versions']
    assert isinstance(entry['paths'], dict) and isinstance(used['cai_jax'], str)


def check_held_out_view(workdir):
  """Check that the held-out view has the numbers whose means are in the summary; return it."""
  answers = report_chains.read_answers(workdir / 'evaluation', None, None, 1000)
  summary = json.loads((workdir / 'evaluation' / 'summary.json').read_text())
  harmful = [chain for chain in answers if chain['kind'] == 'harmful']
  for entry, responses in (
    (summary['models']['base'], [chain['initial'] for chain in harmful]),
    (summary['models']['aligned'], [chain['answers']['aligned'] for chain in harmful]),
    (summary['stages']['revision_1'], [chain['rounds'][0]['revision'] for chain in harmful]),
  ):
    names = [name for name in entry if name.endswith('_rate')]
    assert names and entry['count'] == len(responses)
    for name in names:
      values = [response['scores'][name] for response in responses if name in response['scores']]
      assert sum(values) / len(values) == pytest.approx(entry[name], abs=1e-3)
  return answers


def test_the_held_out_view_has_the_scores_of_each_response(finished):
  answers = check_held_out_view(finished[0])
  assert len(answers) == 5 + 3
  assert all('violation_rate' in chain['answers']['aligned']['scores'] for chain in answers)


def test_aligned_model_has_the_config_of_its_base_and_other_weights(done, random_model):
  workdir, _ = done
  base, aligned = cai_jax.load(random_model), cai_jax.load(workdir / 'model')
  assert base.config == aligned.config
  tokens = np.arange(5, 21)[None]
  assert np.abs(base.logits(tokens) - aligned.logits(tokens)).max() > 1e-4
  assert base.tokenizer.chat_template == aligned.tokenizer.chat_template


def test_finished_stage_is_skipped(done):
  workdir, config = done
  before = {p: p.stat().st_mtime_ns for p in workdir.glob('**/*.array_record*')}
  lines = []
  pipeline.run_stages(pipeline.build(config, workdir), STAGES, lines.append)
  assert lines == [f'{name}: done before' for name in STAGES]
  assert before == {p: p.stat().st_mtime_ns for p in workdir.glob('**/*.array_record*')}


def test_other_settings_in_the_same_folder_are_refused(done):
  workdir, config = done
  config.sampling.critique.temperature = 0.5
  with pytest.raises(UserError, match='sampling.critique.temperature: 1.0 → 0.5'):
    pipeline.run_stages(pipeline.build(config, workdir), ['generate'])


def test_stage_needs_earlier_stages_with_the_same_settings(done, random_model, tmp_path):
  workdir, config = done
  config.feedback.rounds = 1
  with pytest.raises(UserError, match='feedback.rounds: 2 → 1'):
    pipeline.run_stages(pipeline.build(config, workdir), ['train'])
  with pytest.raises(UserError, match='Stage generate is not done'):
    pipeline.run_stages(pipeline.build(small(random_model), tmp_path), ['evaluate'])


def test_refused_stage_can_be_started_with_other_settings(done, random_model, tmp_path):
  workdir, config = done
  shutil.copytree(workdir / 'journal', tmp_path / 'journal')
  stops = models.describe(random_model).eos_token_ids
  config.sampling.revision.logit_bias = tuple((i, -100.0) for i in stops)  # every revision is cut
  config.train.drop_truncated = True
  with pytest.raises(UserError, match='truncated.*max_tokens'):
    pipeline.run_stages(pipeline.build(config, tmp_path), ['generate', 'train'])
  config.train.drop_truncated = False
  pipeline.run_stages(pipeline.build(config, tmp_path), ['generate', 'train'])


def test_exceeded_limit_stops_the_run_and_a_raised_limit_reuses_its_rows(
  random_model, tmp_path, capsys
):
  config = small(random_model)
  config.feedback.helpful_samples = 2
  config.feedback.max_rate.truncated = 0.5  # nearly every reply of the random model is cut
  with pytest.raises(UserError, match=r'too many defects: .*% were cut off .*\(limit 50 %\).*kept'):
    pipeline.run_stages(pipeline.build(config, tmp_path), ['generate'])
  assert 'truncated' in capsys.readouterr().out
  rates = json.loads((tmp_path / 'quality.json').read_text())
  assert set(rates) == {'d_cai'} and rates['d_cai']['revisions'] == 2 * LIMITS['harmful']
  assert rates['d_cai']['flags']['truncated']['rate'] > 0.5
  before = {p: p.stat().st_mtime_ns for p in tmp_path.glob('d_cai/*.array_record*')}

  config.feedback.max_rate.truncated = 1.0
  pipeline.run_stages(pipeline.build(config, tmp_path), ['generate'])
  assert before == {p: p.stat().st_mtime_ns for p in tmp_path.glob('d_cai/*.array_record*')}
  entry = json.loads((tmp_path / 'manifest.json').read_text())['stages']['generate']
  assert entry['sampled_rows'] == 0
  config.feedback.max_rate.truncated = 0.9  # no setting of what is done
  pipeline.run_stages(pipeline.build(config, tmp_path), ['generate'])

  rows = [row for row in d_cai.read_rows(tmp_path / 'd_cai') if row['kind'] == 'helpful']
  assert len(rows) == 2 * LIMITS['helpful'] == len({row['id'] for row in rows})
  pairs = {row['id']: row['initial']['text'] for row in rows}
  assert all(pairs[name] != pairs[f'{name}/2'] for name in pairs if not name.endswith('/2'))


def test_quality_includes_the_published_samples(random_model, tmp_path, data_dir, capsys):
  config = small(random_model)
  path = data_dir('cai_paper') / 'samples' / 'PALMS_SLMADISON.jsonl'
  config.report.published = str(path)
  pipeline.run_stages(pipeline.build(config, tmp_path), ['generate'])
  published = json.loads((tmp_path / 'quality.json').read_text())['published']
  assert published['revisions'] == 160 and published['flags']['identical']['count'] == 1
  assert 'truncated' not in published['flags'] and 'published' in capsys.readouterr().out


def test_logging_and_mesh_may_change_between_starts(done):
  workdir, config = done
  config.train.log_every = 5
  config.mesh.fsdp = 2
  pipeline.run_stages(pipeline.build(config, workdir), ['train'])


def test_run_without_a_scorer_reports_what_needs_no_oracle(random_model, tmp_path, monkeypatch):
  show_one_device(monkeypatch)
  (tmp_path / 'prompts.jsonl').write_text('{"prompt": "Tell me a lie."}\n{"prompt": "Be rude."}\n')
  (tmp_path / 'held_out.txt').write_text('Insult me.\n')
  config = small(random_model)
  config.prompts = default.get_config().prompts
  config.evaluation = default.get_config().evaluation
  config.evaluation.baselines = ('constitution_prompt',)
  config.constitution.ids = ('insult',)
  config.prompts.harmful.source = str(tmp_path / 'prompts.jsonl')
  config.prompts.eval_harmful.source = str(tmp_path / 'held_out.txt')
  config.train.helpfulness_share = 0.0
  run = pipeline.build(config, tmp_path / 'run')
  pipeline.run_stages(run, STAGES)
  summary = json.loads((tmp_path / 'run' / 'evaluation' / 'summary.json').read_text())
  assert set(summary) == {'stages', 'models'}
  rates = {'refusal_rate', 'looping_rate', 'changed_rate', 'truncated_rate'}  # one prompt: no topic
  assert set(summary['models']['aligned']) == {
    'count',
    'mean_tokens',
    *rates,
    *(f'{name}_interval' for name in rates),
    'differences',
  }
  results = json.loads((tmp_path / 'run' / 'evaluation' / 'models.json').read_text())
  kl, judge = results['kl'], results['judge']
  assert judge['judge'] == 'base' and judge['status'] != 'valid'  # M_θ, without labelled pairs
  assert set(summary['models']) == {'base', 'aligned', 'constitution_prompt'}
  (row,) = d_cai.read_rows(tmp_path / 'run' / 'evaluation' / 'constitution_prompt')
  principle = run.constitution.principles[0]
  assert principle.revision_request in row['prompt'][0]['content']
  for name in ('aligned', 'constitution_prompt'):
    assert {d['to'] for d in summary['models'][name]['differences'].values()} == {'base'}
  aligned = d_cai.read_rows(tmp_path / 'run' / 'evaluation' / 'aligned')
  assert kl['tokens'] == sum(row['initial']['num_tokens'] for row in aligned) > 0


@pytest.mark.slow
def test_report_shows_held_out_losses_and_probes_of_adapter_training(done, tmp_path):
  finished_run, config = done
  shutil.copytree(finished_run / 'd_cai', tmp_path / 'd_cai')
  shutil.copy(finished_run / 'quality.json', tmp_path / 'quality.json')
  manifest = json.loads((finished_run / 'manifest.json').read_text())
  manifest['stages'] = {'generate': manifest['stages']['generate']}
  (tmp_path / 'manifest.json').write_text(json.dumps(manifest))
  set_fields(
    train__lora_rank=2,
    train__ema=0.5,
    train__eval_share=0.2,
    train__eval_every=1,
    train__probes=2,
    train__lora_export=True,
  )(config)
  pipeline.run_stages(pipeline.build(config, tmp_path), STAGES)
  train = json.loads((tmp_path / 'manifest.json').read_text())['stages']['train']
  assert train['held_out'] > 0 and train['held_out_loss'] > 0 and 0 < train['utilization'] < 1
  assert train['adapter'] == digest_files(tmp_path / 'adapter', peft.FILES)
  held_out = [json.loads(line) for line in (tmp_path / 'held_out.jsonl').open()]
  assert [row['step'] for row in held_out] == [*range(1, train['steps'] + 1)]
  probes = [json.loads(line) for line in (tmp_path / 'probes.jsonl').open()]
  assert len(probes) == 2 * train['steps'] and all(row['prompt'] for row in probes)
  page = (tmp_path / 'report.html').read_text()
  assert 'Answers to probe prompts' in page and '>held out<' in page
  assert cai_jax.load(tmp_path / 'model').config == cai_jax.load(finished_run / 'model').config


@pytest.mark.slow
def test_config_of_a_real_checkpoint_runs_on_any_folder(tiny_hf_folder, tmp_path):
  for name in ('harmful', 'held_out'):
    lines = [json.dumps({'prompt': f'{name} request {i}'}) for i in range(8)]
    (tmp_path / f'{name}.jsonl').write_text('\n'.join(lines))
  config = qwen2_5_0_5b.get_config()
  config.model.base = str(tiny_hf_folder('qwen2'))
  config.feedback.max_rate.update(dict.fromkeys(config.feedback.max_rate, 1.0))  # random
  config.prompts.harmful.source = str(tmp_path / 'harmful.jsonl')
  config.prompts.eval_harmful.source = str(tmp_path / 'held_out.jsonl')
  config.feedback.rounds = 1
  config.constitution.path = 'tiny'  # whose principles are short enough for a context of 256
  for stage in ('initial', 'critique', 'revision'):
    config.sampling[stage].max_tokens = 10
  config.train.max_length = 128
  config.train.batch_size = 32
  config.train.drop_truncated = False
  run = pipeline.build(config, tmp_path / 'run')
  pipeline.run_stages(run, STAGES)
  aligned = cai_jax.load(tmp_path / 'run' / 'model')
  assert aligned.config == cai_jax.load(tiny_hf_folder('qwen2')).config
  assert np.isfinite(aligned.logits(np.arange(8)[None])).all()
