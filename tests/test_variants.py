"""Chains: the turns of each variant, their contexts and their records."""

import dataclasses

import pytest

from cai_jax.constitution import Constitution
from cai_jax.dialogue import Dialogue
from cai_jax.feedback import job as jobs
from cai_jax.feedback.chain import Stage, Stages, register_variant, turns_per_round
from cai_jax.feedback.config import FeedbackConfig, StageSampling
from cai_jax.feedback.generate import generate_shards
from cai_jax.feedback.variants import VARIANTS
from cai_jax.feedback.variants.critique import critique_revision
from cai_jax.feedback.variants.direct import direct_revision
from cai_jax.feedback.variants.empty import empty_critique
from cai_jax.feedback.variants.shuffled import shuffled_critique
from cai_jax.model import lm as models
from cai_jax.runtime.errors import UserError
from cai_jax.runtime.plugins import load_plugins
from cai_jax.sampling.journal import Journal
from cai_jax.sampling.planning import longest_context
from cai_jax.sampling.types import Completion, SamplingConfig
from cai_jax.tiny.files import MODELS
from tests.feedback_setup import ENGINE, PRINCIPLES, SHORT, make_job, make_lm, make_prompt, play


@pytest.fixture(scope='module')
def lm(tiny_tokenizer):
  return make_lm(tiny_tokenizer)


@pytest.fixture
def stages(lm):
  stage = Stage('base', Dialogue(lm.tokenizer, 'chat', lm.eos_token_ids), SHORT)
  return Stages(stage, stage, stage)


def test_critique_chain_puts_each_request_into_its_context(lm, stages):
  dialogue = stages.initial.dialogue
  chain = critique_revision(make_prompt(0), PRINCIPLES[:2], stages)
  turns, record = play(chain, dialogue, ['first', 'bad', 'second', 'worse', 'third'])
  assert [t.name for t in turns] == [
    'initial', 'critique_1', 'revision_1', 'critique_2', 'revision_2',
  ]  # fmt: skip
  texts = [lm.tokenizer.decode(t.context) for t in turns]
  assert 'What is wrong (0)?' in texts[1] and 'first' in texts[1]
  assert 'bad' in texts[2] and 'Mend it (0).' in texts[2]
  # A later round sees the latest response as the answer, and nothing of earlier rounds.
  assert 'second' in texts[3] and 'What is wrong (1)?' in texts[3]
  assert 'first' not in texts[3] and 'bad' not in texts[3]
  assert [r.revision.text for r in record.rounds] == ['second', 'third']
  assert record.initial.text == 'first' and record.rounds[1].critique.text == 'worse'


def test_each_context_within_a_round_extends_the_previous_one(stages):
  dialogue = stages.initial.dialogue
  for growing in (False, True):
    chain = critique_revision(make_prompt(0), PRINCIPLES[:2], stages, growing)
    replies = ['first', 'bad', 'second', 'worse', 'third']
    turns, _ = play(chain, dialogue, replies)
    for number in (1, 2, 3, 4):
      before = turns[number - 1].context + dialogue.reply(replies[number - 1])
      extends = turns[number].context[: len(before)] == before
      assert extends == (growing or number != 3)


def test_empty_critique_is_in_the_context_but_not_in_the_record(lm, stages):
  chain = empty_critique(make_prompt(0), PRINCIPLES[:2], stages)
  turns, record = play(chain, stages.initial.dialogue, ['first', 'second', 'third'])
  assert [t.name for t in turns] == ['initial', 'revision_1', 'revision_2']
  text = lm.tokenizer.decode(turns[1].context)
  assert 'What is wrong (0)?' in text and 'Mend it (0).' in text
  assert [r.critique for r in record.rounds] == [None, None]


