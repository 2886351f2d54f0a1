"""AI feedback: questions, labels, what is written of them, and what is refused."""

import contextlib
import dataclasses
import json
import math
import random

import pytest

from cai_jax.constitution import Constitution, Principle
from cai_jax.data.preferences import read_comparisons
from cai_jax.data.prompts import Prompt
from cai_jax.dialogue import Dialogue
from cai_jax.feedback.comparisons.asking import LABELS, THINK, FeedbackModel
from cai_jax.feedback.comparisons.config import LabelConfig
from cai_jax.feedback.comparisons.job import check_label
from cai_jax.feedback.comparisons.labelling import label
from cai_jax.feedback.comparisons.pairing import PAIRINGS
from cai_jax.feedback.config import FeedbackConfig
from cai_jax.feedback.stage import Stage
from cai_jax.runtime.errors import UserError
from cai_jax.sampling.journal import Journal
from cai_jax.sampling.remote import Remote, RemoteConfig
from cai_jax.sampling.types import Completion, LabelTurn, SamplingConfig
from cai_jax.scoring.judge import JUDGES
from cai_jax.scoring.judge_questions import build_question
from cai_jax.scoring.likelihood import log_likelihoods
from cai_jax.tiny.judge import make_labelled
from tests.faults.servers import complete, respond, serve
from tests.feedback_setup import ENGINE, make_lm
from tests.test_remote_answers import FOLDER, TOKENIZER

PRINCIPLES = (
  Principle('kind', 'What is unkind?', 'Be kind.', comparison_request='Choose the kinder one.'),
  Principle('brief', 'What is long?', 'Be brief.', comparison_request='Choose the shorter one.'),
)
CONSTITUTION = Constitution(PRINCIPLES)
SHORT = SamplingConfig(max_tokens=6)
ASKED = ({'role': 'user', 'content': 'Why?'},)
PROMPTS = [Prompt(f'id-{i}', ({'role': 'user', 'content': f'Why {i}?'},)) for i in range(4)]


@pytest.fixture(scope='module')
def lm(tiny_tokenizer):
  """A random model with room for questions."""
  small = make_lm(tiny_tokenizer)
  config = dataclasses.replace(small.config, max_positions=2048)
  return dataclasses.replace(small, config=config)


def write_lines(path, rows):
  path.write_text(''.join(json.dumps(row) + '\n' for row in rows))
  return str(path)


@pytest.fixture
def pairs_file(tmp_path):
  rows = [
    {'id': 'one', 'prompt': 'Why?', 'chosen': 'I like rain.', 'rejected': 'No.'},
    {'id': 'two', 'prompt': 'Who?', 'chosen': 'A friend.', 'rejected': 'Nobody at all.'},
  ]
  return write_lines(tmp_path / 'pairs.jsonl', rows)


def make_job(models, config, prompts=PROMPTS, judge=None, feedback=None, sampling=SHORT):
  return check_label(
    models, prompts, CONSTITUTION, config, feedback or FeedbackConfig(), sampling, 0, judge
  )


def run(job, folder, **options):
  with contextlib.closing(Journal(folder / 'journal')) as journal:
    summary = label(job, folder / 'labels', journal, ENGINE, **options)
  lines = (folder / 'labels' / 'comparisons.jsonl').read_text().splitlines()
  return summary, [json.loads(line) for line in lines]


def play(chain, logprobs, text='Well.'):
  """Run a chain on answers with these log-probabilities of (A) and (B); return its result."""
  turns, completion, tokens = [], None, []
  while True:
    try:
      turn = chain.send(completion)
    except StopIteration as stop:
      return turns, stop.value
    turns.append(turn)
    if isinstance(turn, LabelTurn):
      value = logprobs(turn.name)[int(turn.name[-1]) - 1]
      completion = Completion([turn.labels[0]], '', [value], 'length')
    else:
      tokens = turn.context[-3:]
      completion = Completion(tokens, text, [-1.0] * len(tokens), 'length')


