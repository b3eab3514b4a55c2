"""Cutting KV into frames, and checking that frames put together are the KV again. Pure."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import dataclass

from baton.protocol.errors import WireError
from baton.protocol.layout import KvLayout
from baton.protocol.messages import KvFrame, TransferEnd
from kv_transfer.codecs.checksum import checksum, checksum_of
from kv_transfer.codecs.container import max_stream_bytes
from kv_transfer.codecs.contract import Bytes

RAW = "raw"
"""The KV's own bytes; the only codec of version 1."""
KV_VERSION = 2
"""Of frames and their order. What a hand-over speaks is settled by Reserve and Granted: the
lower of both sides'."""


@dataclass(frozen=True, slots=True)
class FrameCut:
    """One frame's rectangle in the (layer, token) plane. Its layers are of one group."""

    layer_start: int
    num_layers: int
    token_start: int
    num_tokens: int
    group: int = 0


class Framing:
    """What frames of a layout are like in one version."""

    def __init__(self, layout: KvLayout, version: int) -> None:
        """Raises InternalError for a layout that version 1 cannot express."""
        self.layout = layout.spoken(version)
        self.version = version
        self.fingerprint = layout.fingerprint(version)
        self._runs = sorted(
            (first, count, number)
            for number, group in enumerate(self.layout.groups)
            for first, count in group.runs
        )
        self._group_of = {
            layer: number
            for number, group in enumerate(self.layout.groups)
            for layer in group.layers
        }

    def row_bytes(self, group: int) -> int:
        return self.layout.row_bytes(self.layout.groups[group])

    def group_of(self, layer: int) -> int:
        return self._group_of[layer]

    def num_bytes(self, cut: FrameCut) -> int:
        """Of the rectangle as it is, not coded."""
        return cut.num_layers * cut.num_tokens * self.row_bytes(cut.group)

    def needed_from(self, num_tokens: int) -> list[int]:
        """By layer: the first row that has to come of a prompt of ``num_tokens``."""
        groups = self.layout.groups
        return [
            groups[self._group_of[n]].needed_from(num_tokens) for n in range(len(self._group_of))
        ]

    def cuts(
        self,
        token_start: int,
        num_tokens: int,
        max_frame_bytes: int,
        *,
        num_tokens_total: int,
        layers: range | None = None,
    ) -> Iterator[FrameCut]:
        """Rectangles of at most ``max_frame_bytes`` that cover the needed ones of those rows once.

        Few large frames: all layers of a token run together where they fit, else one layer
        group after the other, so that each layer's tokens arrive in order.
        """
        wanted = range(self.layout.num_layers) if layers is None else layers
        stop = token_start + num_tokens
        for first, count, group in self._runs:
            low, high = max(first, wanted.start), min(first + count, wanted.stop)
            start = max(token_start, self.layout.groups[group].needed_from(num_tokens_total))
            if low < high and start < stop:
                yield from self._cut_run(range(low, high), group, start, stop, max_frame_bytes)

    def _cut_run(
        self, layers: range, group: int, start: int, stop: int, max_frame_bytes: int
    ) -> Iterator[FrameCut]:
        row_bytes = self.row_bytes(group)
        tokens_per_frame = max(1, min(stop - start, max_frame_bytes // row_bytes))
        layers_per_frame = max(1, max_frame_bytes // (row_bytes * tokens_per_frame))
        for layer in range(layers.start, layers.stop, layers_per_frame):
            num_layers = min(layers_per_frame, layers.stop - layer)
            for token in range(start, stop, tokens_per_frame):
                yield FrameCut(layer, num_layers, token, min(tokens_per_frame, stop - token), group)


def framings_of(layout: KvLayout) -> dict[int, Framing]:
    """By version: those that can express the layout."""
    framings = {KV_VERSION: Framing(layout, KV_VERSION)}
    shapes = {(group.num_kv_heads, group.head_dim) for group in layout.groups}
    if len(shapes) == 1:
        framings[1] = Framing(layout, 1)
    return framings


def frame_checksum(frame: KvFrame, payload: Bytes) -> int:
    """What ``frame.checksum`` must be, by ``frame.version``."""
    if frame.version < 2:
        return zlib.crc32(payload)
    strings = (frame.transfer_id, frame.fingerprint, frame.codec)
    head = _joined(
        strings,
        frame.epoch,
        frame.index,
        frame.layer_start,
        frame.num_layers,
        frame.token_start,
        frame.num_tokens,
        frame.num_bytes,
        frame.version,
        frame.group,
    )
    return checksum((head, payload))


def end_checksum(end: TransferEnd) -> int:
    """What ``end.checksum`` must be; version 1 has none, and says 0."""
    if end.version < 2:
        return 0
    numbers = (end.epoch, end.num_frames, end.num_tokens, end.version, *end.token_ids)
    return checksum_of(_joined((end.transfer_id, repr(end.lag_s)), *numbers))


def _joined(strings: tuple[str, ...], *numbers: int) -> bytes:
    """Different for different fields: the strings' lengths are among the numbers."""
    lengths = (str(len(s)) for s in strings)
    return "|".join((*map(str, numbers), *lengths, *strings)).encode()


class Coverage:
    """Which rows of which layer have been let in. Refuses gaps, overlaps and wrong sizes."""

    def __init__(
        self, framing: Framing, num_tokens: int, codecs: frozenset[str] = frozenset({RAW})
    ) -> None:
        self._framing = framing
        self._num_tokens = num_tokens
        self._codecs = codecs
        self._begun = framing.needed_from(num_tokens)
        self._arrived = list(self._begun)
        self.num_frames = 0
        self.num_bytes = 0
        """As they came; ``num_raw_bytes`` is what they stand for."""
        self.num_raw_bytes = 0
        self.codecs: dict[str, int] = {}
        """Payload bytes by codec."""

    def check(self, frame: KvFrame, num_bytes: int, checksum: int) -> None:
        """Raises WireError for a frame that must not be written; changes nothing."""
        problem = self._promise_broken(frame, num_bytes) or (
            f"checksum {checksum:#x}, header says {frame.checksum:#x}"
            if checksum != frame.checksum
            else ""
        )
        if problem:
            raise WireError(f"KV frame {frame.index} of {frame.transfer_id}: {problem}")

    def _promise_broken(self, frame: KvFrame, num_bytes: int) -> str:
        framing = self._framing
        if frame.version != framing.version:
            return f"version {frame.version}, expected {framing.version}"
        if frame.fingerprint != framing.fingerprint:
            return f"layout {frame.fingerprint}, expected {framing.fingerprint}"
        if frame.codec not in self._codecs:
            return f"codec {frame.codec!r}, expected {' or '.join(sorted(self._codecs))}"
        if frame.index != self.num_frames:
            return f"frame {frame.index}, expected {self.num_frames}"
        if not 0 < frame.num_layers <= framing.layout.num_layers - frame.layer_start:
            return f"layers from {frame.layer_start}, {frame.num_layers} of them"
        if not 0 < frame.num_tokens <= self._num_tokens - frame.token_start:
            return f"tokens from {frame.token_start}, {frame.num_tokens} of them"
        layers = range(frame.layer_start, frame.layer_start + frame.num_layers)
        if any(framing.group_of(layer) != frame.group for layer in layers):
            return f"layers from {layers.start} to {layers.stop - 1} are not of group {frame.group}"
        rows = frame.num_layers * frame.num_tokens
        layer_bytes = frame.num_tokens * framing.row_bytes(frame.group)
        expected = frame.num_layers * layer_bytes
        if frame.codec != RAW:
            expected = min(num_bytes, max_stream_bytes(frame.num_layers, layer_bytes))
        if num_bytes != frame.num_bytes or num_bytes != expected:
            return f"{num_bytes} payload bytes for {rows} rows, header says {frame.num_bytes}"
        if any(self._arrived[layer] != frame.token_start for layer in layers):
            return f"tokens from {frame.token_start} come twice or too early"
        return ""

    def add(self, frame: KvFrame) -> None:
        for layer in range(frame.layer_start, frame.layer_start + frame.num_layers):
            self._arrived[layer] += frame.num_tokens
        self.num_frames += 1
        self.num_bytes += frame.num_bytes
        rows = frame.num_layers * frame.num_tokens
        self.num_raw_bytes += rows * self._framing.row_bytes(frame.group)
        self.codecs[frame.codec] = self.codecs.get(frame.codec, 0) + frame.num_bytes

    @property
    def is_complete(self) -> bool:
        return self.covers(self._num_tokens)

    def complete_from(self, num_tokens: int) -> int:
        """From which position on the rows of the first ``num_tokens`` came for all layers."""
        return min(max(self._begun), num_tokens)

    def covers(self, num_tokens: int) -> bool:
        """Whether all is there that tokens behind the first ``num_tokens`` look at."""
        needed = self._framing.needed_from(num_tokens)
        return num_tokens == 0 or all(
            first >= num_tokens or (begun <= first and arrived >= num_tokens)
            for begun, first, arrived in zip(self._begun, needed, self._arrived, strict=True)
        )
