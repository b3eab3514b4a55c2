"""Which implementation of every operation a device gets. The contracts are in the files named
after the operations."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from baton.engine.kernels.block_copy import (
    gather_blocks_reference,
    gather_blocks_triton,
    scatter_blocks_reference,
    scatter_blocks_triton,
)
from baton.engine.kernels.gated_activation import (
    gelu_tanh_mul_reference,
    gelu_tanh_mul_triton,
    silu_mul_reference,
    silu_mul_triton,
)
from baton.engine.kernels.grouped_matmul import grouped_matmul_reference, grouped_matmul_triton
from baton.engine.kernels.jit import AVAILABLE
from baton.engine.kernels.paged_decode_attention import (
    paged_decode_attention_reference,
    paged_decode_attention_triton,
)
from baton.engine.kernels.paged_prefill_attention import (
    paged_prefill_attention_reference,
    paged_prefill_attention_triton,
)
from baton.engine.kernels.rms_norm import rms_norm_reference, rms_norm_triton
from baton.engine.kernels.rotate import rotate_reference, rotate_triton
from baton.engine.kernels.sample_top_k_top_p import (
    sample_top_k_top_p_reference,
    sample_top_k_top_p_triton,
)
from baton.engine.kernels.shared_prefix_decode_attention import (
    shared_prefix_decode_attention_reference,
    shared_prefix_decode_attention_triton,
)
from baton.engine.kernels.store_kv import store_kv_reference, store_kv_triton
from baton.protocol.errors import ConfigError


class DecodeAttention(Protocol):
    def __call__(
        self,
        q: Tensor,
        key_blocks: Tensor,
        value_blocks: Tensor,
        block_tables: Tensor,
        context_lens: Tensor,
        *,
        scale: float,
        window: int | None,
        soft_cap: float | None,
    ) -> Tensor: ...


class PrefillAttention(Protocol):
    def __call__(
        self,
        q: Tensor,
        key_blocks: Tensor,
        value_blocks: Tensor,
        block_tables: Tensor,
        cu_seqlens_q: Tensor,
        context_lens: Tensor,
        *,
        scale: float,
        window: int | None,
        soft_cap: float | None,
    ) -> Tensor: ...


class SharedPrefixAttention(Protocol):
    def __call__(
        self,
        q: Tensor,
        key_blocks: Tensor,
        value_blocks: Tensor,
        block_tables: Tensor,
        context_lens: Tensor,
        prefix_lens: Tensor,
        group_rows: Tensor,
        group_starts: Tensor,
        *,
        scale: float,
        soft_cap: float | None,
    ) -> Tensor: ...


@dataclass(frozen=True, slots=True)
class Kernels:
    """One implementation of every operation; fields are named like their files' functions."""

    store_kv: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], None]
    paged_decode_attention: DecodeAttention
    paged_prefill_attention: PrefillAttention
    shared_prefix_decode_attention: SharedPrefixAttention
    rms_norm: Callable[[Tensor, Tensor, float, Tensor | None], tuple[Tensor, Tensor]]
    rotate: Callable[[Tensor, Tensor, Tensor], Tensor]
    silu_mul: Callable[[Tensor], Tensor]
    gelu_tanh_mul: Callable[[Tensor], Tensor]
    grouped_matmul: Callable[[Tensor, Tensor, Tensor], Tensor]
    sample_top_k_top_p: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
    gather_blocks: Callable[[Tensor, Tensor, int, int], Tensor]
    scatter_blocks: Callable[[Tensor, Tensor, int, Tensor], None]


REFERENCES = Kernels(
    store_kv=store_kv_reference,
    paged_decode_attention=paged_decode_attention_reference,
    paged_prefill_attention=paged_prefill_attention_reference,
    shared_prefix_decode_attention=shared_prefix_decode_attention_reference,
    rms_norm=rms_norm_reference,
    rotate=rotate_reference,
    silu_mul=silu_mul_reference,
    gelu_tanh_mul=gelu_tanh_mul_reference,
    grouped_matmul=grouped_matmul_reference,
    sample_top_k_top_p=sample_top_k_top_p_reference,
    gather_blocks=gather_blocks_reference,
    scatter_blocks=scatter_blocks_reference,
)


TRITON = Kernels(
    store_kv=store_kv_triton,
    paged_decode_attention=paged_decode_attention_triton,
    paged_prefill_attention=paged_prefill_attention_triton,
    shared_prefix_decode_attention=shared_prefix_decode_attention_triton,
    rms_norm=rms_norm_triton,
    rotate=rotate_triton,
    silu_mul=silu_mul_triton,
    gelu_tanh_mul=gelu_tanh_mul_triton,
    grouped_matmul=grouped_matmul_triton,
    sample_top_k_top_p=sample_top_k_top_p_triton,
    gather_blocks=gather_blocks_triton,
    scatter_blocks=scatter_blocks_triton,
)


def kernels_for(device: torch.device) -> Kernels:
    """The implementations that tensors on ``device`` are given to. Raises ConfigError for a GPU
    whose kernels cannot be compiled here."""
    if device.type != "cuda":
        return REFERENCES
    if not AVAILABLE:
        raise ConfigError(
            "device is cuda, but this environment has no Triton, which compiles the kernels; "
            "install a CUDA build of torch, which brings it, or set placement.device to cpu",
            param="placement.device",
        )
    return TRITON
