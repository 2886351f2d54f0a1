"""AdamW with clipping, weight decay on matrices only, and a learning-rate schedule."""

from collections.abc import Callable
from typing import Any

import jax
import optax

from cai_jax.model.sharding import path_str
from cai_jax.training.config import TrainConfig

Schedule = Callable[[jax.Array], jax.Array]  # step i32[], from 0 → learning rate f32[]

# Weight decay by the last name in a parameter's path. The number of axes cannot tell matrices from
# biases, since a projection's bias [N,H] has as many as a matrix.
_DECAYED = {'kernel': True, 'table': True, 'a': True, 'b': True, 'scale': False, 'bias': False}


def make_schedule(config: TrainConfig, num_steps: int) -> Schedule:
  """Return the learning rate as a function of the step: linear warm-up, then `config.schedule`.

  The learning rate is positive at the first step and reaches its final value at the last.

  Args:
    config: the run's settings.
    num_steps: number of optimizer steps of the whole run.

  """
  warmup = round(config.warmup * num_steps)
  peak, last = config.learning_rate, config.learning_rate * config.final_share
  rest = max(num_steps - warmup - 1, 1)
  falling = min(max(round(config.decay * num_steps), 1), rest)
  after = {
    'constant': lambda: optax.constant_schedule(peak),
    'linear': lambda: optax.linear_schedule(peak, last, rest),
    'cosine': lambda: optax.cosine_decay_schedule(peak, rest, config.final_share),
    'wsd': lambda: optax.join_schedules(
      [optax.constant_schedule(peak), optax.linear_schedule(peak, last, falling)],
      [max(num_steps - warmup - falling - 1, 0)],
    ),
  }[config.schedule]()
  if not warmup:
    return after
  rise = optax.linear_schedule(peak / (warmup + 1), peak, warmup)
  return optax.join_schedules([rise, after], [warmup])


def weight_decay_mask(params: Any) -> Any:
  """Return a pytree of bools: true for kernels, tables and adapters, false for norms and biases."""
  return jax.tree_util.tree_map_with_path(lambda path, _: _DECAYED[path_str(path[-1:])], params)


def make_optimizer(config: TrainConfig, num_steps: int) -> optax.GradientTransformation:
  """Return AdamW (Loshchilov and Hutter 2019) on gradients clipped by their global norm.

  Args:
    config: the run's settings.
    num_steps: number of optimizer steps of the whole run, which determines the schedule.
  """
  adamw = optax.adamw(
    make_schedule(config, num_steps),
    config.b1,
    config.b2,
    config.eps,
    weight_decay=config.weight_decay,
    mask=weight_decay_mask,
  )
  if not config.clip_norm:
    return adamw
  return optax.chain(optax.clip_by_global_norm(config.clip_norm), adamw)
