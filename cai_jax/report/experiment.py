"""An experiment of several arms as one HTML page, as figures in files and as a plain text table.

An arm is a way to run (or a response of a run to score); all are compared with one of them, the
reference, on the same prompts and seeds. The results are plain data, as an experiment writes them:

  {'name': 'revisions', 'title': 'Does every further revision help?', 'docstring': '...',
   'base': 'configs/tiny.py', 'seeds': [0, 1], 'reference': 'initial',
   'metrics': ['violation_rate', 'mean_tokens'],
   'arms': {'revision 1': {
     'response': 'revision_1', 'overrides': {'feedback.rounds': 4}, 'facts': {'coverage': 4.0},
     'groups': {'harmful': {
       'count': 1200,
       'metrics': {'violation_rate': {
         'value': 0.54, 'interval': [0.5, 0.58], 'by_seed': {'0': 0.54, '1': 0.52}}},
       'differences': {'violation_rate': {'value': -0.33, 'interval': [-0.36, -0.3]}}}}}},
   'figures': [
     {'kind': 'line', 'caption': '...', 'group': 'harmful', 'x_label': '...', 'y_label': '...',
      'series': [{'name': '...', 'metric': 'violation_rate', 'arms': ['revision 1'], 'x': [1]}]},
     {'kind': 'arms', 'caption': '...', 'group': 'harmful', 'metrics': [...], 'arms': [...]},
     {'kind': 'frontier', 'caption': '...', 'arms': [...],
      'x': ['harmful', 'violation_rate'], 'y': ['helpful', 'helpful_rate']}],
   'config_differences': {'feedback.rounds': {'revision 1': 4}},
   'costs': [{'run': 'feedback.rounds=4', 'seed': 0, 'stage': 'generate', 'turns': 5600,
              'reused_turns': 700, 'tokens': 100000, 'seconds': 13.2, 'peak_memory_bytes': 2**30}],
   'notes': ['A sentence to show as it is.']}

Every arm has the group 'harmful'; other groups and single metrics may be absent, a value may be
None: that is a dash in tables and in figures of kind 'arms', a gap in lines, an error in a
frontier.
Metrics named `*_rate` are shares in [0, 1] and shown in per cent, their differences in percentage
points. Differences are paired, arm minus reference; the reference itself has none.
"""

import math
import os
import pathlib
from collections.abc import Callable

from cai_jax.report import figures
from cai_jax.report.figures import Panel, Point, Series, escape
from cai_jax.report.page import (
  cost_cell,
  fact_list,
  figure,
  fold,
  measured,
  plain,
  preformatted,
  section,
  write_page,
)
from cai_jax.report.table import (
  MISSING,
  aligned,
  cell,
  decimals_of,
  heading,
  in_columns,
  interval,
)
from cai_jax.runtime.errors import UserError

COSTS = {
  'turns': 'turns sampled',
  'reused_turns': 'turns reused',
  'tokens': 'tokens',
  'seconds': 'seconds',
  'peak_memory_bytes': 'peak memory',
}
LARGEST = ('peak_memory_bytes',)  # of these costs a total is the largest, not the sum
PARTS = {
  'line': ('caption', 'group', 'x_label', 'y_label', 'series'),
  'arms': ('caption', 'group', 'metrics', 'arms'),
  'frontier': ('caption', 'x', 'y', 'arms'),
}


def write_experiment(path: str | os.PathLike, results: dict, chains: list[dict]) -> None:
  """Writes the page of an experiment to `path`, all of it or nothing.

  Args:
    path: the HTML file; its folder exists.
    results: as this module describes.
    chains: records as `cai_jax.report.write_report` takes them, each with the `arm` it is of and an
      id that no other chain of any arm has.

  Raises:
    ValueError: if the results are malformed or a chain's arm is none of them.
  """
  _check(results)
  arms = list(results['arms'])
  for chain in chains:
    if chain.get('arm') not in arms:
      raise UserError(f'chain {chain.get("id")!r}: arm {chain.get("arm")!r} is none of {arms}')
  shown = [
    figure(given['caption'], svg, wide=given['kind'] == 'arms' and len(given['metrics']) > 1)
    for given, svg in zip(results['figures'], _drawn(results), strict=True)
  ]
  sections = section('Settings', _settings(results))
  if results['costs']:
    sections += section('Costs', _costs(results['costs']))
  write_page(
    path,
    title=results['title'],
    head=_head(results),
    results=_arms(results)
    + _notes(results['notes'])
    + (f'<div class="figures">{"".join(shown)}</div>' if shown else '')
    + fold('Values by seed', _by_seed(results)),
    sections=sections,
    chains=chains,
  )


