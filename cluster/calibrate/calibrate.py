"""``baton calibrate``: read text, gather, fit, and choose steps by what they cost the model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from baton.protocol.errors import ConfigError
from cluster.calibrate.fit import fit_profile
from cluster.calibrate.reader import Context, Reader
from cluster.calibrate.statistics import F64, Gatherer, Observed, Statistics
from cluster.calibrate.transform import Transform, fit_transform
from kv_transfer.codecs.contract import KvPart, Quality
from kv_transfer.codecs.lossy import LossyCodec
from kv_transfer.codecs.lossy_profile import Level, Profile
from kv_transfer.codecs.lossy_reference import turn

AGES = np.array([0, 8, 32, 128, 512], np.int32)
LENGTHS = (256, 1536, 3840)
FOLLOWING = 256
MAX_GROUP_WIDTH = 128
"""Heads are transformed together up to this many channels: arithmetic grows with it."""
TARGETS = (
    ("kv1", Quality.HIGH, 0.0015),
    ("kv2", Quality.HIGH, 0.004),
    ("kv3", Quality.MEDIUM, 0.008),
    ("kv4", Quality.LOW, 0.04),
)
"""Level, quality, and the divergence from what the model says without loss, in nats per token.
For text that the model reads well that is the rise of log perplexity; each stays below what its
floor allows (0.005, 0.01 and 0.05)."""
RUNGS = 7

Progress = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Texts:
    """Token sequences, each at least as long as the shortest context and its continuation.
    tuning: those that steps are chosen on; no statistics are taken from them."""

    fitting: Sequence[NDArray[np.int64]]
    tuning: Sequence[NDArray[np.int64]]


def calibrate(reader: Reader, texts: Texts, progress: Progress, seed: int = 0) -> Profile:
    """Raises ConfigError when there is too little text."""
    needed = LENGTHS[0] + FOLLOWING + 1
    if reader.max_tokens < needed:
        raise ConfigError(f"the model reads {reader.max_tokens} tokens, calibrating needs {needed}")
    if len(texts.fitting) < 2 or not texts.tuning:
        raise ConfigError("too little text to calibrate on; give more with --text")
    ages = AGES[max(len(t) for t in texts.fitting) - FOLLOWING - 1 > AGES]
    stats = _gather(reader, texts.fitting, ages, progress, seed)
    transform = fit_transform(stats)
    contexts = [reader.read(_cut(reader, t, i), FOLLOWING) for i, t in enumerate(texts.tuning)]
    levels = _choose_steps(reader, contexts, stats, transform, ages, progress)
    return fit_profile(reader.model, stats, transform, ages, levels)


def _gather(
    reader: Reader,
    fitting: Sequence[NDArray[np.int64]],
    ages: NDArray[np.int32],
    progress: Progress,
    seed: int,
) -> Statistics:
    gatherer = Gatherer(ages, len(fitting), seed)
    generator = torch.Generator().manual_seed(seed)
    for number, tokens in enumerate(fitting):
        context = reader.read(_cut(reader, tokens, number), FOLLOWING)
        gradient = reader.gradient(context, generator)
        gatherer.add(Observed(_grouped(reader, context.kv), _grouped(reader, gradient)))
        progress(f"read {number + 1} of {len(fitting)} texts")
    return gatherer.finish()


def _cut(reader: Reader, tokens: NDArray[np.int64], number: int) -> NDArray[np.int64]:
    """Contexts of all lengths in turn, as far as text and model reach."""
    most = min(len(tokens), reader.max_tokens) - FOLLOWING - 1
    fitting = [n for n in LENGTHS if n <= most]
    return tokens[: fitting[-1 - number % len(fitting)] + FOLLOWING + 1]


def _grouped(reader: Reader, kv: torch.Tensor) -> NDArray[np.float32]:
    """``[L, 2, T, G, C]`` of ``[L, 2, T, heads, head_dim]``, keys turned back to position 0."""
    x = kv.cpu().numpy().astype(np.float32)
    layers, _, num_tokens, heads, head_dim = x.shape
    position = np.arange(num_tokens, dtype=np.float32)[:, None]
    for layer, frequencies in zip(x, reader.model.inv_freq, strict=True):
        angle = position * frequencies
        layer[0] = turn(layer[0], np.cos(angle), -np.sin(angle))
    return x.reshape(layers, 2, num_tokens, -1, head_dim * heads_per_group(heads, head_dim))


def heads_per_group(num_heads: int, head_dim: int) -> int:
    """As many as divide the heads and stay within ``MAX_GROUP_WIDTH``, at least one."""
    fitting = (n for n in range(num_heads, 1, -1) if num_heads % n == 0)
    return next((n for n in fitting if n * head_dim <= MAX_GROUP_WIDTH), 1)


def _choose_steps(
    reader: Reader,
    contexts: Sequence[Context],
    stats: Statistics,
    transform: Transform,
    ages: NDArray[np.int32],
    progress: Progress,
) -> tuple[Level, ...]:
    """Steps whose divergence is the target's, between rungs of a ladder. Of contexts of several
    lengths the length that suffers most counts."""
    steps = _ladder(stats)
    rungs = [Level(f"rung{i}", Quality.LOW, float(step)) for i, step in enumerate(steps)]
    profile = fit_profile(reader.model, stats, transform, ages, rungs)
    found = np.empty(len(rungs))
    for i, rung in enumerate(rungs):
        found[i] = _divergence(reader, contexts, profile, rung.name)
        progress(f"step {rung.step:.3g}: divergence {found[i]:.5f} nats per token")
    ascending = np.maximum.accumulate(found)
    logs = np.log(np.maximum(ascending, 1e-9)) + np.arange(len(found)) * 1e-9
    targets = np.log([target for _, _, target in TARGETS])
    chosen = np.exp(np.interp(targets, logs, np.log(steps)))
    return tuple(
        Level(name, quality, float(np.float32(step)))
        for (name, quality, _), step in zip(TARGETS, chosen, strict=True)
    )


def _ladder(stats: Statistics) -> F64:
    """Steps around those that a quadratic loss would ask for: with n components felt alike, an
    error of step^2 / 12 each costs n * step^2 / 24 nats."""
    components = stats.mean.size * np.mean(LENGTHS)
    finest, coarsest = TARGETS[0][2], TARGETS[-1][2]
    low = np.sqrt(24 * finest * FOLLOWING / components) / 2
    high = np.sqrt(24 * coarsest * FOLLOWING / components) * 12
    ladder: F64 = np.geomspace(low, high, RUNGS)
    return ladder


def _divergence(reader: Reader, contexts: Sequence[Context], profile: Profile, name: str) -> float:
    """Mean nats per token of the length that suffers most."""
    codec = LossyCodec(_Geometry(reader), profile, name)
    by_length: dict[int, list[float]] = {}
    for context in contexts:
        kv = reader.to_array(context.kv)
        part = KvPart(0, 0, kv.shape[2])
        out = np.empty_like(kv)
        codec.decode(codec.encode(kv, part), part, out)
        changed = reader.log_probs(context, reader.from_array(out))
        base = context.log_probs
        nats = (base.exp() * (base - changed)).sum(-1).mean().item()
        by_length.setdefault(kv.shape[2], []).append(nats)
    return max(float(np.mean(values)) for values in by_length.values())


class _Geometry:
    def __init__(self, reader: Reader) -> None:
        self.dtype = reader.dtype
        self.num_kv_heads = reader.spec.num_kv_heads
        self.head_dim = reader.spec.head_dim
