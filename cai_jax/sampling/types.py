"""What is asked of a model, and what comes back."""

import dataclasses
from collections.abc import Generator
from typing import Any

from cai_jax.runtime.errors import UserError

MAX_STOP_TOKENS = 16  # width of the stop table in the compiled decode program


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
  """How one reply is sampled."""

  temperature: float = 1.0  # divides the logits; 0 is greedy
  top_k: int = 0  # keep the k most likely tokens; 0 keeps all
  top_p: float = 1.0  # keep the smallest set of likely tokens with at least this mass
  max_tokens: int = 256  # longest reply in tokens, the ending one included
  stop: tuple[str, ...] = ()  # texts that end the reply, besides the dialogue's own
  stop_token_ids: tuple[int, ...] = ()  # tokens that end the reply, besides the dialogue's own

  def __post_init__(self):
    checks = (
      ('temperature', self.temperature >= 0, 'at least 0'),
      ('top_k', self.top_k >= 0, 'at least 0 (0 keeps all tokens)'),
      ('top_p', 0 < self.top_p <= 1, 'in (0, 1]'),
      ('max_tokens', self.max_tokens >= 1, 'at least 1'),
      ('stop', not isinstance(self.stop, str) and all(self.stop), 'a tuple of non-empty texts'),
    )
    for name, fine, allowed in checks:
      if not fine:
        raise UserError(f'sampling: {name}={getattr(self, name)!r}; it must be {allowed}.')
    if len(self.stop_token_ids) > MAX_STOP_TOKENS:
      raise UserError(
        f'sampling: {len(self.stop_token_ids)} stop_token_ids; at most {MAX_STOP_TOKENS} fit.'
      )


@dataclasses.dataclass(frozen=True)
class Turn:
  """A reply to sample."""

  name: str  # names the turn in its chain ('critique_2'): its randomness hangs on it
  context: list[int]  # token ids that the reply follows
  sampling: SamplingConfig
  model: str = 'base'  # which of the engine's models replies


@dataclasses.dataclass(frozen=True)
class Completion:
  """A sampled reply."""

  tokens: list[int]  # as sampled, the token that ended the reply included
  text: str  # without the ending token or stop text
  logprobs: list[float]  # log P(token | all before; θ) in nats, before temperature and filters
  finish_reason: str  # 'stop' (token), 'stop_text' or 'length'


# A chain yields the turns it wants sampled, is sent their completions, and returns its result.
Chain = Generator[Turn, Completion, Any]
