"""What calibration learned of one model's KV: the profile of the lossy codecs.

A profile is data: arrays in a safetensors file, a few words of JSON beside them, and a digest
over all that streams carry, so that two ends with different profiles never misread each other.

Axes: L layers; 2 for K, V; G groups of heads; C channels of a group (its heads side by side);
R components, most costly first; A age classes of tokens; V levels; N tables; S symbols.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from baton.protocol.errors import ConfigError
from kv_transfer.codecs.contract import KvGeometry, Quality
from kv_transfer.codecs.rans import MAX_TABLES, PROB_SCALE

PROFILE_FILE = "kv_codec.profile"
"""In the checkpoint's folder, where it is looked for. Not called *.safetensors, which would be
weights."""
PROFILE_VERSION = 1
MAX_GRID = 2047
"""Largest magnitude on the grid that channels are rounded to. With the cap on ``analysis`` every
partial sum of a product stays an integer that float32 holds, whatever the order of adding."""
MAX_COLUMN_SUM = 8191
FRACTION = 16
"""Reconstruction points are multiples of 1/16 of a step."""
ZERO_SYMBOL = 127
ESCAPE = 255
NUM_SYMBOLS = 256
MAX_QUOTIENT = 2047
MAX_ROW_SUM = 1 << 15
MAX_FILE_BYTES = 1 << 30

F32, I16, U8, U16, I32 = np.float32, np.int16, np.uint8, np.uint16, np.int32


@dataclass(frozen=True, slots=True)
class Level:
    """quality: what the level gave on calibration text, in the words of request floors."""

    name: str
    quality: Quality
    step: float


@dataclass(frozen=True, slots=True, eq=False)
class Profile:
    """See the module for axes. ``x`` is a channel of a token, keys turned back to position 0.

    model_digest: of the checkpoint it was made from. ages: ``[A]`` int32, ascending from 0: a
      token belongs to the last class whose age (tokens after it in the prompt) it has reached.
    inv_freq: ``[L, P]`` radians per position of pair (i, i + P) of a head; 0 leaves it as it is.
    mean, grid: ``[L, 2, G, C]``; ``z = rint((x - mean) * grid)`` is an integer.
    analysis: ``[L, 2, G, C, R]`` int16; ``y = z @ analysis``.
    unit: ``[L, 2, G, R]``; ``y * unit`` is a component in units of equal loss.
    synthesis: ``[L, 2, G, R, C]`` int16, scale: ``[L, 2, G, C]``: back to channels.
    gain: ``[L, 2, A]``: how much finer than the level's step tokens of a class are rounded.
    rank: ``[V, L, 2, G, A]`` int16, components that are sent; table: ``[V, L, 2, G, A, R]``,
      the table of each.
    frequencies: ``[N, S]`` uint16, of 4,096. limit: ``[N]``, quotients beyond it are escaped.
    shrink: ``[N, 2]``: how far reconstruction lies nearer to zero, for quotients of 1 and above,
      in sixteenths of a step.
    """

    model_digest: str
    levels: tuple[Level, ...]
    head_dim: int
    num_kv_heads: int
    ages: NDArray[np.int32]
    inv_freq: NDArray[np.float32]
    mean: NDArray[np.float32]
    grid: NDArray[np.float32]
    analysis: NDArray[np.int16]
    unit: NDArray[np.float32]
    synthesis: NDArray[np.int16]
    scale: NDArray[np.float32]
    gain: NDArray[np.float32]
    rank: NDArray[np.int16]
    table: NDArray[np.uint8]
    frequencies: NDArray[np.uint16]
    limit: NDArray[np.uint8]
    shrink: NDArray[np.uint8]

    def __post_init__(self) -> None:
        problem = _problem(self)
        if problem:
            raise ConfigError(f"KV codec profile: {problem}; make it again: baton calibrate")

    @property
    def num_layers(self) -> int:
        return int(self.mean.shape[0])

    @property
    def num_groups(self) -> int:
        return int(self.mean.shape[2])

    @property
    def width(self) -> int:
        """Channels of a group."""
        return int(self.mean.shape[3])

    def level(self, name: str) -> int:
        """Place of a level. Raises ConfigError."""
        for place, level in enumerate(self.levels):
            if level.name == name:
                return place
        known = ", ".join(level.name for level in self.levels)
        raise ConfigError(f"KV codec {name!r}: the profile has {known}", param="codec")

    def check_shape(self, geometry: KvGeometry) -> None:
        """Raises ConfigError for another model's heads."""
        found = (self.num_kv_heads, self.head_dim)
        if found != (geometry.num_kv_heads, geometry.head_dim):
            raise ConfigError(
                f"KV codec profile of {found[0]} heads of {found[1]}, the model has "
                f"{geometry.num_kv_heads} of {geometry.head_dim}; make it again: baton calibrate"
            )

    def digest(self) -> bytes:
        """8 bytes over everything that coding depends on, the same on every machine."""
        digest = hashlib.blake2b(_metadata(self).encode(), digest_size=8)
        for name, dtype, _ in _ARRAYS:
            array = getattr(self, name)
            digest.update(f"{name}{array.shape}".encode())
            digest.update(np.ascontiguousarray(array, np.dtype(dtype).newbyteorder("<")).data)
        return digest.digest()


