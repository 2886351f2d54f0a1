"""The parts that all cards have: how a run was made, its constitution, and its figures."""

import json
from collections.abc import Iterable, Mapping
from typing import Any

from cai_jax.pipeline.schema import default_config
from cai_jax.publishing.finished_run import FinishedRun
from cai_jax.publishing.licences import Licence, find_model_licence, list_origins
from cai_jax.publishing.markdown import code, escape, folded, table
from cai_jax.publishing.names import join_names, public_name, public_values
from cai_jax.report.differences import PROMPT_INTERVALS, difference_text, explain_marks
from cai_jax.report.numbers import cell, columns, groups, heading, interval
from cai_jax.runtime.settings import flatten
from cai_jax.tiny.files import MODELS

PAPER = '[Constitutional AI (Bai et al. 2022)](https://arxiv.org/abs/2212.08073)'
TAGS = ['constitutional-ai', 'cai-jax']
# Sections that say how fast a run is or how it is shown, and fields that name this machine's parts.
_UNIMPORTANT = ('engine.', 'compilation.', 'mesh.', 'mesh_sampling.', 'report.', 'version')
TRAINING_SETS = ('harmful', 'helpful')  # prompts of D_CAI
_TRAINING_PROMPTS = tuple(f'prompts.{name}.' for name in TRAINING_SETS)
_ROLES = {'base': 'samples responses', 'critique': 'critiques', 'revision': 'revises'}


def describe_origin(run: FinishedRun, prompt_sets: Iterable[str]) -> str:
  """Return the section about models, prompts and settings.

  Args:
    run: the run.
    prompt_sets: which of the run's prompt sets to name.
  """
  is_own = run.has_done('generate')  # else this run's models and prompts did not make its D_CAI
  used = [name for name in prompt_sets if is_own or name not in TRAINING_SETS]
  parts = ['## How it was made', *([_describe_models(run)] if is_own else [])]
  parts += [describe_prompts(run, used)] if used else []
  rows = [
    [code(name), code(value), code(default)] for name, value, default in _changed_settings(run)
  ]
  parts.append(
    '[`run/config.json`](run/config.json) has every setting of the run. These differ from the '
    'defaults of cai_jax:'
    if is_own
    else '[`run/config.json`](run/config.json) has every setting of the run. Those of critiques, '
    'revisions and their models hold for the evaluation alone, because D_CAI came from another '
    'run. These settings differ from the defaults of cai_jax:'
  )
  parts.append(table(['setting', 'value', 'default'], rows) if rows else 'None.')
  return '\n\n'.join([*parts, *filter(None, [_describe_programs(run)])])


def list_models(run: FinishedRun) -> dict[str, str]:
  """Return the models that wrote the texts of a run: role → name in its config, or of a server."""
  values, models = run.values, {}
  for role in _ROLES:
    remote = (values.get('remote') or {}).get(role) or {}
    models[role] = values['model'][role] or (remote.get('model') if remote.get('url') else '')
  return {role: name for role, name in models.items() if name}


def _describe_models(run: FinishedRun) -> str:
  rows = []
  models = list_models(run)
  for role, task in _ROLES.items():
    name = models.get(role) or models.get('base', '')
    served = bool(not run.values['model'][role] and role in models)
    licence = Licence('') if served else find_model_licence(name, run.is_hub_name(name))
    shown = code(public_name(name)) if served else name_model(run, name)
    rows.append([task, shown + ' (served)' * served, escape(licence.describe())])
  return table(['task', 'model', 'licence'], rows)


def name_model(run: FinishedRun, name: str) -> str:
  """Return the name of a model in Markdown, with a link if it is on the hub.

  Args:
    run: the run.
    name: as its config names it.
  """
  if run.is_hub_name(name):
    return f'[{escape(name)}](https://huggingface.co/{name})'
  return code(public_name(name)) + ' (an embedded model of cai_jax)' * (name in MODELS)


def describe_prompts(run: FinishedRun, prompt_sets: Iterable[str]) -> str:
  """Return a table of where prompts come from, with their licences.

  Args:
    run: the run.
    prompt_sets: which of the run's prompt sets to name.
  """
  rows = [
    [code(name), escape(origin.name), escape(origin.licence)]
    for name in prompt_sets
    for origin in list_origins(run.values['prompts'][name])
  ]
  return table(['prompts', 'origin', 'licence'], rows) if rows else 'The run has no prompts.'


def _changed_settings(run: FinishedRun) -> list[tuple[str, Any, Any]]:
  """Return (name, value, default) of the settings that matter and are not at their defaults."""
  defaults = flatten(json.loads(default_config().to_json_best_effort()))
  values = flatten(public_values(run.values))
  return [
    (name, value, defaults.get(name))
    for name, value in values.items()
    if value != defaults.get(name)
    and not name.startswith(_UNIMPORTANT)
    and not name.endswith('.url')
    and (run.has_done('generate') or not name.startswith(_TRAINING_PROMPTS))
  ]


def _describe_programs(run: FinishedRun) -> str:
  """Return with which programs and devices each stage ran; '' if nothing was recorded."""
  texts: dict[str, list[str]] = {}
  for stage in ('generate', 'train', 'evaluate'):
    if run.has_done(stage) and (text := _describe_environment(run.entry(stage))):
      texts.setdefault(text, []).append(code(stage))
  return '\n'.join(f'- {join_names(stages)}: {text}' for text, stages in texts.items())


