"""Raters of candidates: several responses to one prompt, each with a number.

A variant such as best-of-n asks a rater which of its candidates to keep. `RATERS` maps the kind of
a rater to a function that loads one. The kinds below use the judges, reward models and scorers of
the evaluation. To add one:

  @RATERS.register('shortest')
  def load_shortest(loader: ModelLoader, model: str, label: str) -> Rater:
    return lambda messages, texts, question: [-float(len(text)) for text in texts]

A rater that cannot read a candidate raises UnreadableError, which ends the candidate's chain. Every
other error ends the run. Before a run, a kind in `INSPECTIONS` says how long its questions are;
a kind that is not there is called with a loader that only checks models.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import NamedTuple

from cai_jax.dialogue import Message
from cai_jax.runtime.errors import UnreadableError, UserError
from cai_jax.runtime.registry import Registry
from cai_jax.scoring.guards import guard as guards
from cai_jax.scoring.judge import JUDGES, Judge, Match
from cai_jax.scoring.judge_local import judge_dialogue, local_judge, tokenize_question
from cai_jax.scoring.judge_questions import build_question
from cai_jax.scoring.loader import Inspected, ModelLoader
from cai_jax.scoring.reward import append_replies, find_label
from cai_jax.scoring.scorer import SCORERS

# Maps the messages of a prompt, n candidates, and the question for a judge to n finite numbers.
# The candidate with the largest one is the best.
Rater = Callable[[Sequence[Message], Sequence[str], str], list[float]]

# Maps a loader, the name of a model and of a label ('' if there is none) to a rater.
RATERS: Registry[Callable[[ModelLoader, str, str], Rater]] = Registry('rater of candidates')


class Inspection(NamedTuple):
  """What is known of a rater before it is loaded.

  Attributes:
    path: folder or hub name of its model; '' if it has none.
    max_positions: largest number of tokens that it reads; 0 if there is no limit.
    candidates: number of candidates that it reads together.
    count_tokens: maps the messages of a prompt and the question for a judge to the number of tokens
      that it reads, with 'x' as each candidate.
  """

  path: str = ''
  max_positions: int = 0
  candidates: int = 1
  count_tokens: Callable[[Sequence[Message], str], int] = lambda messages, question: 0


# Maps a loader and the names of a model and a label to what is known of a rater. It raises
# UserError if the rater cannot be loaded.
INSPECTIONS: Registry[Callable[[ModelLoader, str, str], Inspection]] = Registry(
  'inspection of a rater'
)


def inspect_rater(loader: ModelLoader, kind: str, model: str, label: str) -> Inspection:
  """Return what is known of a rater, and check that it can be loaded.

  Args:
    loader: a loader that checks models instead of loading them.
    kind: a name in `RATERS`.
    model: name of the model.
    label: name of the label; '' if there is none.

  Raises:
    UserError: if it cannot be loaded.
  """
  try:
    if kind in INSPECTIONS:
      return INSPECTIONS[kind](loader, model, label)
    RATERS[kind](loader, model, label)
  except Inspected as found:
    return Inspection(found.path)
  return Inspection()


@RATERS.register('judge')
def load_judge(loader: ModelLoader, model: str, label: str) -> Rater:
  """Return a rater by a judge that compares each pair of candidates.

  The number of a candidate is its mean log-odds in nats against the others.

  Args:
    loader: loads the judge.
    model: a name in `JUDGES`, or a language model such as 'base'.
    label: must be ''.

  Raises:
    UserError: if the judge cannot be loaded, or a label is given.
  """
  check_names('judge', model, label)
  if model in JUDGES:
    return rate_by_pairs(JUDGES[model](loader))
  lm = loader.language_model(model)
  dialogue = judge_dialogue(lm.tokenizer, lm.eos_token_ids, loader.template_options, loader.style)
  return rate_by_pairs(local_judge(lm, dialogue))


@INSPECTIONS.register('judge')
def inspect_judge(loader: ModelLoader, model: str, label: str) -> Inspection:
  """Return what is known of the rater of `load_judge`. Arguments and errors are the same."""
  check_names('judge', model, label)
  if model in JUDGES:
    JUDGES[model](loader)
    return Inspection()
  path, info = loader.inspect_language_model(model)
  dialogue = judge_dialogue(
    info.tokenizer, info.eos_token_ids, loader.template_options, loader.style
  )

  def count_tokens(messages: Sequence[Message], question: str) -> int:
    text = build_question(messages, question, 'x', 'x')
    return max(sum(map(len, pair)) for pair in tokenize_question(info.tokenizer, dialogue, text))

  return Inspection(path, info.config.max_positions, 2, count_tokens)


@RATERS.register('reward')
def load_reward(loader: ModelLoader, model: str, label: str) -> Rater:
  """Return a rater by a reward model or classifier, whose number is the logit of a label.

  Args:
    loader: loads the model.
    model: folder or hub name of a sequence-classification checkpoint.
    label: name of the label; '' if the checkpoint has only one.

  Raises:
    UserError: if the checkpoint cannot be loaded or has no such label.
  """
  check_names('reward', model, '')
  reward_model = loader.reward_model(model)
  column = find_label(reward_model.labels, label or None, model)

  def rate(messages: Sequence[Message], texts: Sequence[str], question: str) -> list[float]:
    del question
    return reward_model.scores(append_replies([messages] * len(texts), texts), column)

  return rate


@INSPECTIONS.register('reward')
def inspect_reward(loader: ModelLoader, model: str, label: str) -> Inspection:
  """Return what is known of the rater of `load_reward`. Arguments and errors are the same."""
  check_names('reward', model, '')
  info, dialogue = loader.inspect_reward_model(model)
  find_label(info.labels, label or None, model)

  def count_tokens(messages: Sequence[Message], question: str) -> int:
    del question
    return len(dialogue.conversation(append_replies([messages], ['x'])[0]))

  return Inspection(model, info.config.max_positions, 1, count_tokens)


@RATERS.register('guard')
def load_guard(loader: ModelLoader, model: str, label: str) -> Rater:
  """Return a rater by a guard model, whose number is -P(unsafe).

  Args:
    loader: loads the guard.
    model: folder or hub name of the guard's checkpoint.
    label: the kind of the guard, a name in `GUARDS`.

  Raises:
    UserError: if the checkpoint cannot be loaded, or does not suit the kind.
  """
  check_names('guard', model, '')
  guard = guards.GUARDS[label]
  lm = loader.language_model(model)

  def rate(messages: Sequence[Message], texts: Sequence[str], question: str) -> list[float]:
    del question
    ratings = guards.rate(guard, lm, [messages] * len(texts), texts)
    unsafe = [rating.unsafe for rating in ratings if rating is not None]
    if len(unsafe) < len(texts):
      raise UnreadableError(
        f'Candidate {ratings.index(None) + 1} is blank or too long for {model}.'
      )
    return [-probability for probability in unsafe]

  return rate


@INSPECTIONS.register('guard')
def inspect_guard(loader: ModelLoader, model: str, label: str) -> Inspection:
  """Return what is known of the rater of `load_guard`. Arguments and errors are the same."""
  check_names('guard', model, '')
  guard = guards.GUARDS[label]
  path, info = loader.inspect_language_model(model)
  reader = guards.Reader(guard, info.tokenizer)
  reader.check()
  return Inspection(
    path, info.config.max_positions, 1, lambda messages, _: reader.count_tokens(messages, 'x')
  )


@RATERS.register('scorer')
def load_scorer(loader: ModelLoader, model: str, label: str) -> Rater:
  """Return a rater by a scorer, an entry of `SCORERS`.

  A candidate loses 1 for each rule that it breaks, and gains 0.5 if it helps.

  Args:
    loader: loads the model of the scorer.
    model: a name in `SCORERS`.
    label: must be ''.

  Raises:
    UserError: if there is no such scorer, it rates nothing, or a label is given.
  """
  check_names('scorer', model, label)
  scorer = SCORERS[model](loader)
  if scorer is None:
    raise UserError(f'The scorer {model!r} rates nothing. Choose another one of {tuple(SCORERS)}.')

  def rate(messages: Sequence[Message], texts: Sequence[str], question: str) -> list[float]:
    del question
    verdicts = scorer([messages] * len(texts), texts)
    return [0.5 * verdict.helpful - len(verdict.violations) for verdict in verdicts]

  return rate


def rate_by_pairs(judge: Judge) -> Rater:
  """Return a rater by the mean log-odds of each candidate against the others.

  Args:
    judge: compares two candidates.
  """

  def rate(messages: Sequence[Message], texts: Sequence[str], question: str) -> list[float]:
    pairs = list(itertools.combinations(range(len(texts)), 2))
    matches = [
      Match('', messages, question, (str(i), str(j)), (texts[i], texts[j])) for i, j in pairs
    ]
    totals = [0.0] * len(texts)
    for (i, j), comparison in zip(pairs, judge(matches), strict=True):
      totals[i] += comparison.mean_log_odds
      totals[j] -= comparison.mean_log_odds
    return [total / max(len(texts) - 1, 1) for total in totals]

  return rate


def check_names(kind: str, model: str, label: str) -> None:
  """Check that a rater has a model, and no label that it cannot have.

  Args:
    kind: the kind of the rater.
    model: name of its model.
    label: must be ''.

  Raises:
    UserError: if it does not.
  """
  if not model:
    raise UserError(f'A rater of the kind {kind!r} needs the name of its model. Give one.')
  if label:
    raise UserError(
      f'A rater of the kind {kind!r} has no labels, but got the label {label!r}. Leave it out.'
    )
