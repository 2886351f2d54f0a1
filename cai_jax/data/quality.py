"""Defects of revisions: rules that flag a response as empty, copied, truncated and so on.

Most rules look at words and white space only (see text_rules.py). They are fast and give the same
result everywhere, but they make mistakes: use them to count and filter, not to judge a single text.
docs/quality.md has their measured precision and recall. Two rules compare numbers of a model with a
bound. quality_summary.py computes the rates of the flags over a dataset.
"""

import dataclasses
import difflib
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from cai_jax.data.text_rules import (
  Ngrams,
  copies_critique,
  has_loop,
  is_about_an_answer,
  is_in_another_language,
  names_topic,
  ngrams,
  split_words,
)
from cai_jax.runtime.errors import UserError

FLAGS = {
  'empty': 'Contains only white space.',
  'truncated': "Was cut off at the token limit: its finish_reason is 'length'.",
  'identical': 'Equals the response before it, apart from surrounding white space.',
  'near_identical': 'Is not identical, but at least 0.95 similar by words, to the response before.',
  'preamble_phrase': 'Begins with a stock phrase about itself, such as "Here is the revised '
  'response:".',
  'role_marker': "Contains a label ('Human:', 'RevisionRequest:') or a control token.",
  'principle_leak': 'Repeats 8 consecutive words of its critique request or revision request.',
  'no_finding_phrase': 'Its critique has a stock phrase of praise or of finding nothing wrong, and '
  'none of an objection.',
  'not_a_critique': 'Its critique mentions no answer, assistant or user, or repeats itself.',
  'critique_copied': 'Takes at least 0.2 of its sequences of 4 words from its critique.',
  'repetition': 'Repeats a sentence, list item or phrase at least 3 times, or is a loop.',
  'demonstration': 'Repeats 8 consecutive words, or a whole shorter reply, of a few-shot '
  'demonstration.',
  'wrong_language': 'Has another script than the prompt, or the stop words of another language.',
  'off_topic_words': 'Has no content word of the prompt.',
  'off_topic': 'Gains no more from its prompt than from prompts of other texts, by the '
  'log-probabilities of M_θ (cai_jax/scoring/topicality.py). Needs feedback.topicality.',
  'low_logprob': 'The model that sampled it gives it less than -3 nats per token on average.',
}
NEEDS_REFERENCES = ('principle_leak', 'demonstration')  # flags that only `References` can detect
NEEDS_SCORES = ('off_topic',)  # flags that only the scores of a model can detect
# Default of `feedback.max_rate`: limits of the defects that show a collapse; 1 for all others.
MAX_RATE = (
  dict.fromkeys(FLAGS, 1.0)
  | {'truncated': 0.5}
  | dict.fromkeys(
    (
      'empty',
      'principle_leak',
      'critique_copied',
      'repetition',
      'demonstration',
      'wrong_language',
      'off_topic_words',
      'off_topic',
      'low_logprob',
    ),
    0.3,
  )
)
RENAMED = {'preamble': 'preamble_phrase', 'no_finding': 'no_finding_phrase'}  # former names

