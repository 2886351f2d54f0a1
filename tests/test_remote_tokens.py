"""What `Remote` sends, and the tokens that it reads from an answer."""

import dataclasses
import math

import pytest

from cai_jax.runtime.errors import UserError
from cai_jax.sampling.remote import RemoteConfig
from cai_jax.sampling.types import SamplingConfig, Turn
from tests.remote_setup import ask, make_key, make_turn
from tests.remote_setup import connect as connect
from tests.remote_setup import server as server
from tests.remote_setup import vocabulary as vocabulary


def test_a_stop_text_ends_the_reply_at_its_token(server, connect):
  remote = connect()
  tokens = remote.tokenizer.encode('kind words and the brake', add_special_tokens=False)
  server.script = [
    lambda reply: {
      'choices': [
        {
          'text': 'kind words',
          'finish_reason': 'stop',
          'stop_reason': ' and',
          'token_ids': tokens,
          'logprobs': {'tokens': [''] * len(tokens), 'token_logprobs': [-1.0] * len(tokens)},
        }
      ]
    }
  ]
  completion = ask(remote, stop_texts=(' and',))
  assert server.bodies[0]['stop'] == [' and']
  assert completion.finish_reason == 'stop_text' and completion.text == 'kind words'
  assert remote.tokenizer.decode(completion.tokens).endswith(' and')
  assert len(completion.logprobs) == len(completion.tokens) < len(tokens)


def test_a_text_only_answer_is_encoded_and_has_no_log_probabilities(server, connect):
  server.answers = 'text'
  remote = connect(server='openai')
  completion = ask(remote)
  eos = remote.tokenizer.eos_token_id
  assert completion.finish_reason == 'stop'
  assert completion.tokens == [
    *remote.tokenizer.encode(completion.text, add_special_tokens=False),
    eos,
  ]
  assert len(completion.logprobs) == len(completion.tokens) and all(
    map(math.isnan, completion.logprobs)
  )
  assert 'top_k' not in server.bodies[0] and 'stop_token_ids' not in server.bodies[0]
  cut = ask(remote, max_tokens=3)
  assert cut.finish_reason == 'length' and eos not in cut.tokens
  # A server that removes the stop text does not say whether a text or a token ended the reply.
  assert ask(remote, stop_texts=('\n\nHuman:',)).finish_reason == 'stop_text'
  # A server that accepts fewer stop texts continues after the others; the client cuts its answer.
  labels = tuple(f'{i})' for i in range(5)) + (' and',)
  server.script = [lambda _: {'choices': [{'text': 'kind and rude', 'finish_reason': 'length'}]}]
  completion = ask(remote, stop_texts=labels)
  assert server.bodies[-1]['stop'] == list(labels[:4])
  assert (completion.text, completion.finish_reason) == ('kind', 'stop_text')


def test_threads_do_not_share_a_tokenizer(server, connect):
  """A thread that encodes control tokens does not make the worker threads encode them."""
  remote = connect(server='openai', max_concurrent=4)
  eos = remote.tokenizer.eos_token_id
  spelled = {'choices': [{'text': '<|im_end|> ' * 40, 'finish_reason': 'length'}]}
  server.script = [lambda _: spelled] * 150
  futures = [
    remote.submit(make_turn(i % 100, max_tokens=400), make_key(i), (eos,)) for i in range(150)
  ]
  while not all(future.done() for future in futures):
    assert eos in remote.tokenizer.encode('the brake <|im_end|> ' * 40, split_special_tokens=False)
  assert not any(eos in future.result().tokens for future in futures)


def test_text_that_spells_a_control_token_stays_text(server, connect):
  remote = connect(server='openai')
  server.script = [
    lambda _: {'choices': [{'text': 'x <|im_end|> y', 'finish_reason': 'length'}]},
  ]
  completion = ask(remote)
  assert (
    remote.tokenizer.eos_token_id not in completion.tokens and completion.text == 'x <|im_end|> y'
  )


@pytest.mark.parametrize(
  'software, temperature, kept', [('sglang', 1.0, True), ('sglang', 0.5, False)]
)
def test_log_probabilities_after_temperature_are_dropped(
  software, temperature, kept, server, connect
):
  remote = connect(server=software)
  tokens = remote.tokenizer.encode('look at the brake', add_special_tokens=False)
  pieces = [*(remote.tokenizer.decode([token]) for token in tokens), '<|im_end|>']
  logprobs = [-0.5] * len(pieces)
  choice = {'text': 'look at the brake', 'finish_reason': 'stop', 'matched_stop': 1}
  choice['logprobs'] = {'tokens': pieces, 'token_logprobs': logprobs}
  server.script = [lambda _: {'choices': [choice]}]
  completion = ask(remote, temperature=temperature)
  assert completion.tokens == [*tokens, remote.tokenizer.eos_token_id]
  assert completion.logprobs == logprobs if kept else all(map(math.isnan, completion.logprobs))


