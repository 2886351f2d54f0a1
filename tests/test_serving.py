"""The server against the engine and the scorer in this process, and what it refuses."""

import concurrent.futures
import copy
import dataclasses

import numpy as np
import pytest
from tokenizers.processors import TemplateProcessing

from cai_jax.runtime.errors import UserError
from cai_jax.sampling.remote import Remote, RemoteConfig
from cai_jax.sampling.types import SamplingConfig, Turn
from cai_jax.scoring import likelihood
from cai_jax.serving import api, command
from cai_jax.tiny.files import MODELS
from tests.serving_setup import (
  LENGTH,
  QUESTION,
  chat,
  complete,
  read_as_lm_eval,
  running,
  sample,
  send,
)
from tests.serving_setup import lm as lm
from tests.serving_setup import server as server


def test_lm_evals_requests_give_our_log_likelihoods(server, lm):
  # As lm-eval 0.4.13 sends them, with its tokenizer from here: tokenizer_backend=remote.
  status, info = send(server, 'GET', '/tokenizer_info')
  assert status == 200 and info['eos_token'] == lm.tokenizer.eos_token and info['chat_template']
  texts = ['what is doing', 'what is doing well', lm.tokenizer.eos_token]
  bodies = [{'prompt': text, 'add_special_tokens': False} for text in texts]
  answers = [send(server, 'POST', '/tokenize', body)[1] for body in bodies]
  context, whole, eos = (answer['tokens'] for answer in answers)
  assert eos == [lm.tokenizer.eos_token_id] and whole == lm.tokenizer.encode(texts[1])
  greedy = sample(lm, context, SamplingConfig(temperature=0, max_tokens=3)).tokens
  prompts = [whole, context + greedy]
  body = {'model': 'small', 'prompt': prompts, 'temperature': 0, 'max_tokens': 1}
  body |= {'logprobs': 1, 'seed': 1234, 'echo': True}
  status, answer = send(
    server, 'POST', '/v1/completions', body, {'Authorization': 'Bearer '}.items()
  )
  assert status == 200
  continuations = [prompt[len(context) :] for prompt in prompts]
  expected = likelihood.log_likelihoods(lm, [context] * 2, continuations)
  read = [read_as_lm_eval(choice, len(context)) for choice in answer['choices']]
  assert [value for value, _ in read] == pytest.approx(expected, abs=1e-4)
  assert [flag for _, flag in read] == [False, True]
  assert answer['usage']['completion_tokens'] == 2


@pytest.mark.parametrize('max_tokens', [0, 2])
def test_echoed_log_probabilities_do_not_depend_on_the_reply(server, max_tokens):
  fields = dict(prompt=[[5, 6, 7]], echo=True, logprobs=1, temperature=0)
  (one,) = complete(server, **fields, max_tokens=1)
  (other,) = complete(server, **fields, max_tokens=max_tokens)
  assert one['logprobs']['token_logprobs'][0] is None
  np.testing.assert_allclose(
    one['logprobs']['token_logprobs'][1:3], other['logprobs']['token_logprobs'][1:3], atol=1e-5
  )
  assert len(other['logprobs']['tokens']) == 3 + max_tokens
  assert one['text'][:3] == other['text'][:3] and len(other['text']) >= 3


def test_generations_are_those_of_the_engine(server, lm):
  context = lm.tokenizer.encode('what is')
  sampling = SamplingConfig(temperature=0, max_tokens=12, stop=('.',))
  expected = sample(lm, context, sampling)
  # lm-eval's request for a generation.
  (choice,) = complete(
    server, prompt=[context], max_tokens=12, temperature=0, stop=['.', '<|end|>'], seed=1234
  )
  assert choice['text'] == expected.text
  dialogue = command.make_dialogue(lm, 'chat')
  sampling = SamplingConfig(temperature=0, max_tokens=24, stop_token_ids=dialogue.stop_token_ids)
  answer = sample(lm, dialogue.prompt(QUESTION), sampling)
  (choice,) = chat(server, messages=QUESTION, temperature=0, max_tokens=24, logprobs=True)
  assert choice['message'] == {'role': 'assistant', 'content': answer.text.strip()}
  given = [entry['logprob'] for entry in choice['logprobs']['content']]
  assert given == pytest.approx(answer.logprobs, abs=1e-4)


