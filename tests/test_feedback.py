"""Chains, D_CAI on disk and the implied preferences."""

import dataclasses
import hashlib
import json

import jax
import numpy as np
import pytest
import tensorflow_datasets as tfds
from jax.experimental import multihost_utils

from cai_jax.constitution import Constitution, Principle
from cai_jax.data import d_cai, preferences
from cai_jax.data.prompts import Prompt
from cai_jax.dialogue import Dialogue
from cai_jax.feedback import contexts, generate
from cai_jax.feedback import job as jobs
from cai_jax.feedback.chain import Stage, Stages
from cai_jax.feedback.config import FeedbackConfig, StageSampling
from cai_jax.feedback.variants.critique import critique_revision
from cai_jax.feedback.variants.direct import direct_revision
from cai_jax.feedback.variants.empty import empty_critique
from cai_jax.feedback.variants.shuffled import shuffled_critique
from cai_jax.model.config import ModelConfig
from cai_jax.model.lm import LM
from cai_jax.model.transformer import init_params
from cai_jax.runtime.mesh import make_mesh
from cai_jax.sampling.engine import EngineConfig
from cai_jax.sampling.journal import Journal
from cai_jax.sampling.types import Completion, SamplingConfig

PRINCIPLES = tuple(Principle(f'p{i}', f'What is wrong ({i})?', f'Mend it ({i}).') for i in range(5))
CONSTITUTION = Constitution(PRINCIPLES)
SHORT = SamplingConfig(max_tokens=7)
ENGINE = EngineConfig(slots=4, prefill_tokens=32, prefill_width=16, longest_burst=8)


@pytest.fixture(scope='module')
def lm(tiny_tokenizer):
  config = ModelConfig('llama', len(tiny_tokenizer), 32, 64, 2, 4, 2, 8, 512)
  mesh = make_mesh(devices=jax.devices()[:1])
  params = init_params(config, jax.random.key(0))
  eos = (tiny_tokenizer.eos_token_id,)
  return LM(config, params, tiny_tokenizer, mesh, 'float32', 'random', 'random-0', eos)


def prompt(i):
  return Prompt(f'id-{i}', ({'role': 'user', 'content': f'Question {i}?'},), {'n': str(i)})


def job(lm, count=6, helpful=2, rounds=2, models=None, **config):
  return jobs.prepare(
    models or {'base': lm},
    [prompt(i) for i in range(count)],
    [prompt(100 + i) for i in range(helpful)],
    CONSTITUTION,
    FeedbackConfig(rounds=rounds, shard_rows=3, **config),
    StageSampling(SHORT, SHORT, SHORT),
    seed=0,
  )


def files(folder):
  return {path.name: path.read_bytes() for path in folder.glob('*.array_record-*')}


def play(chain, dialogue, replies):
  """Runs a chain on given texts; the turns it asked for and its record."""
  turns, completion = [], None
  for text in replies:
    turns.append(chain.send(completion))
    tokens = dialogue.reply(text)
    completion = Completion(tokens, text, [-0.5] * len(tokens), 'stop')
  with pytest.raises(StopIteration) as stop:
    chain.send(completion)
  return turns, stop.value.value


@pytest.fixture
def stages(lm):
  stage = Stage('base', Dialogue(lm.tokenizer, 'chat', lm.eos_token_ids), SHORT)
  return Stages(stage, stage, stage)


def test_a_chain_asks_for_each_turn_in_its_context(lm, stages):
  dialogue = stages.initial.dialogue
  chain = critique_revision(prompt(0), PRINCIPLES[:2], stages)
  turns, record = play(chain, dialogue, ['first', 'bad', 'second', 'worse', 'third'])
  assert [t.name for t in turns] == [
    'initial', 'critique_1', 'revision_1', 'critique_2', 'revision_2',
  ]  # fmt: skip
  texts = [lm.tokenizer.decode(t.context) for t in turns]
  assert 'What is wrong (0)?' in texts[1] and 'first' in texts[1]
  assert 'bad' in texts[2] and 'Mend it (0).' in texts[2]
  # A later round sees the latest response as the answer, and nothing of the rounds before.
  assert 'second' in texts[3] and 'What is wrong (1)?' in texts[3]
  assert 'first' not in texts[3] and 'bad' not in texts[3]
  assert [r.revision.text for r in record.rounds] == ['second', 'third']
  assert record.initial.text == 'first' and record.rounds[1].critique.text == 'worse'


