"""Rates of defects over the revisions of a dataset, as a JSON summary and as a text table."""

import collections
import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from cai_jax.data.quality import FLAGS, References, find_row_flags, mean_logprob
from cai_jax.data.text_rules import split_words
from cai_jax.runtime.shapes import optional


@dataclasses.dataclass
class _Round:
  """Running counts of the revisions of one round."""

  lengths: list[int] = dataclasses.field(default_factory=list)  # words
  ratios: list[float] = dataclasses.field(default_factory=list)  # words / words before
  flags: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
  principles: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)


Scores = Mapping[tuple[str, int], Mapping[str, float]]


def flag_rows(
  rows: Iterable[Mapping[str, Any]], references: References, scores: Scores | None = None
) -> list[dict[str, Any]]:
  """Return the flags and scores of every revision of a dataset.

  Args:
    rows: see `summarize`.
    references: the texts of the constitution, from `quality.build_references`.
    scores: (id of a row, round from 0) → numbers of a model, see `quality.find_flags`.

  Returns:
    JSON objects in the order of rows and rounds: {'id', 'round' from 0, 'flags': sorted names,
    'scores': name → number}. The scores have 'mean_logprob' if the rows have log-probabilities.
  """
  records = []
  for row in rows:
    for index, step in enumerate(row['rounds']):
      numbers = dict((scores or {}).get((row['id'], index), {}))
      flags = find_row_flags(row, index, references, numbers)
      numbers.pop('topicality_threshold', None)
      logprob = mean_logprob(step['revision'])
      if not math.isnan(logprob):
        numbers['mean_logprob'] = logprob
      records.append({'id': row['id'], 'round': index, 'flags': sorted(flags), 'scores': numbers})
  return records


def summarize(
  rows: Iterable[Mapping[str, Any]],
  references: References,
  records: Iterable[Mapping[str, Any]] | None = None,
) -> dict[str, Any]:
  """Summarize the revisions of a dataset.

  Args:
    rows: each has `id`, `prompt` (messages), `initial` {text, finish_reason} and `rounds` of
      {principle, critique, revision}. Rows without rounds count in 'rows' only.
    references: the texts of the constitution, from `quality.build_references`.
    records: the flags of the same rows, from `flag_rows`; by default those without scores.

  Returns:
    A JSON object:
      'rows', 'revised_rows', 'revisions': their numbers.
      'flags': name → {'count', 'rate', 'counts', 'rates'}. Rates are shares of the revisions; the
        last two are lists over rounds. A flag that no revision has the numbers for is absent.
      'rounds': a list of {'revisions', 'mean_words', 'mean_ratio'}. The ratio is the number of
        words divided by that of the response before, if it has any.
      'initial_words': mean number of words of the initial responses.
      'principles': id → how often it was drawn, as a list over rounds.
      'duplicates': {'count', 'rate'} of final revisions that another prompt has as well.
  """
  if records is None:
    rows = list(rows)
    records = flag_rows(rows, references)
  records = list(records)
  names = _measured_flags(records)
  flags_of = {(record['id'], record['round']): record['flags'] for record in records}
  num_rows = 0
  initial_lengths: list[int] = []
  final_texts: collections.Counter[str] = collections.Counter()
  rounds: list[_Round] = []
  for row in rows:
    num_rows += 1
    if not row['rounds']:
      continue
    rounds += [_Round() for _ in range(len(row['rounds']) - len(rounds))]
    length_before = len(split_words(row['initial']['text']))
    initial_lengths.append(length_before)
    for index, step in enumerate(row['rounds']):
      counts = rounds[index]
      counts.principles[step['principle']] += 1
      if not step.get('revised', True):  # the round kept the response, so there is no revision
        continue
      counts.flags.update(flags_of[row['id'], index])
      length = len(split_words(step['revision']['text']))
      counts.lengths.append(length)
      if length_before:
        counts.ratios.append(length / length_before)
      length_before = length
    final_texts[row['rounds'][-1]['revision']['text'].strip()] += 1
  num_revisions = [len(counts.lengths) for counts in rounds]
  num_duplicates = sum(n for text, n in final_texts.items() if n > 1 and text)
  return {
    'rows': num_rows,
    'revised_rows': len(initial_lengths),
    'revisions': sum(num_revisions),
    'flags': {
      name: _rates([counts.flags[name] for counts in rounds], num_revisions) for name in names
    },
    'rounds': [
      {'revisions': n, 'mean_words': _mean(counts.lengths), 'mean_ratio': _mean(counts.ratios)}
      for n, counts in zip(num_revisions, rounds, strict=True)
    ],
    'initial_words': _mean(initial_lengths),
    'principles': {
      name: [counts.principles[name] for counts in rounds] for name in references.requests
    },
    'duplicates': {
      'count': num_duplicates,
      'rate': _share(num_duplicates, final_texts.total()),
    },
  }


