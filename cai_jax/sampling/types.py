"""Sampling settings, and the turns and completions that chains and the engine exchange.

To add a filter or a penalty, add its setting to `SamplingConfig` and apply it in
`cai_jax/sampling/sample.py`, whose docstring lists the steps.
"""

import dataclasses
from collections.abc import Generator
from typing import Any

from cai_jax.runtime.errors import UserError
from cai_jax.runtime.settings import setting
from cai_jax.runtime.values import convert_fields

MAX_STOP_TOKENS = 16  # width of the stop-token table in the compiled decode program


# The journal's keys depend on these fields. The default of a new field must be neutral, because a
# key contains the field only if its value differs.
@dataclasses.dataclass(frozen=True)
class SamplingConfig:
  """How a reply is sampled.

  Raises:
    UserError: if a value has the wrong type or is out of range.
  """

  temperature: float = setting(1.0, 'Divisor of the logits. 0 picks the most likely token.')
  top_k: int = setting(0, 'Sample from the k most likely tokens. 0 keeps all tokens.')
  top_p: float = setting(
    1.0,
    'Sample from the smallest set of most likely tokens whose total probability reaches this '
    'value. 1 keeps all tokens.',
  )
  max_tokens: int = setting(256, 'Maximum length of a reply in tokens, including its stop token.')
  stop: tuple[str, ...] = setting((), "Texts that end a reply, in addition to the dialogue's own.")
  stop_token_ids: tuple[int, ...] = setting(
    (), f"Token ids that end a reply, in addition to the dialogue's own. At most {MAX_STOP_TOKENS}."
  )

  def __post_init__(self):
    convert_fields(self, 'sampling')
    checks = (
      ('temperature', self.temperature >= 0, 'at least 0'),
      ('top_k', self.top_k >= 0, 'at least 0 (0 keeps all tokens)'),
      ('top_p', 0 < self.top_p <= 1, 'in (0, 1]'),
      ('max_tokens', self.max_tokens >= 1, 'at least 1'),
      ('stop', all(self.stop), 'a tuple of non-empty texts'),
      (
        'stop_token_ids',
        min(self.stop_token_ids, default=0) >= 0,
        'token ids, which are at least 0',
      ),
    )
    for name, valid, allowed in checks:
      if not valid:
        raise UserError(f'sampling: {name}={getattr(self, name)!r} must be {allowed}.')
    if len(self.stop_token_ids) > MAX_STOP_TOKENS:
      raise UserError(
        f'sampling: stop_token_ids has {len(self.stop_token_ids)} tokens. '
        f'List at most {MAX_STOP_TOKENS}.'
      )


@dataclasses.dataclass(frozen=True)
class Turn:
  """A reply that a chain asks the engine to sample.

  Attributes:
    name: the turn's name in its chain, such as 'critique_2'. The random key depends on it.
    context: token ids that precede the reply.
    sampling: sampling settings.
    model: name of the engine's model that replies.
  """

  name: str
  context: list[int]
  sampling: SamplingConfig
  model: str = 'base'


FINISH_REASONS = ('stop', 'stop_text', 'length', 'content_filter')


@dataclasses.dataclass(frozen=True)
class Completion:
  """A sampled reply.

  Attributes:
    tokens: sampled token ids, including the stop token.
    text: the decoded reply, without its stop token or stop text.
    logprobs: log P(token | all previous tokens; θ) of each token in nats, before temperature and
      filters.
    finish_reason: 'stop' (a stop token), 'stop_text', 'length', or 'content_filter' if a server
      withheld the reply, which then has no tokens.
  """

  tokens: list[int]
  text: str
  logprobs: list[float]
  finish_reason: str


# A generator that yields turns, receives the completion of each, and returns its own result.
Chain = Generator[Turn, Completion, Any]
