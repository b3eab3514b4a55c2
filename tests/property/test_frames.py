"""Frames cover each (layer, token) exactly once, and only exactly that is accepted."""

from __future__ import annotations

import zlib
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from baton.protocol.errors import WireError
from baton.protocol.layout import KvLayout
from baton.protocol.messages import KvFrame
from kv_transfer.frames import RAW, Coverage, FrameCut, cut_frames

FAST = settings(deadline=None, max_examples=100)
LAYOUTS = st.builds(
    KvLayout.uniform,
    num_layers=st.integers(1, 6),
    num_kv_heads=st.integers(1, 3),
    head_dim=st.integers(1, 8),
    dtype=st.sampled_from(["float32", "bfloat16"]),
    model_digest=st.just("m"),
)
SIZES = st.integers(1, 40) | st.integers(1, 5_000)


def rows(cut: FrameCut) -> list[tuple[int, int]]:
    return [
        (layer, token)
        for layer in range(cut.layer_start, cut.layer_start + cut.num_layers)
        for token in range(cut.token_start, cut.token_start + cut.num_tokens)
    ]


def make_frame(layout: KvLayout, index: int, cut: FrameCut) -> tuple[KvFrame, bytes]:
    num_bytes = cut.num_layers * cut.num_tokens * layout.bytes_per_token_layer
    payload = bytes((index + i) % 251 for i in range(num_bytes))
    frame = KvFrame(
        "r/0",
        1,
        layout.fingerprint(),
        index,
        cut.layer_start,
        cut.num_layers,
        cut.token_start,
        cut.num_tokens,
        RAW,
        num_bytes,
        zlib.crc32(payload),
    )
    return frame, payload


def accept(coverage: Coverage, frame: KvFrame, payload: bytes) -> None:
    coverage.check(frame, len(payload), zlib.crc32(payload))
    coverage.add(frame)


@given(LAYOUTS, st.integers(0, 20), st.integers(0, 30), SIZES)
@settings(FAST)
def test_cuts_cover_every_row_once_and_keep_the_size(
    layout: KvLayout, token_start: int, num_tokens: int, max_frame_bytes: int
) -> None:
    cuts = list(cut_frames(layout, token_start, num_tokens, max_frame_bytes))
    covered = [row for cut in cuts for row in rows(cut)]
    assert len(set(covered)) == len(covered)
    assert set(covered) == {
        (layer, token_start + token)
        for layer in range(layout.num_layers)
        for token in range(num_tokens)
    }
    for cut in cuts:
        num_rows = cut.num_layers * cut.num_tokens
        assert num_rows == 1 or num_rows * layout.bytes_per_token_layer <= max_frame_bytes


@given(LAYOUTS, st.lists(st.integers(1, 9), min_size=1, max_size=4), SIZES)
@settings(FAST)
def test_chunk_after_chunk_completes_the_coverage(
    layout: KvLayout, chunks: list[int], max_frame_bytes: int
) -> None:
    num_tokens = sum(chunks)
    coverage = Coverage(layout, num_tokens)
    index = start = 0
    for count in chunks:
        for cut in cut_frames(layout, start, count, max_frame_bytes):
            assert not coverage.is_complete
            accept(coverage, *make_frame(layout, index, cut))
            index += 1
        start += count
    assert coverage.is_complete
    assert coverage.num_frames == index
    assert coverage.num_bytes == num_tokens * layout.bytes_per_token


@given(LAYOUTS, st.integers(1, 12), SIZES, st.data())
@settings(FAST)
def test_a_frame_out_of_turn_is_refused_and_changes_nothing(
    layout: KvLayout, num_tokens: int, max_frame_bytes: int, data: st.DataObject
) -> None:
    """Whichever frame comes instead of the next one, in its own number or in the next's."""
    cuts = list(cut_frames(layout, 0, num_tokens, max_frame_bytes))
    turn = data.draw(st.integers(0, len(cuts) - 1))
    coverage = Coverage(layout, num_tokens)
    for index, cut in enumerate(cuts[:turn]):
        accept(coverage, *make_frame(layout, index, cut))
    if len(cuts) > 1:
        other = data.draw(st.integers(0, len(cuts) - 1).filter(lambda i: i != turn))
        frame, payload = make_frame(layout, other, cuts[other])
        for intruder in (frame, msgspec.structs.replace(frame, index=turn)):
            if intruder.index == turn < other and cuts[other].token_start == 0:
                continue  # the beginning of other layers may come first
            with pytest.raises(WireError, match="KV frame"):
                accept(coverage, intruder, payload)
    for index, cut in enumerate(cuts[turn:], turn):
        accept(coverage, *make_frame(layout, index, cut))
    assert coverage.is_complete


LAYOUT = KvLayout.uniform(
    num_layers=2, num_kv_heads=1, head_dim=2, dtype="float32", model_digest="m"
)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"fingerprint": "other"}, "layout other"),
        ({"codec": "zstd"}, "codec 'zstd'"),
        ({"index": 1}, "frame 1, expected 0"),
        ({"layer_start": 1}, "layers from 1, 2 of them"),
        ({"layer_start": 2**62}, "layers from"),
        ({"num_layers": 0}, "layers from 0, 0 of them"),
        ({"num_layers": 3}, "layers from 0, 3 of them"),
        ({"token_start": 1}, "tokens from 1, 3 of them"),
        ({"token_start": 2**62}, "tokens from"),
        ({"num_tokens": 0}, "tokens from 0, 0 of them"),
        ({"num_tokens": 4}, "tokens from 0, 4 of them"),
        ({"num_tokens": 2}, "payload bytes for 4 rows"),
        ({"num_layers": 1}, "payload bytes for 3 rows"),
        ({"num_bytes": 95}, "header says 95"),
        ({"checksum": 5}, "header says 0x5"),
    ],
)
def test_each_broken_promise_is_named(change: dict[str, Any], problem: str) -> None:
    coverage = Coverage(LAYOUT, 3)
    frame, payload = make_frame(LAYOUT, 0, FrameCut(0, 2, 0, 3))
    with pytest.raises(WireError, match=problem):
        accept(coverage, msgspec.structs.replace(frame, **change), payload)
    assert (coverage.num_frames, coverage.num_bytes, coverage.is_complete) == (0, 0, False)
    accept(coverage, frame, payload)
    assert coverage.is_complete


@given(st.data())
@settings(FAST)
def test_a_damaged_payload_is_refused(data: st.DataObject) -> None:
    coverage = Coverage(LAYOUT, 3)
    frame, payload = make_frame(LAYOUT, 0, FrameCut(0, 2, 0, 3))
    damaged = bytearray(payload)
    damaged[data.draw(st.integers(0, len(payload) - 1))] ^= data.draw(st.integers(1, 255))
    cut = payload[: data.draw(st.integers(0, len(payload) - 1))]
    for bad in (bytes(damaged), cut, payload + b"\0"):
        with pytest.raises(WireError):
            accept(coverage, frame, bad)
    accept(coverage, frame, payload)
