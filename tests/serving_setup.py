"""A server of the embedded model, and requests, that the tests of the server share."""

import contextlib
import http.client
import json
import threading
import time

import jax
import pytest

import cai_jax
from cai_jax.runtime.mesh import make_mesh
from cai_jax.sampling.types import SamplingConfig, Turn
from cai_jax.serving import command
from cai_jax.serving.api import Api
from cai_jax.serving.server import Server
from cai_jax.serving.worker import Worker
from cai_jax.tiny.files import MODELS

LENGTH = 192


BLOCKED = {'4': -100}  # the end of a turn, so that no reply ends early


LONG = SamplingConfig(temperature=0, max_tokens=150, logit_bias=((4, -100.0),))


QUESTION = [{'role': 'user', 'content': 'tell me a story'}]


def one_device(**sizes):
  return make_mesh(1, devices=jax.devices()[:1])


@pytest.fixture(scope='module')
def lm():
  return cai_jax.load(MODELS['tiny-small'], mesh=one_device())


def sample(lm, context, sampling):
  """Return what the engine samples, with the sizes of the server."""

  def chain():
    return (yield Turn('reply', context, sampling))

  (result,) = command.make_engine(lm, LENGTH, 4).run([('chain', chain())])
  return result[1]


@contextlib.contextmanager
def running(lm, token=''):
  """A server of a model at a free port, with its worker in a thread."""
  over = threading.Event()
  with Server('127.0.0.1', 0, token) as server:
    worker = Worker(lm, command.make_engine(lm, LENGTH, 4))
    server.api = Api(worker, 'small', command.make_dialogue(lm, 'chat'))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    thread = threading.Thread(target=worker.run, args=(over.is_set,), daemon=True)
    thread.start()
    try:
      yield server
    finally:
      over.set()
      thread.join()
      server.shutdown()


@pytest.fixture(scope='module')
def server(lm):
  with running(lm) as running_server:
    yield running_server


def wait_until(condition):
  end = time.monotonic() + 60
  while not condition():
    assert time.monotonic() < end
    time.sleep(0.001)


def send(server, method, path, body=None, headers=()):
  """Send a request and return the status and the body of the answer."""
  connection = http.client.HTTPConnection(*server.server_address[:2], timeout=120)
  data = body if body is None or isinstance(body, bytes) else json.dumps(body)
  connection.request(method, path, data, dict(headers))
  answer = connection.getresponse()
  content = json.loads(answer.read())
  connection.close()
  return answer.status, content


def complete(server, **fields):
  status, answer = send(server, 'POST', '/v1/completions', {'model': 'small'} | fields)
  assert status == 200, answer
  return answer['choices']


def chat(server, **fields):
  status, answer = send(server, 'POST', '/v1/chat/completions', {'model': 'small'} | fields)
  assert status == 200, answer
  return answer['choices']


def read_as_lm_eval(choice, context_length):
  """What lm-eval 0.4.13 makes of a choice: `LocalCompletionsAPI.parse_logprobs`."""
  logprobs = choice['logprobs']['token_logprobs'][context_length:-1]
  tops = choice['logprobs']['top_logprobs'][context_length:-1]
  is_greedy = all(value == max(top.values()) for value, top in zip(logprobs, tops, strict=True))
  return sum(logprobs), is_greedy
