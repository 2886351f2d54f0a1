"""Rules about words that `quality` builds its flags from: loops, languages, copies and topics.

They are heuristics without a model. docs/quality.md has the precision and recall of each flag.
"""

import collections
import re
import unicodedata
from collections.abc import Sequence

Ngrams = frozenset[tuple[str, ...]]

# See `has_loop`.
LOOP_WORDS, LOOP_SHARE, LOOP_DISTINCT = 30, 0.3, 0.5
REPEATS, LOOP_PHRASE, LOOP_ADJACENT, PHRASE_SHARE = 3, 5, 6, 0.25
COPIED_CRITIQUE, CRITIQUE_NGRAM = 0.2, 4  # see `copies_critique`
LANGUAGE_WORDS, LANGUAGE_SHARE = 2, 0.15  # see `find_language`
SHORTEST = 5  # words; a shorter text says too little to tell whether it is on topic
STEM = 5  # characters that two forms of a word share: see `names_topic`
_WITHOUT_SPACES = ('CJK', 'THAI', 'LAO', 'KHMER', 'MYANMAR', 'TIBETAN')

# Horizontal rules, dotted lines and long numbers are not loops, so the repeated unit must not begin
# with one of their characters.
_CHARACTER_LOOP = re.compile(r'([^\s\d\-=_.*#~|+]\S{0,7}?\s?)\1{7,}')
_SENTENCE_END = re.compile(r'[.!?;\n。！？]+')
_ANSWER = re.compile(
  r"""\b(?:assistant|responses?|answers?|reply|replies|advice|suggestions?|AI|sentences?|wording
    |words|human|user|it\ says)\b""",
  re.VERBOSE | re.IGNORECASE,
)
_REFUSAL = re.compile(
  r"""\b(?:sorry|apologi[sz]e|afraid|but)\b[^.!?]*\b(?:can(?:no|['’])t|unable|not\ able|won['’]t)
  |^\W*I\ (?:can(?:no|['’])t|won['’]t|refuse|am\ (?:unable|not\ able))""",
  re.VERBOSE | re.IGNORECASE,
)
_LIST_NUMBER = re.compile(r'^\s*(?:\d+|[-*•])[.)]?\s+')
# The most frequent words that tell these languages from each other.
_STOP_WORDS = {
  'English': 'the of and to is you that it was for are with they this have from not but what can '
  'your when there will would about my how do should',
  'German': 'der die das und ist nicht ein eine ich sie es zu mit auf für dass wie auch sich dem '
  'den von wenn aber kann haben werden sind oder',
  'French': "le les des est et une que qui dans pour pas vous sur avec ce il je ne au c'est sont "
  'mais ou nous cette être votre du',
  'Spanish': 'el los las que una por con para es del lo su como más pero este esta usted puede ser '
  'si muy y hay cuando también',
  'Italian': 'il di che è la un per non una sono con del della gli ma anche come questo le se nel '
  'essere più alla ho può',
  'Portuguese': 'o os que de um uma para com não é do da em por mais as dos como mas foi ao você '
  'se são pode isso ou também',
  'Dutch': 'het een van en is dat niet op te zijn voor met die ik je aan er maar om ook als kan '
  'deze naar bij wordt',
}
_LANGUAGES = {name: frozenset(words.split()) for name, words in _STOP_WORDS.items()}
_COMMON = _LANGUAGES['English'] | frozenset(
  'a an in i me we us he she him her his hers our their them its on at by as be been being am or '
  'so if who whom which why where while just than then too very all any some no nor only own same '
  'such did does doing done had has having could might must may shall into out up down over under '
  'again further once here both each few more most other because until during before after above '
  "below between through against off i'm i've i'd it's don't can't get got go make give tell know "
  'think want need like good best way ways help please someone something anything people person '
  'one thing things really much many'.split()
)


