"""A model that is served elsewhere, behind an OpenAI-compatible completions API.

vLLM, SGLang, TGI and llama.cpp's server have one. A `Remote` stands where an `LM` stands in the
engine: it is given turns and gives completions, through futures, with a bounded number of requests
on their way. What is not a verdict (time-outs, lost connections, 408, 429, 5xx, an answer that
cannot be read) is tried again after a while; any other refusal ends the run with the server's
words.

A request carries a seed that is a function of the turn's key. Whether a server honours it, and for
which batches, is the server's matter: it is the journal that keeps a text the same over restarts.

What comes back, by what the server tells:

- Token ids (vLLM, llama.cpp): the completion's tokens are those sampled, as with a local model.
- Text alone: it is encoded anew, as text, never as control tokens. Where a token ended the reply,
  the first of the turn's stop tokens is put behind it. Where the server does not say whether a
  token or a stop text ended the reply and both were asked for, it is called 'stop_text': the
  dialogue then goes on from the text, which is all that is known. A reasoning model's mark for the
  end of its reasoning is lost so; it needs a server that returns ids.
- Log-probabilities of these very tokens are kept; those of a distribution that temperature or
  filters have changed are not, since a record means log P(token | all before; θ). Where there is
  none it is NaN, never a guess.
"""

import copy
import dataclasses
import email.utils
import functools
import hashlib
import json
import math
import os
import queue
import re
import threading
import time
import urllib.parse
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any, NamedTuple

import numpy as np
import urllib3

from cai_jax.model.folder import load_vocabulary
from cai_jax.runtime.errors import UnreachableError, UserError
from cai_jax.sampling.text import first_stop_text, rounded
from cai_jax.sampling.types import Completion, SamplingConfig, Turn

LONGEST_BACKOFF = 60.0  # seconds; only a server's Retry-After may ask for more
RETRIED = (408, 425, 429)  # and all of 500..599


class _Server(NamedTuple):
  """What a server's completions API understands beyond OpenAI's, and how it counts."""

  tokens: bool = True  # a prompt may be token ids
  top_k: bool = False
  stop_token_ids: bool = False
  logprobs: bool = True
  tempered: bool = False  # its log-probabilities are those after temperature
  most_stops: int = 4  # stop texts in a request
  neutral: dict[str, Any] = {}  # switches off what it does by itself, and asks for ids


# vLLM and SGLang take defaults from the model's generation_config.json, llama.cpp has its own: so
# every setting is sent, also those that change nothing by our count. Ours is temperature first.
SERVERS = {
  'openai': _Server(),
  'vllm': _Server(
    top_k=True,
    stop_token_ids=True,
    most_stops=64,
    neutral={'top_k': -1, 'min_p': 0.0, 'repetition_penalty': 1.0, 'return_token_ids': True},
  ),
  'sglang': _Server(
    top_k=True,
    stop_token_ids=True,
    tempered=True,
    most_stops=64,
    neutral={'top_k': -1, 'min_p': 0.0, 'repetition_penalty': 1.0},
  ),
  # TGI takes any other name for that of an adapter.
  'tgi': _Server(tokens=False, logprobs=False, neutral={'model': 'tgi'}),
  'llama.cpp': _Server(
    top_k=True,
    most_stops=64,
    neutral={
      'top_k': 0,
      'min_p': 0.0,
      'repeat_penalty': 1.0,
      'samplers': ['temperature', 'top_k', 'top_p'],
    },
  ),
}


