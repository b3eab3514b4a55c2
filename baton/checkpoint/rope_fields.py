"""Rotary-embedding fields of config.json: two spellings in, one ``RopeSpec`` out.

New: ``rope_parameters {rope_theta, rope_type, ...}``. Old: ``rope_theta`` beside
``rope_scaling {type or rope_type, ...}``. Where both are given, ``rope_scaling`` replaces
``rope_parameters`` and an inner ``rope_theta`` wins over the outer, as transformers reads them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from baton.checkpoint.fields import Fields

RopeKind = Literal["default", "linear", "llama3"]
DEFAULT_THETA = 10_000.0
MAX_THETA = 1e12
MAX_FACTOR = 1e6
MAX_POSITIONS = 2**26


@dataclass(frozen=True, slots=True)
class RopeSpec:
    """theta: base wavelength. factor: how far positions are compressed (linear, llama3).

    The last three count for llama3 alone: wavelengths above original / low_freq_factor are
    compressed, those below original / high_freq_factor are kept, the rest is interpolated.
    """

    kind: RopeKind = "default"
    theta: float = DEFAULT_THETA
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_positions: int = 0


def read_rope(config: Fields, max_positions: int) -> RopeSpec:
    """Raises UnsupportedModel for other kinds of scaling, ConfigError for malformed fields."""
    empty = Fields(f"{config.where}: rope_parameters", {})
    scaling = config.inner("rope_scaling")
    if scaling is None or not scaling.values:
        scaling = config.inner("rope_parameters") or empty
    for name, value in scaling.values.items():
        if isinstance(value, dict):
            scaling.unsupported(name, "one set of RoPE parameters for all layers")
    outer_theta = config.number("rope_theta", 1.0, MAX_THETA, default=DEFAULT_THETA)
    theta = scaling.number("rope_theta", 1.0, MAX_THETA, default=outer_theta)
    for fields in (config, scaling):
        if fields.number("partial_rotary_factor", 0.0, 1.0, default=1.0) != 1.0:
            fields.unsupported("partial_rotary_factor", "1.0 (all of the head is turned)")

    name = "rope_type" if scaling.has("rope_type") else "type"
    kind = scaling.text(name) or "default"
    if kind == "default":
        return RopeSpec(theta=theta)
    if kind == "linear":
        return RopeSpec("linear", theta, scaling.number("factor", 1.0, MAX_FACTOR))
    if kind == "llama3":
        return _read_llama3(config, scaling, theta, max_positions)
    return scaling.unsupported(name, "default, linear, llama3")


def _read_llama3(config: Fields, scaling: Fields, theta: float, max_positions: int) -> RopeSpec:
    low = scaling.number("low_freq_factor", 1e-3, MAX_FACTOR)
    high = scaling.number("high_freq_factor", 1e-3, MAX_FACTOR)
    if high <= low:
        scaling.malformed("high_freq_factor", f"a number above low_freq_factor {low:g}")
    name = "original_max_position_embeddings"
    # The outer field wins where a config has both, as transformers reads it.
    source = config if config.has(name) else scaling
    return RopeSpec(
        kind="llama3",
        theta=theta,
        factor=scaling.number("factor", 1.0, MAX_FACTOR),
        low_freq_factor=low,
        high_freq_factor=high,
        original_max_positions=source.integer(name, 1, MAX_POSITIONS, default=max_positions),
    )
