"""Defects of revisions by name, as pure functions of plain data, and their rates over a D_CAI.

The rules look at words and white space only, so they are quick, the same everywhere, and wrong at
times: they are made to be counted and filtered by, not to judge a single text.
"""

import collections
import dataclasses
import difflib
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from cai_jax.runtime.errors import UserError

FLAGS = {
  'empty': 'nothing but white space',
  'truncated': "cut at the length limit: finish_reason is 'length'",
  'identical': 'the response before it, but for white space around',
  'near_identical': 'at least 0.95 alike, by words, to the response before it; not identical',
  'preamble': "begins by speaking of itself: 'Here is the revised response:'",
  'role_marker': "has a label ('Human:', 'RevisionRequest:') or a chat template's control token",
  'principle_leak': 'repeats 8 words in a row of what its critique or itself was asked for by',
  'no_finding': "its critique praises or finds nothing wrong, without a 'but'",
  'repetition': 'runs in a loop of words or characters',
  'demonstration': 'a copy, or nearly, of a reply in a few-shot demonstration',
}
OF_REFERENCES = ('principle_leak', 'demonstration')  # that only `References` can tell

NEAR = 0.95  # of two responses' words: 2 × matches / (words of both)
LEAK, SHORT_LEAK = 8, 5  # words in a row; a whole request of fewer counts from the second on
COPY, COPY_GRAM = 0.8, 5  # Jaccard index of two texts' sets of 5 words in a row
LOOP_WORDS, LOOP_SHARE, LOOP_DISTINCT = 30, 0.3, 0.5  # see `repeats`

