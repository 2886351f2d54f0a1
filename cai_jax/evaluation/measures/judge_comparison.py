"""A judge's comparison of M_aligned with M_θ, and of each round of revisions with its start.

A judge that nobody validated, or that cannot tell, gets no win rate: the results then have its raw
log-odds only, and say why.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np

from cai_jax.evaluation.config import EvaluationConfig
from cai_jax.evaluation.intervals import holm
from cai_jax.evaluation.judge_labels import read_labelled
from cai_jax.evaluation.judge_validity import (
  TOPICALITY_NOTE,
  VALID,
  find_biases,
  judge_status,
  list_items,
  summarize_answers,
  validate_judge,
)
from cai_jax.evaluation.judges import load_judge
from cai_jax.evaluation.length_bias import (
  describe_length_bias,
  length_bias,
  length_controlled_rate,
  length_differences,
)
from cai_jax.evaluation.ratings import elo_ratings, win_rate
from cai_jax.evaluation.registries import COMPARISONS, ModelComparison, Policy, Row
from cai_jax.runtime.errors import UserError
from cai_jax.runtime.terminal import say
from cai_jax.scoring.judge import CRITERIA, Comparison, Judge, Match
from cai_jax.scoring.loader import ModelLoader


@COMPARISONS.register('judge')
def create_judge_comparison(config: EvaluationConfig) -> ModelComparison | None:
  """Return the comparison by `config.judge`, or None if no judge is asked for.

  If no judge is named and 'judge' is a score, M_θ judges. That comparison is left out, with a line
  that says why, if a server holds M_θ or its context is too short.
  """
  if not config.judge_name and not config.judge_is_default:
    return None

  def compare(
    loader: ModelLoader,
    base: Sequence[Row],
    aligned: Sequence[Row],
    seed: int,
    policies: Mapping[str, Policy] = MappingProxyType({}),
  ) -> dict[str, Any] | None:
    if config.judge_is_default:
      try:
        return compare_by_base(config, loader, base, aligned, seed, policies)
      except UserError as error:
        say(f'M_θ does not judge the responses: {error}')
        return None
    judge = load_judge(config, loader, seed)
    results = compare_with_judge(judge, config, base, aligned, seed, policies)
    return {'judge': config.judge_name} | results

  return ModelComparison(compare, describe, compare)


def compare_by_base(
  config: EvaluationConfig,
  loader: ModelLoader,
  base: Sequence[Row],
  aligned: Sequence[Row],
  seed: int,
  policies: Mapping[str, Policy] = MappingProxyType({}),
) -> dict[str, Any]:
  """Return the comparison with M_θ as the judge.

  Args:
    config: its principles; no judge is named.
    loader: loads M_θ.
    base: rows of M_θ.
    aligned: rows of M_aligned on the same prompts.
    seed: seed of the draw of principles.
    policies: the policies that learnt from preferences, by name.

  Raises:
    UserError: if a server holds M_θ, or a question does not fit into its context.
  """
  if 'base' not in loader.aliases:
    raise UserError('A server holds it. Name a checkpoint as evaluation.judge.')
  config = dataclasses.replace(config, judge='base')
  judge = load_judge(config, loader, seed)
  return {'judge': 'base'} | compare_with_judge(judge, config, base, aligned, seed, policies)


def compare_with_judge(
  judge: Judge,
  config: EvaluationConfig,
  base: Sequence[Row],
  aligned: Sequence[Row],
  seed: int,
  policies: Mapping[str, Policy] = MappingProxyType({}),
) -> dict[str, Any]:
  """Validate a judge, and let it compare the responses of a run.

  It compares M_aligned with M_θ, and each round of revisions of M_θ with the initial response:
  harmlessness on harmful prompts, and helpfulness on all prompts. It compares each policy that
  learnt from preferences with M_θ, and with the model that its training began from. Pairs of equal
  responses count as ties, and pairs with a blank response are left out. The judge reads neither.

  Args:
    judge: the judge.
    config: its principles, and the labelled pairs.
    base: rows of M_θ.
    aligned: rows of M_aligned on the same prompts.
    seed: seed of the draw of principles.
    policies: the policies, by name.

  Returns:
    A dict with

    - `status`: 'valid', 'unvalidated' or 'cannot tell', and `reasons`, see
      `judge_validity.judge_status`;
    - `biases`: what is wrong with the judge, in plain words;
    - `validity`: see `judge_validity.validate_judge`; `left_out` counts rows of the labelled pairs
      that are no pair, and `answers` is how the judge used the labels in all comparisons;
    - `comparisons`: one dict per comparison, see `_summarize`.
  """
  labelled, left_out = _read_labels(config)
  answers = [(row['prompt'], row['initial']['text']) for row in base[: config.judge_checks]]
  validity = validate_judge(judge, labelled, answers)
  pairings = list(_list_pairings(config, base, aligned, seed, policies))
  verdicts = _judge_once(judge, [match for p in pairings for match in p.matches])
  answered = summarize_answers(list(verdicts.values())) if verdicts else None
  masses = [answered['label_mass']] if answered else []
  status, reasons = judge_status(validity['labelled'], masses)
  results = [_summarize(p, verdicts, status == VALID) for p in pairings]
  _correct_p_values([result['win_rate'] for result in results if 'win_rate' in result])
  used = answered or (validity['labelled'] or {}).get('answers')
  return {
    'status': status,
    'reasons': reasons,
    'biases': find_biases(used, validity['length_bias']) if used else [],
    'validity': validity | {'left_out': left_out, 'answers': answered},
    'comparisons': results,
  }


_Response = Callable[[Row], str]  # a row of M_θ → a response to its prompt


@dataclasses.dataclass(frozen=True)
class _Pairing:
  """The matches of one comparison.

  Attributes:
    player: name of the responses that are compared, such as 'aligned' or 'revision_1'.
    opponent: name of those that they are compared with.
    criterion: one of `CRITERIA`.
    prompts: the prompts that are asked, 'harmful' or 'all'.
    matches: the pairs that differ and are not blank.
    equal: prompts whose responses are equal.
    empty: number of prompts with a blank response.
  """

  player: str
  opponent: str
  criterion: str
  prompts: str
  matches: list[Match]
  equal: list[str]
  empty: int


def _read_labels(config: EvaluationConfig) -> tuple[list[Match], dict[str, int]]:
  """Return the labelled pairs, and the numbers of rows that are none, by reason."""
  if not config.judge_labelled:
    return [], {}
  principle = config.judge_principles[0]
  labelled = read_labelled(config.judge_labelled, principle, config.judge_labelled_limit)
  return labelled.matches, labelled.left_out


def _list_pairings(
  config: EvaluationConfig,
  base: Sequence[Row],
  aligned: Sequence[Row],
  seed: int,
  policies: Mapping[str, Policy],
) -> Iterator[_Pairing]:
  """Yield the comparisons of a run. All comparisons of a prompt have the same principle."""
  principles = dict(
    zip(CRITERIA, (config.judge_principles, config.judge_helpful_principles), strict=True)
  )
  rng = np.random.default_rng([seed, 3])
  drawn = {
    (row['id'], criterion): texts[int(rng.integers(len(texts)))]
    for row in base
    for criterion, texts in principles.items()
  }
  harmful = [row for row in base if row['kind'] == 'harmful']
  for player, opponent, is_revision, response, other in _list_players(base, aligned, policies):
    for criterion in CRITERIA:
      everything = criterion == 'helpfulness' and not is_revision  # helpful ones have no rounds
      rows = base if everything else harmful
      if rows:
        name = 'all' if everything else 'harmful'
        pairing = _Pairing(player, opponent, criterion, name, [], [], 0)
        yield _pair(pairing, rows, response, other, drawn)


def _list_players(
  base: Sequence[Row], aligned: Sequence[Row], policies: Mapping[str, Policy]
) -> Iterator[tuple[str, str, bool, _Response, _Response]]:
  """Yield who is compared with whom: two names, whether it is a revision, and both responses."""
  answers: dict[str, _Response] = {'base': _initial, 'aligned': _answers(aligned)}
  yield 'aligned', 'base', False, answers['aligned'], _initial
  for name, policy in policies.items():
    response = _answers(policy.rows)
    yield name, 'base', False, response, _initial
    if policy.start != 'base' and policy.start in answers:
      yield name, policy.start, False, response, answers[policy.start]
  rounds = min((len(row['rounds']) for row in base if row['kind'] == 'harmful'), default=0)
  for number in range(rounds):
    yield (
      f'revision_{number + 1}',
      'initial',
      True,
      functools.partial(_revision, number),
      _initial,
    )


def _answers(rows: Sequence[Row]) -> _Response:
  """Return the function from a row of M_θ to the answer of other rows to its prompt."""
  texts = {row['id']: row['initial']['text'] for row in rows}
  return lambda row: texts[row['id']]


def _initial(row: Row) -> str:
  return row['initial']['text']


def _revision(number: int, row: Row) -> str:
  return row['rounds'][number]['revision']['text']


def _pair(
  pairing: _Pairing,
  rows: Sequence[Row],
  response: _Response,
  other: _Response,
  principles: Mapping[tuple[str, str], str],
) -> _Pairing:
  """Return a comparison with its matches."""
  matches, equal, empty = [], [], 0
  for row in rows:
    pair = response(row), other(row)
    if not all(text.strip() for text in pair):
      empty += 1
    elif pair[0] == pair[1]:
      equal.append(row['id'])
    else:
      principle = principles[row['id'], pairing.criterion]
      players = pairing.player, pairing.opponent
      matches.append(Match(row['id'], row['prompt'], principle, players, pair, pairing.criterion))
  return dataclasses.replace(pairing, matches=matches, equal=equal, empty=empty)


def _key(match: Match) -> tuple[str, str, tuple[str, str]]:
  return match.prompt, match.criterion, match.responses


def _judge_once(judge: Judge, matches: Sequence[Match]) -> dict[Any, Comparison]:
  """Return the verdict on each match by its `_key`. Equal pairs are judged once."""
  unique = {_key(match): match for match in matches}
  return dict(zip(unique, judge(list(unique.values())), strict=True)) if unique else {}


def _summarize(
  pairing: _Pairing, verdicts: Mapping[Any, Comparison], is_valid: bool
) -> dict[str, Any]:
  """Return the result of one comparison.

  Returns:
    A dict with

    - `player`, `opponent`, `criterion`, `prompts`: what was compared on which prompts;
    - `equal` and `empty`: numbers of pairs that the judge did not read;
    - `answers`: how the judge used the labels (see `judge_validity.summarize_answers`), None if it
      read no pair;
    - `length_bias`: see `length_bias.length_bias`;
    - `items`: the raw numbers of each pair, see `judge_validity.list_items`;
    - if the judge is valid and there are pairs: `win_rate` (see `ratings.win_rate`),
      `length_controlled` (see `length_bias.length_controlled_rate`), and `elo` (see
      `ratings.elo_ratings`) with the opponent as the anchor.
  """
  players = pairing.player, pairing.opponent
  judged = [dataclasses.replace(verdicts[_key(m)], players=players) for m in pairing.matches]
  differences = length_differences([match.responses for match in pairing.matches])
  result: dict[str, Any] = {
    'player': pairing.player,
    'opponent': pairing.opponent,
    'criterion': pairing.criterion,
    'prompts': pairing.prompts,
    'equal': len(pairing.equal),
    'empty': pairing.empty,
    'answers': summarize_answers(judged) if judged else None,
    'length_bias': length_bias(differences, [c.mean_log_odds for c in judged]),
    'items': list_items(judged),
  }
  everything = [*judged, *(Comparison(prompt, players, (0.0, 0.0)) for prompt in pairing.equal)]
  if is_valid and everything:
    lengths = np.append(differences, np.zeros(len(pairing.equal)))
    result['win_rate'] = win_rate(everything, pairing.player)
    # Pairs that the judge did not read have no order in which they could agree.
    result['win_rate']['consistency'] = result['answers'] and result['answers']['consistency']
    result['length_controlled'] = length_controlled_rate(lengths, [c.points for c in everything])
    result['elo'] = elo_ratings(everything, pairing.opponent)
  return result


def _correct_p_values(win_rates: Sequence[dict[str, Any]]) -> None:
  """Add `p_holm` to each win rate: its p-value, corrected for all comparisons of the judge."""
  corrected = holm([rates['p_value'] for rates in win_rates]) if win_rates else []
  for rates, p_value in zip(win_rates, corrected, strict=True):
    rates['p_holm'] = p_value


def describe(results: dict[str, Any]) -> list[str]:
  """Return lines of text: what the judge is worth, and its win rates if it is valid.

  Args:
    results: results of `compare_with_judge`, possibly with `judge`, its name.
  """
  name = results.get('judge', '')
  lines = [*_describe_validity(results, f'judge {name}'.strip())]
  for result in results['comparisons']:
    if 'win_rate' in result:
      lines.append(_describe_comparison(result))
  return lines


def _describe_validity(results: dict[str, Any], judge: str) -> Iterator[str]:
  """Yield the lines on what a judge is worth."""
  labelled, answers = results['validity']['labelled'], results['validity']['answers']
  text = results['status']
  if results['status'] != VALID:
    text += f', so it gets no win rate: {"; ".join(results["reasons"])}'
  elif labelled:
    text += (
      f': right on {_percent(labelled["accuracy"], labelled["accuracy_interval"])} of '
      f'{labelled["count"]} labelled pairs, calibration error {labelled["calibration_error"]:.3f}'
    )
  yield f'{judge}: {text}'
  if answers:
    mass = answers['label_mass']
    labels = '' if mass is None else f', labels have {100 * mass:.0f} % of the probability'
    yield (
      f'{judge}: both orders agree on {100 * answers["consistency"]:.0f} % of {answers["pairs"]} '
      f'pairs, preference for (A) {answers["position_bias"]:+.2f} nats{labels}'
    )
  for bias in results['biases']:
    yield f'{judge}: {bias}'
  for check, result in results['validity']['topicality'].items():
    texts = {'other prompt': "an answer to another prompt's", 'truncated': 'an answer to its half'}
    yield (
      f'{judge}: prefers {texts[check]} in '
      f'{_percent(result["accuracy"], result["accuracy_interval"])} of {result["count"]} pairs '
      f'({TOPICALITY_NOTE})'
    )


def _describe_comparison(result: dict[str, Any]) -> str:
  """Return the line of a comparison with a win rate."""
  wins, controlled, elo = result['win_rate'], result['length_controlled'], result['elo']
  low, high = elo['intervals'][result['player']]
  line = (
    f'judge, {result["criterion"]} on {result["prompts"]} prompts: {result["player"]} wins '
    f'{_percent(wins["rate"], wins["interval"])} of {wins["prompts"]} against '
    f'{result["opponent"]} (a tie is half a win), at equal lengths '
    f'{_percent(controlled["rate"], controlled["interval"])}, p = {wins["p_holm"]:.2g} by Holm, '
    f'{elo["ratings"][result["player"]]:+.0f} Elo [{low:+.0f}, {high:+.0f}]'
  )
  bias = describe_length_bias(result['length_bias'])
  return f'{line}; here it {bias}' if bias else line


def _percent(rate: float, interval: Sequence[float]) -> str:
  low, high = interval
  return f'{100 * rate:.1f} % [{100 * low:.1f}, {100 * high:.1f}]'
