"""Rotary positions (arXiv 2104.09864): frequencies, angles and the rotation."""

import math

import jax.numpy as jnp
import numpy as np

from t2po_jax import types
from t2po_jax.models import config as config_lib

ModelConfig = config_lib.ModelConfig
Angles = tuple[types.Array, types.Array]


def frequencies(
  config: ModelConfig, rope: str = "global"
) -> tuple[np.ndarray, float]:
  """Angular frequencies of the rotary pairs, stretched as configured.

  theta^(-2i/H) for pair i; llama3 divides the frequencies whose wavelength
  exceeds the original length by the factor, yarn does so by the number of
  rotations (arXiv 2309.00071, section 3.2).

  Args:
    config: the model's config.
    rope: one of `config.ROPES`; `none` rotates by nothing.

  Returns:
    [H/2] float32 radians per position, and the scale of cosine and sine.
  """
  half = np.arange(config.head_width // 2)
  if rope == "none":
    return np.zeros(half.size, np.float32), 1.0
  theta = config.local_rope_theta if rope == "local" else config.rope_theta
  plain = theta ** (-2.0 * half / config.head_width)
  scaling = config.rope_scaling
  if scaling is None or rope == "local":
    return plain.astype(np.float32), 1.0
  slow = plain / scaling.factor
  if scaling.kind == "linear":
    return slow.astype(np.float32), 1.0
  rotations = scaling.original_max_positions * plain / (2 * np.pi)
  if scaling.kind == "llama3":
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    keep = np.clip((rotations - low) / (high - low), 0, 1)
    return (keep * plain + (1 - keep) * slow).astype(np.float32), 1.0

  def pair_with(count: float) -> float:
    wavelength = scaling.original_max_positions / (2 * np.pi * count)
    return half.size * math.log(wavelength) / math.log(config.rope_theta)

  first = max(math.floor(pair_with(scaling.beta_fast)), 0)
  last = min(math.ceil(pair_with(scaling.beta_slow)), config.head_width - 1)
  ramp = np.clip((half - first) / max(last - first, 1e-3), 0, 1)
  scale = scaling.attention_factor
  if scale is None:
    scale = 0.1 * math.log(max(scaling.factor, 1.0)) + 1.0
  return ((1 - ramp) * plain + ramp * slow).astype(np.float32), scale


def angles(
  positions: types.Array, config: ModelConfig, rope: str = "global"
) -> Angles:
  """Cosines and sines, each [B, T, H/2] float32, of positions [B, T]."""
  radians, scale = frequencies(config, rope)
  phases = positions[..., None].astype(jnp.float32) * radians[None, None]
  return jnp.cos(phases) * scale, jnp.sin(phases) * scale


def rotate(x: types.Array, angles: Angles) -> types.Array:
  """Rotates pair (i, i + H/2) of each head of `x` [B, T, heads, H]."""
  cosine, sine = (part[:, :, None, :] for part in angles)
  first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
  rotated = (
    first * cosine - second * sine,
    second * cosine + first * sine,
  )
  return jnp.concatenate(rotated, axis=-1).astype(x.dtype)
