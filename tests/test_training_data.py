"""D_CAI to batches: which examples, what is dropped and counted, and where every token stands."""

import collections

import numpy as np
import pytest

from cai_jax.data import d_cai, examples, packing, quality
from cai_jax.dialogue import Dialogue


def row(i, rounds=2, kind='harmful', finish='stop', text=None):
  reply = lambda name, reason='stop': {'text': f'{name} {i}', 'finish_reason': reason}  # noqa: E731
  made = [
    {'principle': 'p', 'critique': reply(f'critique{r}'), 'revision': reply(f'revised{r}')}
    for r in range(rounds)
  ]
  if made:
    made[-1]['revision']['finish_reason'] = finish
    if text is not None:
      made[-1]['revision']['text'] = text
  prompt = [{'role': 'user', 'content': f'question {i}'}]
  return {'id': str(i), 'kind': kind, 'prompt': prompt, 'initial': reply('first'), 'rounds': made}


@pytest.fixture(scope='module')
def dialogue(tiny_tokenizer):
  return Dialogue(tiny_tokenizer)


def targets(dialogue, found):
  return [dialogue.decode([int(t) for t in e.tokens[e.loss_mask]]) for e in found.items]


def test_targets(dialogue):
  rows = [row(0), row(1)]
  get = lambda target: targets(dialogue, examples.build_examples(rows, dialogue, target=target))  # noqa: E731
  assert get('last') == ['revised1 0', 'revised1 1']
  assert get('all') == ['revised0 0', 'revised1 0', 'revised0 1', 'revised1 1']
  assert get('initial') == ['first 0', 'first 1']


def test_an_example_is_the_dialogues(dialogue):
  found = examples.build_examples([row(3)], dialogue)
  messages = [*row(3)['prompt'], {'role': 'assistant', 'content': 'revised1 3'}]
  tokens, mask = dialogue.example(messages)
  assert found.items[0].tokens.tolist() == tokens
  assert found.items[0].loss_mask.tolist() == [bool(m) for m in mask]


def test_drops_are_counted_by_reason(dialogue):
  rows = [
    row(0),
    row(1, rounds=0),
    row(2, finish='length'),
    row(3, text='  '),
    row(4, text='long ' * 200),
    row(5, kind='helpful', rounds=0),
  ]
  found = examples.build_examples(rows, dialogue, max_length=64)
  assert found.counts == {
    'rows': 6,
    'kept': 1,
    'helpful': 0,
    'dropped': {
      'empty': 1,
      'helpful_not_asked_for': 1,
      'no_revision': 1,
      'too_long': 1,
      'truncated': 1,
    },
  }
  kept = examples.build_examples(rows, dialogue, max_length=64, drop_truncated=False)
  assert kept.counts['kept'] == 2 and 'truncated' not in kept.counts['dropped']


def test_filters_leave_out_what_has_a_defect_and_count_its_first(dialogue):
  rows = [row(i) for i in range(4)] + [row(i, 0, 'helpful') for i in range(4, 7)]
  rows[0]['rounds'][1]['revision']['text'] = 'revised0 0'  # as the round before
  rows[1]['rounds'][0]['revision']['text'] = "Here's my revised response: be kind."
  rows[2]['rounds'][1]['revision']['text'] = 'Human: be kind'
  rows[2]['rounds'][1]['revision']['finish_reason'] = 'length'
  rows[3]['initial']['text'] = 'Human: no'
  rows[4]['initial']['text'] = 'Human: yes'
  before = [str(row) for row in rows]
  filters = ('truncated', 'role_marker', 'identical', 'preamble')

  def get(**options):
    found = examples.build_examples(rows, dialogue, filters=filters, **options)
    return targets(dialogue, found), found.counts['dropped']

  texts, dropped = get(target='last', helpfulness_share=0.25)
  assert texts[:2] == ['revised1 1', 'revised1 3'] and texts[2:] in (['first 5'], ['first 6'])
  assert dropped == {
    'filtered_identical': 1,
    'filtered_role_marker': 1,
    'filtered_truncated': 1,
    'helpful_beyond_share': 1,
  }
  texts, dropped = get(target='all')
  assert texts == ['revised0 0', 'revised1 1', 'revised0 2', 'revised0 3', 'revised1 3']
  assert dropped == {
    'filtered_identical': 1,
    'filtered_preamble': 1,
    'filtered_truncated': 1,
    'helpful_not_asked_for': 3,
  }
  texts, dropped = get(target='initial')
  assert texts == ['first 0', 'first 1', 'first 2'] and dropped['filtered_role_marker'] == 1
  assert before == [str(row) for row in rows]


