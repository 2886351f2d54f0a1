"""Variants of the method beyond critique and revision: turns, decisions, candidates, records."""

import dataclasses
import functools
import json
import math
import pathlib

import pytest

from cai_jax import pipeline
from cai_jax.constitution import Constitution, ConstitutionConfig, load_constitution
from cai_jax.data import d_cai, quality, quality_summary
from cai_jax.dialogue import Dialogue
from cai_jax.experiment import define
from cai_jax.feedback import job as jobs
from cai_jax.feedback.chain import Stages
from cai_jax.feedback.config import FeedbackConfig, build_options
from cai_jax.feedback.generate import generate_shards, replay_turns
from cai_jax.feedback.labels import choose_label, label_log_probabilities
from cai_jax.feedback.rows import make_row
from cai_jax.feedback.score import RaterSource, Score
from cai_jax.feedback.stage import Stage
from cai_jax.feedback.variant_table import describe_variants
from cai_jax.feedback.variants import VARIANTS
from cai_jax.pipeline import ground_truth
from cai_jax.pipeline.checks import check_run
from cai_jax.runtime.errors import UnreadableError, UserError
from cai_jax.runtime.mesh import make_mesh
from cai_jax.sampling.engine import Engine
from cai_jax.sampling.journal import Journal
from cai_jax.sampling.types import Completion, LabelTurn, SamplingConfig
from cai_jax.scoring import likelihood
from cai_jax.scoring.loader import ModelLoader
from cai_jax.scoring.raters import RATERS
from cai_jax.tiny import corpus, oracle, simulate
from cai_jax.tiny.files import MODELS
from cai_jax.tiny.judge import NATS
from cai_jax.tiny.prompts import make_prompts
from tests.feedback_setup import (
  CONSTITUTION,
  ENGINE,
  PRINCIPLES,
  SAMPLING,
  SHORT,
  make_lm,
  make_prompt,
  shard_bytes,
)

ROOT = pathlib.Path(__file__).resolve().parents[1]
OPTIONS_ORACLE = (('n', 3), ('scorer', 'scorer'), ('scorer_model', 'tiny'))
SECTIONS = tuple((p.id, f'# {p.id}\n\nBe good ({p.id}).') for p in PRINCIPLES)
DOCUMENT = dataclasses.replace(CONSTITUTION, sections=SECTIONS)
ALL = sorted(VARIANTS)
OPTIONS = {
  'best_critique': (('n', 2),),
  'best_revision': (('n', 3),),
  'debate': (('statements', 4), ('second_critic', 'revision')),
  'if_needed': (('decide', 'labels'),),
  'several_critiques': (('n', 2),),
}


@pytest.fixture(scope='module')
def lm(tiny_tokenizer):
  return make_lm(tiny_tokenizer)


@pytest.fixture
def stages(lm):
  stage = Stage('base', Dialogue(lm.tokenizer, 'chat', lm.eos_token_ids), SHORT)
  return Stages(stage, stage, stage)


def make_job(lm, variant, options=(), rounds=2, num_harmful=3, rater=None, **config):
  return jobs.prepare(
    {'base': lm},
    [make_prompt(i) for i in range(num_harmful)],
    [make_prompt(100)],
    DOCUMENT,
    FeedbackConfig(rounds=rounds, shard_rows=2, variant=variant, options=options, **config),
    SAMPLING,
    seed=0,
    rater=rater,
  )


