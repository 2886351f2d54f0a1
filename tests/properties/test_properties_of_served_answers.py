"""Any bytes from a server give a completion that its request allows, or a UserError.

`BODIES` are bodies of answers with status 200. `RESPONSES` are whole responses as they arrive on a
socket, with status line and headers; the connection ends after them.
"""

import contextlib
import dataclasses
import functools
import json
import math
import os
import socketserver
import threading

import numpy as np
from harness import Fault, Reader, check_reader

KEY = 'sk-0123456789-abcdefghij'
CONTEXT, MAX_TOKENS, STOP_TEXT = [30, 31, 32], 24, '\n\nHuman:'


def make_remote(url):
  """Return a Remote that asks once."""
  from cai_jax.sampling.remote import Remote, RemoteConfig

  os.environ['CAI_JAX_PROPERTY_KEY'] = KEY
  config = RemoteConfig(
    url=url,
    model='served',
    tokenizer=folder(),
    server='vllm',
    max_positions=1024,
    retries=0,
    timeout_seconds=2.0,
    max_concurrent=1,
    api_key_env='CAI_JAX_PROPERTY_KEY',
  )
  return Remote(config)


def folder():
  from cai_jax.tiny.files import MODELS

  return str(MODELS['tiny'])


@functools.cache
def tokenizer():
  import transformers

  return transformers.PreTrainedTokenizerFast.from_pretrained(folder())


def ask(remote):
  from cai_jax.sampling.types import SamplingConfig, Turn

  turn = Turn('initial', CONTEXT, SamplingConfig(max_tokens=MAX_TOKENS))
  stops = (tokenizer().eos_token_id,), (STOP_TEXT,)
  return remote.submit(turn, np.array([5, 2], np.uint32), *stops).result(timeout=60)


class Body:
  """A transport that answers every request with the same body."""

  def __init__(self, data):
    self._data = data

  def send(self, *_):
    from cai_jax.sampling.remote.transport import Response

    return Response(200, {}, self._data)

  def close(self):
    pass


def read(path):
  """Return the bytes of a file; a server without one sends nothing."""
  return path.read_bytes() if path.exists() else b''


def read_body(path):
  with contextlib.closing(make_remote('http://localhost/v1')) as remote:
    remote._connection._transport = Body(read(path / 'answer.json'))
    return ask(remote)


@functools.cache
def listener():
  """Return a server whose attribute `response` is sent to every client."""

  class Handler(socketserver.StreamRequestHandler):
    def handle(self):
      with contextlib.suppress(OSError):
        while self.rfile.readline().strip():
          pass
        self.wfile.write(self.server.response)

  server = socketserver.ThreadingTCPServer(('127.0.0.1', 0), Handler)
  threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
  return server


def read_response(path):
  listener().response = read(path / 'response.http')
  url = f'http://127.0.0.1:{listener().server_address[1]}/v1'
  with contextlib.closing(make_remote(url)) as remote:
    return ask(remote)


def check_body(files, completion):
  check_completion(files['answer.json'], completion)


def check_response(files, completion):
  head, _, body = files['response.http'].replace(b'\r\n', b'\n').partition(b'\n\n')
  assert b' 200' in head.split(b'\n')[0] or b'content_filter' in body
  ids, logprobs, reason = completion.tokens, completion.logprobs, completion.finish_reason
  check_values(ids, logprobs, reason, completion.text)


def check_values(ids, logprobs, reason, text):
  """Check what must hold of every completion."""
  assert len(ids) == len(logprobs) <= MAX_TOKENS * 5 // 4 + 17
  assert all(type(token) is int and 0 <= token < len(tokenizer()) for token in ids)
  assert all(math.isnan(x) or -math.inf < x <= 1e-3 for x in logprobs)
  assert reason in ('stop', 'stop_text', 'length', 'content_filter')
  assert type(text) is str and STOP_TEXT not in text and text.encode().decode() == text
  assert reason != 'content_filter' or not ids and not text


def check_completion(data, completion):
  """Check a completion against the body that it was read from."""
  ids, reason = completion.tokens, completion.finish_reason
  check_values(ids, completion.logprobs, reason, completion.text)

  def refuse(name):
    raise AssertionError(f'{name} was read as a number')

  content = json.loads(data, parse_constant=refuse)
  [choice] = content['choices']
  assert (reason == 'content_filter') == (choice['finish_reason'] == 'content_filter')
  usage = content.get('usage') or {}
  assert usage.get('prompt_tokens') in (None, len(CONTEXT))
  if reason == 'content_filter':
    return
  sampled, returned = usage.get('completion_tokens'), choice.get('token_ids')
  assert sampled is None or 0 <= sampled <= MAX_TOKENS
  assert choice.get('prompt_token_ids') in (None, CONTEXT)
  if returned is None:
    # Without ids, the text is encoded again, and the token that ended the reply is appended.
    assert completion.text == choice['text'].partition(STOP_TEXT)[0]
    return
  assert sampled in (None, len(returned)) and len(returned) <= MAX_TOKENS
  assert ids == returned[: len(ids)]
  assert reason in ('stop', 'stop_text') or (reason == 'length' and len(ids) == MAX_TOKENS)
  values = (choice.get('logprobs') or {}).get('token_logprobs')
  assert not values or len(values) == len(returned)


def check_refusal(files, message):
  assert "remote 'served' at http://" in message
  assert not any(KEY[i : i + 8] in message for i in range(len(KEY) - 8))