_ARRAYS: tuple[tuple[str, Any, str], ...] = (
    ("ages", I32, "A"),
    ("inv_freq", F32, "LP"),
    ("mean", F32, "L2GC"),
    ("grid", F32, "L2GC"),
    ("analysis", I16, "L2GCR"),
    ("unit", F32, "L2GR"),
    ("synthesis", I16, "L2GRC"),
    ("scale", F32, "L2GC"),
    ("gain", F32, "L2A"),
    ("rank", I16, "VL2GA"),
    ("table", U8, "VL2GAR"),
    ("frequencies", U16, "NS"),
    ("limit", U8, "N"),
    ("shrink", U8, "N2"),
)
"""Name, dtype and axes."""


def save_profile(profile: Profile, path: Path) -> None:
    arrays = {name: np.ascontiguousarray(getattr(profile, name)) for name, _, _ in _ARRAYS}
    path.write_bytes(save(arrays, metadata={"baton": _metadata(profile)}))


def load_profile(path: Path) -> Profile:
    """Raises ConfigError for a file that is missing, of another version or not sound."""
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise ConfigError(f"{path}: larger than a KV codec profile may be (1 GiB)")
        with safe_open(path, framework="numpy") as file:
            meta = _read_metadata(path, (file.metadata() or {}).get("baton", ""))
            names = set(file.keys())
            missing = [name for name, _, _ in _ARRAYS if name not in names]
            if missing:
                raise ConfigError(f"{path}: no KV codec profile: {', '.join(missing)} missing")
            arrays = {name: file.get_tensor(name) for name, _, _ in _ARRAYS}
    except (OSError, SafetensorError) as exc:
        raise ConfigError(f"{path}: KV codec profile cannot be read ({exc})") from exc
    return Profile(**meta, **arrays)


def find_profile(folder: Path, model_digest: str) -> Profile | None:
    """Of the checkpoint in ``folder``; None where it has none. Raises ConfigError for one that
    was made from other weights."""
    path = folder / PROFILE_FILE
    if not path.is_file():
        return None
    profile = load_profile(path)
    if profile.model_digest != model_digest:
        raise ConfigError(
            f"{path}: made from the checkpoint {profile.model_digest}, this one is "
            f"{model_digest}; make it again: baton calibrate {folder}"
        )
    return profile


def _metadata(profile: Profile) -> str:
    levels = [[level.name, int(level.quality), float(level.step)] for level in profile.levels]
    return json.dumps(
        {
            "version": PROFILE_VERSION,
            "model_digest": profile.model_digest,
            "num_kv_heads": profile.num_kv_heads,
            "head_dim": profile.head_dim,
            "levels": levels,
        },
        sort_keys=True,
    )