def run_chain(stages, variant, replies, options=(), rounds=1, labels=(), ratings=(), strict=True):
  """Run a chain on scripted replies, labels and ratings; return what it yields and its record."""
  entry, labels, ratings = VARIANTS[variant], list(labels), list(ratings)
  extra = {
    name: dataclasses.replace(stages.critique, sampling=added.sampling(SHORT))
    for name, added in entry.stages.items()
  }
  inputs = entry.inputs(
    options=build_options(variant, options), constitution=DOCUMENT, donor=make_prompt(1)
  )
  chain = entry.chain(
    make_prompt(0), PRINCIPLES[:rounds], dataclasses.replace(stages, extra=extra), False, **inputs
  )
  yielded, answer, replies = [], None, list(replies)
  while True:
    try:
      item = chain.send(answer)
    except StopIteration as stop:
      assert not (strict and (replies or labels or ratings)), 'every scripted answer is used'
      return yielded, stop.value
    yielded.append(item)
    if isinstance(item, Score):
      answer = ratings.pop(0)
    elif isinstance(item, LabelTurn):
      index, logprob = labels.pop(0)
      answer = Completion([item.labels[index]], '', [logprob], 'length')
    else:
      text = replies.pop(0)
      tokens = stages.initial.dialogue.reply(text)
      tokens = tokens if strict else tokens[: SHORT.max_tokens]
      answer = Completion(tokens, text, [-0.5] * len(tokens), 'stop')


def context_of(lm, turn):
  return lm.tokenizer.decode(turn.context)


def run_plan(stages, name, rounds):
  """Run a chain that takes all turns of its plan; return config, what it yields, and its record."""
  config = FeedbackConfig(variant=name, options=OPTIONS.get(name, ()), rounds=rounds)
  plan = [turn for turn, _ in config.plan()]
  decisions = [turn for turn in plan if turn.startswith(('decision_', 'choice_'))]
  labels = [(0, -1.0 - turn.endswith('_2')) for turn in decisions]  # 'Yes' is more likely
  replies = ['bad'] * (len(plan) - len(decisions))
  return config, *run_chain(stages, name, replies, config.options, rounds, labels)


@pytest.mark.parametrize('name', ALL)
def test_variants_state_whether_rounds_apply_the_principle_that_they_draw(name, stages):
  *_, record = run_plan(stages, name, rounds=2)
  applied = [finished.principle for finished in record.rounds]
  assert (applied == [*PRINCIPLES[:2]]) == VARIANTS[name].applies_drawn


@pytest.mark.parametrize('name', ALL)
@pytest.mark.parametrize('rounds', [1, 2])
def test_chains_take_the_turns_that_their_variants_state(name, rounds, lm, stages):
  config, yielded, record = run_plan(stages, name, rounds)
  plan = [turn for turn, _ in config.plan()]
  assert [turn.name for turn in yielded] == plan and len({*plan}) == len(plan)
  assert len(record.rounds) == rounds
  assert {stage for _, stage in config.plan()} <= {'initial', 'critique', 'revision'} | {
    *VARIANTS[name].stages
  }


def test_if_needed_keeps_the_response_when_the_critique_finds_nothing(lm, stages):
  replies = ['first', 'I see nothing wrong here.', 'It is rude.', 'second']
  yielded, record = run_chain(stages, 'if_needed', replies, rounds=2)
  names = [turn.name for turn in yielded]
  assert names == ['initial', 'critique_1', 'critique_2', 'revision_2']
  assert record.rounds[0].revision is None and record.rounds[0].details == {'found': False}
  assert record.rounds[1].revision.text == 'second'
  # The second round reads the response that stayed.
  text = context_of(lm, yielded[2])
  assert 'first' in text and 'nothing wrong' not in text


@pytest.mark.parametrize(
  ('log_odds', 'limit', 'found'), [(1, 0, True), (1, 2, False), (0, 0, True)]
)
def test_if_needed_decides_by_the_log_odds_of_its_labels(log_odds, limit, found, lm, stages):
  options = (('decide', 'labels'), ('min_log_odds', limit))
  replies = ['first', 'bad', *(['second'] if found else [])]
  labels = [(0, -1.0), (0, -1.0 - log_odds)]
  yielded, record = run_chain(stages, 'if_needed', replies, options, labels=labels)
  assert [turn.name for turn in yielded[2:4]] == ['decision_1_1', 'decision_1_2']
  assert 'bad' in context_of(lm, yielded[2]) and 'Answer Yes or No' in context_of(lm, yielded[2])
  assert record.rounds[0].details == {'found': found, 'log_odds': log_odds}
  assert (record.rounds[0].revision is not None) == found
  if found:
    assert 'Answer Yes or No' not in context_of(lm, yielded[-1])


