"""Floats on a GPU: widening and narrowing inside kernels, cutting for the lossless codecs.

Kernels see bits: int16 tensors for bfloat16 and float16, int32 for float32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kv_transfer.codecs.float_forms import FloatForm
from kv_transfer.codecs.gpu.jit import jit, tl

BLOCK = 1024
KINDS = {"bfloat16": 0, "float16": 1, "float32": 2}
"""``KIND`` of kernels."""
TORCH_DTYPES = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
}


def bits_of(values: Tensor) -> Tensor:
    """A view."""
    assert values.is_contiguous()
    return values.view(torch.int32 if values.element_size() == 4 else torch.int16)


def are_tame(bits: Tensor, dtype: str) -> list[bool]:
    """``float_values.is_tame`` of each row of ``[layers, ...]``."""
    shift, mask, limit = {
        "bfloat16": (7, 255, 227),
        "float16": (10, 31, 31),
        "float32": (23, 255, 227),
    }[dtype]
    exponents = (bits.flatten(1) >> shift) & mask
    tame: list[bool] = (exponents.amax(1) < limit).tolist()
    return tame


def take_apart(form: FloatForm, bits: Tensor) -> tuple[Tensor, Tensor]:
    """(symbols ``[runs, n]``, bodies ``[runs, body_bytes * n]``), uint8, as ``float_forms``."""
    runs, n = bits.shape
    symbols = torch.empty((runs, n), dtype=torch.uint8, device=bits.device)
    bodies = torch.empty((runs, n * form.body_bytes), dtype=torch.uint8, device=bits.device)
    _apart_kernel[(runs, -(-n // BLOCK))](
        bits, symbols, bodies, n, KIND=KINDS[form.dtype], BLOCK=BLOCK
    )
    return symbols, bodies


def put_together(form: FloatForm, symbols: Tensor, bodies: Tensor, bits: Tensor) -> None:
    """Fills ``bits``."""
    runs, n = bits.shape
    _together_kernel[(runs, -(-n // BLOCK))](
        symbols, bodies, bits, n, KIND=KINDS[form.dtype], BLOCK=BLOCK
    )


@jit()
def widened(bits: tl.tensor, KIND: tl.constexpr) -> tl.tensor:
    """float32."""
    if KIND == 0:
        x = (bits.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    elif KIND == 1:
        x = bits.to(tl.float16, bitcast=True).to(tl.float32)
    else:
        x = bits.to(tl.float32, bitcast=True)
    return x


@jit()
def narrowed(x: tl.tensor, KIND: tl.constexpr) -> tl.tensor:
    """Bits, as ``float_values.narrow``."""
    if KIND == 0:
        largest: tl.constexpr = 3.3895313892515355e38
        kept = tl.minimum(tl.maximum(x, -largest), largest).to(tl.uint32, bitcast=True)
        high = (kept + ((kept >> 16) & 1) + 0x7FFF) >> 16
        bits = high.to(tl.uint16).to(tl.int16, bitcast=True)
    elif KIND == 1:
        kept = tl.minimum(tl.maximum(x, -65504.0), 65504.0)
        bits = kept.to(tl.float16).to(tl.int16, bitcast=True)
    else:
        bits = x.to(tl.int32, bitcast=True)
    return bits


@jit("n")
def _apart_kernel(
    bits_ptr: tl.tensor,
    symbols_ptr: tl.tensor,
    bodies_ptr: tl.tensor,
    n: tl.tensor,
    KIND: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    run = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    is_used = i < n
    x = tl.load(bits_ptr + run * n + i, mask=is_used, other=0).to(tl.int32)
    body = bodies_ptr + run * n * (3 if KIND == 2 else 1)
    if KIND == 1:
        tl.store(symbols_ptr + run * n + i, ((x >> 8) & 255).to(tl.uint8), mask=is_used)
        tl.store(body + i, (x & 255).to(tl.uint8), mask=is_used)
    else:
        top = (x >> 16) if KIND == 2 else x
        first = ((top >> 8) & 128) | (top & 127)
        tl.store(symbols_ptr + run * n + i, ((top >> 7) & 255).to(tl.uint8), mask=is_used)
        tl.store(body + i, first.to(tl.uint8), mask=is_used)
        if KIND == 2:
            tl.store(body + n + i, ((x >> 8) & 255).to(tl.uint8), mask=is_used)
            tl.store(body + 2 * n + i, (x & 255).to(tl.uint8), mask=is_used)


@jit("n")
def _together_kernel(
    symbols_ptr: tl.tensor,
    bodies_ptr: tl.tensor,
    bits_ptr: tl.tensor,
    n: tl.tensor,
    KIND: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    run = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    is_used = i < n
    symbol = tl.load(symbols_ptr + run * n + i, mask=is_used, other=0).to(tl.int32)
    body = bodies_ptr + run * n * (3 if KIND == 2 else 1)
    first = tl.load(body + i, mask=is_used, other=0).to(tl.int32)
    if KIND == 1:
        tl.store(bits_ptr + run * n + i, ((symbol << 8) | first).to(tl.int16), mask=is_used)
    else:
        x = ((first & 128) << 8) | (symbol << 7) | (first & 127)
        if KIND == 2:
            middle = tl.load(body + n + i, mask=is_used, other=0).to(tl.int32)
            last = tl.load(body + 2 * n + i, mask=is_used, other=0).to(tl.int32)
            tl.store(bits_ptr + run * n + i, (x << 16) | (middle << 8) | last, mask=is_used)
        else:
            tl.store(bits_ptr + run * n + i, x.to(tl.int16), mask=is_used)
