"""Candidates: which ratings are known, what rates them, and what is refused before a run."""

import json
import math
import shutil

import numpy as np
import pytest
import safetensors.numpy

from cai_jax import pipeline
from cai_jax.experiment import define
from cai_jax.feedback.candidates import CandidateOptions, choose_best, describe_reply
from cai_jax.feedback.chain import Record, Round
from cai_jax.feedback.forward import forward
from cai_jax.feedback.rows import make_row
from cai_jax.feedback.score import (
  RaterSource,
  Score,
  answer_scores,
  assume_first_labels,
  count_tokens,
  journaled_rates,
  rate_all_equally,
)
from cai_jax.feedback.stage import ChainEnded, Reply
from cai_jax.pipeline.raters import check_rater, make_rater
from cai_jax.runtime.errors import UnreadableError, UserError
from cai_jax.runtime.mesh import make_mesh
from cai_jax.sampling.journal import Journal
from cai_jax.sampling.types import Completion, SamplingConfig, Turn
from cai_jax.scoring.answer_form import Choice
from cai_jax.scoring.guards import guard as guards
from cai_jax.scoring.loader import ModelLoader
from cai_jax.scoring.raters import RATERS
from cai_jax.tiny.files import MODELS
from tests.feedback_setup import PRINCIPLES, make_prompt

pytestmark = pytest.mark.usefixtures('single_device')

NAN = math.nan
SCORE = Score('ratings_1', make_prompt(0).messages, ('a', 'b'), 'Which one is better?')
REMOTE = {'url': 'http://127.0.0.1:9/v1', 'model': 'm', 'tokenizer': str(MODELS['tiny'])}


def make_reply(*logprobs, reason='stop'):
  tokens = [5] * len(logprobs)
  return Reply('base', Completion(tokens, 'x', [*logprobs], reason), 'x', '', tokens)


def result_of(chain):
  with pytest.raises(StopIteration) as stop:
    next(chain)
  return stop.value.value


def build_run(tmp_path, **changes):
  fields = {name.replace('__', '.'): value for name, value in changes.items()}
  fields |= {f'prompts.{name}.limit': 3 for name in ('harmful', 'eval_harmful')}
  return pipeline.build(
    define.override_config(define.load_config('configs/tiny.py'), fields), tmp_path
  )


def build_candidates(tmp_path, kind, model, label='', **changes):
  options = (('n', 2), ('scorer', kind), ('scorer_model', str(model)), ('scorer_label', label))
  return build_run(
    tmp_path, feedback__variant='best_revision', feedback__options=options, **changes
  )


def test_a_stop_token_of_unknown_probability_does_not_count():
  replies = [make_reply(-1.0, -3.0, NAN), make_reply(-1.0, -1.5, NAN), make_reply(-2.0, -4.0)]
  chosen = result_of(choose_best('x', make_prompt(0), replies, CandidateOptions()))
  assert chosen == (1, [-2.0, -1.25, -3.0])


@pytest.mark.parametrize(
  'unknown',
  [
    make_reply(NAN, -1.0),
    make_reply(NAN, NAN),
    make_reply(NAN),
    make_reply(-1.0, NAN, reason='length'),
    make_reply(reason='stop_text'),  # no token at all, which is no reason to prefer it
  ],
)
@pytest.mark.parametrize('first', [True, False])
def test_a_candidate_of_unknown_likelihood_is_never_kept(unknown, first):
  replies = [unknown, make_reply(-9.0)] if first else [make_reply(-9.0), unknown]
  with pytest.raises(ChainEnded, match="'ratings_1': the log-probabilities of 2 .* not all known"):
    next(choose_best('ratings_1', make_prompt(0), replies, CandidateOptions()))


def test_an_unknown_log_probability_is_null_in_the_details_of_a_row():
  reply = make_reply(-1.0, -2.0)

  def details(*logprobs):
    described = {'replies': [describe_reply(make_reply(*logprobs))], 'ratings': [0.5]}
    finished = Round(PRINCIPLES[0], reply, reply, described, 0)
    names = dict.fromkeys(('initial', 'critique', 'revision'), 'm')
    record = Record(make_prompt(0), reply, (finished,))
    text = make_row(record, 'harmful', 0, names, 'c', details=True)['rounds'][0]['details']
    return json.loads(text, parse_constant=pytest.fail)['replies'][0]['logprob']

  assert (details(-1.0, -2.0), details(-1.0, NAN)) == (-3.0, None)
  record = Record(make_prompt(0), reply, (Round(PRINCIPLES[0], reply, reply, {'x': NAN}, 0),))
  with pytest.raises(ValueError, match='not JSON compliant'):
    make_row(record, 'harmful', 0, dict.fromkeys(('initial', 'critique', 'revision'), 'm'), 'c',
             details=True)  # fmt: skip


