"""``kv1`` to ``kv4`` for a model without a profile: each channel rounded in steps of a part of its
own standard deviation, one static table of an assumed distribution.

Much larger than with a profile at the same loss, and nobody has measured what the loss is: the
qualities are those of one small model. A section (one layer):

    2 * 2 * C   mean of every channel, K then V, as bfloat16
    2 * 2 * C   step of every channel, likewise
    4           number of escapes
    2 * escapes quotients beyond 127, in the order of symbols
    ...         rANS of the symbols of ``[2, T, C]``
"""

from __future__ import annotations

import math
import struct
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kv_transfer.codecs import rans_compiled
from kv_transfer.codecs.checksum import checksum_of
from kv_transfer.codecs.container import (
    Form,
    Section,
    StreamWriter,
    header_for,
    read_raw,
    read_sections,
)
from kv_transfer.codecs.contract import (
    Array,
    Bytes,
    CodecError,
    Implementation,
    KvGeometry,
    KvPart,
    Quality,
)
from kv_transfer.codecs.float_values import narrow, widen
from kv_transfer.codecs.jit import kernel
from kv_transfer.codecs.lossy_profile import ESCAPE, NUM_SYMBOLS, ZERO_SYMBOL
from kv_transfer.codecs.rans import (
    U8,
    RansTables,
    decode_reference,
    encode_reference,
    lanes_for,
    normalise,
)

F32 = NDArray[np.float32]
LEVELS = {
    "kv1": (Quality.HIGH, 0.25),
    "kv2": (Quality.HIGH, 0.4),
    "kv3": (Quality.MEDIUM, 0.5),
    "kv4": (Quality.LOW, 0.8),
}
"""Quality, and the step in standard deviations."""
MAX_QUOTIENT = 32_767
_COUNT = struct.Struct("<I")
_LEAST_STEP = np.float32(2.0**-100)
_ONE_TABLE = np.zeros(1, np.uint8)


class PlainLossyCodec:
    """See ``contract.Codec``; name: one of ``LEVELS``."""

    def __init__(
        self, geometry: KvGeometry, name: str, implementation: Implementation = "compiled"
    ) -> None:
        self._geometry = geometry
        self._name = name
        self._quality, self._step = LEVELS[name]
        self._rans = _tables(self._step)
        # Tables are computed, so two machines may differ in them; then streams are refused.
        self._digest = checksum_of(self._rans.frequencies.astype("<u2").tobytes()).to_bytes(8)
        self._is_compiled = implementation == "compiled"

    @property
    def name(self) -> str:
        return self._name

    @property
    def quality(self) -> Quality:
        return self._quality

    def encode(self, kv: Array, part: KvPart) -> Bytes:
        writer = StreamWriter(header_for(self._name, self._geometry, kv, self._digest))
        for layer in kv:
            pieces = self._encode_layer(layer)
            size = sum(len(piece) for piece in pieces)
            if not pieces or size >= layer.nbytes:
                writer.commit_raw(layer)
                continue
            at, room = 0, writer.room()
            for piece in pieces:
                room[at : at + len(piece)] = piece
                at += len(piece)
            writer.commit(size)
        return writer.finish()

    def decode(self, stream: Bytes, part: KvPart, out: Array) -> None:
        expected = header_for(self._name, self._geometry, out, self._digest)
        for section, target in zip(read_sections(stream, expected), out, strict=True):
            if section.form == Form.RAW:
                read_raw(section, target)
            else:
                self._decode_layer(section, target)

    def _encode_layer(self, layer: Array) -> list[U8]:
        """Nothing for a layer that has to go raw."""
        x = widen(layer, self._geometry.dtype).reshape(2, layer.shape[1], -1)
        with np.errstate(invalid="ignore", over="ignore"):
            mean = _as_bfloat16(x.mean(1))
            spread = np.maximum(x.std(1), _LEAST_STEP) * np.float32(self._step)
        steps = _as_bfloat16(spread)
        if not (np.isfinite(_wide(mean)) & np.isfinite(_wide(steps))).all():
            return []
        quantise = _quantise if self._is_compiled else _quantise_reference
        symbols, quotients = np.empty(x.shape, np.uint8), np.empty(x.shape, np.int16)
        if not quantise(x, _wide(mean), np.float32(1) / _wide(steps), symbols, quotients):
            return []
        escapes = quotients[symbols == ESCAPE]
        encode = rans_compiled.encode if self._is_compiled else encode_reference
        coded = encode(symbols.reshape(-1), _ONE_TABLE, self._rans, lanes_for(symbols.size))
        count = np.frombuffer(_COUNT.pack(escapes.size), np.uint8)
        sides: list[Array] = [mean.reshape(-1), steps.reshape(-1)]
        return [*(s.view(np.uint8) for s in sides), count, escapes.view(np.uint8), coded]

    def _decode_layer(self, section: Section, out: Array) -> None:
        num_tokens, channels = out.shape[1], out.shape[2] * out.shape[3]
        data = np.frombuffer(section.data, np.uint8)
        front = 8 * channels + _COUNT.size
        if data.size < front:
            raise CodecError(f"KV section of {data.size} bytes, its channels alone have {front}")
        sides = data[: 8 * channels].copy().view("<u2").reshape(2, 2, channels)
        mean, steps = _wide(sides[0]), _wide(sides[1])
        if not (np.isfinite(mean) & np.isfinite(steps)).all():
            raise CodecError("KV section with a mean or a step that is not finite")
        (num_escapes,) = _COUNT.unpack_from(section.data, 8 * channels)
        end = front + 2 * num_escapes
        if num_escapes > out.size or end > data.size:
            raise CodecError(f"KV section of {data.size} bytes claims {num_escapes} escapes")
        symbols = np.empty((2, num_tokens, channels), np.uint8)
        decode = rans_compiled.decode if self._is_compiled else decode_reference
        lanes = lanes_for(symbols.size)
        decode(data[end:], _ONE_TABLE, self._rans, lanes, symbols.reshape(-1))
        quotients = symbols.astype(np.int16) - np.int16(ZERO_SYMBOL)
        is_escaped = symbols == ESCAPE
        if int(is_escaped.sum()) != num_escapes:
            raise CodecError(f"KV section with {num_escapes} escapes, {is_escaped.sum()} used")
        quotients[is_escaped] = data[front:end].copy().view("<i2")
        with np.errstate(over="ignore"):
            x = quotients.astype(np.float32) * steps[:, None] + mean[:, None]
        narrow(x.reshape(out.shape), self._geometry.dtype, out)


