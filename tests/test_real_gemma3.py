"""A real Gemma 3 against torch: logits, greedy tokens, its export, and texts beyond its window.

REAL_GEMMA3 names the folder of google/gemma-3-270m, which has windows of 512 tokens.
"""

import os
import pathlib

import jax
import numpy as np
import pytest

import cai_jax
from cai_jax.runtime.mesh import make_mesh
from cai_jax.sampling.config import EngineConfig
from cai_jax.sampling.engine import Engine
from cai_jax.sampling.types import SamplingConfig, Turn

MODEL = os.environ.get('REAL_GEMMA3')
DOCS = pathlib.Path(__file__).parents[1] / 'docs'
TEXTS = 20
LENGTH = 600  # tokens of a text; the windows have 512
NEW_TOKENS = 64

pytestmark = [
  pytest.mark.slow,
  pytest.mark.skipif(not MODEL, reason='set REAL_GEMMA3 to the folder of google/gemma-3-270m'),
]


def load_torch(folder):
  import torch
  import transformers

  return transformers.AutoModelForCausalLM.from_pretrained(
    folder, dtype=torch.float32, attn_implementation='eager'
  ).eval()


def torch_logits(model, tokens):
  """Return torch's logits f32[T,V] of one text."""
  import torch

  with torch.no_grad():
    return model(torch.tensor([tokens])).logits[0].numpy()


@pytest.fixture(scope='module')
def lm():
  return cai_jax.load(MODEL, dtype='float32', mesh=make_mesh(devices=jax.devices()[:1]))


@pytest.fixture(scope='module')
def reference():
  return load_torch(MODEL)


@pytest.fixture(scope='module')
def texts(lm):
  """Tokens of 20 parts of the documentation."""
  pages = '\n'.join(path.read_text(encoding='utf-8') for path in sorted(DOCS.glob('*.md')))
  ids = lm.tokenizer.encode(pages, add_special_tokens=False)
  assert len(ids) >= TEXTS * LENGTH
  starts = np.linspace(0, len(ids) - LENGTH, TEXTS).astype(int)
  return [[lm.tokenizer.bos_token_id, *ids[start : start + LENGTH - 1]] for start in starts]


def log_probabilities(logits, tokens):
  """Return the log-probability f64[T-1] of each token after the first."""
  logits = np.asarray(logits[:-1])
  top = logits.max(-1)
  total = np.exp(logits - top[:, None]).sum(-1, dtype=np.float64)
  return logits[np.arange(len(logits)), tokens[1:]] - top - np.log(total)


def test_log_probabilities_of_texts_beyond_the_window_agree_with_torch(lm, reference, texts):
  assert LENGTH > max(window for window in lm.config.windows if window)
  worst = relative = 0.0
  for tokens in texts:
    ours = np.asarray(lm.logits(np.array([tokens])))[0]
    theirs = torch_logits(reference, tokens)
    relative = max(relative, np.abs(ours - theirs).max() / np.abs(theirs).max())
    difference = log_probabilities(ours, tokens) - log_probabilities(theirs, tokens)
    worst = max(worst, np.abs(difference).max())
  print(f'largest difference: {worst:.2e} nats; of logits, {relative:.2e} of the largest')
  assert worst < 1e-3
  assert relative < 1e-4


def test_greedy_tokens_agree_with_torch(lm, reference, texts):
  """After a short context, and after one that is longer than the window."""
  contexts = [texts[0][:20], texts[1]]
  greedy = SamplingConfig(temperature=0.0, max_tokens=NEW_TOKENS)

  def chain(context):
    return (yield Turn('reply', context, greedy))

  sizes = dict(slots=2, prefill_tokens=256, prefill_width=64, page_tokens=64, cache_gib=1.0)
  engine = Engine(
    {'base': lm}, length=LENGTH + NEW_TOKENS + 1, seed=0, config=EngineConfig(**sizes)
  )
  chains = [(str(i), chain(context)) for i, context in enumerate(contexts)]
  completions = [completion for _, completion in sorted(engine.run(chains))]
  assert len(completions) == len(contexts)
  for context, completion in zip(contexts, completions, strict=True):
    assert len(completion.tokens) == NEW_TOKENS
    logits = torch_logits(reference, context + completion.tokens)[len(context) - 1 : -1]
    assert completion.tokens == logits.argmax(-1).tolist()


def test_the_export_has_the_same_logits_in_torch(lm, reference, texts, tmp_path):
  cai_jax.save(lm, tmp_path / 'out')
  tokens = texts[0][:40]
  again = torch_logits(load_torch(tmp_path / 'out'), tokens)
  np.testing.assert_array_equal(again, torch_logits(reference, tokens))