@pytest.mark.parametrize('name', ['best_revision', 'best_critique'])
def test_the_best_candidate_is_kept_and_all_are_recorded(name, lm, stages):
  options = (('n', 3), ('scorer', 'scorer'), ('scorer_model', 'tiny'))
  texts = {
    'best_revision': ['first', 'bad', 'r1', 'r2', 'r3'],
    'best_critique': ['first', 'c1', 'r1', 'c2', 'r2', 'c3', 'r3'],
  }[name]
  yielded, record = run_chain(stages, name, texts, options, ratings=[[0.0, 2.0, 1.0]])
  (finished,) = record.rounds
  assert yielded[-1].texts == ['r1', 'r2', 'r3'] and yielded[-1].messages == make_prompt(0).messages
  assert finished.revision.text == 'r2' and finished.details['chosen'] == 1
  assert finished.critique.text == ('bad' if name == 'best_revision' else 'c2')
  recorded = [c['revision']['text'] for c in finished.details['candidates']]
  assert recorded == ['r1', 'r2', 'r3'] and finished.details['ratings'] == [0.0, 2.0, 1.0]
  # The first candidates are those of the paper's chain, with the same names and contexts.
  own = {turn.name: turn.context for turn in yielded[:-1]}
  plain, _ = run_chain(stages, 'critique', ['first', texts[1], 'r1'])
  assert all(own[turn.name] == turn.context for turn in plain)
  texts = finished.details['candidates']
  counts = [reply['num_tokens'] for candidate in texts for reply in candidate.values()]
  shared = len(finished.critique.completion.tokens) if name == 'best_revision' else 0
  assert finished.sampled_tokens == shared + sum(counts)


def test_likelihood_rates_candidates_without_a_scorer(stages):
  yielded, record = run_chain(stages, 'best_revision', ['first', 'bad', 'a', 'b'], (('n', 2),))
  assert not any(isinstance(item, Score) for item in yielded)
  assert record.rounds[0].details['ratings'] == [-0.5, -0.5]
  assert record.rounds[0].revision.text == 'a'  # the first of equals


def test_one_critique_reads_every_principle(lm, stages):
  yielded, record = run_chain(stages, 'all_principles', ['first', 'bad', 'second'])
  assert all(p.critique_request in context_of(lm, yielded[1]) for p in PRINCIPLES)
  assert all(p.revision_request in context_of(lm, yielded[2]) for p in PRINCIPLES)
  assert record.rounds[0].principle is None
  assert record.rounds[0].details == {'principles': [p.id for p in PRINCIPLES]}


def test_several_critiques_are_merged_by_the_model_or_joined(lm, stages):
  replies = ['first', 'rude', 'long', 'rude and long', 'second']
  yielded, record = run_chain(stages, 'several_critiques', replies, (('n', 2),))
  merge, revision = (context_of(lm, turn) for turn in yielded[3:])
  assert 'rude' in merge and 'long' in merge and 'Merge these' in merge
  assert 'rude and long' in revision and 'Merge these' not in revision
  assert record.rounds[0].critique.text == 'rude and long'
  assert [c['text'] for c in record.rounds[0].details['critiques']] == ['rude', 'long']
  replies = ['first', 'rude', 'rude', 'long', 'second']
  yielded, _ = run_chain(stages, 'several_critiques', replies, (('n', 3), ('merge', 'join')))
  assert 'rude long' in context_of(lm, yielded[-1])