def has_loop(text: str, words: Sequence[str]) -> bool:
  """Return whether the text repeats itself.

  A text repeats itself in each of these cases:
  - A string of up to 8 characters occurs 8 times in a row.
  - A sentence or list item of at least 3 words occurs `REPEATS` times.
  - A phrase occurs `REPEATS` times in a row and covers at least `LOOP_ADJACENT` words.
  - A phrase of `LOOP_PHRASE` words occurs `REPEATS` times, and such phrases cover at least
    `PHRASE_SHARE` of the words.
  - It has at least `LOOP_WORDS` words, and one trigram of words covers more than `LOOP_SHARE` of
    it, or the share of distinct trigrams is below `LOOP_DISTINCT` (a loop of many words).

  Args:
    text: the text.
    words: its words, from `split_words`.
  """
  if _CHARACTER_LOOP.search(text) or _repeats_sentence(text) or _repeats_in_a_row(words):
    return True
  if _share_of_repeated_phrases(words) >= PHRASE_SHARE:
    return True
  if len(words) < LOOP_WORDS:
    return False
  counts = collections.Counter(zip(words, words[1:], words[2:], strict=False))
  largest = max(counts.values())
  if largest > 1 and 3 * largest > LOOP_SHARE * len(words):
    return True
  return len(counts) < LOOP_DISTINCT * counts.total()


def _repeats_sentence(text: str) -> bool:
  parts = (split_words(_LIST_NUMBER.sub('', part)) for part in _SENTENCE_END.split(text))
  counts = collections.Counter(tuple(part) for part in parts if len(part) >= 3)
  return any(count >= REPEATS for count in counts.values())


