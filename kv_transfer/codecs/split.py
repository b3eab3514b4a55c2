"""``split``: lossless and of nearly fixed length. Most of a float's exponent bits say little.

In KV, nearly all exponents of a layer lie within a window of 15 values. So an exponent becomes a
4-bit distance from the window's begin; 15 says that it is not in the window, and then the exponent
itself is in a list behind. float16 has 5 exponent bits: its window has 7 values and 3-bit codes.
A bfloat16 takes 12 bits, a float16 14, a float32 28, and an exponent outside the window 8 more.

A section is two runs, K and V, of ``n = tokens * kv_heads * head_dim`` elements each:

    bytes              what
    1                  begin of the window
    3                  zero
    4                  number of escapes
    codes              4 bits each: byte j has element j low, element j + ceil(n / 2) high
    body_bytes * n     the rest of each element (``float_forms``)
    escapes            exponents outside the window, one byte each

A float16's codes have 6 bits: sign, 2 high bits of the mantissa, 3 of distance. Three planes of
``q = ceil(n / 4)`` bytes hold those of elements j, j + q, j + 2q and j + 3q. Escapes are in order
of j, and within it of elements. Neighbours in a byte are far apart in the array, so that a CPU's
vectors and a GPU's threads read and write whole lines.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kv_transfer.codecs import split_compiled
from kv_transfer.codecs.container import (
    Form,
    StreamWriter,
    header_for,
    read_raw,
    read_sections,
)
from kv_transfer.codecs.contract import (
    Array,
    Bytes,
    CodecError,
    KvGeometry,
    KvPart,
    Quality,
    num_elements,
)
from kv_transfer.codecs.float_forms import FORMS, U8, FloatForm, bits_of

SAMPLE_STRIDE = 7
"""Every seventh exponent chooses the window: coprime with any head_dim, so all channels count."""
RUN_HEAD = struct.Struct("<B3sI")
_ZEROS = bytes(3)


def choose_window(form: FloatForm, symbols: U8) -> int:
    """Begin of the window with most of the sampled exponents; the first of equals."""
    sampled = symbols[::SAMPLE_STRIDE]
    sample: Array = sampled >> 2 & 31 if form.dtype == "float16" else sampled
    counts: NDArray[Any] = np.bincount(sample, minlength=form.num_exponents)
    ends = np.concatenate([[0], np.cumsum(counts)])
    return int(np.argmax(ends[form.window :] - ends[: -form.window]))


@dataclass(frozen=True, slots=True)
class RunPlan:
    """Where the parts of a run of ``n`` elements are: head, codes, body, escapes."""

    body_at: int
    fixed: int

    @classmethod
    def of(cls, form: FloatForm, n: int) -> RunPlan:
        body_at = RUN_HEAD.size + -(-n // form.group) * form.group_bytes
        return cls(body_at, body_at + n * form.body_bytes)

    def write_head(self, room: U8, begin: int, num_escapes: int) -> None:
        RUN_HEAD.pack_into(room.data, 0, begin, _ZEROS, num_escapes)

    def read_head(self, form: FloatForm, n: int, coded: U8) -> tuple[int, int]:
        """(begin of the window, number of escapes) of a run that ``coded`` begins with.

        Raises CodecError where it is not as long as it says.
        """
        if coded.size < self.fixed:
            raise CodecError(f"a run of {n} split floats has {coded.size} bytes")
        begin, zeros, num_escapes = RUN_HEAD.unpack_from(coded.data)
        if begin > form.last_window or zeros != _ZEROS or self.fixed + num_escapes > coded.size:
            raise CodecError(f"split floats with window {begin} and {num_escapes} escapes")
        return begin, num_escapes


class SplitCodec:
    """implementation: ``split_compiled`` or ``split_reference``."""

    name = "split"
    quality = Quality.EXACT

    def __init__(self, geometry: KvGeometry, implementation: ModuleType = split_compiled) -> None:
        self._geometry = geometry
        self._form = FORMS[geometry.dtype]
        self._kernels = implementation

    def encode(self, kv: Array, part: KvPart) -> Bytes:
        header = header_for(self.name, self._geometry, kv)
        n = num_elements(kv.shape) // 2
        # A run of nothing but escapes outgrows the raw bytes before that is found out.
        longest = 2 * (RunPlan.of(self._form, n).fixed + n)
        writer = StreamWriter(header, max(0, longest - header.layer_bytes))
        symbols = np.empty(n, np.uint8)
        for layer in kv:
            room, end = writer.room(), 0
            for run in layer:
                end += self._encode_run(bits_of(run), symbols, room[end:])
            if end < header.layer_bytes:
                writer.commit(end)
            else:
                writer.commit_raw(layer)
        return writer.finish()

    def decode(self, stream: Bytes, part: KvPart, out: Array) -> None:
        sections = read_sections(stream, header_for(self.name, self._geometry, out))
        symbols = np.empty(num_elements(out.shape) // 2, np.uint8)
        for section, layer in zip(sections, out, strict=True):
            if section.form is Form.RAW:
                read_raw(section, layer)
                continue
            coded = np.frombuffer(section.data, np.uint8)
            for run in layer:
                coded = coded[self._decode_run(coded, symbols, bits_of(run)) :]
            if coded.size:
                raise CodecError(f"a section of split floats has {coded.size} bytes too many")

    def _encode_run(self, bits: Array, symbols: U8, room: U8) -> int:
        """Bytes written to the front of ``room``."""
        n, form = bits.size, self._form
        plan = RunPlan.of(form, n)
        self._kernels.take_apart(form, bits, symbols, room[plan.body_at : plan.fixed])
        begin = choose_window(form, symbols)
        codes, escapes = room[RUN_HEAD.size : plan.body_at], room[plan.fixed : plan.fixed + n]
        num_escapes: int = self._kernels.pack(form, symbols, begin, codes, escapes)
        plan.write_head(room, begin, num_escapes)
        return plan.fixed + num_escapes

    def _decode_run(self, coded: U8, symbols: U8, bits: Array) -> int:
        """Bytes taken from the front of ``coded``. Raises CodecError."""
        n, form = bits.size, self._form
        plan = RunPlan.of(form, n)
        begin, num_escapes = plan.read_head(form, n, coded)
        end = plan.fixed + num_escapes
        codes, escapes = coded[RUN_HEAD.size : plan.body_at], coded[plan.fixed : end]
        if self._kernels.unpack(form, codes, escapes, begin, symbols) != num_escapes:
            raise CodecError(f"split floats list {num_escapes} escapes and do not use as many")
        self._kernels.put_together(form, symbols, coded[plan.body_at : plan.fixed], bits)
        return end
