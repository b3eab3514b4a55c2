"""The gated activations between an MLP's two products: SiLU (Llama), tanh GELU (Gemma).

gate_up: ``[T, 2 I]``, gate in the first half, up in the second; rows may be strided. Returns
``activation(gate) * up``, ``[T, I]`` contiguous in the same dtype, computed in float32.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import gelu, silu

from baton.engine.kernels.jit import jit, tl

COLUMNS_PER_PROGRAM = 1024


def silu_mul_reference(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.float().chunk(2, dim=-1)
    return (silu(gate) * up).to(gate_up.dtype)


def gelu_tanh_mul_reference(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.float().chunk(2, dim=-1)
    return (gelu(gate, approximate="tanh") * up).to(gate_up.dtype)


def silu_mul_triton(gate_up: Tensor) -> Tensor:
    return _gated(gate_up, with_gelu=False)


def gelu_tanh_mul_triton(gate_up: Tensor) -> Tensor:
    return _gated(gate_up, with_gelu=True)


def _gated(gate_up: Tensor, *, with_gelu: bool) -> Tensor:
    num_rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    assert gate_up.stride(1) == 1
    out = torch.empty((num_rows, width), dtype=gate_up.dtype, device=gate_up.device)
    if num_rows == 0:
        return out
    _gated_kernel[(num_rows, -(-width // COLUMNS_PER_PROGRAM))](
        out,
        gate_up,
        gate_up.stride(0),
        2.0 * math.sqrt(2.0 / math.pi),
        WIDTH=width,
        WITH_GELU=with_gelu,
        BLOCK=COLUMNS_PER_PROGRAM,
    )
    return out


@jit
def _gated_kernel(
    out_ptr: tl.tensor,
    gate_up_ptr: tl.tensor,
    row_stride: tl.tensor,
    gelu_factor: tl.tensor,
    WIDTH: tl.constexpr,
    WITH_GELU: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < WIDTH
    source = gate_up_ptr + row * row_stride + columns
    gate = tl.load(source, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(source + WIDTH, mask=inside, other=0.0).to(tl.float32)
    # Both are gate * sigmoid(z): 0.5 (1 + tanh(a)) is sigmoid(2 a).
    z = gate
    if WITH_GELU:
        z = gelu_factor * (gate + 0.044715 * gate * gate * gate)
    active = gate / (1.0 + tl.exp(-z))
    result = (active * up).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + row * WIDTH + columns, result, mask=inside)