@dataclasses.dataclass(frozen=True)
class RemoteConfig:
  """Where a model is served, as what, and how patiently it is asked."""

  url: str  # base of the API, such as 'http://localhost:8000/v1'
  model: str  # the name it is served under
  tokenizer: str  # folder or hub name of the served model's tokenizer
  server: str = 'openai'  # what serves it: one of SERVERS; 'openai' sends no extension
  revision: str = ''  # of the served weights: with `model`, what names them in the journal
  max_positions: int = 4096  # tokens of a context with its reply that the server takes
  prompt: str = 'tokens'  # send contexts as 'tokens' or as 'text'
  timeout_seconds: float = 300.0  # without a byte from the server
  retries: int = 8  # further tries of a request
  backoff_seconds: float = 1.0  # before the first of them; doubles
  max_concurrent: int = 64  # requests on their way, in each process
  api_key_env: str = ''  # NAME of the environment variable that holds the key; '' sends none

  def __post_init__(self):
    url = urllib.parse.urlsplit(self.url)
    checks = (
      (
        'url',
        url.scheme in ('http', 'https') and bool(url.hostname) and '@' not in url.netloc,
        "the base of an API, such as 'http://localhost:8000/v1', without user or password",
      ),
      ('model', bool(self.model), 'the name that the model is served under'),
      ('tokenizer', bool(self.tokenizer), "a folder or hub name with the model's tokenizer"),
      ('server', self.server in SERVERS, f'one of {tuple(SERVERS)}'),
      ('max_positions', self.max_positions >= 1, 'at least 1'),
      ('prompt', self.prompt in ('tokens', 'text'), "'tokens' or 'text'"),
      ('timeout_seconds', 0 < self.timeout_seconds < math.inf, 'more than 0'),
      ('retries', self.retries >= 0, 'at least 0'),
      ('backoff_seconds', 0 <= self.backoff_seconds < math.inf, 'at least 0'),
      ('max_concurrent', self.max_concurrent >= 1, 'at least 1'),
      (
        'api_key_env',
        not self.api_key_env or re.fullmatch(r'[A-Za-z_]\w*', self.api_key_env) is not None,
        'the name of an environment variable, never the key itself',
      ),
    )
    for name, fine, allowed in checks:
      if not fine:
        # What stands there may be a secret at the wrong place.
        secret = name == 'api_key_env' or (name == 'url' and '@' in self.url)
        given = '(not shown)' if secret else repr(getattr(self, name))
        raise UserError(f'remote: {name}={given}; it must be {allowed}.')
    if self.prompt == 'tokens' and not SERVERS[self.server].tokens:
      raise UserError(f"remote: server={self.server!r} takes text only; set prompt='text'.")


# Fields that change what a model says; the others say where it is and how it is asked.
TEXT_FIELDS = ('model', 'tokenizer', 'server', 'revision', 'prompt')


def check_sampling(config: RemoteConfig, sampling: SamplingConfig) -> None:
  """Checks that the server can be asked for these settings.

  Raises:
    ValueError: for a setting that its API has no field for.
  """
  server = SERVERS[config.server]
  lacking = [
    f'{name}={value!r}'
    for name, value, fine in (
      ('top_k', sampling.top_k, server.top_k),
      ('stop_token_ids', sampling.stop_token_ids, server.stop_token_ids),
    )
    if value and not fine
  ]
  if lacking:
    able = [n for n, s in SERVERS.items() if s.top_k and s.stop_token_ids]
    raise UserError(
      f'remote: {", ".join(lacking)} cannot be asked of server={config.server!r}; leave it out, or '
      f'serve the model with one of {able}.'
    )


