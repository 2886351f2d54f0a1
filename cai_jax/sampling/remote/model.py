"""A served model that the engine uses like a model in memory."""

import copy
import dataclasses
import functools
import hashlib
import json
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from typing import Any

import numpy as np

from cai_jax.model.folder import load_vocabulary
from cai_jax.runtime.errors import UserError
from cai_jax.sampling.remote.answers import (
  ContradictionError,
  Request,
  check_answer,
  check_length,
  read_answer,
)
from cai_jax.sampling.remote.batch import Batch
from cai_jax.sampling.remote.chat import chat_completion, read_chat_answer
from cai_jax.sampling.remote.config import RemoteConfig
from cai_jax.sampling.remote.connection import Connection
from cai_jax.sampling.remote.fields import ProtocolError
from cai_jax.sampling.remote.probes import (
  PROBE_KEY,
  PROBE_TEXT,
  check_label,
  shorten,
)
from cai_jax.sampling.remote.protocol import SERVERS, chat_body, request_body, request_seed
from cai_jax.sampling.remote.refusals import RefusedError
from cai_jax.sampling.remote.tokens import prompt_text, reconstruct
from cai_jax.sampling.types import Completion, LabelTurn, Turn, Usage

# An answer may be as large as this number of bytes, and that number for each token of the context
# and the reply. Servers may list the tokens of both, with alternatives and their bytes.
ANSWER_BYTES, TOKEN_BYTES = 1 << 20, 4096
# The reply to a prompt that the server's filter refuses. What it costs is not known.
WITHHELD = Completion([], '', [], 'content_filter', Usage())
PATHS = {'tokens': '/completions', 'text': '/completions', 'chat': '/chat/completions'}


