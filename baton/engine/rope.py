"""Rotary position embedding: frequencies from a spec, angles per step, rotation per layer.

Shapes: T tokens of a step, H heads, D head_dim, R <= D the elements of a head that are turned.
The halves of R are rotated against each other (the "rotate half" pairing of element i with
i + R/2).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from baton.checkpoint.rope_fields import RopeSpec


@dataclass(frozen=True, slots=True)
class Rotation:
    """cos, sin: ``[T, R / 2]`` float32, with the attention factor in them."""

    cos: Tensor
    sin: Tensor


class Rotary:
    """The frequencies of a model's layers, which mostly share one set."""

    def __init__(self, ropes: Sequence[RopeSpec], head_dim: int, device: torch.device) -> None:
        """ropes: one entry per layer."""
        kinds = list(dict.fromkeys(ropes))
        self._kinds = [(rope, inverse_frequencies(rope, head_dim, device)) for rope in kinds]
        self._kind_of_layer = [kinds.index(rope) for rope in ropes]

    def rotations(self, positions: Tensor) -> list[Rotation]:
        """One entry per layer; layers of one kind share theirs. positions: ``[T]`` int64."""
        made = [rotation(rope, f, positions) for rope, f in self._kinds]
        return [made[kind] for kind in self._kind_of_layer]


def inverse_frequencies(rope: RopeSpec, head_dim: int, device: torch.device) -> Tensor:
    """``[R / 2]`` float32, radians per position (for ``dynamic``: within the original ones).

    Computed in float32 on purpose: the angle at position 100,000 depends on the rounding here,
    and this is the rounding that checkpoints were trained with.
    """
    rotary_dim = rope.rotary_dim or head_dim
    exponents = torch.arange(0, rotary_dim, 2, dtype=torch.float32) / rotary_dim
    wavelengths = rope.theta**exponents
    if rope.kind == "longrope":
        wavelengths = torch.tensor(rope.divisors, dtype=torch.float32) * wavelengths
    frequencies = 1.0 / wavelengths
    if rope.kind == "linear":
        frequencies = frequencies / rope.factor
    elif rope.kind == "llama3":
        frequencies = _llama3(rope, frequencies)
    elif rope.kind == "yarn":
        frequencies = _yarn(rope, wavelengths)
    return frequencies.to(device)


def _llama3(rope: RopeSpec, frequencies: Tensor) -> Tensor:
    """Keep short wavelengths, divide long ones by the factor, blend those in between."""
    turns = rope.original_max_positions * frequencies / (2 * math.pi)
    blend = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    blended = (1 - blend) * frequencies / rope.factor + blend * frequencies
    scaled = torch.where(turns < rope.low_freq_factor, frequencies / rope.factor, blended)
    return torch.where(turns > rope.high_freq_factor, frequencies, scaled)


def _yarn(rope: RopeSpec, wavelengths: Tensor) -> Tensor:
    """Like ``_llama3``, with a blend that is linear in the pair's number, not in its turns."""
    num_pairs = len(wavelengths)
    rotary_dim = 2 * num_pairs

    def pair_with(turns: float) -> float:
        """The (fractional) pair that turns this often within the original positions."""
        ratio = rope.original_max_positions / (turns * 2 * math.pi)
        return rotary_dim * math.log(ratio) / (2 * math.log(rope.theta))

    first, last = pair_with(rope.beta_fast), pair_with(rope.beta_slow)
    if rope.truncated:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, rotary_dim - 1)
    if first == last:
        last += 0.001
    place = (torch.arange(num_pairs, dtype=torch.float32) - first) / (last - first)
    kept = 1 - place.clamp(0, 1)
    return 1.0 / (rope.factor * wavelengths) * (1 - kept) + 1.0 / wavelengths * kept


def _dynamic(rope: RopeSpec, frequencies: Tensor, positions: Tensor) -> Tensor:
    """``[T, R / 2]``: beyond the original positions, theta grows with the position itself.

    A token at position p is turned as the newest token of a sequence of p + 1. That depends on
    nothing but p, so chunks, a cached prefix and another worker all give the same key, and it is
    what token-by-token generation does. (Turning a whole prompt by its own length, as one pass
    over it would, leaves keys in the cache that no later length agrees with.)
    """
    num_pairs = frequencies.shape[0]
    exponents = torch.arange(num_pairs, dtype=torch.float32, device=positions.device) / num_pairs
    lengths = (positions + 1).to(torch.float32)
    stretch = rope.factor * lengths / rope.original_max_positions - (rope.factor - 1)
    theta = rope.theta * stretch.clamp(min=1.0) ** (num_pairs / (num_pairs - 1))
    grown = 1.0 / (theta[:, None] ** exponents)
    return torch.where(lengths[:, None] > rope.original_max_positions, grown, frequencies)


def rotation(rope: RopeSpec, frequencies: Tensor, positions: Tensor) -> Rotation:
    """Angles of one step. frequencies: of ``inverse_frequencies``. positions: ``[T]`` int64."""
    if rope.kind == "dynamic":
        frequencies = _dynamic(rope, frequencies, positions)
    angles = positions.to(torch.float32)[:, None] * frequencies
    cos, sin = angles.cos(), angles.sin()
    if rope.attention_factor != 1.0:
        cos, sin = cos * rope.attention_factor, sin * rope.attention_factor
    return Rotation(cos, sin)


def rotate(heads: Tensor, by: Rotation) -> Tensor:
    """heads: ``[T, H, D]``, returned rotated. Q and K heads go through together."""
    half = by.cos.shape[-1]
    cos, sin = by.cos[:, None], by.sin[:, None]
    first, second, rest = heads[..., :half], heads[..., half : 2 * half], heads[..., 2 * half :]
    turned = torch.cat((first * cos - second * sin, second * cos + first * sin, rest), dim=-1)
    return turned.to(heads.dtype)