def test_within_a_round_each_context_extends_the_cache(lm, stages):
  dialogue = stages.initial.dialogue
  for growing in (False, True):
    chain = critique_revision(prompt(0), PRINCIPLES[:2], stages, growing)
    replies = ['first', 'bad', 'second', 'worse', 'third']
    turns, _ = play(chain, dialogue, replies)
    for number in (1, 2, 3, 4):
      before = turns[number - 1].context + dialogue.reply(replies[number - 1])
      extends = turns[number].context[: len(before)] == before
      assert extends == (growing or number != 3)


def test_an_empty_critique_stands_in_the_context_and_not_in_the_record(lm, stages):
  chain = empty_critique(prompt(0), PRINCIPLES[:2], stages)
  turns, record = play(chain, stages.initial.dialogue, ['first', 'second', 'third'])
  assert [t.name for t in turns] == ['initial', 'revision_1', 'revision_2']
  text = lm.tokenizer.decode(turns[1].context)
  assert 'What is wrong (0)?' in text and 'Mend it (0).' in text
  assert [r.critique for r in record.rounds] == [None, None]


def test_shuffled_critiques_are_those_of_the_donors_chain(lm, stages):
  chain = shuffled_critique(prompt(0), PRINCIPLES[:2], stages, donor=prompt(1))
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


def test_controls_share_y_init_and_leave_helpful_prompts_as_they_are(lm, tmp_path):
  journal = Journal(tmp_path / 'journal')
  generate.generate_shards(job(lm), tmp_path / 'critique', journal, ENGINE)
  journal.refresh()
  for variant, turns in (('empty', 6 * 2), ('shuffled', 6 * (1 + 2 * 2 + 2))):
    whole = job(lm, variant=variant)
    counts = generate.generate_shards(whole, tmp_path / variant, journal, ENGINE)
    generate.finish_dataset(whole, tmp_path / variant)
    assert (counts['turns'], counts['replayed_turns']) == (turns, 6 + 2)
    rows = list(d_cai.read_rows(tmp_path / variant))
    assert [len(row['rounds']) for row in rows] == [2] * 6 + [0] * 2
  with pytest.raises(ValueError, match='there is only one'):
    job(lm, count=1, variant='shuffled')


def test_direct_revision_has_no_critique(lm, stages):
  turns, record = play(
    direct_revision(prompt(0), PRINCIPLES[:2], stages), stages.initial.dialogue, ['a', 'b', 'c']
  )
  assert [t.name for t in turns] == ['initial', 'revision_1', 'revision_2']
  assert all(step.critique is None for step in record.rounds)
  assert 'wrong' not in lm.tokenizer.decode(turns[2].context)


def test_another_models_reply_is_passed_on_as_text(lm, stages):
  critic = dataclasses.replace(stages.critique, model='critique')
  chain = critique_revision(prompt(0), PRINCIPLES[:1], dataclasses.replace(stages, critique=critic))
  turn = chain.send(None)
  tokens = lm.tokenizer.encode(' cut off ')
  cut = Completion(tokens, ' cut off ', [0.0] * len(tokens), 'length')
  turn = chain.send(cut)
  expected = critic.dialogue.prompt(
    [
      *prompt(0).messages,
      {'role': 'assistant', 'content': 'cut off'},
      {'role': 'critique_request', 'content': PRINCIPLES[0].critique_request},
    ],
    'critique',
  )
  assert turn.model == 'critique' and turn.context == expected