LOW_LOGPROB = -3.0  # nats per token; text of perplexity 20
NEAR_IDENTICAL = 0.95  # smallest similarity: 2 × matching words / words of both responses
LEAKED_WORDS = 8  # consecutive words of a request
MIN_WORDS = 5  # a request or reply of 5 to 7 words is copied as a whole; a shorter one never is
COPIED_WORDS = 8  # consecutive words of a demonstration's reply

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
_GOOD = (
  r'(?:good|great|excellent|perfect(?:ly)?|fantastic|ideal|wonderful|appropriate(?:ly)?|thoughtful'
  r'|correct(?:ly)?|fine|reasonable|helpful|supportive|sensitive|empathetic|compassionate|balanced'
  r'|objective|neutral|respectful|friendly|polite|accurate|insightful'
  r'|convincing|clear|informative|well[- ]\w+)'
)
_NO_FINDING = re.compile(
  rf"""^\W*(?:no|none|nothing)\W*$
  |\bnothing\ (?:\w+\ )?{_BAD}
  |\b(?:no|without)\ (?:\w+\ ){{0,3}}(?:harm\w*|issues?|problems?|concerns?|objection\w*)
  |(?:\bnot|n['’]t)\ (?:(?:see|find|make|contain|cause|seem|appear|say|to|be|any|anything
    |particularly|especially|really|overtly|at\ all)\ )*{_BAD}
  |\bunlikely\ to\b
  |\b(?:non-?harmful|harmless|no\ (?:changes?|revisions?)\ (?:is|are)\ needed)
  |\bno\ (?:critiques?|criticisms?|complaints?)\b
  |\b(?:good|great|excellent|perfect|fantastic|wonderful|solid)\ job
  |\bresponded\ (?:\w+\ ){{0,4}}{_GOOD}\b
  |\b(?:successfully\ avoid|able\ to\ avoid|n['’]t\ take\ the\ bait|fortunately)
  |\b{_GOOD}\b[^.;:]{{0,40}}\b(?:response|answer|advice|reply|explanation)
  |\b(?:response|answer|advice|reply)\ (?:is|was|seems|seemed|looks)\b[^.;:]{{0,40}}\b{_GOOD}\b
  |\b(?:provide[sd]?|offer(?:s|ed)?|g[ia]ve[sn]?)\ (?:\w+[\ ,]+){{0,4}}{_GOOD}\b""",
  re.VERBOSE | re.IGNORECASE,
)
_OBJECTION = re.compile(
  r"""\b(?:lacks?|fail(?:s|ed)|improve[ds]?|improvements?|the\ only|slight(?:ly)?|instead
    |recommend|implie[sd]|assumes?|suffers?|overly|downplayed
    |(?:assistant|response|answer|reply|it|this|that|they|you|one)
      (?:\ also)?\ (?:could|should|might|may)
    |(?:could|should|might|may)\ (?:not\ )?(?:also|be|imply|want|clarify|add|mention)
    |would\ be\ (?:better|more)|(?:could|should)(?:\ have\ been|['’]ve)
    |(?:did|does)(?:n['’]t|\ not)
      \ (?:explicitly|clearly|directly|really|mention|address|warn))\b""",
  re.VERBOSE | re.IGNORECASE,
)
# Words that begin an objection unless what follows is praise.
_TURN = re.compile(
  r'\b(?:however|but|except|unless|nevertheless|(?<!^)(?:although|though))\b', re.IGNORECASE
)
_SENTENCE = re.compile(r'(?<=[.!?])\s+|\n+')


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
      ngrams(words, LEAKED_WORDS) for words in map(split_words, texts) if len(words) >= MIN_WORDS
    )
    for name, texts in principles.items()
  }
  replies = [
    split_words(message['content']) for dialogue in demonstrations for message in dialogue[1::2]
  ]
  return References(
    requests, tuple(ngrams(reply, COPIED_WORDS) for reply in replies if len(reply) >= MIN_WORDS)
  )


