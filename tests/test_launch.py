"""The main job, end to end, on a random model; and what it refuses."""

import functools
import json
import os
import pathlib
import random
import shutil
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
import safetensors.numpy
import tensorflow_datasets as tfds

import cai_jax
from cai_jax import pipeline
from cai_jax.data import d_cai
from cai_jax.tiny.files import MODELS
from configs import default, qwen2_5_0_5b, tiny

ROOT = pathlib.Path(__file__).resolve().parents[1]
LIMITS = {'harmful': 10, 'helpful': 6, 'eval_harmful': 5, 'eval_helpful': 3}


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  """A random model with the embedded world's tokenizer."""
  import jax
  from transformers import PreTrainedTokenizerFast

  from cai_jax.model.config import ModelConfig
  from cai_jax.model.lm import LM
  from cai_jax.model.transformer import init_params
  from cai_jax.runtime.mesh import make_mesh

  words = PreTrainedTokenizerFast.from_pretrained(MODELS['tiny'])
  config = ModelConfig('llama', len(words), 32, 64, 2, 4, 2, 8, 512, tied_embeddings=True)
  params = init_params(config, jax.random.key(0))
  lm = LM(config, params, words, make_mesh(), 'float32', '', '', (words.eos_token_id,))
  path = tmp_path_factory.mktemp('random')
  cai_jax.save(lm, path)
  return path


def small(folder):
  config = tiny.get_config()
  config.model.base = str(folder)
  for name, limit in LIMITS.items():
    config.prompts[name].limit = limit
  config.feedback.rounds = 2
  config.feedback.shard_rows = 4
  config.sampling.initial.max_tokens = config.sampling.revision.max_tokens = 12
  config.sampling.critique.max_tokens = 9
  config.engine.slots = 8
  config.train.batch_size = 8
  config.train.epochs = 1
  config.train.helpfulness_share = 0.2
  config.train.drop_truncated = False
  config.train.checkpoint_every = 1
  return config


@pytest.fixture(scope='module')
def finished(folder, tmp_path_factory):
  """A finished run: its folder and the seconds that it took."""
  workdir = tmp_path_factory.mktemp('run')
  begin = time.monotonic()
  pipeline.run_stages(pipeline.build(small(folder), workdir), list(pipeline.STAGES))
  return workdir, time.monotonic() - begin


@pytest.fixture
def done(finished, folder):
  """A finished run: its folder, and its config to change."""
  return finished[0], small(folder)


def test_everything_is_there_at_the_end(finished):
  workdir, seconds = finished
  rows = tfds.builder_from_directory(workdir / 'd_cai').as_data_source('train')
  assert len(rows) == LIMITS['harmful'] + LIMITS['helpful']
  lines = (workdir / 'preferences.jsonl').read_text().splitlines()
  assert all(set(json.loads(line)) == {'id', 'prompt', 'chosen', 'rejected'} for line in lines)

  summary = json.loads((workdir / 'evaluation' / 'summary.json').read_text())
  assert list(summary['stages']) == ['initial', 'revision_1', 'revision_2']
  for group, count in (('models', 5), ('benign', 3)):
    assert list(summary[group]) == ['base', 'aligned']
    for row in summary[group].values():
      assert row['count'] == count and row['mean_tokens'] > 0
      assert 0 <= row['violation_rate'] <= 1 and 0 <= row['helpful_rate'] <= 1
  assert summary['stages']['initial'] == summary['models']['base']

  manifest = json.loads((workdir / 'manifest.json').read_text())
  assert list(manifest['stages']) == list(pipeline.STAGES)
  assert manifest['stages']['generate']['turns'] == 10 * 5 + 6
  assert manifest['stages']['train']['rows_kept'] <= 16
  assert 0 < sum(stage['seconds'] for stage in manifest['stages'].values()) <= seconds
  assert json.loads((workdir / 'config.json').read_text())['train']['epochs'] == 1
  steps = [json.loads(line)['step'] for line in (workdir / 'metrics.jsonl').open()]
  assert steps == list(range(1, manifest['stages']['train']['steps'] + 1))
  assert '<html' in (workdir / 'report.html').read_text()