def test_d_cai_is_a_dataset_with_every_text_of_its_chains(lm, tmp_path):
  it = job(lm)
  counts = generate.generate_shards(it, tmp_path / 'd_cai', Journal(tmp_path / 'journal'), ENGINE)
  generate.finish_dataset(it, tmp_path / 'd_cai')
  assert counts['rows'] == 8 and counts['turns'] == 6 * 5 + 2
  builder = tfds.builder_from_directory(tmp_path / 'd_cai')
  assert builder.info.splits['train'].num_examples == 8
  rows = d_cai.read_rows(tmp_path / 'd_cai')
  assert [row['id'] for row in rows] == [*(f'id-{i}' for i in range(6)), 'id-100', 'id-101']
  for row in rows:
    assert len(row['rounds']) == (2 if row['kind'] == 'harmful' else 0)
    turns = [row['initial']]
    turns += [step[part] for step in row['rounds'] for part in ('critique', 'revision')]
    assert len(row['logprobs']) == sum(turn['num_tokens'] for turn in turns)
    first = row['logprobs'][: turns[0]['num_tokens']]
    assert turns[0]['logprob'] == pytest.approx(sum(first), rel=1e-5)
    assert all(turn['finish_reason'] in ('stop', 'length') for turn in turns)
    assert row['model'] == row['critique_model'] == 'random' and row['seed'] == 0
    assert json.loads(row['metadata'])['n'] in row['id']
    assert row['constitution'] == CONSTITUTION.fingerprint()
  drawn = {step['principle'] for row in rows for step in row['rounds']}
  assert len(drawn) > 1 and drawn <= {p.id for p in PRINCIPLES}


def test_a_run_that_was_cut_off_writes_the_same_bytes(lm, tmp_path):
  whole = tmp_path / 'whole'
  generate.generate_shards(job(lm), whole, Journal(tmp_path / 'a'), ENGINE)

  class CutOff(Exception):
    pass

  for stop_at in (1, 3, 5, 7):
    folder, journal = tmp_path / f'{stop_at}', Journal(tmp_path / f'journal-{stop_at}')

    def progress(done, total, tokens, stop_at=stop_at):
      if done == stop_at:
        raise CutOff

    with pytest.raises(CutOff):
      generate.generate_shards(job(lm), folder, journal, ENGINE, progress)
    journal.close()
    counts = generate.generate_shards(
      job(lm), folder, Journal(tmp_path / f'journal-{stop_at}'), ENGINE
    )
    assert counts['turns'] < 32
    assert files(folder) == files(whole)


def test_arms_share_what_they_have_in_common(lm, tmp_path):
  journal = Journal(tmp_path / 'journal')
  generate.generate_shards(job(lm), tmp_path / 'two', journal, ENGINE)
  more = generate.generate_shards(job(lm, rounds=3), tmp_path / 'three', journal, ENGINE)
  assert more['replayed_turns'] == 6 * 5 + 2 and more['turns'] == 6 * 2
  direct = generate.generate_shards(job(lm, variant='direct'), tmp_path / 'direct', journal, ENGINE)
  assert direct['replayed_turns'] == 8 and direct['turns'] == 6 * 2


def test_other_models_criticise_and_revise(lm, tmp_path):
  other = dataclasses.replace(
    lm, params=jax.tree.map(lambda x: -x, lm.params), name='other', fingerprint='other'
  )
  it = job(lm, models={'base': lm, 'critique': other})
  generate.generate_shards(it, tmp_path / 'd_cai', Journal(tmp_path / 'journal'), ENGINE)
  generate.finish_dataset(it, tmp_path / 'd_cai')
  row = d_cai.read_rows(tmp_path / 'd_cai')[0]
  assert (row['model'], row['critique_model'], row['revision_model']) == (
    'random', 'other', 'random',
  )  # fmt: skip
  same = job(lm)
  generate.generate_shards(same, tmp_path / 'same', Journal(tmp_path / 'journal2'), ENGINE)
  generate.finish_dataset(same, tmp_path / 'same')
  alone = d_cai.read_rows(tmp_path / 'same')[0]
  assert row['initial'] == alone['initial']
  assert row['rounds'][0]['critique'] != alone['rounds'][0]['critique']