def _describe_environment(entry: Mapping[str, Any]) -> str:
  """Return the programs and devices of the start that finished a stage, as far as it has them."""
  commit, used = entry.get('git_commit', ''), entry.get('environment')
  parts = [f'commit {code(commit)}'] if commit else []
  if commit.endswith('+'):
    parts[0] += ' (`+`: with changes that were not committed)'
  if used:
    devices = used['devices']
    packages = ', '.join(f'{name} {version}' for name, version in used['packages'].items())
    parts.insert(0, f'cai_jax {used["cai_jax"] or "from a source tree"}')
    parts.append(f'{devices["count"]} × {escape(devices["kind"])}')
    parts.append(escape(packages))
  return '; '.join(parts)


def describe_constitution(run: FinishedRun) -> str:
  """Return the section about the constitution.

  Args:
    run: the run.
  """
  if run.constitution is None:
    return (
      '## The constitution\n\nThe training data came from another run: '
      f'{describe_d_cai(run)}. The constitution is that of the other run.'
    )
  name = public_name(run.values['constitution']['path'])
  principles = run.constitution.principles
  listed = '\n'.join(
    f'- **{escape(p.id)}**\n  - {escape(p.critique_request)}\n  - {escape(p.revision_request)}'
    for p in principles
  )
  intro = (
    f'{code(name)}, fingerprint `{run.constitution.fingerprint()}`, with {len(principles)} '
    'principles. Each round of a chain draws one of them. Its first request asks for a critique, '
    'and the second for a revision.'
  )
  summary = f'The {len(principles)} principles'
  return f'## The constitution\n\n{intro}\n\n{folded(summary, listed)}'


def describe_d_cai(run: FinishedRun) -> str:
  """Return the name of the D_CAI of another run, with the digest of its rows if it was recorded.

  Args:
    run: the run.
  """
  contents = run.entry('train').get('settings', {}).get('contents', {})
  digest = contents.get('data.d_cai', {}).get('rows')
  return code(public_name(run.values['data']['d_cai'])) + (f' (digest `{digest}`)' * bool(digest))


def describe_evaluation(run: FinishedRun, names: Mapping[str, str], shown: Iterable[str]) -> str:
  """Return the section with the figures of the evaluation, all of them with their intervals.

  Args:
    run: the run.
    names: what the card calls the rows of the tables.
    shown: the groups of the summary to show, see `cai_jax.report.numbers`.
  """
  head = '## Evaluation'
  summary = run.summary or {}
  tables = [_group_tables({g: summary[g]}, names) for g in shown if summary.get(g)]
  if not any(tables):
    return f'{head}\n\nThis run was not evaluated. Nothing is known about what the model does.'
  explanation = f'In brackets: {PROMPT_INTERVALS}. `count` is the number of prompts.'
  return '\n\n'.join([head, _describe_measures(run), *filter(None, tables), explanation])


def _group_tables(summary: Mapping[str, Any], names: Mapping[str, str]) -> str:
  """Return the tables of one group: of its numbers with intervals, and of paired differences."""
  ((title, rows),) = groups(dict(summary))
  keys = [
    key
    for key in columns(dict(summary))
    if any(row.get(key) is not None for row in rows.values())
    and all(row.get(key) is None or interval(row, key) for row in rows.values())
  ]
  lines = [
    [escape(names.get(name, name)), f'{row.get("count", "–")}', *(cell(row, k) for k in keys)]
    for name, row in rows.items()
  ]
  parts = [f'### {title}', table(['', 'count', *map(heading, keys)], lines)] if keys else []
  compared = {name: row for name, row in rows.items() if row.get('differences')}
  measures = list(dict.fromkeys(key for row in compared.values() for key in row['differences']))
  if measures:
    lines = []
    for name, row in compared.items():
      other = next(iter(row['differences'].values()))['to']
      label = f'{names.get(name, name)} − {names.get(other, other)}'
      lines.append([escape(label), *(escape(difference_text(row, key)) for key in measures)])
    marks = explain_marks(list(compared.values()), '*', '*')
    parts += [
      'Paired differences over the same prompts, those of rates in percentage points '
      f'({escape(marks)}):',
      table(['', *map(heading, measures)], lines),
    ]
  return '\n\n'.join(parts)


def _describe_measures(run: FinishedRun) -> str:
  """Return what rated the texts."""
  evaluation = public_values(run.values)['evaluation']
  used = [
    f'{name.replace("_", " ")} {code(evaluation[name])}'
    for name in ('scorer', 'judge', 'reward_model', 'refusal')
    if evaluation.get(name) not in ('', 'none', None)
  ]
  return (
    'The texts are answers to held-out prompts. '
    + (f'They were rated by: {", ".join(used)}.' if used else 'No scorer or judge rated them.')
    + ' [`run/summary.json`](run/summary.json) has all numbers.'
  )


def describe_worth(run: FinishedRun) -> str:
  """Return the section that says what the figures are worth: the findings of the report.

  Args:
    run: the run.
  """
  checked = ', '.join(run.diagnosis.checked)
  lines = [
    f'- **{finding.severity}**: {escape(finding.title)}. {escape(finding.evidence)}'
    for finding in run.diagnosis.findings
  ]
  found = '\n'.join(lines) if lines else 'Nothing was found.'
  intro = (
    f'cai_jax checked these points of the run: {checked}. It found, the worst first (M_θ is the '
    'base model, M_aligned the fine-tuned one, D_CAI the data set):'
  )
  return f'## What the figures are worth\n\n{intro}\n\n{found}'