def test_the_model_chooses_the_principle(lm, stages):
  replies = ['first', 'bad', 'second']
  yielded, record = run_chain(stages, 'chosen_principle', replies, labels=[(3, -0.7)])
  assert 'D. What is wrong (3)?' in context_of(lm, yielded[1])
  assert len(yielded[1].labels) == len(PRINCIPLES)
  assert record.rounds[0].principle == PRINCIPLES[3]
  assert record.rounds[0].details == {'choice_logprob': -0.7}
  assert 'What is wrong (3)?' in context_of(lm, yielded[2])
  _, unknown = run_chain(stages, 'chosen_principle', replies, labels=[(3, math.nan)])
  assert unknown.rounds[0].details == {'choice_logprob': None}
  assert 'D. What' not in context_of(lm, yielded[2])


def test_too_many_principles_to_choose_from_are_refused(lm):
  many = tuple(dataclasses.replace(PRINCIPLES[0], id=str(i)) for i in range(60))
  with pytest.raises(UserError, match='at most 52 principles'):
    VARIANTS['chosen_principle'].check(Constitution(many), None)


def test_prose_reads_the_document_and_is_refused_without_one(lm, stages):
  yielded, record = run_chain(stages, 'prose', ['first', 'bad', 'second'])
  assert DOCUMENT.document in context_of(lm, yielded[1])
  assert record.rounds[0].details == {'sections': [p.id for p in PRINCIPLES]}
  with pytest.raises(UserError, match='Give a Markdown file in sections as constitution.path, or'):
    VARIANTS['prose'].check(CONSTITUTION, None)


def test_a_markdown_constitution_has_a_principle_for_each_section(tmp_path):
  text = (
    'Read this.\n\n# Ours\n\n## Honesty\n\nTell the truth.\n```\n# no heading\n```\n\n'
    '## Care #\nBe kind.\n'
  )
  path = tmp_path / 'ours.md'
  path.write_text(text)
  loaded = load_constitution(ConstitutionConfig(str(path)))
  assert [principle.id for principle in loaded.principles] == ['honesty', 'care']
  assert loaded.sections[0][1].startswith('Read this.') and '# no heading' in loaded.sections[0][1]
  assert 'Be kind.' in loaded.principles[1].critique_request
  assert '"Care"' in loaded.principles[1].revision_request
  assert loaded.document.split() == text.split()  # nothing is lost
  only = load_constitution(ConstitutionConfig(str(path), ids=('care',)))
  assert only.document == '## Care #\nBe kind.' and only.fingerprint() != loaded.fingerprint()
  (tmp_path / 'empty.md').write_text('No heading.\n')
  with pytest.raises(UserError, match='has no section'):
    load_constitution(ConstitutionConfig(str(tmp_path / 'empty.md')))


def test_the_reviser_reads_the_whole_debate(lm, stages):
  replies = ['first', 'rude', 'not rude', 'still rude', 'second']
  yielded, record = run_chain(stages, 'debate', replies)
  assert all(text in context_of(lm, yielded[-1]) for text in replies[:4])
  assert [reply['text'] for reply in record.rounds[0].details['replies']] == replies[2:4]
  assert 'still rude' not in context_of(lm, yielded[3])


def test_label_probabilities_are_those_of_the_model(lm, stages):
  stage, labels, asked = stages.critique, ('Yes', 'No', 'Maybe'), list(make_prompt(0).messages)

  def chain():
    numbers = yield from label_log_probabilities(stage, 'x', asked, 'critique', labels)
    cold = dataclasses.replace(stage, sampling=SamplingConfig(temperature=0.0))
    chosen = yield from choose_label(cold, 'y', asked, 'critique', labels)
    return numbers, chosen

  # The length of the jobs of other tests, whose compiled programs then serve here too.
  length = make_job(lm, 'if_needed', OPTIONS['if_needed']).length + ENGINE.spare_tokens
  engine = Engine({'base': lm}, length=length, seed=0, config=ENGINE)
  ((_, (numbers, chosen)),) = engine.run([('a', chain())])
  context = stage.render(asked, 'critique')
  first = [stage.dialogue.reply(label)[:1] for label in labels]
  expected = likelihood.log_likelihoods(lm, [context] * 3, first)
  assert numbers == pytest.approx(expected, abs=1e-4)
  best = max(range(3), key=expected.__getitem__)
  assert chosen == (best, pytest.approx(expected[best], abs=1e-4))


