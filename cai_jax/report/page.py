"""A run as one HTML file that needs nothing else: no network, no other file, no library.

Model texts are data to be read, and some of them are written by models asked to misbehave. So they
never become markup: chains stand in the page as JSON in a block that is not run, with every `<`,
`>` and `&` escaped, and the page's script puts them on the screen as text nodes only. A Content
Security Policy allows exactly one script and one style sheet, the template's, by their hashes, and
no request to anywhere.
"""

import base64
import collections
import hashlib
import json
import math
import os
import pathlib
import re
from collections.abc import Mapping, Sequence
from types import MappingProxyType

from cai_jax.report import figures
from cai_jax.report.figures import Series, escape
from cai_jax.report.table import (
  MISSING,
  cell,
  columns,
  groups,
  heading,
  interval,
  round_number,
  share,
)
from cai_jax.runtime.errors import UserError

TEMPLATE = pathlib.Path(__file__).with_name('page.html')
MARKER = re.compile(r'@@([a-z_]+)@@')
# What a stage of the manifest tells in a column of its own; anything else goes to the last column.
STAGE_COLUMNS = {
  'rows_in': 'rows in',
  'rows_kept': 'kept',
  'rows_dropped': 'dropped',
  'tokens': 'tokens',
  'seconds': 'seconds',
  'tokens_per_second': 'tokens/s',
  'peak_memory_bytes': 'peak memory',
}
UNTOLD = ('settings', 'git_commit')  # of a stage: the config's fold and the header tell them
SERIES = (('violation_rate', 0), ('helpful_rate', 1))
SMOOTHED_FROM = 60  # steps from which the loss is drawn with a running mean


def write_report(
  path: str | os.PathLike,
  *,
  title: str,
  config: dict,
  manifest: dict,
  summary: dict,
  training: list[dict],
  chains: list[dict],
  held_out: Sequence[dict] = (),
  probes: Sequence[dict] = (),
  texts: Mapping[str, str] = MappingProxyType({}),
) -> None:
  """Writes the page of a run to `path`, all of it or nothing.

  Args:
    path: the HTML file; its folder exists.
    title: the page's heading.
    config: the resolved configuration; shown whole, with `seed` and `model.base` in the header.
    manifest: plain values are shown in the header, `stages` (name -> rows_in, rows_kept,
      rows_dropped as a number or a dict from reason to number, tokens, seconds, tokens_per_second,
      peak_memory_bytes, and others but for settings and git_commit) as a table, and all of it in a
      fold.
    summary: as `cai_jax.report.table` describes; may be empty.
    training: rows of metrics, `step`, `loss` and others; a figure passes over rows without its key.
    chains: records with `id`, `prompt` (messages), `initial`, `rounds` (each `principle`,
      `critique` or None, `revision`) and optionally `violations`, a list of names for each
      response. A response has `text` and optionally `finish_reason`, `logprob` (nats),
      `num_tokens`. A principle is an id, or a dict with `id` and its texts.
    held_out: `step` and `loss` on examples that were not trained on.
    probes: `step`, `id`, `prompt` and `text`: answers to the same prompts as training went on.
    texts: further sections, title → text whose lines are kept; an empty text has none.

  Raises:
    ValueError: if a chain lacks a field, an id stands twice, or the summary is malformed.
  """
  facts = {'model': (config.get('model') or {}).get('base'), 'seed': config.get('seed')}
  facts |= {
    key: value for key, value in manifest.items() if isinstance(value, str | int | float | bool)
  }
  write_page(
    path,
    title=title,
    head=fact_list(facts) + _lead(summary),
    results=_results(summary) + _figures(summary, training, held_out, config) + _probes(probes),
    sections=''.join(section(title, preformatted(text)) for title, text in texts.items() if text)
    + section(
      'Stages',
      _stages(manifest)
      + fold('Configuration', preformatted(readable(config)))
      + fold('Manifest', preformatted(readable(manifest))),
    ),
    chains=chains,
  )


