"""Jobs, scripted chains and runs that the tests of the method's variants share."""

import dataclasses
import pathlib

from cai_jax import pipeline
from cai_jax.dialogue import Dialogue
from cai_jax.experiment import define
from cai_jax.feedback import job as jobs
from cai_jax.feedback.chain import Stages
from cai_jax.feedback.config import FeedbackConfig, build_options
from cai_jax.feedback.score import Score
from cai_jax.feedback.stage import Stage
from cai_jax.feedback.variants import VARIANTS
from cai_jax.sampling.types import Completion, LabelTurn
from tests.feedback_setup import CONSTITUTION, PRINCIPLES, SAMPLING, SHORT, make_prompt

ROOT = pathlib.Path(__file__).resolve().parents[1]
SECTIONS = tuple((p.id, f'# {p.id}\n\nBe good ({p.id}).') for p in PRINCIPLES)
DOCUMENT = dataclasses.replace(CONSTITUTION, sections=SECTIONS)
ALL = sorted(VARIANTS)
OPTIONS = {
  'best_critique': (('n', 2),),
  'best_revision': (('n', 3),),
  'debate': (('statements', 4), ('second_critic', 'revision')),
  'if_needed': (('decide', 'labels'),),
  'several_critiques': (('n', 2),),
}


def make_job(lm, variant, options=(), rounds=2, num_harmful=3, rater=None, **config):
  return jobs.prepare(
    {'base': lm},
    [make_prompt(i) for i in range(num_harmful)],
    [make_prompt(100)],
    DOCUMENT,
    FeedbackConfig(rounds=rounds, shard_rows=2, variant=variant, options=options, **config),
    SAMPLING,
    seed=0,
    rater=rater,
  )


def make_stages(lm):
  stage = Stage('base', Dialogue(lm.tokenizer, 'chat', lm.eos_token_ids), SHORT)
  return Stages(stage, stage, stage)


def context_of(lm, turn):
  return lm.tokenizer.decode(turn.context)


def run_chain(stages, variant, replies, options=(), rounds=1, labels=(), ratings=(), strict=True):
  """Run a chain on scripted replies, labels and ratings; return what it yields and its record."""
  entry, labels, ratings = VARIANTS[variant], list(labels), list(ratings)
  extra = {
    name: dataclasses.replace(stages.critique, sampling=added.sampling(SHORT))
    for name, added in entry.stages.items()
  }
  inputs = entry.inputs(
    options=build_options(variant, options), constitution=DOCUMENT, donor=make_prompt(1)
  )
  chain = entry.chain(
    make_prompt(0), PRINCIPLES[:rounds], dataclasses.replace(stages, extra=extra), False, **inputs
  )
  yielded, answer, replies = [], None, list(replies)
  while True:
    try:
      item = chain.send(answer)
    except StopIteration as stop:
      assert not (strict and (replies or labels or ratings)), 'every scripted answer is used'
      return yielded, stop.value
    yielded.append(item)
    if isinstance(item, Score):
      answer = ratings.pop(0)
    elif isinstance(item, LabelTurn):
      index, logprob = labels.pop(0)
      answer = Completion([item.labels[index]], '', [logprob], 'length')
    else:
      text = replies.pop(0)
      tokens = stages.initial.dialogue.reply(text)
      tokens = tokens if strict else tokens[: SHORT.max_tokens]
      answer = Completion(tokens, text, [-0.5] * len(tokens), 'stop')


def build_run(tmp_path, **changes):
  fields = {name.replace('__', '.'): value for name, value in changes.items()}
  fields |= {'prompts.harmful.limit': 4, 'prompts.helpful.limit': 2}
  return pipeline.build(
    define.override_config(define.load_config('configs/tiny.py'), fields), tmp_path
  )
