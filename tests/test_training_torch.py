"""Ten training steps against the same objective written in plain torch and transformers."""

import jax
import numpy as np
import pytest
import torch
import transformers

from cai_jax.data import packing
from cai_jax.data.examples import Example
from cai_jax.model import lm as lm_lib
from cai_jax.model.transformer import abstract_model
from cai_jax.runtime.mesh import batch_sharding, make_mesh
from cai_jax.training.config import TrainConfig
from cai_jax.training.state import init_state
from cai_jax.training.step import make_eval_step, make_train_step, place_batch

CONFIG = TrainConfig(
  attention='blocks',
  batch_size=6,
  max_length=48,
  learning_rate=3e-3,
  schedule='linear',
  warmup=0.3,
  weight_decay=0.1,
  clip_norm=7.5,  # between the norms of the ten steps
)
STEPS = 10


def torch_losses(folder, batches):
  """Return -1/N Σ log P(y_i | x_i) before each step of clipped AdamW, on right-padded examples."""
  model = transformers.AutoModelForCausalLM.from_pretrained(folder).float()
  decayed = [p for p in model.parameters() if p.ndim == 2]
  others = [p for p in model.parameters() if p.ndim != 2]
  groups = [
    {'params': decayed, 'weight_decay': CONFIG.weight_decay},
    {'params': others, 'weight_decay': 0.0},
  ]
  options = dict(lr=CONFIG.learning_rate, betas=(CONFIG.b1, CONFIG.b2), eps=CONFIG.eps)
  optimizer = torch.optim.AdamW(groups, **options)
  warmup = round(CONFIG.warmup * STEPS)
  losses, clipped = [], 0
  for number, examples in enumerate(batches):
    rate = min((number + 1) / (warmup + 1), (STEPS - number) / (STEPS - warmup))
    for group in optimizer.param_groups:
      group['lr'] = CONFIG.learning_rate * rate
    longest = max(len(e.tokens) for e in examples)
    tokens = np.zeros((len(examples), longest), np.int64)
    labels = np.full((len(examples), longest), -100)
    seen = np.zeros((len(examples), longest), np.int64)
    for row, e in enumerate(examples):
      n = len(e.tokens)
      tokens[row, :n], seen[row, :n] = e.tokens, 1
      labels[row, :n] = np.where(e.loss_mask, e.tokens, -100)
    logits = model(torch.tensor(tokens), attention_mask=torch.tensor(seen)).logits[:, :-1]
    nll = torch.nn.functional.cross_entropy(
      logits.reshape(-1, logits.shape[-1]),
      torch.tensor(labels[:, 1:]).reshape(-1),
      ignore_index=-100,
      reduction='sum',
    )
    loss = nll / len(examples)
    optimizer.zero_grad()
    loss.backward()
    tokens_per_sequence = (labels[:, 1:] >= 0).sum() / len(examples)
    limit = CONFIG.clip_norm * tokens_per_sequence  # which is the norm per token
    norm = float(torch.nn.utils.clip_grad_norm_(model.parameters(), limit))
    clipped += norm > limit
    optimizer.step()
    losses.append(float(loss.detach()))
  assert 0 < clipped < STEPS  # so both cases are compared
  return losses


@pytest.mark.parametrize('family', ['llama3', 'qwen2'])
def test_ten_losses_agree_with_torch(tiny_hf_folder, family):
  folder = tiny_hf_folder(family)
  rng = np.random.default_rng(0)
  examples = [
    Example(rng.integers(4, 300, n).astype(np.int32), np.arange(n) >= n // 2)
    for n in rng.integers(8, 40, 110)
  ]
  plan = packing.plan([len(e.tokens) for e in examples], [packing.Bucket(48, 6)], 1, 0)
  assert len(plan) >= STEPS
  mesh = make_mesh(devices=jax.devices()[:1])
  lm = lm_lib.load(folder, mesh=mesh)
  graph, shapes = abstract_model(lm.config)
  train_step = make_train_step(graph, shapes, CONFIG, STEPS, mesh)
  state, batches, ours = init_state(lm.params, CONFIG, mesh), packing.Batches(examples, plan), []
  for i in range(STEPS):
    state, metrics = train_step(state, place_batch(batches[i], batch_sharding(mesh)))
    ours.append(float(metrics['loss']))
  step_examples = [[examples[i] for row in s.rows for i in row] for s in plan[:STEPS]]
  theirs = torch_losses(folder, step_examples)
  np.testing.assert_allclose(ours, theirs, rtol=1e-4)
  eval_step = make_eval_step(graph, CONFIG, mesh)
  last = eval_step(lm.params, None, place_batch(batches[STEPS - 1], batch_sharding(mesh)))
  untrained = float(last['loss_sum'] / last['num_sequences'])
  assert abs(ours[-1] / untrained - 1) > 0.02  # so a wrong update would show