def write_figures(folder: str | os.PathLike, results: dict) -> list[pathlib.Path]:
  """Returns the paths `<name>_<n>.svg` of the figures it writes into the folder, n from 1.

  Each stands alone: black on white, with a typeface of its own. The folder is made if need be.

  Raises:
    ValueError: if the results are malformed.
  """
  _check(results)
  folder = pathlib.Path(folder)
  folder.mkdir(parents=True, exist_ok=True)
  paths = []
  for number, svg in enumerate(_drawn(results), 1):
    paths.append(folder / f'{results["name"]}_{number}.svg')
    paths[-1].write_text(figures.standalone(svg), 'utf-8')
  return paths


def experiment_table(results: dict) -> str:
  """Returns the arms with their numbers and paired differences as lines of aligned columns.

  Raises:
    ValueError: if the results are malformed.
  """
  _check(results)
  facts, metrics, blocks = _facts(results), results['metrics'], _blocks(results)
  lines = [['', *facts, 'count']]
  for metric in metrics:
    lines[0] += [heading(metric), 'difference']
  rows = [(name, part) for _, named in blocks for name, part in named.items()]
  columns = [
    [plain(results['arms'][name]['facts'].get(f, MISSING)) for name, _ in rows] for f in facts
  ]
  columns.append([f'{part["count"]:,}' for _, part in rows])
  for metric in metrics:
    columns.append(aligned([cell(_row(part, metric), metric) for _, part in rows]))
    columns.append(aligned([_difference(part, metric, '*') for _, part in rows]))
  cells = list(zip(*columns, strict=True))
  for group, named in blocks:
    lines.append([_group_title(group)] + [''] * len(columns))
    lines += [['  ' + name, *cells.pop(0)] for name in named]
  text = in_columns(lines)
  text.append(
    f'[ ]: 95 % interval; difference: paired, to {results["reference"]!r}, of rates in percentage '
    'points; *: the interval excludes zero'
  )
  return '\n'.join(text)


# ---- what the results must hold


def _check(results: dict) -> None:
  keys = ('name', 'title', 'docstring', 'base', 'seeds', 'reference', 'metrics', 'arms', 'figures')
  _require(results, (*keys, 'config_differences', 'costs', 'notes'), 'results')
  arms = results['arms']
  if results['reference'] not in arms:
    raise UserError(f'the reference {results["reference"]!r} is none of the arms {list(arms)}')
  for name, arm in arms.items():
    _require(arm, ('response', 'overrides', 'facts', 'groups'), f'arm {name!r}')
    if 'harmful' not in arm['groups']:
      raise UserError(f'arm {name!r} has the groups {list(arm["groups"])}; give it harmful')
    for group, part in arm['groups'].items():
      where = f'arm {name!r}, {group}'
      _require(part, ('count', 'metrics'), where)
      for kind in ('metrics', 'differences'):
        for metric, number in part.get(kind, {}).items():
          _require(number, ('value', 'interval'), f'{where}, {kind} {metric!r}')
  for number, given in enumerate(results['figures'], 1):
    where = f'figure {number}'
    _require(given, ('kind',), where)
    if given['kind'] not in PARTS:
      raise UserError(f'{where} is of kind {given["kind"]!r}; kinds are {list(PARTS)}')
    _require(given, PARTS[given['kind']], f'{where} ({given["kind"]})')
  for row in results['costs']:
    _require(row, ('run', 'seed', 'stage'), 'a row of costs')


def _require(given: dict, keys: tuple[str, ...], where: str) -> None:
  absent = [key for key in keys if key not in given]
  if absent:
    raise UserError(f'{where} has no {", ".join(map(repr, absent))}; it needs {", ".join(keys)}')


def _facts(results: dict) -> list[str]:
  return list(dict.fromkeys(fact for arm in results['arms'].values() for fact in arm['facts']))