def test_the_aligned_model_is_another_model_of_the_same_kind(done, folder):
  workdir, _ = done
  base, aligned = cai_jax.load(folder), cai_jax.load(workdir / 'model')
  assert base.config == aligned.config
  tokens = np.arange(5, 21)[None]
  assert np.abs(base.logits(tokens) - aligned.logits(tokens)).max() > 1e-4
  assert base.tokenizer.chat_template == aligned.tokenizer.chat_template


def test_a_stage_that_is_done_is_not_done_again(done):
  workdir, config = done
  before = {p: p.stat().st_mtime_ns for p in workdir.glob('**/*.array_record*')}
  said = []
  pipeline.run_stages(pipeline.build(config, workdir), list(pipeline.STAGES), said.append)
  assert said == [f'{name}: done before' for name in pipeline.STAGES]
  assert before == {p: p.stat().st_mtime_ns for p in workdir.glob('**/*.array_record*')}


def test_another_run_in_the_same_folder_is_refused(done):
  workdir, config = done
  config.sampling.critique.temperature = 0.5
  with pytest.raises(ValueError, match='sampling.critique.temperature: 1.0 → 0.5'):
    pipeline.run_stages(pipeline.build(config, workdir), ['generate'])


def test_a_stage_whose_forerunner_is_missing_or_another_is_refused(done, folder, tmp_path):
  workdir, config = done
  config.feedback.rounds = 1
  with pytest.raises(ValueError, match='feedback.rounds: 2 → 1'):
    pipeline.run_stages(pipeline.build(config, workdir), ['train'])
  with pytest.raises(ValueError, match='stage generate is not done'):
    pipeline.run_stages(pipeline.build(small(folder), tmp_path), ['evaluate'])


def test_settings_of_a_stage_that_was_refused_bind_nobody(done, tmp_path):
  workdir, config = done
  shutil.copytree(workdir / 'journal', tmp_path / 'journal')
  config.train.drop_truncated = True  # every reply of the random model is cut
  with pytest.raises(ValueError, match='truncated.*max_tokens'):
    pipeline.run_stages(pipeline.build(config, tmp_path), ['generate', 'train'])
  config.train.drop_truncated = False
  pipeline.run_stages(pipeline.build(config, tmp_path), ['generate', 'train'])


def test_too_many_defects_end_the_run_and_a_raised_limit_goes_on_with_its_rows(
  folder, tmp_path, capsys
):
  config = small(folder)
  config.feedback.helpful_samples = 2
  config.feedback.max_rate.truncated = 0.5  # nearly every reply of the random model is cut
  with pytest.raises(ValueError, match=r'max_rate is exceeded \(truncated: .* limit 0.5\).*kept'):
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


def test_the_papers_samples_stand_beside(folder, tmp_path, data_dir, capsys):
  config = small(folder)
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


def refused(match, folder, workdir, change, stages=('generate',)):
  config = small(folder)
  change(config)
  with pytest.raises(ValueError, match=match):
    pipeline.run_stages(pipeline.build(config, workdir), list(stages))
  assert not (workdir / 'd_cai').exists() and not (workdir / 'journal').exists()


def set_fields(**fields):
  def change(config):
    with config.unlocked():
      config.update_from_flattened_dict({k.replace('__', '.'): v for k, v in fields.items()})

  return change


