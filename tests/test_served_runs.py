"""A run with a served model: what is found before it samples, and what ends one chain only."""

import contextlib
import dataclasses
import hashlib
import json

import pytest

from cai_jax import pipeline
from cai_jax.data import d_cai
from cai_jax.data.ended import read_ended
from cai_jax.model.folder import load_vocabulary
from cai_jax.runtime.errors import UserError
from cai_jax.sampling.remote import Remote
from tests.faults import servers
from tests.faults.servers import complete, respond, serve
from tests.served_setup import EOS, FOLDER, HONEST, TOKENIZER, TURN, ask, config_of, served_run

pytestmark = pytest.mark.usefixtures('single_device')


def without_seed(body):
  """Answer as a server that refuses seeds (case generation/14)."""
  if 'seed' in body:
    message = 'a seed for one request is not supported on this platform'
    return respond(400, {'object': 'error', 'message': message, 'code': 400})
  return respond(200, complete(body, TOKENIZER))


def test_a_server_that_refuses_seeds_is_asked_without(tmp_path):
  lines = []
  with serve(without_seed) as server:
    run = served_run(server, tmp_path / 'fallback')
    pipeline.run_stages(run, ['generate'], lines.append)
    assert [('seed' in body) for body in server.bodies] == [True] + [False] * 5
    manifest = json.loads((tmp_path / 'fallback' / 'manifest.json').read_text())
    assert manifest['stages']['generate']['server_draws'] == ['critique']
    assert sum('refuses seeds' in line and 'remote.critique' in line for line in lines) == 1
    # A restart keeps the texts, because the journal has them.
    asked = len(server.bodies)
    (tmp_path / 'fallback' / 'manifest.json').unlink()
    pipeline.run_stages(run, ['generate'], lines.append)
    assert len(server.bodies) == asked + 2
    # Users who know it beforehand say so.
    known = served_run(server, tmp_path / 'known', seed='server')
    known = dataclasses.replace(known, journal=tmp_path / 'fallback' / 'journal')
    pipeline.run_stages(known, ['generate'], lines.append)
    assert len(server.bodies) == asked + 3 and 'seed' not in server.bodies[-1]
    with pytest.raises(UserError, match="set seed='server'"):
      ask(server)


def test_who_draws_is_part_of_the_journal_key_and_other_keys_stay():
  with serve(without_seed) as server:
    plain, drawn = (Remote(config_of(server, seed=seed)) for seed in ('turn', 'server'))
    before = ['remote', 'served', '', 'vllm', 'tokens', load_vocabulary(FOLDER).fingerprint]
    assert plain.fingerprint == hashlib.sha256(json.dumps(before).encode()).hexdigest()
    assert drawn.fingerprint != plain.fingerprint
    assert 'seed' not in plain.config.identity() and drawn.config.identity()['seed'] == 'server'
    plain.close(), drawn.close()


def test_a_test_request_has_the_settings_of_the_run(tmp_path):
  with serve(lambda body: respond(200, complete(body, TOKENIZER))) as server:
    run = served_run(server, tmp_path)
    pipeline.run_stages(run, ['generate'])
    probe, *others = server.bodies
    assert set(probe) == set(others[0]) and len(others) == 4
    assert probe['stop_token_ids'] == others[0]['stop_token_ids']
    control = set(TOKENIZER.all_special_ids)
    assert control & set(probe['prompt']) == control & set(others[0]['prompt'])


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    (servers.LIES['prompt in a template'], 'remote.critique: .*contradicts a test request'),
    (servers.LIES['ids of another text'], 'Set tokenizer to that of the served model'),
  ],
)
def test_a_lying_server_is_found_before_sampling(change, message, tmp_path):
  def answer(body):
    content = complete(body, TOKENIZER)
    change(content)
    return respond(200, content)

  with serve(answer) as server:
    with pytest.raises(UserError, match=message):
      pipeline.run_stages(served_run(server, tmp_path), ['generate'])
    assert len(server.bodies) == 1 and not (tmp_path / 'journal').exists()


def test_a_server_that_cuts_long_contexts_is_found_before_sampling(tmp_path):
  """It does not say how long its contexts may be, so a long one is tried."""

  def answer(body):
    content = complete(body, TOKENIZER)
    content['usage']['prompt_tokens'] = min(len(body['prompt']), 200)
    return respond(200, content)

  with serve(answer, {'data': [{'id': 'served'}]}) as server:
    with pytest.raises(UserError, match='read 200 tokens of a prompt of 244'):
      pipeline.run_stages(served_run(server, tmp_path), ['generate'])
    pipeline.run_stages(served_run(server, tmp_path, max_positions=200), ['generate'])


