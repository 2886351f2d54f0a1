"""The loss on held-out examples, early stopping, and the step with the lowest loss."""

import math
from collections.abc import Callable, Sequence

import jax
from jax.sharding import NamedSharding

from cai_jax.data import packing
from cai_jax.data.units import Example, Unit, unit_lengths
from cai_jax.runtime.errors import NonFiniteError
from cai_jax.training.fit_config import FitConfig
from cai_jax.training.losses import Sums
from cai_jax.training.state import TrainState
from cai_jax.training.step import make_batches, place_batch


class HeldOut:
  """An evaluator of the loss on held-out examples, which also decides when to stop early.

  Args:
    eval_step: the evaluation step, from `step.make_eval_step`.
    examples: the held-out examples or units; there may be none.
    buckets: batch shapes of training; evaluation uses the shapes of their micro-batches.
    config: the run's settings.
    sharding: sharding of a batch's rows.

  Attributes:
    losses: loss of each evaluation of the run by step, including those before it was resumed.
  """

  def __init__(
    self,
    eval_step: Callable[..., Sums],
    examples: Sequence[Example | Unit],
    buckets: Sequence[packing.Bucket],
    config: FitConfig,
    sharding: NamedSharding,
  ):
    self._eval_step, self._config, self._sharding = eval_step, config, sharding
    micro = [packing.Bucket(b.length, b.rows // config.accumulation) for b in buckets]
    steps = packing.plan(unit_lengths(examples), micro, 1, 0) if len(examples) else []
    self._batches = make_batches(examples, steps, sharding)
    self.losses: dict[int, float] = {}

  def evaluate(self, step: int, state: TrainState) -> dict[str, float]:
    """Return the loss with the run's normalization, and what else the loss measures.

    That is the loss per token if the loss supports this normalization, and the loss's metrics.

    Args:
      step: number of steps taken.
      state: the train state after them.

    Raises:
      NonFiniteError: if the loss is NaN or infinite.
    """
    loss_of = self._config.registered_loss
    total = self._sum(state)
    if loss_of.needs_whole:  # of all held-out units, so that it does not depend on their packing
      total = self._sum(state, {name: x for name, x in total.items() if name != 'loss_sum'})
    loss = _divide(total, self._config.weight_name)
    if not math.isfinite(loss):
      section = self._config.section
      raise NonFiniteError(
        f'The loss on held-out examples is {loss} after step {step}. Lower {section}.learning_rate '
        f'or set {section}.clip_norm; earlier checkpoints are kept.'
      )
    self.losses[step] = loss
    averages = loss_of.averages(total)
    row = {'loss': loss, **{name: float(averages[name]) for name in loss_of.metrics}}
    if 'token' in loss_of.normalizations:
      per_token = _divide(total, loss_of.normalizations['token'])
      row[f'{self._config.loss_name}_per_token'] = per_token
    return row

  def _sum(self, state: TrainState, whole: Sums | None = None) -> dict[str, float]:
    """Return the sums over all batches."""
    sums = []
    for i in range(len(self._batches)):
      batch = place_batch(self._batches[i], self._sharding)
      sums.append(self._eval_step(state.eval_params, state.frozen, batch, whole))
    sums = jax.device_get(sums)
    return {name: sum(float(s[name]) for s in sums) for name in sums[0]}

  @property
  def should_stop(self) -> bool:
    """Whether none of the last `patience` evaluations was below the lowest loss before them."""
    patience, losses = self._config.patience, list(self.losses.values())
    return 0 < patience < len(losses) and min(losses[-patience:]) >= min(losses[:-patience])

  @property
  def best_step(self) -> int | None:
    """The first step with the lowest loss, which early stopping exports; None without patience."""
    if not self._config.patience or not self.losses:
      return None
    return min(self.losses, key=lambda step: self.losses[step])

  def summarize(self) -> dict[str, float | bool]:
    """Return the last loss, the lowest loss, and whether training stopped early."""
    if not self.losses:
      return {}
    losses = list(self.losses.values())
    return {
      'held_out_loss': losses[-1],
      'least_held_out_loss': min(losses),
      'stopped_early': self.should_stop,
    }


def _divide(total: dict[str, float], weight: str) -> float:
  return total['loss_sum'] / max(total[weight], 1.0)
