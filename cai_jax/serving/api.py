"""The endpoints: each maps the body of a request to the body of an answer."""

import dataclasses
import functools
import hashlib
import json
import secrets
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from typing import Any

from cai_jax.dialogue import Dialogue, control_tokens
from cai_jax.dialogue.messages import check_text
from cai_jax.runtime.errors import UserError, show
from cai_jax.sampling.text import decode, find_stop_text
from cai_jax.sampling.types import MAX_STOP_TOKENS, Completion, SamplingConfig, Turn
from cai_jax.scoring.likelihood import encode_text
from cai_jax.scoring.positions import MOST_ALTERNATIVES, Scored
from cai_jax.serving import answers
from cai_jax.serving.answers import Choice
from cai_jax.serving.errors import RequestError
from cai_jax.serving.protocol import Settings, read_chat, read_completion
from cai_jax.serving.waiting import IsGone, wait_for
from cai_jax.serving.worker import Worker

Endpoint = Callable[[Mapping[str, Any], IsGone], dict[str, Any]]
# Tokens and alternatives that an answer may list. Memory holds an answer as a whole, with a few
# hundred bytes for each.
MOST_ENTRIES = 2**20
NO_REPLY = Completion([], '', [], 'length')


class Api:
  """The API of one model.

  Args:
    worker: samples and scores.
    name: the name that the model is served under.
    dialogue: renders chats, or the reason why the model cannot chat.

  Attributes:
    endpoints: functions by method and path. They take a body, and a function that tells whether the
      client has hung up.
  """

  def __init__(self, worker: Worker, name: str, dialogue: Dialogue | UserError):
    self._worker, self._lm, self._name, self._dialogue = worker, worker.lm, name, dialogue
    self._tokenizer = worker.lm.tokenizer
    # A fast tokenizer keeps `split_special_tokens` as state, which threads must not share.
    self._encoding = threading.Lock()
    self._piece = functools.cache(lambda token: answers.spell(self._tokenizer, [token]))
    self._control = control_tokens(self._tokenizer)
    self._created = int(time.time())
    ends = (*self._lm.eos_token_ids, self._tokenizer.eos_token_id)
    self._ends = tuple(dict.fromkeys(token for token in ends if token is not None))
    self.endpoints: dict[tuple[str, str], Endpoint] = {
      ('GET', '/health'): lambda *_: {'status': 'ok'},
      ('GET', '/v1/models'): lambda *_: {'object': 'list', 'data': [self._model()]},
      ('GET', f'/v1/models/{name}'): lambda *_: self._model(),
      ('GET', '/tokenizer_info'): self._describe_tokenizer,
      ('POST', '/tokenize'): self._tokenize,
      ('POST', '/detokenize'): self._detokenize,
      ('POST', '/v1/completions'): self.complete,
      ('POST', '/v1/chat/completions'): self.chat,
    }

  def complete(self, body: Mapping[str, Any], is_gone: IsGone) -> dict[str, Any]:
    """Answer a request to continue texts.

    Args:
      body: see `protocol.read_completion`.
      is_gone: whether the client has hung up.

    Raises:
      RequestError: if the request is refused.
      ConnectionAbortedError: if the client has hung up.
    """
    request = read_completion(body)
    settings, echo = request.settings, request.echo
    self._check_settings(settings)
    prompts = [self._encode(p) if isinstance(p, str) else p for p in request.prompts]
    sampling = _with_ends(settings.sampling, self._ends, ())
    choices = self._reply(prompts, settings, sampling, echo, is_gone)
    listed = []
    for number, choice in enumerate(choices):
      fields = answers.choice_fields(choice, number, self._tokenizer, sampling.stop, settings)
      prompt = request.prompts[number // settings.choices]
      text = choice.completion.text
      if echo:
        text = (prompt if isinstance(prompt, str) else self._spell(prompt)) + text
      logprobs = None
      if settings.alternatives is not None:
        likely = answers.likely_tokens(choice, settings.alternatives, echo)
        logprobs = answers.completion_logprobs(self._piece, likely)
      listed.append(fields | {'text': text, 'logprobs': logprobs})
    return self._envelope('text_completion', listed, prompts, choices)

  def chat(self, body: Mapping[str, Any], is_gone: IsGone) -> dict[str, Any]:
    """Answer a dialogue.

    Args:
      body: see `protocol.read_chat`.
      is_gone: whether the client has hung up.

    Raises:
      RequestError: if the request is refused, or the model cannot chat.
      ConnectionAbortedError: if the client has hung up.
    """
    request = read_chat(body)
    settings, dialogue = request.settings, self._dialogue
    self._check_settings(settings)
    if not isinstance(dialogue, Dialogue):
      raise RequestError(f'This model cannot chat. {dialogue}')
    try:
      context = dialogue.prompt(request.messages)
    except UserError as error:
      raise RequestError(str(error), 'messages') from None
    sampling = _with_ends(settings.sampling, dialogue.stop_token_ids, dialogue.stop_strings)
    choices = self._reply([context], settings, sampling, False, is_gone)
    listed = []
    for number, choice in enumerate(choices):
      fields = answers.choice_fields(choice, number, self._tokenizer, sampling.stop, settings)
      thoughts, text = dialogue.split(choice.completion.tokens)
      ends = [text.find(stop) for stop in settings.sampling.stop if stop in text]
      message = {'role': 'assistant', 'content': text[: min(ends, default=len(text))]}
      if thoughts:
        message['reasoning_content'] = thoughts
      logprobs = None
      if settings.alternatives is not None:
        likely = answers.likely_tokens(choice, settings.alternatives, echo=False)
        logprobs = answers.chat_logprobs(self._piece, likely)
      listed.append(fields | {'message': message, 'logprobs': logprobs})
    return self._envelope('chat.completion', listed, [context], choices)

  def _reply(
    self,
    prompts: Sequence[list[int]],
    settings: Settings,
    sampling: SamplingConfig,
    echo: bool,
    is_gone: IsGone,
  ) -> list[Choice]:
    """Return the choices of all prompts, in order.

    Every reply is asked for before the first is waited for, so that they share the engine's steps.
    """
    for context in prompts:
      self._check_context(context, settings)
    scores = settings.alternatives is not None and (echo or settings.alternatives > 0)
    self._check_size(prompts, settings, scores or echo or settings.return_ids)
    if scores and echo and _is_next_token(settings, sampling):
      return self._most_likely_tokens(prompts, settings, sampling, is_gone)
    futures = []
    for context in prompts if settings.max_tokens != 0 else ():
      most = settings.max_tokens or self._worker.length - len(context)
      turn = Turn('reply', context, dataclasses.replace(sampling, max_tokens=most))
      names = _reply_names(settings, context)
      futures += [self._worker.sample(name, turn) for name in names]
    contexts = [context for context in prompts for _ in range(settings.choices)]
    completions = wait_for(futures, is_gone) or [NO_REPLY] * len(contexts)
    choices = [Choice(*pair) for pair in zip(contexts, completions, strict=True)]
    if not scores:
      return choices
    rows = wait_for([self._score(c.tokens, settings) for c in choices], is_gone)
    return [c._replace(scored=row) for c, row in zip(choices, rows, strict=True)]

  def _most_likely_tokens(
    self,
    prompts: Sequence[list[int]],
    settings: Settings,
    sampling: SamplingConfig,
    is_gone: IsGone,
  ) -> list[Choice]:
    """Return choices of one greedy token each, which the scores of the prompts tell already.

    Programs that want the log-likelihood of a prompt ask for these, because few servers allow
    replies of no tokens.
    """
    rows = wait_for([self._score(p, settings) for p in prompts], is_gone)
    choices = []
    for context, scored in zip(prompts, rows, strict=True):
      token, logprob = int(scored.top_ids[-1, 0]), float(scored.top_logprobs[-1, 0])
      cut = find_stop_text(self._tokenizer, [token], sampling.stop)
      ended = 'stop' if token in sampling.stop_token_ids else 'length'
      text = '' if ended == 'stop' else decode(self._tokenizer, [token])
      if cut is not None:
        ended, text = 'stop_text', cut[1]
      completion = Completion([token], text, [logprob], ended)
      choices += [
        Choice(context, completion, answers.with_reply(scored, logprob))
      ] * settings.choices
    return choices

  def _score(self, tokens: Sequence[int], settings: Settings) -> Future[Scored]:
    # Two numbers of alternatives, so that few programs are compiled.
    return self._worker.score(tokens, MOST_ALTERNATIVES if (settings.alternatives or 0) > 1 else 1)

  def _check_settings(self, settings: Settings) -> None:
    """Raise RequestError for another model, or settings that do not suit this one."""
    if settings.model != self._name:
      raise RequestError(
        f'There is no model {show(settings.model)} here. This server has {self._name!r}.',
        'model',
        404,
        'model_not_found',
      )
    sampling, size = settings.sampling, self._lm.vocab_size
    try:
      sampling.check_vocabulary(size, 'The request')
    except UserError as error:
      raise RequestError(str(error), 'logit_bias') from None
    if [token for token in sampling.stop_token_ids if token >= size]:
      raise RequestError(f'stop_token_ids must be less than {size}.', 'stop_token_ids')
    own = self._dialogue.stop_token_ids if isinstance(self._dialogue, Dialogue) else ()
    most = MAX_STOP_TOKENS - len({*self._ends, *own})
    if len(sampling.stop_token_ids) > most:
      raise RequestError(f'stop_token_ids has more than {most} tokens.', 'stop_token_ids')

  def _check_context(self, context: Sequence[int], settings: Settings) -> None:
    """Raise RequestError if a prompt has a token that does not exist, or does not fit."""
    if not 0 <= min(context) <= max(context) < self._lm.vocab_size:
      raise RequestError(
        f'The prompt has token ids from {min(context)} to {max(context)}, but the vocabulary is '
        f"0..{self._lm.vocab_size - 1}. Use the model's own tokenizer.",
        'prompt',
      )
    reply = 1 if settings.max_tokens is None else settings.max_tokens
    if len(context) + reply > self._worker.length:
      raise RequestError(
        f'The prompt has {len(context)} tokens and the reply may have {reply}, but this server has '
        f'a context of {self._worker.length} tokens. Shorten the prompt, lower max_tokens, or '
        'start the server with a larger --length.',
        'max_tokens',
        code='context_length_exceeded',
      )

  def _check_size(
    self, prompts: Sequence[Sequence[int]], settings: Settings, lists_prompts: bool
  ) -> None:
    """Raise RequestError if the answer may be too large.

    Args:
      prompts: token ids of each prompt.
      settings: what the request asks for.
      lists_prompts: whether the answer has the tokens of the prompts, or they are scored.
    """
    tokens = 0
    for prompt in prompts:
      left = self._worker.length - len(prompt)
      tokens += left if settings.max_tokens is None else settings.max_tokens
      tokens += len(prompt) if lists_prompts else 0
    entries = tokens * settings.choices * (1 + (settings.alternatives or 0))
    if entries > MOST_ENTRIES:
      raise RequestError(
        f'The answer may have {entries} tokens and alternatives, but at most {MOST_ENTRIES} are '
        'allowed. Send fewer prompts in a request, or lower n, max_tokens or the number of '
        'log-probabilities.'
      )

  def _encode(self, text: str) -> list[int]:
    """Return the tokens of a text, with those that the tokenizer adds in front, such as BOS.

    Raises:
      RequestError: if it has no token, or spells a control token: the client may mean the token
        or the text.
    """
    if spelled := [control for control in self._control if control in text]:
      raise RequestError(
        f'The prompt spells the control token {spelled[0]!r}, which a text cannot contain. Send '
        'token ids, or send messages to /v1/chat/completions.',
        'prompt',
      )
    try:
      check_text(text)
      with self._encoding:
        tokens = encode_text(self._tokenizer, text)
    except UserError as error:
      raise RequestError(str(error), 'prompt') from None
    if not tokens:
      raise RequestError('The prompt is empty. It must have at least one token.', 'prompt')
    return tokens

  def _spell(self, tokens: Sequence[int]) -> str:
    return answers.spell(self._tokenizer, tokens)

  def _envelope(
    self, kind: str, listed: Sequence[Any], prompts: Sequence[Sequence], choices: Sequence[Choice]
  ) -> dict[str, Any]:
    counts = sum(map(len, prompts)), sum(len(choice.completion.tokens) for choice in choices)
    return answers.envelope(kind, self._name, self._lm.fingerprint[:16], listed, counts)

  def _model(self) -> dict[str, Any]:
    """Return the entry of the model. `max_model_len` is vLLM's name of the context."""
    return {
      'id': self._name,
      'object': 'model',
      'created': self._created,
      'owned_by': 'cai_jax',
      'max_model_len': self._worker.length,
    }

  def _describe_tokenizer(self, *_: Any) -> dict[str, Any]:
    """Return what a client needs to use the tokenizer from here, in vLLM's form."""
    names = ('bos_token', 'eos_token', 'pad_token', 'unk_token', 'chat_template')
    info = {name: getattr(self._tokenizer, name, None) for name in names}
    return info | {'tokenizer_class': type(self._tokenizer).__name__}

  def _tokenize(self, body: Mapping[str, Any], _: IsGone) -> dict[str, Any]:
    """Return the tokens of a text as the tokenizer reads it, with control tokens."""
    text, special = body.get('prompt'), body.get('add_special_tokens', True)
    if not isinstance(text, str) or not isinstance(special, bool):
      raise RequestError('prompt must be a text, and add_special_tokens true or false.', 'prompt')
    with self._encoding:
      tokens = self._tokenizer.encode(text, add_special_tokens=special, split_special_tokens=False)
    return {'tokens': tokens, 'count': len(tokens), 'max_model_len': self._worker.length}

  def _detokenize(self, body: Mapping[str, Any], _: IsGone) -> dict[str, Any]:
    """Return the text of tokens, with the spellings of control tokens."""
    tokens, size = body.get('tokens'), self._lm.vocab_size
    if not isinstance(tokens, list) or not all(type(t) is int and 0 <= t < size for t in tokens):
      raise RequestError(f'tokens must be a list of token ids less than {size}.', 'tokens')
    return {'prompt': self._spell(tokens)}


def _with_ends(
  sampling: SamplingConfig, tokens: Sequence[int], texts: Sequence[str]
) -> SamplingConfig:
  """Return sampling settings with the tokens and texts that end each reply of a model."""
  return dataclasses.replace(
    sampling,
    stop_token_ids=tuple(dict.fromkeys((*tokens, *sampling.stop_token_ids))),
    stop=tuple(dict.fromkeys((*texts, *sampling.stop))),
  )


def _is_next_token(settings: Settings, sampling: SamplingConfig) -> bool:
  """Return whether a reply is the most likely next token."""
  return settings.max_tokens == 1 and sampling.temperature == 0 and not sampling.changes_logits


def _reply_names(settings: Settings, context: Sequence[int]) -> list[str]:
  """Return a name for each choice, which determines its randomness.

  With a seed, the name is a function of seed, prompt and number of the choice, so the reply does
  not depend on other requests. Without one, the names are new at each request.
  """
  source = secrets.token_hex(16)
  if settings.seed is not None:
    content = json.dumps([settings.seed, list(context)]).encode()
    source = hashlib.blake2b(content, digest_size=12).hexdigest()
  return [f'{source}/{number}' for number in range(settings.choices)]
