"""Defects of a run's revisions: count them, and stop a run whose revisions have collapsed."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from cai_jax.data import d_cai, quality, quality_summary
from cai_jax.evaluation.intervals import wilson_interval
from cai_jax.model.lm import LM
from cai_jax.pipeline.models import make_dialogue
from cai_jax.pipeline.published_quality import summarize_published
from cai_jax.pipeline.run import Run
from cai_jax.report.finding_texts import COLLAPSE_FLAGS
from cai_jax.runtime.errors import UserError
from cai_jax.runtime.files import read_json, replacing, write_json
from cai_jax.runtime.shapes import check_shape
from cai_jax.runtime.terminal import say
from cai_jax.runtime.text_files import parse_json, read_lines
from cai_jax.sampling.remote import Remote
from cai_jax.scoring.topicality import find_off_topic

SUMMARY, ROWS = 'quality.json', 'quality_rows.jsonl'
EXAMPLES = 5  # rows to read when a run is stopped


def references(run: Run) -> quality.References:
  """Return the texts that a revision may have copied: requests and demonstrations."""
  requests = {p.id: (p.critique_request, p.revision_request) for p in run.constitution.principles}
  return quality.build_references(requests, run.constitution.demonstrations)


def score_topics(run: Run, models: Mapping[str, LM | Remote]) -> quality_summary.Scores:
  """Return how much each revision depends on its prompt by M_θ, if the config asks for it.

  Args:
    run: the run, whose D_CAI is complete.
    models: models by role, see `open_models`.

  Returns:
    (id of a row, round from 0) → {'topicality', 'topicality_threshold'} in nats per token, see
    `topicality.find_off_topic`. Empty if nothing is measured; a line of text says why.
  """
  lm = models['base']
  if not run.config.feedback.topicality:
    return {}
  if not isinstance(lm, LM):
    say('Whether revisions are off topic is told by their words only: a server holds M_θ.')
    return {}
  names, prompts, texts = [], [], []
  for row in d_cai.read_rows(run.workdir / 'd_cai'):
    for index, step in enumerate(row['rounds']):
      names.append((row['id'], index))
      prompts.append([{'role': m['role'], 'content': m['content']} for m in row['prompt']])
      texts.append(step['revision']['text'])
  try:
    found = find_off_topic(lm, make_dialogue(run, lm), prompts, texts, seed=run.config.seed)
  except UserError as error:
    say(f'Whether revisions are off topic is told by their words only: {error}')
    return {}
  if found.threshold is None:
    return {}
  return {
    name: {'topicality': score.topic, 'topicality_threshold': found.threshold}
    for name, score in zip(names, found.scores, strict=True)
  }


def measure_quality(run: Run, scores: quality_summary.Scores) -> None:
  """Write `quality.json` and `quality_rows.jsonl`, and print the table of the rates.

  Args:
    run: the run, whose D_CAI is complete.
    scores: from `score_topics`.
  """
  folder, texts = run.workdir / 'd_cai', references(run)
  records = quality_summary.flag_rows(d_cai.read_rows(folder), texts, scores)
  with replacing(run.workdir / ROWS) as temporary, open(temporary, 'w', encoding='utf-8') as file:
    for record in records:
      file.write(json.dumps(record, ensure_ascii=False) + '\n')
  summary = quality_summary.summarize(d_cai.read_rows(folder), texts, records)
  thresholds = {numbers['topicality_threshold'] for numbers in scores.values()}
  if thresholds:
    summary['topicality_threshold'] = thresholds.pop()
  published = None
  if path := run.config.report.published:
    published = summarize_published(path)
  content = {'d_cai': summary} | ({'published': published} if published else {})
  write_json(run.workdir / SUMMARY, content)
  say(quality_summary.format_table(summary, published))


def keep_limits(run: Run) -> None:
  """Stop the run if a defect is more frequent than `feedback.max_rate` allows.

  Args:
    run: the run, whose D_CAI is complete. What `measure_quality` wrote is measured again, without
      scores, if it is missing.

  Raises:
    UserError: if a limit is exceeded. Five of the rows are printed before.
  """
  paths = run.workdir / SUMMARY, run.workdir / ROWS
  if not all(path.exists() for path in paths):
    measure_quality(run, {})
  content = read_json(paths[0])
  check_shape(content, quality_summary.SHAPE, str(paths[0]))
  exceeded = exceeded_limits(content['d_cai'], run.config.feedback.max_rate)
  if not exceeded:
    return
  say(_format_examples(run, list(exceeded)))
  fields = ' and '.join(f'feedback.max_rate.{name}' for name in exceeded)
  raise UserError(
    f'{describe_excess(exceeded)}. All rows are kept in {run.workdir / "d_cai"}, and '
    f'{paths[1].name} names the defects of each. Sample again in another workdir with other '
    'sampling settings or another model, or, to continue with these rows, raise '
    f'{fields} and start again in the same workdir.'
  )


def exceeded_limits(
  summary: Mapping[str, Any], limits: Mapping[str, float]
) -> dict[str, tuple[float, float]]:
  """Return the defects whose rate is above its limit beyond chance: name → (rate, limit).

  The lower end of the rate's interval must be above the limit.

  Args:
    summary: from `quality_summary.summarize`.
    limits: the largest allowed share of the revisions, by defect.
  """
  lowest = {name: bounds[0] for name, bounds in flag_intervals(summary).items()}
  return {
    name: (summary['flags'][name]['rate'], limit)
    for name, limit in limits.items()
    if lowest.get(name, 0.0) > limit
  }


def flag_intervals(summary: Mapping[str, Any]) -> dict[str, tuple[float, float]]:
  """Return Wilson's 95 % interval of the rate of each defect; empty if nothing was revised.

  The number of trials is that of the revised rows, because revisions of one row are not
  independent.

  Args:
    summary: from `quality_summary.summarize`.
  """
  count = summary.get('revised_rows', summary.get('rows', 0))
  if not isinstance(count, int) or count < 1:
    return {}
  rates = {name: entry['rate'] for name, entry in summary['flags'].items()}
  return {
    name: wilson_interval(rate * count, count) for name, rate in rates.items() if 0 <= rate <= 1
  }


def describe_excess(exceeded: Mapping[str, tuple[float, float]]) -> str:
  """Return a sentence, without its full stop, that says what is wrong with the revisions.

  Args:
    exceeded: from `exceeded_limits`; not empty.
  """
  by_rate = sorted(exceeded.items(), key=lambda item: -item[1][0])
  meaning = {name: COLLAPSE_FLAGS.get(name, f'have the defect {name}') for name in exceeded}
  parts = [
    f'{100 * rate:.0f} % {meaning[name]} (limit {100 * limit:g} %)'
    for name, (rate, limit) in by_rate
  ]
  collapsed = {name for name, limit in quality.MAX_RATE.items() if limit < 1} - {'truncated'}
  head = 'have collapsed' if collapsed & set(exceeded) else 'have too many defects'
  return f'The revisions {head}: {", ".join(parts)}'


def _format_examples(run: Run, names: Sequence[str]) -> str:
  """Return five revisions with one of the defects, spread over the dataset, shortened."""
  path = run.workdir / ROWS
  records = [parse_json(line) for _, line in read_lines(path)]
  flagged = [record for record in records if set(names) & set(record['flags'])]
  step = max(len(flagged) / EXAMPLES, 1)
  chosen = [flagged[int(i * step)] for i in range(min(EXAMPLES, len(flagged)))]
  ids = {record['id'] for record in chosen}
  rows = {row['id']: row for row in d_cai.read_rows(run.workdir / 'd_cai') if row['id'] in ids}
  lines = [f'{len(chosen)} of the {len(flagged)} revisions to read:']
  for record in chosen:
    row, number = rows[record['id']], record['round']
    previous = row['rounds'][number - 1]['revision'] if number else row['initial']
    lines += [
      f'\n{record["id"]}, round {number + 1}: {", ".join(record["flags"])}',
      f'  prompt:   {_shorten(row["prompt"][-1]["content"], 200)}',
      f'  before:   {_shorten(previous["text"], 200)}',
      f'  revision: {_shorten(row["rounds"][number]["revision"]["text"], 400)}',
    ]
  return '\n'.join(lines)


def _shorten(text: str, length: int) -> str:
  line = ' '.join(text.split())
  return line if len(line) <= length else line[: length - 1] + '…'