def sigmoid(x):
  return 1 / (1 + math.exp(-x))


def test_a_soft_label_is_the_mean_over_both_orders_of_what_the_model_gives(
  lm, pairs_file, tmp_path, quick_compilation
):
  job = make_job({'feedback': lm}, LabelConfig(comparisons=(pairs_file,), principles=2))
  summary, rows = run(job, tmp_path)
  dialogue = Dialogue(lm.tokenizer, 'chat', lm.eos_token_ids)
  replies = [dialogue.reply(text) for text in LABELS]
  split = next(i for i in range(99) if replies[0][i] != replies[1][i])
  assert dialogue.decode(replies[0][:split]) == 'The answer is: ('
  for row, texts in zip(
    rows, (('I like rain.', 'No.'), ('A friend.', 'Nobody at all.')), strict=True
  ):
    probabilities = []
    for principle in PRINCIPLES:
      for options in (texts, texts[::-1]):
        question = build_question(row['prompt'], principle.comparison, *options)
        context = dialogue.prompt([{'role': 'user', 'content': question}]) + replies[0][:split]
        log_p = log_likelihoods(lm, [context] * 2, [[reply[split]] for reply in replies])
        of_a = sigmoid(log_p[0] - log_p[1])
        probabilities.append(of_a if options == texts else 1 - of_a)
    first = sum(probabilities) / 4
    chosen, rejected = texts if first >= 0.5 else texts[::-1]
    assert (row['chosen'][0]['content'], row['rejected'][0]['content']) == (chosen, rejected)
    assert row['probability'] == pytest.approx(max(first, 1 - first), abs=1e-4)
    assert {r['principle'] for r in row['readings']} == {'kind', 'brief'}
    assert [r['option_a'] for r in row['readings']].count('chosen') == 2
  right = sum(row['chosen'][0]['content'] in ('I like rain.', 'A friend.') for row in rows)
  accuracy = summary['accuracy'][pairs_file]
  assert (accuracy['count'], accuracy['right'], accuracy['accuracy']) == (2, right, right / 2)
  assert [row['id'] for row in rows] == ['one', 'two']


def scripted(lm, pairs_file, logprobs, text='Well.', **config):
  """Return the turns and the first label of a job whose model gives these log-probabilities."""
  job = make_job({'feedback': lm}, LabelConfig(comparisons=(pairs_file,), **config))
  turns, outcome = play(job.chain(job.items[0]), logprobs, text)
  return turns, outcome.labels[0]


def test_a_preference_for_an_option_cancels(lm, pairs_file):
  turns, always_a = scripted(lm, pairs_file, lambda name: (-0.1, -3.0))
  assert len(turns) == 4 and always_a.probability == pytest.approx(0.5)
  odds = {'order_1': (-0.5, -1.5), 'order_2': (-2.0, -1.0)}
  _, agreeing = scripted(lm, pairs_file, lambda name: next(odds[o] for o in odds if o in name))
  assert agreeing.probability == pytest.approx(sigmoid(1))
  assert [r.answer.mass for r in agreeing.readings] == [
    pytest.approx(math.exp(-0.5) + math.exp(-1.5)),
    pytest.approx(math.exp(-2.0) + math.exp(-1.0)),
  ]