def test_filters_that_need_the_constitution_are_told_by_it(dialogue):
  rows = [row(0), row(1, text='Please point out all that is wrong or rude in it')]
  with pytest.raises(ValueError, match='principle_leak is told by the principles'):
    examples.build_examples(rows, dialogue, filters=['principle_leak'])
  known = quality.build_references(
    {'p': ('Point out all that is wrong or rude in it.', 'Mend it.')}
  )
  found = examples.build_examples(rows, dialogue, filters=['principle_leak'], known=known)
  assert found.counts['dropped'] == {'filtered_principle_leak': 1}
  with pytest.raises(ValueError, match="'filtered_' have a defect of train.filters"):
    examples.build_examples(rows[1:], dialogue, filters=['principle_leak'], known=known)


def test_helpfulness_share_is_of_all_examples(dialogue):
  rows = [row(i) for i in range(12)] + [row(i, 0, 'helpful') for i in range(12, 20)]
  options = dict(helpfulness_share=0.25)
  found = examples.build_examples(rows, dialogue, **options)
  assert (found.counts['kept'], found.counts['helpful']) == (16, 4)
  assert found.counts['dropped'] == {'helpful_beyond_share': 4}
  chosen = targets(dialogue, found)[12:]
  assert len(set(chosen)) == 4 and all(t.startswith('first') for t in chosen)
  assert chosen == targets(dialogue, examples.build_examples(rows, dialogue, **options))[12:]
  others = [
    targets(dialogue, examples.build_examples(rows, dialogue, **options, seed=s)) for s in range(5)
  ]
  assert len({tuple(o) for o in others}) > 1
  with pytest.raises(ValueError, match='helpfulness_share=0.9.*needs 108 .* has 8'):
    examples.build_examples(rows, dialogue, helpfulness_share=0.9)


def test_no_example_is_an_error_that_says_why(dialogue):
  with pytest.raises(ValueError, match='no example is left of 2 rows.*no_revision'):
    examples.build_examples([row(0, 0), row(1, 0)], dialogue)
  with pytest.raises(ValueError, match='no example is left of 0 rows'):
    examples.build_examples([], dialogue)


def test_rows_of_a_tfds_dataset(tmp_path, dialogue):

  def written(i, rounds):
    made = row(i, rounds)
    turn = lambda reply: {**reply, 'logprob': -1.5, 'num_tokens': 3}  # noqa: E731
    return {
      **made,
      'metadata': '{}',
      'initial': turn(made['initial']),
      'rounds': [
        {'principle': 'ä', 'critique': turn(r['critique']), 'revision': turn(r['revision'])}
        for r in made['rounds']
      ],
      'logprobs': [0.5, 0.25],
      'seed': 1,
      'model': 'm',
      'critique_model': 'm',
      'revision_model': 'm',
      'constitution': 'c',
    }

  wanted = [written(0, 2), written(1, 0), written(2, 1)]
  d_cai.write_shard(tmp_path, 0, wanted[:2])
  d_cai.write_shard(tmp_path, 1, wanted[2:])
  d_cai.write_metadata(tmp_path, [2, 1])
  rows = d_cai.read_rows(tmp_path)
  assert [rows[i] for i in range(len(rows))] == wanted
  assert examples.build_examples(rows, dialogue, target='all').counts['kept'] == 3
  with pytest.raises(ValueError, match='no split'):
    d_cai.read_rows(tmp_path, 'test')
  with pytest.raises(ValueError, match='holds no TFDS dataset'):
    d_cai.read_rows(tmp_path / 'nowhere')


LENGTHS = np.random.default_rng(0).integers(3, 33, 400)


def test_pack_puts_each_example_into_one_row_that_holds_it():
  order = np.random.default_rng(1).permutation(len(LENGTHS))
  rows = packing.pack(LENGTHS, order, 40)
  assert sorted(i for r in rows for i in r) == list(range(len(LENGTHS)))
  assert all(0 < sum(LENGTHS[i] for i in r) <= 40 for r in rows)
  assert len(rows) < 1.1 * LENGTHS.sum() / 40  # little padding