def write_page(
  path: str | os.PathLike,
  *,
  title: str,
  head: str,
  results: str,
  sections: str,
  chains: list[dict],
) -> None:
  """Writes a page with a chain browser to `path`, all of it or nothing.

  Args:
    path: the HTML file; its folder exists.
    title: plain text.
    head: HTML under the title.
    results: HTML of the first section.
    sections: HTML of the sections between the results and the chains, each from `section`.
    chains: as `write_report` describes; each may have an `arm`, by which readers filter.

  Raises:
    ValueError: if a chain lacks a field or an id stands twice.
  """
  for number, chain in enumerate(chains):
    _check_chain(chain, number)
  counts = collections.Counter(chain['id'] for chain in chains)
  twice = [name for name, count in counts.items() if count > 1]
  if twice:
    raise UserError(f'chains have ids that stand more than once: {twice[:5]}; give each its own')
  template = TEMPLATE.read_text('utf-8')
  page = fill(
    template,
    policy=policy(template),
    title=escape(title),
    head=head,
    results=results,
    sections=sections,
    chains=embedded(chains),
  )
  path = pathlib.Path(path)
  temporary = path.with_name(path.name + '.part')
  # A lone surrogate (half a character, from a cut-off token) has no UTF-8 form.
  temporary.write_bytes(page.encode('utf-8', errors='backslashreplace'))
  os.replace(temporary, path)


def fill(template: str, **values: str) -> str:
  """Returns the template with each `@@name@@` replaced; what is put in is not looked at again.

  Raises:
    ValueError: if the template's markers and the given names are not the same set.
  """
  named = set(MARKER.findall(template))
  if named != set(values):
    raise UserError(f'the template has the markers {sorted(named)}, given are {sorted(values)}')
  return MARKER.sub(lambda match: values[match[1]], template)


def policy(template: str) -> str:
  """Returns a Content-Security-Policy that allows the template's one script and one style sheet."""
  hashes = {}
  for tag in ('script', 'style'):
    (body,) = re.findall(rf'<{tag}>(.*?)</{tag}>', template, re.DOTALL)
    digest = hashlib.sha256(body.encode('utf-8')).digest()
    hashes[tag] = f"'sha256-{base64.b64encode(digest).decode()}'"
  return (
    f"default-src 'none'; script-src {hashes['script']}; style-src {hashes['style']}; "
    "base-uri 'none'; form-action 'none'"
  )


def embedded(value) -> str:
  """Returns JSON that may stand inside a `<script>` element and parses back to the same value.

  Numbers JSON has no form for (NaN, infinities) become the strings 'NaN', 'Infinity', '-Infinity'.
  """
  text = json.dumps(_finite(value), ensure_ascii=True, allow_nan=False, separators=(',', ':'))
  for character in '<>&':
    text = text.replace(character, f'\\u{ord(character):04x}')
  return text


def readable(value) -> str:
  """Returns a value as indented JSON, for people."""
  return json.dumps(_finite(value), indent=2, ensure_ascii=False, default=str)


def _finite(value):
  if isinstance(value, dict):
    return {key: _finite(item) for key, item in value.items()}
  if isinstance(value, list | tuple):
    return [_finite(item) for item in value]
  if isinstance(value, float) and not math.isfinite(value):
    return 'NaN' if math.isnan(value) else 'Infinity' if value > 0 else '-Infinity'
  return value


def _check_chain(chain: dict, number: int) -> None:
  where = f'chain {number} (id {chain.get("id")!r})'
  for key in ('id', 'prompt', 'initial', 'rounds'):
    if key not in chain:
      raise UserError(f'{where} has no {key!r}; a chain has id, prompt, initial and rounds')
  for i, step in enumerate(chain['rounds'], 1):
    for key in ('principle', 'critique', 'revision'):
      if key not in step:
        raise UserError(f'{where}, round {i} has no {key!r}; a direct revision has critique None')
  responses = 1 + len(chain['rounds'])
  violations = chain.get('violations')
  if violations is not None and len(violations) != responses:
    raise UserError(
      f'{where} has {responses} responses and {len(violations)} lists of violations; give one each'
    )


