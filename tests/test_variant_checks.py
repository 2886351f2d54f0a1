"""Variants before a run: options, raters, constitutions and the length of their chains."""

import pytest

from cai_jax.feedback.config import FeedbackConfig
from cai_jax.feedback.rows import make_row
from cai_jax.feedback.variant_table import describe_variants
from cai_jax.pipeline.checks import check_run
from cai_jax.runtime.errors import UserError
from cai_jax.runtime.mesh import make_mesh
from cai_jax.scoring.loader import ModelLoader
from cai_jax.scoring.raters import RATERS
from cai_jax.tiny import oracle
from cai_jax.tiny.files import MODELS
from cai_jax.tiny.judge import NATS
from cai_jax.tiny.prompts import make_prompts
from tests.feedback_setup import make_lm
from tests.variant_setup import (
  ALL,
  OPTIONS,
  ROOT,
  build_run,
  context_of,
  make_job,
  make_stages,
  run_chain,
)


@pytest.fixture(scope='module')
def lm(tiny_tokenizer):
  return make_lm(tiny_tokenizer)


@pytest.fixture
def stages(lm):
  return make_stages(lm)


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
  """The check counts its equal placeholder replies as critiques that differ."""
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
