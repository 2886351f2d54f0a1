"""A served model that the engine uses like a model in memory."""

import copy
import functools
import hashlib
import json
import threading
from collections.abc import Sequence
from concurrent.futures import Future

import numpy as np

from cai_jax.model.folder import load_vocabulary
from cai_jax.runtime.errors import UserError
from cai_jax.sampling.remote.config import RemoteConfig
from cai_jax.sampling.remote.connection import Connection
from cai_jax.sampling.remote.protocol import SERVERS, read_answer, request_body, request_seed
from cai_jax.sampling.remote.tokens import ids_match_text, prompt_text, reconstruct
from cai_jax.sampling.types import Completion, Turn


class Remote:
  """A model behind an OpenAI-compatible completions API.

  The engine submits turns and receives futures of their completions. Each request carries a seed
  that is a function of the turn's random key. The server may ignore it, or give other texts in
  other batches. After a restart, texts stay the same because the journal stores them.

  Args:
    config: address of the model and settings of requests.

  Attributes:
    config: address of the model and settings of requests.
    name: the served name and revision, as stored in D_CAI.
    fingerprint: hex digest that identifies the model in the journal. It depends on the served name,
      revision, tokenizer, server software and form of the prompt, not on the address.
    tokenizer: the served model's tokenizer.
    eos_token_ids: tokens that end a reply.
    vocab_size: size of the vocabulary.
    max_positions: maximum number of tokens of a context and its reply.

  Raises:
    UserError: if the tokenizer cannot be loaded, or the environment variable of the API key is not
      set.
  """

  def __init__(self, config: RemoteConfig):
    vocabulary = load_vocabulary(config.tokenizer)
    self.config = config
    self.name = f'{config.model}@{config.revision}' if config.revision else config.model
    self.tokenizer = vocabulary.tokenizer
    # A fast tokenizer stores `split_special_tokens` as state. If two threads share one, text that
    # spells a control token can become that token. The worker threads therefore use a copy.
    self._tokenizer, self._tokenizer_lock = copy.deepcopy(vocabulary.tokenizer), threading.Lock()
    self.eos_token_ids = vocabulary.eos_token_ids
    self.vocab_size = vocabulary.size
    self.max_positions = config.max_positions
    identity = [config.model, config.revision, config.server, config.prompt, vocabulary.fingerprint]
    self.fingerprint = hashlib.sha256(json.dumps(['remote', *identity]).encode()).hexdigest()
    self._server = SERVERS[config.server]
    self._connection = Connection(config)

  def check(self) -> None:
    """Check that the server answers, serves the model and accepts contexts that are long enough.

    Raises:
      UserError: if one of these does not hold.
    """
    self._connection.check()

  def submit(
    self,
    turn: Turn,
    key: np.ndarray,
    stop_token_ids: Sequence[int] = (),
    stop_texts: Sequence[str] = (),
    chain_id: str = '',
  ) -> 'Future[Completion]':
    """Return a future of a turn's completion.

    Args:
      turn: the turn to sample; `turn.sampling` sets temperature, filters and length.
      key: u32[2], the turn's random key.
      stop_token_ids: all tokens that end the reply.
      stop_texts: all texts that end the reply.
      chain_id: id of the turn's chain, for error messages.

    Returns:
      A future whose `result()` raises UserError if the server refuses the request or the configured
      tokenizer does not match its tokens, and UnreachableError if all attempts fail or the model is
      closed first.

    Raises:
      RuntimeError: if the model is closed.
    """
    return self._connection.submit(
      functools.partial(self._sample, turn, key, tuple(stop_token_ids), tuple(stop_texts), chain_id)
    )

  def close(self) -> None:
    """Cancel requests that have not been sent, and stop retrying those in flight."""
    self._connection.close()

  def _sample(
    self,
    turn: Turn,
    key: np.ndarray,
    stop_token_ids: tuple[int, ...],
    stop_texts: tuple[str, ...],
    chain_id: str,
  ) -> Completion:
    """Ask the server for a turn's completion and wait for it."""
    name = f'chain {chain_id!r}, turn {turn.name!r}' if chain_id else f'turn {turn.name!r}'
    with self._tokenizer_lock:
      prompt = turn.context if self.config.prompt == 'tokens' else self._text(turn.context, name)
    body = request_body(
      self._server,
      self.config.model,
      prompt,
      turn.sampling,
      request_seed(key),
      stop_token_ids,
      stop_texts,
    )
    answer = self._connection.post('/completions', body, read_answer, name, key.tobytes())
    with self._tokenizer_lock:
      if answer.tokens is not None and not ids_match_text(
        self._tokenizer, answer.tokens, answer.text, self.vocab_size
      ):
        raise UserError(
          f'{self._connection.label} answers {name} with text {answer.text[:80]!r} and tokens '
          f'{answer.tokens[:12]}, but the tokenizer {self.config.tokenizer!r} decodes these tokens '
          'to another text. Set tokenizer to that of the served model.'
        )
      scaled = self._server.scaled_logprobs and turn.sampling.temperature != 1
      return reconstruct(
        answer, self._tokenizer, stop_token_ids, stop_texts, keep_logprobs=not scaled
      )

  def _text(self, context: list[int], name: str) -> str:
    """Return the context as text.

    Raises:
      UserError: if plain text in it spells a control token.
    """
    text = prompt_text(self._tokenizer, context)
    if text is None:
      raise UserError(
        f'{name}: the context contains plain text that spells a control token, which the server '
        "would read as that token. Use a server that supports prompt='tokens', or remove the "
        'prompt.'
      )
    return text