def test_probabilities_after_thoughts_are_clamped(lm, pairs_file):
  def sure_of_the_first(name):
    return (-0.01, -5.0) if 'order_1' in name else (-5.0, -0.01)

  turns, thinking = scripted(lm, pairs_file, sure_of_the_first, thoughts=8)
  assert thinking.probability == pytest.approx(0.6)
  assert {r.answer.text for r in thinking.readings} == {'Well.'}
  assert thinking.readings[0].answer.probability == pytest.approx(sigmoid(4.99))
  assert len(turns) == 6 and all(r.answer.is_cut for r in thinking.readings)
  # The thoughts continue the opening, and the label follows them in the same reply.
  dialogue = Dialogue(lm.tokenizer, 'chat', lm.eos_token_ids)
  assert dialogue.show(turns[0].context).endswith(f'assistant\n{THINK}')
  thought = turns[0].context[-3:]
  assert turns[1].context[: len(turns[0].context) + 3] == [*turns[0].context, *thought]
  assert dialogue.show(turns[1].context).endswith('\n\nThe answer is: (')
  _, free = scripted(lm, pairs_file, sure_of_the_first, thoughts=8, clamp=(0.0, 1.0))
  _, silent = scripted(lm, pairs_file, sure_of_the_first)
  assert free.probability == silent.probability == pytest.approx(sigmoid(4.99))
  turns, several = scripted(lm, pairs_file, sure_of_the_first, thoughts=8, samples=3)
  assert len(several.readings) == 6 and len({turn.name for turn in turns}) == 18


def test_a_killed_job_ends_with_the_same_bytes_and_asks_nothing_twice(
  lm, tmp_path, quick_compilation
):
  config = LabelConfig(responses=2, thoughts=4)
  job = make_job({'responses': lm, 'feedback': lm}, config)
  summary, rows = run(job, tmp_path / 'whole')
  assert summary['pairs'] == len(rows) == 4 and summary['sampling']['turns'] == 4 * (2 + 2 * 3)

  class KilledError(Exception):
    pass

  def kill(done, total, tokens):
    if done == 2:
      raise KilledError

  with pytest.raises(KilledError):
    run(job, tmp_path / 'killed', progress=kill)
  assert not (tmp_path / 'killed' / 'labels').exists()
  resumed, _ = run(job, tmp_path / 'killed')
  assert 0 < resumed['sampling']['turns'] < summary['sampling']['turns']
  for name in ('comparisons.jsonl', 'summary.json'):
    files = [(tmp_path / folder / 'labels' / name).read_bytes() for folder in ('whole', 'killed')]
    assert files[0] == files[1]
  again, _ = run(job, tmp_path / 'killed')
  assert again['sampling']['turns'] == 0


def test_several_responses_are_paired_as_stated(lm):
  rng = random.Random(0)
  assert PAIRINGS['all'](3, rng) == [(0, 1), (0, 2), (1, 2)]
  assert PAIRINGS['first'](3, rng) == [(0, 1), (0, 2)]
  drawn = {PAIRINGS['random'](3, rng)[0] for _ in range(50)}
  assert drawn == {(0, 1), (0, 2), (1, 2)}
  job = make_job({'responses': lm, 'feedback': lm}, LabelConfig(responses=3, pairs='first'))
  asked = []
  chain = job.chain(job.items[0])
  completion = None
  with contextlib.suppress(StopIteration):
    while True:
      turn = chain.send(completion)
      asked.append(turn.name)
      tokens = list(turn.labels) if isinstance(turn, LabelTurn) else [70 + len(asked)] * 3
      completion = Completion(tokens, '', [-1.0] * len(tokens), 'length')
  assert asked[:3] == ['initial', 'initial_candidate_2', 'initial_candidate_3']
  assert {name[:9] for name in asked[3:]} == {'label_1_2', 'label_1_3'}


def test_equal_and_empty_responses_are_counted_and_not_compared(lm):
  job = make_job({'responses': lm, 'feedback': lm}, LabelConfig(responses=2))
  turns, outcome = play(job.chain(job.items[0]), lambda name: (-1.0, -1.0))
  assert len(turns) == 2 and outcome.left_out == ('identical',) and not outcome.labels


