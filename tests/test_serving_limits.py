"""The server under load: who may ask, how much, and how requests take turns and end."""

import contextlib
import dataclasses
import http.client
import json
import os
import signal
import socket
import threading
import time

import jax
import numpy as np
import pytest

from cai_jax.runtime import interruption
from cai_jax.runtime.errors import UserError
from cai_jax.runtime.interruption import Interrupted
from cai_jax.sampling.types import Turn
from cai_jax.scoring.positions import Scored
from cai_jax.serving import command, waiting
from cai_jax.serving import server as serving
from cai_jax.serving import worker as working
from cai_jax.serving.api import Api
from cai_jax.serving.server import Server
from cai_jax.serving.worker import Worker
from cai_jax.tiny.files import MODELS
from tests.serving_setup import (
  BLOCKED,
  LENGTH,
  LONG,
  QUESTION,
  one_device,
  running,
  sample,
  send,
  wait_until,
)
from tests.serving_setup import lm as lm
from tests.serving_setup import server as server


def test_a_token_is_required(lm, server, monkeypatch):
  monkeypatch.setattr(server, 'token', 'a-long-secret')
  models = 'GET', '/v1/models', None
  assert send(server, *models)[0] == 401
  assert send(server, *models, {'Authorization': 'Bearer wrong'}.items())[0] == 401
  status, answer = send(server, *models, {'Authorization': 'Bearer a-long-secret'}.items())
  assert status == 200 and answer['data'][0]['max_model_len'] == LENGTH
  config = command.ServingConfig('tiny', host='0.0.0.0')
  with pytest.raises(UserError, match='need a token'):
    command.read_token(config)
  monkeypatch.setenv('CAI_JAX_TEST_TOKEN', 'short')
  config = command.ServingConfig('tiny', token_env='CAI_JAX_TEST_TOKEN')
  with pytest.raises(UserError, match='CAI_JAX_TEST_TOKEN, which must hold') as caught:
    command.read_token(config)
  assert 'short' not in str(caught.value)


def test_too_many_requests_come_back_later(server, monkeypatch):
  monkeypatch.setattr(serving, 'MOST_REQUESTS', 0)
  status, answer = send(server, 'GET', '/v1/models')
  assert status == 429 and answer['error']['code'] == 'rate_limit_exceeded'


def test_connections_are_limited_and_must_log_in(lm, monkeypatch):
  with running(lm) as server:
    kept = http.client.HTTPConnection(*server.server_address[:2], timeout=60)

    def ask():
      kept.request('GET', '/health')
      return json.loads(kept.getresponse().read())

    assert ask() == {'status': 'ok'}
    monkeypatch.setattr(serving, 'MOST_CONNECTIONS', 1)
    with pytest.raises(ConnectionError):
      send(server, 'GET', '/health')
    monkeypatch.setattr(serving, 'MOST_CONNECTIONS', 2)
    monkeypatch.setattr(serving, 'LOGIN_SECONDS', 0)
    with socket.create_connection(server.server_address[:2], timeout=60) as slow:
      slow.sendall(b'GET /health HTTP/1.1\r\n')
      with contextlib.suppress(ConnectionResetError):
        assert slow.recv(1) == b''
    assert ask() == {'status': 'ok'}
    kept.close()


@pytest.mark.parametrize(
  ('path', 'fields'),
  [
    ('completions', {'prompt': [[5]] * 3}),
    ('completions', {'prompt': [[5]] * 3, 'echo': True, 'logprobs': 1, 'max_tokens': 0}),
    ('chat/completions', {'messages': QUESTION}),
  ],
)
def test_a_client_that_hangs_up_takes_no_time(lm, monkeypatch, path, fields):
  monkeypatch.setattr(waiting, 'POLL_SECONDS', 0.01)
  monkeypatch.setattr(working, 'score_tokens', lambda *_: pytest.fail('scores for nobody'))
  engine = command.make_engine(lm, LENGTH, 4)
  worker = Worker(lm, engine)
  with Server('127.0.0.1', 0) as server:
    server.api = Api(worker, 'small', command.make_dialogue(lm, 'chat'))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    connection = http.client.HTTPConnection(*server.server_address[:2], timeout=60)
    connection.request('POST', f'/v1/{path}', json.dumps({'model': 'small'} | fields))
    wait_until(lambda: worker._turns or worker._rows)
    time.sleep(0.05)  # some looks at a client that waits
    assert not server.is_idle
    connection.close()
    wait_until(lambda: server.is_idle)
    worker.run(lambda: True)
    server.shutdown()
  assert engine.stats.turns == engine.stats.decode_steps == 0


