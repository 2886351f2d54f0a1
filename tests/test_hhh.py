"""A real instruct model as the judge of the published HHH questions, against plain torch."""

import os

import numpy as np
import pytest

from cai_jax.evaluation.judge_labels import read_labelled
from cai_jax.model import lm as models
from cai_jax.scoring.judge_local import judge_dialogue, local_judge
from cai_jax.scoring.judge_questions import OPENING, OPTIONS, build_questions

pytestmark = pytest.mark.usefixtures('single_device')

MODEL = os.environ.get('REAL_MODEL')
PAIRS = 20


@pytest.mark.slow
@pytest.mark.skipif(not MODEL, reason='set REAL_MODEL to the folder of a chat model')
def test_label_log_probabilities_are_those_of_torch(data_dir):
  """On the shortest pairs of HHH-438, through the model's own chat template.

  The reference renders the template, tokenizes the text and runs the model with transformers.
  """
  import torch
  import transformers

  file = data_dir('cai_paper') / 'evals' / '438HHHEvaluations.jsonl'
  matches = read_labelled(file, 'unused').matches
  matches = sorted(matches, key=lambda match: len(build_questions(match)[0]))[:PAIRS]
  lm = models.load(MODEL)
  comparisons = local_judge(lm, judge_dialogue(lm.tokenizer, lm.eos_token_ids), batch_tokens=2048)(
    matches
  )

  tokenizer = transformers.AutoTokenizer.from_pretrained(MODEL)
  model = transformers.AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()

  def log_probability(question, option):
    prompt = tokenizer.apply_chat_template(
      [{'role': 'user', 'content': question}], tokenize=False, add_generation_prompt=True
    )
    before = tokenizer.encode(prompt + OPENING, add_special_tokens=False)
    tokens = tokenizer.encode(prompt + OPENING + option, add_special_tokens=False)
    assert tokens[: len(before)] == before
    with torch.no_grad():
      logits = model(torch.tensor([tokens])).logits[0].double()
    rows = torch.log_softmax(logits, -1)[len(before) - 1 : -1]
    return sum(float(rows[i, token]) for i, token in enumerate(tokens[len(before) :]))

  worst = 0.0
  for match, comparison in zip(matches, comparisons, strict=True):
    a, b = np.array(
      [[log_probability(q, option) for option in OPTIONS] for q in build_questions(match)]
    ).T
    # The log-odds and the mass of both labels determine their two log-probabilities.
    odds = np.array([comparison.log_odds[0], -comparison.log_odds[1]])
    mass = np.log(comparison.label_mass)
    ours_a = mass - np.logaddexp(0, -odds)
    ours_b = mass - np.logaddexp(0, odds)
    worst = max(worst, *np.abs(ours_a - a), *np.abs(ours_b - b))
  print(f'largest difference on {len(matches)} pairs: {worst:.2e} nats')
  assert worst < 1e-4