def test_the_oracle_of_the_embedded_world_labels_its_pairs(tmp_path):
  config = LabelConfig(
    comparisons=(_tiny_pairs(tmp_path),), model='tiny-oracle', labelled=('tiny',), labelled_limit=5
  )
  job = make_job({}, config, judge=JUDGES['tiny-oracle'](None))
  summary, rows = run(job, tmp_path)
  assert summary['accuracy']['tiny'] | {'answers': None} == {
    'count': 5,
    'right': 5,
    'ties': 0,
    'accuracy': 1.0,
    'interval': [pytest.approx(0.5655, abs=1e-3), 1.0],
    'ended': 0,
    'answers': None,
  }
  assert len(rows) == 3 and summary['option_a'] == 0.5 and summary['consistent'] == 1.0
  assert rows[0]['probability'] == pytest.approx(sigmoid(10))


def _tiny_pairs(folder):
  rows = [{'id': str(i), **row} for i, row in enumerate(make_labelled(3))]
  return write_lines(folder / 'tiny.jsonl', rows)


# Served feedback models.


def served(running, **fields):
  address = {'url': running.url, 'model': 'served', 'tokenizer': FOLDER}
  quick = {'server': 'vllm', 'max_positions': 4096, 'backoff_seconds': 0.0, 'retries': 0}
  return RemoteConfig(**address | quick | fields)


def label_answer(body):
  """The answer of a server that applies biases, with a log-probability by the label."""
  content = complete(body, TOKENIZER)
  if 'logit_bias' in body:
    token = int(next(iter(body['logit_bias'])))
    content = complete(body, TOKENIZER, TOKENIZER.decode([token]))
    content['choices'][0]['token_ids'] = [token]
    value = -0.5 if TOKENIZER.decode([token]).strip() == 'A' else -1.5
    content['choices'][0]['logprobs'] = {'tokens': [''], 'token_logprobs': [value]}
  return respond(200, content)


def test_a_served_model_labels_by_token_ids(pairs_file, tmp_path):
  with serve(label_answer) as server:
    config = LabelConfig(comparisons=(pairs_file,), remote=served(server))
    with contextlib.closing(Remote(config.remote)) as remote:
      job = make_job({'feedback': remote}, config)
      (turns,) = job.test_turns().values()
      assert len(turns) == 2 and all(isinstance(turn, LabelTurn) for turn in turns)
      costs = []
      summary, rows = run(job, tmp_path, write_costs=costs.append)
      assert len(server.bodies) == 8 and all(isinstance(b['prompt'], list) for b in server.bodies)
      run(job, tmp_path)
      assert len(server.bodies) == 8  # nothing is asked twice
  assert summary['ties'] == 1.0 and summary['option_a'] == 1.0 and summary['consistent'] == 0.0
  assert rows[0]['readings'][0]['probability_a'] == pytest.approx(sigmoid(1))
  assert costs[0]['feedback'].answers == 8


def test_a_chat_gives_its_label_as_text_only(pairs_file, tmp_path):
  def answer(body):
    question = body['messages'][-1]['content']
    text = 'I cannot tell.'
    if 'rain' in question:
      is_first = question.index('No.') > question.index('I like')
      text = '(A)' if is_first else 'It is (B), the answer.'
    choice = {'index': 0, 'message': {'role': 'assistant', 'content': text}}
    usage = {'prompt_tokens': 9, 'completion_tokens': 3}
    return respond(200, {'choices': [choice | {'finish_reason': 'stop'}], 'usage': usage})

  with serve(answer) as server:
    config = LabelConfig(comparisons=(pairs_file,), remote=served(server, prompt='chat'))
    with contextlib.closing(Remote(config.remote)) as remote:
      with pytest.raises(UserError, match="needs log-probabilities .* Set label.verdict='text'"):
        make_job({'feedback': remote}, config)
      config = dataclasses.replace(config, verdict='text')
      summary, rows = run(make_job({'feedback': remote}, config), tmp_path)
  assert [row['probability'] for row in rows] == [1.0, 0.5]
  assert rows[0]['chosen'][0]['content'] == 'I like rain.'
  assert summary['unread'] == 0.5 and summary['ties'] == 0.5 and summary['label_mass'] is None