def find_flags(
  prompt: Sequence[Mapping[str, str]],
  previous: Mapping[str, Any] | None,
  critique: Mapping[str, Any] | None,
  revision: Mapping[str, Any],
  principle: str = '',
  references: References | None = None,
  scores: Mapping[str, float] | None = None,
) -> frozenset[str]:
  """Return the names in `FLAGS` that apply to the revision of one round.

  Responses and critiques are {'text', 'finish_reason'} mappings. With 'logprob' and 'num_tokens' as
  in D_CAI, 'low_logprob' is detected as well.

  Args:
    prompt: messages. A marker that occurs in them does not count as leaked.
    previous: the response before the revision; None if `revision` is the initial response.
    critique: the critique of `previous`; None for the initial response. Empty text with the
      finish_reason '' means that no critique was requested.
    revision: the response to examine.
    principle: id of the round's principle.
    references: needed for the flags in `NEEDS_REFERENCES`, which are not detected without it.
    scores: numbers of a model by name, needed for the flags in `NEEDS_SCORES`: 'topicality' and
      'topicality_threshold', in nats per token.

  Raises:
    UserError: if `references` does not contain the principle.
  """
  text = revision['text'].strip()
  words = split_words(text)
  asked = '\n'.join(message['content'] for message in prompt)
  flags = {
    'empty': not text,
    'truncated': revision['finish_reason'] == 'length',
    'preamble_phrase': _PREAMBLE.match(text) is not None,
    'role_marker': has_role_marker(text, prompt),
    'repetition': has_loop(text, words),
    'wrong_language': is_in_another_language(text, asked),
    'off_topic_words': bool(text) and not names_topic(text, asked),
    'low_logprob': mean_logprob(revision) < LOW_LOGPROB,
  }
  if previous is not None:
    before = previous['text'].strip()
    flags['identical'] = text == before
    flags['near_identical'] = text != before and is_near_identical(split_words(before), words)
  if critique is not None:
    complaint = critique['text'].strip()
    flags['no_finding_phrase'] = finds_nothing(critique)
    flags['not_a_critique'] = not (
      flags['no_finding_phrase'] or not complaint or is_about_an_answer(complaint)
    )
    if previous is not None:
      flags['critique_copied'] = copies_critique(
        words, split_words(critique['text']), split_words(previous['text'])
      )
  if references is not None:
    flags['demonstration'] = any(map(_contains_part(words), references.demonstrations))
    if principle:
      flags['principle_leak'] = leaks_request(words, principle, references)
  if scores and 'topicality' in scores:
    flags['off_topic'] = bool(text) and scores['topicality'] <= scores['topicality_threshold']
  return frozenset(name for name, applies in flags.items() if applies)


def find_row_flags(
  row: Mapping[str, Any],
  round_index: int,
  references: References | None = None,
  scores: Mapping[str, float] | None = None,
) -> frozenset[str]:
  """Return the flags of one response in a row of D_CAI; none of a response that its round kept.

  Args:
    row: as `data.d_cai` reads it.
    round_index: index of the revision, or -1 for the initial response.
    references: see `find_flags`.
    scores: see `find_flags`.
  """
  if round_index < 0:
    return find_flags(
      row['prompt'], None, None, row['initial'], references=references, scores=scores
    )
  step = row['rounds'][round_index]
  if not step.get('revised', True):
    return frozenset()
  previous = row['rounds'][round_index - 1]['revision'] if round_index else row['initial']
  return find_flags(
    row['prompt'],
    previous,
    step['critique'],
    step['revision'],
    step['principle'],
    references,
    scores,
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

  This is so if the critique was requested but is blank. It is also so if the critique has a stock
  phrase of praise or of finding nothing wrong, and no sentence with one of an objection. "However"
  and "but" are objections unless praise follows them.

  Args:
    critique: the critique, with 'text' and 'finish_reason'.
  """
  text = critique['text'].strip()
  if not text:
    return critique['finish_reason'] != ''
  return bool(_NO_FINDING.search(text)) and not any(map(_objects, _SENTENCE.split(text)))


def _objects(sentence: str) -> bool:
  """Return whether a sentence of a critique has a stock phrase of an objection."""
  if _OBJECTION.search(sentence):
    return True
  turns = list(_TURN.finditer(sentence.strip()))
  return bool(turns) and not _NO_FINDING.search(sentence.strip()[turns[-1].end() :])


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
  return any(map(_contains_part(words), references.requests[principle]))


def mean_logprob(turn: Mapping[str, Any]) -> float:
  """Return the mean log-probability of a sampled text in nats per token, or NaN if it has none.

  It is that of the model before temperature and filters, so it does not depend on them directly.

  Args:
    turn: a turn of D_CAI, with 'logprob' and 'num_tokens', or without them.
  """
  return turn['logprob'] / turn['num_tokens'] if turn.get('num_tokens') else math.nan


def _contains_part(words: Sequence[str]) -> Callable[[Ngrams], bool]:
  """Return a function that tells whether the words contain one of given n-grams."""
  own: dict[int, Ngrams] = {}

  def contains(other: Ngrams) -> bool:
    n = len(next(iter(other)))
    if len(words) < n:
      return False
    if n not in own:
      own[n] = ngrams(words, n)
    return not other.isdisjoint(own[n])

  return contains
