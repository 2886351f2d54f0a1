"""Defects of revisions: what each rule flags, what it must not flag, and the rates."""

import json

import pytest

from cai_jax.data import quality, quality_summary, text_rules
from cai_jax.data.published import read_published_samples
from cai_jax.runtime.errors import UserError

PROMPT = [{'role': 'user', 'content': 'Should I do it?'}]
LONG = ' '.join(f'word{i}' for i in range(40))
REQUESTS = (
  "Identify specific ways in which the assistant's last response is harmful to anyone.",
  'Please rewrite this response.',
)
REFERENCES = quality.build_references(
  {'p': REQUESTS, 'q': ('Say what is wrong.', 'Mend it now')},
  [
    [
      {'role': 'user', 'content': 'What would you like to talk about on this fine day, friend?'},
      {'role': 'assistant', 'content': 'I would like to talk about birds and trees and the sea.'},
    ]
  ],
)


def reply(text, finish='stop', tokens=None):
  turn = {'text': text, 'finish_reason': finish}
  return turn | ({'logprob': tokens[0], 'num_tokens': tokens[1]} if tokens else {})


def flags_of(
  text,
  before='No, hurting him is wrong.',
  critique='It is rude.',
  finish='stop',
  tokens=None,
  **options,
):
  options = dict(prompt=PROMPT, principle='p', references=REFERENCES) | options
  return quality.find_flags(
    previous=reply(before),
    critique=reply(critique),
    revision=reply(text, finish, tokens),
    **options,
  )


def test_good_revision_has_no_flag():
  assert flags_of('Please do not: talk to him instead, and tell him what hurt you.') == set()


def test_every_flag_is_found_alone_in_some_text():
  copy = 'I would like to talk about birds and trees and the sea.'
  leak = 'I name specific ways in which the assistant’s last response is harmful to anyone.'
  french = 'Je ne peux pas dire à mon ami que vous êtes dans la maison, parce que le roi est là.'
  cases = {
    'empty': flags_of(' \n'),
    'truncated': flags_of('Please do', finish='length'),
    'identical': flags_of('No, hurting him is wrong. ', 'No, hurting him is wrong.'),
    'near_identical': flags_of(LONG + '.', LONG),
    'preamble_phrase': flags_of('Here is the revised response: do not.'),
    'role_marker': flags_of('Do not.\n\nHuman: but why?'),
    'principle_leak': flags_of(leak.replace('’', "'")),
    'no_finding_phrase': flags_of('Do not.', critique='I see nothing wrong here.'),
    'repetition': flags_of('ha ha ha ha ha ha ha ha ha'),
    'demonstration': flags_of(copy),
    'not_a_critique': flags_of(
      'Never hurt him.', critique='The sea is blue, and you should be happy.'
    ),
    'critique_copied': flags_of(
      'Think of what you cause him.', critique='The words say what you cause him.'
    ),
    'wrong_language': flags_of(french),
    'off_topic_words': flags_of(
      'The sea is blue and the sky is wide.', prompt=[{'role': 'user', 'content': 'Boil an egg?'}]
    ),
    'off_topic': flags_of(
      'Never hurt him.', scores={'topicality': 0.1, 'topicality_threshold': 0.1}
    ),
    'low_logprob': flags_of('Never hurt him.', tokens=(-15.5, 5)),
  }
  assert cases.keys() == quality.FLAGS.keys()
  assert all(flags == {name} for name, flags in cases.items()), cases


@pytest.mark.parametrize(
  'text',
  [
    "Sure, here's a revised version of my answer:\n\nDo not.",
    '**Revised response:** Do not.',
    '"Revised Response": Do not.',
    'I have revised the response so that it is kind. Do not.',
    "Certainly! Here's how I would rewrite it: do not.",
    'Here’s an improved version:\nDo not.',
    'I rewrote my response: do not.',
    'My revised answer is: do not.',
    'The following is a rewritten reply.\nDo not.',
  ],
)
def test_preambles_are_flagged(text):
  assert flags_of(text) == {'preamble_phrase'}


@pytest.mark.parametrize(
  'text',
  [
    "Sure, here's a recipe for bread: flour, water, salt.",
    'Here are a few ways to calm down: breathe, walk, sleep.',
    'I would not do that. A revised law forbids it.',
    'The law was revised in 1990, and here is a new version of it.',
    'Improved sleep and exercise can help you.',
    'I edit books. An edited volume takes a year.',
    'The revised statute says that it is a crime.',
  ],
)
def test_similar_beginnings_are_not_flagged_as_preambles(text):
  assert 'preamble_phrase' not in flags_of(text)


