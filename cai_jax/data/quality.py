"""Defects of revisions: rules that flag a response as empty, copied, truncated and so on.

The rules look at words and white space only. They are fast and give the same result everywhere, but
they make mistakes: use them to count and filter, not to judge a single text. quality_summary.py
computes the rates of the flags over a dataset.
"""

import collections
import dataclasses
import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from cai_jax.runtime.errors import UserError

FLAGS = {
  'empty': 'Contains only white space.',
  'truncated': "Was cut off at the token limit: its finish_reason is 'length'.",
  'identical': 'Equals the response before it, apart from surrounding white space.',
  'near_identical': 'Is not identical, but at least 0.95 similar by words, to the response before.',
  'preamble': "Begins with a phrase about itself, such as 'Here is the revised response:'.",
  'role_marker': "Contains a label ('Human:', 'RevisionRequest:') or a control token.",
  'principle_leak': 'Repeats 8 consecutive words of its critique request or revision request.',
  'no_finding': "Its critique praises the response or finds nothing wrong, without a 'but'.",
  'repetition': 'Repeats words or characters in a loop.',
  'demonstration': 'Copies, or nearly copies, a reply of a few-shot demonstration.',
}
NEEDS_REFERENCES = ('principle_leak', 'demonstration')  # flags that only `References` can detect

NEAR_IDENTICAL = 0.95  # smallest similarity: 2 × matching words / words of both responses
LEAKED_WORDS = 8  # consecutive words of a request
MIN_REQUEST_WORDS = 5  # a request of 5 to 7 words is leaked as a whole; a shorter one never is
COPIED = 0.8  # smallest Jaccard index of the sets of n-grams of two texts
COPIED_NGRAM = 5  # words
LOOP_WORDS, LOOP_SHARE, LOOP_DISTINCT = 30, 0.3, 0.5  # see `has_loop`

_LABEL = r'(?:Human|Assistant|CritiqueRequest|Critique|RevisionRequest|Revision)'
_MARKER = re.compile(
  rf'^[ \t>*_#"]*{_LABEL}[*_]*:'  # at the start of a line, possibly in bold
  r'|(?:Critique|Revis\w*)Request:'
  r'|<\|\w+\|>|<｜[^｜\n]+｜>|\[/?INST\]|<</?SYS>>|</?(?:start|end)_of_turn>',
  re.MULTILINE,
)
_REVISED = r'(?:revis(?:ed|ion)|re-?written|rewrote|re-?phrased|reworded|edited|corrected|improved)'
_PREAMBLE = re.compile(
  rf"""[\s*_"'“‘#>]*
  (?:(?:sure|certainly|of\ course|okay|ok|absolutely|understood)\b(?:\ thing)?[\s,.!:—–-]*)?
  (?:
    (?:here(?:['’]s|\ is|\ are)|(?:this|the\ following|below)\ is)\ (?:a|an|the|my|one|how\ i)\b
      [^.:!?\n]{{0,50}}?\b(?:{_REVISED}|rewrite|(?:updated|new|better|safer)\ (?:version|response))
    |i(?:['’]ve|\ have|['’]d|\ would\ have)?\ (?:\w+\ )?{_REVISED}\b
    |(?:my\ |the\ |a\ )?{_REVISED}\ (?:\w+\ ){{0,2}}?(?:response|version|answer|reply|text)
      [*_"\s]*(?::|\bis\b|\n)
  )""",
  re.VERBOSE | re.IGNORECASE,
)
_BAD = r'(?:harm\w*|wrong|offensive|unethical|problematic|illegal|toxic|dangerous|racist|sexist)'
_NO_FINDING = re.compile(
  rf"""\bnothing\ (?:\w+\ )?{_BAD}
  |\b(?:no|without)\ (?:\w+\ ){{0,3}}(?:harm\w*|issues?|problems?|concerns?|objection\w*)
  |(?:\bnot|n['’]t)\ (?:(?:see|find|make|contain|cause|seem|appear|say|to|be|any|anything
    |particularly|especially|really|overtly|at\ all)\ )*{_BAD}
  |\b(?:non-?harmful|harmless|no\ (?:changes?|revisions?)\ (?:is|are)\ needed)
  |\bno\ (?:critiques?|criticisms?|complaints?)\b
  |\b(?:good|great|excellent|perfect|fantastic|wonderful|solid)\ job
  |\bresponded\ (?:\w+\ ){{0,4}}(?:perfectly|appropriate(?:ly)?|correctly|compassionate|thoughtful)
  |\b(?:good|great|excellent|perfect|fantastic|ideal|wonderful|appropriate|thoughtful|correct)\b
    [^.;:]{{0,40}}\b(?:response|answer|advice|reply)
  |\b(?:response|answer|advice|reply)\ (?:is|was|seems|seemed|looks)\b[^.;:]{{0,40}}
    \b(?:good|great|excellent|perfect|fine|appropriate|reasonable|thoughtful|correct)""",
  re.VERBOSE | re.IGNORECASE,
)
_RESERVATION = re.compile(
  r"""\b(?:however|although|though|but|except|unless|nevertheless|lacks?|fail(?:s|ed)|improved?
    |the\ only|slight(?:ly)?|instead|recommend\w*|implie[sd]|assumes?|a\ (?:bit|little)
    |(?:assistant|response|answer|reply|it|this|they|i|you|one)
      (?:\ also)?\ (?:could|should|would|might|may)
    |(?:could|should|might|may)\ (?:also|have|be|imply|want)
    |(?:did|does)(?:n['’]t|\ not)\ (?:explicitly|clearly|mention|address|warn))\b""",
  re.VERBOSE | re.IGNORECASE,
)
# Horizontal rules, dotted lines and long numbers are not loops, so the repeated unit must not begin
# with one of their characters.
_CHARACTER_LOOP = re.compile(r'([^\s\d\-=_.*#~|+]\S{0,7}?\s?)\1{7,}')

