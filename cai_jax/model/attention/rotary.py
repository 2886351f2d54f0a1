"""Rotary position embeddings (Su et al. 2021). `cai_jax.model.transformer` defines the axes."""

import jax
import jax.numpy as jnp

from cai_jax.model.config import ModelConfig
from cai_jax.model.rope import Rope

Angles = tuple[jax.Array, jax.Array]  # cosines and sines, each f32[B,T,C/2] for C rotated channels


def rotation_of(config: ModelConfig, layer: int) -> tuple[Rope | None, int]:
  """Return a layer's rotary positions, and its channels of a head.

  Args:
    config: the shape of the model.
    layer: number of the layer.
  """
  return config.rope(layer), config.kind(layer).head_dim


def rotations_of(config: ModelConfig) -> tuple[tuple[Rope | None, int], ...]:
  """Return the different results of `rotation_of`, in order of their first layer.

  Layers with the same one share angles.

  Args:
    config: the shape of the model.
  """
  return tuple(dict.fromkeys(rotation_of(config, layer) for layer in range(config.num_layers)))


def rotary_angles(rope: Rope | None, head_dim: int, positions: jax.Array) -> Angles | None:
  """Return the cosines and sines, each f32[B,T,C/2], of the rotation at each position.

  Args:
    rope: base and scaling of the frequencies, and C, the number of rotated channels. None returns
      None.
    head_dim: channels of a head.
    positions: i32[B,T].
  """
  if rope is None:
    return None
  half = (head_dim if rope.channels is None else rope.channels) // 2
  frequency = rope.theta ** -(jnp.arange(half, dtype=jnp.float32) / half)
  if rope.scaling is not None:
    frequency = rope.scaling.scale(frequency, rope.theta)
  angle = positions[..., None].astype(jnp.float32) * frequency
  cos, sin = jnp.cos(angle), jnp.sin(angle)
  if rope.scaling is not None and rope.scaling.amplitude != 1.0:
    return rope.scaling.amplitude * cos, rope.scaling.amplitude * sin
  return cos, sin


def growth_of(config: ModelConfig, positions: jax.Array) -> jax.Array | None:
  """Return the factors f32[B,T] of rotated queries, or None if they do not grow.

  Args:
    config: the shape of the model.
    positions: i32[B,T].
  """
  return None if config.query_growth is None else config.query_growth.factors(positions)


def rotate(x: jax.Array, angles: Angles | None, interleaved: bool = False) -> jax.Array:
  """Rotate pairs of the leading C channels by their angles: (h, h + C/2), or (2h, 2h + 1).

  Args:
    x: [B,T,N,H], queries or keys.
    angles: cosines and sines from `rotary_angles`, each f32[B,T,C/2]; None returns `x`.
    interleaved: whether the pairs are (2h, 2h + 1).

  Returns:
    [B,T,N,H] in the dtype of `x`, computed in f32.
  """
  if angles is None:
    return x
  channels = 2 * angles[0].shape[-1]
  if channels < x.shape[-1]:
    rotated = rotate(x[..., :channels], angles, interleaved)
    return jnp.concatenate([rotated, x[..., channels:]], axis=-1)
  cos, sin = (a[:, :, None, :] for a in angles)
  if interleaved:
    first, second = x[..., 0::2].astype(jnp.float32), x[..., 1::2].astype(jnp.float32)
    pairs = [first * cos - second * sin, second * cos + first * sin]
    return jnp.stack(pairs, axis=-1).reshape(x.shape).astype(x.dtype)
  first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
  rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
  return rotated.astype(x.dtype)