def choice_of(words, end, stop_reason=None, more=''):
  """Return a choice as vLLM gives it: text, the end, and ids with log-probabilities."""
  tokens = tokenizer().encode(words + more, add_special_tokens=False)
  if end == 'stop' and not more:
    tokens = [*tokens, tokenizer().eos_token_id]
  record = {'tokens': [''] * len(tokens), 'token_logprobs': [-0.5] * len(tokens)}
  return {
    'index': 0,
    'text': words,
    'finish_reason': end,
    'stop_reason': stop_reason,
    'token_ids': tokens,
    'prompt_token_ids': CONTEXT,
    'logprobs': record,
  }


def answer_of(choice, usage=True):
  tokens = choice.get('token_ids')
  counts = {'prompt_tokens': len(CONTEXT)} | ({'completion_tokens': len(tokens)} if tokens else {})
  content = {'id': 'cmpl-1', 'choices': [choice]} | ({'usage': counts} if usage else {})
  return json.dumps(content).encode()


def answers():
  """Return valid bodies, of each kind of end and each kind of record."""
  whole = choice_of('look', 'stop')
  long = choice_of('look at the', 'length')
  long['token_ids'] = (long['token_ids'] * MAX_TOKENS)[:MAX_TOKENS]
  long['text'] = tokenizer().decode(long['token_ids'])
  long['logprobs'] = None
  entries = [
    {'id': token, 'token': '', 'logprob': -1.5, 'top_logprobs': []} for token in whole['token_ids']
  ]
  chat = {k: whole[k] for k in ('index', 'text', 'finish_reason')} | {
    'logprobs': {'content': entries}
  }
  return [
    answer_of(whole),
    answer_of(long),
    answer_of(choice_of('kind words', 'stop', STOP_TEXT, STOP_TEXT + ' Hi')),
    answer_of(chat),
    answer_of({'text': 'look at the', 'finish_reason': 'eos_token'}, usage=False),
    answer_of({'text': 'look', 'finish_reason': 'content_filter'}),
  ]


def short_answers():
  """Return valid bodies with few values, so that mutations often hit counts and logprobs."""
  tokens = tokenizer().encode('look', add_special_tokens=False)
  text = {'text': 'look', 'finish_reason': 'eos_token'}
  pieces = [tokenizer().decode([token]) for token in tokens]
  record = {'tokens': pieces, 'token_logprobs': [-0.5] * len(tokens)}
  usage = {'prompt_tokens': len(CONTEXT), 'completion_tokens': len(tokens) + 1}
  return [
    json.dumps({'choices': [text], 'usage': usage}).encode(),
    json.dumps({'choices': [text | {'logprobs': record}]}).encode(),
  ]


def response_of(body, *headers, status=b'200 OK'):
  length = b'Content-Length: %d' % len(body)
  return b'\r\n'.join([b'HTTP/1.1 ' + status, *headers, length, b'', body])


def responses():
  whole, *_, filtered = answers()
  chunked = b'HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n'
  half = len(whole) // 2
  for part in (whole[:half], whole[half:], b''):
    chunked += b'%x\r\n' % len(part) + part + b'\r\n'
  refusal = json.dumps({'error': {'message': 'no', 'code': 'content_filter'}}).encode()
  return [
    response_of(whole, b'Content-Type: application/json', b'Server: uvicorn'),
    response_of(filtered, b'Connection: close'),
    chunked,
    b'HTTP/1.0 200 OK\r\n\r\n' + whole,
    response_of(refusal, b'Retry-After: 5', status=b'400 Bad Request'),
  ]


FRAGMENTS = [
  b'HTTP/1.1 301 Moved\r\nLocation: http://elsewhere/\r\n', b'Content-Encoding: gzip\r\n', b'500',
  b'Content-Length: -1\r\n', b'Content-Length: 99999999999\r\n', b'HTTP/1.1 100 Continue\r\n\r\n',
  b'Transfer-Encoding: chunked\r\n', b'Retry-After: 86400\r\n', b'A: b\r\n' * 200, KEY.encode(),
  b'"finish_reason": "tool_calls", ', b'\r\n\r\n', b'a' * 100_000, b'ffffffff\r\n', b'429', b'0',
]  # fmt: skip

BODIES = Reader(
  inputs=[{'answer.json': data} for data in answers()],
  read=read_body,
  check=check_body,
  check_refusal=check_refusal,
  fragments=[KEY.encode(), b'"choices": [], ', b'-0.5, ', b'"logprobs": null, '],
  names_file=False,
)
SHORT = dataclasses.replace(BODIES, inputs=[{'answer.json': data} for data in short_answers()])
RESPONSES = Reader(
  inputs=[{'response.http': data} for data in responses()],
  read=read_response,
  check=check_response,
  check_refusal=check_refusal,
  fragments=FRAGMENTS,
  names_file=False,
)

ANSWERS, FIELDS = 'cai_jax.sampling.remote.answers', 'cai_jax.sampling.remote.fields'
FAULTS = [
  Fault(f'{__name__}:BODIES', FIELDS, '(ValueError, RecursionError)', 'ValueError'),
  Fault(f'{__name__}:BODIES', ANSWERS, 'if len(choices) > 1:', 'if len(choices) > 9:'),
  Fault(f'{__name__}:BODIES', FIELDS, 'except UnicodeEncodeError:', 'except ZeroDivisionError:'),
  Fault(f'{__name__}:BODIES', ANSWERS, 'if sampled not in (None, count):', 'if sampled == 0:'),
  Fault(f'{__name__}:SHORT', ANSWERS, 'or read not in (None, sent)', 'or read == 0'),
  Fault(
    f'{__name__}:RESPONSES',
    'cai_jax.sampling.remote.transport',
    '(http.client.HTTPException, OSError)',
    '(OSError,)',
  ),
]  # fmt: skip


def test_bodies_of_answers():
  check_reader(f'{__name__}:BODIES')


def test_short_bodies_of_answers():
  check_reader(f'{__name__}:SHORT')


def test_responses():
  check_reader(f'{__name__}:RESPONSES')
