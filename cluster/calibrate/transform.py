"""From channels to components of equal loss and back, as whole numbers.

The transform of a group of channels: multiply with the root of the sensitivity, so that equal
errors cost equal loss, then turn to the principal axes of what is left. There one step size for
all components of all layers is the best that rounding can do, and most components are small
enough to be zero nearly always: those are not sent.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cluster.calibrate.statistics import F64, Statistics
from kv_transfer.codecs.lossy_profile import FRACTION, MAX_COLUMN_SUM, MAX_GRID, MAX_ROW_SUM

RIDGE = 0.05
"""Added to sensitivities, as a part of their mean: directions whose gradients were small by
chance are not free."""
GRID_ROOM = 1.5
"""How far beyond the common spread the grid reaches; rows that lie farther out go raw."""


@dataclass(frozen=True, slots=True)
class Transform:
    """Of all layers and groups, all components, most costly first: see ``Profile``.

    back: ``[L, 2, G, C, C]``, components to channels, not rounded.
    """

    grid: NDArray[np.float32]
    analysis: NDArray[np.int16]
    unit: NDArray[np.float32]
    back: F64

    def real(self, place: tuple[int, ...]) -> F64:
        """``[C, C]``: what the rounded numbers of a group do to channels."""
        columns: F64 = self.analysis[place] * self.unit[place].astype(np.float64)
        whole: F64 = self.grid[place].astype(np.float64)[:, None] * columns
        return whole


def fit_transform(stats: Statistics) -> Transform:
    grid = (MAX_GRID / (GRID_ROOM * stats.spread)).astype(np.float32)
    analysis = np.zeros(stats.covariance.shape, np.int16)
    unit = np.zeros(stats.mean.shape, np.float32)
    transform = Transform(grid, analysis, unit, np.zeros(stats.covariance.shape))
    for place in np.ndindex(stats.mean.shape[:3]):
        forward = _principal(stats.covariance[place], stats.sensitivity[place])
        columns = forward / grid[place].astype(np.float64)[:, None]
        factor = MAX_COLUMN_SUM / np.abs(columns).sum(0)
        # Rounded towards zero, so that the cap holds.
        analysis[place] = np.trunc(columns * factor)
        unit[place] = 1 / factor
        # What is sent is made by the rounded matrix, so its inverse belongs to it.
        transform.back[place] = np.linalg.inv(transform.real(place))
    return transform


def synthesis(back: F64) -> tuple[NDArray[np.int16], NDArray[np.float32]]:
    """``[..., R, C]`` whole numbers and the scales ``[..., C]`` that make them ``back``."""
    scale = np.abs(back).sum(-2) / (MAX_ROW_SUM - FRACTION * back.shape[-2]) + 1e-30
    rounded = scale.astype(np.float32)
    return np.trunc(back / rounded[..., None, :]).astype(np.int16), rounded


def _principal(covariance: F64, sensitivity: F64) -> F64:
    """``[C, C]``, components as columns, greatest variance first."""
    size = len(covariance)
    ridge = RIDGE * np.trace(sensitivity) / size + 1e-30
    values, axes = np.linalg.eigh(sensitivity + ridge * np.eye(size))
    root = axes * np.sqrt(values) @ axes.T
    _, turned = np.linalg.eigh(root @ covariance @ root)
    components: F64 = root @ turned[:, ::-1]
    return components