def test_shuffled_critiques_come_from_the_donors_chain(lm, stages):
  chain = shuffled_critique(make_prompt(0), PRINCIPLES[:2], stages, donor=make_prompt(1))
  donor = ['other', 'rude', 'other again', 'long', 'other at last']
  turns, record = play(chain, stages.initial.dialogue, [*donor, 'first', 'second', 'third'])
  assert [t.name for t in turns[:5]] == [
    'donor_initial', 'donor_critique_1', 'donor_revision_1', 'donor_critique_2', 'donor_revision_2',
  ]  # fmt: skip
  assert [t.name for t in turns[5:]] == ['initial', 'revision_1', 'revision_2']
  texts = [lm.tokenizer.decode(t.context) for t in turns]
  assert 'Question 1?' in texts[0] and 'Question 0?' in texts[5]
  assert 'first' in texts[6] and 'rude' in texts[6] and 'Mend it (0).' in texts[6]
  assert 'second' in texts[7] and 'long' in texts[7] and 'rude' not in texts[7]
  assert not any('other' in text for text in texts[5:])
  assert [r.revision.text for r in record.rounds] == ['second', 'third']


def test_direct_revision_has_no_critique(lm, stages):
  chain = direct_revision(make_prompt(0), PRINCIPLES[:2], stages)
  turns, record = play(chain, stages.initial.dialogue, ['a', 'b', 'c'])
  assert [t.name for t in turns] == ['initial', 'revision_1', 'revision_2']
  assert all(finished.critique is None for finished in record.rounds)
  assert 'wrong' not in lm.tokenizer.decode(turns[2].context)


def test_reply_of_another_model_enters_the_context_as_text(lm, stages):
  critic = dataclasses.replace(stages.critique, model='critique')
  stages = dataclasses.replace(stages, critique=critic)
  chain = critique_revision(make_prompt(0), PRINCIPLES[:1], stages)
  turn = chain.send(None)
  tokens = lm.tokenizer.encode(' cut off ')
  turn = chain.send(Completion(tokens, ' cut off ', [0.0] * len(tokens), 'length'))
  expected = critic.dialogue.prompt(
    [
      *make_prompt(0).messages,
      {'role': 'assistant', 'content': 'cut off'},
      {'role': 'critique_request', 'content': PRINCIPLES[0].critique_request},
    ],
    'critique',
  )
  assert turn.model == 'critique' and turn.context == expected


def test_demonstrations_precede_critiques_and_revisions_only(lm):
  shown = ({'role': 'user', 'content': 'Shown?'}, {'role': 'assistant', 'content': 'Shown.'})
  constitution = Constitution(PRINCIPLES, (shown,))
  for used in (True, False):
    config = FeedbackConfig(demonstrations=used)
    stages = jobs.make_stages({'base': lm}, constitution, config, StageSampling())
    chain = critique_revision(make_prompt(0), PRINCIPLES[:1], stages)
    turns, _ = play(chain, stages.initial.dialogue, ['first', 'bad', 'second'])
    texts = [lm.tokenizer.decode(turn.context) for turn in turns]
    assert ['Shown?' in text for text in texts] == [False, used, used]


def yielded_turns(variant, rounds, stages):
  """Return (name, stage name) of the turns that a variant's chain yields."""
  limits = {'initial': 1, 'critique': 2, 'revision': 3}  # tell the stages apart
  stages = Stages(
    **{
      name: dataclasses.replace(stage, sampling=SamplingConfig(max_tokens=limits[name]))
      for name, stage in stages.by_name().items()
    }
  )
  inputs = {'donor': make_prompt(1)} if variant.needs_donor else {}
  chain = variant.chain(make_prompt(0), PRINCIPLES[:rounds], stages, False, **inputs)
  plan = variant.turns(rounds)
  turns, record = play(chain, stages.initial.dialogue, ['text'] * len(plan))
  names = {limit: name for name, limit in limits.items()}
  return [(turn.name, names[turn.sampling.max_tokens]) for turn in turns], record


@pytest.mark.parametrize('name', ['critique', 'direct', 'empty', 'shuffled'])
@pytest.mark.parametrize('rounds', [1, 3])
def test_chain_yields_the_turns_that_its_variant_states(name, rounds, stages):
  turns, record = yielded_turns(VARIANTS[name], rounds, stages)
  assert turns == list(VARIANTS[name].turns(rounds))
  assert len(record.rounds) == rounds


def test_turns_per_round_numbers_the_turns():
  assert turns_per_round('critique', 'revision')(2) == [
    ('initial', 'initial'),
    ('critique_1', 'critique'),
    ('revision_1', 'revision'),
    ('critique_2', 'critique'),
    ('revision_2', 'revision'),
  ]