def _blocks(results: dict) -> list[tuple[str, dict[str, dict]]]:
  """(group, {arm: what it has of the group}) in order."""
  arms = results['arms']
  groups = dict.fromkeys(group for arm in arms.values() for group in arm['groups'])
  return [
    (group, {name: arm['groups'][group] for name, arm in arms.items() if group in arm['groups']})
    for group in groups
  ]


def _group_title(group: str) -> str:
  return f'{group.capitalize()} prompts'


def _row(part: dict, metric: str) -> dict:
  """A metric of an arm as the row of numbers that `cell` and `measured` take."""
  number = part['metrics'].get(metric)
  return {metric: number['value'], f'{metric}_interval': number['interval']} if number else {}


# ---- differences


def _difference(part: dict, metric: str, mark: str = '') -> str:
  """`−33.0 [−36.0, −30.0]`, and the mark if the interval excludes zero; empty if there is none."""
  number = part.get('differences', {}).get(metric)
  if number is None or number['value'] is None:
    return ''
  unit = 100 if metric.endswith('_rate') else 1
  largest = max(map(abs, (number['value'], *(number['interval'] or ()))))
  decimals = 1 if unit == 100 else decimals_of(largest)

  def signed(value):
    text = f'{unit * value:+,.{decimals}f}'
    return text[1:] if not text.strip('+-0.,') else text.replace('-', '−')

  text = signed(number['value'])
  if number['interval']:
    text += f' [{", ".join(map(signed, number["interval"]))}]'
  return text + (f' {mark}' if mark and _direction(number) else '')


def _direction(number: dict) -> str:
  """'lower' or 'higher' if the difference's interval excludes zero, else ''.

  Raises:
    ValueError: if the interval is not a pair, low first.
  """
  bounds = number['interval']
  if bounds is None:
    return ''
  if len(bounds) != 2 or bounds[0] > bounds[1]:
    raise UserError(f'the interval of a difference is {bounds!r}; give [low, high] or None')
  return 'lower' if bounds[1] < 0 else 'higher' if bounds[0] > 0 else ''


def _difference_line(part: dict, metric: str) -> str:
  text = _difference(part, metric)
  if not text:
    return ''
  number, _, brackets = escape(text).partition(' [')
  unit = '&nbsp;pp' if metric.endswith('_rate') else ''
  shown = f'{number}{unit}' + (f' <span class="interval">[{brackets}</span>' if brackets else '')
  direction = _direction(part['differences'][metric])
  said = {'lower': ' <b>▼ lower</b>', 'higher': ' <b>▲ higher</b>', '': ''}[direction]
  return f'<span class="difference">{shown}{said}</span>'


# ---- the page's parts


def _head(results: dict) -> str:
  first, _, rest = results['docstring'].strip().partition('\n\n')
  facts = {
    'base configuration': results['base'],
    'seeds': ', '.join(map(str, results['seeds'])),
    'arms': len(results['arms']),
    'reference': results['reference'],
  }
  head = fact_list(facts) + f'<p class="lead">{escape(first)}</p>'
  return head + (fold('The whole description', preformatted(rest)) if rest.strip() else '')


def _arms(results: dict) -> str:
  facts, metrics = _facts(results), results['metrics']
  head = '<th scope="col" class="said">scored</th>'
  head += ''.join(f'<th scope="col">{escape(plain(name))}</th>' for name in (*facts, 'count'))
  head += ''.join(f'<th scope="col" class="metric">{escape(heading(m))}</th>' for m in metrics)
  width = 3 + len(facts) + len(metrics)
  body = []
  for group, named in _blocks(results):
    title = escape(_group_title(group))
    body.append(f'<tbody><tr><th colspan="{width}" scope="rowgroup">{title}</th></tr>')
    for name, part in named.items():
      arm = results['arms'][name]
      cells = f'<td class="said">{escape(arm["response"].replace("_", " "))}</td>'
      cells += ''.join(f'<td>{escape(plain(arm["facts"].get(f, MISSING)))}</td>' for f in facts)
      cells += f'<td>{part["count"]:,}</td>'
      for metric in metrics:
        shown = measured(_row(part, metric), metric) + _difference_line(part, metric)
        cells += f'<td class="metric">{shown}</td>'
      body.append(f'<tr><th scope="row">{escape(name)}</th>{cells}</tr>')
    body.append('</tbody>')
  note = (
    f'In brackets: 95 % interval. Second lines: paired difference to {results["reference"]} (pp: '
    'percentage points), with ▲ higher or ▼ lower where its interval excludes zero.'
  )
  return (
    f'<div class="scroll"><table class="results arms"><thead><tr><td></td>{head}</tr></thead>'
    f'{"".join(body)}</table></div><p class="note">{escape(note)}</p>'
  )