class Remote:
  """A served model, for the engine: `submit` a turn, and its completion comes in a future.

  Attributes:
    name: what rows of D_CAI call it.
    fingerprint: hex digest that names it in the journal: of served name, revision, tokenizer, kind
      of server and form of the prompt; not of where it is served.
    tokenizer, eos_token_ids, vocab_size: of the served model.
    max_positions: tokens of a context with its reply.

  Raises:
    ValueError: if the tokenizer cannot be had, or the environment has no key.
  """

  def __init__(self, config: RemoteConfig):
    vocabulary = load_vocabulary(config.tokenizer)
    self.config = config
    self.name = f'{config.model}@{config.revision}' if config.revision else config.model
    self.tokenizer = vocabulary.tokenizer
    # `split_special_tokens` is a state of a fast tokenizer: with two threads in one, a text that
    # spells a control token can become it.
    self._words, self._words_lock = copy.deepcopy(vocabulary.tokenizer), threading.Lock()
    self.eos_token_ids = vocabulary.eos_token_ids
    self.vocab_size = vocabulary.size
    self.max_positions = config.max_positions
    named = [config.model, config.revision, config.server, config.prompt, vocabulary.fingerprint]
    self.fingerprint = hashlib.sha256(json.dumps(['remote', *named]).encode()).hexdigest()
    self._key = _api_key(config)
    self._url = config.url.rstrip('/')
    self._server = SERVERS[config.server]
    self._http = urllib3.PoolManager(maxsize=config.max_concurrent, retries=False, block=False)
    self._queue: queue.SimpleQueue = queue.SimpleQueue()
    self._threads: list[threading.Thread] = []
    self._closed = threading.Event()

  def check(self) -> None:
    """Asks the server what it serves, once.

    Raises:
      ValueError: if it does not answer, does not serve the model, or holds shorter contexts.
    """
    advice = 'is it up, and is the url the base of its API, such as http://localhost:8000/v1?'
    try:
      status, _, data = self._send('GET', '/models', None, min(self.config.timeout_seconds, 30.0))
    except (urllib3.exceptions.HTTPError, OSError) as error:
      raise UserError(
        f'{self._where()} cannot be reached ({self._told(error)}): {advice}'
      ) from None
    if status != 200:
      raise UserError(
        f'{self._where()} answers {status} to GET /models ({self._told(data)}): {advice} '
        'A key is named by api_key_env.'
      )
    try:
      served = {entry['id']: entry.get('max_model_len') for entry in json.loads(data)['data']}
    except (ValueError, KeyError, TypeError, AttributeError):
      raise UserError(
        f'{self._where()} answers GET /models with {self._told(data)}, which is no list of '
        f'models: {advice}'
      ) from None
    if self.config.model not in served:
      raise UserError(f'{self._where()} serves {sorted(served)}, and not {self.config.model!r}.')
    context = served[self.config.model]
    if isinstance(context, int) and context < self.max_positions:
      raise UserError(
        f'{self._where()} holds contexts of {context} tokens; max_positions={self.max_positions} '
        f'must be at most that.'
      )

  def submit(
    self,
    turn: Turn,
    key: np.ndarray,
    stop_token_ids: Sequence[int] = (),
    stop_texts: Sequence[str] = (),
    chain_id: str = '',
  ) -> 'Future[Completion]':
    """A future of the turn's completion.

    Args:
      turn: what to sample; `turn.sampling` states temperature, filters and length.
      key: u32[2], the turn's random key.
      stop_token_ids: all tokens that end the reply.
      stop_texts: all texts that end it.
      chain_id: for error messages.

    The future raises:
      ValueError: if the server refuses the request, or speaks of tokens that the tokenizer does not
        know.
      ConnectionError: if all tries have failed, or the remote was closed meanwhile.
    """
    if self._closed.is_set():
      raise UserError(f'{self._where()}: closed; make another Remote.')
    future: Future[Completion] = Future()
    ask = functools.partial(
      self._ask, turn, key, tuple(stop_token_ids), tuple(stop_texts), chain_id
    )
    self._queue.put((future, ask))
    if len(self._threads) < self.config.max_concurrent:
      # Daemons: a stalled request does not keep the program from ending.
      self._threads.append(threading.Thread(target=self._work, daemon=True))
      self._threads[-1].start()
    return future

  def close(self) -> None:
    """Cancels what was not sent yet; a request on its way is not tried again."""
    self._closed.set()
    for _ in self._threads:
      self._queue.put(None)
    self._http.clear()

  def _work(self) -> None:
    while (item := self._queue.get()) is not None:
      future, ask = item
      if not future.set_running_or_notify_cancel():
        continue
      if self._closed.is_set():
        future.set_exception(ConnectionError(f'{self._where()}: closed before it was asked.'))
        continue
      try:
        future.set_result(ask())
      except BaseException as error:  # whoever asks for the result gets it
        future.set_exception(error)

  def _ask(
    self,
    turn: Turn,
    key: np.ndarray,
    stop_token_ids: tuple[int, ...],
    stop_texts: tuple[str, ...],
    chain_id: str,
  ) -> Completion:
    """The completion of a turn, after as many tries as it takes."""
    who = f'chain {chain_id!r}, turn {turn.name!r}' if chain_id else f'turn {turn.name!r}'
    with self._words_lock:
      body = self._body(turn, key, stop_token_ids, stop_texts, who)
    asked_for, tries = 0.0, self.config.retries + 1
    trouble = ''
    for attempt in range(tries):
      if attempt and self._closed.wait(max(self._backoff(key, attempt), asked_for)):
        break
      asked_for = 0.0
      try:
        timeout = self.config.timeout_seconds
        status, headers, data = self._send('POST', '/completions', body, timeout)
      except (urllib3.exceptions.HTTPError, OSError) as error:
        trouble = self._told(error)
        continue
      if status in RETRIED or status >= 500:
        trouble = f'status {status}: {self._told(data)}'
        asked_for = _retry_after(headers.get('Retry-After'))
        continue
      if status != 200:
        raise UserError(f'{self._where()} refuses {who} with status {status}: {self._told(data)}')
      try:
        answer = _read_answer(data)
      except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        trouble = f'an answer that cannot be read ({error!r}): {self._told(data)}'
        continue
      with self._words_lock:
        return self._completion(answer, turn, stop_token_ids, stop_texts, who)
    if self._closed.is_set():
      raise UnreachableError(f'{self._where()}: closed before {who} was answered.')
    raise UnreachableError(
      f'{self._where()} did not answer {who}, asked {tries} times; in the end it gave '
      f'{trouble}. '
      'What it has answered is in the journal: see to the server, start again, and it goes on. '
      'Where the server is only slow, raise timeout_seconds or retries, or lower max_concurrent.'
    )

  def _body(
    self,
    turn: Turn,
    key: np.ndarray,
    stop_token_ids: tuple[int, ...],
    stop_texts: tuple[str, ...],
    who: str,
  ) -> dict[str, Any]:
    """The request as JSON."""
    server, sampling = self._server, turn.sampling
    body = {
      'model': self.config.model,
      'prompt': turn.context if self.config.prompt == 'tokens' else self._text(turn.context, who),
      'max_tokens': sampling.max_tokens,
      'temperature': sampling.temperature,
      'seed': seed_of(key),
      'n': 1,
      'stream': False,
      **server.neutral,
    }
    if server.tokens or sampling.top_p < 1:  # TGI refuses 1
      body['top_p'] = sampling.top_p
    if sampling.top_k:
      body['top_k'] = sampling.top_k
    if server.logprobs:
      body['logprobs'] = 1
    if server.stop_token_ids and stop_token_ids:
      body['stop_token_ids'] = list(stop_token_ids)
    if stop_texts:  # those that do not fit are found in the text when it is there
      body['stop'] = list(stop_texts[: server.most_stops])
    return body

  def _text(self, context: list[int], who: str) -> str:
    """The text that a server encodes to the context's control tokens and text."""
    whole = self._words.decode(
      context, skip_special_tokens=False, clean_up_tokenization_spaces=False
    )
    bos = self._words.bos_token or ''
    control = set(self._words.all_special_ids) | set(self._words.added_tokens_decoder)
    wanted = [token for token in context if token in control]
    # Servers put the first token of a text themselves where the tokenizer does.
    for text in dict.fromkeys((whole.removeprefix(bos), whole)):
      if [token for token in self._words.encode(text) if token in control] == wanted:
        return text
    raise UserError(
      f'{who}: a text in it spells a control token, and a server that is sent text would take it '
      "for one. Serve the model where prompt='tokens' can be used, or leave the prompt out."
    )

  def _backoff(self, key: np.ndarray, attempt: int) -> float:
    """Seconds before a further try: doubling, with jitter that is a function of the turn."""
    digest = hashlib.blake2b(key.tobytes() + bytes([attempt % 256]), digest_size=4).digest()
    share = int.from_bytes(digest, 'little') / 2**32
    exponent = min(attempt - 1, 32)
    return min(self.config.backoff_seconds * 2**exponent, LONGEST_BACKOFF) * (0.5 + share / 2)

  def _send(
    self, method: str, path: str, body: dict[str, Any] | None, timeout: float
  ) -> tuple[int, Any, bytes]:
    """(status, headers, body) of the response to one request."""
    headers = {'Authorization': f'Bearer {self._key}'} if self._key else {}
    response = self._http.request(
      method,
      self._url + path,
      json=body,
      headers=headers | ({'Content-Type': 'application/json'} if body else {}),
      timeout=urllib3.Timeout(total=timeout),
    )
    return response.status, response.headers, response.data

  def _where(self) -> str:
    return f'remote {self.config.model!r} at {self._url}'

  def _told(self, what: bytes | Exception) -> str:
    """A server's words or an error's, short, on one line, and without the key."""
    if isinstance(what, Exception):
      text = f'{type(what).__name__}: {what}'
    else:
      text = _message(what)
    if self._key:
      text = text.replace(self._key, '(key)')
    text = ' '.join(text.split())
    return text if len(text) <= 300 else f'{text[:300]} ...'

  def _completion(
    self,
    answer: '_Answer',
    turn: Turn,
    stop_token_ids: tuple[int, ...],
    stop_texts: tuple[str, ...],
    who: str,
  ) -> Completion:
    """What the answer says, in the terms of a local model's reply."""
    if answer.tokens is not None:
      tokens, logprobs = self._as_sampled(answer, who)
    else:
      tokens, logprobs = self._encoded(answer, stop_token_ids)
    if self._server.tempered and turn.sampling.temperature != 1:
      logprobs = [math.nan] * len(tokens)
    ends = [place for place, token in enumerate(tokens) if token in stop_token_ids]
    if ends:
      tokens, logprobs = tokens[: ends[0] + 1], logprobs[: ends[0] + 1]
    spoken = tokens[:-1] if ends else tokens
    cut = first_stop_text(self._words, spoken, stop_texts)
    if cut is not None:
      count, text = cut
      return Completion(tokens[:count], text, rounded(logprobs[:count]), 'stop_text')
    text = self._decode(spoken) if answer.tokens is not None else answer.text
    if ends:
      return Completion(tokens, text, rounded(logprobs), 'stop')
    if answer.ended_by == 'length':
      return Completion(tokens, text, rounded(logprobs), 'length')
    if answer.ended_by == 'stop_text' or (answer.ended_by == 'unknown' and stop_texts):
      return Completion(tokens, text, rounded(logprobs), 'stop_text')
    # A token ended it, and the server kept that to itself.
    special = bool(tokens) and tokens[-1] in self._words.all_special_ids
    if stop_token_ids and not special:
      tokens, logprobs = [*tokens, stop_token_ids[0]], [*logprobs, math.nan]
    return Completion(tokens, text, rounded(logprobs), 'stop')

  def _as_sampled(self, answer: '_Answer', who: str) -> tuple[list[int], list[float]]:
    """(tokens, log-probabilities) where the server gives ids.

    Raises:
      ValueError: if the ids do not spell the text: the tokenizer is another's then.
    """
    tokens = list(answer.tokens)
    known = all(0 <= token < self.vocab_size for token in tokens)
    # White space and broken characters are written differently by servers.
    letters = functools.partial(re.sub, '[\\s\ufffd]', '')
    if not known or not letters(self._decode(tokens)).startswith(letters(answer.text)):
      raise UserError(
        f'{self._where()} answers {who} with {answer.text[:80]!r} as tokens {tokens[:12]}, which '
        f'{self.config.tokenizer!r} does not read so: give the tokenizer of the served model.'
      )
    same = len(answer.logprobs) == len(tokens)
    return tokens, answer.logprobs if same else [math.nan] * len(tokens)

  def _encoded(
    self, answer: '_Answer', stop_token_ids: tuple[int, ...]
  ) -> tuple[list[int], list[float]]:
    """(tokens, log-probabilities) of the text encoded anew.

    Log-probabilities are kept where the server's pieces are these very tokens; a further piece that
    is a stop token's spelling is that token.
    """
    tokens = self._words.encode(answer.text, add_special_tokens=False, split_special_tokens=True)
    count = len(tokens)
    if answer.pieces[:count] != [self._decode([token]) for token in tokens]:
      return tokens, [math.nan] * count
    following = answer.pieces[count] if len(answer.pieces) > count else None
    for token in stop_token_ids:
      if following == self._words.convert_ids_to_tokens(token):
        return [*tokens, token], answer.logprobs[: count + 1]
    return tokens, answer.logprobs[:count]

  def _decode(self, tokens: list[int]) -> str:
    return self._words.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def seed_of(key: np.ndarray) -> int:
  """The seed in [1, 2**31) that a request carries, from a turn's key u32[2]."""
  return int(key[0]) % (2**31 - 1) + 1


