"""D_CAI and its implied preferences as data sets of the hub, which `datasets` loads by name."""

import filecmp
import pathlib
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import tensorflow_datasets as tfds
from huggingface_hub import DatasetCardData

from cai_jax.data import d_cai, preferences
from cai_jax.pipeline.stage_report import read_quality
from cai_jax.publishing import card
from cai_jax.publishing.files import link, write_run_files
from cai_jax.publishing.finished_run import FinishedRun
from cai_jax.publishing.kinds import KINDS, Kind, Request
from cai_jax.publishing.licences import OWN, Licence, list_origins
from cai_jax.publishing.markdown import code, escape, table
from cai_jax.publishing.names import public_name
from cai_jax.report.finding_numbers import share
from cai_jax.runtime.errors import UserError
from cai_jax.runtime.files import make_folder
from cai_jax.tiny.files import MODELS

PREFERENCES = 'preferences.jsonl'
ROWS_AT_ONCE = 1000  # of a row group, so that memory does not grow with the data set
ROWS_PER_FILE = 50_000
_SETS = ('harmful', 'helpful')
_FIRST = ('id', 'kind', 'prompt', 'completion', 'initial', 'rounds')  # columns
_MODELS = ('model', 'critique_model', 'revision_model')  # fields with names of models
_SIZES = {1e3: 'n<1K', 1e4: '1K<n<10K', 1e5: '10K<n<100K', 1e6: '100K<n<1M', 1e7: '1M<n<10M'}
_WARNING = (
  'Prompts and responses can be harmful: initial responses are shown as the base model gave them, '
  'and nobody has read the revisions.'
)


def check_d_cai(run: FinishedRun) -> None:
  """Check that a run has generated a complete D_CAI, and that it has not changed since.

  Args:
    run: the run.

  Raises:
    UserError: if it has none, it is incomplete, or a file has changed.
  """
  if not run.has_done('generate'):
    other = run.values['data']['d_cai']
    reason = (
      f'it learned that of another run, {public_name(other)}. Publish it from there'
      if other
      else 'its stage generate is not done. Finish it first'
    )
    raise UserError(f'{run.folder} has no complete D_CAI to publish: {reason}.')
  d_cai.check_files(run.folder / 'd_cai')
  if d_cai.content_digest(run.folder / 'd_cai') != run.entry('generate').get('d_cai'):
    raise UserError(
      f'{run.folder / "d_cai"} is not the data set that stage generate wrote. Restore it.'
    )


def check_preferences(run: FinishedRun) -> None:
  """Check that a run has implied preferences, and that they are those of its D_CAI.

  Args:
    run: the run.

  Raises:
    UserError: if it has none, or D_CAI or their file has changed.
  """
  check_d_cai(run)
  if not run.entry('generate').get('preferences', {}).get('written'):
    raise UserError(f'{run.folder} has no preferences to publish: no revision differs.')
  if not (run.folder / PREFERENCES).is_file():
    raise UserError(f'{run.folder / PREFERENCES} is missing. Put it back.')
  with tempfile.TemporaryDirectory(prefix='publish-') as name:
    again = pathlib.Path(name) / PREFERENCES
    preferences.write_preferences(again, d_cai.read_rows(run.folder / 'd_cai'))
    if not filecmp.cmp(again, run.folder / PREFERENCES, shallow=False):
      raise UserError(
        f'{run.folder / PREFERENCES} does not have the pairs of {run.folder / "d_cai"}, from which '
        'stage generate wrote it. Restore it.'
      )


def find_licence(run: FinishedRun, request: Request) -> Licence:
  """Return the licence of the texts: the one that the user gives, or that of the embedded world.

  The conditions of prompts and models differ, and which of them hold for their texts is a question
  that no file answers.

  Args:
    run: the run.
    request: what the user asks for.
  """
  if request.licence is not None:
    return request.licence._replace(source='the publisher of this data set')
  origins = [o for name in _SETS for o in list_origins(run.values['prompts'][name])]
  models = card.list_models(run).values()
  is_own = all(origin.is_own for origin in origins) and all(name in MODELS for name in models)
  source = 'the licence of cai_jax, whose embedded world wrote all texts'
  return Licence(OWN, source) if is_own else Licence('')