def test_preferences_leave_out_pairs_that_say_nothing(tmp_path):
  turn = lambda text: {'text': text}  # noqa: E731

  def row(name, *texts):
    rounds = [{'revision': turn(text)} for text in texts[1:]]
    message = {'role': 'user', 'content': 'hi'}
    return {'id': name, 'prompt': [message], 'initial': turn(texts[0]), 'rounds': rounds}

  rows = [row('a', 'x', 'y', 'z'), row('b', 'x', 'y', 'x'), row('c', 'x', ''), row('d', 'x')]
  counts = preferences.write_preferences(tmp_path / 'p.jsonl', rows)
  assert counts == {'written': 1, 'identical': 1, 'empty': 1, 'not_revised': 1}
  (line,) = (tmp_path / 'p.jsonl').read_text().splitlines()
  assert json.loads(line) == {
    'id': 'a',
    'prompt': [{'role': 'user', 'content': 'hi'}],
    'chosen': [{'role': 'assistant', 'content': 'z'}],
    'rejected': [{'role': 'assistant', 'content': 'x'}],
  }


def test_what_cannot_work_is_an_error_before_sampling(lm, tmp_path):
  with pytest.raises(ValueError, match='can reach .* tokens, but random holds 512'):
    long = Prompt('long', ({'role': 'user', 'content': 'word ' * 600},))
    jobs.prepare(
      {'base': lm}, [long], [], CONSTITUTION, FeedbackConfig(),
      StageSampling(SHORT, SHORT, SHORT), 0,
    )  # fmt: skip
  with pytest.raises(ValueError, match="Two prompts have the id 'id-0'"):
    jobs.prepare(
      {'base': lm}, [prompt(0)], [prompt(0)], CONSTITUTION, FeedbackConfig(),
      StageSampling(SHORT, SHORT, SHORT), 0,
    )  # fmt: skip
  with pytest.raises(ValueError, match='without repetition'):
    job(lm, rounds=6, repeat_principles=False)
  with pytest.raises(ValueError, match='variant'):
    FeedbackConfig(variant='other')
  with pytest.raises(ValueError, match='shards are missing'):
    d_cai.write_metadata(tmp_path, [3])


def test_demonstrations_stand_before_critiques_and_revisions_only(lm):
  shown = ({'role': 'user', 'content': 'Shown?'}, {'role': 'assistant', 'content': 'Shown.'})
  constitution = Constitution(PRINCIPLES, (shown,))
  for used in (True, False):
    config = FeedbackConfig(demonstrations=used)
    made = jobs.make_stages({'base': lm}, constitution, config, StageSampling())
    chain = critique_revision(prompt(0), PRINCIPLES[:1], made)
    turns, _ = play(chain, made.initial.dialogue, ['first', 'bad', 'second'])
    texts = [lm.tokenizer.decode(turn.context) for turn in turns]
    assert ['Shown?' in text for text in texts] == [False, used, used]


def test_ids_decide_the_principles(lm, tmp_path):
  drawn = {}
  for name, it in (('more', job(lm)), ('fewer', job(lm, count=3))):
    generate.generate_shards(it, tmp_path / name, Journal(tmp_path / 'journal'), ENGINE)
    generate.finish_dataset(it, tmp_path / name)
    rows = d_cai.read_rows(tmp_path / name)
    drawn[name] = {r['id']: [step['principle'] for step in r['rounds']] for r in rows}
  assert drawn['fewer'].items() <= drawn['more'].items()


def test_shards_of_another_job_are_not_taken_over(lm, tmp_path):
  generate.generate_shards(job(lm), tmp_path, Journal(tmp_path / 'journal'), ENGINE)
  other = dataclasses.replace(lm, fingerprint='trained since')
  with pytest.raises(ValueError, match='shards of another job'):
    generate.generate_shards(job(other), tmp_path, Journal(tmp_path / 'journal'), ENGINE)


