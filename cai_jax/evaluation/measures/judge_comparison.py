"""A judge's comparison of the responses of M_aligned and M_θ."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from cai_jax.evaluation.config import EvaluationConfig
from cai_jax.evaluation.ratings import elo_ratings, win_rate
from cai_jax.evaluation.registries import COMPARISONS, ModelComparison, Row
from cai_jax.model.lm import LM
from cai_jax.scoring.judge import Comparison, Match
from cai_jax.scoring.judge_local import judge_dialogue, local_judge
from cai_jax.scoring.loader import ModelLoader

PLAYERS = ('aligned', 'base')


@COMPARISONS.register('judge')
def create_judge_comparison(config: EvaluationConfig) -> ModelComparison | None:
  """Return the comparison by `config.judge`, or None if that is ''."""
  if not config.judge:
    return None

  def compare(
    loader: ModelLoader, base: Sequence[Row], aligned: Sequence[Row], seed: int
  ) -> dict[str, Any]:
    judge = loader.language_model(config.judge)
    return compare_with_judge(judge, config.judge_principles, base, aligned, seed)

  return ModelComparison(compare, describe)


def compare_with_judge(
  judge: LM,
  principles: Sequence[str],
  base: Sequence[Row],
  aligned: Sequence[Row],
  seed: int,
) -> dict[str, Any]:
  """Compare the responses of M_aligned with those of M_θ, using a language model as the judge.

  Pairs of equal responses count as ties, and pairs with a blank response are left out. The judge
  reads neither.

  Args:
    judge: the language model.
    principles: instructions to the judge, of which one is drawn for each prompt.
    base: rows of M_θ.
    aligned: rows of M_aligned on the same prompts.
    seed: seed of the draw of principles.

  Returns:
    For each kind of prompt: `equal` and `empty`, the numbers of pairs that the judge did not read;
    `win_rate` of 'aligned' (see `ratings.win_rate`, but `consistency` covers only the pairs that
    the judge read, and is None if it read none); and `elo` (see `ratings.elo_ratings`) with 'base'
    as the anchor. A kind without comparisons has `equal` and `empty` only.
  """
  responses = {row['id']: row['initial']['text'] for row in aligned}
  dialogue = judge_dialogue(judge.tokenizer, judge.eos_token_ids)
  rng = np.random.default_rng([seed, 3])
  results: dict[str, Any] = {}
  for kind in dict.fromkeys(row['kind'] for row in base):
    matches, ties, num_empty = [], [], 0
    for row in base:
      if row['kind'] != kind:
        continue
      pair = responses[row['id']], row['initial']['text']
      principle = principles[int(rng.integers(len(principles)))]
      if not all(text.strip() for text in pair):
        num_empty += 1
      elif pair[0] == pair[1]:
        ties.append(Comparison(row['id'], PLAYERS, (0.0, 0.0)))
      else:
        matches.append(Match(row['id'], row['prompt'], principle, PLAYERS, pair))
    results[kind] = {'equal': len(ties), 'empty': num_empty}
    judged = local_judge(judge, dialogue)(matches)
    if judged or ties:
      results[kind]['win_rate'] = win_rate([*judged, *ties], 'aligned')
      consistency = float(np.mean([c.consistent for c in judged])) if judged else None
      results[kind]['win_rate']['consistency'] = consistency
      results[kind]['elo'] = elo_ratings([*judged, *ties], 'base')
  return results


def describe(results: dict[str, Any]) -> list[str]:
  """Return one line of text for each kind of prompt that has comparisons.

  Args:
    results: results of `compare_with_judge`.
  """
  lines = []
  for kind, result in results.items():
    if 'win_rate' not in result:
      continue
    wins, elo = result['win_rate'], result['elo']
    low, high = elo['intervals']['aligned']
    agreement = 'no two responses differ'
    if wins['consistency'] is not None:
      agreement = (
        f'both orders agree on {100 * wins["consistency"]:.1f} % of the pairs that the judge read'
      )
    lines.append(
      f'judge, {kind} prompts: aligned wins {100 * wins["rate"]:.1f} % '
      f'[{100 * wins["interval"][0]:.1f}, {100 * wins["interval"][1]:.1f}] of {wins["prompts"]} '
      f'(a tie is half a win), {elo["ratings"]["aligned"]:+.0f} Elo [{low:+.0f}, {high:+.0f}] '
      f'over base; {agreement}'
    )
  return lines