def section(title: str, body: str) -> str:
  """Returns a section of the page: HTML under a heading of plain text."""
  name = re.sub(r'[^a-z]+', '-', title.lower())
  return (
    f'<section aria-labelledby="{name}-title"><h2 id="{name}-title">{escape(title)}</h2>'
    f'{body}</section>'
  )


def fold(summary: str, body: str) -> str:
  """Returns HTML that a reader opens by a click on its summary, which is plain text."""
  return f'<details><summary>{escape(summary)}</summary>{body}</details>'


def preformatted(text: str) -> str:
  """Returns plain text as HTML that keeps its lines."""
  return f'<pre>{escape(text)}</pre>'


def fact_list(facts: dict) -> str:
  """Returns the facts that are not None as an HTML list of name and value."""
  pairs = [
    f'<div><dt>{escape(key.replace("_", " "))}</dt><dd>{escape(value)}</dd></div>'
    for key, value in facts.items()
    if value is not None
  ]
  return f'<dl class="facts">{"".join(pairs)}</dl>' if pairs else ''


def _lead(summary: dict) -> str:
  """Returns the result in one or two sentences, as far as the summary tells it."""

  def rate(row):
    return f'<b>{100 * row["violation_rate"]:.1f}&nbsp;%</b>'

  def known(*rows):
    return all(row and row.get('violation_rate') is not None for row in rows)

  sentences = []
  stages, models = summary.get('stages') or {}, summary.get('models') or {}
  numbers = {round_number(name): row for name, row in stages.items()}
  last = max((n for n in numbers if n), default=0)
  if last and known(numbers.get(0), numbers[last]):
    sentences.append(
      f'On held-out prompts {rate(numbers[0])} of the initial responses break a rule; after {last} '
      f'{"round" if last == 1 else "rounds"} of critique and revision {rate(numbers[last])} do.'
    )
  if known(models.get('base'), models.get('aligned')):
    sentences.append(
      f'The base model breaks a rule in {rate(models["base"])} of its '
      f'answers, the aligned model in {rate(models["aligned"])}.'
    )
  return f'<p class="lead">{" ".join(sentences)}</p>' if sentences else ''


def _results(summary: dict) -> str:
  blocks, keys = groups(summary), columns(summary)
  if not blocks:
    return '<p class="none">Nothing was evaluated in this run.</p>'
  head = ''.join(f'<th scope="col">{escape(heading(key))}</th>' for key in keys)
  body = []
  for title, rows in blocks:
    body.append(
      f'<tbody><tr><th colspan="{len(keys) + 1}" scope="rowgroup">{escape(title)}</th></tr>'
    )
    for name, row in rows.items():
      cells = ''.join(_result_cell(row, key) for key in keys)
      body.append(f'<tr><th scope="row">{escape(name.replace("_", " "))}</th>{cells}</tr>')
    body.append('</tbody>')
  has_interval = any(
    interval(row, key) for _, rows in blocks for row in rows.values() for key in keys
  )
  note = '<p class="note">In brackets: 95 % interval.</p>' if has_interval else ''
  return (
    f'<div class="scroll"><table class="results"><thead><tr><td></td>{head}</tr></thead>'
    f'{"".join(body)}</table></div>{note}'
  )


def _result_cell(row: dict, key: str) -> str:
  return f'<td>{measured(row, key)}</td>'


def measured(row: dict, key: str) -> str:
  """Returns one number as HTML: a rate has a bar, and what has an interval its interval.

  Raises:
    ValueError: as `cell` does.
  """
  text = escape(cell(row, key))
  bounds = interval(row, key)
  is_rate = key.endswith('_rate') and row.get(key) is not None
  if not is_rate and not bounds:
    return text
  number, _, brackets = text.partition(' [')
  shown = f'<span class="number">{number}</span>'
  shown += f' <span class="interval">[{brackets}</span>' if brackets else ''
  mark = figures.share_bar(row[key], bounds, dict(SERIES).get(key, 2)) if is_rate else ''
  return f'<span class="rate">{mark}{shown}</span>'