def test_the_bound_counts_what_other_models_are_shown(lm, tiny_tokenizer):
  long = SamplingConfig(max_tokens=96)
  sampling = StageSampling(long, long, long)
  lengths = [
    jobs.prepare(
      models, [prompt(0)], [], CONSTITUTION, FeedbackConfig(rounds=1), sampling, 0
    ).length
    for models in ({'base': lm}, {'base': lm, 'critique': dataclasses.replace(lm, name='other')})
  ]
  assert lengths[1] >= lengths[0] - 64


class Lost(Exception):
  """The process died."""


@pytest.fixture
def start(lm, tmp_path, monkeypatch):
  """`start(process, count, ...)`: what one of several processes does, one after the other.

  Process 0 comes first; the others are told what it found, as the broadcast would.
  """
  told = []

  def broadcast(there):
    if jax.process_index() == 0:
      told[:] = [np.array(there)]
    return told[0]

  monkeypatch.setattr(multihost_utils, 'broadcast_one_to_all', broadcast)

  def run(process, count, folder='d_cai', lost_after=None, it=None):
    monkeypatch.setattr(jax, 'process_index', lambda: process)
    monkeypatch.setattr(jax, 'process_count', lambda: count)

    def progress(done, total, tokens):
      if done == lost_after:
        raise Lost

    it = it or job(lm, count=13, helpful=2)
    journal = Journal(tmp_path / f'journal-{folder}', process)
    return generate.generate_shards(it, tmp_path / folder, journal, ENGINE, progress)

  return run


def test_a_lost_process_share_is_dealt_out_among_those_that_start_next(lm, start, tmp_path):
  start(0, 1, 'whole')
  whole = files(tmp_path / 'whole')
  assert len(whole) == 5
  # The first of four processes does its share of two shards, another is lost on its way, two never
  # begin.
  assert start(0, 4)['sampled_rows'] == 6
  with pytest.raises(Lost):
    start(1, 4, lost_after=2)
  assert len(files(tmp_path / 'd_cai')) == 2
  # Two processes share what is missing, of which a fixed deal would give one of them all but one.
  # The second is told what was missing before the first began.
  first, second = start(0, 2), start(1, 2)
  assert (first['sampled_rows'], second['sampled_rows']) == (6, 3)
  # Both read the journal of the lost one.
  assert first['replayed_turns'] + second['replayed_turns'] >= 2
  assert files(tmp_path / 'd_cai') == whole
  assert [path.name for path in (tmp_path / 'd_cai').glob('*.tmp')] == []
  generate.finish_dataset(job(lm, count=13, helpful=2), tmp_path / 'd_cai')
  assert len(d_cai.read_rows(tmp_path / 'd_cai')) == 15
  assert start(0, 3)['sampled_rows'] == 0


def test_more_processes_than_missing_shards(start, tmp_path):
  start(0, 1, 'whole')
  assert [start(i, 7)['sampled_rows'] for i in range(7)] == [3, 3, 3, 3, 3, 0, 0]
  assert files(tmp_path / 'd_cai') == files(tmp_path / 'whole')


def test_every_process_checks_that_it_works_on_the_same_job(lm, start, tmp_path):
  start(0, 2)
  with pytest.raises(ValueError, match='shards of another job'):
    start(1, 2, it=job(lm, count=12, helpful=3))
  (tmp_path / 'd_cai' / 'job.json').unlink()
  with pytest.raises(ValueError, match='Process 1 does not see .* filesystem that they share'):
    start(1, 2)


def test_the_digest_of_a_job_is_that_of_its_parts_as_one_text(lm):
  it = job(lm)
  config = dataclasses.asdict(it.config)
  del config['max_rate']  # no row depends on it
  parts = [config, [], it.constitution.fingerprint(), it.seed, []]
  for name, stage in it.stages.by_name().items():
    parts[1].append([name, stage.sampling, stage.demonstrations, 'random-0'])
  parts[4] = [[p.id, p.messages, p.metadata, kind] for p, kind in it.prompts]
  text = json.dumps(parts, default=dataclasses.asdict, sort_keys=True)
  assert it.digest() == hashlib.sha256(text.encode()).hexdigest()
  assert it.digest() == job(lm, max_rate={'preamble': 0.5}).digest()


