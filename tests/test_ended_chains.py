"""Chains that a sampled reply makes impossible: they end with a reason, and the run goes on."""

import copy
import itertools

import pytest
import tensorflow_datasets as tfds

from cai_jax.data.d_cai import check_files, read_rows
from cai_jax.data.ended import describe_ended, read_ended, write_ended
from cai_jax.data.prompts import Prompt
from cai_jax.feedback.chain import Record
from cai_jax.feedback.contexts import render_prompt
from cai_jax.feedback.generate import finish_dataset, generate_shards
from cai_jax.feedback.stage import ChainEnded
from cai_jax.runtime.errors import UserError
from cai_jax.sampling.engine import Engine
from cai_jax.sampling.journal import Journal
from cai_jax.sampling.types import Completion
from tests.feedback_setup import ENGINE, make_job, make_lm, shard_bytes

# Rejects some replies, but not the texts with which a template is tried before the run.
PICKY = (
  "{% if 'What is wrong' in messages[-1].content and "
  "messages[1].content.strip() != 'a a a a a a a' and "
  "messages[1].content[:1] < BOUND %}{{ raise_exception('no such reply') }}{% endif %}"
  "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
  "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def picky_lm(tiny_tokenizer, bound):
  tokenizer = copy.deepcopy(tiny_tokenizer)
  tokenizer.chat_template = PICKY.replace('BOUND', repr(bound))
  return make_lm(tokenizer)


def generate(job, folder, journal):
  counts = generate_shards(job, folder, Journal(journal), ENGINE)
  finish_dataset(job, folder)
  return counts


def test_ended_chains_leave_no_row_and_are_recorded(tiny_tokenizer, tmp_path):
  job = make_job(picky_lm(tiny_tokenizer, 'a'), rounds=1)
  counts = generate(job, tmp_path / 'a' / 'd_cai', tmp_path / 'journal')
  folder = tmp_path / 'a' / 'd_cai'
  ended, rows = read_ended(folder), read_rows(folder)
  assert 0 < len(ended) < 8 and counts['rows'] == len(ended) + len(rows) == 8
  builder = tfds.builder_from_directory(folder)
  assert builder.info.splits['train'].num_examples == len(rows)
  assert {row['id'] for row in rows}.isdisjoint(entry['id'] for entry in ended)
  for entry in ended:
    assert entry['kind'] == 'harmful' and entry['turn'] == 'critique_1'
    assert 'no such reply' in entry['reason']
  text = describe_ended(folder, 8)
  assert text.startswith(f'{len(ended)} of 8 chains ended') and 'no such reply' in text
  check_files(folder)

  # The journal replays to the same bytes, whatever was there before.
  again = tmp_path / 'b' / 'd_cai'
  generate_shards(job, again, Journal(tmp_path / 'journal'), ENGINE)
  for path in again.glob('*-00001*'):
    path.unlink()
  write_ended(again, 2, [{'id': 'x', 'kind': '', 'turn': '', 'reason': ''}])
  next(again.glob('*.array_record-00002')).unlink()
  counts = generate(job, again, tmp_path / 'journal')
  assert counts['turns'] == 0
  assert shard_bytes(again) == shard_bytes(folder) and read_ended(again) == ended
  assert [row['id'] for row in read_rows(again)] == [row['id'] for row in rows]


def test_a_job_whose_chains_all_end_says_why(tiny_tokenizer, tmp_path):
  job = make_job(picky_lm(tiny_tokenizer, chr(0x10FFFF)), num_helpful=0, rounds=1)
  with pytest.raises(UserError, match="No row remains. 6 of 6 chains .* 'critique_1'.*such reply"):
    generate(job, tmp_path / 'd_cai', tmp_path / 'journal')


def scripted(job, *completions):
  """Run the first chain of a job on completions; return its result."""
  chain, completion = job.chain(*job.prompts[0]), None
  for given in completions:
    chain.send(completion)
    completion = given
  with pytest.raises(StopIteration) as stop:
    chain.send(completion)
  return stop.value.value


def test_withheld_replies_and_broken_text_end_a_chain(tiny_tokenizer):
  job = make_job(make_lm(tiny_tokenizer), rounds=1)
  good = Completion(tiny_tokenizer.encode('ok'), 'ok', [-1.0], 'stop')
  assert isinstance(scripted(job, good, good, good), Record)
  with pytest.raises(ChainEnded, match="'critique_1': The server withheld") as caught:
    scripted(job, good, Completion([], '', [], 'content_filter'))
  assert caught.value.turn == 'critique_1'
  with pytest.raises(ChainEnded, match='unpaired surrogate'):
    scripted(job, Completion([5], 'a \ud800', [-1.0], 'stop_text'))


def test_a_context_that_outgrows_the_cache_ends_its_chain(tiny_tokenizer):
  lm = make_lm(tiny_tokenizer)
  for variant in ('critique', 'shuffled'):
    job = make_job(lm, rounds=1, variant=variant)

    def ended(prompt, kind, job=job):
      try:
        return (yield from job.chain(prompt, kind))
      except ChainEnded as end:
        return end

    prompt = job.prompts[0]
    engine = Engine({'base': lm}, length=64, seed=0, config=ENGINE)
    ((_, result),) = engine.run([('x', ended(*prompt))])
    assert isinstance(result, ChainEnded) and 'do not fit into a cache' in result.reason
    assert result.turn == {'critique': 'revision_1', 'shuffled': 'donor_revision_1'}[variant]


def test_a_template_that_rejects_every_chain_is_refused_before_sampling(tiny_tokenizer):
  tokenizer = copy.deepcopy(tiny_tokenizer)
  rejects = "{% if messages|length > 3 %}{{ raise_exception('too many') }}{% endif %}"
  tokenizer.chat_template = rejects + PICKY.replace('BOUND', repr(''))
  with pytest.raises(UserError, match="prompt 'id-.'.* cannot be sampled.*'revision_1'.*too many"):
    make_job(make_lm(tokenizer), rounds=1)


def test_a_prompt_that_the_template_rejects_is_named_by_its_row(tiny_tokenizer):
  tokenizer = copy.deepcopy(tiny_tokenizer)
  rejects = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
  tokenizer.chat_template = rejects + PICKY.replace('BOUND', repr(''))
  job = make_job(make_lm(tokenizer), rounds=1)
  system = {'role': 'system', 'content': 'Be kind.'}
  messages = (system, {'role': 'user', 'content': 'Why?'})
  prompt = Prompt('0f3a', messages, place='prompts.jsonl, line 3')
  with pytest.raises(UserError, match=r'^prompts.jsonl, line 3: .*system, user: no system'):
    render_prompt(job.stages.initial.dialogue, prompt)


def test_a_damaged_file_of_ended_chains_is_an_error(tmp_path):
  entry = {'id': 'a', 'kind': 'harmful', 'turn': 'initial', 'reason': 'why'}
  write_ended(tmp_path, 0, [entry, entry])
  assert read_ended(tmp_path) == read_ended(tmp_path, 0) == [entry, entry]
  path = tmp_path / 'ended-00000.jsonl'
  whole = path.read_bytes()
  for text, line in itertools.product((b'{', b'[1]', b'\xff', b'{"id": 1}'), (0, 1)):
    lines = whole.splitlines()
    lines[line] = text
    path.write_bytes(b'\n'.join(lines))
    with pytest.raises(UserError, match=f'ended-00000.jsonl, line {line + 1} is damaged'):
      read_ended(tmp_path)
  write_ended(tmp_path, 0, [])
  assert read_ended(tmp_path) == [] and not path.exists()