@pytest.mark.parametrize(
  'fields, match',
  [
    ({'train__speed': 3}, 'unknown config field train.speed'),
    ({'train__learning_rate': -1.0}, 'learning_rate'),
    ({'train__filters': ('odd',)}, "train.filters=.'odd',. must be a tuple of names"),
    ({'feedback__max_rate__odd': 0.5}, 'unknown config field feedback.max_rate.odd'),
    ({'feedback__max_rate__empty': 1.5}, 'max_rate.empty=1.5'),
    ({'feedback__helpful_samples': 0}, 'helpful_samples=0'),
    (
      {'feedback__helpful_samples': 2, 'sampling__initial__temperature': 0.0},
      'helpful_samples=2 answers would all be the same',
    ),
    ({'report__published': 'nowhere.jsonl'}, 'report.published: nowhere.jsonl cannot be read'),
    ({'evaluation__scorer': 'me'}, "scorer='me'"),
    ({'prompts__harmful__source': ''}, 'prompts.harmful.source is empty'),
    (
      {'prompts__harmful__source': 'nowhere.jsonl', 'prompts__harmful__name': ''},
      'nowhere.jsonl: there is no such file',
    ),
    ({'constitution__path': 'nowhere.yaml'}, 'nowhere.yaml: there is no such constitution'),
    ({'model__base': '/nowhere/at/all'}, '/nowhere/at/all'),
    ({'model__init': '/nowhere/at/all'}, '/nowhere/at/all'),
    ({'train__batch_size': 12}, 'train.batch_size'),
    ({'engine__slots': 12}, 'engine.slots'),
    ({'mesh__tensor': 3}, 'does not fit 8 devices'),
    ({'train__max_length': 4096}, 'max_length=4096'),
    ({'feedback__rounds': 30, 'feedback__context': 'growing'}, 'can reach'),
    ({'prompts__eval_harmful__split': 'train'}, 'occur in the training prompts'),
    ({'prompts__helpful__source': ''}, 'helpfulness_share'),
    ({'train__helpfulness_share': 0.9}, 'needs 90 helpful prompts'),
    ({'train__max_length': 5}, 'holds no prompt with its reply'),
    ({'train__learning_rate': float('nan')}, 'learning_rate=nan'),
    ({'seed': -1}, 'seed=-1'),
    ({'sampling__revision__stop_token_ids': tuple(range(20, 36))}, 'At most 16'),
    ({'sampling__revision__stop_token_ids': (99999,)}, 'each between 0 and 1023'),
    ({'prompts__harmful__shuffle': True}, 'tiny: this source has no use for shuffle'),
    ({'prompts__harmful__split': 'other'}, 'other'),
    ({'constitution__tags': ('no such tag',)}, 'no such tag'),
    ({'feedback__rounds': 0}, 'rounds=0'),
    ({'train__attention': 'splash'}, "train.attention: attention 'splash' runs on TPUs only"),
    ({'train__remat': 'some'}, "train.remat='some' is not one of"),
    ({'train__lora_rank': 2, 'train__lora_modules': 'mpl'}, "'mpl' matches none"),
    ({'train__eval_every': 5}, 'set train.eval_share'),
    ({'train__patience': 2, 'train__eval_share': 0.1}, 'set train.eval_every'),
    ({'train__schedule': 'wsd', 'train__warmup': 0.5, 'train__decay': 0.6}, 'over 1 together'),
  ],
)
def test_bad_input_is_refused_before_any_work(fields, match, folder, tmp_path):
  stages = ['generate', 'train', 'evaluate']
  refused(match, folder, tmp_path, set_fields(**fields), stages)


@pytest.mark.parametrize(
  'flag, said',
  [
    ('--config.train.speed=3', 'unknown config field'),
    ('--config.feedback.variant=odd', "variant='odd'"),
    ('--config.train.learning_rate=fast', 'could not convert'),
  ],
)
def test_the_command_line_refuses_in_one_line(flag, said, tmp_path):
  root = ROOT
  command = [sys.executable, 'launch.py', '--config=configs/tiny.py', f'--workdir={tmp_path}/run']
  done = subprocess.run([*command, flag], cwd=root, capture_output=True, text=True)
  assert done.returncode != 0 and said in done.stderr and 'Traceback' not in done.stderr
  assert not (tmp_path / 'run').exists()


def served(stage, **fields):
  """Fields of a model that nobody serves: no server has port 9."""
  url, words = 'http://127.0.0.1:9/v1', str(MODELS['tiny'])
  fields = {'url': url, 'model': 'm', 'tokenizer': words} | fields
  return {f'remote__{stage}__{name}': value for name, value in fields.items()}