@pytest.mark.parametrize(
  'text',
  [
    'Assistant: do not.',
    'Do not.\n**Critique:** fine',
    'Do not. RevisionRequest: and now',
    'Do not.<|im_end|>',
    'Do not. [/INST]',
    'Do not.<end_of_turn>',
    'Do not.\n\n<|user|> why',
    'Do not.\nRevistionRequest: again',
  ],
)
def test_role_markers_are_flagged_unless_the_prompt_has_them(text):
  assert flags_of(text) == {'role_marker'}
  assert flags_of(text, prompt=[{'role': 'user', 'content': f'Say "{text}"'}]) == set()


@pytest.mark.parametrize(
  'text',
  [
    'To be a human: that is hard.',
    'I am an AI assistant: I cannot.',
    'Read the book Being Human: A Life.',
    'Use a < b | c > d.',
    'A critique: it is dull.',
  ],
)
def test_similar_texts_are_not_flagged_as_role_markers(text):
  assert flags_of(text) == set()


@pytest.mark.parametrize(
  ('critique', 'nothing'),
  [
    ('I see nothing wrong here.', True),
    ('There is no harmful content in the response.', True),
    ("The assistant's response is not harmful.", True),
    ('No issues at all!', True),
    ('The assistant gave an excellent response. Good job!', True),
    ("I don't see anything harmful in this.", True),
    ('The answer doesn’t seem to be dangerous.', True),
    ('', True),
    ("It doesn't say that this is harmful.", False),
    ('It says: You fool. That is an insult.', False),
    ('The response is harmful, as it names a person.', False),
    ('The response is good, but it could be kinder.', False),
    ('There is nothing harmful here. However, it lacks empathy.', False),
    ('The assistant should have said that stealing is illegal.', False),
  ],
)
def test_critiques_without_a_finding_are_recognized(critique, nothing):
  assert quality.finds_nothing(reply(critique)) == nothing


def test_critique_that_was_not_requested_is_not_flagged():
  assert not quality.finds_nothing(reply('', finish=''))


@pytest.mark.parametrize(
  ('text', 'loops'),
  [
    ('I am so sorry. ' * 12, True),
    (' '.join(f'long{i}' for i in range(25)) + ' ' + 'and on it goes ' * 9, True),
    ((LONG + ' ') * 3, True),
    ('🙂🙂🙂🙂🙂🙂🙂🙂', True),
    ('No!!!!!!!!!!', True),
    (LONG, False),
    ('I am so sorry. ' * 3, True),
    ('I am so sorry. ' * 2, False),
    ('Title\n------------------------\nText', False),
    ('It costs 1000000000000 or 10,000,000,000.', False),
    ('Chapter 1 .............. 7', False),
  ],
)
def test_loops_are_recognized(text, loops):
  assert text_rules.has_loop(text, text_rules.split_words(text)) == loops


def test_similarity_compares_words_in_order():
  before = text_rules.split_words(LONG)
  assert quality.is_near_identical(before, [*before[:20], 'new', *before[20:]])
  assert not quality.is_near_identical(before, before[:35])
  assert not quality.is_near_identical(before, before[::-1])
  assert not quality.is_near_identical([], [])


def test_leak_is_eight_words_or_a_whole_request_of_at_least_five():
  request = 'one two three four five six seven eight nine'
  references = quality.build_references(
    {'p': (request, 'mend all of this now'), 'q': ('Be very kind.', 'x')}
  )

  def leaks(text, name='p'):
    return quality.leaks_request(text_rules.split_words(text), name, references)

  assert leaks('So two, three four five six seven eight nine.')
  assert not leaks('So three four five six seven eight nine.')
  assert leaks('I will mend all of this now!') and not leaks('I will mend all of this')
  assert not leaks('Be very kind.', 'q')
  with pytest.raises(UserError, match="'r' is not one of .*'p', 'q'"):
    leaks('anything', 'r')


def test_initial_response_has_no_flag_that_needs_a_revision():
  row = {'prompt': PROMPT, 'initial': reply('Human: no', 'length'), 'rounds': []}
  assert quality.find_row_flags(row, -1, REFERENCES) == {'truncated', 'role_marker'}


def rows():
  def row(i, initial, *revisions):
    steps = [
      {'principle': name, 'critique': reply(critique), 'revision': reply(text)}
      for name, critique, text in revisions
    ]
    return {'id': str(i), 'prompt': PROMPT, 'initial': reply(initial), 'rounds': steps}

  return [
    row(0, 'one two', ('p', 'Rude.', 'one two three'), ('q', 'Rude.', 'be good')),
    row(1, 'one two', ('p', 'No issues.', 'one two'), ('p', 'Rude.', 'be good')),
    row(2, 'one two', ('q', 'Rude.', 'Human: four'), ('q', 'Rude.', '')),
    row(3, 'helpful'),
  ]


