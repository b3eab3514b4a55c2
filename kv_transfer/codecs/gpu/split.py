"""``split`` on a GPU: all runs of a frame at once, each in blocks of threads.

Escapes are few, and their order is the only thing that one block must know of others: each counts
its own, a sum over blocks says where each block's begin, and only then are they written or read.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kv_transfer.codecs.float_forms import FloatForm
from kv_transfer.codecs.gpu.jit import jit, tl
from kv_transfer.codecs.split import SAMPLE_STRIDE

BLOCK = 1024
_SAMPLES = 4096


def choose_windows(form: FloatForm, bits: Tensor) -> Tensor:
    """int32 ``[runs]``: ``split.choose_window`` of each. bits: ``[runs, n]``, int16 or int32."""
    runs, n = bits.shape
    counts = torch.zeros((runs, form.num_exponents), dtype=torch.int32, device=bits.device)
    num_samples = -(-n // SAMPLE_STRIDE)
    _sample_kernel[(runs, -(-num_samples // _SAMPLES))](
        bits, counts, n, num_samples,
        SHIFT=_SHIFTS[form.dtype], EXPONENTS=form.num_exponents,
        STRIDE=SAMPLE_STRIDE, SAMPLES=_SAMPLES,
    )  # fmt: skip
    ends = torch.nn.functional.pad(counts.cumsum(1), (1, 0))
    inside = ends[:, form.window :] - ends[:, : -form.window]
    # The first of equals: argmax alone may take any.
    places = torch.arange(inside.shape[1], device=bits.device)
    return (inside * inside.shape[1] - places).argmax(1).to(torch.int32)


def pack(form: FloatForm, bits: Tensor, begins: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(codes, bodies, escapes, their numbers): uint8 ``[runs, code bytes]``,
    ``[runs, body_bytes * n]`` and ``[runs, n]``, int64 ``[runs]``."""
    runs, n = bits.shape
    width = -(-n // form.group)
    blocks = -(-width // BLOCK)
    device = bits.device
    codes = torch.empty((runs, width * form.group_bytes), dtype=torch.uint8, device=device)
    bodies = torch.empty((runs, n * form.body_bytes), dtype=torch.uint8, device=device)
    escapes = torch.empty((runs, n), dtype=torch.uint8, device=device)
    counts = torch.empty((runs, blocks), dtype=torch.int32, device=device)
    form_arguments = _form_arguments(form)
    _pack_kernel[(runs, blocks)](
        bits, begins, codes, bodies, counts, n, width, blocks, BLOCK=BLOCK, **form_arguments
    )
    ends = counts.cumsum(1)
    _list_kernel[(runs, blocks)](
        bits, begins, counts, ends, escapes, n, width, blocks, BLOCK=BLOCK, **form_arguments
    )
    return codes, bodies, escapes, ends[:, -1].contiguous()


def unpack(
    form: FloatForm, codes: Tensor, bodies: Tensor, escapes: Tensor, offsets: Tensor,
    listed: Tensor, begins: Tensor, bits: Tensor,
) -> Tensor:  # fmt: skip
    """Fills ``bits``; returns bool ``[runs]``: whether a run used exactly its escapes.

    escapes: uint8, all runs' in one. offsets, listed: int64 ``[runs]``, where a run's begin and
    how many there are; none of other runs is read.
    """
    runs, n = bits.shape
    assert all(t.is_contiguous() for t in (codes, bodies, escapes, offsets, listed, begins, bits))
    width = -(-n // form.group)
    blocks = -(-width // BLOCK)
    counts = torch.empty((runs, blocks), dtype=torch.int32, device=bits.device)
    form_arguments = _form_arguments(form)
    _count_kernel[(runs, blocks)](codes, counts, n, width, blocks, BLOCK=BLOCK, **form_arguments)
    ends = counts.cumsum(1)
    _unpack_kernel[(runs, blocks)](
        codes, bodies, escapes, offsets, listed, begins, counts, ends, bits, n, width, blocks,
        BLOCK=BLOCK, **form_arguments,
    )  # fmt: skip
    return ends[:, -1] == listed


_SHIFTS = {"bfloat16": 7, "float16": 10, "float32": 23}


def _form_arguments(form: FloatForm) -> dict[str, int]:
    return {
        "GROUP": form.group,
        "WINDOW": form.window,
        "IS_WIDE": int(form.dtype == "float32"),
        "SHIFT": _SHIFTS[form.dtype],
    }


@jit("n", "num_samples")
def _sample_kernel(
    bits_ptr: tl.tensor,
    counts_ptr: tl.tensor,
    n: tl.tensor,
    num_samples: tl.tensor,
    SHIFT: tl.constexpr,
    EXPONENTS: tl.constexpr,
    STRIDE: tl.constexpr,
    SAMPLES: tl.constexpr,
) -> None:
    run = tl.program_id(0).to(tl.int64)
    sample = tl.program_id(1) * SAMPLES + tl.arange(0, SAMPLES)
    is_used = sample < num_samples
    bits = tl.load(bits_ptr + run * n + sample.to(tl.int64) * STRIDE, mask=is_used, other=0)
    exponent = (bits >> SHIFT).to(tl.int32) & (EXPONENTS - 1)
    counts = tl.histogram(exponent, EXPONENTS, mask=is_used)
    place = tl.arange(0, EXPONENTS)
    tl.atomic_add(counts_ptr + run * EXPONENTS + place, counts, mask=counts > 0)


@jit()
def _part(
    bits_run: tl.tensor, j: tl.tensor, part: tl.constexpr, width: tl.tensor, n: tl.tensor
) -> tl.tensor:
    """(place, whether it exists, bits) of the group's element ``part``."""
    at = j + part * width
    exists = (j < width) & (at < n)
    return at, exists, tl.load(bits_run + at, mask=exists, other=0).to(tl.int32)


@jit()
def _code(
    bits: tl.tensor, exists: tl.tensor, begin: tl.tensor, WINDOW: tl.constexpr, SHIFT: tl.constexpr
) -> tl.tensor:
    """(code, exponent); 0 for what does not exist."""
    exponent = (bits >> SHIFT) & (31 if WINDOW == 7 else 255)
    distance = exponent - begin
    is_inside = (distance >= 0) & (distance < WINDOW)
    return tl.where(exists, tl.where(is_inside, distance, WINDOW), 0), exponent


@jit()
def _field(bits: tl.tensor, exists: tl.tensor, begin: tl.tensor) -> tl.tensor:
    """A float16's 6 bits."""
    code, _ = _code(bits, exists, begin, 7, 10)
    beside = ((bits >> 13) & 4) | ((bits >> 8) & 3)
    return tl.where(exists, (beside << 3) | code, 0)


@jit()
def _store_body(
    body_run: tl.tensor,
    at: tl.tensor,
    exists: tl.tensor,
    bits: tl.tensor,
    n: tl.tensor,
    GROUP: tl.constexpr,
    IS_WIDE: tl.constexpr,
) -> tl.tensor:
    if GROUP == 4:
        tl.store(body_run + at, (bits & 255).to(tl.uint8), mask=exists)
    else:
        top = (bits >> 16) if IS_WIDE else bits
        first = ((top >> 8) & 128) | (top & 127)
        tl.store(body_run + at, first.to(tl.uint8), mask=exists)
        if IS_WIDE:
            tl.store(body_run + n + at, ((bits >> 8) & 255).to(tl.uint8), mask=exists)
            tl.store(body_run + 2 * n + at, (bits & 255).to(tl.uint8), mask=exists)


@jit("n", "width", "blocks")
def _pack_kernel(
    bits_ptr: tl.tensor,
    begins_ptr: tl.tensor,
    codes_ptr: tl.tensor,
    bodies_ptr: tl.tensor,
    counts_ptr: tl.tensor,
    n: tl.tensor,
    width: tl.tensor,
    blocks: tl.tensor,
    GROUP: tl.constexpr,
    WINDOW: tl.constexpr,
    IS_WIDE: tl.constexpr,
    SHIFT: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    run = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    j = block * BLOCK + tl.arange(0, BLOCK)
    begin = tl.load(begins_ptr + run)
    bits_run = bits_ptr + run * n
    body_run = bodies_ptr + run * n * (3 if IS_WIDE else 1)
    at0, e0, b0 = _part(bits_run, j, 0, width, n)
    at1, e1, b1 = _part(bits_run, j, 1, width, n)
    _store_body(body_run, at0, e0, b0, n, GROUP, IS_WIDE)
    _store_body(body_run, at1, e1, b1, n, GROUP, IS_WIDE)
    c0, _ = _code(b0, e0, begin, WINDOW, SHIFT)
    c1, _ = _code(b1, e1, begin, WINDOW, SHIFT)
    found = (c0 == WINDOW).to(tl.int32) + (c1 == WINDOW).to(tl.int32)
    if GROUP == 2:
        tl.store(codes_ptr + run * width + j, (c0 | (c1 << 4)).to(tl.uint8), mask=j < width)
    else:
        at2, e2, b2 = _part(bits_run, j, 2, width, n)
        at3, e3, b3 = _part(bits_run, j, 3, width, n)
        _store_body(body_run, at2, e2, b2, n, GROUP, IS_WIDE)
        _store_body(body_run, at3, e3, b3, n, GROUP, IS_WIDE)
        f0, f1 = _field(b0, e0, begin), _field(b1, e1, begin)
        f2, f3 = _field(b2, e2, begin), _field(b3, e3, begin)
        found += ((f2 & 7) == 7).to(tl.int32) + ((f3 & 7) == 7).to(tl.int32)
        codes_run = codes_ptr + run * width * 3
        p, q, r = f0 | (f1 << 6), (f1 >> 2) | (f2 << 4), (f2 >> 4) | (f3 << 2)
        tl.store(codes_run + j, p.to(tl.uint8), mask=j < width)
        tl.store(codes_run + width + j, q.to(tl.uint8), mask=j < width)
        tl.store(codes_run + 2 * width + j, r.to(tl.uint8), mask=j < width)
    tl.store(counts_ptr + run * blocks + block, tl.sum(found, 0))


@jit("n", "width", "blocks")
def _list_kernel(
    bits_ptr: tl.tensor,
    begins_ptr: tl.tensor,
    counts_ptr: tl.tensor,
    ends_ptr: tl.tensor,
    escapes_ptr: tl.tensor,
    n: tl.tensor,
    width: tl.tensor,
    blocks: tl.tensor,
    GROUP: tl.constexpr,
    WINDOW: tl.constexpr,
    IS_WIDE: tl.constexpr,
    SHIFT: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    run = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    count = tl.load(counts_ptr + run * blocks + block)
    if count > 0:
        j = block * BLOCK + tl.arange(0, BLOCK)
        begin = tl.load(begins_ptr + run)
        bits_run = bits_ptr + run * n
        found = tl.zeros((BLOCK,), tl.int32)
        for part in tl.static_range(GROUP):
            _, exists, bits = _part(bits_run, j, part, width, n)
            code, _ = _code(bits, exists, begin, WINDOW, SHIFT)
            found += (code == WINDOW).to(tl.int32)
        first = tl.load(ends_ptr + run * blocks + block) - count
        place = first + tl.cumsum(found, 0) - found
        for part in tl.static_range(GROUP):
            _, exists, bits = _part(bits_run, j, part, width, n)
            code, exponent = _code(bits, exists, begin, WINDOW, SHIFT)
            is_listed = code == WINDOW
            tl.store(escapes_ptr + run * n + place, exponent.to(tl.uint8), mask=is_listed)
            place += is_listed.to(tl.int32)


@jit()
def _load_field(
    codes_run: tl.tensor, j: tl.tensor, part: tl.constexpr, width: tl.tensor, GROUP: tl.constexpr
) -> tl.tensor:
    """4 or 6 bits; 0 beyond the codes."""
    is_used = j < width
    if GROUP == 2:
        field = (tl.load(codes_run + j, mask=is_used, other=0).to(tl.int32) >> (4 * part)) & 15
    else:
        p = tl.load(codes_run + j, mask=is_used, other=0).to(tl.int32)
        q = tl.load(codes_run + width + j, mask=is_used, other=0).to(tl.int32)
        r = tl.load(codes_run + 2 * width + j, mask=is_used, other=0).to(tl.int32)
        field = ((p | (q << 8) | (r << 16)) >> (6 * part)) & 63
    return field


@jit("n", "width", "blocks")
def _count_kernel(
    codes_ptr: tl.tensor,
    counts_ptr: tl.tensor,
    n: tl.tensor,
    width: tl.tensor,
    blocks: tl.tensor,
    GROUP: tl.constexpr,
    WINDOW: tl.constexpr,
    IS_WIDE: tl.constexpr,
    SHIFT: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """A field of an element that does not exist must be 0; otherwise the count is far off."""
    run = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    j = block * BLOCK + tl.arange(0, BLOCK)
    codes_run = codes_ptr + run * width * (GROUP - 1)
    found = tl.zeros((BLOCK,), tl.int32)
    for part in tl.static_range(GROUP):
        field = _load_field(codes_run, j, part, width, GROUP)
        exists = (j < width) & (j + part * width < n)
        found += (exists & ((field & WINDOW) == WINDOW)).to(tl.int32)
        found += tl.where(exists | (field == 0), 0, 1 << 20)
    tl.store(counts_ptr + run * blocks + block, tl.sum(found, 0))


@jit("n", "width", "blocks")
def _unpack_kernel(
    codes_ptr: tl.tensor,
    bodies_ptr: tl.tensor,
    escapes_ptr: tl.tensor,
    offsets_ptr: tl.tensor,
    listed_ptr: tl.tensor,
    begins_ptr: tl.tensor,
    counts_ptr: tl.tensor,
    ends_ptr: tl.tensor,
    bits_ptr: tl.tensor,
    n: tl.tensor,
    width: tl.tensor,
    blocks: tl.tensor,
    GROUP: tl.constexpr,
    WINDOW: tl.constexpr,
    IS_WIDE: tl.constexpr,
    SHIFT: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    run = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    j = block * BLOCK + tl.arange(0, BLOCK)
    begin = tl.load(begins_ptr + run)
    codes_run = codes_ptr + run * width * (GROUP - 1)
    body_run = bodies_ptr + run * n * (3 if IS_WIDE else 1)
    escapes_run = escapes_ptr + tl.load(offsets_ptr + run)
    listed = tl.load(listed_ptr + run)
    count = tl.load(counts_ptr + run * blocks + block)
    found = tl.zeros((BLOCK,), tl.int32)
    if count > 0:
        for part in tl.static_range(GROUP):
            field = _load_field(codes_run, j, part, width, GROUP)
            exists = (j < width) & (j + part * width < n)
            found += (exists & ((field & WINDOW) == WINDOW)).to(tl.int32)
    place = tl.load(ends_ptr + run * blocks + block) - count + tl.cumsum(found, 0) - found
    for part in tl.static_range(GROUP):
        at = j + part * width
        exists = (j < width) & (at < n)
        field = _load_field(codes_run, j, part, width, GROUP)
        is_listed = exists & ((field & WINDOW) == WINDOW)
        exponent = (field & WINDOW) + begin
        can_read = is_listed & (place < listed)
        escape = tl.load(escapes_run + place, mask=can_read, other=0).to(tl.int32)
        exponent = tl.where(is_listed, escape, exponent)
        place += is_listed.to(tl.int32)
        first = tl.load(body_run + at, mask=exists, other=0).to(tl.int32)
        if GROUP == 4:
            beside = field >> 3
            bits = ((beside & 4) << 13) | ((exponent & 31) << 10) | ((beside & 3) << 8) | first
            tl.store(bits_ptr + run * n + at, bits.to(tl.int16), mask=exists)
        else:
            bits = ((first & 128) << 8) | ((exponent & 255) << 7) | (first & 127)
            if IS_WIDE:
                middle = tl.load(body_run + n + at, mask=exists, other=0).to(tl.int32)
                last = tl.load(body_run + 2 * n + at, mask=exists, other=0).to(tl.int32)
                bits = (bits << 16) | (middle << 8) | last
                tl.store(bits_ptr + run * n + at, bits, mask=exists)
            else:
                tl.store(bits_ptr + run * n + at, bits.to(tl.int16), mask=exists)
