"""Journals: those of this sampler replay, and those of an earlier one are refused.

`tests/data/journal_gumbel_1` is the journal and the job digest of this command:

  python launch.py --config=configs/tiny.py --workdir=W --stages=generate \\
    --config.prompts.harmful.limit=3 --config.prompts.helpful.limit=2 --config.feedback.rounds=2 \\
    --config.prompts.eval_harmful.source='' --config.prompts.eval_helpful.source='' \\
    --config.engine.slots=4

`tests/data/journal_0_1` is that of the same command at version 0.1.0, whose sampler searched one
uniform number in the running sum of the probabilities.
"""

import json
import pathlib
import shutil

import pytest

import cai_jax
from cai_jax import pipeline
from cai_jax.data import d_cai
from cai_jax.runtime.errors import UserError
from cai_jax.sampling.engine import Engine
from cai_jax.sampling.journal import Journal
from cai_jax.tiny.files import MODELS
from configs import tiny

DATA = pathlib.Path(__file__).with_name('data')
STORED, OLD = DATA / 'journal_gumbel_1', DATA / 'journal_0_1'


def stored_config():
  """Return the config of the command above."""
  config = tiny.get_config()
  config.prompts.harmful.limit = 3
  config.prompts.helpful.limit = 2
  config.prompts.eval_harmful.source = config.prompts.eval_helpful.source = ''
  config.feedback.rounds = 2
  config.engine.slots = 8  # sizes of the programs determine no text
  return config


@pytest.fixture(scope='module')
def workdir(tmp_path_factory):
  """Return the folder of a generate stage that found the stored journal."""
  folder = tmp_path_factory.mktemp('replayed')
  shutil.copytree(STORED, folder / 'journal', ignore=shutil.ignore_patterns('job.json'))
  pipeline.run_stages(pipeline.build(stored_config(), folder), ['generate'])
  return folder


def test_a_stored_journal_replays_with_no_turn_sampled(workdir):
  stage = json.loads((workdir / 'manifest.json').read_text())['stages']['generate']
  assert (stage['turns'], stage['replayed_turns']) == (0, 3 * 5 + 2)
  assert (workdir / 'd_cai/job.json').read_text() == (STORED / 'job.json').read_text()


def test_rows_hold_the_turns_of_the_stored_journal(workdir):
  lines = (STORED / 'turns-00000.jsonl').read_text().splitlines()
  stored_texts = {turn['text'].strip() for line in lines for turn in json.loads(line)['turns']}
  rows = d_cai.read_rows(workdir / 'd_cai')
  turns = [
    turn for row in rows for turn in [row['initial'], *(s['revision'] for s in row['rounds'])]
  ]
  assert {turn['text'] for turn in turns} <= stored_texts


def test_the_identity_of_a_job_is_that_of_version_0_1():
  assert (STORED / 'job.json').read_text() == (OLD / 'job.json').read_text()


@pytest.fixture
def old_journal(tmp_path):
  """Return a folder of a run with a journal of version 0.1.0."""
  shutil.copytree(OLD, tmp_path / 'journal', ignore=shutil.ignore_patterns('job.json'))
  return tmp_path


def test_a_run_refuses_a_journal_of_an_earlier_sampler(old_journal):
  before = (old_journal / 'journal/turns-00000.jsonl').read_bytes()
  run = pipeline.build(stored_config(), old_journal)
  with pytest.raises(UserError, match='holds turns of another sampler than gumbel-1'):
    pipeline.run_stages(run, ['generate'])
  assert (old_journal / 'journal/turns-00000.jsonl').read_bytes() == before
  assert not (old_journal / 'd_cai').exists()


def test_an_engine_refuses_a_journal_of_an_earlier_sampler(old_journal):
  lm = cai_jax.load(MODELS['tiny'])
  with pytest.raises(UserError, match='holds turns of another sampler'):
    Engine({'base': lm}, length=64, seed=0, journal=Journal(old_journal / 'journal'))


def test_a_run_whose_stages_are_done_needs_no_journal(workdir, tmp_path):
  """A run that an earlier version finished can still be trained on and reported."""
  shutil.copytree(workdir, tmp_path / 'run')
  next((tmp_path / 'run/journal').glob('sampler-*')).unlink()
  lines = []
  pipeline.run_stages(pipeline.build(stored_config(), tmp_path / 'run'), ['generate'], lines.append)
  assert lines == ['generate: done before']
