"""Thoughts of reasoning models: a field of their own, and training with or without them."""

import copy
import dataclasses

import pytest
from feedback_setup import CONSTITUTION, ENGINE, make_job, make_lm, make_prompt, shard_bytes

from cai_jax.data import d_cai
from cai_jax.data.examples import build_examples
from cai_jax.dialogue import Dialogue
from cai_jax.feedback.config import FeedbackConfig, StageSampling
from cai_jax.feedback.generate import finish_dataset, generate_shards, replay_turns
from cai_jax.feedback.job import _check_stop_tokens, prepare
from cai_jax.feedback.preview import preview_chain
from cai_jax.runtime.errors import UserError
from cai_jax.runtime.settings import identity
from cai_jax.sampling.completions import generate
from cai_jax.sampling.journal import Journal
from cai_jax.sampling.planning import longest_context
from cai_jax.sampling.types import Completion, SamplingConfig
from tests.dialogue_setup import REASONING, assistant, get_tokenizer, user

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


# A budget of their own for thoughts.

BUDGET = SamplingConfig(max_tokens=7, max_thought_tokens=5)
KEEPS = "{% set content = content.split('</think>')[-1].lstrip('\n') %}"


def make_budget_job(tokenizer, sampling=BUDGET, **config):
  stages = StageSampling(sampling, sampling, sampling)
  config = FeedbackConfig(rounds=1, shard_rows=3, **config)
  return prepare(
    {'base': make_lm(tokenizer)}, [make_prompt(0)], [], CONSTITUTION, config, stages, 0
  )


def ask(job, *replies):
  """Return the turns of an initial response to these (tokens, reason), and the reply."""
  asked = job.stages.initial.ask('initial', make_prompt(0).messages, 'assistant')
  turns, completion = [], None
  for tokens, reason in replies:
    turns.append(asked.send(completion))
    logprobs = [-0.5 - i for i in range(len(tokens))]
    completion = Completion(tokens, tokenizer_text(job, tokens), logprobs, reason)
  with pytest.raises(StopIteration) as stop:
    asked.send(completion)
  return turns, stop.value.value


def tokenizer_text(job, tokens):
  return job.models['base'].tokenizer.decode(tokens, skip_special_tokens=True)


@pytest.mark.parametrize('opens', [True, False])
def test_a_budget_closes_thoughts_and_the_answer_follows(tokenizer, opens):
  if not opens:
    tokenizer = with_prompt(tokenizer, '<think>\\n')
  job = make_budget_job(tokenizer, dataclasses.replace(BUDGET, stop=('###',), stop_token_ids=(5,)))
  thoughts = tokenizer.encode('hm ### hm')
  answer = [*tokenizer.encode('Mix.'), tokenizer.eos_token_id]
  (first, second), reply = ask(job, (thoughts, 'length'), (answer, 'stop'))
  close = tokenizer.convert_tokens_to_ids('</think>')
  assert (first.name, second.name) == ('initial.thoughts', 'initial')
  # No setting of the budget remains in a turn, and what ends an answer does not end thoughts.
  assert first.sampling == SamplingConfig(max_tokens=5, stop_token_ids=(close,))
  assert second.sampling == SamplingConfig(max_tokens=7, stop=('###',), stop_token_ids=(5,))
  # Either way one `<think>` begins the thoughts, and one `</think>` ends them.
  prompt = job.stages.initial.dialogue.prompt(make_prompt(0).messages)
  assert tokenizer.decode(first.context).endswith('assistant\n<think>\n')
  assert first.context[: len(prompt)] == prompt
  assert second.context[: len(first.context) + len(thoughts)] == first.context + thoughts
  assert tokenizer.decode(second.context).endswith('<think>\nhm ### hm\n</think>\n\n')
  assert second.context.count(close) == 1
  assert (reply.thoughts, reply.text) == ('hm ### hm', 'Mix.')
  # Only sampled tokens count; later contexts have the marks, too.
  assert reply.completion.tokens == thoughts + answer
  assert len(reply.completion.logprobs) == len(thoughts + answer)
  assert prompt + list(reply.tokens) == second.context + answer


def test_thoughts_that_the_model_ends_are_kept_and_a_cut_turn_is_closed(tokenizer):
  job = make_budget_job(tokenizer)
  close, end = tokenizer.convert_tokens_to_ids(['</think>', '<|im_end|>'])
  words, answer = tokenizer.encode('hm'), [*tokenizer.encode('\n\nMix.'), end]
  (first, second), reply = ask(job, ([*words, close], 'stop'), (answer, 'stop'))
  assert second.context == [*first.context, *words, close]
  assert reply.completion.tokens == [*words, close, *answer]
  assert (reply.thoughts, reply.text) == ('hm', 'Mix.')
  # A token that ends the turn inside the thoughts is left out, and so is its log-probability.
  (first, second), reply = ask(job, ([*words, end], 'stop'), (answer, 'stop'))
  assert end not in second.context[len(first.context) :]
  assert tokenizer.decode(second.context[len(first.context) :]) == 'hm\n</think>\n\n'
  assert reply.completion.tokens == words + answer
  logprobs = [-0.5 - i for i in range(len(answer))]
  assert reply.completion.logprobs == logprobs[: len(words)] + logprobs
  assert (reply.thoughts, reply.text) == ('hm', 'Mix.')


