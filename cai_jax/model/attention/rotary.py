"""Rotary position embeddings (Su et al. 2021). `cai_jax.model.transformer` defines the axes."""

import jax
import jax.numpy as jnp

from cai_jax.model.config import ModelConfig


def rotary_angles(config: ModelConfig, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Return the cosines and sines, each f32[B,T,H/2], of the rotation at each position.

  Args:
    config: gives the head size, the base of the frequencies and their scaling.
    positions: i32[B,T].
  """
  half = config.head_dim // 2
  frequency = config.rope_theta ** -(jnp.arange(half, dtype=jnp.float32) / half)
  if config.rope_scaling is not None:
    scaling = config.rope_scaling
    # Llama 3.1 divides the frequency of waves longer than the original context by `factor`, keeps
    # that of short waves, and interpolates between the two.
    turns = scaling.original_max_positions * frequency / (2 * jnp.pi)
    keep = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    keep = jnp.clip(keep, 0.0, 1.0)
    frequency = frequency * (keep + (1.0 - keep) / scaling.factor)
  angle = positions[..., None].astype(jnp.float32) * frequency
  return jnp.cos(angle), jnp.sin(angle)


def rotate(x: jax.Array, angles: tuple[jax.Array, jax.Array]) -> jax.Array:
  """Rotate each pair (h, h + H/2) of channels by its angle.

  Args:
    x: [B,T,N,H], queries or keys.
    angles: cosines and sines from `rotary_angles`, each f32[B,T,H/2].

  Returns:
    [B,T,N,H] in the dtype of `x`, computed in f32.
  """
  cos, sin = (a[:, :, None, :] for a in angles)
  first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
  rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
  return rotated.astype(x.dtype)