Ngrams = frozenset[tuple[str, ...]]


@dataclasses.dataclass(frozen=True)
class References:
  """Texts that a response may have copied, prepared for comparison by `build_references`.

  Attributes:
    requests: principle id → the n-grams of each of its requests.
    demonstrations: the n-grams of each reply in the few-shot demonstrations.
  """

  requests: Mapping[str, tuple[Ngrams, ...]]
  demonstrations: tuple[Ngrams, ...] = ()


def build_references(
  principles: Mapping[str, Sequence[str]],
  demonstrations: Iterable[Sequence[Mapping[str, str]]] = (),
) -> References:
  """Prepare the texts of a constitution for comparison.

  Args:
    principles: id → (critique request, revision request).
    demonstrations: dialogues of {'role', 'content'} messages, in which requests and replies
      alternate.
  """
  requests = {
    name: tuple(
      ngrams(words, LEAKED_WORDS)
      for words in map(split_words, texts)
      if len(words) >= MIN_REQUEST_WORDS
    )
    for name, texts in principles.items()
  }
  replies = [
    split_words(message['content']) for dialogue in demonstrations for message in dialogue[1::2]
  ]
  return References(requests, tuple(ngrams(reply, COPIED_NGRAM) for reply in replies if reply))


def find_flags(
  prompt: Sequence[Mapping[str, str]],
  previous: Mapping[str, Any] | None,
  critique: Mapping[str, Any] | None,
  revision: Mapping[str, Any],
  principle: str = '',
  references: References | None = None,
) -> frozenset[str]:
  """Return the names in `FLAGS` that apply to the revision of one round.

  Responses and critiques are {'text', 'finish_reason'} mappings.

  Args:
    prompt: messages. A marker that occurs in them does not count as leaked.
    previous: the response before the revision; None if `revision` is the initial response.
    critique: the critique of `previous`; None for the initial response. Empty text with the
      finish_reason '' means that no critique was requested.
    revision: the response to examine.
    principle: id of the round's principle.
    references: needed for the flags in `NEEDS_REFERENCES`, which are not detected without it.

  Raises:
    UserError: if `references` does not contain the principle.
  """
  text = revision['text'].strip()
  words = split_words(text)
  flags = {
    'empty': not text,
    'truncated': revision['finish_reason'] == 'length',
    'preamble': _PREAMBLE.match(text) is not None,
    'role_marker': has_role_marker(text, prompt),
    'repetition': has_loop(text, words),
  }
  if previous is not None:
    before = previous['text'].strip()
    flags['identical'] = text == before
    flags['near_identical'] = text != before and is_near_identical(split_words(before), words)
  if critique is not None:
    flags['no_finding'] = finds_nothing(critique)
  if references is not None:
    flags['demonstration'] = any(
      similarity(words, reply) >= COPIED for reply in references.demonstrations
    )
    if principle:
      flags['principle_leak'] = leaks_request(words, principle, references)
  return frozenset(name for name, applies in flags.items() if applies)


