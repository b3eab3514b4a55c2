"""From statistics to a profile: steps, ranks and tables around a transform. Pure numpy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cluster.calibrate.statistics import Statistics
from cluster.calibrate.tables import Counts, count_quotients, fit_tables
from cluster.calibrate.transform import Transform, synthesis
from kv_transfer.codecs.lossy_profile import Level, Profile

MIN_NONZERO = 1e-3
"""Components that are nonzero less often are not sent."""


@dataclass(frozen=True, slots=True)
class Model:
    """What the profile says of the model itself. inv_freq: ``[L, P]``."""

    digest: str
    num_kv_heads: int
    head_dim: int
    inv_freq: NDArray[np.float32]


def fit_profile(
    model: Model,
    stats: Statistics,
    transform: Transform,
    ages: NDArray[np.int32],
    levels: Sequence[Level],
) -> Profile:
    """levels: finest first."""
    counted = [count_quotients(stats, transform, level.step) for level in levels]
    ranks = np.stack([_ranks(counts) for counts in counted])
    tables = fit_tables(counted, ranks, stats.age_share)
    most = max(1, int(ranks.max()))
    back, scale = synthesis(transform.back[..., :most, :])
    return Profile(
        model_digest=model.digest,
        levels=tuple(levels),
        head_dim=model.head_dim,
        num_kv_heads=model.num_kv_heads,
        ages=ages.astype(np.int32),
        inv_freq=model.inv_freq,
        mean=stats.mean.astype(np.float32),
        grid=transform.grid,
        analysis=np.ascontiguousarray(transform.analysis[..., :most]),
        unit=np.ascontiguousarray(transform.unit[..., :most]),
        synthesis=back,
        scale=scale,
        gain=stats.gain.astype(np.float32),
        rank=ranks.astype(np.int16),
        table=np.ascontiguousarray(tables.table[..., :most]),
        frequencies=tables.frequencies,
        limit=tables.limit,
        shrink=tables.shrink,
    )


def _ranks(counts: Counts) -> NDArray[np.int64]:
    """``[L, 2, G, A]``: up to the last component that is nonzero often enough."""
    nonzero = 1 - counts.magnitude[..., 0] / counts.magnitude.sum(-1)
    places = np.arange(1, nonzero.shape[-1] + 1)
    last: NDArray[np.int64] = np.where(nonzero > MIN_NONZERO, places, 0).max(-1)
    return last
