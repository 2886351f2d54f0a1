"""How many turns stage `label` samples, before it runs."""

import random
from typing import NamedTuple

from cai_jax.feedback.comparisons.asking import VERDICTS
from cai_jax.feedback.comparisons.items import read_items
from cai_jax.feedback.comparisons.pairing import PAIRINGS
from cai_jax.pipeline.run import Run
from cai_jax.scoring.judge import JUDGES


class LabelTurns(NamedTuple):
  """What stage `label` samples.

  Attributes:
    responses: number of responses to compare.
    pairs: number of comparisons that are written, at most.
    questions: number of questions to the feedback model, which is 0 for a judge.
    judged: number of comparisons of a judge, which is 0 for a feedback model.
    turns: number of turns of a question.
    tokens: tokens of a question's turns together, at most.
  """

  responses: int
  pairs: int
  questions: int
  judged: int
  turns: int
  tokens: int


def count_label_turns(run: Run) -> LabelTurns:
  """Return the turns of stage `label`; a run that labels nothing has none.

  Each pair is asked about in both orders, under each principle, and `samples` times.

  Args:
    run: the run.

  Raises:
    UserError: if a file of comparisons cannot be read.
  """
  config = run.config.label
  if not config.is_asked_for:
    return LabelTurns(0, 0, 0, 0, 0, 0)
  items = read_items(config, run.prompts['harmful'])
  responses = sum(config.responses for item in items if not item.responses)
  choose = PAIRINGS[config.pairs]
  counts = [len(choose(len(i.responses) or config.responses, random.Random(0))) for i in items]
  pairs = sum(counts)
  written = sum(n for n, item in zip(counts, items, strict=True) if item.is_written)
  is_asked = config.remote is not None or config.model not in JUDGES
  questions = 2 * config.principles * config.samples * pairs if is_asked else 0
  tokens = config.thoughts + max(VERDICTS[config.verdict].tokens, 1)
  judged = 0 if is_asked else config.principles * pairs
  return LabelTurns(responses, written, questions, judged, 1 + bool(config.thoughts), tokens)
