"""One table of what each step of a run adds: M_θ, fine-tuning, preferences, and best-of-n."""

from collections.abc import Mapping
from typing import Any

from cai_jax.evaluation.baselines import BY_JUDGE, BY_REWARD
from cai_jax.pipeline.policies import Training, list_policies, list_trainings
from cai_jax.pipeline.run import Run
from cai_jax.pipeline.sections import RunConfig
from cai_jax.pipeline.stage_prefer import UNIT_KINDS
from cai_jax.report import summary_table
from cai_jax.training import metrics

_CHOSEN = {BY_JUDGE: 'by the judge', BY_REWARD: 'by the reward model'}
_NAMES = {'base': 'M_θ', 'aligned': 'SL-CAI'}
_METRICS = ('loss', 'accuracy', 'margin')  # of the last training step
EQUAL = 'equal_length_win_rate'  # see `length_bias.length_controlled_rate`
_COLUMNS = ('violation_rate', 'helpful_rate', 'mean_tokens', 'reward')


def policy_table(config: RunConfig, summary: Mapping[str, Any], results: Mapping[str, Any]) -> str:
  """Return the table as text, or '' for a run that trains no policy.

  Args:
    config: the settings of the run.
    summary: the content of `evaluation/summary.json`.
    results: the content of `evaluation/models.json`.
  """
  if not list_policies(config):
    return ''
  names = policy_names(config, results)
  distances, wins = _distances(results), _win_rates(results)
  table = {}
  for group in ('models', 'benign'):
    rows = summary.get(group, {})
    table[group] = {
      label: _select(rows[name])
      | (distances.get(name, {}) | wins.get(name, {}) if group == 'models' else {})
      for name, label in names.items()
      if name in rows
    }
  shown = {group: rows for group, rows in table.items() if rows}
  return summary_table(shown) if shown else ''


def describe_trainings(run: Run, manifest: Mapping[str, Any]) -> str:
  """Return what was trained on preferences, a line for each model.

  Args:
    run: the run, whose stage `prefer` is done.
    manifest: its manifest.
  """
  entry, lines = manifest['stages'].get('prefer', {}), []
  for training in list_trainings(run.config):
    pairs = entry.get(training.name, {}).get('pairs', {})
    rows = metrics.read_rows(run.workdir / training.workdir / metrics.METRICS_FILE)
    last = {key: rows[-1][key] for key in _METRICS if rows and key in rows[-1]}
    shown = ', '.join(f'{key} {value:.3f}' for key, value in last.items())
    units = UNIT_KINDS[training.config.registered_loss.units].plural
    lines.append(
      f'{training.name}: {training.config.objective} from {training.init}, on '
      f'{pairs.get("kept", 0):,} {units} of {training.config.data!r}'
      + (' with sides exchanged at random' if training.config.shuffle else '')
      + (f'; last step: {shown}' if shown else '')
      + (f'; differences are to {_NAMES[training.compared_with]}' if training.is_policy else '')
    )
    for place, counts in (('comparisons that were read', pairs.get('read', {})), (units, pairs)):
      if dropped := counts.get('dropped'):
        reasons = ', '.join(f'{count:,} {reason}' for reason, count in dropped.items())
        lines.append(f'{training.name}: left out of {place}: {reasons}')
  return '\n'.join(lines)


def policy_names(config: RunConfig, results: Mapping[str, Any]) -> dict[str, str]:
  """Return what the table calls each model, by its name in the evaluation.

  Args:
    config: the settings of the run.
    results: the content of `evaluation/models.json`.
  """
  names = _NAMES | {policy.name: _policy_name(policy) for policy in list_policies(config)}
  for chooser in (BY_REWARD, BY_JUDGE):
    for name in config.evaluation.selections_by(chooser):
      count = results.get(name, {}).get('answers', 'n')
      names[name] = f'best of {count} {_CHOSEN[chooser]}'
  if len({*names.values()}) < len(names):  # two baselines that choose in the same way
    return {name: f'{label} ({name})' for name, label in names.items()}
  return names


def _policy_name(policy: Training) -> str:
  """Return a name such as 'SL-CAI + DPO' or 'DPO alone'."""
  objective = policy.config.objective.upper()
  if policy.init == 'aligned':
    return f'SL-CAI + {objective}'
  return f'{objective} alone' if policy.init == 'base' else f'{objective} from {policy.init}'


def _select(row: Mapping[str, Any]) -> dict[str, Any]:
  """Return the columns of a row that the table shows, with their intervals."""
  kept = (*_COLUMNS, *(f'{name}_interval' for name in _COLUMNS))
  return {name: row[name] for name in kept if name in row}


def _distances(results: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
  """Return the KL divergence from M_θ of each model that has one."""
  measured = results.get('kl') or {}
  by_model = {'aligned': measured, **measured.get('policies', {})} if measured else {}
  return {
    name: {'kl': result['per_response'], 'kl_interval': result['per_response_interval']}
    for name, result in by_model.items()
    if 'per_response' in result
  }


def _win_rates(results: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
  """Return how often a valid judge finds each model less harmful than M_θ, with intervals.

  Both answers are to the same prompts, which are resampled together with their lengths.
  """
  found = {}
  for result in (results.get('judge') or {}).get('comparisons', []):
    if result['opponent'] == 'base' and result['criterion'] == 'harmlessness':
      if wins := result.get('win_rate'):
        row = {'win_rate': wins['rate'], 'win_rate_interval': list(wins['interval'])}
        if controlled := result.get('length_controlled'):
          row |= {EQUAL: controlled['rate'], f'{EQUAL}_interval': list(controlled['interval'])}
        found[result['player']] = row
  return found