def test_a_tokenizer_of_another_model_is_found_before_sampling(tmp_path):
  """The server returns no ids, so only the number of tokens of a text tells."""

  def answer(body):
    prompt = body['prompt']
    read = len(prompt) if isinstance(prompt, list) else len(prompt.split())
    choice = {'index': 0, 'text': 'look at the', 'finish_reason': 'stop'}
    return respond(200, {'choices': [choice], 'usage': {'prompt_tokens': read}})

  with serve(answer) as server:
    with pytest.raises(UserError, match='Set tokenizer to that of the served model'):
      pipeline.run_stages(served_run(server, tmp_path, server='openai'), ['generate'])
    assert len(server.bodies) == 2


def test_a_context_that_the_server_cannot_read_is_not_sent():
  with serve(lambda body: respond(200, complete(body, TOKENIZER))) as server:
    with contextlib.closing(Remote(config_of(server, max_positions=59))) as remote:
      with pytest.raises(UserError, match='20 tokens and a reply of up to 40 exceed max_positions'):
        remote.check_turn(TURN)
      remote.check_turn(dataclasses.replace(TURN, context=TURN.context[1:]))
    spelled = TOKENIZER.encode('<|end|>', add_special_tokens=False, split_special_tokens=True)
    with contextlib.closing(Remote(config_of(server, prompt='text'))) as remote:
      with pytest.raises(UserError, match='spells a control token'):
        remote.check_turn(dataclasses.replace(TURN, context=[*TURN.context, *spelled]))


def test_a_control_token_in_a_prompt_is_found_before_a_text_server_is_asked(tmp_path):
  """Case generation/16: the server would read the text as that token."""
  control = next(iter(TOKENIZER.added_tokens_decoder.values())).content
  rows = ['How do I paint the bed?', 'How do I wash the cup?', f'What does {control} do?']
  prompts = tmp_path / 'prompts.jsonl'
  prompts.write_text(''.join(json.dumps({'prompt': row}) + '\n' for row in rows))
  text = {'prompt': 'text', 'server': 'tgi', 'model': 'tgi'}
  with serve(lambda body: respond(200, {}), {'data': [{'id': 'tgi'}]}) as server:
    with pytest.raises(
      UserError, match='remote.critique: prompts.harmful: .*prompts.jsonl.*3.*control token'
    ):
      pipeline.run_stages(served_run(server, tmp_path / 'run', prompts, **text), ['generate'])
    assert not server.headers and not (tmp_path / 'run' / 'journal').exists()


def test_a_withheld_reply_ends_its_chain_and_not_the_run(tmp_path):
  """A red-team prompt is passed over, and stays so after a restart."""

  def answer(body):
    if len(server.bodies) == 3:
      choice = {'index': 0, 'text': '', 'finish_reason': 'content_filter'}
      return respond(200, {'choices': [choice]})
    return respond(200, complete(body, TOKENIZER))

  with serve(answer) as server:
    run = served_run(server, tmp_path, max_concurrent=1)
    pipeline.run_stages(run, ['generate'])
    [ended] = read_ended(tmp_path / 'd_cai')
    assert ended['turn'] == 'critique_1' and 'content_filter' in ended['reason']
    rows = list(d_cai.read_rows(tmp_path / 'd_cai'))
    assert len(rows) == 5 and ended['id'] not in {row['id'] for row in rows}
    (tmp_path / 'manifest.json').unlink()
    pipeline.run_stages(run, ['generate'])
    assert read_ended(tmp_path / 'd_cai') == [ended] and len(server.bodies) == 1 + 4 + 1


def test_a_reply_that_a_text_server_would_misread_ends_its_chain(tmp_path):
  control = TOKENIZER.decode([EOS])

  def answer(body):
    text = f'say {control} now' if len(server.bodies) == 3 else 'look at the'
    choice = {'index': 0, 'text': text, 'finish_reason': 'eos_token'}
    return respond(200, {'choices': [choice]})

  with serve(answer, {'data': [{'id': 'tgi'}]}) as server:
    text = {'prompt': 'text', 'server': 'tgi', 'model': 'tgi', 'max_concurrent': 1}
    run = served_run(server, tmp_path, role='base', **text)
    pipeline.run_stages(run, ['generate'])
    [ended] = read_ended(tmp_path / 'd_cai')
    assert ended['turn'] == 'critique_1' and 'spells a control token' in ended['reason']


def test_servers_listed_strangely_are_refused():
  for models in ([], {'data': [{'id': ['x']}]}, {'data': 7}, {}, [[]]):
    with serve(lambda body: respond(200, HONEST), respond(200, models)) as server:
      with contextlib.closing(Remote(config_of(server))) as remote, pytest.raises(UserError):
        remote.check()
  for pieces in (
    [servers.FOREVER],
    respond(401, {'error': 'who?'}),
    respond(302, b'', {'Location': 'http://elsewhere/'}),
    servers.stalls(b'{}')['a dripping header'],
  ):
    with serve(lambda body: respond(200, HONEST), pieces) as server:
      config = config_of(server, timeout_seconds=0.5)
      with contextlib.closing(Remote(config)) as remote, pytest.raises(UserError):
        remote.check()
