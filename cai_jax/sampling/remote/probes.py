"""The test requests that a served model gets before a run."""

import dataclasses
import math

import numpy as np

from cai_jax.runtime.errors import UserError, show
from cai_jax.sampling.types import Completion, LabelTurn, Turn

PROBE_KEY = np.array([0, 0], np.uint32)  # the random key of test requests
# A text in which tokenizers differ. Its number of tokens tells them apart.
PROBE_TEXT = (
  'The café opened on 21 March 1984; its naïve owners—two sisters—sold 3,500 cups in the first '
  'week.\n\n    def total(x_values): return sum(x_values) / 100  # ∑ über 漢字\n'
) * 3
PROBE_TOKENS = 16  # maximum length of the reply to a test request
MAX_PROBE = 8192  # maximum number of tokens of a test request's context


def shorten(turn: Turn, length: int = 0) -> Turn:
  """Return a turn with a short reply, to test a server.

  Args:
    turn: the turn, as in the run.
    length: the context is extended to this number of tokens with its reply, but not beyond
      MAX_PROBE. 0 leaves it as it is, and so does a chat.
  """
  max_tokens = min(turn.sampling.max_tokens, PROBE_TOKENS)
  context = turn.context
  if length and not turn.messages:
    length = max(min(length, MAX_PROBE) - max_tokens, len(context))
    context = (context * -(-length // len(context)))[:length]
  sampling = dataclasses.replace(turn.sampling, max_tokens=max_tokens)
  return dataclasses.replace(turn, context=context, sampling=sampling)


def check_label(turn: LabelTurn, completion: Completion, place: str) -> None:
  """Check that a test request for a label was answered by one, with its log-probability.

  Args:
    turn: the test.
    completion: the reply, which no filter withheld.
    place: the beginning of the message, such as 'X answers a test request'.

  Raises:
    UserError: if it was not.
  """
  if completion.tokens[:1] not in [[token] for token in turn.labels]:
    raise UserError(
      f'{place} for a label ({turn.name!r}) with {show(completion.text)}, which is none, so it '
      'ignores logit_bias. Use a server that applies it, or a variant without labels.'
    )
  if not math.isfinite(completion.logprobs[0]):
    raise UserError(
      f'{place} for a label ({turn.name!r}) without the log-probability of its token, which the '
      'decision needs. Use a server that returns log-probabilities, or a variant without labels.'
    )
