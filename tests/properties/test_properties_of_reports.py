"""Any bytes in the files that a report reads give a page, or an error that names the key."""

import json
import re

from harness import Fault, Reader, check_reader

from cai_jax import report
from cai_jax.data.quality import FLAGS
from cai_jax.pipeline.stage_report import describe_quality, read_summary
from cai_jax.training.metrics import read_rows

RATES = {'violation_rate': 0.5, 'violation_rate_interval': [0.4, 0.6], 'count': 3, 'mean_x': 1.5}
SUMMARY = {
  'stages': {'initial': RATES, 'revision_1': RATES},
  'models': {'base': RATES, 'aligned': {'mean_tokens': None}},
  'benign': {},
}
RATE = {'count': 1, 'rate': 0.5, 'counts': [1, 0], 'rates': [0.5, 0.0]}
QUALITY = {
  'd_cai': {
    'flags': {name: RATE for name in FLAGS},
    'rounds': [{'revisions': 2, 'mean_words': 2.0, 'mean_ratio': None}] * 2,
    'duplicates': {'count': 0, 'rate': 0.0},
  },
  'published': {'flags': {}, 'duplicates': {'rate': 0.25}},
}
METRICS = [{'step': i, 'loss': 2.0 / i, 'grad_norm': 1.0, 'num_tokens': 5.0} for i in (1, 2, 3)]
HELD_OUT = [{'step': i, 'loss': 2.0} for i in (1, 3)]
PROBES = [{'step': i, 'id': 'a', 'prompt': 'Hi', 'text': '<b>'} for i in (1, 3)]
FILES = {'metrics.jsonl': METRICS, 'held_out.jsonl': HELD_OUT, 'probes.jsonl': PROBES}


def write(folder, **files):
  arguments = {'summary': {}, 'training': [], 'chains': [], 'config': {}, 'manifest': {}}
  path = folder / 'page.html'
  report.write_report(path, title='t', **(arguments | files))
  return path.read_text()


def as_lines(rows):
  return ''.join(json.dumps(row) + '\n' for row in rows).encode()


def read_training(folder):
  training, held_out, probes = (read_rows(folder / name) for name in FILES)
  return write(folder, training=training, held_out=held_out, probes=probes)


def check_training(files, page):
  assert not re.search(r'<(script(?! type="application/json")|img|iframe)\b', after_style(page))
  rows = [json.loads(line) for line in files.get('probes.jsonl', b'').split(b'\n')[:-1]]
  assert len(rows) == page.count('<th scope="row">')
  for row in rows:  # a row has these types, or it was refused
    assert type(row['step']) is int and isinstance(row['text'], str)


def after_style(page):
  """Return the part of the page that this run wrote: between its style sheet and its script."""
  return page.split('</style>', 1)[1].rsplit('<script>', 1)[0]


def read_scores(folder):
  summary = read_summary(folder / 'summary.json')
  report.summary_table(summary)
  return write(folder, summary=summary)


def check_scores(files, page):
  summary = json.loads(files['summary.json'])
  rows = [row for group in summary.values() for row in (group or {}).values()]
  assert page.count('<tr><th scope="row">') == len(rows)
  for row in rows:
    for key, value in row.items():
      assert not key.endswith('_rate') or value is None or 0 <= value <= 1


def read_quality(folder):
  return describe_quality(folder / 'quality.json')


def check_quality(files, table):
  content = json.loads(files['quality.json'])
  for name in FLAGS:
    assert f'{100 * content["d_cai"]["flags"][name]["rate"]:.1f}' in table


TRAINING = Reader(
  inputs=[{name: as_lines(rows) for name, rows in FILES.items()}],
  read=read_training,
  check=check_training,
  fragments=[b'<script>', b'"step": true', b'1e400', b'{"step": 4}\n'],
)
SCORES = Reader(
  inputs=[{'summary.json': json.dumps(SUMMARY).encode()}], read=read_scores, check=check_scores
)
DEFECTS = Reader(
  inputs=[{'quality.json': json.dumps(QUALITY).encode()}], read=read_quality, check=check_quality
)
FAULTS = [
  Fault(
    f'{__name__}:TRAINING',
    'cai_jax.training.metrics',
    '  check_shape(row, shape, place)\n',
    '',
  ),
  Fault(
    f'{__name__}:SCORES',
    'cai_jax.report.numbers',
    "'interval': ([float], None)",
    "'interval': object",
  ),
  Fault(
    f'{__name__}:DEFECTS',
    'cai_jax.pipeline.stage_report',
    '  check_shape(summary, quality_summary.SHAPE, str(path))\n',
    '',
  ),
]


def test_rows_of_training():
  check_reader(f'{__name__}:TRAINING')


def test_scores():
  check_reader(f'{__name__}:SCORES')


def test_quality():
  check_reader(f'{__name__}:DEFECTS')