def test_ids_in_the_chat_format_are_read(server, connect):
  """llama.cpp returns them; if it omits part of a character, the text is encoded instead."""
  remote = connect(server='llama.cpp')
  tokens = [
    *remote.tokenizer.encode('look', add_special_tokens=False),
    remote.tokenizer.eos_token_id,
  ]
  content = [{'id': token, 'token': '', 'logprob': -1.5} for token in tokens]
  choice = {'text': 'look', 'finish_reason': 'stop', 'logprobs': {'content': content}}
  complete = {'choices': [choice], 'usage': {'completion_tokens': len(tokens)}}
  incomplete = complete | {'usage': {'completion_tokens': len(tokens) + 1}}
  server.script = [lambda _: complete, lambda _: incomplete]
  completion = ask(remote)
  assert completion.tokens == tokens and completion.logprobs == [-1.5] * len(tokens)
  completion = ask(remote)
  assert completion.tokens == tokens and all(map(math.isnan, completion.logprobs))
  order = ['penalties', 'temperature', 'top_k', 'top_p', 'min_p']
  assert server.bodies[0]['samplers'] == order and server.bodies[0]['top_k'] == 0


def test_a_tokenizer_of_another_model_is_detected(server, connect):
  remote = connect()
  other = {'text': 'kind words', 'finish_reason': 'length', 'token_ids': [60, 61, 62]}
  beyond = {'text': '', 'finish_reason': 'length', 'token_ids': [999999]}
  for choice in (other, beyond):
    server.script = [lambda _, choice=choice: {'choices': [choice]}]
    with pytest.raises(UserError, match='Set tokenizer to that of the served model'):
      ask(remote)


def test_a_prompt_is_sent_as_text_if_that_keeps_its_control_tokens(server, connect):
  server.answers = 'text'
  remote = connect(server='tgi', prompt='text')
  text = '<|im_start|>user\nHow kind?<|im_end|>\n<|im_start|>assistant\n'
  turn = Turn('initial', remote.tokenizer.encode(text), SamplingConfig(max_tokens=8))
  remote.submit(turn, make_key()).result(timeout=60)
  [body] = server.bodies
  assert body['model'] == 'tgi'  # TGI takes any other name for an adapter
  assert body['prompt'] == text and not {'top_p', 'top_k', 'logprobs'} & set(body)
  spelled = remote.tokenizer.encode('<|im_end|>', split_special_tokens=True)
  with pytest.raises(UserError, match='spells a control token'):
    turn = dataclasses.replace(turn, context=[*turn.context, *spelled])
    remote.submit(turn, make_key()).result(timeout=60)


def test_the_check_asks_the_server_what_it_serves(server, connect):
  connect(max_positions=256).check()
  for fields, message in (
    ({'model': 'other'}, "does not serve 'other'.*: served"),
    ({'max_positions': 257}, 'accepts contexts of 256 tokens'),
    (
      {'url': server.url.replace('/v1', '')},
      'GET /models with status 404 .no such page.. Check that it is running',
    ),
  ):
    with pytest.raises(UserError, match=message):
      connect(**{'max_positions': 256} | fields).check()
  server.models = ['what']
  with pytest.raises(UserError, match='not a list of models'):
    connect().check()


def test_sampling_settings_that_a_server_lacks_are_refused():
  config = RemoteConfig('http://localhost:8000/v1', 'm', 't')
  config.check_sampling(SamplingConfig(top_p=0.5, temperature=0.0))
  with pytest.raises(UserError, match=r'openai.*top_k=3.*vllm'):
    config.check_sampling(SamplingConfig(top_k=3))
  with pytest.raises(UserError, match='stop_token_ids'):
    dataclasses.replace(config, server='llama.cpp').check_sampling(
      SamplingConfig(stop_token_ids=(1,))
    )
  dataclasses.replace(config, server='vllm').check_sampling(
    SamplingConfig(stop_token_ids=(1,), top_k=2)
  )
  every = dict(
    min_p=0.1,
    repetition_penalty=1.2,
    presence_penalty=0.5,
    frequency_penalty=0.25,
    logit_bias=((3, -1.0),),
  )
  for name in ('vllm', 'sglang'):
    dataclasses.replace(config, server=name).check_sampling(SamplingConfig(**every))
  refused = {
    'openai': {'min_p', 'repetition_penalty'},
    'llama.cpp': {'presence_penalty', 'frequency_penalty'},
    'tgi': {*every},
  }
  for kind, names in refused.items():
    own = dataclasses.replace(config, server=kind, prompt='text')
    for name, value in every.items():
      if name in names:
        with pytest.raises(
          UserError, match=rf'{name}=.*Remove it, or serve .* with vllm or sglang'
        ):
          own.check_sampling(SamplingConfig(**{name: value}))
      else:
        own.check_sampling(SamplingConfig(**{name: value}))


def test_penalties_and_biases_are_sent_under_the_servers_names(server, connect):
  settings = dict(min_p=0.1, repetition_penalty=1.2, logit_bias=((3, -1.0), (7, 2.0)))
  for name in ('vllm', 'llama.cpp'):
    own = dict(presence_penalty=0.5, frequency_penalty=0.25) if name == 'vllm' else {}
    ask(connect(server=name), **settings, **own)
    ask(connect(server=name))
  penalized, plain = server.bodies[:2]
  assert (penalized['min_p'], penalized['repetition_penalty']) == (0.1, 1.2)
  assert (penalized['presence_penalty'], penalized['frequency_penalty']) == (0.5, 0.25)
  assert penalized['logit_bias'] == {'3': -1.0, '7': 2.0}
  assert (plain['min_p'], plain['repetition_penalty']) == (0.0, 1.0)
  assert not {'presence_penalty', 'frequency_penalty', 'logit_bias'} & set(plain)
  penalized, plain = server.bodies[2:]
  assert (penalized['repeat_penalty'], penalized['repeat_last_n']) == (1.2, -1)
  assert plain['repeat_penalty'] == 1.0 and 'repetition_penalty' not in penalized
