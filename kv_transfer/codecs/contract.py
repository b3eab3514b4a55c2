"""What a codec is: KV of one rectangle of the (layer, token) plane to bytes, and back.

Arrays are C-contiguous ``[layers, 2 (K, V), tokens, kv_heads, head_dim]``; bfloat16 and float16
as ``uint16`` (their bits), float32 as itself (``array_dtype``). Rules that every codec keeps:

- Sections. A stream holds one section per layer; each can be decoded without the others, and
  streams without each other: whatever frames arrive, those that did can be used.
- Self-describing. ``container`` writes magic, version, codec, dtype, dims and profile digest in
  front; each section has a checksum. A receiver knows codec, dims and part from the frame
  header too: where the two differ, decoding raises CodecError.
- Hostile bytes. Lengths are compared with what the expected dims allow before anything is
  allocated or read. ``decode`` raises CodecError and nothing else, reads no byte outside the
  stream and writes none outside ``out``; what ``out`` holds after an error means nothing.
- Never large. No stream is longer than ``container.max_stream_bytes``: where coding does not
  pay, or a lossy codec meets NaN or infinity, that section holds the raw bytes instead.
- One answer. Reference (numpy), compiled (numba) and Triton give the same bits for the same
  input. Where floats are computed: float32, order and rounding (half to even) fixed, multiply
  and add apart, never fused.

Coding runs without the GIL but takes milliseconds: call it off the event loop. Codec objects
hold tables only and may be used from several threads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from baton.protocol.errors import WireError

Bytes = bytes | bytearray | memoryview
Array = NDArray[Any]

Implementation = Literal["compiled", "reference"]
"""Same bytes; the reference is slow and there for tests."""

ARRAY_DTYPES: dict[str, np.dtype[Any]] = {
    "bfloat16": np.dtype("<u2"),
    "float16": np.dtype("<u2"),
    "float32": np.dtype("<f4"),
}
"""Of the arrays that codecs read and write, by the layout's dtype."""


class CodecError(WireError):
    """A stream that is not what its frame header says, or that does not decode."""


class Quality(IntEnum):
    """How near KV is to what prefill computed; higher is nearer. Also a request's floor.

    EXACT: the same bits: ``raw`` and every lossless codec. LOSSLESS: exact, or computed again
    from the tokens; no codec has this value, since bytes that went through one are exact or
    lossy. HIGH, MEDIUM, LOW: lossy, by loss of perplexity measured when calibrating.
    """

    LOW = 1
    MEDIUM = 2
    HIGH = 3
    LOSSLESS = 4
    EXACT = 5


@dataclass(frozen=True, slots=True)
class KvPart:
    """Where a rectangle lies; both ends know it from the frame header.

    layer_start: first layer, counted over the whole model. token_start: position of the first
    token. num_tokens_total: tokens of the whole prompt; the newest are counted from its end.
    """

    layer_start: int
    token_start: int
    num_tokens_total: int


class KvGeometry(Protocol):
    """What a codec asks of a layout (``baton.protocol.layout``)."""

    @property
    def dtype(self) -> str: ...

    @property
    def num_kv_heads(self) -> int: ...

    @property
    def head_dim(self) -> int: ...


class Codec(Protocol):
    """Made once per (layout, profile) by ``registry.make``; see the module's rules."""

    @property
    def name(self) -> str:
        """On the wire; never given to another format."""
        ...

    @property
    def quality(self) -> Quality: ...

    def encode(self, kv: Array, part: KvPart) -> Bytes:
        """kv: ``[layers, 2, tokens, kv_heads, head_dim]``, at least one layer and token."""
        ...

    def decode(self, stream: Bytes, part: KvPart, out: Array) -> None:
        """Fills ``out``, C-contiguous and of the encoder's shape. Raises CodecError."""
        ...


def array_dtype(dtype: str) -> np.dtype[Any]:
    return ARRAY_DTYPES[dtype]


def num_elements(shape: Sequence[int]) -> int:
    """Of one layer of ``[layers, 2, tokens, kv_heads, head_dim]``."""
    count = 1
    for side in shape[1:]:
        count *= side
    return count