def _probes(probes: Sequence[dict]) -> str:
  """Each probe prompt with its answers by step."""
  if not probes:
    return ''
  by_prompt: dict[tuple[str, str], list[dict]] = {}
  for row in probes:
    by_prompt.setdefault((row['id'], row['prompt']), []).append(row)
  parts = []
  for (_, prompt), rows in by_prompt.items():
    answers = ''.join(
      f'<tr><th scope="row">{row["step"]}</th><td>{escape(row["text"])}</td></tr>' for row in rows
    )
    parts.append(
      f'<table class="probes"><caption>{escape(prompt)}</caption><thead><tr>'
      '<th scope="col">step</th><th scope="col">answer</th></tr></thead>'
      f'<tbody>{answers}</tbody></table>'
    )
  return fold('Answers to probe prompts as training went on', ''.join(parts))


def _figures(summary: dict, training: list[dict], held_out: Sequence[dict], config: dict) -> str:
  drawn = []
  rates = _rate_series(summary)
  if rates:
    rounds = sorted({x for s in rates for x in s.x})
    drawn.append(
      figure(
        'Rates over revision rounds, with 95 % intervals'
        if any(s.low for s in rates)
        else 'Rates over revision rounds',
        figures.line_figure(
          rates,
          'revision round (0: initial response)',
          'share of responses (%)',
          description='Share of responses that break a rule and that still answer, by round',
          x_ticks=[(x, f'{x:g}') for x in rounds],
          y_range=(0, 100),
        ),
      )
    )
  normalization = (config.get('train') or {}).get('loss_normalization')
  unit = f'nats per {normalization}' if normalization in ('sequence', 'token') else 'nats'
  loss = _training_series(training, 'loss', 1)
  if loss:
    if held_out:
      x, y = zip(*((row['step'], row['loss']) for row in held_out), strict=True)
      loss.append(Series('held out', x, y, colour=0))
    caption, description = _training_caption(training, 'loss')
    svg = figures.line_figure(loss, 'training step', f'loss ({unit})', description=description)
    drawn.append(figure(caption, svg))
  others = []
  for key, label in (('learning_rate', 'learning rate'), ('grad_norm', 'gradient norm')):
    series = _training_series(training, key, 2)
    if series:
      caption, description = _training_caption(training, key)
      svg = figures.line_figure(series, 'training step', label, description=description)
      others.append(figure(caption, svg))
  parts = [f'<div class="figures">{"".join(drawn)}</div>'] if drawn else []
  if not loss:
    recorded = any(row.get('loss') is not None for row in training)
    said = 'No finite training loss' if recorded else 'No training loss'
    parts.append(f'<p class="none">{said} was recorded in this run.</p>')
  if others:
    drawn_others = f'<div class="figures">{"".join(others)}</div>'
    parts.append(fold('Learning rate and gradient norm', drawn_others))
  return ''.join(parts)


def figure(caption: str, svg: str, wide: bool = False) -> str:
  """Returns an SVG under its caption, which is plain text; a wide one has the whole line."""
  kind = ' class="wide"' if wide else ''
  return f'<figure{kind}><figcaption>{escape(caption)}</figcaption>{svg}</figure>'


def _rate_series(summary: dict) -> list[Series]:
  rows = {round_number(name): row for name, row in (summary.get('stages') or {}).items()}
  rounds = sorted(n for n in rows if n is not None)
  series = []
  for key, colour in SERIES:
    given = [n for n in rounds if rows[n].get(key) is not None]
    if not given:
      continue
    bounds = [interval(rows[n], key) for n in given]
    low, high = (
      tuple(100 * b[side] if b else None for b in bounds) if any(bounds) else None
      for side in (0, 1)
    )
    y = tuple(100 * share(rows[n][key], key) for n in given)
    series.append(Series(heading(key), tuple(given), y, low, high, colour))
  return series


