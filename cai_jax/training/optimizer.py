"""AdamW with clipping, weight decay on matrices only, and a learning-rate schedule."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from cai_jax.model.sharding import path_str
from cai_jax.runtime.errors import UserError
from cai_jax.training.fit_config import FitConfig

Schedule = Callable[[jax.Array], jax.Array]  # step i32[], from 0 → learning rate f32[]

# Weight decay by the last name in a parameter's path. The number of axes cannot tell matrices from
# biases, since a projection's bias [N,H] has as many as a matrix.
_DECAYED = {
  **dict.fromkeys(('kernel', 'table', 'a', 'b'), True),
  **dict.fromkeys(('scale', 'bias', 'sinks', 'scalar'), False),
}


def make_schedule(config: FitConfig, num_steps: int) -> Schedule:
  """Return the learning rate as a function of the step: linear warm-up, then `config.schedule`.

  The learning rate is positive at every step, the last one included: a falling schedule would reach
  its final value one step after the last.

  Args:
    config: the run's settings.
    num_steps: number of optimizer steps of the whole run.
  """
  warmup = _warmup_steps(config, num_steps)
  rest = max(num_steps - warmup, 1)
  falling = min(max(round(config.decay * num_steps), 1), rest - 1)
  last = 1.0 if config.schedule == 'constant' else config.final_share

  def schedule(step):
    left = num_steps - step  # at least 1 in every step of the run
    fall = {
      'constant': lambda: 1.0,
      'linear': lambda: left / rest,
      # (1 + cos πt) / 2 at t = 1 - left / rest, in a form that does not round to 0 in float32.
      'cosine': lambda: jnp.sin(0.5 * math.pi * left / rest) ** 2,
      'wsd': lambda: jnp.minimum(left / (falling + 1), 1.0),
    }[config.schedule]()
    share = jnp.where(step < warmup, (step + 1) / (warmup + 1), last + (1 - last) * fall)
    return config.learning_rate * share

  return schedule


def check_warmup(config: FitConfig, num_steps: int, bound: str = '') -> None:
  """Check that the learning rate reaches its peak.

  Args:
    config: the run's settings.
    num_steps: number of optimizer steps of the whole run.
    bound: 'at most ' if the number is only an upper bound.

  Raises:
    UserError: if the warm-up takes all steps.
  """
  if _warmup_steps(config, num_steps) >= num_steps:
    raise UserError(
      f'{config.section}.warmup={config.warmup} takes all {bound}{num_steps} steps of the '
      'training, so the learning rate would never reach its peak. Lower '
      f'{config.section}.warmup, or train for more steps.'
    )


def _warmup_steps(config: FitConfig, num_steps: int) -> int:
  return round(config.warmup * num_steps)


def weight_decay_mask(params: Any) -> Any:
  """Return a pytree of bools: true for kernels, tables and adapters, false for all others.

  Args:
    params: a pytree of parameters.
  """
  return jax.tree_util.tree_map_with_path(lambda path, _: _DECAYED[path_str(path[-1:])], params)


def is_constant(path: Any) -> bool:
  """Return whether the parameter at a key path is one that training never changes.

  The model stops its gradient, so its update is 0.

  Args:
    path: such as those of `jax.tree_util.tree_map_with_path`.
  """
  return path_str(path[-1:]) == 'scalar'


def make_optimizer(config: FitConfig, num_steps: int) -> optax.GradientTransformationExtraArgs:
  """Return AdamW (Loshchilov and Hutter 2019) on gradients clipped by their global norm.

  `update` takes the argument `tokens_per_unit`, f32[]: the number of target tokens for each unit
  that the loss is divided by, such as a sequence. The gradient's norm per token is compared with
  `config.clip_norm`, so the limit means the same for every `loss_normalization`.

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

  def clip(grads, state, params=None, *, tokens_per_unit=1.0, **_):
    del params
    limit = config.clip_norm * tokens_per_unit
    scale = limit / jnp.maximum(optax.tree.norm(grads), limit)
    return jax.tree.map(lambda g: g * scale, grads), state

  if not config.clip_norm:
    return optax.with_extra_args_support(adamw)
  clipping = optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), clip)
  return optax.chain(clipping, adamw)
