"""Rotary-embedding fields of config.json: two spellings in, one ``RopeSpec`` out.

New: ``rope_parameters {rope_theta, rope_type, ...}``. Old: ``rope_theta`` beside
``rope_scaling {type or rope_type, ...}``. Where both are given, ``rope_scaling`` replaces
``rope_parameters`` and an inner ``rope_theta`` wins over the outer, as transformers reads them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from baton.checkpoint.fields import Fields

RopeKind = Literal["default", "linear", "llama3", "yarn", "dynamic", "longrope"]
MAX_THETA = 1e12
MAX_FACTOR = 1e6
MAX_POSITIONS = 2**26
_ORIGINAL = "original_max_position_embeddings"
_PARTIAL = "partial_rotary_factor"


@dataclass(frozen=True, slots=True)
class RopeSpec:
    """theta: base wavelength. factor: how far positions are compressed (not in longrope).

    llama3: wavelengths above original / low_freq_factor are compressed, those below original /
      high_freq_factor are kept, the rest is interpolated.
    yarn: pairs that turn more than beta_fast times within the original positions are kept, those
      below beta_slow are compressed, the rest is interpolated; truncated: bounds are whole pairs.
    dynamic: theta grows with the position beyond the original ones.
    longrope: divisors, one per pair of elements, lengthen each wavelength; beyond_original: they
      are those for sequences longer than the original ones.
    attention_factor: on cos and sin (yarn, longrope), so on scores as its square.
    rotary_dim: the first elements of a head that are turned; 0 for all of them.
    """

    kind: RopeKind = "default"
    theta: float = 10_000.0
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_positions: int = 0
    attention_factor: float = 1.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncated: bool = True
    divisors: tuple[float, ...] = ()
    beyond_original: bool = False
    rotary_dim: int = 0


@dataclass(frozen=True, slots=True)
class RopeContext:
    """What the RoPE fields depend on beside themselves. max_model_len: the longest sequence that
    is to be served, None for no wish."""

    max_positions: int
    max_model_len: int | None
    head_dim: int
    default_theta: float
    partial_rotary: bool


def read_rope(config: Fields, context: RopeContext) -> RopeSpec:
    """Raises UnsupportedModel for other kinds of scaling, ConfigError for malformed fields."""
    scaling = config.inner("rope_scaling")
    if scaling is None or not scaling.values:
        scaling = config.inner("rope_parameters")
    if scaling is None:
        scaling = Fields(f"{config.where}: rope_parameters", {})
    for name, value in scaling.values.items():
        if isinstance(value, dict):
            scaling.unsupported(name, "one set of RoPE parameters for all layers")
    theta = config.number("rope_theta", 1.0, MAX_THETA, default=context.default_theta)
    return read_parameters(config, scaling, theta, context)


def read_parameters(
    config: Fields, scaling: Fields, default_theta: float, context: RopeContext
) -> RopeSpec:
    """``scaling``: one set of RoPE parameters; ``config`` may say some of them outside it."""
    if scaling.has("mrope_section"):
        scaling.unsupported("mrope_section", "one position per token (decoders of text alone)")
    theta = scaling.number("rope_theta", 1.0, MAX_THETA, default=default_theta)
    rotary_dim = _read_rotary_dim(config, scaling, context)
    name = "rope_type" if scaling.has("rope_type") else "type"
    kind = scaling.text(name) or "default"
    # Phi-3 checkpoints have had three names for the same thing.
    if kind == "su" or (kind == "yarn" and scaling.has("short_factor")):
        kind = "longrope"
    if kind == "default":
        return RopeSpec(theta=theta, rotary_dim=rotary_dim)
    if kind not in _READERS:
        scaling.unsupported(name, ", ".join(["default", *_READERS]))
    return _READERS[kind](_Reading(config, scaling, theta, rotary_dim, context))


def reach(rope: RopeSpec, max_positions: int) -> int:
    """Positions that can be served, from ``max_position_embeddings``.

    dynamic and yarn are there to reach further than the field says. longrope turns short and
    long sequences differently, which a cache of turned keys cannot follow from one to the other.
    """
    if rope.kind == "dynamic":
        return min(MAX_POSITIONS, int(max_positions * rope.factor))
    if rope.kind == "yarn":
        return min(
            MAX_POSITIONS, max(max_positions, int(rope.original_max_positions * rope.factor))
        )
    if rope.kind == "longrope" and not rope.beyond_original:
        return min(max_positions, rope.original_max_positions)
    return max_positions


@dataclass(frozen=True, slots=True)
class _Reading:
    config: Fields
    scaling: Fields
    theta: float
    rotary_dim: int
    context: RopeContext

    def factor(self) -> float:
        return self.scaling.number("factor", 1.0, MAX_FACTOR)

    def original(self) -> int:
        # The outer field wins where a config has both, as transformers reads it.
        source = self.config if self.config.has(_ORIGINAL) else self.scaling
        return source.integer(_ORIGINAL, 1, MAX_POSITIONS, default=self.context.max_positions)


def _read_rotary_dim(config: Fields, scaling: Fields, context: RopeContext) -> int:
    source = scaling if scaling.has(_PARTIAL) else config
    share = source.number(_PARTIAL, 0.0, 1.0, default=1.0)
    if share == 1.0:
        return 0
    if not context.partial_rotary:
        source.unsupported(_PARTIAL, "1.0 (all of the head is turned) in this family")
    rotary_dim = int(context.head_dim * share)
    if rotary_dim < 2 or rotary_dim % 2:
        source.unsupported(_PARTIAL, f"an even share of the head_dim {context.head_dim}")
    return rotary_dim


def _linear(given: _Reading) -> RopeSpec:
    return RopeSpec("linear", given.theta, given.factor(), rotary_dim=given.rotary_dim)


def _dynamic(given: _Reading) -> RopeSpec:
    """Counts from max_position_embeddings, whatever an original_... field says."""
    rotary_dim = given.rotary_dim or given.context.head_dim
    if rotary_dim <= 2:
        given.config.unsupported("head_dim", "4 or more with dynamic RoPE scaling")
    return RopeSpec(
        "dynamic",
        given.theta,
        given.factor(),
        original_max_positions=given.context.max_positions,
        rotary_dim=given.rotary_dim,
    )


def _llama3(given: _Reading) -> RopeSpec:
    low = given.scaling.number("low_freq_factor", 1e-3, MAX_FACTOR)
    high = given.scaling.number("high_freq_factor", 1e-3, MAX_FACTOR)
    if high <= low:
        given.scaling.malformed("high_freq_factor", f"a number above low_freq_factor {low:g}")
    return RopeSpec(
        kind="llama3",
        theta=given.theta,
        factor=given.factor(),
        low_freq_factor=low,
        high_freq_factor=high,
        original_max_positions=given.original(),
        rotary_dim=given.rotary_dim,
    )


def _yarn(given: _Reading) -> RopeSpec:
    scaling, original = given.scaling, given.original()
    if given.theta <= 1.0:
        scaling.malformed("rope_theta", "a number above 1 with yarn scaling")
    default_factor = max(1.0, given.context.max_positions / original)
    absent = not scaling.has("factor")
    factor = default_factor if absent else given.factor()
    fast = scaling.number("beta_fast", 1e-3, MAX_FACTOR, default=32.0)
    slow = scaling.number("beta_slow", 1e-3, MAX_FACTOR, default=1.0)
    if slow > fast:
        scaling.malformed("beta_slow", f"a number up to beta_fast {fast:g}")
    return RopeSpec(
        kind="yarn",
        theta=given.theta,
        factor=factor,
        original_max_positions=original,
        attention_factor=_yarn_attention_factor(scaling, factor),
        beta_fast=fast,
        beta_slow=slow,
        truncated=scaling.boolean("truncate", True),
        rotary_dim=given.rotary_dim,
    )


def _yarn_attention_factor(scaling: Fields, factor: float) -> float:
    """Given, or 1 + 0.1 ln(factor); with both ``mscale`` fields a ratio of two such terms."""

    def term(scale: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0

    if scaling.has("attention_factor"):
        return scaling.number("attention_factor", 0.0, MAX_FACTOR)
    scale = scaling.number("mscale", 0.0, MAX_FACTOR, default=0.0)
    scale_all = scaling.number("mscale_all_dim", 0.0, MAX_FACTOR, default=0.0)
    if scale and scale_all:
        return term(scale) / term(scale_all)
    return term(1.0)


def _longrope(given: _Reading) -> RopeSpec:
    scaling, original = given.scaling, given.original()
    num_pairs = (given.rotary_dim or given.context.head_dim) // 2
    short = scaling.numbers("short_factor", 1e-3, MAX_FACTOR, num_pairs)
    long = scaling.numbers("long_factor", 1e-3, MAX_FACTOR, num_pairs)
    beyond_original = (given.context.max_model_len or 0) > original
    factor = given.context.max_positions / original
    if scaling.has("factor"):
        factor = given.factor()
    attention_factor = 1.0
    if scaling.has("attention_factor"):
        attention_factor = scaling.number("attention_factor", 0.0, MAX_FACTOR)
    elif factor > 1:
        if original < 2:
            given.scaling.malformed(_ORIGINAL, "2 or more with longrope scaling")
        attention_factor = math.sqrt(1 + math.log(factor) / math.log(original))
    return RopeSpec(
        kind="longrope",
        theta=given.theta,
        original_max_positions=original,
        attention_factor=attention_factor,
        divisors=long if beyond_original else short,
        beyond_original=beyond_original,
        rotary_dim=given.rotary_dim,
    )


_READERS: dict[str, Callable[[_Reading], RopeSpec]] = {
    "linear": _linear,
    "llama3": _llama3,
    "yarn": _yarn,
    "dynamic": _dynamic,
    "longrope": _longrope,
}