def test_a_cancelled_reply_ends_and_the_others_go_on(lm, monkeypatch):
  engine = command.make_engine(lm, LENGTH, 4)
  worker = Worker(lm, engine)
  short = dataclasses.replace(LONG, max_tokens=60)
  long, never = [worker.sample(name, Turn('reply', [5, 6, 7], LONG)) for name in 'ab']
  other = worker.sample('c', Turn('reply', [5, 6, 7], short))
  assert never.cancel()
  sampled = []

  def score(lm, rows, alternatives):
    sampled.append(engine.stats.decode_steps)
    if sampled[-1]:  # the reply has begun
      long.cancel()
    else:
      worker.score([5], 1)
    return [Scored(*np.zeros((3, 1)))]

  monkeypatch.setattr(working, 'score_tokens', score)
  worker.score([5], 1)
  worker.run(lambda: True)
  assert long.cancelled() and 0 < sampled[-1] < engine.stats.decode_steps < 100
  assert other.result().tokens == sample(lm, [5, 6, 7], short).tokens
  assert engine.stats.turns == 1


def test_rows_that_never_end_and_replies_take_turns(lm, monkeypatch):
  worker = Worker(lm, command.make_engine(lm, LENGTH, 4))
  short = dataclasses.replace(LONG, max_tokens=12)
  contexts = [[5, 6, 7, token] for token in range(5, 10)]  # one more than slots
  replies = [worker.sample(str(c), Turn('reply', c, short)) for c in contexts]
  waited = []

  def score(lm, rows, alternatives):
    waited.append(not any(reply.done() for reply in replies))
    if len(waited) < 500:
      worker.score([5], 1)
    return [Scored(*np.zeros((3, 1)))]

  monkeypatch.setattr(working, 'score_tokens', score)
  worker.score([5], 1)
  worker.run(lambda: True)
  assert 1 <= sum(waited) <= 12  # one batch before each burst, also while no slot is free
  for context, reply in zip(contexts, replies, strict=True):
    assert reply.result().tokens == sample(lm, context, short).tokens


def test_a_batch_of_rows_is_limited(lm, monkeypatch):
  batches = []

  def score(lm, rows, alternatives):
    batches.append([len(row) for row in rows])
    return [Scored(*np.zeros((3, 1)))] * len(rows)

  monkeypatch.setattr(working, 'score_tokens', score)
  worker = Worker(lm, command.make_engine(lm, LENGTH, 4))
  sizes = [8000, 192, 1, 9000, *[1] * 70]
  futures = [worker.score([5] * size, 1) for size in sizes]
  futures[2].cancel()
  worker.run(lambda: True)
  assert batches == [[8000, 192], [9000], [1] * 64, [1] * 6]
  assert all(future.done() for future in futures)


def test_a_broken_model_fails_requests_and_not_the_server(lm):
  broken = dataclasses.replace(lm, params=jax.tree.map(lambda x: x * np.nan, lm.params))
  with running(broken) as server:
    for fields in ({'max_tokens': 2}, {'max_tokens': 1, 'echo': True, 'logprobs': 1}):
      body = {'model': 'small', 'prompt': 'what', 'temperature': 0} | fields
      status, answer = send(server, 'POST', '/v1/completions', body)
      assert status == 500 and 'logits' in answer['error']['message']
      assert answer['error']['type'] == 'server_error'
    assert send(server, 'GET', '/health')[0] == 200


def test_the_first_signal_lets_requests_end(monkeypatch):
  monkeypatch.setattr(command, 'make_mesh', one_device)
  answers = {}

  def client(server):
    def ask():
      body = {'model': 'x', 'prompt': 'what', 'max_tokens': 100, 'temperature': 0}
      answers['asked'] = send(server, 'POST', '/v1/completions', body | {'logit_bias': BLOCKED})

    def stop():
      while server.is_idle:
        time.sleep(0.001)
      os.kill(os.getpid(), signal.SIGTERM)
      while not server.is_closing():
        time.sleep(0.001)
      answers['late'] = send(server, 'GET', '/health')

    for target in (ask, stop):
      threading.Thread(target=target, daemon=True).start()

  config = command.ServingConfig(str(MODELS['tiny-small']), 'x', port=0, length=LENGTH, slots=4)
  with pytest.raises(Interrupted, match='All requests are answered'), interruption.listen():
    command.serve(config, client)
  status, answer = answers['asked']
  assert status == 200 and answer['usage']['completion_tokens'] == 100
  assert answers['late'][0] == 503