def test_a_server_whose_log_probabilities_follow_the_bias_is_refused(pairs_file):
  with serve(label_answer) as server:
    config = LabelConfig(comparisons=(pairs_file,), remote=served(server, server='sglang'))
    with contextlib.closing(Remote(config.remote)) as remote:
      with pytest.raises(UserError, match="label.remote: server='sglang'"):
        make_job({'feedback': remote}, config)


# Demonstrations.

PUBLISHED = {
  'prompt': '\n\nHuman: Who are you?\n\nAssistant: A program.\n\nHuman: Really?\n\nAssistant:',
  'corrects': ['Yes, really.'],
  'incorrects': ['No, I lied.'],
}
THINKING = (
  '\n\nHuman: Consider a conversation between a human (H) and an assistant (A):\n\n'
  'H: Who are you?\n\nA:  A program.\n\nH:  Really?\n\n{}\n (A) [[[No, I lied.]]]\n'
  " (B) [[[Yes, really.]]]\n\nAssistant: Let's think step by step:\n(A) admits a lie.\n\nSo no."
  '\n\nHuman:\nSo the answer is: (B)'
)
OURS = {'prompt': 'Who?', 'chosen': 'I.', 'rejected': 'You.', 'thoughts': 'I am I.'}


def demonstrated(lm, path, thoughts=0):
  """Return what precedes a question, as (question, answer) pairs."""
  config = LabelConfig(comparisons=(), responses=2, demonstrations=str(path), thoughts=thoughts)
  job = make_job({'responses': lm, 'feedback': lm}, config)
  model = FeedbackModel(
    Stage('feedback', Dialogue(lm.tokenizer), SHORT), 'logprobs', thoughts, job.demonstrations
  )
  return [
    tuple(message['content'] for message in model._demonstrate(d, PRINCIPLES[0], ''))
    for d in model.demonstrations
  ]


def test_demonstrations_of_each_form_precede_the_question(lm, tmp_path):
  path = tmp_path / 'demonstrations.json'
  path.write_text(json.dumps([PUBLISHED, PUBLISHED]))
  (first, answer), (second, other) = demonstrated(lm, path)
  assert 'Human: Really?\n\nChoose the kinder one. Options:\n (A) Yes, really.\n (B) No, I' in first
  assert 'Human: Who are you?\n\nAssistant: A program.' in first
  assert ' (A) No, I lied.\n (B) Yes, really.' in second
  assert (answer, other) == ('The answer is: (A)', 'The answer is: (B)')
  path.write_text(json.dumps([{'prompt': THINKING}]))
  ((question, answer),) = demonstrated(lm, path, thoughts=8)
  assert ' (A) No, I lied.\n (B) Yes, really.' in question
  assert answer == f'{THINK} (A) admits a lie.\n\nSo no.\n\nThe answer is: (B)'
  path.write_text(json.dumps(OURS) + '\n' + json.dumps(OURS | {'principle': 'Choose I.'}))
  assert [q.partition('\n\n')[2].count('Choose I.') for q, _ in demonstrated(lm, path)] == [0, 1]


@pytest.mark.parametrize(
  ('content', 'thoughts', 'message'),
  [
    ('', 0, 'has no demonstration'),
    ('{', 0, 'neither a JSON list nor JSON Lines'),
    ('[3]', 0, 'demonstration 1: it must be an object'),
    ('{"prompt": "Who?", "chosen": "I."}', 0, "demonstration 1: it has no 'rejected'"),
    ('[{"prompt": "Human: a"}]', 0, 'demonstration 1: a text must have a conversation'),
    (json.dumps([PUBLISHED | {'corrects': []}]), 0, "'corrects' must be a list of one text"),
    (json.dumps(OURS | {'rejected': ' '}), 0, 'rejected must be non-blank text'),
    (json.dumps([PUBLISHED]), 8, 'demonstration 1 has no thoughts, but label.thoughts=8'),
  ],
)
def test_wrong_demonstrations_are_refused_by_number(lm, tmp_path, content, thoughts, message):
  path = tmp_path / 'demonstrations.json'
  path.write_text(content)
  with pytest.raises(UserError, match=message):
    demonstrated(lm, path, thoughts)