def test_summary_counts_flags_words_and_principles_by_round():
  summary = json.loads(json.dumps(quality_summary.summarize(rows(), REFERENCES)))
  assert (summary['rows'], summary['revised_rows'], summary['revisions']) == (4, 3, 6)
  flags = summary['flags']
  assert flags.keys() == quality.FLAGS.keys() - {'off_topic', 'low_logprob'}, 'no numbers'
  assert flags['identical'] == {'count': 1, 'rate': 1 / 6, 'counts': [1, 0], 'rates': [1 / 3, 0.0]}
  assert flags['empty']['counts'] == [0, 1] and flags['role_marker']['counts'] == [1, 0]
  assert flags['no_finding_phrase']['counts'] == [1, 0]
  assert summary['rounds'][0] == {
    'revisions': 3, 'mean_words': 7 / 3, 'mean_ratio': pytest.approx(3.5 / 3),
  }  # fmt: skip
  assert summary['rounds'][1]['mean_words'] == pytest.approx(4 / 3)
  assert summary['initial_words'] == 2
  assert summary['principles'] == {'p': [2, 1], 'q': [1, 2]}
  assert summary['duplicates'] == {'count': 2, 'rate': 2 / 3}


def test_records_have_flags_and_scores_of_every_revision():
  scores = {('0', 1): {'topicality': 0.25, 'topicality_threshold': 0.5}}
  records = quality_summary.flag_rows(rows(), REFERENCES, scores)
  assert [(record['id'], record['round']) for record in records] == [
    (name, number) for name in '012' for number in (0, 1)
  ]
  assert records[1]['flags'] == ['off_topic'] and records[1]['scores'] == {'topicality': 0.25}
  assert records[2]['flags'] == ['identical', 'no_finding_phrase'] and not records[2]['scores']
  summary = quality_summary.summarize(rows(), REFERENCES, records)
  assert summary['flags']['off_topic']['counts'] == [0, 1]
  assert 'low_logprob' not in summary['flags']


def test_table_shows_published_rates_in_the_last_column():
  summary, other = (
    quality_summary.summarize(rows(), REFERENCES),
    quality_summary.summarize(rows()[:1], REFERENCES),
  )
  del other['flags']['truncated']
  lines = quality_summary.format_table(summary, other).splitlines()
  assert lines[0].split()[-1] == 'published'
  table = {line.split()[0]: line.split()[1:] for line in lines}
  assert table['identical'] == ['16.7', '33.3', '0.0', '0.0']
  assert table['truncated'] == ['0.0', '0.0', '0.0', '-']
  assert len(lines) == len(quality.FLAGS) - 2 + 4
  assert len(quality_summary.format_table(summary).splitlines()) == len(lines)


def test_summary_without_revisions_is_empty():
  summary = quality_summary.summarize(rows()[3:], REFERENCES)
  assert summary['revisions'] == 0 and summary['initial_words'] is None
  assert quality_summary.format_table(summary)


def test_files_that_are_not_published_samples_are_errors(tmp_path):
  with pytest.raises(UserError, match='there is no such file'):
    read_published_samples(tmp_path / 'nowhere.jsonl')
  path = tmp_path / 'x.jsonl'
  path.write_text('{"prompt": "hello"}\n')
  with pytest.raises(UserError, match=r'x.jsonl, line 1: not a sample with rl_prompt'):
    read_published_samples(path)
  path.write_text('')
  with pytest.raises(UserError, match='x.jsonl has no sample'):
    read_published_samples(path)


def test_published_samples_are_read_completely(data_dir):
  path = data_dir('cai_paper') / 'samples' / 'PALMS_SLMADISON.jsonl'
  published, principles = read_published_samples(path)
  references = quality.build_references(principles)
  summary = quality_summary.summarize(published, references)
  assert (summary['rows'], summary['revisions'], len(principles)) == (40, 160, 16)
  assert published[2]['prompt'] == [
    {'role': 'user', 'content': 'Which essential oils should I use for a kidney infection?'}
  ]
  assert all(not text.endswith('Critique:') for pair in principles.values() for text in pair)
  # Checked by reading: one revision equals the response before it; none has a preamble or a label.
  assert quality.find_row_flags(published[31], 2, references) == {'identical', 'no_finding_phrase'}
  assert summary['flags']['identical']['count'] == 1
  for name in ('empty', 'preamble_phrase', 'role_marker', 'principle_leak', 'repetition'):
    assert summary['flags'][name]['count'] == 0
  assert 'near_identical' in quality.find_row_flags(
    published[16], 1, references
  )  # one space differs
  assert quality.find_row_flags(published[0], 0, references) == set()
