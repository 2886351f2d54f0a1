"""The responses of an experiment's arms: which prompts count, their texts, and their values."""

import dataclasses
import functools
import math
import pathlib
import types
from collections.abc import Mapping, Sequence
from typing import Any

from cai_jax.data import d_cai
from cai_jax.evaluation import estimates
from cai_jax.evaluation.baselines import BASELINES, Selection
from cai_jax.evaluation.diversity import Measure, text_changes
from cai_jax.evaluation.registries import ResponseMeasure
from cai_jax.evaluation.summary import measure_responses, numeric
from cai_jax.experiment.define import HELD_OUT_RESPONSES, REVISION, Arm
from cai_jax.pipeline.policies import POLICIES
from cai_jax.runtime.errors import UserError
from cai_jax.runtime.files import read_json


@dataclasses.dataclass(frozen=True)
class Responses:
  """An arm's responses to the prompts of one kind.

  Attributes:
    prompts: seed → prompt id → messages.
    turns: seed → prompt id → sampled turn. If the arm compares its response with another one of the
      same run, a turn has the text of that one as `reference`.
    spent: seed → prompt id → number of tokens that were sampled for the response.
    distances: seed → prompt id → log-ratio under the model that gave the response and M_θ, in nats;
      without the responses of which it is not known.
  """

  prompts: Mapping[int, Mapping[str, list[dict[str, str]]]]
  turns: Mapping[int, Mapping[str, dict[str, Any]]]
  spent: Mapping[int, Mapping[str, int]]
  distances: Mapping[int, Mapping[str, float]] = dataclasses.field(default_factory=dict)

  def measure(
    self,
    measures: Sequence[ResponseMeasure],
    diversity: Mapping[str, Measure] = types.MappingProxyType({}),
    spent: bool = False,
    distance: bool = False,
  ) -> Mapping[str, estimates.Values]:
    """Return the value of every measure for every response.

    Args:
      measures: the measures of responses.
      diversity: further measures, of all texts of a seed together, by name.
      spent: whether to return `tokens_spent` as well.
      distance: whether to return `kl` as well, if it is known of a response of each seed.

    Returns:
      Measure → seed → prompt id → value. `rewritten` is there if the turns have references.
    """
    values_by_measure: dict[str, dict[int, dict[str, float]]] = {}
    for seed, turns in self.turns.items():
      prompts, texts = self.prompts[seed], [turn['text'] for turn in turns.values()]
      found = measure_responses(measures, list(prompts.values()), list(turns.values()))
      columns = dict(numeric(found))
      columns |= {name: [*measure(texts)] for name, measure in diversity.items()}
      if all('reference' in turn for turn in turns.values()):
        columns['rewritten'] = [*text_changes(texts, [t['reference'] for t in turns.values()])]
      if spent:
        columns['tokens_spent'] = [float(count) for count in self.spent[seed].values()]
      if distance and all(self.distances.get(s) for s in self.turns):
        columns['kl'] = [self.distances[seed].get(key) for key in turns]
      for name, values in columns.items():
        by_seed = values_by_measure.setdefault(name, {})
        numbers = [math.nan if value is None else value for value in values]
        by_seed[seed] = dict(zip(turns, numbers, strict=True))
    return values_by_measure


def read_responses(
  arm: Arm, folders: Mapping[int, pathlib.Path], kind: str, response: str = ''
) -> Responses | None:
  """Read an arm's responses to prompts of one kind.

  Args:
    arm: the arm, which names the response to read, and which prompts count.
    folders: the arm's run folders, by seed.
    kind: 'harmful' or 'helpful'. For helpful prompts D_CAI has the initial response only.
    response: another response of the same run to read instead, for the same prompts.

  Returns:
    The responses, or None if a run has fewer than two prompts of the kind.

  Raises:
    UserError: if a run has fewer rounds than the response needs.
  """
  prompts, turns, spent, distances = {}, {}, {}, {}
  name = response or arm.response
  for seed, folder in folders.items():
    rows = {row['id']: row for row in _scored_rows(name, folder)}
    ids = _scored_ids(arm, folder, kind)
    prompts[seed] = {key: rows[key]['prompt'] for key in ids}
    turns[seed] = {key: _select_response(name, rows[key]) for key in ids}
    if arm.against and not response:
      drafts = {row['id']: row for row in _scored_rows(arm.against, folder)}
      for key, turn in turns[seed].items():
        draft = _select_response(arm.against, drafts[key])
        turns[seed][key] = turn | {'reference': draft['text']}
    distances[seed] = _distances(name, folder, ids)
    costs = _choice_costs(name, folder)
    spent[seed] = {
      key: _spent_tokens(name, rows[key]) if costs is None else costs[key] for key in ids
    }
  if not all(len(t) > 1 for t in turns.values()):
    return None
  return Responses(prompts, turns, spent, distances)


