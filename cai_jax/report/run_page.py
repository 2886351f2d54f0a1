"""The page of a run: results, figures of training, probes, stages and configuration."""

import collections
import math
import os
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from cai_jax.report.differences import PROMPT_INTERVALS, difference_html, explain_marks
from cai_jax.report.elements import (
  cost_cell,
  escape,
  fact_list,
  figure,
  figure_grid,
  fold,
  format_value,
  indented_json,
  note_list,
  number_html,
  preformatted,
  section,
)
from cai_jax.report.figure_data import MAX_MARKERS, Series
from cai_jax.report.figures import line_figure
from cai_jax.report.findings import Diagnosis
from cai_jax.report.numbers import check_rate, columns, groups, heading, interval, round_number
from cai_jax.report.page import write_page
from cai_jax.report.palette import RATE_COLOURS
from cai_jax.report.score_figures import score_figures
from cai_jax.report.svg import inline_svg
from cai_jax.runtime.shapes import optional

# Fields of a stage that have a column of their own. All others share the last column.
STAGE_COLUMNS = {
  'rows_in': 'rows in',
  'rows_kept': 'kept',
  'rows_dropped': 'dropped',
  'tokens': 'tokens',
  'seconds': 'seconds',
  'tokens_per_second': 'tokens/s',
  'peak_memory_bytes': 'peak memory',
}
# Shown in the configuration, in the header and below the figures.
HIDDEN_STAGE_FIELDS = ('settings', 'git_commit', 'environment', 'paths', 'remarks')
_COST = (float, None, {...: float})  # a number, or a dict from reason to number
MANIFEST_SHAPE = {  # what the page computes with
  'stages': {...: {optional('remarks'): [str]} | {optional(key): _COST for key in STAGE_COLUMNS}},
}
COMPARED_COLUMNS, PLAIN_COLUMNS = 3, 4  # of a table of scores: more are wider than the page
SMOOTHING_MIN_STEPS = 60  # from this many steps on, the loss also has a running mean


def write_report(
  path: str | os.PathLike,
  *,
  title: str,
  config: Mapping[str, Any],
  manifest: Mapping[str, Any],
  summary: dict[str, Any],
  training: list[dict[str, Any]],
  chains: list[dict[str, Any]],
  diagnosis: Diagnosis | None = None,
  held_out: Sequence[dict[str, Any]] = (),
  probes: Sequence[dict[str, Any]] = (),
  texts: Mapping[str, str] = MappingProxyType({}),
) -> None:
  """Write the page of a run atomically.

  Args:
    path: the HTML file; its folder must exist.
    title: the page's heading.
    config: the resolved configuration. The page shows all of it, and `seed` and `model.base` in the
      header.
    manifest: the manifest of the run. The header shows its plain values, a table shows its
      `stages`, and a section that can be opened shows all of it. A stage may have rows_in,
      rows_kept, rows_dropped (a number, or a dict from reason to number), tokens, seconds,
      tokens_per_second, peak_memory_bytes, remarks (sentences that the page shows below the
      figures) and other fields.
    summary: the summary, as `cai_jax.report.numbers` describes; may be empty.
    training: rows with `step`, `loss` and other metrics. A figure skips rows without its metric.
    chains: records with `id`, `prompt` (messages), `initial`, `rounds` (each with `principle`,
      `critique` or None, and `revision`) and optionally `violations`, a list of rule names per
      response. A response has `text` and optionally `finish_reason`, `logprob` (nats),
      `num_tokens`, `flags` (names of defects) and `scores` (numbers by name). A principle is an
      id, or a dict with `id` and its texts. A chain on a held-out prompt has `answers`, the
      responses of other models by name, 'aligned' first, and possibly `verdicts`: a judge's
      log-odds for a response, by the name of the comparison. An answer may have `violations`.
    diagnosis: what is wrong with the run, for the first section; None leaves it out.
    held_out: rows with `step` and `loss` on examples that are not trained on.
    probes: rows with `step`, `id`, `prompt` and `text`: answers to the same prompts over training.
    texts: plain text of additional sections, by title. Empty texts are skipped.

  Raises:
    UserError: if a chain lacks a field, two chains have the same id, or the summary is malformed.
  """
  facts = {'model': (config.get('model') or {}).get('base'), 'seed': config.get('seed')}
  facts |= {
    key: value for key, value in manifest.items() if isinstance(value, str | int | float | bool)
  }
  stages = (
    _stage_table(manifest)
    + fold('Configuration', preformatted(indented_json(config)))
    + fold('Manifest', preformatted(indented_json(manifest)))
  )
  sections = [section(name, preformatted(text)) for name, text in texts.items() if text]
  write_page(
    path,
    title=title,
    head=fact_list(facts) + _lead(summary),
    results=_result_table(summary)
    + _figures(summary, training, held_out, config)
    + _remarks(manifest)
    + _probe_tables(probes),
    sections=''.join(sections) + section('Stages', stages),
    chains=chains,
    opening=_problems(diagnosis) if diagnosis else '',
  )