@pytest.mark.parametrize(
  'fields, match',
  [
    (served('critique'), "remote.critique: remote 'm' at http://127.0.0.1:9/v1 cannot be reached"),
    (served('revision', retries=-1), 'remote.revision: retries=-1'),
    (served('critique', tokenizer='/nowhere/at/all'), 'remote.critique: .*/nowhere/at/all'),
    (served('critique') | {'model__critique': 'tiny'}, "model.critique='tiny' and remote.critique"),
    (served('base'), "model.base='.*' and remote.base.url="),
    (served('base') | {'model__base': ''}, 'model.init is empty'),
    ({'model__base': ''}, 'model.base is empty'),
    (served('critique') | {'sampling__critique__top_k': 5}, 'remote.critique: top_k=5'),
    (
      served('base', server='tgi', prompt='text')
      | {'model__base': '', 'sampling__revision__stop_token_ids': (7,)},
      'remote.base: stop_token_ids',
    ),
  ],
)
def test_a_served_model_that_cannot_be_used_is_refused_before_any_work(
  fields, match, folder, tmp_path
):
  refused(match, folder, tmp_path, set_fields(**fields), ['generate', 'train'])


def test_where_a_model_is_served_is_no_setting_of_a_stage(folder, tmp_path):
  def settings(**fields):
    config = small(folder)
    set_fields(**served('critique', **fields))(config)
    return pipeline.build(config, tmp_path).settings('generate')

  assert settings() == settings(url='http://elsewhere/v1', timeout_seconds=5.0, retries=0)
  assert settings() != settings(model='n')
  assert settings() != settings(revision='2')
  assert 'remote' not in pipeline.build(small(folder), tmp_path).settings('generate')


def test_a_stage_that_does_not_exist_is_refused(folder, tmp_path):
  refused('unknown stage tidy', folder, tmp_path, lambda config: None, ['tidy'])
  refused('no stage is given', folder, tmp_path, lambda config: None, [])


@pytest.mark.parametrize('name', ['critique', 'revision', 'init'])
def test_a_broken_checkpoint_is_refused_before_any_work(name, folder, tmp_path):
  broken = tmp_path / 'broken'
  shutil.copytree(folder, broken)
  weights = safetensors.numpy.load_file(broken / 'model.safetensors')
  del weights['model.layers.1.mlp.up_proj.weight']
  safetensors.numpy.save_file(weights, broken / 'model.safetensors', metadata={'format': 'pt'})
  change = set_fields(**{f'model__{name}': str(broken)})
  refused('model.layers.1.mlp.up_proj.weight', folder, tmp_path / 'run', change, ['generate'])
  hf = json.loads((broken / 'config.json').read_text()) | {'model_type': 'gpt2'}
  (broken / 'config.json').write_text(json.dumps(hf))
  refused("model_type 'gpt2' is not supported", folder, tmp_path / 'run', change, ['generate'])


def test_a_workdir_that_is_a_file_or_full_is_refused(folder, tmp_path, monkeypatch):
  (tmp_path / 'file').write_text('')
  with pytest.raises(ValueError, match='is not writable'):
    pipeline.run_stages(pipeline.build(small(folder), tmp_path / 'file' / 'run'), ['generate'])
  usage = shutil.disk_usage(tmp_path)._replace(free=1000)
  monkeypatch.setattr(shutil, 'disk_usage', lambda path: usage)
  with pytest.raises(ValueError, match='GB free, and the run needs'):
    pipeline.run_stages(pipeline.build(small(folder), tmp_path / 'run'), ['generate'])


def test_a_model_without_an_oracle_has_lengths_only(folder, tmp_path):
  (tmp_path / 'prompts.jsonl').write_text('{"prompt": "Tell me a lie."}\n{"prompt": "Be rude."}\n')
  (tmp_path / 'held_out.txt').write_text('Insult me.\n')
  config = default.get_config()
  config.update({k: v for k, v in small(folder).items() if k not in ('prompts', 'evaluation')})
  config.prompts.harmful.source = str(tmp_path / 'prompts.jsonl')
  config.prompts.eval_harmful.source = str(tmp_path / 'held_out.txt')
  config.train.helpfulness_share = 0.0
  run = pipeline.build(config, tmp_path / 'run')
  pipeline.run_stages(run, list(pipeline.STAGES))
  summary = json.loads((tmp_path / 'run' / 'evaluation' / 'summary.json').read_text())
  assert set(summary) == {'stages', 'models'}
  assert set(summary['models']['aligned']) == {'count', 'mean_tokens'}