def _by_seed(results: dict) -> str:
  seeds, metrics = [str(seed) for seed in results['seeds']], results['metrics']
  head = ''.join(
    f'<th scope="colgroup" colspan="{len(seeds)}">{escape(heading(metric))}</th>'
    for metric in metrics
  )
  second = ''.join(f'<th scope="col">{escape(seed)}</th>' for seed in seeds) * len(metrics)
  body = []
  for group, named in _blocks(results):
    title, width = escape(_group_title(group)), 1 + len(seeds) * len(metrics)
    body.append(f'<tbody><tr><th colspan="{width}" scope="rowgroup">{title}</th></tr>')
    for name, part in named.items():
      values = [
        cell({metric: part['metrics'].get(metric, {}).get('by_seed', {}).get(seed)}, metric)
        for metric in metrics
        for seed in seeds
      ]
      cells = ''.join(f'<td>{escape(value)}</td>' for value in values)
      body.append(f'<tr><th scope="row">{escape(name)}</th>{cells}</tr>')
    body.append('</tbody>')
  return (
    '<div class="scroll"><table class="results"><thead>'
    f'<tr><td></td>{head}</tr><tr><th scope="row">seed</th>{second}</tr></thead>'
    f'{"".join(body)}</table></div>'
  )


def _notes(notes: list[str]) -> str:
  items = ''.join(f'<li>{escape(note)}</li>' for note in notes)
  return f'<ul class="notes">{items}</ul>' if items else ''


def _settings(results: dict) -> str:
  fields = {field: dict(arms) for field, arms in results['config_differences'].items()}
  for name, arm in results['arms'].items():
    for field, value in arm['overrides'].items():
      fields.setdefault(field, {}).setdefault(name, value)
  base = escape(results['base'])
  if not fields:
    return f'<p class="none">All arms have the configuration {base}.</p>'
  head = ''.join(f'<th scope="col">{escape(field)}</th>' for field in fields)
  rows = []
  for name in results['arms']:
    values = [plain(arms[name]) if name in arms else MISSING for arms in fields.values()]
    cells = ''.join(f'<td>{escape(value)}</td>' for value in values)
    rows.append(f'<tr><th scope="row">{escape(name)}</th>{cells}</tr>')
  return (
    f'<div class="scroll"><table class="settings"><thead><tr><th scope="col">arm</th>{head}</tr>'
    f'</thead><tbody>{"".join(rows)}</tbody></table></div>'
    f'<p class="note">Fields in which arms differ; {MISSING}: as in {base}.</p>'
  )


def _costs(costs: list[dict]) -> str:
  stages = [
    {'stage': stage} | _total([row for row in costs if row['stage'] == stage])
    for stage in dict.fromkeys(row['stage'] for row in costs)
  ]
  whole = _cost_table(costs, ('run', 'seed', 'stage'), _total(costs))
  return _cost_table(stages, ('stage',), _total(costs)) + fold('By run, seed and stage', whole)


def _total(rows: list[dict]) -> dict:
  total = {}
  for key in COSTS:
    values = [row[key] for row in rows if row.get(key) is not None]
    if values:
      total[key] = max(values) if key in LARGEST else sum(values)
  return total


def _cost_table(rows: list[dict], names: tuple[str, ...], total: dict) -> str:
  keys = [key for key in COSTS if key in total]

  def cells(row):
    return ''.join(f'<td>{cost_cell(key, row.get(key))}</td>' for key in keys)

  body = []
  for row in rows:
    first, *rest = (escape(row[name]) for name in names)
    said = ''.join(f'<td class="said">{value}</td>' for value in rest)
    body.append(f'<tr><th scope="row">{first}</th>{said}{cells(row)}</tr>')
  head = ''.join(f'<th scope="col" class="said">{name}</th>' for name in names)
  head += ''.join(f'<th scope="col">{COSTS[key]}</th>' for key in keys)
  return (
    f'<div class="scroll"><table class="costs"><thead><tr>{head}</tr></thead>'
    f'<tbody>{"".join(body)}</tbody>'
    f'<tfoot><tr><th scope="row" colspan="{len(names)}">all</th>{cells(total)}</tr></tfoot>'
    '</table></div>'
  )


