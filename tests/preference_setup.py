"""Random comparisons and settings that the tests of preference training share."""

import numpy as np

from cai_jax.data.units import Example, Unit
from cai_jax.training.prefer_config import PreferConfig

# As for `training_setup.CONFIG`, a large eps lets parameters be compared.
PREFER = PreferConfig(
  attention='xla',
  epochs=2,
  batch_size=8,
  max_length=48,
  learning_rate=1e-2,
  warmup=0.2,
  weight_decay=0.1,
  eps=1e-2,
  clip_norm=0.5,
)


def random_units(count=30, seed=0, segments=2, vocab_size=48, **values):
  """Random units whose segments share a prompt of 2 to 5 tokens; each has its own 'probability' p.

  The numbers of a unit's segments differ, as in real data: p is 1 - p of the second one.

  Args:
    count: number of units.
    seed: chooses tokens and lengths.
    segments: number of segments of each.
    vocab_size: number of tokens.
    **values: further values by name, of the first segment; those of other segments are 0.
  """
  rng = np.random.default_rng(seed)
  units = []
  for number in range(count):
    prompt = rng.integers(0, vocab_size, rng.integers(2, 6)).astype(np.int32)
    parts = []
    for _ in range(segments):
      reply = rng.integers(0, vocab_size, rng.integers(2, 12)).astype(np.int32)
      tokens = np.concatenate([prompt, reply])
      parts.append(Example(tokens, np.arange(len(tokens)) >= len(prompt), f'pair {number}'))
    p = float(np.round(rng.uniform(0.2, 1), 2))
    named = {name: (value, 0.0)[:segments] for name, value in values.items()}
    probability = {'probability': (p, 1 - p)[:segments]}
    units.append(Unit(tuple(parts), probability | named, f'pair {number}'))
  return units


def with_reference(units, seed=1):
  """Return the units with random reference log-probabilities."""
  rng = np.random.default_rng(seed)
  return [
    unit._replace(values={**unit.values, 'reference': tuple(float(-30 * x) for x in rng.random(2))})
    for unit in units
  ]
