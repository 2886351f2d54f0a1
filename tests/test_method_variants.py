"""Variants of the method beyond critique and revision: their turns and decisions."""

import dataclasses
import math

import pytest

from cai_jax.constitution import Constitution, ConstitutionConfig, load_constitution
from cai_jax.feedback.config import FeedbackConfig
from cai_jax.feedback.labels import choose_label, label_log_probabilities
from cai_jax.feedback.score import Score
from cai_jax.feedback.variants import VARIANTS
from cai_jax.runtime.errors import UserError
from cai_jax.sampling.engine import Engine
from cai_jax.sampling.types import Completion, LabelTurn, SamplingConfig
from cai_jax.scoring import likelihood
from tests.feedback_setup import CONSTITUTION, ENGINE, PRINCIPLES, make_lm, make_prompt
from tests.variant_setup import ALL, DOCUMENT, OPTIONS, context_of, make_job, make_stages, run_chain


@pytest.fixture(scope='module')
def lm(tiny_tokenizer):
  return make_lm(tiny_tokenizer)


@pytest.fixture
def stages(lm):
  return make_stages(lm)


def run_plan(stages, name, rounds):
  """Run a chain that takes all turns of its plan; return config, what it yields, and its record."""
  config = FeedbackConfig(variant=name, options=OPTIONS.get(name, ()), rounds=rounds)
  plan = [turn for turn, _ in config.plan()]
  decisions = [turn for turn in plan if turn.startswith(('decision_', 'choice_'))]
  # 'Yes' is more likely, and another principle than the drawn one is chosen.
  labels = [(int(x.startswith('choice_')), -1.0 - x.endswith('_2')) for x in decisions]
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
  assert record.rounds[0].details == {'choice': 'D', 'choice_logprob': -0.7}
  assert 'What is wrong (3)?' in context_of(lm, yielded[2])
  _, unknown = run_chain(stages, 'chosen_principle', replies, labels=[(3, math.nan)])
  assert unknown.rounds[0].details == {'choice': 'D', 'choice_logprob': None}
  assert 'D. What' not in context_of(lm, yielded[2])


def test_the_list_to_choose_from_begins_with_the_drawn_principle(lm, stages):
  replies = ['first', 'bad', 'second', 'worse', 'third']
  labels = [(0, -0.7), (len(PRINCIPLES) - 1, -0.7)]
  yielded, record = run_chain(stages, 'chosen_principle', replies, rounds=2, labels=labels)
  choices = [context_of(lm, turn) for turn in yielded if isinstance(turn, LabelTurn)]
  assert 'A. What is wrong (0)?' in choices[0] and 'A. What is wrong (1)?' in choices[1]
  assert [r.principle for r in record.rounds] == [PRINCIPLES[0], PRINCIPLES[0]]
  assert [r.details['choice'] for r in record.rounds] == ['A', 'ABCDEFGH'[len(PRINCIPLES) - 1]]


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
