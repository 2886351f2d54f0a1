"""Ask a judge of labels once: the turn journal has its answers, also when a run continues."""

import dataclasses
import hashlib
import json
import math
from collections.abc import Sequence
from typing import Any

from cai_jax.runtime.errors import UserError, show
from cai_jax.sampling.journal import Journal
from cai_jax.sampling.types import Completion
from cai_jax.scoring.judge import Comparison, Judge, Match

# The journal's key of an answer has this name. Change it with the form of what is stored, and with
# the answers that a judge of this package gives.
ANSWER_FORM = 'comparison-1'


def journaled_judge(judge: Judge, identity: Any, journal: Journal) -> Judge:
  """Return a judge that looks its answers up in a journal, and stores those that are not there.

  Args:
    judge: is asked what the journal does not answer.
    identity: everything besides the match that determines an answer, as JSON types.
    journal: the journal.

  Returns:
    The judge. It raises UserError for an answer that is not one comparison of each match with
    finite log-odds and probabilities.
  """
  asked: set[int] = set()  # hashes of the keys that were stored since the last refresh

  def find(key: str, match: Match) -> Comparison | None:
    if hash(key) in asked:
      journal.refresh()
      asked.clear()
    stored = journal.get(key)
    return None if stored is None else _read(stored.text, match)

  def ask(matches: Sequence[Match]) -> list[Comparison]:
    keys = [_key(identity, match) for match in matches]
    found = {key: find(key, match) for key, match in zip(keys, matches, strict=True)}
    missing = {key: m for key, m in zip(keys, matches, strict=True) if found[key] is None}
    if missing:
      answers = _checked(judge(list(missing.values())), list(missing.values()))
      new = dict(zip(missing, map(_to_json, answers), strict=True))
      journal.put([(key, Completion([], text, [], 'stop')) for key, text in new.items()])
      asked.update(map(hash, new))
      # What is read back is what a run that continues reads.
      found |= {key: _read(text, missing[key]) for key, text in new.items()}
    return [answer for key in keys if (answer := found[key]) is not None]

  return ask


def _key(identity: Any, match: Match) -> str:
  """Return the journal's key: a hex digest of all that determines an answer."""
  parts = [ANSWER_FORM, identity, dataclasses.asdict(match)]
  return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def _checked(answers: Sequence[Comparison], matches: Sequence[Match]) -> Sequence[Comparison]:
  """Return the answers of a judge, if there is one with finite numbers for each match."""
  pairs = [x for c in answers for x in (c.log_odds, c.label_mass) if x is not None]
  numbers = [float(x) for pair in pairs for x in pair]
  are_pairs = all(len(pair) == 2 for pair in pairs)
  if len(answers) != len(matches) or not are_pairs or not all(map(math.isfinite, numbers)):
    raise UserError(
      'label.model: a judge must give a comparison with two finite log-odds, and two '
      f'finite label_mass if it gives them, for each of {len(matches)} matches, but gave '
      f'{len(answers)} with the numbers {show(numbers)}. Correct the judge, or choose another one.'
    )
  return answers


def _to_json(answer: Comparison) -> str:
  """Return an answer as text. Its numbers may be those of numpy or jax."""
  mass = None if answer.label_mass is None else [float(x) for x in answer.label_mass]
  return json.dumps([[float(x) for x in answer.log_odds], mass])


def _read(text: str, match: Match) -> Comparison | None:
  """Return the comparison that `_to_json` wrote, or None if the text is none."""
  try:
    (first, second), mass = json.loads(text)
    odds = float(first), float(second)
    masses = None if mass is None else (float(mass[0]), float(mass[1]))
  except (ValueError, TypeError, IndexError, RecursionError):
    return None
  return Comparison(match.prompt, match.players, odds, masses)
