"""What the served models of a run cost, in files beside its results.

`costs/NAME-NUMBER.json` has the counts of the turns of one shard of a dataset, by role. It is
written before the shard and depends on the journal alone, so it is right after every kill.
Those of deleted shards are removed when the dataset is begun again.
`costs/test-*.json` have the counts of the test requests at each start. Those of a served judge
or guard are summed over what its model answered in its journal, so runs that share the journal and
the model also share its costs.
"""

import itertools
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax

from cai_jax.pipeline.models import guard_journal, judge_journal
from cai_jax.pipeline.run import Run
from cai_jax.runtime.files import make_folder, read_json, write_json
from cai_jax.sampling.journal import read_usage
from cai_jax.sampling.remote.costs import (
  CostsByModel,
  costs_from_json,
  costs_to_json,
  sum_costs,
  sum_usage,
)
from cai_jax.sampling.types import Usage

FOLDER, TESTS = 'costs', 'test'
JUDGE, GUARD = 'judge', 'guard'  # the roles of a served judge and of a served guard model
FEEDBACK = 'feedback'  # that of the model that labels comparisons


def shard_writer(run: Run, dataset: str) -> Callable[[int, CostsByModel], None]:
  """Return a function that writes the costs of a shard, given its index and what it cost.

  Args:
    run: the run.
    dataset: name of the dataset, such as 'generate'.
  """

  def write(shard: int, costs: CostsByModel) -> None:
    path = run.workdir / FOLDER / f'{dataset}-{shard:05d}.json'
    if costs:
      make_folder(path.parent)
      write_json(path, costs_to_json(costs))
    else:
      path.unlink(missing_ok=True)

  return write


def remove_shard_costs(run: Run, dataset: str) -> None:
  """Remove the costs of the shards of a dataset, which is begun again.

  Args:
    run: the run.
    dataset: name of the dataset, such as 'generate'.
  """
  for path in _shard_files(run, dataset):
    path.unlink(missing_ok=True)


def write_test_costs(run: Run, role: str, usages: Sequence[Usage]) -> None:
  """Write what the test requests of a start cost, in a file of its own.

  Args:
    run: the run.
    role: role of the model.
    usages: what the server counted for each.
  """
  if not usages:
    return
  folder, process = make_folder(run.workdir / FOLDER), jax.process_index()
  paths = (folder / f'{TESTS}-{role}-{process:05d}-{n:05d}.json' for n in itertools.count(1))
  path = next(path for path in paths if not path.exists())
  write_json(path, costs_to_json(sum_usage((role, usage) for usage in usages)))


def read_costs(run: Run, dataset: str = '') -> CostsByModel:
  """Return what the turns of a dataset cost, or all datasets and test requests.

  Args:
    run: the run.
    dataset: name of the dataset; '' means everything, the judge included.

  Raises:
    UserError: if a file is damaged.
  """
  paths = _shard_files(run, dataset) if dataset else sorted((run.workdir / FOLDER).glob('*.json'))
  parts = [costs_from_json(read_json(path), str(path)) for path in paths]
  if not dataset:
    evaluation = run.config.evaluation
    for role, server, folder in (
      (JUDGE, evaluation.judge_remote, judge_journal(run)),
      (GUARD, evaluation.guard_remote, guard_journal(run)),
    ):
      if server:
        usages = read_usage(folder, prefix=server.key_prefix())
        parts.append(sum_usage((role, usage) for usage in usages))
  return sum_costs(parts)


def summarize_costs(run: Run, dataset: str) -> dict[str, dict[str, Any]]:
  """Return what a dataset cost by role, with prices, as the manifest has it.

  Args:
    run: the run.
    dataset: name of the dataset.
  """
  costs = read_costs(run, dataset)
  prices = {role: sums.price(run.remotes[role]) for role, sums in costs.items()}
  return {role: sums | {'price': prices[role]} for role, sums in costs_to_json(costs).items()}


def describe_costs(run: Run) -> str:
  """Return what the served models of a run have cost so far, a line for each; '' without any.

  Args:
    run: the run.
  """
  served = {f'remote.{role}': (role, remote) for role, remote in run.remotes.items()}
  if judge := run.config.evaluation.judge_remote:
    served['evaluation.judge_remote'] = JUDGE, judge.connection_config()
  if guard := run.config.evaluation.guard_remote:
    served['evaluation.guard_remote'] = GUARD, guard.connection_config()
  if feedback := run.config.label.remote:
    served['label.remote'] = FEEDBACK, feedback
  costs = read_costs(run)
  return '\n'.join(
    f'{name} ({config.model}): {costs[role].describe(config)}'
    for name, (role, config) in served.items()
    if role in costs
  )


def _shard_files(run: Run, dataset: str) -> list[pathlib.Path]:
  """Return the files with the costs of the shards of a dataset."""
  return sorted((run.workdir / FOLDER).glob(f'{dataset}-[0-9][0-9][0-9][0-9][0-9].json'))