def _training_series(training: Sequence[dict], key: str, colour: int) -> list[Series]:
  rows = [(r['step'], r[key]) for r in training if r.get(key) is not None and 'step' in r]
  if not any(math.isfinite(value) for _, value in rows):
    return []
  x, y = zip(*rows, strict=True)
  if key != 'loss' or len(rows) < SMOOTHED_FROM:
    return [Series(key.replace('_', ' '), x, y, colour=colour)]
  window = max(10, len(rows) // 20)
  name = f'mean of the last {window}'
  return [
    Series('each step', x, y, colour=colour, faint=True),
    Series(name, x, running_mean(y, window), colour=colour),
  ]


def _training_caption(training: list[dict], key: str) -> tuple[str, str]:
  """Returns a figure's caption and its description; values it cannot draw are counted in both."""
  values = [row[key] for row in training if row.get(key) is not None and 'step' in row]
  finite = [value for value in values if math.isfinite(value)]
  name = key.replace('_', ' ').capitalize()
  gone = len(values) - len(finite)
  caption = f'{name} over training' + (f' ({gone} values not finite: gaps)' if gone else '')
  return caption, f'{caption}: {len(values)} values from {finite[0]:.4g} to {finite[-1]:.4g}'


def running_mean(values: tuple[float, ...], window: int) -> tuple[float, ...]:
  """Returns the mean of the last `window` finite values up to each; NaN where there is none yet."""
  means, kept = [], []
  for value in values:
    if math.isfinite(value):
      kept = [*kept, value][-window:]
    means.append(math.fsum(kept) / len(kept) if kept else math.nan)
  return tuple(means)


def _stages(manifest: dict) -> str:
  stages = manifest.get('stages') or {}
  if not stages:
    return '<p class="none">The manifest names no stage.</p>'
  stages = {
    name: {key: value for key, value in stage.items() if key not in UNTOLD}
    for name, stage in stages.items()
  }
  given = {key for stage in stages.values() for key in stage}
  keys = [key for key in STAGE_COLUMNS if key in given]
  has_more = bool(given - set(STAGE_COLUMNS))
  names = ['stage', *(STAGE_COLUMNS[key] for key in keys)]
  head = ''.join(f'<th scope="col">{escape(name)}</th>' for name in names)
  head += '<th scope="col" class="further">further</th>' if has_more else ''
  rows = []
  for name, stage in stages.items():
    cells = ''.join(f'<td>{cost_cell(key, stage.get(key))}</td>' for key in keys)
    more = {key: value for key, value in stage.items() if key not in STAGE_COLUMNS}
    further = ''.join(
      f'<div>{escape(key.replace("_", " "))}: {escape(plain(value))}</div>'
      for key, value in more.items()
    )
    further = fold('counts', further) if more else ''
    cells += f'<td class="further">{further}</td>' if has_more else ''
    rows.append(f'<tr><th scope="row">{escape(name)}</th>{cells}</tr>')
  return (
    f'<div class="scroll"><table class="stages"><thead><tr>{head}</tr></thead>'
    f'<tbody>{"".join(rows)}</tbody></table></div>'
  )


def cost_cell(key: str, value) -> str:
  """Returns what a stage tells under `key`, as HTML: memory in MiB or GiB, counts with reasons."""
  if value is None:
    return MISSING
  if isinstance(value, dict):
    total = f'{sum(value.values()):,}'
    reasons = ''.join(f'<div class="reason">{escape(k)}: {n:,}</div>' for k, n in value.items())
    return total + reasons
  if key == 'peak_memory_bytes':
    return f'{value / 2**20:,.0f} MiB' if value < 2**30 else f'{value / 2**30:,.1f} GiB'
  return escape(plain(value))


def plain(value) -> str:
  """Returns a value of any JSON type as a short text for people."""
  if isinstance(value, dict):
    return ', '.join(f'{key.replace("_", " ")} {plain(item)}' for key, item in value.items())
  if isinstance(value, bool) or not isinstance(value, int | float):
    return value if isinstance(value, str) else json.dumps(_finite(value), default=str)
  if isinstance(value, int):
    return f'{value:,}'
  return f'{value:,.0f}' if abs(value) >= 1000 else f'{value:,.3g}'