class _Answer(NamedTuple):
  """What a server said, with nothing made of it yet."""

  text: str
  ended_by: str  # 'length', 'token', 'stop_text', or 'unknown': either of the two
  tokens: list[int] | None  # as sampled, where they were given
  pieces: list[str]  # text of each token, where given
  logprobs: list[float]  # of each token in nats, NaN where it is not given


def _read_answer(data: bytes) -> _Answer:
  """The first choice of a response.

  Raises:
    ValueError, KeyError, TypeError, IndexError, AttributeError: if it is not what the API promises.
  """
  content = json.loads(data)
  choice = content['choices'][0]
  text, finish = choice['text'], choice['finish_reason']
  if not isinstance(text, str):
    raise TypeError(f'text is {text!r}')
  tokens, pieces, logprobs = choice.get('token_ids'), [], []
  given = choice.get('logprobs') or {}
  if 'content' in given:  # llama.cpp, in the form of chats
    pieces = [entry['token'] for entry in given['content']]
    logprobs = [entry['logprob'] for entry in given['content']]
    ids = [entry.get('id') for entry in given['content']]
    # It leaves out tokens that make half a character.
    if (
      ids and None not in ids and len(ids) == (content.get('usage') or {}).get('completion_tokens')
    ):
      tokens = ids
  else:
    pieces = list(given.get('tokens') or ())
    logprobs = list(given.get('token_logprobs') or ())
  if tokens is not None and not all(isinstance(token, int) for token in tokens):
    raise TypeError(f'token_ids are {tokens!r}')
  logprobs = [math.nan if x is None else float(x) for x in logprobs]
  if len(pieces) != len(logprobs):
    raise UserError(f'{len(pieces)} tokens have {len(logprobs)} logprobs')
  return _Answer(text, _ended_by(choice, finish), tokens, pieces, logprobs)