def _measured_flags(records: Sequence[Mapping[str, Any]]) -> list[str]:
  """Return the flags that the records can have, in the order of `FLAGS`."""
  needed = {'off_topic': 'topicality', 'low_logprob': 'mean_logprob'}
  known = {name for record in records for name in record['scores']}
  return [name for name in FLAGS if name not in needed or needed[name] in known]


_RATED = {'rate': float}
_SUMMARY = {
  'flags': {...: {'rate': float, 'rates': [float]}},
  'rounds': [{'mean_words': (float, None), 'mean_ratio': (float, None)}],
  'duplicates': _RATED,
}
# What `format_table` reads of the file quality.json.
SHAPE = {'d_cai': _SUMMARY, optional('published'): {'flags': {...: _RATED}, 'duplicates': _RATED}}


def format_table(summary: Mapping[str, Any], published: Mapping[str, Any] | None = None) -> str:
  """Return a text table of a summary: one line per flag, one column per round.

  Args:
    summary: from `summarize`.
    published: a summary of published samples, shown in the last column. A flag that it lacks is
      shown as a dash.
  """
  rounds = summary['rounds']
  header = ['of the revisions, in %', 'all', *(f'round {i + 1}' for i in range(len(rounds)))]
  lines = [header]
  for name, entry in summary['flags'].items():
    lines.append([name, *(f'{100 * rate:.1f}' for rate in (entry['rate'], *entry['rates']))])
  lines.append(['words, mean', '', *(_number(entry['mean_words']) for entry in rounds)])
  lines.append(['words / words before, mean', '', *(_number(e['mean_ratio']) for e in rounds)])
  lines.append(['last revisions of several prompts', f'{100 * summary["duplicates"]["rate"]:.1f}'])
  if published is not None:
    flags = published['flags']
    rates = [
      f'{100 * flags[name]["rate"]:.1f}' if name in flags else '-' for name in summary['flags']
    ]
    column = ['published', *rates, '', '', f'{100 * published["duplicates"]["rate"]:.1f}']
    lines = [
      [*line, *[''] * (len(header) - len(line)), cell]
      for line, cell in zip(lines, column, strict=True)
    ]
  width = max(len(line[0]) for line in lines)
  return '\n'.join(
    (line[0].ljust(width) + ''.join(cell.rjust(10) for cell in line[1:])).rstrip() for line in lines
  )


def _rates(counts: Sequence[int], totals: Sequence[int]) -> dict[str, Any]:
  return {
    'count': sum(counts),
    'rate': _share(sum(counts), sum(totals)),
    'counts': list(counts),
    'rates': [_share(count, total) for count, total in zip(counts, totals, strict=True)],
  }


def _share(count: int, total: int) -> float:
  return count / total if total else 0.0


def _mean(values: Sequence[float]) -> float | None:
  return sum(values) / len(values) if values else None


def _number(value: float | None) -> str:
  return '-' if value is None else f'{value:.2f}'
