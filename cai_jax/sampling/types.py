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
MAX_BIASES = 64  # width of its table of biases


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
  min_p: float = setting(
    0.0,
    'Sample from the tokens that are at least this many times as likely as the most likely token '
    '(Nguyen et al. 2024). 0 keeps all tokens.',
    added=True,
  )
  repetition_penalty: float = setting(
    1.0,
    'Divide positive logits of tokens that occurred in the context or the reply by this value, and '
    'multiply negative ones, as Hugging Face does (Keskar et al. 2019). 1 is off.',
    added=True,
  )
  presence_penalty: float = setting(
    0.0,
    'Subtract this from the logit of each token that occurred in the reply (OpenAI). 0 is off.',
    added=True,
  )
  frequency_penalty: float = setting(
    0.0,
    'Subtract this from the logit of a token as many times as it occurred in the reply (OpenAI). '
    '0 is off.',
    added=True,
  )
  logit_bias: tuple[tuple[int, float], ...] = setting(
    (),
    'Pairs of a token id and a number that is added to its logit, such as ((5, -100.0),). At most '
    f'{MAX_BIASES}.',
    added=True,
  )
  max_tokens: int = setting(256, 'Maximum length of a reply in tokens, including its stop token.')
  max_thought_tokens: int = setting(
    0,
    'Maximum length in tokens of the thoughts of a reasoning model. `max_tokens` then limits the '
    'answer alone. 0 gives thoughts no limit of their own.',
    added=True,
    most=10_000_000,
  )
  stop: tuple[str, ...] = setting((), "Texts that end a reply, in addition to the dialogue's own.")
  stop_token_ids: tuple[int, ...] = setting(
    (), f"Token ids that end a reply, in addition to the dialogue's own. At most {MAX_STOP_TOKENS}."
  )

  def __post_init__(self):
    convert_fields(self, 'sampling')
    biases = dict(self.logit_bias)
    checks = (
      ('temperature', self.temperature >= 0, 'at least 0'),
      ('top_k', self.top_k >= 0, 'at least 0 (0 keeps all tokens)'),
      ('top_p', 0 < self.top_p <= 1, 'in (0, 1]'),
      ('min_p', 0 <= self.min_p <= 1, 'in [0, 1]'),
      ('repetition_penalty', self.repetition_penalty > 0, 'positive'),
      ('presence_penalty', abs(self.presence_penalty) <= 2, 'in [-2, 2]'),
      ('frequency_penalty', abs(self.frequency_penalty) <= 2, 'in [-2, 2]'),
      (
        'logit_bias',
        len(biases) == len(self.logit_bias) <= MAX_BIASES
        and all(token >= 0 and abs(bias) <= 100 for token, bias in self.logit_bias),
        f'at most {MAX_BIASES} pairs of a token id, each once, and a number in [-100, 100]',
      ),
      ('max_tokens', self.max_tokens >= 1, 'at least 1'),
      ('max_thought_tokens', self.max_thought_tokens >= 0, 'at least 0 (0 sets no limit)'),
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

  @property
  def changes_logits(self) -> bool:
    """Whether a bias or penalty changes the logits that tokens are drawn from."""
    return bool(
      self.logit_bias
      or self.repetition_penalty != 1
      or self.presence_penalty
      or self.frequency_penalty
    )

  def check_vocabulary(self, size: int, where: str) -> None:
    """Check that each token with a bias is in a vocabulary.

    Args:
      size: number of token ids of the model.
      where: what the settings belong to, for the message.

    Raises:
      UserError: if one is not.
    """
    beyond = [token for token, _ in self.logit_bias if token >= size]
    if beyond:
      raise UserError(
        f'{where}: logit_bias names token {beyond[0]}, but the model has the tokens 0 to '
        f'{size - 1}. Remove it.'
      )


@dataclasses.dataclass(frozen=True)
class Turn:
  """A reply that a chain asks the engine to sample.

  Attributes:
    name: the turn's name in its chain, such as 'critique_2'. The random key depends on it.
    context: token ids that precede the reply.
    sampling: sampling settings.
    model: name of the engine's model that replies.
    messages: (role, content) pairs that a chat-only server reads in place of the context, which
      then only counts tokens. Empty for every other model.
  """

  name: str
  context: list[int]
  sampling: SamplingConfig
  model: str = 'base'
  messages: tuple[tuple[str, str], ...] = ()


@dataclasses.dataclass(frozen=True)
class LabelTurn(Turn):
  """A turn of one token, which its `logit_bias` limits to some labels.

  Attributes:
    labels: token ids, one for each label.
  """

  labels: tuple[int, ...] = ()


FINISH_REASONS = ('stop', 'stop_text', 'length', 'content_filter')


@dataclasses.dataclass(frozen=True)
class Usage:
  """What a server says that a reply took, in its own tokens. None is what it does not say.

  Attributes:
    prompt_tokens: tokens of the context, those from the server's cache included.
    cached_tokens: tokens of the context that came from the server's cache.
    completion_tokens: sampled tokens, those of hidden reasoning included.
    attempts: requests that were sent for the reply. What a server charges for those that failed is
      not known.
  """

  prompt_tokens: int | None = None
  cached_tokens: int | None = None
  completion_tokens: int | None = None
  attempts: int = 1

  @property
  def total(self) -> int | None:
    """Tokens of the context and of the reply; None if the server does not say both."""
    if self.prompt_tokens is None or self.completion_tokens is None:
      return None
    return self.prompt_tokens + self.completion_tokens


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
    usage: what the server says that the reply took; None for a model in memory. It is no part of
      the reply, so completions that differ only in it are equal.
  """

  tokens: list[int]
  text: str
  logprobs: list[float]
  finish_reason: str
  usage: Usage | None = dataclasses.field(default=None, compare=False)


# A generator that yields turns, receives the completion of each, and returns its own result.
Chain = Generator[Turn, Completion, Any]
