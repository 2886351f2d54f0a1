"""Jobs: what they check, what their digest covers, and which prefixes their contexts share."""

import dataclasses
import hashlib
import json

import pytest

from cai_jax.constitution import Constitution
from cai_jax.data.d_cai import read_rows
from cai_jax.data.prompts import Prompt
from cai_jax.feedback import contexts, generate
from cai_jax.feedback import job as jobs
from cai_jax.feedback.config import FeedbackConfig, StageSampling
from cai_jax.runtime.errors import UserError
from cai_jax.runtime.settings import identity
from cai_jax.sampling.journal import Journal
from cai_jax.sampling.types import SamplingConfig
from tests.feedback_setup import (
  CONSTITUTION,
  ENGINE,
  PRINCIPLES,
  SAMPLING,
  make_job,
  make_lm,
  make_prompt,
)


@pytest.fixture(scope='module')
def lm(tiny_tokenizer):
  return make_lm(tiny_tokenizer)


def prepare(lm, harmful, constitution=CONSTITUTION, sampling=SAMPLING, **options):
  """Prepare a job with one model and no helpful prompts unless `options` differ."""
  options = {'models': {'base': lm}, 'helpful': [], 'config': FeedbackConfig(rounds=1)} | options
  return jobs.prepare(
    harmful=harmful, constitution=constitution, sampling=sampling, seed=0, **options
  )


def test_impossible_jobs_are_errors_before_sampling(lm):
  long = Prompt('long', ({'role': 'user', 'content': 'word ' * 600},))
  with pytest.raises(UserError, match='can reach .* tokens, but random holds 512'):
    prepare(lm, [long], config=FeedbackConfig())
  with pytest.raises(UserError, match="Two prompts have the id 'id-0'"):
    prepare(lm, [make_prompt(0)], helpful=[make_prompt(0)])
  with pytest.raises(UserError, match='There is no prompt'):
    prepare(lm, [])
  with pytest.raises(UserError, match='without repetition'):
    make_job(lm, rounds=6, repeat_principles=False)
  with pytest.raises(UserError, match='there is only one'):
    make_job(lm, num_harmful=1, variant='shuffled')


def test_digest_of_a_job_is_the_digest_of_its_parts_as_one_json_text(lm):
  job = make_job(lm)
  config = dataclasses.asdict(job.config)
  del config['max_rate'], config['topicality']  # no row depends on them
  assert config.pop('options') == ()  # added later: a default keeps the digest of older runs
  parts = [config, [], job.constitution.fingerprint(), job.seed, []]
  for name, stage in job.stages.by_name().items():
    parts[1].append([name, stage.sampling, stage.demonstrations, 'random-0'])
  parts[4] = [[p.id, p.messages, p.metadata, kind] for p, kind in job.prompts]
  text = json.dumps(parts, default=identity, sort_keys=True)
  assert job.digest() == hashlib.sha256(text.encode()).hexdigest()
  assert job.digest() == make_job(lm, max_rate={'preamble_phrase': 0.5}).digest()


def test_repeated_prompts_have_their_own_ids():
  prompts = jobs.repeat_prompts([make_prompt(0), make_prompt(1)], 3)
  assert [p.id for p in prompts] == ['id-0', 'id-0/2', 'id-0/3', 'id-1', 'id-1/2', 'id-1/3']
  assert {p.messages[0]['content'] for p in prompts[:3]} == {'Question 0?'}
  assert jobs.repeat_prompts([make_prompt(0)], 1) == [make_prompt(0)]


def test_one_checkpoint_for_critique_and_revision_is_one_model(lm):
  other = dataclasses.replace(lm, name='other', fingerprint='other')
  job = make_job(lm, models={'base': lm, 'critique': other, 'revision': other})
  assert (job.stages.initial.model, job.stages.critique.model) == ('base', 'critique')
  assert job.stages.revision.model == 'critique'


def test_cache_length_counts_replies_of_other_models(lm):
  long = SamplingConfig(max_tokens=96)
  sampling = StageSampling(long, long, long)
  critic = dataclasses.replace(lm, name='other')
  lengths = [
    prepare(lm, [make_prompt(0)], sampling=sampling, models=models).length
    for models in ({'base': lm}, {'base': lm, 'critique': critic})
  ]
  assert lengths[1] >= lengths[0] - 64


def test_demonstrations_are_computed_once_without_changing_any_text(lm, tmp_path, monkeypatch):
  shown = (
    (
      {'role': 'user', 'content': 'Is it far to the station from the old mill?'},
      {'role': 'assistant', 'content': 'It is a long way on foot.'},
      {'role': 'critique_request', 'content': 'What is wrong with this?'},
      {'role': 'critique', 'content': 'It says no number.'},
    ),
  )
  constitution = Constitution(PRINCIPLES[:2], shown)
  config = FeedbackConfig(rounds=1, shard_rows=2)
  prompts = [make_prompt(i) for i in range(4)]
  with_prefix = prepare(lm, prompts, constitution, config=config)
  monkeypatch.setattr(contexts, 'MIN_PREFIX_TOKENS', 10**6)
  without_prefix = prepare(lm, prompts, constitution, config=config)
  assert without_prefix.prefixes == {'base': []}
  (prefix,) = with_prefix.prefixes['base']
  text = lm.tokenizer.decode(prefix)
  assert text.count('It says no number.') == 1 and 'Question' not in text
  assert 0 < with_prefix.length <= without_prefix.length - len(prefix) // 64 * 64
  stats = {}
  for name, job in (('with', with_prefix), ('without', without_prefix)):
    journal = Journal(tmp_path / name / 'journal')
    stats[name] = generate.generate_shards(job, tmp_path / name / 'd_cai', journal, ENGINE)
    generate.finish_dataset(job, tmp_path / name / 'd_cai')
  assert stats['with']['shared_tokens'] == 4 * 2 * len(prefix)
  assert stats['with']['prefilled_tokens'] < stats['without']['prefilled_tokens']
  with_texts, without_texts = (
    [[r['initial']['text'], *(s['revision']['text'] for s in r['rounds'])] for r in rows]
    for rows in (read_rows(tmp_path / name / 'd_cai') for name in ('with', 'without'))
  )
  assert with_texts == without_texts


def test_prompt_without_the_shared_prefix_fits_the_cache(lm, tmp_path):
  shown = tuple(
    (
      {'role': 'user', 'content': f'Is it far to the station from mill number {i}?'},
      {'role': 'assistant', 'content': 'It is a long way on foot.'},
    )
    for i in range(3)
  )
  system = {'role': 'system', 'content': 'Answer in a few plain words.'}
  odd = Prompt('odd', (system, {'role': 'user', 'content': 'Why?'}), {})
  prompts = [*(make_prompt(i) for i in range(contexts.RENDERED_PROMPTS)), odd]
  job = prepare(lm, prompts, Constitution(PRINCIPLES, shown))
  assert job.prefixes['base']
  only_odd = dataclasses.replace(job, prompts=job.prompts[-1:])
  journal = Journal(tmp_path / 'journal')
  counts = generate.generate_shards(only_odd, tmp_path / 'd_cai', journal, ENGINE)
  assert counts['chains'] == 1 and counts['shared_tokens'] == 0