_LABEL = r'(?:Human|Assistant|CritiqueRequest|Critique|RevisionRequest|Revision)'
_TURN = re.compile(rf'\n\n({_LABEL}):')
_ROLES = {'Human': 'user', 'Assistant': 'assistant'}
_MARKER = re.compile(
  rf'^[ \t>*_#"]*{_LABEL}[*_]*:'  # at the beginning of a line, also in bold
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
_NOTHING = re.compile(
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
_RESERVED = re.compile(
  r"""\b(?:however|although|though|but|except|unless|nevertheless|lacks?|fail(?:s|ed)|improved?
    |the\ only|slight(?:ly)?|instead|recommend\w*|implie[sd]|assumes?|a\ (?:bit|little)
    |(?:assistant|response|answer|reply|it|this|they|i|you|one)
      (?:\ also)?\ (?:could|should|would|might|may)
    |(?:could|should|might|may)\ (?:also|have|be|imply|want)
    |(?:did|does)(?:n['’]t|\ not)\ (?:explicitly|clearly|mention|address|warn))\b""",
  re.VERBOSE | re.IGNORECASE,
)
# Rules of dashes, rows of dots and long numbers are no loops: the unit begins with another sign.
_CHARACTER_LOOP = re.compile(r'([^\s\d\-=_.*#~|+]\S{0,7}?\s?)\1{7,}')

Grams = frozenset[tuple[str, ...]]


@dataclasses.dataclass(frozen=True)
class References:
  """What a response may have been copied from, made ready to compare; see `references`.

  Attributes:
    requests: of each principle's id, what is too much to have in common with its requests.
    demonstrations: of each demonstration's replies, its sets of 5 words in a row.
  """

  requests: Mapping[str, tuple[Grams, ...]]
  demonstrations: tuple[Grams, ...] = ()


def references(
  principles: Mapping[str, Sequence[str]],
  demonstrations: Iterable[Sequence[Mapping[str, str]]] = (),
) -> References:
  """The references of a constitution.

  Args:
    principles: id → (critique request, revision request).
    demonstrations: dialogues of {'role', 'content'} messages, a request and a reply in turn.
  """
  requests = {
    name: tuple(grams(found, LEAK) for found in map(words, texts) if len(found) >= SHORT_LEAK)
    for name, texts in principles.items()
  }
  replies = [words(message['content']) for shown in demonstrations for message in shown[1::2]]
  return References(requests, tuple(grams(reply, COPY_GRAM) for reply in replies if reply))


def words(text: str) -> list[str]:
  """The words of a text, in lower case and without punctuation."""
  return re.findall(r"\w+(?:['’]\w+)*", text.lower())


def grams(found: Sequence[str], n: int) -> Grams:
  """The sets of `n` words in a row; of fewer words, the one of them all."""
  return frozenset(tuple(found[i : i + n]) for i in range(max(len(found) - n + 1, 1)))


def flags(
  prompt: Sequence[Mapping[str, str]],
  previous: Mapping[str, Any] | None,
  critique: Mapping[str, Any] | None,
  revision: Mapping[str, Any],
  principle: str = '',
  known: References | None = None,
) -> frozenset[str]:
  """Names of FLAGS that a round's revision has; with neither `previous` nor critique, y_init's.

  Args:
    prompt: its messages; a marker that stands there is none that leaked.
    previous, critique, revision: {'text', 'finish_reason'} each. A critique with the finish_reason
      '' and no text was not asked for.
    principle: id of the round's.
    known: what 'principle_leak' and 'demonstration' are told by; without it they are not looked
      for.

  Raises:
    ValueError: if `known` does not have the principle.
  """
  text = revision['text'].strip()
  found = words(text)
  tests = {
    'empty': not text,
    'truncated': revision['finish_reason'] == 'length',
    'preamble': _PREAMBLE.match(text) is not None,
    'role_marker': leaks_marker(text, prompt),
    'repetition': repeats(text, found),
  }
  if previous is not None:
    before = previous['text'].strip()
    tests['identical'] = text == before
    tests['near_identical'] = text != before and alike(words(before), found)
  if critique is not None:
    tests['no_finding'] = finds_nothing(critique)
  if known is not None:
    tests['demonstration'] = any(overlap(found, shown) >= COPY for shown in known.demonstrations)
    if principle:
      tests['principle_leak'] = leaks_request(found, principle, known)
  return frozenset(name for name, holds in tests.items() if holds)


def row_flags(row: Mapping[str, Any], at: int, known: References | None = None) -> frozenset[str]:
  """Flags of a row's revision in round `at`, from 0 on; of its initial response for -1."""
  if at < 0:
    return flags(row['prompt'], None, None, row['initial'], known=known)
  step = row['rounds'][at]
  previous = row['rounds'][at - 1]['revision'] if at else row['initial']
  return flags(
    row['prompt'], previous, step['critique'], step['revision'], step['principle'], known
  )


def leaks_marker(text: str, prompt: Sequence[Mapping[str, str]]) -> bool:
  """Whether a label or control token stands in the text that does not stand in the prompt."""
  markers = {match.group().strip(' \t>*_#"') for match in _MARKER.finditer(text)}
  return any(not any(marker in m['content'] for m in prompt) for marker in markers)


def finds_nothing(critique: Mapping[str, Any]) -> bool:
  """Whether a critique that was asked for is blank, or praises or absolves and has no 'but'."""
  text = critique['text'].strip()
  if not text:
    return critique['finish_reason'] != ''
  return _NOTHING.search(text) is not None and _RESERVED.search(text) is None


def alike(before: Sequence[str], after: Sequence[str]) -> bool:
  """Whether two lists of words are NEAR the same: difflib's ratio, which minds their order."""
  if not before or not after:
    return False
  matcher = difflib.SequenceMatcher(None, before, after, autojunk=False)
  bounds = matcher.real_quick_ratio, matcher.quick_ratio, matcher.ratio  # the quickest first
  return all(bound() >= NEAR for bound in bounds)


def repeats(text: str, found: Sequence[str]) -> bool:
  """Whether a text runs in a loop.

  One of up to 8 characters that come 8 times in a row; or, from LOOP_WORDS words on, 3 words in a
  row that take up over LOOP_SHARE of the text, or, as a long loop has it, fewer than LOOP_DISTINCT
  of all 3 words in a row being distinct.
  """
  if _CHARACTER_LOOP.search(text):
    return True
  if len(found) < LOOP_WORDS:
    return False
  counts = collections.Counter(zip(found, found[1:], found[2:], strict=False))
  most = max(counts.values())
  return (most > 1 and 3 * most > LOOP_SHARE * len(found)) or len(
    counts
  ) < LOOP_DISTINCT * counts.total()


def leaks_request(found: Sequence[str], principle: str, known: References) -> bool:
  """Whether words of a text are those of its principle's requests."""
  if principle not in known.requests:
    raise UserError(
      f'the principle {principle!r} is none of {sorted(known.requests)}: give the constitution '
      'that the rows were made under.'
    )
  for request in known.requests[principle]:
    n = len(next(iter(request)))
    if len(found) >= n and not request.isdisjoint(grams(found, n)):
      return True
  return False


def overlap(found: Sequence[str], other: Grams) -> float:
  """Jaccard index of a text's sets of 5 words in a row with others'."""
  own = grams(found, COPY_GRAM)
  return len(own & other) / len(own | other)


def summarise(rows: Iterable[Mapping[str, Any]], known: References) -> dict[str, Any]:
  """What the revisions of a D_CAI are like, as JSON has it.

  Args:
    rows: each has `prompt` (messages), `initial` {text, finish_reason}, and `rounds` of {principle,
      critique, revision}; those without rounds are counted only.
    known: the constitution's `references`.

  Returns:
    'rows', 'revisions'; 'flags': name → {'count', 'rate', 'counts' and 'rates' by round}, rates of
    the revisions; 'rounds': of each {'revisions', 'mean_words', 'mean_ratio'}, the last of words to
    the words of the response before, those without words left out; 'initial_words', their mean;
    'principles': id → times drawn, by round; 'duplicates': {'count', 'rate'} of last revisions that
    are another prompt's as well.
  """
  total, initial, lasts = 0, [], collections.Counter()
  lengths, ratios, counts = [], [], []  # by round
  drawn = {name: [] for name in known.requests}
  for row in rows:
    total += 1
    if not row['rounds']:
      continue
    while len(counts) < len(row['rounds']):
      for by_round, empty in ((lengths, []), (ratios, []), (counts, collections.Counter())):
        by_round.append(empty)
      for by_round in drawn.values():
        by_round.append(0)
    before = len(words(row['initial']['text']))
    initial.append(before)
    for at, step in enumerate(row['rounds']):
      counts[at].update(row_flags(row, at, known))
      drawn[step['principle']][at] += 1
      size = len(words(step['revision']['text']))
      lengths[at].append(size)
      if before:
        ratios[at].append(size / before)
      before = size
    lasts[row['rounds'][-1]['revision']['text'].strip()] += 1
  made = [len(sizes) for sizes in lengths]
  twice = sum(n for text, n in lasts.items() if n > 1 and text)
  return {
    'rows': total,
    'revisions': sum(made),
    'flags': {name: _rates([found[name] for found in counts], made) for name in FLAGS},
    'rounds': [
      {'revisions': n, 'mean_words': _mean(sizes), 'mean_ratio': _mean(changes)}
      for n, sizes, changes in zip(made, lengths, ratios, strict=True)
    ],
    'initial_words': _mean(initial),
    'principles': drawn,
    'duplicates': {'count': twice, 'rate': _share(twice, lasts.total())},
  }


def _rates(counts: Sequence[int], made: Sequence[int]) -> dict[str, Any]:
  return {
    'count': sum(counts),
    'rate': _share(sum(counts), sum(made)),
    'counts': list(counts),
    'rates': [_share(n, of) for n, of in zip(counts, made, strict=True)],
  }


def _share(count: int, of: int) -> float:
  return count / of if of else 0.0


def _mean(values: Sequence[float]) -> float | None:
  return sum(values) / len(values) if values else None


def over(summary: Mapping[str, Any], limits: Mapping[str, float]) -> list[str]:
  """'flag: rate of revisions, limit' for each rate of a summary that is above its limit."""
  found = ((name, summary['flags'][name]['rate'], limit) for name, limit in limits.items())
  return [
    f'{name}: {rate:.4g} of the revisions, limit {limit:g}'
    for name, rate, limit in found
    if rate > limit
  ]


def describe(summary: Mapping[str, Any], beside: Mapping[str, Any] | None = None) -> str:
  """A table of a summary, with the rates of another in the last column if one is given.

  Where the other lacks a flag, as one that its data cannot tell, there is a dash.
  """
  rounds = range(len(summary['rounds']))
  head = ['of the revisions, in %', 'all', *(f'round {at + 1}' for at in rounds)]
  lines = [head]
  for name in FLAGS:
    entry = summary['flags'][name]
    lines.append([name, *(f'{100 * rate:.1f}' for rate in (entry['rate'], *entry['rates']))])
  means = [entry['mean_words'] for entry in summary['rounds']]
  lines.append(['words, mean', '', *map(_number, means)])
  changes = [entry['mean_ratio'] for entry in summary['rounds']]
  lines.append(['words / words before, mean', '', *map(_number, changes)])
  lines.append(['last revisions of several prompts', f'{100 * summary["duplicates"]["rate"]:.1f}'])
  if beside is not None:
    found = beside['flags']
    others = [f'{100 * found[name]["rate"]:.1f}' if name in found else '-' for name in FLAGS]
    column = ['published', *others, '', '', f'{100 * beside["duplicates"]["rate"]:.1f}']
    lines = [[*line, *[''] * (len(head) - len(line)), other] for line, other in zip(
      lines, column, strict=True
    )]  # fmt: skip
  left = max(len(line[0]) for line in lines)
  return '\n'.join(
    (line[0].ljust(left) + ''.join(cell.rjust(10) for cell in line[1:])).rstrip() for line in lines
  )


def _number(value: float | None) -> str:
  return '-' if value is None else f'{value:.2f}'


def published_rows(
  path: str | os.PathLike,
) -> tuple[list[dict[str, Any]], dict[str, tuple[str, str]]]:
  """(rows as `summarise` takes them, principles as `references` does) of the paper's samples.

  The files are samples/*_SLMADISON.jsonl of Bai et al. 2022 (repository
  anthropics/ConstitutionalHarmlessnessPaper). They do not say how a sample ended: each
  `finish_reason` is 'stop', so 'truncated' cannot be told.

  Raises:
    ValueError: if the file is not there or a line is not such a sample, naming it.
  """
  path = os.fspath(path)
  name = os.path.basename(path).partition('.')[0]
  rows, principles = [], {}
  try:
    with open(path, encoding='utf-8') as file:
      lines = file.read().splitlines()
  except (OSError, UnicodeDecodeError) as error:
    raise UserError(f'{path}: not readable: {error}; give a *_SLMADISON.jsonl file.') from error
  for number, line in enumerate(lines, 1):
    try:
      row, found = _published_row(json.loads(line), f'{name}/{number}')
    except (KeyError, IndexError, TypeError, ValueError) as error:
      raise UserError(
        f'{path}, line {number}: no sample with rl_prompt, initial_response and cst '
        f'({type(error).__name__}: {error}); give a *_SLMADISON.jsonl file.'
      ) from error
    rows.append(row)
    principles |= found
  return rows, principles


def _published_row(sample: dict, name: str) -> tuple[dict[str, Any], dict[str, tuple[str, str]]]:
  """A row and the principles of its rounds."""
  reply = lambda part: {'text': part['sample'].strip(), 'finish_reason': 'stop'}  # noqa: E731
  _, *parts = _TURN.split(sample['rl_prompt'])
  turns = [
    {'role': _ROLES[label], 'content': content.strip()}
    for label, content in zip(parts[::2], parts[1::2], strict=True)
  ]
  steps = sample['cst']
  row = {
    'id': name,
    'kind': 'harmful',
    'prompt': turns[:-1],  # the last is the label that the response follows
    'initial': reply(sample['initial_response'][0]),
    'rounds': [
      {
        'principle': step['cst_key'],
        'critique': reply(step['critique']),
        'revision': reply(step['revision']),
      }
      for step in steps
    ],
  }
  requests = {
    step['cst_key']: (
      _request(''.join(step['cst_value']['prompt'])),
      _request(step['cst_value']['edit_request']),
    )
    for step in steps
  }
  return row, requests


def _request(text: str) -> str:
  """A request without its own label and that of the reply it asks for."""
  return _TURN.sub('', text).strip()
