"""Steps of preference training on the same units, with our train step and in plain PyTorch."""

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers

import cai_jax
from cai_jax.data import packing
from cai_jax.model.classifier import save_classifier
from cai_jax.model.sharding import flatten_params
from cai_jax.runtime.mesh import batch_sharding, make_mesh
from cai_jax.training import reward_model
from cai_jax.training.prefer_config import PreferConfig
from cai_jax.training.state import init_state
from cai_jax.training.step import make_train_step, place_batch
from cai_jax.training.trainable import divide_model
from tests import preference_oracles as oracles
from tests.families import load_in_torch, make_config, randomize
from tests.preference_setup import random_units

# Adam divides a tiny gradient by its own size, which would turn rounding errors into whole steps.
# A larger eps keeps them small, so parameters can be compared.
CONFIG = PreferConfig(
  attention='blocks',
  batch_size=8,
  max_length=48,
  learning_rate=3e-4,
  schedule='constant',
  warmup=0.0,
  eps=0.1,
  clip_norm=0.0,
)
ADAM = dict(lr=CONFIG.learning_rate, betas=(CONFIG.b1, CONFIG.b2), eps=CONFIG.eps)


def save_model(folder, tokenizer):
  """Save a random model of one layer as a Hugging Face folder."""
  shape = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=1)
  config = make_config('smollm2', **shape, bos_token_id=None, eos_token_id=2, pad_token_id=0)
  model = transformers.AutoModelForCausalLM.from_config(config).float()
  randomize(model, 0)
  model.save_pretrained(folder)
  tokenizer.save_pretrained(folder)


def make_units(count, **values):
  """Return random units without the tokens below 4.

  In transformers, the embedding of the padding token, which is 0, gets no gradient.
  """
  units = random_units(count, vocab_size=300, **values)
  clip = lambda segment: segment._replace(tokens=np.maximum(segment.tokens, 4))  # noqa: E731
  return [unit._replace(segments=tuple(map(clip, unit.segments))) for unit in units]


def one_device():
  """Return a mesh of one device."""
  return make_mesh(1, devices=jax.devices()[:1])


def load(folder):
  """Load a model on one device."""
  return cai_jax.load(folder, mesh=one_device())


def save_reward_model(folder, source):
  """Save a reward model of a language model's folder, with scores of the size of 1."""
  start = reward_model.add_head(load(source), 0).classifier
  save_classifier(start._replace(score=50 * start.score), folder)


def load_reward_model(folder):
  """Load what the training of a reward model starts from, on one device."""
  return reward_model.load_start(folder, one_device(), 0).lm


def with_margins(units):
  """Return the units with a random margin of either sign."""
  margins = np.random.default_rng(3).normal(size=len(units)).tolist()
  return [
    unit._replace(values={**unit.values, 'margin': (m, -m)})
    for unit, m in zip(units, margins, strict=True)
  ]


def train(lm, units, plan, config):
  """Return the losses and gradient norms of our steps, and the parameters after the last one.

  Args:
    lm: the initial model.
    units: the units that the plan's indices refer to.
    plan: the steps.
    config: settings of the training.
  """
  divided = divide_model(lm.config, lm.params, config, lm.mesh)
  step = make_train_step(divided.graph, divided.params, config, len(plan), lm.mesh)
  batches = packing.Batches(units, plan)
  state = init_state(jax.tree.map(jnp.copy, divided.params), config, lm.mesh)
  losses, norms = [], []
  for i in range(len(plan)):
    state, metrics = step(state, place_batch(batches[i], batch_sharding(lm.mesh)))
    losses.append(float(metrics['loss']))
    norms.append(float(metrics['grad_norm']))
  return losses, norms, jax.device_get(flatten_params(state.params))


def pad_right(segments):
  """Return tokens, real tokens and tokens to learn of sequences, i64[N,T] each."""
  longest = max(len(s.tokens) for s in segments)
  arrays = np.zeros((3, len(segments), longest), np.int64)
  for row, segment in enumerate(segments):
    end = len(segment.tokens)
    for array, values in zip(arrays, (segment.tokens, 1, segment.loss_mask), strict=True):
      array[row, :end] = values
  return map(torch.tensor, arrays)


def sequence_logprobs(model, segments):
  """Return Σ log P of the tokens to learn of each sequence, f32[N], and their numbers."""
  tokens, real, learned = pad_right(segments)
  logits = model(tokens, attention_mask=real).logits[:, :-1]
  logprobs = logits.log_softmax(-1).gather(-1, tokens[:, 1:, None])[..., 0]
  learned = learned[:, 1:]
  return (logprobs * learned).sum(1), learned.sum(1).float()


def column(units, name, segment):
  """Return a value of one segment of each unit, f32[P]."""
  return torch.tensor([unit.values[name][segment] for unit in units])


def pair_inputs(model, units):
  """Return what the losses of comparisons need, computed by a model."""
  sums, counts = sequence_logprobs(model, [s for unit in units for s in unit.segments])
  references = [
    column(units, 'reference', side) if 'reference' in units[0].values else torch.zeros(len(units))
    for side in (0, 1)
  ]
  sides = sums[::2], sums[1::2], counts[::2], counts[1::2]
  return oracles.Pairs(*sides, *references, column(units, 'probability', 0))


def judged_losses(model, units, **options):
  """Return KTO's loss of each unit, whose reference point must not be 0."""
  sums, _ = sequence_logprobs(model, [s for unit in units for s in unit.segments])
  ratios = [sums[side::2] - column(units, 'reference', side) for side in (0, 1)]
  assert ratios[1].mean() > 0.1  # at 0 a wrong estimate would not show
  return oracles.kto(*ratios, column(units, 'desirable', 0) > 0, **options)


def reward_losses(model, units, centering):
  """Return the loss of each comparison with a margin, from transformers' scores."""
  tokens, real, _ = pad_right([s for unit in units for s in unit.segments])
  scores = model(tokens, attention_mask=real).logits[:, 0]
  values = column(units, 'probability', 0), column(units, 'margin', 0)
  return oracles.bradley_terry(scores[::2], scores[1::2], *values, centering)


def load_rewards_in_torch(folder):
  """Load a reward model in transformers, in f32 with eager attention."""
  return transformers.AutoModelForSequenceClassification.from_pretrained(
    folder, dtype=torch.float32, attn_implementation='eager'
  ).eval()


def train_in_torch(folder, batches, compute_losses, load=load_in_torch):
  """Return the losses and gradient norms of AdamW steps, one for each batch, and the model.

  Args:
    folder: of the initial model.
    batches: the units of each step.
    compute_losses: a function of the model and units, to one loss for each unit.
    load: returns the model of a folder.
  """
  model = load(folder)
  optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.0, **ADAM)
  losses, norms = [], []
  for units in batches:
    optimizer.zero_grad()
    loss = compute_losses(model, units).mean()
    loss.backward()
    norms.append(float(torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])))
    optimizer.step()
    losses.append(float(loss.detach()))
  return losses, norms, model