def generate_rows(job, folder, journal):
  return generate_shards(job, folder, journal, ENGINE), shard_bytes(folder)


@pytest.mark.parametrize('keeps', [False, True])
def test_a_budget_replays_to_the_same_bytes(tokenizer, tmp_path, keeps):
  if keeps:  # a template that keeps the thoughts of earlier replies
    tokenizer = copy.deepcopy(tokenizer)
    assert KEEPS in tokenizer.chat_template
    tokenizer.chat_template = tokenizer.chat_template.replace(KEEPS, '')
  job = make_budget_job(tokenizer)
  journal = Journal(tmp_path / 'journal')
  counts, written = generate_rows(job, tmp_path / 'first', journal)
  assert counts['turns'] == 6
  again, replayed = generate_rows(job, tmp_path / 'second', journal)
  assert (again['turns'], again['replayed_turns']) == (0, 6)
  journal.close()
  other = Journal(tmp_path / 'other')
  assert written == replayed == generate_rows(job, tmp_path / 'third', other)[1]
  finish_dataset(job, tmp_path / 'first')
  turns = replay_turns(job, other, ENGINE)[make_prompt(0).id]
  other.close()
  names = [f'{name}{end}' for name in NAMES for end in ('.thoughts', '')]
  assert [turn.name for turn, _ in turns] == names
  assert all(len(c.tokens) <= t.sampling.max_tokens for t, c in turns)
  # A later context extends the cache if the template keeps thoughts, and has none of them if not.
  (answered, answer), (asked, _) = turns[1], turns[2]
  whole = answered.context + answer.tokens
  assert (asked.context[: len(whole)] == whole) == keeps
  (row,) = d_cai.read_rows(tmp_path / 'first')
  assert len(row['logprobs']) == sum(
    turn['num_tokens']
    for turn in (row['initial'], row['rounds'][0]['critique'], row['rounds'][0]['revision'])
  )


NAMES = ('initial', 'critique_1', 'revision_1')


def test_the_longest_context_has_the_budget_and_its_marks(tokenizer):
  def longest(sampling):
    job = make_budget_job(tokenizer, sampling)
    return longest_context(job.stages.initial.ask('initial', make_prompt(0).messages, 'assistant'))

  dialogue = Dialogue(tokenizer)
  marks = len(dialogue.open_thoughts()) + len(dialogue.close_thoughts([]))
  (without, _), (budget, _) = longest(SamplingConfig(max_tokens=7))['base'], longest(BUDGET)['base']
  assert budget == without + 5 + marks


def test_without_a_budget_turns_are_as_before(tokenizer, tmp_path):
  job = make_budget_job(tokenizer, SamplingConfig(max_tokens=7))
  assert 'max_thought_tokens' not in identity(job.stages.initial.sampling)
  (turn,), reply = ask(job, (think(tokenizer, 'hm', 'Mix.'), 'stop'))
  assert turn.context == job.stages.initial.dialogue.prompt(make_prompt(0).messages)
  assert (turn.name, turn.sampling) == ('initial', SamplingConfig(max_tokens=7))
  assert reply.tokens == reply.completion.tokens
  assert job.digest() != make_budget_job(tokenizer).digest()


def test_a_budget_needs_a_model_that_thinks(tiny_tokenizer, tokenizer):
  closed = with_prompt(tokenizer, '<think>\\n\\n</think>\\n\\n')
  for unable in (tiny_tokenizer, closed):
    with pytest.raises(UserError, match=r'sampling.initial: max_thought_tokens=5 .* writes none'):
      make_budget_job(unable)
  with pytest.raises(UserError, match='writes none'):
    make_budget_job(tokenizer, style='plain')
  with pytest.raises(UserError, match='max_thought_tokens=-1'):
    SamplingConfig(max_thought_tokens=-1)
  with pytest.raises(UserError, match='not supported here'):
    generate(make_lm(tokenizer), ['x'], BUDGET)
  # The dialogue's stop tokens and `</think>` must fit the compiled program together.
  many = Dialogue(tokenizer, eos_token_ids=tuple(range(16)))
  stage = dataclasses.replace(make_budget_job(tokenizer).stages.initial, dialogue=many)
  assert len(many.stop_token_ids) > 15
  with pytest.raises(UserError, match='stop tokens'):
    _check_stop_tokens(stage, make_lm(tokenizer))


def test_the_preview_shows_thoughts_before_the_answer(tokenizer):
  job = make_budget_job(tokenizer)
  contexts = list(preview_chain(job, make_prompt(0), 'harmful'))
  assert [context.turn.name for context in contexts][:2] == ['initial.thoughts', 'initial']
  thoughts = '⟨reply: initial.thoughts⟩'
  shown = tokenizer.decode(tokenizer.encode(thoughts))  # what its vocabulary has of it
  assert f'⟦<think>⟧\n{shown}\n⟦</think>⟧' in contexts[1].text
  assert 'thoughts' not in contexts[2].text.split('⟦<think>⟧')[0]