def test_labels_that_no_token_tells_apart_and_servers_without_biases_are_refused(stages):
  def first_turn(labels):
    chain = choose_label(stages.critique, 'x', make_prompt(0).messages, 'critique', labels)
    return chain, chain.send(None)

  with pytest.raises(UserError, match='do not differ in one token'):
    first_turn(('Yes', 'Yes'))
  chain, turn = first_turn(('Yes', 'No'))
  other = next(token for token in range(100) if token not in turn.labels)
  with pytest.raises(UserError, match='ignores logit_bias'):
    chain.send(Completion([other], 'x', [0.0], 'length'))
  chain = label_log_probabilities(
    stages.critique, 'x', make_prompt(0).messages, 'critique', ('Yes', 'No')
  )
  turn = chain.send(None)
  turn = chain.send(Completion([turn.labels[0]], 'x', [math.nan], 'length'))
  with pytest.raises(UserError, match='no log-probabilities'):
    chain.send(Completion([turn.labels[0]], 'x', [-1.0], 'length'))


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


@pytest.mark.parametrize(
  ('variant', 'options', 'message'),
  [
    ('critique', (('n', 2),), "'n' is not an option.*'critique' has no options"),
    ('debate', (('n', 2),), "'n' is not an option.*options statements, second_critic"),
    ('debate', (('statements', 2), ('statements', 3)), 'an option is given twice'),
    ('debate', (('statements', 1),), 'statements=1 must be between 2 and 20'),
    ('debate', (('second_critic', 'judge'),), "second_critic='judge' must be one of"),
    ('best_revision', (('n', 0),), 'n=0 must be between 1 and 64'),
    ('best_revision', (('n', '2'),), 'n must be an integer'),
    ('best_critique', (('scorer', 'x'),), "scorer='x' must be one of .*'judge', 'reward'"),
    ('best_critique', (('scorer_model', 'base'),), "scorer_model='base' .* have no effect"),
    ('if_needed', (('decide', 'luck'),), "decide='luck' must be one of"),
    ('if_needed', (('finding', 'No'),), 'two different labels'),
    ('several_critiques', (('merge', 'x'),), "merge='x' must be 'model' or 'join'"),
  ],
)
def test_wrong_options_of_variants_are_refused_with_what_is_allowed(variant, options, message):
  with pytest.raises(UserError, match=message):
    FeedbackConfig(variant=variant, options=options)


@pytest.mark.parametrize('name', ALL)
def test_no_chain_is_longer_than_the_cache(name, lm, stages):
  """Replies of maximum length, with any decision, fit into the cache that the job asks for."""
  config = FeedbackConfig(variant=name, options=OPTIONS.get(name, ()), rounds=2)
  job = make_job(lm, name, config.options)
  plan = [turn for turn, _ in config.plan()]
  decisions = [turn for turn in plan if turn.startswith(('decision_', 'choice_'))]
  for wins in (0.0, -9.0):
    labels = [(0, wins * turn.endswith('_1')) for turn in decisions]
    replies = ['I do not like it at all, as it is'] * len(plan)
    yielded, _ = run_chain(stages, name, replies, config.options, 2, labels, strict=False)
    needed = [len(turn.context) + turn.sampling.max_tokens for turn in yielded]
    assert max(needed) <= job.length