def write_d_cai(run: FinishedRun, request: Request, licence: Licence, folder: pathlib.Path) -> None:
  """Write D_CAI as Parquet files, the files of the run, and the card.

  Args:
    run: the run.
    request: what the user asks for.
    licence: the licence of the texts.
    folder: an empty folder.
  """
  source = run.folder / 'd_cai'
  rows, features = d_cai.read_rows(source), tfds.builder_from_directory(str(source)).info.features
  types = {name: _arrow_type(feature) for name, feature in features.items()}
  schema = pa.schema(list((dict.fromkeys(_FIRST) | types | {'completion': _MESSAGES}).items()))
  data, count = make_folder(folder / 'data'), -(-len(rows) // ROWS_PER_FILE)
  for number in range(count):
    path = data / f'train-{number:05d}-of-{count:05d}.parquet'
    first, last = number * ROWS_PER_FILE, min((number + 1) * ROWS_PER_FILE, len(rows))
    with pq.ParquetWriter(path, schema) as writer:
      for start in range(first, last, ROWS_AT_ONCE):
        end = min(start + ROWS_AT_ONCE, last)
        group = [_published(rows[i], run.paths) for i in range(start, end)]
        writer.write_table(pa.Table.from_pylist(group, schema))
  write_run_files(run, folder)
  metadata = _metadata(request, licence, 'data/train-*.parquet', len(rows))
  columns = [[code(f.name), escape(_doc(features, f.name))] for f in schema]
  parts = [
    f'The data set D_CAI of the supervised phase of {card.PAPER}: {len(rows):,} prompts, each with '
    'a response and its revisions.',
    _WARNING,
    _describe_use(request, 'It trains as it is: `prompt` and `completion` are lists of messages.'),
    '## Columns\n\n' + table(['column', 'content'], columns),
    *_shared_parts(run, licence),
  ]
  _write_card(folder, metadata, request, parts)


def write_preferences(
  run: FinishedRun, request: Request, licence: Licence, folder: pathlib.Path
) -> None:
  """Write the implied preferences, the files of the run, and the card.

  Args:
    run: the run.
    request: what the user asks for.
    licence: the licence of the texts.
    folder: an empty folder.
  """
  link(run.folder / PREFERENCES, folder / PREFERENCES)
  write_run_files(run, folder)
  counts = run.entry('generate')['preferences']
  left_out = ', '.join(f'{n:,} {k.replace("_", " ")}' for k, n in counts.items() if k != 'written')
  parts = [
    f'{counts["written"]:,} comparisons of two responses to a prompt, made with the supervised '
    f'phase of {card.PAPER}. `chosen` is the last revision and `rejected` the initial response. '
    'Nobody has compared them: that a revision is better is an assumption of the method.',
    _WARNING,
    _describe_use(request, "The form is that of TRL's `DPOTrainer` and `RewardTrainer`."),
    f'Rows of D_CAI that give no comparison were left out: {left_out}.',
    *_shared_parts(run, licence),
  ]
  metadata = _metadata(request, licence, PREFERENCES, counts['written'])
  _write_card(folder, metadata, request, parts)


def _shared_parts(run: FinishedRun, licence: Licence) -> list[str]:
  """Return the sections that the cards of both data sets have."""
  return [
    card.describe_origin(run, _SETS),
    card.describe_constitution(run),
    _describe_quality(run),
    card.describe_evaluation(run, _round_names(run), ('stages',)),
    card.describe_worth(run),
    _describe_licence(licence),
  ]


_MESSAGES = pa.list_(pa.struct([('role', pa.string()), ('content', pa.string())]))


def _arrow_type(feature: Any) -> pa.DataType:
  """Return the type of a feature of D_CAI in Parquet."""
  if isinstance(feature, tfds.features.FeaturesDict):
    return pa.struct([(name, _arrow_type(part)) for name, part in feature.items()])
  if isinstance(feature, tfds.features.Sequence):
    return pa.list_(_arrow_type(feature.feature))
  if isinstance(feature, tfds.features.Text):
    return pa.string()
  return pa.from_numpy_dtype(feature.np_dtype)


def _published(row: Mapping[str, Any], paths: Mapping[str, str]) -> dict[str, Any]:
  """Return a row with what the train stage learns, and without folders in names of models."""
  turn = row['rounds'][-1]['revision'] if row['rounds'] else row['initial']
  models = {name: paths.get(row[name], row[name]) for name in _MODELS}
  names = {name: public_name(model) if model else '' for name, model in models.items()}
  return {**row, **names, 'completion': [{'role': 'assistant', 'content': turn['text']}]}


_DOCS = {
  'id': 'id of the prompt',
  'prompt': "the messages of the conversation, which ends with the user's",
  'initial': 'y_init, the response of the base model',
  'rounds': 'for each round the id of its principle, the critique and the revision',
  'seed': 'seed of the run',
  'critique_model': 'which sampled the critiques',
  'revision_model': 'which sampled the revisions',
  'completion': 'the last revision, or y_init if nothing was revised: what the model learns',
}


def _doc(features: Mapping[str, Any], name: str) -> str:
  doc = features[name].doc.desc if name in features else None
  return doc or _DOCS.get(name, '')


def _round_names(run: FinishedRun) -> dict[str, str]:
  rounds = range(1, run.values['feedback']['rounds'] + 1)
  return {'initial': 'initial response'} | {f'revision_{i}': f'revision {i}' for i in rounds}


def _metadata(request: Request, licence: Licence, files: str, count: int) -> str:
  data = DatasetCardData(
    license=licence.id or None,
    language=list(request.languages) or None,
    annotations_creators=['machine-generated'],
    size_categories=[next((text for most, text in _SIZES.items() if count < most), '10M<n<100M')],
    task_categories=['text-generation'],
    tags=[*card.TAGS, 'synthetic'],
    configs=[
      {'config_name': 'default', 'data_files': [{'split': d_cai.SPLIT, 'path': files}]},
    ],
  )
  return data.to_yaml()


def _describe_use(request: Request, note: str) -> str:
  code_lines = [
    '```python',
    'from datasets import load_dataset',
    '',
    f"rows = load_dataset('{request.repo}', split='{d_cai.SPLIT}')",
    '```',
  ]
  return '\n'.join(['## Use it', '', *code_lines, '', note])


def _describe_quality(run: FinishedRun) -> str:
  """Return the rates of defects of the revisions, with their intervals."""
  path = run.folder / 'quality.json'
  flags = read_quality(path)['d_cai']['flags'] if path.exists() else {}
  rows = [
    [code(name), share(entry['rate'], entry['interval'])]
    for name, entry in flags.items()
    if entry.get('interval')
  ]
  if not rows:
    return '## Defects\n\nThe defects of the revisions were not counted.'
  intro = 'Share of the revisions with a defect that a rule finds, with its 95 % interval (Wilson):'
  return f'## Defects\n\n{intro}\n\n{table(["defect", "share"], rows)}'


def _describe_licence(licence: Licence) -> str:
  if licence.id:
    text = f'{escape(licence.describe())}, according to {escape(licence.source)}.'
  else:
    text = (
      'Unknown: check the licences of the prompts and of the models above before you publish this '
      'data set, and give yours with `--license`.'
    )
  return f'## Licence\n\n{text} The prompts keep their own licences, which the table above names.'


def _write_card(
  folder: pathlib.Path, metadata: str, request: Request, parts: Sequence[str]
) -> None:
  title = request.repo.partition('/')[2]
  text = '\n\n'.join([f'---\n{metadata}\n---', f'# {title}', *parts]) + '\n'
  (folder / 'README.md').write_text(text, encoding='utf-8')


KINDS.register('d_cai')(Kind('dataset', check_d_cai, find_licence, write_d_cai))
KINDS.register('preferences')(Kind('dataset', check_preferences, find_licence, write_preferences))