def test_a_seed_gives_the_same_texts_alone_and_in_company(server):
  def ask(seed):
    return [c['text'] for c in complete(server, prompt='what is', max_tokens=16, n=2, seed=seed)]

  alone = ask(7)
  with concurrent.futures.ThreadPoolExecutor(6) as pool:
    together = list(pool.map(ask, [1, 2, 7, 3, 7, 4]))
  assert together[2] == together[4] == alone
  assert alone[0] != alone[1] and together[0] != together[1]


def test_without_a_seed_texts_differ(server):
  request = dict(prompt='what is', max_tokens=16, temperature=1.5)
  texts = {complete(server, **request)[0]['text'] for _ in range(6)}
  assert len(texts) > 1


def test_our_client_samples_through_our_server(server, lm):
  remote = Remote(
    RemoteConfig(server.url, 'small', str(MODELS['tiny-small']), 'vllm', max_positions=LENGTH)
  )
  context = lm.tokenizer.encode('what is')
  stop_ids = (lm.tokenizer.eos_token_id,)
  sampling = SamplingConfig(temperature=0, max_tokens=16, stop=('the',), top_p=0.9)
  remote.check([Turn('initial', context, sampling)], (stop_ids, ()))
  future = remote.submit(
    Turn('initial', context, sampling), np.array([1, 2], np.uint32), stop_ids, (), 'chain'
  )
  expected = sample(lm, context, dataclasses.replace(sampling, stop_token_ids=stop_ids))
  answer = future.result()
  assert answer.tokens == expected.tokens and answer.text == expected.text
  assert answer.finish_reason == expected.finish_reason
  assert answer.logprobs == pytest.approx(expected.logprobs, abs=1e-4)


@pytest.mark.parametrize(
  ('fields', 'status', 'message'),
  [
    ({'prompt': 'a', 'model': 'other'}, 404, "no model .*'small'"),
    ({'prompt': 'a', 'stream': True}, 400, 'stream=true is not supported'),
    ({'prompt': 'a', 'guided_regex': 'x'}, 400, 'guided_regex.* is not known'),
    ({'prompt': 'a', 'best_of': 3}, 400, 'best_of=3 is not supported'),
    ({'prompt': []}, 400, 'prompt is'),
    ({'prompt': ''}, 400, 'empty'),
    ({'prompt': [[1, 10**6]]}, 400, 'vocabulary'),
    ({'prompt': '<|end|>'}, 400, 'control token'),
    ({'prompt': 'a', 'max_tokens': LENGTH}, 400, f'context of {LENGTH} tokens'),
    ({'prompt': 'a', 'max_tokens': 0}, 400, 'at least 1'),
    ({'prompt': 'a', 'max_tokens': True}, 400, 'integer'),
    ({'prompt': 'a', 'temperature': 'hot'}, 400, 'temperature'),
    ({'prompt': 'a', 'top_p': 0}, 400, 'top_p'),
    ({'prompt': 'a', 'logprobs': 21}, 400, 'from 0 to 20'),
    ({'prompt': 'a', 'stop': ['']}, 400, 'stop'),
    ({'prompt': 'a', 'n': 0}, 400, 'from 1 to 128'),
    ({'prompt': 'a', 'logit_bias': {'x': 1}}, 400, 'logit_bias'),
    ({'prompt': 'a', 'logit_bias': {'1000000': 1}}, 400, 'logit_bias'),
    ({'prompt': 'a', 'stop_token_ids': list(range(16))}, 400, 'stop_token_ids'),
    ({'messages': QUESTION}, 400, '"messages" is not known'),
    ({'prompt': [[5] * 100] * 999, 'echo': True, 'logprobs': 20}, 400, r'(?s)2433564.*1048576'),
  ],
)
def test_wrong_completions_are_refused(server, fields, status, message):
  given, answer = send(server, 'POST', '/v1/completions', {'model': 'small'} | fields)
  assert given == status and answer['error'].keys() == {'message', 'type', 'param', 'code'}
  assert answer['error']['type'] == 'invalid_request_error'
  with pytest.raises(UserError, match=message):
    raise UserError(answer['error']['message'])


