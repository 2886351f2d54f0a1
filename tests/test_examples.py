"""Examples from D_CAI: which texts become examples, and what is dropped and counted."""

import pytest

from cai_jax.data import d_cai, quality
from cai_jax.data.examples import build_examples
from cai_jax.dialogue import Dialogue
from cai_jax.runtime.errors import UserError


def row(i, num_rounds=2, kind='harmful', finish='stop', text=None):
  reply = lambda name, reason='stop': {'text': f'{name} {i}', 'finish_reason': reason}  # noqa: E731
  rounds = [
    {'principle': 'p', 'critique': reply(f'critique{r}'), 'revision': reply(f'revised{r}')}
    for r in range(num_rounds)
  ]
  if rounds:
    rounds[-1]['revision']['finish_reason'] = finish
    if text is not None:
      rounds[-1]['revision']['text'] = text
  prompt = [{'role': 'user', 'content': f'question {i}'}]
  return {'id': str(i), 'kind': kind, 'prompt': prompt, 'initial': reply('first'), 'rounds': rounds}


@pytest.fixture(scope='module')
def dialogue(tiny_tokenizer):
  return Dialogue(tiny_tokenizer)


def target_texts(dialogue, built):
  return [dialogue.decode([int(t) for t in e.tokens[e.loss_mask]]) for e in built.examples]


def test_the_target_setting_chooses_the_texts(dialogue):
  rows = [row(0), row(1)]
  get = lambda target: target_texts(dialogue, build_examples(rows, dialogue, target=target))  # noqa: E731
  assert get('last') == ['revised1 0', 'revised1 1']
  assert get('all') == ['revised0 0', 'revised1 0', 'revised0 1', 'revised1 1']
  assert get('initial') == ['first 0', 'first 1']


def test_an_example_is_the_rendered_dialogue(dialogue):
  built = build_examples([row(3)], dialogue)
  messages = [*row(3)['prompt'], {'role': 'assistant', 'content': 'revised1 3'}]
  tokens, mask = dialogue.example(messages)
  assert built.examples[0].tokens.tolist() == tokens
  assert built.examples[0].loss_mask.tolist() == [bool(m) for m in mask]


def test_drops_are_counted_by_reason(dialogue):
  rows = [
    row(0),
    row(1, num_rounds=0),
    row(2, finish='length'),
    row(3, text='  '),
    row(4, text='long ' * 200),
    row(5, kind='helpful', num_rounds=0),
  ]
  built = build_examples(rows, dialogue, max_length=64)
  assert built.counts == {
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
  kept = build_examples(rows, dialogue, max_length=64, drop_truncated=False)
  assert kept.counts['kept'] == 2 and 'truncated' not in kept.counts['dropped']


def test_filters_drop_texts_with_a_defect_and_count_the_first_defect(dialogue):
  rows = [row(i) for i in range(4)] + [row(i, 0, 'helpful') for i in range(4, 7)]
  rows[0]['rounds'][1]['revision']['text'] = 'revised0 0'  # as the round before
  rows[1]['rounds'][0]['revision']['text'] = "Here's my revised response: be kind."
  rows[2]['rounds'][1]['revision']['text'] = 'Human: be kind'
  rows[2]['rounds'][1]['revision']['finish_reason'] = 'length'
  rows[3]['initial']['text'] = 'Human: no'
  rows[4]['initial']['text'] = 'Human: yes'
  before = [str(row) for row in rows]
  filters = ('truncated', 'role_marker', 'identical', 'preamble_phrase')

  def get(**options):
    built = build_examples(rows, dialogue, filters=filters, **options)
    return target_texts(dialogue, built), built.counts['dropped']

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
    'filtered_preamble_phrase': 1,
    'filtered_truncated': 1,
    'helpful_not_asked_for': 3,
  }
  filters = ('truncated', 'role_marker', 'identical', 'preamble')  # the former name
  assert get(target='all') == (texts, dropped)
  texts, dropped = get(target='initial')
  assert texts == ['first 0', 'first 1', 'first 2'] and dropped['filtered_role_marker'] == 1
  assert before == [str(row) for row in rows]


def test_some_filters_need_the_constitution(dialogue):
  rows = [row(0), row(1, text='Please point out all that is wrong or rude in it')]
  with pytest.raises(UserError, match='principle_leak compares texts with the constitution'):
    build_examples(rows, dialogue, filters=['principle_leak'])
  references = quality.build_references(
    {'p': ('Point out all that is wrong or rude in it.', 'Mend it.')}
  )
  built = build_examples(rows, dialogue, filters=['principle_leak'], references=references)
  assert built.counts['dropped'] == {'filtered_principle_leak': 1}
  with pytest.raises(UserError, match="'filtered_' means a defect in train.filters"):
    build_examples(rows[1:], dialogue, filters=['principle_leak'], references=references)


def test_helpfulness_share_is_a_share_of_all_examples(dialogue):
  rows = [row(i) for i in range(12)] + [row(i, 0, 'helpful') for i in range(12, 20)]
  options = dict(helpfulness_share=0.25)
  built = build_examples(rows, dialogue, **options)
  assert (built.counts['kept'], built.counts['helpful']) == (16, 4)
  assert built.counts['dropped'] == {'helpful_beyond_share': 4}
  chosen = target_texts(dialogue, built)[12:]
  assert len(set(chosen)) == 4 and all(t.startswith('first') for t in chosen)
  assert chosen == target_texts(dialogue, build_examples(rows, dialogue, **options))[12:]
  others = [
    target_texts(dialogue, build_examples(rows, dialogue, **options, seed=s)) for s in range(5)
  ]
  assert len({tuple(o) for o in others}) > 1
  with pytest.raises(UserError, match='helpfulness_share=0.9.*needs 108 .* has 8'):
    build_examples(rows, dialogue, helpfulness_share=0.9)


def test_an_error_says_why_no_example_remains(dialogue):
  with pytest.raises(UserError, match='No example remains of 2 rows.*no_revision'):
    build_examples([row(0, 0), row(1, 0)], dialogue)
  with pytest.raises(UserError, match='No example remains of 0 rows'):
    build_examples([], dialogue)


def test_examples_are_built_from_a_dataset_on_disk(tmp_path, dialogue):

  def complete_row(i, rounds):
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

  expected = [complete_row(0, 2), complete_row(1, 0), complete_row(2, 1)]
  d_cai.write_shard(tmp_path, 0, expected[:2])
  d_cai.write_shard(tmp_path, 1, expected[2:])
  d_cai.write_metadata(tmp_path, [2, 1])
  rows = d_cai.read_rows(tmp_path)
  assert [rows[i] for i in range(len(rows))] == expected
  assert build_examples(rows, dialogue, target='all').counts['kept'] == 3
  with pytest.raises(UserError, match='no split'):
    d_cai.read_rows(tmp_path, 'test')
  with pytest.raises(UserError, match='holds no TFDS dataset'):
    d_cai.read_rows(tmp_path / 'nowhere')