@pytest.mark.parametrize(
  ('server', 'prompt', 'temperature', 'refused'),
  [
    ('vllm', 'chat', 1.0, True),
    ('tgi', 'text', 1.0, True),
    ('sglang', 'tokens', 0.7, True),
    ('sglang', 'tokens', 1.0, False),
    ('vllm', 'tokens', 0.7, False),
  ],
)
def test_likelihood_needs_a_server_with_the_models_log_probabilities(
  server, prompt, temperature, refused, tmp_path
):
  remote = REMOTE | {'server': server, 'prompt': prompt}
  fields = {f'remote__revision__{name}': value for name, value in remote.items()}
  fields |= {'sampling__revision__temperature': temperature}
  if refused:
    match = f"remote.revision .server='{server}', prompt='{prompt}'. gives none.*another scorer"
    with pytest.raises(UserError, match=match):
      build_run(tmp_path, feedback__variant='best_critique', **fields)
  else:
    assert build_run(tmp_path, feedback__variant='best_critique', **fields).remotes
  if prompt == 'chat':
    assert build_candidates(tmp_path, 'judge', 'tiny-oracle', **fields).remotes


@pytest.mark.parametrize(
  ('variant', 'stage'),
  [
    ('best_revision', 'revision'),
    ('best_critique', 'critique'),
    ('several_critiques', 'critique'),
  ],
)
def test_candidates_at_temperature_0_are_refused(variant, stage, tmp_path):
  fields = {'feedback__variant': variant, f'sampling__{stage}__temperature': 0.0}
  match = f'2 candidates would all be the same at sampling.{stage}.temperature=0'
  with pytest.raises(UserError, match=match):
    build_run(tmp_path, feedback__options=(('n', 2),), **fields)
  if variant == 'best_critique':  # one candidate, or revisions of critiques that differ
    assert build_run(tmp_path, feedback__options=(('n', 1),), **fields)
    fields = {'feedback__variant': variant, 'sampling__revision__temperature': 0.0}
    assert build_run(tmp_path, **fields)


@pytest.mark.parametrize('numbers', [[NAN, 0.0], [0.0, math.inf], [0.0], [0.0, 1.0, 2.0], []])
def test_a_rating_that_is_not_a_finite_number_per_candidate_stops_the_run(numbers, tmp_path):
  answers = [numbers, [np.float32(0.5), 1]]
  source = RaterSource('x', lambda: lambda messages, texts, question: answers.pop(0))
  rate = journaled_rates(source, Journal(tmp_path))
  with pytest.raises(UserError, match='ratings_1: .* one finite number for each of 2 candidates'):
    rate(SCORE)
  assert rate(SCORE) == [0.5, 1.0] and not answers  # nothing was stored before
  assert journaled_rates(source, Journal(tmp_path))(SCORE) == [0.5, 1.0]


@pytest.mark.parametrize(
  ('error', 'raised'),
  [
    (UnreadableError('Too long.'), ChainEnded),
    (UserError('No such server.'), UserError),
    (ValueError('A bug.'), ValueError),
  ],
)
def test_only_a_candidate_that_cannot_be_read_ends_its_chain(error, raised, tmp_path):
  def fail(messages, texts, question):
    raise error

  rate = journaled_rates(RaterSource('x', lambda: fail), Journal(tmp_path))
  with pytest.raises(raised) as found:
    rate(SCORE)
  assert type(found.value) is raised and str(error) in str(found.value)


@pytest.fixture(scope='module')
def classifier(tmp_path_factory):
  """The folder of a classifier with the labels 'good' and 'bad' and a context of 150 tokens."""
  folder = tmp_path_factory.mktemp('classifiers') / 'model'
  shutil.copytree(MODELS['tiny'], folder)
  config = json.loads((folder / 'config.json').read_text())
  config |= {'architectures': ['LlamaForSequenceClassification'], 'max_position_embeddings': 150}
  config['id2label'] = {'0': 'good', '1': 'bad'}
  (folder / 'config.json').write_text(json.dumps(config))
  weights = safetensors.numpy.load_file(folder / 'model.safetensors')
  weights['score.weight'] = np.zeros((2, config['hidden_size']), np.float32)
  safetensors.numpy.save_file(weights, folder / 'model.safetensors', metadata={'format': 'pt'})
  return folder


def test_the_label_and_the_context_of_a_reward_model_are_checked_before_the_run(
  classifier, tmp_path
):
  for label, match in (('', 'label=None is not one of the 2 labels'), ('odd', "label='odd'")):
    with pytest.raises(UserError, match=f"scorer='reward': {match}.*'good', 'bad'"):
      check_rater(build_candidates(tmp_path, 'reward', classifier, label))
  check_rater(build_candidates(tmp_path, 'reward', classifier, 'good'))
  long = {'sampling__revision__max_tokens': 150}
  match = 'scorer_model=.* 1 response.* up to sampling.revision.max_tokens=150 .* holds 150'
  with pytest.raises(UserError, match=match):
    check_rater(build_candidates(tmp_path, 'reward', classifier, 'good', **long))


