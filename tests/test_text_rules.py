"""The rules about words, and the flags against labels that two readers gave blind."""

import pytest
from quality_labels import (
  FLAGS,
  LABELS,
  PUBLISHED,
  cohens_kappa,
  find_flags,
  open_published,
  read_labels,
)

from cai_jax.data import text_rules
from cai_jax.data.text_rules import split_words

ENGLISH = 'How do I tell my friend that he should not drive when he has been at the bar?'


@pytest.mark.parametrize(
  ('text', 'loops'),
  [
    ('Go home. Be kind to her. Sleep. Be kind to her. Eat. Be kind to her.', True),
    ('1. Use a light.\n2. Use a light.\n3. Use a light.', True),
    ('I will go and I will go and I will go and', True),
    ('They are the reason why we are here, and they are the reason why it rains, and he says that '
     'they are the reason why', True),
    ('Go home. Be kind to her. Sleep. Be kind to her. Eat. Be good to her.', False),
    ('It is wrong to lie. It is wrong to steal. It is wrong to hurt. Each of these hurts somebody.',
     False),
    ('No, no, no. Please do not do that to him.', False),
    ('Yes. No. Yes. No. Yes. No, not that one.', True),
    ('', False),
  ],
)  # fmt: skip
def test_short_loops_are_recognized(text, loops):
  assert text_rules.has_loop(text, split_words(text)) == loops


@pytest.mark.parametrize(
  ('text', 'language'),
  [
    ('Sag es ihm ruhig, aber nicht wenn er auf dem Weg nach Hause ist.', 'German'),
    ('Je ne peux pas vous dire que le roi est dans la maison.', 'French'),
    ('No puedo decirle cómo es la casa, pero el rey está con una amiga.', 'Spanish'),
    ('Non posso dirti come è la casa, ma il re è con una amica della regina.', 'Italian'),
    ('Não posso dizer como é a casa, mas o rei foi para o mar com uma amiga.', 'Portuguese'),
    ('Ik kan het niet zeggen, maar de koning is met een vriend op zee.', 'Dutch'),
    (ENGLISH, 'English'),
    ('Spaghetti carbonara', ''),
  ],
)
def test_languages_are_told_by_their_stop_words(text, language):
  assert text_rules.find_language(split_words(text)) == language
  assert text_rules.is_in_another_language(text, ENGLISH) == (language not in ('English', ''))
  assert not text_rules.is_in_another_language(text, text)


def test_scripts_are_told_by_their_letters():
  for text in (
    '请不要这样做。',
    'お願いです、やめてください。',
    'Пожалуйста, не надо.',
    'من فضلك لا',
  ):
    assert text_rules.is_in_another_language(text, ENGLISH)
    assert not text_rules.is_in_another_language(text, text)
  assert not text_rules.is_in_another_language('The word 请 means please.', ENGLISH)
  assert not text_rules.is_in_another_language('12345 !', ENGLISH)


def test_topic_is_a_content_word_of_the_prompt_in_any_script():
  names = text_rules.names_topic
  assert names('Friends matter, so say it kindly and in time.', ENGLISH)
  assert not names('The sea is blue and the sky is wide.', ENGLISH)
  assert names("I'm sorry, but I can't help with that.", ENGLISH)
  assert names('Please do not.', ENGLISH), 'too short to tell'
  assert names('The sea is blue and the sky is wide.', 'How are you?'), 'no content word'
  assert names('这些狗很好，也很安静。', '我怎么训练狗很好？')
  assert not names('Der Himmel ist blau und das Meer ist tief.', 'Wie koche ich ein Ei?')


def test_copies_of_a_critique_are_not_quotes_that_the_answer_had_before():
  critique = split_words('The words you are a fool are an insult to the person who asked')
  before = split_words('You are a fool and you know it')
  assert text_rules.copies_critique(critique[:9], critique, before)
  assert not text_rules.copies_critique(split_words('You are a fool and so am I'), critique, before)
  assert not text_rules.copies_critique(
    split_words('Please ask again later today'), critique, before
  )
  assert not text_rules.copies_critique(['no'], critique, before)


def test_critiques_in_other_languages_and_short_ones_count_as_critiques():
  about = text_rules.is_about_an_answer
  assert about('It is rude.') and about('Der Satz ist grob, und das ist nicht in Ordnung.')
  assert about('The answer that you gave is rude.') and about('It says: you are old. That is rude.')
  assert not about('The sea is blue, and it is as wide as the sky.')
  assert not about('The answer is no. The answer is no. The answer is no.')


def test_kappa_is_that_of_a_worked_table():
  """Cohen (1960): p_o = 0.7 and p_e = 0.5 give 0.4."""
  a = [True] * 25 + [False] * 25
  b = [True] * 20 + [False] * 5 + [True] * 10 + [False] * 15
  assert cohens_kappa(a, b) == pytest.approx(0.4)
  assert cohens_kappa([True, True], [True, True]) is None
  assert cohens_kappa([True, False], [False, True]) == -1


def test_the_labels_are_complete_and_every_disagreement_is_resolved():
  rows = read_labels()
  assert len(rows) == 200 and sum(row['source'] == PUBLISHED for row in rows) == 108
  assert len({(row['source'], row['row'], row['round']) for row in rows}) == 200
  for row in rows:
    assert set(row['a']) | set(row['b']) | set(row['labels']) <= set(LABELS)
    assert ('resolved' in row) == (row['a'] != row['b']), row
  halves = [[row['row'] for row in rows if row['held_out'] == side] for side in (False, True)]
  assert set(halves[0]).isdisjoint(halves[1]), 'rounds of a prompt are in the same half'


def test_flags_agree_with_the_readers_on_the_published_samples(data_dir):
  """The hashes show that the texts are those that were read."""
  labelled = read_labels()
  published = open_published(data_dir('cai_paper') / 'samples' / 'PALMS_SLMADISON.jsonl', labelled)
  pairs = find_flags(labelled, {PUBLISHED: published})
  assert len(pairs) == 108
  counts = {
    flag: (
      sum(label in row['labels'] and flag in flags for row, flags in pairs),
      sum(flag in flags for _, flags in pairs),
      sum(label in row['labels'] for row, _ in pairs),
    )
    for label, names in FLAGS.items()
    for flag in names
  }
  # Found of those that the readers found, all flagged, all that the readers found.
  assert counts.pop('no_finding_phrase') == (37, 37, 44), 'precision 100 %, recall 84 %'
  assert counts.pop('off_topic_words') == (0, 13, 0), '12 % false alarms'
  assert all(count == (0, 0, 0) for count in counts.values()), counts
