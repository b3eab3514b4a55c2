"""Cutting KV into frames, and checking that frames put together are the KV again. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from baton.protocol.errors import WireError
from baton.protocol.layout import KvLayout
from baton.protocol.messages import KvFrame

RAW = "raw"
"""The KV's own bytes; the only codec of wire version 1."""


@dataclass(frozen=True, slots=True)
class FrameCut:
    """One frame's rectangle in the (layer, token) plane."""

    layer_start: int
    num_layers: int
    token_start: int
    num_tokens: int


def cut_frames(
    layout: KvLayout, token_start: int, num_tokens: int, max_frame_bytes: int
) -> Iterator[FrameCut]:
    """Rectangles of at most ``max_frame_bytes`` that cover the tokens of all layers once.

    Few large frames: all layers of a token run together where they fit, else one layer
    group after the other, so that each layer's tokens arrive in order.
    """
    row_bytes = layout.bytes_per_token_layer
    tokens_per_frame = max(1, min(num_tokens, max_frame_bytes // row_bytes))
    layers_per_frame = max(1, max_frame_bytes // (row_bytes * tokens_per_frame))
    for layer in range(0, layout.num_layers, layers_per_frame):
        num_layers = min(layers_per_frame, layout.num_layers - layer)
        for token in range(token_start, token_start + num_tokens, tokens_per_frame):
            count = min(tokens_per_frame, token_start + num_tokens - token)
            yield FrameCut(layer, num_layers, token, count)


class Coverage:
    """Which tokens of which layer have arrived. Refuses gaps, overlaps and wrong sizes."""

    def __init__(self, layout: KvLayout, num_tokens: int) -> None:
        self._layout = layout
        self._fingerprint = layout.fingerprint()
        self._num_tokens = num_tokens
        self._arrived = [0] * layout.num_layers
        self.num_frames = 0
        self.num_bytes = 0

    def check(self, frame: KvFrame, num_bytes: int, checksum: int) -> None:
        """Raises WireError for a frame that must not be written; changes nothing."""
        rows = frame.num_layers * frame.num_tokens
        problem = ""
        if frame.fingerprint != self._fingerprint:
            problem = f"layout {frame.fingerprint}, expected {self._fingerprint}"
        elif frame.codec != RAW:
            problem = f"codec {frame.codec!r}, expected {RAW!r}"
        elif frame.index != self.num_frames:
            problem = f"frame {frame.index}, expected {self.num_frames}"
        elif not 0 < frame.num_layers <= self._layout.num_layers - frame.layer_start:
            problem = f"layers from {frame.layer_start}, {frame.num_layers} of them"
        elif not 0 < frame.num_tokens <= self._num_tokens - frame.token_start:
            problem = f"tokens from {frame.token_start}, {frame.num_tokens} of them"
        elif num_bytes != frame.num_bytes or num_bytes != rows * self._layout.bytes_per_token_layer:
            problem = f"{num_bytes} payload bytes for {rows} rows, header says {frame.num_bytes}"
        elif checksum != frame.checksum:
            problem = f"checksum {checksum:#x}, header says {frame.checksum:#x}"
        elif any(
            self._arrived[layer] != frame.token_start
            for layer in range(frame.layer_start, frame.layer_start + frame.num_layers)
        ):
            problem = f"tokens from {frame.token_start} come twice or too early"
        if problem:
            raise WireError(f"KV frame {frame.index} of {frame.transfer_id}: {problem}")

    def add(self, frame: KvFrame) -> None:
        for layer in range(frame.layer_start, frame.layer_start + frame.num_layers):
            self._arrived[layer] += frame.num_tokens
        self.num_frames += 1
        self.num_bytes += frame.num_bytes

    @property
    def is_complete(self) -> bool:
        return all(arrived == self._num_tokens for arrived in self._arrived)