# Settings.


@pytest.mark.parametrize(
  ('fields', 'message'),
  [
    ({'responses': 1}, 'responses=1 must be 0, or between 2 and'),
    ({'pairs': 'some'}, "pairs='some' must be one of"),
    ({'clamp': (0.6, 0.4)}, 'clamp=.* must be two numbers in'),
    ({'verdict': 'guess'}, "verdict='guess' must be one of"),
    ({'model': ''}, "model='' names no feedback model"),
    ({'form': 'odd'}, "form='odd' must be one of"),
    ({'responses': 2, 'comparisons': ('x',)}, 'Set one of them'),
    ({'samples': 2}, 'would ask the same question 2 times'),
    ({'labelled_limit': 0}, 'labelled_limit=0 must be'),
  ],
)
def test_wrong_settings_are_refused(fields, message):
  with pytest.raises(UserError, match=f'label: .*{message}'):
    LabelConfig(**fields)


@pytest.mark.parametrize(
  ('fields', 'changes', 'message'),
  [
    ({}, {}, 'nothing to label'),
    ({'responses': 2}, {'prompts': []}, 'no prompt to sample responses to'),
    ({'responses': 2}, {'prompts': [PROMPTS[0]] * 2}, "two prompts have the id 'id-0'"),
    ({'responses': 2}, {'sampling': SamplingConfig(temperature=0)}, 'would be equal'),
    ({'responses': 2, 'principles': 3}, {}, '3 rounds without repetition|principles'),
    (
      {'responses': 2},
      {'sampling': SamplingConfig(max_tokens=1500)},
      r'can reach \d+ tokens, but random holds 2048',
    ),
  ],
)
def test_what_cannot_be_labelled_is_refused_before_work(lm, fields, changes, message):
  with pytest.raises(UserError, match=message):
    make_job({'responses': lm, 'feedback': lm}, LabelConfig(**fields), **changes)


def test_the_digest_covers_what_labels_depend_on(lm, tmp_path, pairs_file):
  base = LabelConfig(comparisons=(pairs_file,))

  def digest(config=base, constitution=CONSTITUTION):
    job = check_label({'feedback': lm}, [], constitution, config, FeedbackConfig(), SHORT, 0)
    return job.digest()

  copied = tmp_path / 'copy.jsonl'
  copied.write_bytes((tmp_path / 'pairs.jsonl').read_bytes())
  assert digest(dataclasses.replace(base, comparisons=(str(copied),))) == digest()
  other = dataclasses.replace(PRINCIPLES[0], comparison_request='Choose one.')
  others = [
    digest(constitution=Constitution((other, PRINCIPLES[1]))),
    digest(dataclasses.replace(base, thoughts=4)),
    digest(dataclasses.replace(base, principles=2)),
  ]
  copied.write_text(copied.read_text().replace('rain', 'snow'))
  others.append(digest(dataclasses.replace(base, comparisons=(str(copied),))))
  assert len({digest(), *others}) == 5


def test_the_published_hhh_questions_are_comparisons(data_dir, tmp_path):
  path = data_dir('cai_paper') / 'evals' / '438HHHEvaluations.jsonl'
  pairs = read_comparisons(path, 'hhh')
  assert pairs.counts == {'rows': 438, 'kept': 438, 'dropped': {}}
  row = json.loads(path.read_text().splitlines()[0])
  first = next(iter(pairs))
  assert row['text_correct'].endswith(first.chosen) and first.better == 0
  broken = write_lines(tmp_path / 'broken.jsonl', [row | {'text_correct': 3}])
  with pytest.raises(UserError, match='line 1: .*needs the text text_correct'):
    read_comparisons(broken, 'hhh')