@pytest.mark.parametrize(
  ('fields', 'message'),
  [
    ({'messages': []}, 'at least one message'),
    ({'messages': [{'role': 'tool', 'content': 'x'}]}, 'role "tool"'),
    ({'messages': [{'role': 'user', 'content': [{'type': 'image_url'}]}]}, 'Images'),
    ({'messages': [*QUESTION, {'role': 'assistant', 'content': 'x'}]}, 'must end with a request'),
    ({'messages': QUESTION, 'tools': [{'type': 'function'}]}, 'tools'),
    ({'messages': QUESTION, 'top_logprobs': 2}, 'needs "logprobs"'),
    ({'messages': QUESTION, 'max_tokens': 1, 'max_completion_tokens': 2}, 'differ'),
  ],
)
def test_wrong_chats_are_refused(server, fields, message):
  status, answer = send(server, 'POST', '/v1/chat/completions', {'model': 'small'} | fields)
  assert status == 400 and message in answer['error']['message']


def test_an_answer_may_have_so_many_tokens_and_alternatives(server, monkeypatch):
  fields = dict(prompt=[[5, 6, 7]] * 2, max_tokens=2, logprobs=1, echo=True, temperature=0)
  monkeypatch.setattr(api, 'MOST_ENTRIES', 2 * (3 + 2) * (1 + 1))
  assert [len(c['logprobs']['tokens']) for c in complete(server, **fields)] == [5, 5]
  monkeypatch.setattr(api, 'MOST_ENTRIES', 2 * (3 + 2) * (1 + 1) - 1)
  status, answer = send(server, 'POST', '/v1/completions', {'model': 'small'} | fields)
  assert status == 400 and 'may have 20 tokens' in answer['error']['message']
  # Without max_tokens, a reply may fill the context.
  body = {'model': 'small', 'messages': QUESTION, 'n': 2}
  assert send(server, 'POST', '/v1/chat/completions', body)[0] == 400


def test_what_the_tokenizer_appends_does_not_end_a_prompt(lm, server):
  appends = copy.deepcopy(lm.tokenizer)
  eos = appends.eos_token, appends.eos_token_id
  appends.backend_tokenizer.post_processor = TemplateProcessing(
    single=f'$A {eos[0]}', special_tokens=[eos]
  )
  assert appends.encode('what is')[-1] == eos[1]
  fields = dict(prompt='what is', max_tokens=6, temperature=0, return_token_ids=True)
  with running(dataclasses.replace(lm, tokenizer=appends)) as other:
    (choice,) = complete(other, **fields)
  assert choice['prompt_token_ids'] == likelihood.encode_text(lm.tokenizer, 'what is')
  assert [choice] == complete(server, **fields)


def test_contents_of_several_parts_and_aliases_are_read(server):
  parts = [{'type': 'text', 'text': 'tell me'}, {'type': 'text', 'text': ' a story'}]
  fields = dict(temperature=0, user='me', tools=[], seed=None)
  one = chat(server, messages=QUESTION, max_tokens=8, **fields)
  messages = [{'role': 'user', 'content': parts}]
  assert chat(server, messages=messages, max_completion_tokens=8, **fields) == one


@pytest.mark.parametrize(
  ('method', 'path', 'body', 'headers', 'status'),
  [
    ('GET', '/v1/engines', None, {}, 404),
    ('GET', '/v1/completions', None, {}, 405),
    ('POST', '/v1/completions', b'{', {}, 400),
    ('POST', '/v1/completions', b'[1]', {}, 400),
    ('POST', '/v1/completions', b'{"n": NaN}', {}, 400),
    ('POST', '/v1/completions', b'[' * 10_000, {}, 400),
    ('POST', '/v1/completions', b'', {'Content-Length': str(2**40)}, 413),
    ('POST', '/v1/completions', b'', {'Content-Length': 'x'}, 411),
    ('GET', '/v1/models', None, {'Origin': 'https://example.com'}, 403),
    ('GET', '/v1/models', None, {'Host': 'example.com:8000'}, 403),
    ('GET', '/v1/models', None, {'Host': 'localhost:8000'}, 200),
  ],
)
def test_requests_that_are_no_requests_are_refused(server, method, path, body, headers, status):
  given, answer = send(server, method, path, body, headers.items())
  assert given == status and ('error' in answer) == (status != 200)


def test_template_options_are_a_json_object():
  assert command.read_options('') == ()
  assert command.read_options('{"enable_thinking": false}') == (('enable_thinking', False),)
  for text in ('{enable', '[1]'):
    with pytest.raises(UserError, match='template_options'):
      command.read_options(text)
