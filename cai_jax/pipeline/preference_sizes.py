"""How much the trainings on preferences have to do, before anything runs."""

import os
from collections.abc import Collection
from typing import NamedTuple

from cai_jax.data import d_cai
from cai_jax.model.config import ModelConfig
from cai_jax.pipeline import prompt_sets
from cai_jax.pipeline.label_turns import count_label_turns
from cai_jax.pipeline.pair_sources import PAIR_SOURCES, Sizes
from cai_jax.pipeline.pairs import read_pairs
from cai_jax.pipeline.policies import Training, list_trainings
from cai_jax.pipeline.preference_checks import inspect_start
from cai_jax.pipeline.run import Run
from cai_jax.pipeline.stage_prefer import UNIT_KINDS

# Estimates, in bytes.
REFERENCE_BYTES = 50  # of the two log-probabilities of a unit, as reference.json has them
UNIT_BYTES = 250  # of host memory of a unit of two segments, whose tokens are in files


class TrainingSize(NamedTuple):
  """What a training on preferences has to do, at most.

  Attributes:
    training: the training.
    shape: shape of the model that is trained. A reward model has a head beside it.
    units: number of units in an epoch, of two segments each.
  """

  training: Training
  shape: ModelConfig
  units: int

  @property
  def num_params(self) -> int:
    """Number of parameters, with the head of a reward model."""
    has_head = bool(self.training.config.registered_loss.head)
    return self.shape.num_params + has_head * self.shape.d_model

  @property
  def reference_bytes(self) -> int:
    """Size of the file of reference log-probabilities; 0 if the objective has none."""
    return self.units * REFERENCE_BYTES * self.training.config.registered_loss.needs_reference

  @property
  def host_bytes(self) -> int:
    """The host memory of all units."""
    return self.units * UNIT_BYTES

  def flops(self, tokens: float) -> float:
    """Return the FLOPs of the training, and of the reference's forward pass if there is one.

    Args:
      tokens: mean number of tokens of a segment.
    """
    config = self.training.config
    loss, lengths = config.registered_loss, [round(tokens)] * 2
    options = {'adapters': config.lora is not None, 'has_logits': not loss.head}
    unit = self.shape.training_flops(lengths, **options) * config.epochs
    # A forward pass is a third of a step.
    reference = self.shape.training_flops(lengths) / 3 * loss.needs_reference
    return self.units * (unit + reference)


def measure_trainings(run: Run) -> list[TrainingSize]:
  """Return what each training on preferences of a run has to do.

  Args:
    run: the run.

  Raises:
    UserError: if a model or a file of comparisons cannot be read.
  """
  sizes = _count(run)
  measured = []
  for training in list_trainings(run.config):
    data = training.config.data
    known = PAIR_SOURCES[data].count(sizes) if data in PAIR_SOURCES else None
    count = len(read_pairs(run, training.config).comparisons) if known is None else known
    units = count * UNIT_KINDS[training.config.registered_loss.units].per_comparison
    measured.append(TrainingSize(training, inspect_start(run, training).config, units))
  return measured


def preference_texts(run: Run, stages: Collection[str]) -> int:
  """Return the bytes of texts that are copied into labels and into answers to choose from.

  Args:
    run: the run.
    stages: names of the stages that are not done.
  """
  label, total = run.config.label, 0
  if 'label' in stages:
    pairs = count_label_turns(run).pairs / max(len(run.prompts['harmful']), 1)
    total += round(pairs * _prompt_bytes(run, 'harmful')) if label.responses else 0
    total += sum(os.path.getsize(path) for path in label.comparisons)
  if 'prefer' in stages and (copies := run.config.reward.best_of_n):
    total += (copies + 1) * sum(_prompt_bytes(run, name) for name in prompt_sets.TRAINING)
  return total


def _prompt_bytes(run: Run, name: str) -> int:
  return sum(len(m['content'].encode()) for p in run.prompts[name] for m in p.messages)


def _count(run: Run) -> Sizes:
  """Return the sizes of what sources of comparisons read."""
  replaced = run.config.data.d_cai and run.d_cai.exists()
  chains = len(d_cai.read_rows(run.d_cai)) if replaced else len(run.prompts['harmful'])
  return Sizes(chains, run.config.feedback.rounds, count_label_turns(run).pairs)