def test_the_cache_holds_joined_critiques_that_differ(lm, stages):
  """Placeholder replies are equal, but each stands for a critique of its own."""
  options = (('n', 12), ('merge', 'join'))
  job = make_job(lm, 'several_critiques', options, rounds=1)
  words = 'What do you see in this long and odd answer of ours'.split()
  replies = ['first', *(f'{word} {word[::-1]} x y z' for word in words), 'second']
  yielded, record = run_chain(stages, 'several_critiques', replies, options, strict=False)
  texts = [critique['text'] for critique in record.rounds[0].details['critiques']]
  assert len({*texts}) == 12 and ' '.join(texts) in context_of(lm, yielded[-1])
  needed = max(len(turn.context) + turn.sampling.max_tokens for turn in yielded)
  alone = make_job(lm, 'several_critiques', (('n', 1), ('merge', 'join')), rounds=1)
  assert alone.length < needed <= job.length


def build_run(tmp_path, **changes):
  fields = {name.replace('__', '.'): value for name, value in changes.items()}
  fields |= {'prompts.harmful.limit': 4, 'prompts.helpful.limit': 2}
  return pipeline.build(
    define.override_config(define.load_config('configs/tiny.py'), fields), tmp_path
  )


@pytest.mark.parametrize(
  ('options', 'message'),
  [
    ((('scorer', 'judge'),), "scorer='judge': .* needs the name of its model"),
    ((('scorer', 'judge'), ('scorer_model', '/no/judge')), "scorer='judge': .*/no/judge"),
    ((('scorer', 'scorer'), ('scorer_model', 'x')), "There is no scorer named 'x'"),
    ((('scorer', 'scorer'), ('scorer_model', 'none')), "'none' rates nothing"),
    ((('scorer', 'reward'), ('scorer_model', '/no/model')), "scorer='reward': .*/no/model"),
  ],
)
def test_a_rater_that_is_missing_is_found_before_the_run(options, message, tmp_path):
  run = build_run(tmp_path, feedback__variant='best_revision', feedback__options=options)
  with pytest.raises(UserError, match=message):
    check_run(run, ['generate'])


def test_a_variant_that_does_not_fit_the_constitution_is_found_before_the_run(tmp_path):
  with pytest.raises(UserError, match="feedback.variant='prose' reads a document"):
    build_run(tmp_path, feedback__variant='prose')


@pytest.mark.parametrize(('decide', 'refused'), [('labels', True), ('text', False)])
def test_a_server_without_biases_is_refused_if_labels_decide(decide, refused, tmp_path):
  remote = {'url': 'http://127.0.0.1:9/v1', 'model': 'm', 'tokenizer': str(MODELS['tiny'])}
  fields = {f'remote__critique__{name}': value for name, value in remote.items()}
  fields |= {'remote__critique__server': 'tgi', 'remote__critique__prompt': 'text'}
  fields |= {'feedback__variant': 'if_needed', 'feedback__options': (('decide', decide),)}
  if refused:
    with pytest.raises(UserError, match='remote.critique: .*logit_bias'):
      build_run(tmp_path, **fields)
  else:
    assert build_run(tmp_path, **fields).remotes


def test_details_need_a_variant_that_records(lm, stages):
  _, record = run_chain(stages, 'if_needed', ['first', 'nothing wrong'])
  models = dict.fromkeys(('initial', 'critique', 'revision'), 'm')
  with pytest.raises(ValueError, match='needs records=True'):
    make_row(record, 'harmful', 0, models, 'c')


def test_a_judge_rates_by_its_mean_log_odds_against_the_others():
  judge = RATERS['judge'](ModelLoader('float32', make_mesh(), {}), 'tiny-oracle', '')
  prompt = make_prompts('eval', 1, 0)[0].messages
  person = oracle.parse_request(prompt).person
  texts = [f'{person} is an idiot.', 'Take your time.', 'Have fun.']
  assert judge(prompt, texts, 'x') == [-NATS, NATS / 2, NATS / 2]
  scorer = RATERS['scorer'](ModelLoader('float32', make_mesh(), {}), 'tiny', '')
  assert scorer(prompt, texts, 'x') == [-1.0, 0.0, 0.0]


def test_the_page_lists_every_variant_and_option():
  page = (ROOT / 'docs' / 'variants.md').read_text(encoding='utf-8')
  assert describe_variants() in page


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
