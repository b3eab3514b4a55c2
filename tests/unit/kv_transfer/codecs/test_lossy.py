"""The lossy codecs on a made-up model: exactness of implementations, bounds, damage."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest

from baton.protocol.errors import ConfigError
from kv_transfer.codecs.container import StreamWriter, read_header, read_sections
from kv_transfer.codecs.contract import CodecError, Implementation, KvPart
from kv_transfer.codecs.lossy import LossyCodec
from kv_transfer.codecs.lossy_profile import Profile
from tests.support.kv_profiles import LEVELS, Geometry, Source, to_float

DTYPES = ("bfloat16", "float16", "float32")
LAYERS = 2
IMPLEMENTATIONS: tuple[Implementation, ...] = ("reference", "compiled")


@cache
def source(dtype: str = "bfloat16", num_groups: int = 1, pairs: int = 8) -> Source:
    return Source(Geometry(dtype), LAYERS, num_groups, pairs)


@cache
def profile(num_groups: int = 1, pairs: int = 8) -> Profile:
    return source("bfloat16", num_groups, pairs).profile()


@pytest.mark.parametrize("level", [level.name for level in LEVELS])
@pytest.mark.parametrize(
    ("dtype", "num_groups", "pairs"),
    [*((dtype, 1, 8) for dtype in DTYPES), ("bfloat16", 2, 4), ("bfloat16", 2, 0)],
)
def test_implementations_give_the_same_bits(
    dtype: str, num_groups: int, pairs: int, level: str
) -> None:
    made = source(dtype, num_groups, pairs)
    kv, part = made.kv(75, seed=1), KvPart(0, 0, 75)
    streams, decoded = [], []
    for implementation in IMPLEMENTATIONS:
        codec = LossyCodec(made.geometry, profile(num_groups, pairs), level, implementation)
        streams.append(bytes(codec.encode(kv, part)))
        out = np.empty_like(kv)
        codec.decode(streams[-1], part, out)
        decoded.append(out)
    assert streams[0] == streams[1]
    assert (decoded[0] == decoded[1]).all()
    assert len(streams[0]) < kv.nbytes / 2


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_finer_levels_come_nearer_and_cost_more(implementation: Implementation) -> None:
    made = source()
    kv, part = made.kv(100, seed=2), KvPart(0, 0, 100)
    sizes, errors = [], []
    for level in LEVELS:
        codec = LossyCodec(made.geometry, profile(), level.name, implementation)
        stream, out = codec.encode(kv, part), np.empty_like(kv)
        codec.decode(stream, part, out)
        sizes.append(len(stream))
        errors.append(np.square(to_float(out, "bfloat16") - to_float(kv, "bfloat16")).mean())
    assert sizes == sorted(sizes, reverse=True)
    assert errors == sorted(errors)


def test_a_frame_in_the_middle_decodes_alone() -> None:
    made = source()
    kv = made.kv(80, seed=3)
    codec = LossyCodec(made.geometry, profile(), "kv1")
    whole = np.empty_like(kv)
    codec.decode(codec.encode(kv, KvPart(0, 0, 80)), KvPart(0, 0, 80), whole)
    part = KvPart(1, 33, 80)
    cut = np.ascontiguousarray(kv[1:, :, 33:70])
    out = np.empty_like(cut)
    codec.decode(codec.encode(cut, part), part, out)
    assert (out == whole[1:, :, 33:70]).all()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_rows_that_no_grid_reaches_come_as_they_are(implementation: Implementation) -> None:
    made = source()
    kv, part = made.kv(40, seed=4), KvPart(0, 0, 40)
    kv[0, 0, 5, 1, 3] = 0x7FC1  # a NaN with a payload
    kv[1, 1, 7, 0, 0] = 0xFF80  # minus infinity
    kv[1, 0, 9] = 0x7F00
    codec = LossyCodec(made.geometry, profile(), "kv2", implementation)
    out = np.empty_like(kv)
    codec.decode(codec.encode(kv, part), part, out)
    assert (out[0, 0, 5] == kv[0, 0, 5]).all()
    assert (out[1, 1, 7] == kv[1, 1, 7]).all()
    assert (out[1, 0, 9] == kv[1, 0, 9]).all()
    assert not (out == kv).all()


@pytest.mark.parametrize("value", [0, 0x7FFF])
def test_a_layer_that_does_not_get_smaller_goes_raw(value: int) -> None:
    made = source()
    kv = np.full_like(made.kv(3, seed=5), value)
    codec = LossyCodec(made.geometry, profile(), "kv1")
    stream, out = codec.encode(kv, KvPart(0, 0, 3)), np.zeros_like(kv)
    codec.decode(stream, KvPart(0, 0, 3), out)
    if value == 0x7FFF:
        assert (out == kv).all()
    assert len(stream) < kv.nbytes + 200


def test_another_profile_is_refused() -> None:
    made = source()
    kv, part = made.kv(10, seed=6), KvPart(0, 0, 10)
    stream = LossyCodec(made.geometry, profile(), "kv2").encode(kv, part)
    other = LossyCodec(made.geometry, source("bfloat16", 2, 4).profile(), "kv2")
    with pytest.raises(CodecError, match="profile"):
        other.decode(stream, part, np.empty_like(kv))


def test_names_the_levels_there_are() -> None:
    with pytest.raises(ConfigError, match="kv1, kv2, kv3, kv4"):
        LossyCodec(Geometry(), profile(), "kv9")


def test_refuses_a_profile_of_another_shape() -> None:
    with pytest.raises(ConfigError, match="2 heads of 16"):
        LossyCodec(Geometry(num_kv_heads=4), profile(), "kv1")


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_damage_behind_a_right_checksum_is_an_error_or_harmless(
    implementation: Implementation,
) -> None:
    """Sections are checksummed; what a broken or hostile encoder sums up right must not harm."""
    made = source()
    kv, part = made.kv(24, seed=7), KvPart(0, 0, 24)
    codec = LossyCodec(made.geometry, profile(), "kv1", implementation)
    stream = bytes(codec.encode(kv, part))
    rng = np.random.default_rng(8)
    refused = 0
    num_times = 200 if implementation == "compiled" else 20
    for _ in range(num_times):
        damaged = _with_damaged_section(stream, rng)
        try:
            codec.decode(damaged, part, np.empty_like(kv))
        except CodecError:
            refused += 1
    # Values of raw rows and escapes are as good as others.
    assert refused > num_times / 2


def _with_damaged_section(stream: bytes, rng: np.random.Generator) -> bytes:
    """A few bytes of the first section changed, its checksum made to fit."""
    header = read_header(stream)
    writer = StreamWriter(header)
    for place, section in enumerate(read_sections(stream, header)):
        data = np.frombuffer(section.data, np.uint8).copy()
        if place == 0:
            where = rng.integers(0, min(64, data.size) if rng.random() < 0.5 else data.size, 3)
            data[where] = rng.integers(0, 256, 3)
        writer.room()[: data.size] = data
        writer.commit(data.size, section.form)
    return bytes(writer.finish())
