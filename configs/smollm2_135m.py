"""Critique, revision and fine-tuning of SmolLM2-135M-Instruct, a real chat model, on two CPU cores.

Command:   python launch.py --config=configs/smollm2_135m.py --workdir=runs/smollm2 \\
             --config.model.base=smollm2 --config.prompts.harmful.source=harmful.jsonl \\
             --config.prompts.eval_harmful.source=held_out.jsonl
Model:     a folder with the model, or its hub name
Prompts:   for example 28 and 20 rows of HH-RLHF's red-team dialogues (harmless-base), whose last
           answers are left out. Take short ones: a prompt of 200 tokens is read in every turn
Hardware:  two CPU cores and 7 GB; 12 minutes of CPU time, 21 to 24 minutes on cores that other jobs
           shared
Expected:  revisions that are worthless: about two thirds are off topic. The report says so first
           (RESULTS.md, "a real model"). Use this config to try the pipeline, not the method
"""

import pathlib

from configs import default

_PROMPTS = pathlib.Path(__file__).parent / 'prompts'


def get_config():
  """Return the config of a run that two cores finish in about 10 minutes."""
  config = default.get_config()
  config.model.base = 'HuggingFaceTB/SmolLM2-135M-Instruct'
  # In float32, texts do not depend on batch mates. bfloat16 is about 1.2 times as fast.
  config.model.dtype = 'float32'
  config.constitution.path = 'general'
  # A model of this size copies the demonstrations, and reading them takes longer than replying.
  config.feedback.demonstrations = False
  config.feedback.rounds = 2
  # A model of this size exceeds these limits. They would end the run before it trains; the report
  # says first what is wrong with such a run.
  config.feedback.max_rate.update(truncated=1.0, off_topic_words=1.0, off_topic=1.0)

  # 28 chains of five turns to learn from, and 20 to evaluate. Most of the time is sampling.
  config.prompts.harmful.update(source='harmful.jsonl', limit=28)
  config.prompts.eval_harmful.update(source='held_out.jsonl', limit=20)
  config.prompts.helpful.source = str(_PROMPTS / 'helpful.txt')
  config.prompts.eval_helpful.source = str(_PROMPTS / 'held_out_helpful.txt')
  config.feedback.helpful_samples = 2  # 24 responses, of which about a third are not cut

  # The publisher recommends temperature 0.2 and top-p 0.9 (model card of SmolLM2-135M-Instruct);
  # generation_config.json states neither. At temperature 1 without a filter, the model writes
  # word salad. In a few chains that we read, temperature 0.2 without a penalty copied the critique
  # into the revision, and temperature 0.5 with a penalty of 1.15 lost the topic.
  for stage in config.sampling.values():
    stage.update(temperature=0.3, top_p=0.9, repetition_penalty=1.1)
  config.sampling.initial.max_tokens = 128  # with 96, about half of the replies were cut
  config.sampling.critique.max_tokens = 64
  config.sampling.revision.max_tokens = 192  # with 128, 62 % were cut, and those are not learned

  config.train.max_length = 512
  config.train.batch_size = 2  # rows of 512 tokens, about five examples
  config.train.epochs = 2  # one epoch has too few steps to change the model
  config.train.helpfulness_share = 0.2  # so that the model does not learn to refuse everything
  config.train.learning_rate = 2e-5
  config.train.warmup = 0.1

  # No judge, because this model cannot tell: on the published HHH pairs it was right in 47.7 %
  # [43.1, 52.4], and gave the two labels 34 % of the probability.
  config.evaluation.scores = ('refused', 'off_topic', 'looping', 'changed', 'truncated', 'kl')
  return config