def _read_metadata(path: Path, text: str) -> dict[str, Any]:
    try:
        meta = json.loads(text)
        version = meta["version"]
        if version == PROFILE_VERSION:
            return {
                "model_digest": str(meta["model_digest"]),
                "num_kv_heads": int(meta["num_kv_heads"]),
                "head_dim": int(meta["head_dim"]),
                "levels": tuple(Level(str(n), Quality(q), float(s)) for n, q, s in meta["levels"]),
            }
    except (ValueError, TypeError, KeyError, RecursionError) as exc:
        raise ConfigError(f"{path}: no KV codec profile ({exc!r})") from exc
    raise ConfigError(
        f"{path}: KV codec profile of version {version!r}, this Baton reads {PROFILE_VERSION}; "
        "make it again: baton calibrate"
    )


def _problem(p: Profile) -> str:
    """What coding could not bear; "" where all is sound."""
    assert {f.name for f in fields(p)} >= {name for name, _, _ in _ARRAYS}
    sides: dict[str, int] = {"2": 2, "S": NUM_SYMBOLS, "V": len(p.levels)}
    for name, dtype, axes in _ARRAYS:
        array = getattr(p, name)
        if array.dtype != np.dtype(dtype) or array.ndim != len(axes) or not array.size:
            return f"{name} is {array.dtype}{list(array.shape)}"
        for axis, side in zip(axes, array.shape, strict=True):
            if sides.setdefault(axis, side) != side:
                return f"{name} has shape {list(array.shape)}, axis {axis} is {sides[axis]}"
        if array.dtype == F32 and not np.isfinite(array).all():
            return f"{name} is not finite everywhere"
    if p.width * p.num_groups != p.num_kv_heads * p.head_dim or p.width % max(p.head_dim, 1):
        return f"groups of {p.width} do not divide {p.num_kv_heads} heads of {p.head_dim}"
    if 2 * sides["P"] > p.head_dim:
        return f"{sides['P']} pairs are turned in a head of {p.head_dim}"
    if p.ages[0] != 0 or (np.diff(p.ages) <= 0).any():
        return f"ages {p.ages.tolist()} do not ascend from 0"
    return _range_problem(p)


def _range_problem(p: Profile) -> str:
    """Arithmetic must stay exact, and table numbers and ranks must exist."""
    if np.abs(p.analysis.astype(np.int64)).sum(axis=3).max() > MAX_COLUMN_SUM:
        return f"a column of analysis adds up to more than {MAX_COLUMN_SUM}"
    if np.abs(p.synthesis.astype(np.int64)).sum(axis=3).max() > MAX_ROW_SUM:
        return f"synthesis of a channel adds up to more than {MAX_ROW_SUM}"
    positive = (p.grid.min(), p.unit.min(), p.scale.min(), p.gain.min())
    if min(positive) <= 0 or any(not 0 < level.step < np.inf for level in p.levels):
        return "a step, grid, unit, scale or gain is not positive"
    if p.rank.min() < 0 or p.rank.max() > p.analysis.shape[4]:
        return f"a rank is not within 0 and {p.analysis.shape[4]}"
    num_tables = len(p.frequencies)
    if num_tables > MAX_TABLES or p.table.max() >= num_tables:
        return f"{num_tables} tables, number {p.table.max()} used"
    freqs = p.frequencies.astype(np.int64)
    if (freqs.sum(axis=1) != PROB_SCALE).any() or freqs.max() >= PROB_SCALE:
        return "the frequencies of a table do not add up to 4096"
    if p.limit.max() > ZERO_SYMBOL or p.shrink.max() >= FRACTION:
        return f"a limit above {ZERO_SYMBOL} or a shrink of a step or more"
    if any(
        freqs[n, ZERO_SYMBOL - k : ZERO_SYMBOL + k + 1].min() < 1 for n, k in enumerate(p.limit)
    ):
        return "a table lacks a quotient within its limit"
    return "" if freqs[:, ESCAPE].min() >= 1 else "a table lacks the escape"
