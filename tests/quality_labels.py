"""Compare the flags of `cai_jax.data.quality` with labels that two readers gave blind.

tests/data/quality_labels.json has 200 revisions by their source, row, round and the SHA-256 of the
text: 108 of the published samples, 72 of SmolLM2-135M-Instruct at T = 0.7 and top-p 0.9 ('w07') and
20 of it at T = 1 ('w1'). 'a' and 'b' are the labels of the readers; 'resolved' are those after
reading again, where the readers disagree. Half of the rows, by the hash of the row's id, were not
looked at while the rules were written.

From the root of the repository:
  PYTHONPATH=. python tests/quality_labels.py SAMPLES.jsonl CONSTITUTION.yaml [w07=D_CAI w1=D_CAI]
"""

import hashlib
import json
import pathlib
import sys
from collections.abc import Callable, Iterable, Mapping

from cai_jax.constitution import ConstitutionConfig, load_constitution
from cai_jax.data import d_cai, quality
from cai_jax.data.published import read_published_samples
from cai_jax.evaluation.intervals import wilson_interval

PATH = pathlib.Path(__file__).parent / 'data' / 'quality_labels.json'
PUBLISHED = 'PALMS_SLMADISON'
# Label of the readers → the flags that look for it.
FLAGS = {
  'off_topic': ('off_topic_words', 'off_topic'),
  'loop': ('repetition',),
  'incoherent': ('low_logprob',),
  'wrong_language': ('wrong_language',),
  'copied_demonstration': ('demonstration',),
  'critique_copied': ('critique_copied',),
  'no_finding': ('no_finding_phrase',),
  'critique_is_not_a_critique': ('not_a_critique',),
}
LABELS = (*FLAGS, 'refusal')


def read_labels() -> list[dict]:
  """Return the labelled rows, with 'labels' as resolved and 'held_out'."""
  rows = json.loads(PATH.read_text())
  for row in rows:
    digest = hashlib.sha256(row['row'].encode()).hexdigest()
    row['labels'] = row.get('resolved', row['a'])
    row['held_out'] = int(digest, 16) % 2 == 1
  return rows


def cohens_kappa(a: Iterable[bool], b: Iterable[bool]) -> float | None:
  """Return (p_o - p_e) / (1 - p_e) of Cohen (1960), or None if all labels are equal.

  Args:
    a: one reader's labels.
    b: the other reader's labels, in the same order.
  """
  pairs = list(zip(a, b, strict=True))
  n = len(pairs)
  observed = sum(x == y for x, y in pairs) / n
  p, q = sum(x for x, _ in pairs) / n, sum(y for _, y in pairs) / n
  expected = p * q + (1 - p) * (1 - q)
  return None if expected == 1 else (observed - expected) / (1 - expected)


def find_flags(
  rows: Iterable[Mapping], sources: Mapping[str, Callable[[str, int], frozenset[str]]]
) -> list[tuple[Mapping, frozenset[str]]]:
  """Return the labelled rows of the given sources, each with its flags.

  Args:
    rows: from `read_labels`.
    sources: source → function that returns the flags of a row's round.
  """
  return [
    (row, sources[row['source']](row['row'], row['round']))
    for row in rows
    if row['source'] in sources
  ]


def open_source(
  rows: Iterable[Mapping], references: quality.References, labelled: Iterable[Mapping], source: str
) -> Callable[[str, int], frozenset[str]]:
  """Return a function that returns the flags of a row's round, after checking the texts' hashes.

  Args:
    rows: rows of D_CAI.
    references: texts of the constitution that the rows were sampled under.
    labelled: from `read_labels`.
    source: the name of the rows' source.
  """
  by_id = {row['id']: row for row in rows}
  for label in labelled:
    if label['source'] == source:
      text = by_id[label['row']]['rounds'][label['round']]['revision']['text']
      assert hashlib.sha256(text.encode()).hexdigest() == label['sha256'], label['row']
  return lambda name, index: quality.find_row_flags(by_id[name], index, references)


def open_published(path, labelled):
  """Return `open_source` of the published samples.

  Args:
    path: the file of samples.
    labelled: from `read_labels`.
  """
  rows, principles = read_published_samples(path)
  return open_source(rows, quality.build_references(principles), labelled, PUBLISHED)


def rate(found: int, total: int) -> str:
  """Return a rate with its 95 % interval (Wilson 1927).

  Args:
    found: number of successes.
    total: number of trials.
  """
  if not total:
    return 'none'
  low, high = wilson_interval(found, total)
  return f'{100 * found / total:.0f} % ({found}/{total}) [{100 * low:.0f}, {100 * high:.0f}]'


def main(published: str, constitution: str, *folders: str) -> None:
  """Print kappa for every label, and precision and recall of every flag on both halves.

  Args:
    published: the file of published samples.
    constitution: the constitution that the D_CAI folders were sampled under.
    *folders: SOURCE=FOLDER of a D_CAI.
  """
  rows = read_labels()
  loaded = load_constitution(ConstitutionConfig(path=constitution))
  requests = {p.id: (p.critique_request, p.revision_request) for p in loaded.principles}
  references = quality.build_references(requests, loaded.demonstrations)
  sources = {PUBLISHED: open_published(published, rows)}
  for folder in folders:
    name, _, path = folder.partition('=')
    sources[name] = open_source(d_cai.read_rows(path), references, rows, name)
  pairs = find_flags(rows, sources)
  print('| label | kappa, all rows | kappa, real model | disagreements |')
  for label in LABELS:
    kappas = []
    for chosen in (rows, [row for row in rows if row['source'] != PUBLISHED]):
      kappa = cohens_kappa(
        [label in row['a'] for row in chosen], [label in row['b'] for row in chosen]
      )
      kappas.append('-' if kappa is None else f'{kappa:.2f}')
    different = sum((label in row['a']) != (label in row['b']) for row in rows)
    print(f'| {label} | {kappas[0]} | {kappas[1]} | {different} |')
  for held_out in (False, True):
    print('held-out half' if held_out else 'half that the rules were written on')
    half = [pair for pair in pairs if pair[0]['held_out'] == held_out]
    print(f'{len(half)} rows: label | flag | precision | recall')
    for label, names in FLAGS.items():
      for flag in names:
        both = sum(label in row['labels'] and flag in flags for row, flags in half)
        flagged = sum(flag in flags for _, flags in half)
        labelled = sum(label in row['labels'] for row, _ in half)
        print(f'| `{label}` | `{flag}` | {rate(both, flagged)} | {rate(both, labelled)} |')


if __name__ == '__main__':
  main(*sys.argv[1:])