def _ended_by(choice: dict[str, Any], finish: str) -> str:
  """What ended a reply: vLLM says it as stop_reason (None is eos), SGLang as matched_stop."""
  named = {'length': 'length', 'eos_token': 'token', 'stop_sequence': 'stop_text'}
  if finish in named:
    return named[finish]
  if finish != 'stop':
    raise UserError(f'finish_reason is {finish!r}')
  for name in ('stop_reason', 'matched_stop'):
    if name in choice:
      return 'stop_text' if isinstance(choice[name], str) else 'token'
  return 'unknown'


def _retry_after(value: str | None) -> float:
  """Seconds that a Retry-After header asks for: a number, or a date (RFC 9110, 10.2.3)."""
  if value is None:
    return 0.0
  if re.fullmatch(r'\d+(\.\d+)?', value.strip()):
    return float(value)
  try:
    return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
  except (ValueError, TypeError):
    return 0.0


def _message(data: bytes) -> str:
  """A server's own words in the body of a response: the API's error message, or the body."""
  text = data.decode('utf-8', 'replace')
  try:
    content = json.loads(text)
    error = content.get('error', content) if isinstance(content, dict) else content
    said = error.get('message') if isinstance(error, dict) else error
  except ValueError:
    said = None
  return said if isinstance(said, str) and said else text or '(an empty body)'


def _api_key(config: RemoteConfig) -> str:
  if not config.api_key_env:
    return ''
  key = os.environ.get(config.api_key_env, '')
  if not key:
    raise UserError(
      f'remote: the environment has no variable {config.api_key_env}, which api_key_env names as '
      'holding the API key; export it.'
    )
  return key