def _problems(diagnosis: Diagnosis) -> str:
  """Return the section on what is wrong with the run, worst first."""
  items = [
    f'<li class="{escape(finding.severity)}"><p class="what"><span class="tag '
    f'{"bad" if finding.severity in ("worthless", "serious") else ""}">{escape(finding.severity)}'
    f'</span>{escape(finding.title)}</p><p>{escape(finding.evidence)}</p>'
    f'<p class="advice">{escape(finding.advice)}</p></li>'
    for finding in diagnosis.findings
  ]
  body = f'<ol class="problems">{"".join(items)}</ol>' if items else '<p>Nothing was found.</p>'
  notes = [f'Checked: {", ".join(diagnosis.checked) or "nothing"}.']
  if diagnosis.unchecked:
    notes.append(f'Not checked, for lack of data: {", ".join(diagnosis.unchecked)}.')
  body += f'<p class="note">{escape(" ".join(notes))}</p>'
  return section('What is wrong with this run', body)


def _lead(summary: dict[str, Any]) -> str:
  """Return the main result in up to two sentences, as far as the summary has it."""

  def rate(row: dict[str, Any]) -> str:
    return f'<b>{100 * row["violation_rate"]:.1f}&nbsp;%</b>'

  def have_rates(*rows: dict[str, Any] | None) -> bool:
    return all(row and row.get('violation_rate') is not None for row in rows)

  sentences = []
  stages, models = summary.get('stages') or {}, summary.get('models') or {}
  rounds = {round_number(name): row for name, row in stages.items()}
  last = max((n for n in rounds if n), default=0)
  if last and have_rates(rounds.get(0), rounds[last]):
    sentences.append(
      f'On held-out prompts {rate(rounds[0])} of the initial responses break a rule; after {last} '
      f'{"round" if last == 1 else "rounds"} of critique and revision {rate(rounds[last])} do.'
    )
  if have_rates(models.get('base'), models.get('aligned')):
    sentences.append(
      f'The base model breaks a rule in {rate(models["base"])} of its '
      f'answers, the aligned model in {rate(models["aligned"])}.'
    )
  return f'<p class="lead">{" ".join(sentences)}</p>' if sentences else ''


def _result_table(summary: dict[str, Any]) -> str:
  blocks, keys = groups(summary), columns(summary)
  if not blocks:
    return '<p class="none">Nothing was evaluated in this run.</p>'
  compared = [row for _, rows in blocks for row in rows.values() if row.get('differences')]
  size = COMPARED_COLUMNS if compared else PLAIN_COLUMNS
  tables = [_score_table(blocks, keys[i : i + size]) for i in range(0, len(keys), size)]
  has_interval = any(
    interval(row, key) for _, rows in blocks for row in rows.values() for key in keys
  )
  note = f'In brackets: {PROMPT_INTERVALS}.' if has_interval else ''
  if compared:
    marks = explain_marks(compared, '▼ lower', '▲ higher')
    note += f' Second lines: paired difference to the row before (pp: percentage points); {marks}.'
  note = f'<p class="note">{escape(note.strip())}</p>' if note else ''
  return ''.join(tables) + note