def _tables(step: float) -> RansTables:
    """Of a value with standard deviation 1 that is half Gaussian, half Laplace."""

    def below(value: float) -> float:
        gauss = 0.5 * (1 + math.erf(value / math.sqrt(2)))
        tail = 0.5 * math.exp(-abs(value) * math.sqrt(2))
        return 0.5 * gauss + 0.5 * (tail if value < 0 else 1 - tail)

    counts = np.zeros((1, NUM_SYMBOLS))
    for quotient in range(-ZERO_SYMBOL, ZERO_SYMBOL + 1):
        inside = below((quotient + 0.5) * step) - below((quotient - 0.5) * step)
        counts[0, quotient + ZERO_SYMBOL] = max(inside, 1e-9)
    counts[0, ESCAPE] = 1e-6
    return RansTables(normalise(counts))


def _quantise_reference(
    x: F32, mean: F32, inverse: F32, symbols: U8, quotients: NDArray[np.int16]
) -> bool:
    """Whether every value has a quotient of 16 bits. x: ``[2, T, C]``; the others: ``[2, C]``."""
    with np.errstate(invalid="ignore", over="ignore"):
        found = np.rint((x - mean[:, None]) * inverse[:, None])
    if not (np.abs(found) <= MAX_QUOTIENT).all():
        return False
    quotients[:] = found
    is_near = np.abs(found) <= ZERO_SYMBOL
    symbols[:] = np.where(is_near, found + ZERO_SYMBOL, ESCAPE)
    return True


@kernel
def _quantise(x: F32, mean: F32, inverse: F32, symbols: U8, quotients: NDArray[np.int16]) -> Any:
    """As ``_quantise_reference``."""
    for kind in range(2):
        for token in range(x.shape[1]):
            outside = 0
            for c in range(x.shape[2]):
                found = np.rint((x[kind, token, c] - mean[kind, c]) * inverse[kind, c])
                outside += not (np.abs(found) <= np.float32(MAX_QUOTIENT))
                whole = np.int32(found)
                quotients[kind, token, c] = whole
                is_near = abs(whole) <= ZERO_SYMBOL
                symbols[kind, token, c] = np.uint8(whole + ZERO_SYMBOL) if is_near else ESCAPE
            if outside:
                return False
    return True


def _as_bfloat16(x: F32) -> NDArray[np.uint16]:
    bits = np.empty(x.shape, np.uint16)
    narrow(np.ascontiguousarray(x), "bfloat16", bits)
    return bits


def _wide(bits: Array) -> F32:
    return widen(np.ascontiguousarray(bits), "bfloat16")
