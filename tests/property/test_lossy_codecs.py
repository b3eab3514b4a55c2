"""The lossy codecs over any shape, place and level: errors stay within what the step allows."""

from __future__ import annotations

from functools import cache

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from kv_transfer.codecs.contract import CodecError, KvPart
from kv_transfer.codecs.lossy import LossyCodec
from kv_transfer.codecs.lossy_profile import Profile
from kv_transfer.codecs.lossy_reference import turned_groups
from kv_transfer.codecs.lossy_tables import LayerTables, Turns, level_tables, segments
from tests.support.kv_profiles import LEVELS, Geometry, Source, to_float

GEOMETRY = Geometry("float32")
NAMES = st.sampled_from([level.name for level in LEVELS])


@cache
def source() -> Source:
    return Source(GEOMETRY, 2, 2, 6)


@cache
def profile() -> Profile:
    return source().profile()


@cache
def codec(name: str) -> LossyCodec:
    return LossyCodec(GEOMETRY, profile(), name)


@settings(max_examples=25, deadline=None)
@given(
    name=NAMES,
    num_tokens=st.integers(1, 40),
    start=st.integers(0, 5000),
    after=st.integers(0, 40),
    seed=st.integers(0, 99),
)
def test_components_that_are_sent_come_within_a_step(
    name: str, num_tokens: int, start: int, after: int, seed: int
) -> None:
    part = KvPart(0, start, start + num_tokens + after)
    kv = source().kv(num_tokens, seed)
    out = np.empty_like(kv)
    codec(name).decode(codec(name).encode(kv, part), part, out)
    level = level_tables(profile(), profile().level(name))
    runs = segments(level.ages, part, num_tokens)
    ages = np.repeat(runs.kind, np.diff(runs.end, prepend=0))
    for layer, before, behind in zip(level.layers, kv, out, strict=True):
        sent = _quotients(layer, before, part, ages)
        came = _quotients(layer, behind, part, ages)
        is_sent = np.arange(sent.shape[-1]) < layer.rank[:, :, ages][..., None]
        # Half a step of rounding, less than one of reconstruction nearer to zero, and what
        # whole numbers in the matrices cost.
        allowed = 1.6 + 1e-3 * np.abs(sent)
        assert (np.abs(sent - came) <= allowed)[is_sent].all()


def _quotients(layer: LayerTables, kv: np.ndarray, part: KvPart, ages: np.ndarray) -> np.ndarray:
    """``[2, G, T, W]``, before rounding."""
    cos, sin = Turns().of(layer, part, kv.shape[1])
    groups = turned_groups(to_float(kv, "float32"), GEOMETRY.head_dim, layer, cos, -sin)
    z = (groups - layer.mean[:, :, None]) * layer.grid[:, :, None]
    return np.einsum("kgtc,kgcw->kgtw", z, layer.analysis) * layer.multiplier[:, :, ages]


@settings(max_examples=25, deadline=None)
@given(
    name=NAMES,
    cut=st.integers(1, 30),
    rest=st.integers(1, 30),
    layer=st.integers(0, 1),
    seed=st.integers(0, 99),
)
def test_frames_do_not_depend_on_their_neighbours(
    name: str, cut: int, rest: int, layer: int, seed: int
) -> None:
    total = cut + rest
    kv = source().kv(total, seed)
    whole = np.empty_like(kv)
    everything = KvPart(0, 0, total)
    codec(name).decode(codec(name).encode(kv, everything), everything, whole)
    part = KvPart(layer, cut, total)
    frame = np.ascontiguousarray(kv[layer : layer + 1, :, cut:])
    out = np.empty_like(frame)
    codec(name).decode(codec(name).encode(frame, part), part, out)
    assert (out == whole[layer : layer + 1, :, cut:]).all()


@settings(max_examples=60, deadline=None)
@given(data=st.data(), seed=st.integers(0, 20))
def test_changed_bytes_are_refused(data: st.DataObject, seed: int) -> None:
    kv = source().kv(7, seed)
    part = KvPart(0, 0, 7)
    stream = bytearray(codec("kv2").encode(kv, part))
    place = data.draw(st.integers(0, len(stream) - 1))
    stream[place] ^= data.draw(st.integers(1, 255))
    try:
        codec("kv2").decode(bytes(stream), part, np.empty_like(kv))
    except CodecError:
        return
    raise AssertionError(f"byte {place} of {len(stream)} was changed unseen")
