"""Thoughts of reasoning models: a field of their own, and training with or without them."""

import copy
import dataclasses

import pytest
from feedback_setup import make_job, make_lm, make_prompt
from test_dialogue import REASONING, assistant, get_tokenizer, user

from cai_jax.data import d_cai
from cai_jax.data.examples import build_examples
from cai_jax.dialogue import Dialogue
from cai_jax.runtime.errors import UserError
from cai_jax.sampling.types import Completion, SamplingConfig

PROMPT = "{{ '<|im_start|>assistant\n' }}"


@pytest.fixture(scope='module')
def tokenizer():
  return get_tokenizer('reasoning')


def with_prompt(tokenizer, text):
  """Return a tokenizer whose generation prompt ends with a text."""
  changed = copy.deepcopy(tokenizer)
  changed.chat_template = REASONING.replace(PROMPT, f"{{{{ '<|im_start|>assistant\n{text}' }}}}")
  assert changed.chat_template != REASONING
  return changed


def think(tokenizer, thoughts, answer, opens=True):
  """Return the tokens of a sampled reply; without an answer, it is cut off inside its thoughts."""
  start, close, end = tokenizer.convert_tokens_to_ids(['<think>', '</think>', '<|im_end|>'])
  tokens = [*([start] if opens else []), *tokenizer.encode(f'\n{thoughts}\n')]
  return tokens if answer is None else [*tokens, close, *tokenizer.encode(f'\n\n{answer}'), end]


def play(job, replies):
  """Return the contexts and the row of the first prompt's chain for these (tokens, reason)."""
  (prompt, kind), contexts, completion = job.prompts[0], [], None
  chain = job.chain(prompt, kind)
  for tokens, reason in replies:
    contexts.append(chain.send(completion).context)
    completion = Completion(tokens, '', [-0.5] * len(tokens), reason)
  with pytest.raises(StopIteration) as stop:
    chain.send(completion)
  return contexts, job.row(stop.value.value, kind)


@pytest.fixture(scope='module')
def played(tokenizer):
  job = make_job(make_lm(tokenizer), num_harmful=1, num_helpful=0, rounds=2)
  replies = [
    (think(tokenizer, f'hm {i}', answer), 'stop' if answer else 'length')
    for i, answer in enumerate(['Mix.', 'Too short.', 'Mix flour.', 'Fine.', None])
  ]
  return job, replies, *play(job, replies)


def test_thoughts_are_a_field_and_no_later_turn_reads_them(tokenizer, played, tmp_path):
  job, replies, contexts, row = played
  first, second = row['rounds']
  turns = [row['initial'], first['critique'], first['revision'], second['critique']]
  assert [turn['thoughts'] for turn in turns] == ['hm 0', 'hm 1', 'hm 2', 'hm 3']
  assert [turn['text'] for turn in turns] == ['Mix.', 'Too short.', 'Mix flour.', 'Fine.']
  assert second['revision']['thoughts'] == 'hm 4' and second['revision']['text'] == ''
  # Log-probabilities and lengths are those of all sampled tokens.
  assert len(row['logprobs']) == sum(len(tokens) for tokens, _ in replies)
  assert row['initial']['num_tokens'] == len(replies[0][0])
  assert all('hm' not in tokenizer.decode(context) for context in contexts)
  assert 'Too short.' in tokenizer.decode(contexts[2])
  # The dataset is read back as it was written, and is a D_CAI for everything that reads one.
  assert job.has_thoughts
  d_cai.write_shard(tmp_path, 0, [row], thoughts=True)
  d_cai.write_metadata(tmp_path, [1], thoughts=True)
  (read,) = d_cai.read_rows(tmp_path)
  assert read['initial'] == row['initial'] and read['rounds'] == row['rounds']
  d_cai.check_schema(tmp_path)