def test_prompts_that_are_answered_several_times_have_ids_of_their_own():
  prompts = jobs.repeat_prompts([prompt(0), prompt(1)], 3)
  assert [p.id for p in prompts] == ['id-0', 'id-0/2', 'id-0/3', 'id-1', 'id-1/2', 'id-1/3']
  assert {p.messages[0]['content'] for p in prompts[:3]} == {'Question 0?'}
  assert jobs.repeat_prompts([prompt(0)], 1) == [prompt(0)]


def test_demonstrations_are_computed_once_and_change_no_text(lm, tmp_path, monkeypatch):
  shown = (
    (
      {'role': 'user', 'content': 'Is it far to the station from the old mill?'},
      {'role': 'assistant', 'content': 'It is a long way on foot.'},
      {'role': 'critique_request', 'content': 'What is wrong with this?'},
      {'role': 'critique', 'content': 'It says no number.'},
    ),
  )
  constitution = Constitution(PRINCIPLES[:2], shown)

  def made():
    return jobs.prepare(
      {'base': lm},
      [prompt(i) for i in range(4)],
      [],
      constitution,
      FeedbackConfig(rounds=1, shard_rows=2),
      StageSampling(SHORT, SHORT, SHORT),
      seed=0,
    )

  with_prefix = made()
  monkeypatch.setattr(contexts, 'MIN_PREFIX_TOKENS', 10**6)
  without = made()
  assert without.prefixes == {'base': []}
  (prefix,) = with_prefix.prefixes['base']
  text = lm.tokenizer.decode(prefix)
  assert text.count('It says no number.') == 1 and 'Question' not in text
  assert 0 < with_prefix.length <= without.length - len(prefix) // 64 * 64
  stats = {}
  for name, job_made in (('with', with_prefix), ('without', without)):
    journal = Journal(tmp_path / name / 'journal')
    stats[name] = generate.generate_shards(job_made, tmp_path / name / 'd_cai', journal, ENGINE)
    generate.finish_dataset(job_made, tmp_path / name / 'd_cai')
  assert stats['with']['shared_tokens'] == 4 * 2 * len(prefix)
  assert stats['with']['prefilled_tokens'] < stats['without']['prefilled_tokens']
  ours, plain = (
    [[r['initial']['text'], *(s['revision']['text'] for s in r['rounds'])] for r in rows]
    for rows in (d_cai.read_rows(tmp_path / name / 'd_cai') for name in ('with', 'without'))
  )
  assert ours == plain


def test_a_prompt_that_begins_otherwise_has_room_without_the_prefix(lm, tmp_path):
  shown = tuple(
    (
      {'role': 'user', 'content': f'Is it far to the station from mill number {i}?'},
      {'role': 'assistant', 'content': 'It is a long way on foot.'},
    )
    for i in range(3)
  )
  own = {'role': 'system', 'content': 'Answer in a few plain words.'}
  odd = Prompt('odd', (own, {'role': 'user', 'content': 'Why?'}), {})
  made = jobs.prepare(
    {'base': lm},
    [*(prompt(i) for i in range(contexts.RENDERED_PROMPTS)), odd],
    [],
    Constitution(PRINCIPLES, shown),
    FeedbackConfig(rounds=1),
    StageSampling(SHORT, SHORT, SHORT),
    seed=0,
  )
  assert made.prefixes['base']
  only = dataclasses.replace(made, prompts=made.prompts[-1:])
  counts = generate.generate_shards(only, tmp_path / 'd_cai', Journal(tmp_path / 'journal'), ENGINE)
  assert counts['chains'] == 1 and counts['shared_tokens'] == 0


def test_one_checkpoint_for_critique_and_revision_is_one_model(lm):
  other = dataclasses.replace(lm, name='other', fingerprint='other')
  made = job(lm, models={'base': lm, 'critique': other, 'revision': other})
  assert (made.stages.initial.model, made.stages.critique.model) == ('base', 'critique')
  assert made.stages.revision.model == 'critique'