# ---- figures


def _drawn(results: dict) -> list[str]:
  kinds: dict[str, Callable] = {'line': _lines, 'arms': _dots, 'frontier': _frontier}
  return [kinds[given['kind']](results, given) for given in results['figures']]


def _number(results: dict, given: dict, arm: str, group: str, metric: str):
  """(value, bounds) of an arm, in per cent for a rate; both are None where they are unknown.

  Raises:
    ValueError: if there is no such arm or metric.
  """
  for name, known in ((arm, list(results['arms'])), (metric, results['metrics'])):
    if name not in known:
      raise UserError(f'figure {given["caption"]!r} shows {name!r}, which is none of {known}')
  row = _row(results['arms'][arm]['groups'].get(group, {'metrics': {}}), metric)
  if row.get(metric) is None:
    return None, None
  unit = 100 if metric.endswith('_rate') else 1
  bounds = interval(row, metric)
  return unit * row[metric], tuple(unit * bound for bound in bounds) if bounds else None


def _label(metric: str) -> str:
  return heading(metric) + (' (%)' if metric.endswith('_rate') else '')


def _lines(results: dict, given: dict) -> str:
  series = []
  for i, line in enumerate(given['series']):
    numbers = [_number(results, given, a, given['group'], line['metric']) for a in line['arms']]
    low, high = (
      tuple(bounds[side] if bounds else None for _, bounds in numbers)
      if any(bounds for _, bounds in numbers)
      else None
      for side in (0, 1)
    )
    y = tuple(math.nan if value is None else value for value, _ in numbers)
    series.append(Series(line['name'], tuple(line['x']), y, low, high, i))
  y_range = None
  if all(line['metric'].endswith('_rate') for line in given['series']):
    known = [
      v for s in series for v in (*s.y, *(s.high or ())) if v is not None and math.isfinite(v)
    ]
    y_range = (0, min(100, figures.nice_ticks(0, max(known, default=0) or 1)[-1]))
  xs = sorted({x for s in series for x in s.x})
  gaps = [b - a for a, b in zip(xs, xs[1:], strict=False)]
  apart = not gaps or min(gaps) * 16 >= xs[-1] - xs[0]
  return figures.line_figure(
    series,
    given['x_label'],
    given['y_label'],
    description=given['caption'],
    x_ticks=[(x, f'{x:g}') for x in xs] if apart else None,
    y_range=y_range,
  )


def _dots(results: dict, given: dict) -> str:
  panels = []
  for i, metric in enumerate(given['metrics']):
    numbers = [_number(results, given, arm, given['group'], metric) for arm in given['arms']]
    low, high = (tuple(b[side] if b else None for _, b in numbers) for side in (0, 1))
    values = tuple(value for value, _ in numbers)
    known = [v for v in (*values, *low, *high) if v is not None]
    x_range = _rate_range(known) if known and metric.endswith('_rate') else None
    colour = i % len(figures.COLOURS)
    panels.append(Panel(_label(metric), values, low, high, colour, x_range))
  return figures.arms_figure(given['arms'], panels, description=given['caption'])


def _rate_range(values: list[float]) -> tuple[float, float]:
  """An axis for shares in per cent: from 0, but where all are large from below the least."""
  bottom, top = min(values), max(values)
  ticks = figures.nice_ticks(bottom if bottom > 50 else 0, top or 1, 4)
  return ticks[0], min(100, ticks[-1])


def _frontier(results: dict, given: dict) -> str:
  points = []
  for arm in given['arms']:
    (x, x_bounds), (y, y_bounds) = (_number(results, given, arm, *given[axis]) for axis in 'xy')
    if x is None or y is None:
      raise UserError(
        f'figure {given["caption"]!r} has no x or no y for arm {arm!r}: the results lack '
        f'{given["x"] if x is None else given["y"]}; leave the arm out'
      )
    colour = 0 if arm == results['reference'] else 1
    points.append(Point(arm, x, y, x_bounds, y_bounds, colour))
  labels = [
    f'{_label(metric)}, {_group_title(group).lower()}' for group, metric in (given['x'], given['y'])
  ]
  return figures.frontier_figure(points, *labels, description=given['caption'])