def _score_table(blocks: Sequence[tuple[str, dict[str, Any]]], keys: Sequence[str]) -> str:
  """Return the table of some scores, with a block of rows per group."""
  head = ''.join(f'<th scope="col">{escape(heading(key))}</th>' for key in keys)
  body = []
  for title, rows in blocks:
    body.append(
      f'<tbody><tr><th colspan="{len(keys) + 1}" scope="rowgroup">{escape(title)}</th></tr>'
    )
    for name, row in rows.items():
      cells = ''.join(
        f'<td>{number_html(row, key)}{difference_html(row, key)}</td>' for key in keys
      )
      body.append(f'<tr><th scope="row">{escape(name.replace("_", " "))}</th>{cells}</tr>')
    body.append('</tbody>')
  return (
    f'<div class="scroll"><table class="results"><thead><tr><td></td>{head}</tr></thead>'
    f'{"".join(body)}</table></div>'
  )


def _probe_tables(probes: Sequence[dict[str, Any]]) -> str:
  """Return one table of answers by training step for each probe prompt."""
  if not probes:
    return ''
  by_prompt: dict[tuple[str, str], list[dict[str, Any]]] = {}
  for row in probes:
    by_prompt.setdefault((row['id'], row['prompt']), []).append(row)
  tables = []
  for (_, prompt), rows in by_prompt.items():
    answers = ''.join(
      f'<tr><th scope="row">{escape(row["step"])}</th><td>{escape(row["text"])}</td></tr>'
      for row in rows
    )
    tables.append(
      f'<table class="probes"><caption>{escape(prompt)}</caption><thead><tr>'
      '<th scope="col">step</th><th scope="col">answer</th></tr></thead>'
      f'<tbody>{answers}</tbody></table>'
    )
  return fold('Answers to probe prompts during training', ''.join(tables))


def _figures(
  summary: dict[str, Any],
  training: list[dict[str, Any]],
  held_out: Sequence[dict[str, Any]],
  config: Mapping[str, Any],
) -> str:
  rates, loss = _rate_figure(summary), _loss_figure(training, held_out, config)
  parts = [figure_grid([svg for svg in (rates, loss) if svg])]
  if scores := score_figures(summary):
    parts.append(fold('Every score over the rounds, with 95 % intervals', scores, is_open=True))
  if not loss:
    recorded = any(row.get('loss') is not None for row in training)
    reason = 'No finite training loss' if recorded else 'No training loss'
    parts.append(f'<p class="none">{reason} was recorded in this run.</p>')
  others = []
  for key, label in (('learning_rate', 'learning rate'), ('grad_norm', 'gradient norm')):
    series = _training_series(training, key, 2)
    if series:
      caption, description = _training_caption(training, key)
      drawing = line_figure(series, 'training step', label, description=description)
      others.append(figure(caption, inline_svg(drawing)))
  if others:
    parts.append(fold('Learning rate and gradient norm', figure_grid(others)))
  return ''.join(parts)


def _rate_figure(summary: dict[str, Any]) -> str:
  """Return the figure of both rates over revision rounds, or '' without rates."""
  series = _rate_series(summary)
  if not series:
    return ''
  rounds = sorted({x for s in series for x in s.x})
  drawing = line_figure(
    series,
    'revision round (0: initial response)',
    'share of responses (%)',
    description='Share of responses that break a rule and that still answer, by round',
    x_ticks=[(x, f'{x:g}') for x in rounds] if len(rounds) <= MAX_MARKERS else None,
    y_range=(0, 100),
  )
  caption = 'Rates over revision rounds'
  return figure(caption + ', with 95 % intervals' * any(s.low for s in series), inline_svg(drawing))


def _rate_series(summary: dict[str, Any]) -> list[Series]:
  rows = {round_number(name): row for name, row in (summary.get('stages') or {}).items()}
  all_rounds = sorted(n for n in rows if n is not None)
  series = []
  for key, colour in RATE_COLOURS.items():
    rounds = [n for n in all_rounds if rows[n].get(key) is not None]
    if not rounds:
      continue
    bounds = [interval(rows[n], key) for n in rounds]
    low, high = (
      tuple(100 * b[side] if b else None for b in bounds) if any(bounds) else None
      for side in (0, 1)
    )
    y = tuple(100 * check_rate(rows[n][key], key) for n in rounds)
    series.append(Series(heading(key), tuple(rounds), y, low, high, colour))
  return series