def test_variant_name_can_be_registered_only_once(restored_registries):
  with pytest.raises(UserError, match="variant 'critique' is registered twice"):
    register_variant('critique', turns_per_round('revision'))(direct_revision)


BEST_OF_N = '''
"""Sample several revisions in each round and keep the most likely one."""

from cai_jax.feedback.chain import Round, message, register_variant, revise_in_rounds

N = 3


def turns(rounds):
  numbers = [f'{n}_{i}' for n in range(1, rounds + 1) for i in range(N)]
  return [('initial', 'initial'), *((f'revision_{number}', 'revision') for number in numbers)]


@register_variant('best_of_n', turns)
def best_of_n(prompt, principles, stages, growing=False):
  return revise_in_rounds(prompt, principles, stages, growing, revise)


def revise(number, principle, context, stages):
  context.append(message('revision_request', principle.revision_request))
  candidates = []
  for i in range(N):
    reply = yield from stages.revision.ask(f'revision_{number}_{i}', context, 'revision')
    candidates.append(reply)
  return Round(principle, None, max(candidates, key=lambda r: sum(r.completion.logprobs)))
'''

TWO_CRITICS = '''
"""Sample a critique and a second opinion on it before each revision."""

from cai_jax.feedback.chain import (
  Round, message, register_variant, revise_in_rounds, sample_critique, sample_revision,
  turns_per_round,
)


def turns(rounds):
  names = ('critique', 'second_critique', 'revision')
  numbered = [(f'{name}_{n}', name.split('_')[-1]) for n in range(1, rounds + 1) for name in names]
  return [('initial', 'initial'), *numbered]


@register_variant('two_critics', turns)
def two_critics(prompt, principles, stages, growing=False):
  return revise_in_rounds(prompt, principles, stages, growing, revise)


def revise(number, principle, context, stages):
  yield from sample_critique(number, principle, context, stages)
  context.append(message('critique_request', 'What did this critique miss?'))
  second = yield from stages.critique.ask(f'second_critique_{number}', context, 'critique')
  context.append(message('critique', second))
  revision = yield from sample_revision(number, principle, context, stages)
  return Round(principle, second, revision)
'''


@pytest.mark.parametrize(
  ('name', 'source', 'num_turns'), [('best_of_n', BEST_OF_N, 7), ('two_critics', TWO_CRITICS, 7)]
)
def test_plugin_registers_a_variant_in_one_file(
  name, source, num_turns, lm, stages, tmp_path, restored_registries
):
  path = tmp_path / f'{name}.py'
  path.write_text(source)
  load_plugins([str(path)])
  turns, record = yielded_turns(VARIANTS[name], 2, stages)
  assert turns == VARIANTS[name].turns(2) and len(turns) == num_turns
  assert [finished.principle for finished in record.rounds] == list(PRINCIPLES[:2])
  job = make_job(lm, num_harmful=2, num_helpful=1, variant=name)
  counts = generate_shards(job, tmp_path / 'd_cai', Journal(tmp_path / 'journal'), ENGINE)
  assert counts['rows'] == 3 and counts['turns'] == 2 * num_turns + 1


@pytest.mark.parametrize('style', ['chat', 'plain'])
@pytest.mark.parametrize('context', ['fresh', 'growing'])
def test_a_chain_with_a_donor_needs_no_longer_cache_than_the_donors_own(style, context):
  """A critique of another prompt is no longer than a critique of the prompt itself."""
  lm = models.load(MODELS['tiny'])

  def measure(variant):
    job = make_job(lm, variant=variant, style=style, context=context, rounds=3)
    chains = [chain for prompt, kind in job.prompts for chain in job.possible_chains(prompt, kind)]
    return job.length, max(longest_context(chain, job.prefixes)['base'] for chain in chains)

  assert measure('shuffled') == measure('critique')


def test_unknown_variant_is_an_error_that_lists_the_registered_ones():
  with pytest.raises(UserError, match="variant='other'.*'critique'.*'direct'.*'shuffled'"):
    FeedbackConfig(variant='other')
