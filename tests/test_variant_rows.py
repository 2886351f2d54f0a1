"""What variants record: candidates, details, kept responses, and what the grammar defines."""

import dataclasses
import functools
import json

import pytest

from cai_jax.data import d_cai, quality, quality_summary
from cai_jax.feedback.config import build_options
from cai_jax.feedback.generate import generate_shards, replay_turns
from cai_jax.feedback.score import RaterSource
from cai_jax.feedback.variants import VARIANTS
from cai_jax.pipeline import ground_truth
from cai_jax.runtime.errors import UnreadableError
from cai_jax.sampling.journal import Journal
from cai_jax.tiny import corpus, simulate
from cai_jax.tiny.prompts import make_prompts
from tests.feedback_setup import ENGINE, PRINCIPLES, make_lm, make_prompt, shard_bytes
from tests.variant_setup import ALL, OPTIONS, build_run, make_job

OPTIONS_ORACLE = (('n', 3), ('scorer', 'scorer'), ('scorer_model', 'tiny'))


@pytest.fixture(scope='module')
def lm(tiny_tokenizer):
  return make_lm(tiny_tokenizer)


def make_rater(calls):
  """Return a rater that prefers long texts and counts how often each request is made."""

  def rate(messages, texts, question):
    calls.append((tuple(texts), question))
    return [float(len(text)) for text in texts]

  return RaterSource('by length', lambda: rate)


@pytest.mark.parametrize('name', ['if_needed', 'chosen_principle'])
def test_rows_have_details_and_do_not_change_after_an_interruption(name, lm, tmp_path):
  options = OPTIONS.get(name, ())
  job = make_job(lm, name, options)
  generate_shards(job, tmp_path / 'a', Journal(tmp_path / 'journal'), ENGINE)
  (tmp_path / 'half').mkdir()
  lines = (tmp_path / 'journal' / 'turns-00000.jsonl').read_bytes().splitlines(keepends=True)
  journal = Journal(tmp_path / 'half')
  journal.close()
  (tmp_path / 'half' / 'turns-00000.jsonl').write_bytes(b''.join(lines[:2]) + lines[2][:9])
  counts = generate_shards(job, tmp_path / 'b', Journal(tmp_path / 'half'), ENGINE)
  assert counts['replayed_turns'] and counts['turns']
  assert shard_bytes(tmp_path / 'a') == shard_bytes(tmp_path / 'b')
  assert job.digest() != make_job(lm, 'critique').digest()


def test_candidates_are_rated_once_and_read_back_from_the_journal(lm, tmp_path):
  calls = []
  options = (('n', 2), ('scorer', 'scorer'), ('scorer_model', 'tiny'))
  job = make_job(lm, 'best_revision', options, rater=make_rater(calls))
  generate_shards(job, tmp_path / 'a', Journal(tmp_path / 'journal'), ENGINE)
  assert len(calls) == 3 * 2  # one request in each round of each prompt
  replayed = replay_turns(job, Journal(tmp_path / 'journal'), ENGINE)
  generate_shards(job, tmp_path / 'b', Journal(tmp_path / 'journal'), ENGINE)
  assert len(calls) == 3 * 2 and len(replayed['id-0']) == 1 + 2 * 3
  assert shard_bytes(tmp_path / 'a') == shard_bytes(tmp_path / 'b')
  other = dataclasses.replace(job, rater=dataclasses.replace(job.rater, identity='another'))
  assert other.digest() != job.digest()
  generate_shards(other, tmp_path / 'c', Journal(tmp_path / 'journal'), ENGINE)
  assert len(calls) == 2 * 3 * 2  # another rater is asked anew


