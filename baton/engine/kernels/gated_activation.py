"""The gated activations between an MLP's two products: SiLU (Llama), tanh GELU (Gemma).

gate_up: ``[T, 2 I]``, gate in the first half, up in the second; rows may be strided. Returns
``activation(gate) * up``, ``[T, I]`` contiguous in the same dtype, computed in float32.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import gelu, silu


def silu_mul_reference(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.float().chunk(2, dim=-1)
    return (silu(gate) * up).to(gate_up.dtype)


def gelu_tanh_mul_reference(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.float().chunk(2, dim=-1)
    return (gelu(gate, approximate="tanh") * up).to(gate_up.dtype)