def _loss_figure(
  training: list[dict[str, Any]], held_out: Sequence[dict[str, Any]], config: Mapping[str, Any]
) -> str:
  """Return the figure of the loss over training, or '' if there is no finite loss."""
  series = _training_series(training, 'loss', 1)
  if not series:
    return ''
  if held_out:
    x, y = zip(*((row['step'], row['loss']) for row in held_out), strict=True)
    series.append(Series('held out', x, y, colour=0))
  normalization = (config.get('train') or {}).get('loss_normalization')
  unit = f'nats per {normalization}' if normalization in ('sequence', 'token') else 'nats'
  caption, description = _training_caption(training, 'loss')
  drawing = line_figure(series, 'training step', f'loss ({unit})', description=description)
  return figure(caption, inline_svg(drawing))


def _training_series(training: Sequence[dict[str, Any]], key: str, colour: int) -> list[Series]:
  rows = [(r['step'], r[key]) for r in training if r.get(key) is not None and 'step' in r]
  if not any(math.isfinite(value) for _, value in rows):
    return []
  x, y = zip(*rows, strict=True)
  if key != 'loss' or len(rows) < SMOOTHING_MIN_STEPS:
    return [Series(key.replace('_', ' '), x, y, colour=colour)]
  window = max(10, len(rows) // 20)
  return [
    Series('each step', x, y, colour=colour, faint=True),
    Series(f'mean of the last {window}', x, running_mean(y, window), colour=colour),
  ]


def _training_caption(training: list[dict[str, Any]], key: str) -> tuple[str, str]:
  """Return the caption and the description of a figure; both count values that are not finite."""
  values = [row[key] for row in training if row.get(key) is not None and 'step' in row]
  finite = [value for value in values if math.isfinite(value)]
  name = key.replace('_', ' ').capitalize()
  num_gaps = len(values) - len(finite)
  caption = f'{name} over training' + (f' ({num_gaps} values not finite: gaps)' if num_gaps else '')
  return caption, f'{caption}: {len(values)} values from {finite[0]:.4g} to {finite[-1]:.4g}'


def running_mean(values: tuple[float, ...], window: int) -> tuple[float, ...]:
  """Return, at each position, the mean of the last `window` finite values.

  Args:
    values: the values in order.
    window: number of values in a mean.

  Returns:
    As many means as values; NaN before the first finite value.
  """
  means: list[float] = []
  # Every finite float is a whole number of these units, so the sum is exact and the time linear.
  unit = 2**1074
  recent: collections.deque[int] = collections.deque()
  total = 0
  for value in values:
    if math.isfinite(value):
      numerator, denominator = value.as_integer_ratio()
      recent.append(numerator * (unit // denominator))
      total += recent[-1]
      if len(recent) > window:
        total -= recent.popleft()
    means.append(total / (len(recent) * unit) if recent else math.nan)
  return tuple(means)


def _remarks(manifest: Mapping[str, Any]) -> str:
  """Return what the stages remark about themselves, such as which step was exported."""
  stages = manifest.get('stages') or {}
  notes = [note for stage in stages.values() for note in stage.get('remarks', ())]
  return note_list(notes)


def _stage_table(manifest: Mapping[str, Any]) -> str:
  stages = manifest.get('stages') or {}
  if not stages:
    return '<p class="none">The manifest names no stage.</p>'
  stages = {
    name: {key: value for key, value in stage.items() if key not in HIDDEN_STAGE_FIELDS}
    for name, stage in stages.items()
  }
  fields = {key for stage in stages.values() for key in stage}
  keys = [key for key in STAGE_COLUMNS if key in fields]
  has_more = bool(fields - set(STAGE_COLUMNS))
  names = ['stage', *(STAGE_COLUMNS[key] for key in keys)]
  head = ''.join(f'<th scope="col">{escape(name)}</th>' for name in names)
  head += '<th scope="col" class="further">further</th>' if has_more else ''
  rows = []
  for name, stage in stages.items():
    cells = ''.join(f'<td>{cost_cell(key, stage.get(key))}</td>' for key in keys)
    more = ''.join(
      f'<div>{escape(key.replace("_", " "))}: {escape(format_value(value))}</div>'
      for key, value in stage.items()
      if key not in STAGE_COLUMNS
    )
    more = fold('counts', more) if more else ''
    cells += f'<td class="further">{more}</td>' if has_more else ''
    rows.append(f'<tr><th scope="row">{escape(name)}</th>{cells}</tr>')
  return (
    f'<div class="scroll"><table class="stages"><thead><tr>{head}</tr></thead>'
    f'<tbody>{"".join(rows)}</tbody></table></div>'
  )