@pytest.mark.parametrize(
  'buckets',
  [
    [packing.Bucket(32, 8)],
    [packing.Bucket(64, 4)],
    [packing.Bucket(32, 4), packing.Bucket(16, 8)],
  ],
)
def test_every_example_is_seen_once_an_epoch(buckets):
  steps = packing.plan(LENGTHS, buckets, epochs=3, seed=5)
  seen = collections.Counter(i for step in steps for r in step.rows for i in r)
  assert seen == {i: 3 for i in range(len(LENGTHS))}
  first = [i for step in steps[: len(steps) // 3 - 2] for r in step.rows for i in r]
  assert len(first) == len(set(first))
  for step in steps:
    assert step.bucket in buckets and 0 < len(step.rows) <= step.bucket.rows
    assert all(sum(LENGTHS[i] for i in r) <= step.bucket.length for r in step.rows)
  assert steps == packing.plan(LENGTHS, buckets, epochs=3, seed=5)
  assert steps != packing.plan(LENGTHS, buckets, epochs=3, seed=6)


def test_an_example_stands_in_the_shortest_rows_that_hold_it():
  for step in packing.plan(LENGTHS, [packing.Bucket(32, 4), packing.Bucket(16, 8)], 1, 0):
    lengths = [LENGTHS[i] for r in step.rows for i in r]
    assert max(lengths) <= 16 if step.bucket.length == 16 else min(lengths) > 16


def test_plan_refuses_what_does_not_fit():
  with pytest.raises(ValueError, match='32 tokens does not fit rows of 31'):
    packing.plan([4, 32], [packing.Bucket(31, 2)], 1, 0)
  with pytest.raises(ValueError, match='no example'):
    packing.plan([], [packing.Bucket(31, 2)], 1, 0)


def test_a_batch_holds_each_example_whole_and_padding_is_zero():
  rng = np.random.default_rng(2)
  items = [
    examples.Example(rng.integers(1, 99, n).astype(np.int32), rng.random(n) < 0.5)
    for n in LENGTHS[:60]
  ]
  steps = packing.plan([len(i.tokens) for i in items], [packing.Bucket(48, 7)], 1, 0)
  batches = packing.Batches(items, steps)
  assert min(len(step.rows) for step in steps) < 7  # one is filled up with empty rows
  held = 0
  for step, batch in zip(steps, batches, strict=True):
    for name in batch:
      assert batch[name].shape == (7, 48) and batch[name].dtype == np.int32
      assert not batch[name][batch['segment_ids'] == 0].any()
    for r, indices in enumerate(step.rows):
      for segment, i in enumerate(indices, start=1):
        here = batch['segment_ids'][r] == segment
        np.testing.assert_array_equal(batch['tokens'][r, here], items[i].tokens)
        np.testing.assert_array_equal(batch['loss_mask'][r, here], items[i].loss_mask)
        np.testing.assert_array_equal(batch['positions'][r, here], np.arange(here.sum()))
        held += here.sum()
  assert packing.padding_share(items, steps) == pytest.approx(1 - held / (len(steps) * 7 * 48))


def test_the_iterator_goes_on_where_its_state_was():
  items = [examples.Example(np.full(4, i, np.int32), np.ones(4, bool)) for i in range(40)]
  batches = packing.Batches(items, packing.plan([4] * 40, [packing.Bucket(8, 2)], 1, 0))
  it = packing.iterate(batches, lambda b: b['tokens'])
  for _ in range(3):
    next(it)
  state = it.get_state()
  rest = [x.tolist() for x in it]
  again = packing.iterate(batches, lambda b: b['tokens'])
  again.set_state(state)
  assert [x.tolist() for x in again] == rest and len(rest) == len(batches) - 3


def test_pretraining_documents_are_learnt_whole():
  import transformers

  from cai_jax.tiny import corpus, files, pretrain

  dialogue = Dialogue(transformers.PreTrainedTokenizerFast.from_pretrained(files.MODELS['tiny']))
  items, counts = pretrain.make_examples(dialogue, 3000, seed=1)
  assert counts['tokens'] == sum(len(i.tokens) for i in items) >= 3000
  assert counts['documents'] == len(items) and all(i.loss_mask.all() for i in items)
  first = corpus.make_document(1, 0)
  assert items[0].tokens.tolist() == dialogue.prompt(
    first[:-1], first[-1]['role']
  ) + dialogue.reply(first[-1]['content'], first[-1]['role'])