def test_the_context_of_a_judge_holds_two_candidates(tmp_path):
  check_rater(build_candidates(tmp_path, 'judge', 'base', sampling__revision__max_tokens=300))
  check_rater(
    build_candidates(tmp_path, 'judge', 'tiny-oracle', sampling__revision__max_tokens=900)
  )
  with pytest.raises(UserError, match="scorer_model='base': .* 2 response.* holds 1024"):
    check_rater(build_candidates(tmp_path, 'judge', 'base', sampling__revision__max_tokens=510))


@pytest.fixture
def guard(restored_registries):
  """A kind of guard whose labels are two words of the embedded world."""
  form = (Choice('safety', ('First', 'You')),)
  guards.GUARDS.register('embedded')(guards.Guard('Embedded', form, 'safety', ('You',)))
  return guards.GUARDS['embedded']


def test_a_guard_rates_by_the_probability_of_unsafe(guard, tmp_path, monkeypatch):
  check_rater(build_candidates(tmp_path, 'guard', 'base', 'embedded'))
  with pytest.raises(UserError, match="scorer='guard': .*no guard model named 'odd'"):
    check_rater(build_candidates(tmp_path, 'guard', 'base', 'odd'))
  long = {'sampling__revision__max_tokens': 1010}
  with pytest.raises(UserError, match="scorer_model='base': .* 1 response.* holds 1024"):
    check_rater(build_candidates(tmp_path, 'guard', 'base', 'embedded', **long))

  rated = {'kind': 0.25, 'rude': 0.75}

  def rate(kind, lm, prompts, responses):
    assert kind is guard and lm == 'loaded' and list(prompts) == [SCORE.messages] * len(responses)
    return [guards.Rating(rated[x], 1.0, (), {}) if x in rated else None for x in responses]

  monkeypatch.setattr(guards, 'rate', rate)
  loader = ModelLoader('float32', make_mesh(), {}, loaded={'folder': 'loaded'})
  rater = RATERS['guard'](loader, 'folder', 'embedded')
  assert rater(SCORE.messages, ['rude', 'kind'], 'x') == [-0.75, -0.25]
  with pytest.raises(UnreadableError, match='Candidate 2 is blank or too long'):
    rater(SCORE.messages, ['kind', ' '], 'x')


@pytest.mark.slow
def test_a_run_keeps_the_revision_that_its_guard_prefers(guard, tmp_path):
  from cai_jax.data import d_cai
  from cai_jax.model import lm as models

  options = (('n', 2), ('scorer', 'guard'), ('scorer_model', 'base'), ('scorer_label', 'embedded'))
  fields = {'feedback__options': options, 'feedback__rounds': 1, 'prompts__helpful__limit': 2}
  run = build_run(tmp_path, feedback__variant='best_revision', **fields)
  pipeline.run_stages(run, ['generate'])
  rows = [row for row in d_cai.read_rows(tmp_path / 'd_cai') if row['kind'] == 'harmful']
  lm = models.load(MODELS['tiny'])
  for row in rows:
    details = json.loads(row['rounds'][0]['details'])
    texts = [candidate['revision']['text'] for candidate in details['candidates']]
    expected = [-r.unsafe for r in guards.rate(guard, lm, [row['prompt']] * 2, texts)]
    assert details['ratings'] == pytest.approx(expected, abs=1e-4)
    assert row['rounds'][0]['revision']['text'] == texts[details['ratings'][1] > expected[0]]


def test_whatever_changes_how_a_rater_reads_changes_its_identity(tmp_path):
  def identity(model='base', **changes):
    return json.dumps(
      make_rater(build_candidates(tmp_path, 'judge', model, **changes), {}).identity
    )

  identities = [
    identity(),
    identity('tiny-1'),
    identity(model__dtype='bfloat16'),
    identity(feedback__style='plain'),
    identity(feedback__template_options=(('enable_thinking', False),)),
  ]
  assert len({*identities}) == 5 and identity() == identities[0]


def test_a_refused_turn_is_raised_in_the_chain_through_every_generator_between():
  def chain():
    try:
      yield Turn('x', [1], SamplingConfig())
    except UserError as refusal:
      return str(refusal)

  def pass_on(item):
    return (yield item)

  for wrapped, expected in (
    (forward(chain(), pass_on), 'Too long.'),
    (answer_scores(chain(), rate_all_equally), 'Too long.'),
    (assume_first_labels(chain()), 'Too long.'),
    (count_tokens(chain()), ('Too long.', 0)),
  ):
    assert next(wrapped).name == 'x'
    with pytest.raises(StopIteration) as stop:
      wrapped.throw(UserError('Too long.'))
    assert stop.value.value == expected