def test_datasets_without_a_reasoning_model_have_no_such_field(tiny_tokenizer, tokenizer):
  job = make_job(make_lm(tiny_tokenizer), num_harmful=1, num_helpful=0, rounds=1)
  assert not job.has_thoughts
  tokens = job.stages.initial.dialogue.reply('Yes.')
  _, row = play(job, [(tokens, 'stop')] * 3)
  assert {*row['initial']} == {*row['rounds'][0]['critique']} == {*d_cai.FEATURES['initial']}
  assert 'thoughts' not in row['initial']
  # A prompt that ends the thoughts at once, and the plain format, leave none to sample.
  closed = with_prompt(tokenizer, '<think>\\n\\n</think>\\n\\n')
  assert not Dialogue(closed).thinks and not Dialogue(tokenizer, 'plain').thinks
  assert Dialogue(tokenizer).thinks and Dialogue(with_prompt(tokenizer, '<think>\\n')).thinks


@pytest.mark.parametrize('opens', [True, False])
def test_drop_learns_the_answer_and_keep_learns_both(tokenizer, opens):
  if not opens:
    tokenizer = with_prompt(tokenizer, '<think>\\n')
  dialogue = Dialogue(tokenizer)
  sampled = think(tokenizer, 'hm <|im_end|>', 'Mix flour.', opens)
  assert dialogue.split(sampled)[1] == 'Mix flour.'
  turn = {'text': 'Mix flour.', 'thoughts': 'hm', 'finish_reason': 'stop'}
  rows = [{'id': 'a', 'kind': 'harmful', 'prompt': [user('How?')], 'initial': turn, 'rounds': []}]
  context = dialogue.prompt([user('How?')])

  def target(reasoning):
    (example,) = build_examples(rows, dialogue, target='initial', reasoning=reasoning).examples
    assert example.tokens[: len(context)].tolist() == context
    assert example.loss_mask.tolist() == [i >= len(context) for i in range(len(example.tokens))]
    return example.tokens[len(context) :].tolist()

  # 'drop' is the template's rendering of the answer, 'keep' its rendering of both.
  assert (
    target('drop') == dialogue.example([user('How?'), assistant('Mix flour.')])[0][len(context) :]
  )
  assert 'hm' not in tokenizer.decode(target('drop'))
  both = '<think>\nhm\n</think>\n\nMix flour.<|im_end|>'
  assert tokenizer.decode(target('keep')) == both[0 if opens else len('<think>\n') :]
  assert dialogue.split(target('keep')) == ('hm', 'Mix flour.')
  if opens:
    assert target('keep') == dialogue.reply(both.removesuffix('<|im_end|>'))


def test_unfinished_thoughts_are_not_learned_and_counted(tokenizer, played):
  row = played[-1]
  for reasoning in ('drop', 'keep'):
    built = build_examples([row], Dialogue(tokenizer), target='all', reasoning=reasoning)
    assert built.counts['kept'] == 1 and built.counts['dropped'] == {'unfinished_thought': 1}


def test_keep_needs_thoughts_and_marks_for_them(tiny_tokenizer, tokenizer, played):
  row = played[-1]
  without = {'id': 'a', 'kind': 'harmful', 'prompt': [user('?')], 'rounds': []}
  without['initial'] = {'text': 'Yes.', 'finish_reason': 'stop'}
  with pytest.raises(UserError, match="train.reasoning='keep' learns thoughts"):
    build_examples([without], Dialogue(tokenizer), target='initial', reasoning='keep')
  with pytest.raises(UserError, match='no marks for them'):
    build_examples([row], Dialogue(tiny_tokenizer), target='initial', reasoning='keep')


def test_a_stop_text_ends_the_answer_after_thoughts(tokenizer):
  stage = make_job(make_lm(tokenizer), num_harmful=1, num_helpful=0).stages.initial
  stage = dataclasses.replace(stage, sampling=SamplingConfig(stop=('###',)))
  asked = stage.ask('initial', make_prompt(0).messages, 'assistant')
  asked.send(None)
  tokens = think(tokenizer, 'hm', 'Mix.### more')
  with pytest.raises(StopIteration) as stop:
    asked.send(Completion(tokens, 'hm Mix.', [0.0] * len(tokens), 'stop_text'))
  assert (stop.value.value.thoughts, stop.value.value.text) == ('hm', 'Mix.')
