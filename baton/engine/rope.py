"""Rotary position embedding: frequencies from a spec, angles per step, rotation per layer.

Shapes: T tokens of a step, H heads, D head_dim. The halves of a head are rotated against each
other (the "rotate half" pairing of element i with i + D/2).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from baton.checkpoint.rope_fields import RopeSpec


@dataclass(frozen=True, slots=True)
class Rotation:
    """cos, sin: ``[T, 1, D]``; the first half of ``sin`` is negated, so that no layer has to."""

    cos: Tensor
    sin: Tensor


def inverse_frequencies(rope: RopeSpec, head_dim: int, device: torch.device) -> Tensor:
    """``[D / 2]`` float32, radians per position.

    Computed in float32 on purpose: the angle at position 100,000 depends on the rounding here,
    and this is the rounding that checkpoints were trained with.
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    frequencies = 1.0 / (rope.theta**exponents)
    if rope.kind == "linear":
        frequencies = frequencies / rope.factor
    elif rope.kind == "llama3":
        frequencies = _llama3(rope, frequencies)
    return frequencies.to(device)


def _llama3(rope: RopeSpec, frequencies: Tensor) -> Tensor:
    """Keep short wavelengths, divide long ones by the factor, blend those in between."""
    turns = rope.original_max_positions * frequencies / (2 * math.pi)
    blend = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    blended = (1 - blend) * frequencies / rope.factor + blend * frequencies
    scaled = torch.where(turns < rope.low_freq_factor, frequencies / rope.factor, blended)
    return torch.where(turns > rope.high_freq_factor, frequencies, scaled)


def rotation(positions: Tensor, frequencies: Tensor, dtype: torch.dtype) -> Rotation:
    """Angles of one step, shared by all layers. positions: ``[T]`` int64."""
    angles = positions.to(torch.float32)[:, None] * frequencies
    cos, sin = angles.cos(), angles.sin()
    return Rotation(
        cos=torch.cat((cos, cos), dim=-1)[:, None].to(dtype),
        sin=torch.cat((-sin, sin), dim=-1)[:, None].to(dtype),
    )


def rotate(heads: Tensor, by: Rotation) -> Tensor:
    """heads: ``[T, H, D]``, returned rotated. Q and K heads go through together."""
    swapped = heads.roll(heads.shape[-1] // 2, dims=-1)
    return torch.addcmul(heads * by.cos, swapped, by.sin)