def _repeats_in_a_row(words: Sequence[str]) -> bool:
  pairs = collections.Counter(zip(words, words[1:], strict=False))
  if not pairs or max(pairs.values()) < REPEATS - 1:  # as in "no no no"; saves time
    return False
  for period in range(1, len(words) // REPEATS + 1):
    needed, run = max(REPEATS * period, LOOP_ADJACENT) - period, 0
    for word, later in zip(words, words[period:], strict=False):
      run = run + 1 if word == later else 0
      if run >= needed:
        return True
  return False


def _share_of_repeated_phrases(words: Sequence[str]) -> float:
  phrases = [tuple(words[i : i + LOOP_PHRASE]) for i in range(len(words) - LOOP_PHRASE + 1)]
  counts = collections.Counter(phrases)
  covered = {
    position
    for start, phrase in enumerate(phrases)
    if counts[phrase] >= REPEATS
    for position in range(start, start + LOOP_PHRASE)
  }
  return len(covered) / len(words) if words else 0.0


def is_in_another_language(text: str, prompt: str) -> bool:
  """Return whether the text and the prompt are in different languages, as far as words tell.

  They are if most of their letters belong to different scripts. In the Latin script they are if
  `find_language` names a language for each, and not the same one.

  Args:
    text: the text.
    prompt: the prompt's messages.
  """
  scripts = find_script(text), find_script(prompt)
  if '' in scripts:
    return False
  if scripts[0] != scripts[1]:
    return True
  languages = find_language(split_words(text)), find_language(split_words(prompt))
  return '' not in languages and languages[0] != languages[1]


def find_script(text: str) -> str:
  """Return the script of most letters of a text, such as 'LATIN' or 'CJK', or '' if it has none.

  Args:
    text: the text. Kana count as CJK.
  """
  if text.isascii():  # saves time
    return 'LATIN' if any(map(str.isalpha, text)) else ''
  scripts: collections.Counter[str] = collections.Counter()
  for letter in filter(str.isalpha, text):
    name = unicodedata.name(letter, '').split(' ')[0]
    scripts['CJK' if name in ('HIRAGANA', 'KATAKANA') else name] += 1
  if not scripts:
    return ''
  script, count = scripts.most_common(1)[0]
  return script if 2 * count > scripts.total() else ''


def find_language(words: Sequence[str]) -> str:
  """Return the language that most of a text's stop words belong to, or '' if that is unclear.

  It is unclear if the best language has fewer than `LANGUAGE_WORDS` stop words in the text, or they
  are less than `LANGUAGE_SHARE` of the words, or not at least 1.5 times as many as the next one's.

  Args:
    words: words of the text, from `split_words`.
  """
  counts = {name: sum(word in stop for word in words) for name, stop in _LANGUAGES.items()}
  (_, second), (best, first) = sorted(counts.items(), key=lambda item: item[1])[-2:]
  is_clear = first >= max(LANGUAGE_WORDS, LANGUAGE_SHARE * len(words), 1.5 * second)
  return best if is_clear else ''


def copies_critique(words: Sequence[str], critique: Sequence[str], before: Sequence[str]) -> bool:
  """Return whether a revision repeats its critique.

  It does if at least `COPIED_CRITIQUE` of its n-grams of `CRITIQUE_NGRAM` words occur in the
  critique, and it has no more n-grams of the response before than of the critique. A revision that
  keeps what the critique quotes is no copy.

  Args:
    words: words of the revision.
    critique: words of the critique.
    before: words of the response before the revision.
  """
  if len(words) < CRITIQUE_NGRAM or len(critique) < CRITIQUE_NGRAM:
    return False
  own = ngrams(words, CRITIQUE_NGRAM)
  shared = len(own & ngrams(critique, CRITIQUE_NGRAM))
  return shared >= COPIED_CRITIQUE * len(own) and shared >= len(
    own & ngrams(before, CRITIQUE_NGRAM)
  )


def names_topic(text: str, prompt: str) -> bool:
  """Return whether a text has a content word of the prompt, or the prompt has none.

  A text of fewer than `SHORTEST` words counts as one that has, and so does a refusal in stock
  phrases, such as "I'm sorry, but I can't".
  Words are equal if they share their first `STEM` characters. Stop words, and in English other
  common words as well, are no content words. Of scripts without spaces between words, pairs of
  characters are compared.

  Args:
    text: the text.
    prompt: the prompt's messages.
  """
  if find_script(prompt) in _WITHOUT_SPACES:
    pairs = _letter_pairs(prompt)
    return not pairs or not pairs.isdisjoint(_letter_pairs(text))
  words = split_words(prompt)
  common = _LANGUAGES.get(find_language(words), _COMMON) | _COMMON
  topic = {word[:STEM] for word in words if word not in common and len(word) > 2}
  own = split_words(text)
  if not topic or len(own) < SHORTEST or any(word[:STEM] in topic for word in own):
    return True
  return bool(_REFUSAL.search(text))


def _letter_pairs(text: str) -> set[str]:
  letters = ''.join(filter(str.isalpha, text))
  return {letters[i : i + 2] for i in range(len(letters) - 1)}


def is_about_an_answer(critique: str) -> bool:
  """Return whether a critique mentions an answer, or who asked or gave it, and is no loop.

  Without a loop, a critique of fewer than `SHORTEST` words counts as one, and so does one that is
  not in English as far as `find_language` tells.

  Args:
    critique: the text of the critique.
  """
  words = split_words(critique)
  if has_loop(critique, words):
    return False
  if len(words) < SHORTEST:
    return True
  return find_language(words) != 'English' or bool(_ANSWER.search(critique))


def split_words(text: str) -> list[str]:
  """Return the words of a text in lower case, without punctuation."""
  return re.findall(r"\w+(?:['’]\w+)*", text.lower())


def ngrams(words: Sequence[str], n: int) -> Ngrams:
  """Return the set of all n-grams of words.

  A text with fewer than `n` words gives one tuple of all its words.

  Args:
    words: the words of a text.
    n: number of words in each n-gram.
  """
  return frozenset(tuple(words[i : i + n]) for i in range(max(len(words) - n + 1, 1)))