class Remote:
  """A model behind an OpenAI-compatible API, of completions or of chats.

  The engine submits turns and receives futures of their completions. Each request carries a seed
  that is a function of the turn's random key. The server may ignore it, or give other texts in
  other batches. After a restart, texts stay the same because the journal stores them.

  Args:
    config: address of the model and settings of requests.

  Attributes:
    config: address of the model and settings of requests.
    name: the served name and revision.
    public_name: the same, which datasets contain.
    fingerprint: hex digest that identifies the model in the journal. It depends on the served name,
      revision, tokenizer, server software and form of the prompt, not on the address.
    tokenizer: the served model's tokenizer.
    eos_token_ids: tokens that end a reply.
    vocab_size: size of the vocabulary.
    max_positions: maximum number of tokens of a context and its reply.
    reads_chats: whether the server reads messages and returns text only.
    test_usage: what the test requests of `check` took.
    batch: the files of the batch interface, or None.

  Raises:
    UserError: if the tokenizer cannot be loaded, or the environment variable of the API key is not
      set.
  """

  def __init__(self, config: RemoteConfig):
    vocabulary = load_vocabulary(config.tokenizer)
    self.config = config
    self.name = f'{config.model}@{config.revision}' if config.revision else config.model
    self.public_name = self.name
    self.tokenizer = vocabulary.tokenizer
    # A fast tokenizer stores `split_special_tokens` as state. If two threads share one, text that
    # spells a control token can become that token. The worker threads therefore use a copy.
    self._tokenizer, self._tokenizer_lock = copy.deepcopy(vocabulary.tokenizer), threading.Lock()
    self.eos_token_ids = vocabulary.eos_token_ids
    self.vocab_size = vocabulary.size
    self.max_positions = config.max_positions
    identity = [config.model, config.revision, config.server, config.prompt, vocabulary.fingerprint]
    if config.seed == 'server':
      identity.append('seed=server')
    self.fingerprint = hashlib.sha256(json.dumps(['remote', *identity]).encode()).hexdigest()
    self.reads_chats = config.prompt == 'chat'
    self.test_usage: list[Usage] = []
    self.batch: Batch | None = None
    if config.batch:
      name, attempts = self.fingerprint[:8], config.retries + 1
      self.batch = Batch(config.batch, name, PATHS[config.prompt], attempts)
    self._server = SERVERS[config.server]
    self._connection = Connection(config)

  def check(
    self, turns: Sequence[Turn] = (), stops: tuple[tuple[int, ...], tuple[str, ...]] = ((), ())
  ) -> RemoteConfig:
    """Check that the server serves the model and answers requests like those of a run.

    One short request is sent for each turn, with everything that requests of the run have, and its
    answer is compared with it. If the server refuses seeds, it is sent again without. A batch
    interface is not asked.

    Args:
      turns: turns as in the run. If the server does not say how long contexts may be, the first is
        extended to `max_positions`, but not beyond MAX_PROBE tokens.
      stops: the token ids and texts that end a reply.

    Returns:
      The config under which the server answers: this model's, or the same with seed='server'.

    Raises:
      UserError: if one of these does not hold.
    """
    if self.batch is not None:
      return self.config
    limit = self._connection.check()
    seeded = self.config.seed == 'turn'
    for number, turn in enumerate(turns):
      length = self.config.max_positions if limit is None and number == 0 else 0
      probe = shorten(turn, length)
      tokens = tuple(dict.fromkeys((*stops[0], *turn.sampling.stop_token_ids)))
      texts = tuple(dict.fromkeys((*stops[1], *turn.sampling.stop)))
      try:
        self._test(probe, tokens, texts, 'a test request', seeded)
      except RefusedError as error:
        if not seeded or not error.is_invalid:
          raise
        try:
          self._test(probe, tokens, texts, 'a test request without a seed', False)
        except RefusedError:
          raise error from None  # the seed is not the cause
        seeded = False
    if turns and self.config.prompt == 'tokens' and not self._server.returns_ids:
      self._compare_tokenizers(turns[0], seeded)
    return self.config if seeded else dataclasses.replace(self.config, seed='server')

  def _test(
    self, probe: Turn, tokens: tuple[int, ...], texts: tuple[str, ...], name: str, seeded: bool
  ) -> None:
    """Send a test request, and check that its answer holds no thoughts."""
    completion = self._ask(probe, PROBE_KEY, tokens, texts, name, seeded)
    if completion.usage is not None:
      self.test_usage.append(completion.usage)
    if isinstance(probe, LabelTurn) and completion.finish_reason != 'content_filter':
      check_label(probe, completion, f'{self._connection.label} answers {name}')
    if self.reads_chats and completion.text.lstrip().startswith('<think>'):
      raise UserError(
        f'{self._connection.label} answers {name} with thoughts (<think>) in its text, which later '
        'turns would read. Start the server with its parser for reasoning, or turn thoughts off.'
      )

  def check_turn(self, turn: Turn) -> None:
    """Check that the server can read the context of a turn.

    Args:
      turn: the turn.

    Raises:
      UserError: if the context and its reply are too long, or the context cannot be sent as text.
    """
    if len(turn.context) + turn.sampling.max_tokens > self.max_positions:
      raise UserError(
        f'turn {turn.name!r}: a context of {len(turn.context)} tokens and a reply of up to '
        f'{turn.sampling.max_tokens} exceed max_positions={self.max_positions} of {self.name}. '
        'Shorten prompts or max_tokens, or raise max_positions if the server accepts more.'
      )
    if self.config.prompt == 'text':
      self._prompt(turn.context, f'turn {turn.name!r}')

  def submit(
    self,
    turn: Turn,
    key: np.ndarray,
    stop_token_ids: Sequence[int] = (),
    stop_texts: Sequence[str] = (),
    chain_id: str = '',
    digest: str = '',
  ) -> 'Future[Completion] | None':
    """Return a future of a turn's completion, or None if a batch has no answer to it yet.

    Args:
      turn: the turn to sample; `turn.sampling` sets temperature, filters and length.
      key: u32[2], the turn's random key.
      stop_token_ids: all tokens that end the reply.
      stop_texts: all texts that end the reply.
      chain_id: id of the turn's chain, for error messages.
      digest: key of the turn in the journal, which names it in a batch.

    Returns:
      A future whose `result()` raises UserError if the server refuses the request or the configured
      tokenizer does not match its tokens, and UnreachableError if all attempts fail or the model is
      closed first. With a batch interface and no answer yet, `batch` counts the request as new or
      as waiting, or lists it in `failures`.

    Raises:
      RuntimeError: if the model is closed.
    """
    name = f'chain {chain_id!r}, turn {turn.name!r}' if chain_id else f'turn {turn.name!r}'
    tokens, texts, seeded = tuple(stop_token_ids), tuple(stop_texts), self.config.seed == 'turn'
    if self.batch is not None:
      return self._look_up(turn, key, tokens, texts, name, digest)
    return self._connection.submit(
      functools.partial(self._ask, turn, key, tokens, texts, name, seeded)
    )

  def close(self) -> None:
    """Cancel requests that have not been sent, and stop retrying those in flight."""
    self._connection.close()

  def _ask(
    self,
    turn: Turn,
    key: np.ndarray,
    stop_token_ids: tuple[int, ...],
    stop_texts: tuple[str, ...],
    name: str,
    seeded: bool,
  ) -> Completion:
    """Ask the server for a turn's completion and wait for it.

    Args:
      turn: the turn.
      key: u32[2], the turn's random key.
      stop_token_ids: all tokens that end the reply.
      stop_texts: all texts that end the reply.
      name: purpose of the request, for error messages.
      seeded: whether to send a seed.
    """
    body, context = self._body(turn, key, stop_token_ids, stop_texts, name, seeded)
    reserved = len(context) + turn.sampling.max_tokens

    def read(data: bytes, attempts: int) -> Completion:
      return self._read(data, attempts, turn, context, body, stop_token_ids, stop_texts)

    path, max_bytes = PATHS[self.config.prompt], ANSWER_BYTES + TOKEN_BYTES * reserved
    try:
      completion = self._connection.post(path, body, read, name, key.tobytes(), max_bytes, reserved)
    except RefusedError as error:
      if not error.is_filter:
        raise
      return WITHHELD
    if completion.usage is not None and (used := completion.usage.total) is not None:
      self._connection.settle(reserved, used)
    return completion

  def _body(
    self,
    turn: Turn,
    key: np.ndarray,
    stop_token_ids: tuple[int, ...],
    stop_texts: tuple[str, ...],
    name: str,
    seeded: bool,
  ) -> tuple[dict[str, Any], list[int]]:
    """Return the body of a turn's request, and the token ids that the server reads in it."""
    seed = request_seed(key) if seeded else None
    shared = turn.sampling, seed, stop_token_ids, stop_texts
    if self.reads_chats:
      model, limit = self.config.model, self.config.limit_field
      return chat_body(self._server, model, turn.messages, *shared, limit), turn.context
    prompt, context = self._prompt(turn.context, name)
    return request_body(self._server, self.config.model, prompt, *shared), context

  def _read(
    self,
    data: bytes,
    attempts: int,
    turn: Turn,
    context: list[int],
    body: Mapping[str, Any],
    stop_token_ids: tuple[int, ...],
    stop_texts: tuple[str, ...],
  ) -> Completion:
    """Return the completion in an answer, which is compared with its request.

    Args:
      data: the body of the answer.
      attempts: number of requests that were sent for it.
      turn: the turn.
      context: the token ids that the server reads.
      body: the body of the request.
      stop_token_ids: all tokens that end the reply.
      stop_texts: all texts that end the reply.

    Raises:
      ProtocolError: if the answer does not follow the API.
      ContradictionError: if it contradicts its request.
    """
    answer = (read_chat_answer if self.reads_chats else read_answer)(data)
    sent_stops, limit = body.get('stop', ()), turn.sampling.max_tokens
    names = self.vocab_size, self.config.tokenizer
    request = Request(context, limit, stop_token_ids, sent_stops, *names)
    keep_logprobs = self.config.gives_logprobs(turn.sampling)
    with self._tokenizer_lock:
      if self.reads_chats:
        completion = chat_completion(answer, self._tokenizer, stop_texts)
      else:
        check_answer(answer, request, self._tokenizer)
        completion = reconstruct(answer, self._tokenizer, stop_token_ids, stop_texts, keep_logprobs)
    if answer.tokens is None and not self.reads_chats:
      check_length(len(completion.tokens), request)
    return dataclasses.replace(completion, usage=answer.usage(attempts))

  def _look_up(
    self,
    turn: Turn,
    key: np.ndarray,
    stop_token_ids: tuple[int, ...],
    stop_texts: tuple[str, ...],
    name: str,
    digest: str,
  ) -> 'Future[Completion] | None':
    """Return a finished future of the completion in the batch; without one, ask for it there."""
    assert self.batch is not None
    seeded = self.config.seed == 'turn'
    body, context = self._body(turn, key, stop_token_ids, stop_texts, name, seeded)
    data = self.batch.answer(digest)
    future: Future[Completion] = Future()
    if data is None and self.batch.withheld(digest):
      future.set_result(WITHHELD)
      return future
    if data is None:
      self.batch.ask(digest, body, name)
      return None
    try:
      future.set_result(self._read(data, 1, turn, context, body, stop_token_ids, stop_texts))
    except (ProtocolError, ContradictionError) as error:
      self.batch.fail(digest, f'{name}: an answer of the batch does not fit its request. {error}')
      return None
    return future

  def _compare_tokenizers(self, turn: Turn, seeded: bool) -> None:
    """Check that the server's tokenizer gives a text as many tokens as ours.

    The server returns no token ids, so its answers do not show whether it has another tokenizer.
    Nothing is checked if it accepts no text, or does not count the tokens of prompts.

    Raises:
      UserError: if the numbers differ.
    """
    with self._tokenizer_lock:
      ours = {len(self._tokenizer.encode(PROBE_TEXT, add_special_tokens=b)) for b in (True, False)}
    sampling = dataclasses.replace(turn.sampling, max_tokens=1)
    seed = request_seed(PROBE_KEY) if seeded else None
    body = request_body(self._server, self.config.model, PROBE_TEXT, sampling, seed, (), ())
    name, max_bytes = 'a test request of text', ANSWER_BYTES
    try:
      answer = self._connection.post(
        '/completions', body, lambda data, _: read_answer(data), name, b'', max_bytes
      )
    except RefusedError:
      return
    self.test_usage.append(answer.usage(1))
    if answer.prompt_tokens is not None and answer.prompt_tokens not in ours:
      raise UserError(
        f'{self._connection.label} reads {answer.prompt_tokens} tokens in a text in which the '
        f'tokenizer {self.config.tokenizer!r} reads {min(ours)}. Set tokenizer to that of the '
        'served model.'
      )

  def _prompt(self, context: list[int], name: str) -> tuple[list[int] | str, list[int]]:
    """Return a context as requests contain it, and the token ids that the server reads in it.

    Raises:
      UserError: if the request contains text, and plain text in it spells a control token.
    """
    if self.config.prompt == 'tokens':
      return context, context
    with self._tokenizer_lock:
      text = prompt_text(self._tokenizer, context)
      if text is not None:
        return text, self._tokenizer.encode(text)
    raise UserError(
      f'{name}: the context contains plain text that spells a control token, which the server '
      "would read as that token. Use a server that supports prompt='tokens', or remove the prompt."
    )