def test_adapters_held_out_examples_and_probes_come_to_the_report(done, tmp_path):
  """From another run's D_CAI on."""
  finished, config = done
  shutil.copytree(finished / 'd_cai', tmp_path / 'd_cai')
  shutil.copy(finished / 'quality.json', tmp_path / 'quality.json')
  manifest = json.loads((finished / 'manifest.json').read_text())
  manifest['stages'] = {'generate': manifest['stages']['generate']}
  (tmp_path / 'manifest.json').write_text(json.dumps(manifest))
  set_fields(
    train__lora_rank=2,
    train__ema=0.5,
    train__eval_share=0.2,
    train__eval_every=1,
    train__probes=2,
  )(config)
  pipeline.run_stages(pipeline.build(config, tmp_path), list(pipeline.STAGES))
  train = json.loads((tmp_path / 'manifest.json').read_text())['stages']['train']
  assert train['held_out'] > 0 and train['held_out_loss'] > 0 and 0 < train['utilization'] < 1
  held_out = [json.loads(line) for line in (tmp_path / 'held_out.jsonl').open()]
  assert [row['step'] for row in held_out] == [*range(1, train['steps'] + 1)]
  probes = [json.loads(line) for line in (tmp_path / 'probes.jsonl').open()]
  assert len(probes) == 2 * train['steps'] and all(row['prompt'] for row in probes)
  page = (tmp_path / 'report.html').read_text()
  assert 'Answers to probe prompts' in page and '>held out<' in page
  assert cai_jax.load(tmp_path / 'model').config == cai_jax.load(finished / 'model').config


def command(folder, workdir):
  fields = {
    'model.base': folder,
    'feedback.shard_rows': 3,
    'sampling.initial.max_tokens': 24,
    'sampling.revision.max_tokens': 24,
    'sampling.critique.max_tokens': 24,
    'engine.slots': 8,
    'train.drop_truncated': False,
    'train.batch_size': 8,
    'train.checkpoint_every': 2,
    'train.helpfulness_share': 0.2,
    'train.epochs': 2,
    'prompts.harmful.limit': 60,
    'prompts.helpful.limit': 16,
  }
  flags = [f'--config.{name}={value}' for name, value in fields.items()]
  return [
    sys.executable, 'launch.py', '--config=configs/tiny.py', f'--workdir={workdir}',
    '--stages=generate,train', *flags,
  ]  # fmt: skip


def results(workdir):
  """Bytes of all that a run makes for good: D_CAI's shards and the aligned model's weights."""
  paths = [*workdir.glob('d_cai/*.array_record-*'), *workdir.glob('model/*.safetensors')]
  return {path.name: path.read_bytes() for path in paths}


def test_the_config_of_a_real_checkpoint_runs_on_any_folder(tiny_hf_folder, tmp_path):
  for name in ('harmful', 'held_out'):
    lines = [json.dumps({'prompt': f'{name} request {i}'}) for i in range(8)]
    (tmp_path / f'{name}.jsonl').write_text('\n'.join(lines))
  config = qwen2_5_0_5b.get_config()
  config.model.base = str(tiny_hf_folder('qwen2'))
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
  pipeline.run_stages(run, list(pipeline.STAGES))
  aligned = cai_jax.load(tmp_path / 'run' / 'model')
  assert aligned.config == cai_jax.load(tiny_hf_folder('qwen2')).config
  assert np.isfinite(aligned.logits(np.arange(8)[None])).all()


def progress(workdir):
  """Shards of D_CAI and logged training steps that are there."""
  metrics = workdir / 'metrics.jsonl'
  steps = len(metrics.read_bytes().splitlines()) if metrics.exists() else 0
  return len(list(workdir.glob('d_cai/*.array_record-*'))) + steps


def test_a_run_that_is_killed_five_times_ends_with_the_same_bytes(folder, tmp_path):
  """SIGKILL at five random moments, among 26 shards and 6 steps that are checkpointed by twos."""
  start = functools.partial(subprocess.Popen, cwd=ROOT, env=os.environ | {'XLA_FLAGS': ''})
  assert start(command(folder, tmp_path / 'whole')).wait() == 0
  for moment in sorted(random.Random(0).sample(range(1, 31), 5)):
    process = start(command(folder, tmp_path / 'killed'))
    while progress(tmp_path / 'killed') < moment:
      assert process.poll() is None
      time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
  assert start(command(folder, tmp_path / 'killed')).wait() == 0
  assert results(tmp_path / 'killed') == results(tmp_path / 'whole')
  assert len(results(tmp_path / 'whole')) == 26 + 1