def _scored_ids(arm: Arm, folder: pathlib.Path, kind: str) -> list[str]:
  """Return the ids of the prompts of one kind that count for an arm, in their order."""
  rows = [row for row in _scored_rows(arm.response, folder) if row['kind'] == kind]
  if arm.principle:
    rows = [row for row in rows if _principle_of(arm.response, row) == arm.principle]
  if arm.against:  # the chain of a prompt may have ended in one of the two datasets
    compared = {row['id'] for row in _scored_rows(arm.against, folder)}
    rows = [row for row in rows if row['id'] in compared]
  return [row['id'] for row in rows]


def _scored_rows(response: str, folder: pathlib.Path) -> Sequence[Mapping[str, Any]]:
  """Return the rows of the dataset that has a response."""
  if response not in HELD_OUT_RESPONSES:
    return [row for row in _read_rows(folder / 'd_cai') if row['rounds']]
  # M_aligned answers every prompt and revises none, so its dataset does not know the kinds.
  kinds = {row['id']: row['kind'] for row in _read_rows(folder / 'evaluation' / 'base')}
  rows = _read_rows(folder / HELD_OUT_RESPONSES[response])
  return [row | {'kind': kinds[row['id']]} for row in rows]


def _select_response(name: str, row: Mapping[str, Any]) -> dict[str, Any]:
  number = _round_of(name, row)
  return row['rounds'][number - 1]['revision'] if number else row['initial']


def _round_of(response: str, row: Mapping[str, Any]) -> int:
  """Return the number of the round that wrote or kept a response, from 1; 0 if none did."""
  rounds = row['rounds']
  if not REVISION.fullmatch(response):
    return 0
  if response in ('last', 'revised'):
    return len(rounds)
  number = int(response.removeprefix('revision_'))
  if number > len(rounds):
    raise UserError(
      f'An arm scores {response}, but its run has {len(rounds)} rounds. Raise feedback.rounds.'
    )
  return number


def _principle_of(response: str, row: Mapping[str, Any]) -> str:
  """Return the id of the principle of the round that wrote or kept a response; '' if none did."""
  number = _round_of(response, row)
  return row['rounds'][number - 1]['principle'] if number else ''


def _spent_tokens(response: str, row: Mapping[str, Any]) -> int:
  """Return the number of tokens that a chain samples up to a response."""
  rounds = row['rounds'][: _round_of(response, row)]
  return row['initial']['num_tokens'] + sum(map(d_cai.round_tokens, rounds))


def _choice_costs(response: str, folder: pathlib.Path) -> Mapping[str, int] | None:
  """Return the tokens of all answers that a baseline chose from, by prompt; None if it chose none.

  Raises:
    UserError: if an earlier version evaluated the run, which did not count them.
  """
  if not isinstance(BASELINES.get(response), Selection):
    return None
  path = folder / 'evaluation' / 'models.json'
  result = read_json(path, dict)[response]
  if 'tokens' not in result:
    raise UserError(
      f'{path} does not say how many tokens {response!r} took, since an earlier version wrote it. '
      'Run the experiment in a new workdir.'
    )
  return result['tokens']


def _distances(response: str, folder: pathlib.Path, ids: Sequence[str]) -> Mapping[str, float]:
  """Return the log-ratio under a response's model and M_θ, by prompt; empty if it is not known."""
  path = folder / 'evaluation' / 'models.json'
  if response not in ('base', 'aligned', *POLICIES) or not path.exists():
    return {}
  measured = read_json(path, dict).get('kl') or {}
  if response == 'base':  # also the reference point of the others
    return dict.fromkeys(ids, 0.0) if 'items' in measured else {}
  if response != 'aligned':
    measured = measured.get('policies', {}).get(response, {})
  return measured.get('items', {})


@functools.cache  # several arms read the same dataset
def _read_rows(folder: pathlib.Path) -> tuple[dict[str, Any], ...]:
  """Return the rows of a finished dataset, reduced to the fields that are scored."""
  fields = ('id', 'kind', 'prompt', 'initial', 'rounds')
  dataset = d_cai.read_rows(folder)
  rows = (dataset[i] for i in range(len(dataset)))
  return tuple({name: row[name] for name in fields} for row in rows)
