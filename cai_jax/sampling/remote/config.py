"""Settings of a model that is served over HTTP."""

import dataclasses
import math
import re
import urllib.parse

from cai_jax.runtime.errors import UserError
from cai_jax.runtime.settings import setting
from cai_jax.sampling.remote.protocol import SERVERS, changed_settings
from cai_jax.sampling.types import SamplingConfig

# The fields that determine what a model replies. The others say where it is and how it is asked.
IDENTITY_FIELDS = ('model', 'tokenizer', 'server', 'revision', 'prompt')
PROMPTS = ('tokens', 'text', 'chat')
LIMIT_FIELDS = ('max_tokens', 'max_completion_tokens')


@dataclasses.dataclass(frozen=True)
class RemoteConfig:
  """A model behind an OpenAI-compatible API, and settings of requests.

  Raises:
    UserError: if a value is not allowed.
  """

  url: str = setting(
    '', "Base URL of the API, such as 'http://localhost:8000/v1'. '' serves no model."
  )
  model: str = setting('', 'The name that the model is served under.')
  tokenizer: str = setting(
    '',
    "Folder or hub name of the served model's tokenizer. With prompt='chat' it only counts tokens, "
    'so that of a similar model will do.',
    path=True,
  )
  server: str = setting(
    'openai',
    "The server software: 'vllm', 'sglang', 'tgi' or 'llama.cpp'. 'openai' means the plain API, "
    'without extensions.',
  )
  revision: str = setting(
    '',
    'Revision of the served weights. Change it when the weights change, so that the journal treats '
    'them as another model.',
  )
  max_positions: int = setting(
    4096, 'Maximum number of tokens of a context and its reply that the server accepts.'
  )
  prompt: str = setting(
    'tokens',
    "Send contexts as 'tokens' or as 'text' to /completions, or as messages to /chat/completions "
    "('chat'). A chat returns text only: token ids and log-probabilities are then not known.",
  )
  timeout_seconds: float = setting(
    300.0, 'Seconds before a request times out, from connecting to the last byte of the answer.'
  )
  retries: int = setting(8, 'Maximum number of retries of a request.')
  backoff_seconds: float = setting(
    1.0, 'Seconds before the first retry. The wait doubles with every further retry.'
  )
  max_concurrent: int = setting(64, 'Maximum number of concurrent requests of each process.')
  api_key_env: str = setting(
    '', "Name of the environment variable that contains the API key. '' sends no key."
  )
  seed: str = setting(
    'turn',
    "'turn' sends a seed with each request, which depends on the run's seed and the turn. 'server' "
    "sends none, for servers that refuse seeds: another run then gets other texts. With 'turn', a "
    "server that refuses seeds at the start of a run is treated as with 'server'.",
    added=True,
  )
  give_up_seconds: float = setting(
    3600.0,
    'Seconds after which a request is not retried any more, however many retries are left.',
    added=True,
  )
  limit_field: str = setting(
    'max_tokens',
    "The server's name for the largest number of tokens of a reply in a chat: 'max_tokens', or "
    "'max_completion_tokens', which OpenAI's reasoning models need.",
    added=True,
  )
  requests_per_minute: float = setting(
    0.0, 'Most requests per minute that each process sends. 0 sets no limit.', added=True
  )
  tokens_per_minute: float = setting(
    0.0,
    'Most tokens per minute of the requests that each process sends: of their contexts, and of '
    'replies at their limit until the server says how long they were. 0 sets no limit.',
    added=True,
  )
  price_input: float = setting(
    0.0, 'Price of a million tokens of contexts, in any currency. 0 means no price.', added=True
  )
  price_cached_input: float = setting(
    -1.0,
    "Price of a million tokens of contexts that come from the server's cache. -1 means that of "
    'price_input.',
    added=True,
  )
  price_output: float = setting(
    0.0, 'Price of a million sampled tokens. 0 means no price.', added=True
  )
  batch: str = setting(
    '',
    'Folder for a batch interface: requests are written to it as files, and answers are read from '
    "files that you put there. '' asks the server itself.",
    added=True,
    path=True,
    copied=False,
  )

  def __post_init__(self):
    checks = (
      (
        'url',
        _is_base_url(self.url),
        "the base URL of an API, such as 'http://localhost:8000/v1', without user or password and "
        "without '?' or '#'",
      ),
      ('model', bool(self.model), 'the name that the model is served under'),
      ('tokenizer', bool(self.tokenizer), "a folder or hub name with the model's tokenizer"),
      ('server', self.server in SERVERS, f'one of {", ".join(SERVERS)}'),
      ('max_positions', self.max_positions >= 1, 'at least 1'),
      ('prompt', self.prompt in PROMPTS, f'one of {", ".join(map(repr, PROMPTS))}'),
      ('timeout_seconds', 0 < self.timeout_seconds < math.inf, 'positive and finite'),
      ('retries', self.retries >= 0, 'at least 0'),
      ('backoff_seconds', 0 <= self.backoff_seconds < math.inf, 'at least 0 and finite'),
      ('max_concurrent', self.max_concurrent >= 1, 'at least 1'),
      (
        'api_key_env',
        not self.api_key_env or re.fullmatch(r'[A-Z_][A-Z0-9_]{0,63}', self.api_key_env),
        'the name of an environment variable in capital letters, such as VLLM_API_KEY, never the '
        'key itself',
      ),
      ('seed', self.seed in ('turn', 'server'), "'turn' or 'server'"),
      ('give_up_seconds', 0 < self.give_up_seconds < math.inf, 'positive and finite'),
      *self._limit_checks(),
    )
    for name, valid, allowed in checks:
      if not valid:
        # The value may be a secret that was put in the wrong place.
        secret = name == 'api_key_env' or (name == 'url' and re.search('[@?#]', self.url))
        shown = '(not shown)' if secret else repr(getattr(self, name))
        raise UserError(f'remote: {name}={shown} must be {allowed}.')
    if self.prompt == 'tokens' and not SERVERS[self.server].accepts_tokens:
      raise UserError(f"remote: server={self.server!r} accepts text only. Set prompt='text'.")

  def _limit_checks(self) -> tuple[tuple[str, bool, str], ...]:
    """Return (field, whether its value is valid, what is allowed) for limits and prices."""
    limits = ('requests_per_minute', 'tokens_per_minute', 'price_input', 'price_output')
    return (
      *((name, 0 <= getattr(self, name) < math.inf, 'at least 0 and finite') for name in limits),
      (
        'price_cached_input',
        self.price_cached_input == -1 or 0 <= self.price_cached_input < math.inf,
        'at least 0 and finite, or -1 for price_input',
      ),
      ('limit_field', self.limit_field in LIMIT_FIELDS, f'one of {", ".join(LIMIT_FIELDS)}'),
      (
        'limit_field',
        self.limit_field == LIMIT_FIELDS[0] or self.prompt == 'chat',
        f"{LIMIT_FIELDS[0]!r} unless prompt='chat'",
      ),
    )

  @property
  def has_price(self) -> bool:
    """Whether tokens have a price."""
    return bool(self.price_input or self.price_output or self.price_cached_input > 0)

  def price(self, prompt_tokens: float, cached_tokens: float, completion_tokens: float) -> float:
    """Return the price of some tokens, in the currency of the settings.

    Args:
      prompt_tokens: tokens of contexts, those from the server's cache included.
      cached_tokens: tokens of contexts from the server's cache.
      completion_tokens: sampled tokens.
    """
    cached = self.price_input if self.price_cached_input < 0 else self.price_cached_input
    total = (prompt_tokens - cached_tokens) * self.price_input
    return (total + cached_tokens * cached + completion_tokens * self.price_output) / 1e6

  def identity(self) -> dict[str, str]:
    """Return the fields that determine what the model replies, by name."""
    names = (*IDENTITY_FIELDS, *(() if self.seed == 'turn' else ('seed',)))
    return {name: getattr(self, name) for name in names}

  def gives_logprobs(self, sampling: SamplingConfig) -> bool:
    """Return whether answers have the log-probabilities of the model itself.

    They are those from before temperature, biases and penalties. Those of single replies may still
    be unknown, see `sampling.remote.tokens`.

    Args:
      sampling: the settings of the requests.
    """
    server = SERVERS[self.server]
    changed = sampling.temperature != 1 or sampling.changes_logits
    return self.prompt != 'chat' and server.logprobs and not (server.scaled_logprobs and changed)

  def check_sampling(self, sampling: SamplingConfig) -> None:
    """Check that the server supports sampling settings.

    Args:
      sampling: the settings.

    Raises:
      UserError: if the API of the server has no field for one of them.
    """
    server = SERVERS[self.server]
    unsupported = [
      f'{name}={value!r}'
      for name, value, supported in (
        ('top_k', sampling.top_k, server.top_k),
        ('stop_token_ids', sampling.stop_token_ids, server.stop_token_ids),
        ('max_thought_tokens', sampling.max_thought_tokens, server.stop_token_ids),
      )
      if value and not supported
    ]
    changed = changed_settings(sampling)
    unsupported += [f'{n}={value!r}' for n, value in changed.items() if n not in server.settings]
    if unsupported:
      needed = {*changed}
      capable = [
        name
        for name, other in SERVERS.items()
        if other.top_k and other.stop_token_ids and needed <= {*other.settings}
      ]
      raise UserError(
        f'remote: server={self.server!r} does not support {", ".join(unsupported)}. Remove it, or '
        f'serve the model with {" or ".join(capable)}.'
      )

  def check_labels(self) -> None:
    """Check that the log-probabilities of the server can decide between labels.

    Raises:
      UserError: if they are those after the bias that leaves only labels, or if there are none.
    """
    server = SERVERS[self.server]
    if server.scaled_logprobs or not server.logprobs:
      capable = [n for n, s in SERVERS.items() if s.logprobs and not s.scaled_logprobs]
      fault = 'after biases and temperature' if server.logprobs else 'not at all'
      raise UserError(
        f'remote: server={self.server!r} returns log-probabilities {fault}, so its model cannot '
        f'choose between labels. Serve it with {" or ".join(capable)}, or use a variant without '
        'labels.'
      )


def _is_base_url(url: str) -> bool:
  """Return whether paths can be appended to a URL, and whether it has no place for a secret."""
  try:
    parts = urllib.parse.urlsplit(url)
    _ = parts.port  # raises ValueError if it is not a port
  except ValueError:
    return False
  return (
    re.fullmatch(r'[\x21-\x7e]+', url) is not None  # HTTP has no way to send other characters
    and re.search('[@?#]', url) is None
    and parts.scheme in ('http', 'https')
    and bool(parts.hostname)
  )