def start_one(arguments, devices, **environment):
  """A process with that many CPU devices."""
  flags = f'--xla_force_host_platform_device_count={devices}'
  environment = os.environ | {'XLA_FLAGS': flags, 'JAX_PLATFORMS': 'cpu'} | environment
  return subprocess.Popen(arguments, cwd=ROOT, env=environment)


def start_two(arguments, devices):
  """Two processes with that many CPU devices each, which know of each other."""
  with socket.socket() as free:
    free.bind(('localhost', 0))
    address = f'localhost:{free.getsockname()[1]}'
  names = {'COORDINATOR_ADDRESS': address, 'NUM_PROCESSES': '2'}
  return [start_one(arguments, devices, PROCESS_ID=str(i), **names) for i in range(2)]


@pytest.mark.slow
@pytest.mark.parametrize('lost', [0, 1])
def test_what_a_lost_process_left_is_done_by_the_next_start(folder, tmp_path, lost):
  """One of two is killed among 26 shards; then one process alone does what both left undone."""
  arguments = lambda name: [*command(folder, tmp_path / name), '--stages=generate']  # noqa: E731
  assert start_one(arguments('whole'), 1).wait() == 0
  pair = start_two(arguments('cut'), 1)
  while progress(tmp_path / 'cut') < 6:
    assert [process.poll() for process in pair] == [None, None]
    time.sleep(0.005)
  for process in (pair[lost], pair[1 - lost]):  # the other cannot go on without it
    process.kill()
    process.wait()
  there = [name for name in results(tmp_path / 'cut') if not name.endswith('.tmp')]
  assert start_one(arguments('cut'), 1).wait() == 0
  assert results(tmp_path / 'cut') == results(tmp_path / 'whole')
  assert len(results(tmp_path / 'cut')) == 26
  counts = json.loads((tmp_path / 'cut' / 'manifest.json').read_text())['stages']['generate']
  missing = 3 * (26 - len(there)) - 2 * all('00025' not in name for name in there)  # of one row
  assert 0 < counts['sampled_rows'] == missing < 76
  assert len(list((tmp_path / 'cut' / 'journal').iterdir())) == 2


@pytest.mark.slow
def test_two_processes_do_the_work_of_one(folder, tmp_path):
  """Two processes of two devices, each with its share of the prompts, against one of four."""
  arguments = lambda name: [*command(folder, tmp_path / name), '--config.mesh.fsdp=2']  # noqa: E731
  assert start_one(arguments('one'), 4).wait() == 0
  pair = start_two(arguments('two'), 2)
  assert [process.wait() for process in pair] == [0, 0]
  assert len(list((tmp_path / 'two' / 'journal').iterdir())) == 2
  one, two = (d_cai.read_rows(tmp_path / name / 'd_cai') for name in ('one', 'two'))
  texts = lambda row: [row['initial']['text'], *(r['revision']['text'] for r in row['rounds'])]  # noqa: E731
  assert [(row['id'], texts(row)) for row in one] == [(row['id'], texts(row)) for row in two]
  weights = [
    safetensors.numpy.load_file(tmp_path / n / 'model' / 'model.safetensors')
    for n in ('one', 'two')
  ]
  for name, value in weights[0].items():
    np.testing.assert_allclose(value, weights[1][name], atol=1e-4)


FAILS_IN_ONE = """
import pathlib, sys
import jax
from cai_jax.runtime import processes

processes.initialize()

def work():
  if jax.process_index() == 1:
    raise ValueError('no more room')

try:
  processes.run_on_all_processes('write', work)
except ValueError as error:
  (pathlib.Path(sys.argv[1]) / str(jax.process_index())).write_text(str(error))
"""


@pytest.mark.slow
def test_where_one_process_fails_all_end_with_an_error(tmp_path):
  pair = start_two([sys.executable, '-c', FAILS_IN_ONE, str(tmp_path)], 1)
  assert [process.wait() for process in pair] == [0, 0]
  assert (
    tmp_path / '0'
  ).read_text() == 'process 1 could not write; see the output of that process.'
  assert (tmp_path / '1').read_text() == 'no more room'