def find_row_flags(
  row: Mapping[str, Any], round_index: int, references: References | None = None
) -> frozenset[str]:
  """Return the flags of one response in a row of D_CAI.

  Args:
    row: as `data.d_cai` reads it.
    round_index: index of the revision, or -1 for the initial response.
    references: see `find_flags`.
  """
  if round_index < 0:
    return find_flags(row['prompt'], None, None, row['initial'], references=references)
  step = row['rounds'][round_index]
  previous = row['rounds'][round_index - 1]['revision'] if round_index else row['initial']
  return find_flags(
    row['prompt'], previous, step['critique'], step['revision'], step['principle'], references
  )


def has_role_marker(text: str, prompt: Sequence[Mapping[str, str]]) -> bool:
  """Return whether the text contains a label or control token that the prompt does not contain.

  Args:
    text: the text of a response.
    prompt: the messages of the prompt.
  """
  markers = {match.group().strip(' \t>*_#"') for match in _MARKER.finditer(text)}
  return any(not any(marker in m['content'] for m in prompt) for marker in markers)


def finds_nothing(critique: Mapping[str, Any]) -> bool:
  """Return whether a critique has no objection.

  This is so if the critique was requested but is blank. It is also so if the critique praises the
  response or finds nothing wrong, without a reservation such as "but".

  Args:
    critique: the critique, with 'text' and 'finish_reason'.
  """
  text = critique['text'].strip()
  if not text:
    return critique['finish_reason'] != ''
  return _NO_FINDING.search(text) is not None and _RESERVATION.search(text) is None


def is_near_identical(before: Sequence[str], after: Sequence[str]) -> bool:
  """Return whether two lists of words have a similarity of at least `NEAR_IDENTICAL`.

  The similarity is the ratio of `difflib.SequenceMatcher`. It depends on which list comes first.

  Args:
    before: words of the response before the revision.
    after: words of the revision.
  """
  if not before or not after:
    return False
  matcher = difflib.SequenceMatcher(None, before, after, autojunk=False)
  # Each is an upper bound of the next, and faster to compute.
  bounds = matcher.real_quick_ratio, matcher.quick_ratio, matcher.ratio
  return all(bound() >= NEAR_IDENTICAL for bound in bounds)


def has_loop(text: str, words: Sequence[str]) -> bool:
  """Return whether the text repeats itself.

  A text repeats itself if a string of up to 8 characters occurs 8 times in a row. A text of at
  least `LOOP_WORDS` words also repeats itself if one trigram of words covers more than `LOOP_SHARE`
  of it, or if the share of distinct trigrams is below `LOOP_DISTINCT` (a loop of many words).

  Args:
    text: the text.
    words: its words, from `split_words`.
  """
  if _CHARACTER_LOOP.search(text):
    return True
  if len(words) < LOOP_WORDS:
    return False
  counts = collections.Counter(zip(words, words[1:], words[2:], strict=False))
  largest = max(counts.values())
  if largest > 1 and 3 * largest > LOOP_SHARE * len(words):
    return True
  return len(counts) < LOOP_DISTINCT * counts.total()


def leaks_request(words: Sequence[str], principle: str, references: References) -> bool:
  """Return whether a response repeats part of its principle's requests.

  Args:
    words: words of the response, from `split_words`.
    principle: id of the principle.
    references: the texts of the constitution.

  Raises:
    UserError: if `references` does not contain the principle.
  """
  if principle not in references.requests:
    raise UserError(
      f'The principle {principle!r} is not one of {sorted(references.requests)}. Use the '
      'constitution under which the rows were generated.'
    )
  for request in references.requests[principle]:
    n = len(next(iter(request)))
    if len(words) >= n and not request.isdisjoint(ngrams(words, n)):
      return True
  return False


def similarity(words: Sequence[str], other: Ngrams) -> float:
  """Return the Jaccard index, in [0, 1], of the n-grams of two texts.

  Args:
    words: words of the first text.
    other: n-grams of the second text.
  """
  own = ngrams(words, COPIED_NGRAM)
  return len(own & other) / len(own | other)


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