def test_a_candidate_that_cannot_be_read_ends_its_chain_only(lm, tmp_path):
  def rate(messages, texts, question):
    if messages == make_prompt(1).messages:
      raise UnreadableError('It is too long.')
    return [0.0] * len(texts)

  options = (('n', 2), ('scorer', 'scorer'), ('scorer_model', 'tiny'))
  source = RaterSource('x', lambda: rate)
  job = make_job(lm, 'best_revision', options, rounds=1, rater=source)
  generate_shards(job, tmp_path / 'a', Journal(tmp_path / 'journal'), ENGINE)
  (ended,) = [json.loads(line) for path in (tmp_path / 'a').glob('ended-*') for line in open(path)]
  assert (ended['id'], ended['turn'], ended['reason']) == ('id-1', 'ratings_1', 'It is too long.')
  with pytest.raises(ValueError, match='needs a rater'):
    make_job(lm, 'best_revision', options)


def test_kept_responses_are_told_apart_in_d_cai_and_are_no_revisions(lm, tmp_path):
  """With a limit that no log-odds reach, every round keeps the response."""
  options = (('decide', 'labels'), ('min_log_odds', 1000.0))
  job = make_job(lm, 'if_needed', options)
  folder = tmp_path / 'a'
  generate_shards(job, folder, Journal(tmp_path / 'journal'), ENGINE)
  d_cai.write_metadata(folder, [2, 2], details=True)
  d_cai.check_schema(folder)
  rows = [row for row in d_cai.read_rows(folder) if row['kind'] == 'harmful']
  for row in rows:
    for step in row['rounds']:
      assert step['revised'] is False and step['revision']['text'] == row['initial']['text']
      assert json.loads(step['details'])['found'] is False
      # Two labels were asked for besides the critique.
      assert step['sampled_tokens'] == step['critique']['num_tokens'] + 2
      assert d_cai.round_tokens(step) == step['sampled_tokens']
    sampled = row['initial']['num_tokens'] + sum(s['critique']['num_tokens'] for s in row['rounds'])
    assert len(row['logprobs']) == sampled
  references = quality.build_references(
    {p.id: (p.critique_request, p.revision_request) for p in PRINCIPLES}, ()
  )
  summary = quality_summary.summarize(rows, references)
  assert summary['revisions'] == 0 and summary['revised_rows'] == 3
  assert not any(flags['count'] for flags in summary['flags'].values())


def test_d_cai_of_other_variants_has_the_old_schema():
  old, new = (f['rounds'].feature for f in (d_cai.FEATURES, d_cai.make_features(details=True)))
  assert {*new} - {*old} == {'revised', 'sampled_tokens', 'details'} and {*old} < {*new}
  assert {name for name in ALL if not VARIANTS[name].records} == {
    'critique',
    'direct',
    'empty',
    'shuffled',
  }


@functools.cache
def plain_rate():
  return simulate.simulate_chains(corpus.load_principles(), 1, 2000)[1][0]


@pytest.mark.parametrize(
  ('variant', 'options', 'lower'),
  [
    ('if_needed', (), 0.0),
    ('all_principles', (), 0.05),
    ('best_revision', OPTIONS_ORACLE, 0.02),
    ('best_critique', OPTIONS_ORACLE, 0.05),
  ],
)
def test_the_grammar_writes_the_rounds_that_it_defines(variant, options, lower):
  """The rate of violations after a round is lower by at least so much than with 'critique'."""
  principles, plain = corpus.load_principles(), plain_rate()
  built = build_options(variant, options)
  rate = simulate.simulate_chains(principles, 1, 2000, variant=variant, options=built)[1][0]
  assert plain - rate >= lower and (rate == plain or variant != 'if_needed')


def test_the_grammar_says_nothing_of_other_options(tmp_path):
  for variant, options in (('best_revision', ()), ('if_needed', OPTIONS['if_needed'])):
    run = build_run(tmp_path, feedback__variant=variant, feedback__options=options)
    prompts = [prompt.messages for prompt in make_prompts('eval', 3, 0)]
    assert set(ground_truth.grammar_rates(run, prompts, 'harmful')) == {'initial', 'base'}
