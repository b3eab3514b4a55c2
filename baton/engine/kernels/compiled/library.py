"""The compiled kernels as Python functions on CPU tensors.

Rows are float32 and contiguous; weights and KV blocks are float32, bfloat16 or float16. Calls
release the interpreter lock. Shapes: T rows, H query heads, K KV heads, D head_dim, BS block
size, N blocks, S sequences, R <= D rotated elements of a head.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from baton.engine.kernels.compiled.build import library_path

Gate = Literal["silu", "gelu_tanh"]

_TYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_GATE_CODES: dict[Gate | None, int] = {None: 0, "silu": 1, "gelu_tanh": 2}

_P, _I, _F = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
_SIGNATURES = {
    "baton_linear": [_P, _I, _I, _P, _I, _I, _P, _P, _I, _P, _I],
    "baton_rms_norm": [_P, _P, _F, _I, _I, _P, _P, _I],
    "baton_place_heads": [_P, _I, _I, _I, _I, _I, _P, _P, _P, _P, _F, _P, _P, _I, _P, _I],
    "baton_attention": [
        *[_P, _I, _P, _P, _I, _I, _I, _I, _I],
        *[_P, _I, _P, _P, _I, _F, _I, _F, _P, _I],
    ],
}


@dataclass(frozen=True, slots=True)
class PackedMatrix:
    """``[columns, depth]`` as panels of one vector pair of columns, each contiguous.

    panels: ``[P, depth, 2 * VL]``; bfloat16 as ``[P, depth, VL, 2]``, where a pair of columns
    VL apart lies in one word. gate: the first half of the columns are gates of the second half,
    and each panel has VL of both.
    """

    panels: Tensor
    columns: int
    depth: int
    gate: Gate | None

    @property
    def out_features(self) -> int:
        return self.columns // 2 if self.gate else self.columns


class Library:
    """num_threads: of every call. name: differs with the machine code, hence with any bit."""

    def __init__(self, path: Path, num_threads: int) -> None:
        self.name = path.stem
        loaded = ctypes.CDLL(str(path))
        loaded.baton_vector_width.restype = ctypes.c_int64
        for name, argtypes in _SIGNATURES.items():
            function = getattr(loaded, name)
            function.argtypes, function.restype = argtypes, None
        self._vector_width = int(loaded.baton_vector_width())
        self._linear = loaded.baton_linear
        self._rms_norm = loaded.baton_rms_norm
        self._place_heads = loaded.baton_place_heads
        self._attention = loaded.baton_attention
        self._num_threads = num_threads

    def pack(self, weight: Tensor, gate: Gate | None = None) -> PackedMatrix:
        """weight: ``[columns, depth]``; with a gate, an even number of columns."""
        width, (columns, depth) = self._vector_width, weight.shape
        parts = weight.chunk(2) if gate else (weight,)
        num_panels = -(-columns // (2 * width))
        pairs = weight.dtype == torch.bfloat16
        lanes = (width, 2) if pairs else (2, width)
        panels = weight.new_zeros(num_panels, depth, *lanes)
        halves = panels.transpose(2, 3) if pairs else panels
        for number, part in enumerate(parts):
            _place(part, halves[:, :, number : number + 1] if gate else halves)
        return PackedMatrix(panels if pairs else panels.flatten(2), columns, depth, gate)

    def rows(self, matrix: PackedMatrix, numbers: Tensor) -> Tensor:
        """Rows ``[len(numbers), depth]`` float32 of a matrix that was packed without a gate."""
        width = self._vector_width
        panel, column = numbers // (2 * width), numbers % (2 * width)
        if matrix.panels.dtype == torch.bfloat16:
            return matrix.panels[panel, :, column % width, column // width].float()
        return matrix.panels[panel, :, column].float()

    def linear(
        self,
        rows: Tensor,
        matrix: PackedMatrix,
        bias: Tensor | None = None,
        residual: Tensor | None = None,
    ) -> Tensor:
        """``rows @ matrix.T + bias + residual``, or the gated halves of it. bias: float32."""
        rows = rows.contiguous()
        num_rows, depth = rows.shape
        assert depth == matrix.depth
        out = torch.empty((num_rows, matrix.out_features))
        self._linear(
            rows.data_ptr(),
            num_rows,
            depth,
            matrix.panels.data_ptr(),
            _TYPE_CODES[matrix.panels.dtype],
            matrix.columns,
            None if bias is None else bias.data_ptr(),
            None if residual is None else residual.data_ptr(),
            _GATE_CODES[matrix.gate],
            out.data_ptr(),
            self._num_threads,
        )
        return out

    def rms_norm(
        self, rows: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None
    ) -> Tensor:
        """``rows / rms(rows) * weight (+ residual)``; all float32."""
        out = torch.empty_like(rows)
        self._rms_norm(
            rows.data_ptr(),
            weight.data_ptr(),
            eps,
            rows.shape[0],
            rows.shape[1],
            None if residual is None else residual.data_ptr(),
            out.data_ptr(),
            self._num_threads,
        )
        return out

    def place_heads(
        self,
        qkv: Tensor,
        num_heads: int,
        cos: Tensor,
        sin: Tensor,
        norms: tuple[Tensor, Tensor] | None,
        eps: float,
        key_blocks: Tensor,
        value_blocks: Tensor,
        slots: Tensor,
    ) -> None:
        """Turn Q and K of ``qkv`` (``[T, (H + 2K) * D]``) in place; store K and V at ``slots``.

        cos, sin: ``[T, R / 2]``. norms: RMSNorm weights ``[D]`` of Q's and of K's heads, applied
        first. key_blocks, value_blocks: ``[N, BS, K, D]``. slots: ``[T]`` int64, -1 for none.
        """
        _, _, num_kv_heads, head_dim = key_blocks.shape
        self._place_heads(
            qkv.data_ptr(),
            len(qkv),
            num_heads,
            num_kv_heads,
            head_dim,
            cos.shape[1],
            cos.data_ptr(),
            sin.data_ptr(),
            None if norms is None else norms[0].data_ptr(),
            None if norms is None else norms[1].data_ptr(),
            eps,
            key_blocks.data_ptr(),
            value_blocks.data_ptr(),
            _TYPE_CODES[key_blocks.dtype],
            slots.data_ptr(),
            self._num_threads,
        )

    def attention(
        self,
        q: Tensor,
        num_heads: int,
        key_blocks: Tensor,
        value_blocks: Tensor,
        block_tables: Tensor,
        cu_seqlens_q: Tensor,
        context_lens: Tensor,
        *,
        scale: float,
        window: int | None,
        soft_cap: float | None,
    ) -> Tensor:
        """``[T, H * D]``. q: ``[T, at least H * D]``, each row beginning with its H heads.

        key_blocks, value_blocks: ``[N, BS, K, D]``, the rows' own K and V already in them.
        block_tables: ``[S, any]`` int32. cu_seqlens_q: ``[S + 1]`` int32, first row of each
        sequence. context_lens: ``[S]`` int32, tokens up to a sequence's last row.
        """
        _, block_size, num_kv_heads, head_dim = key_blocks.shape
        out = torch.empty((len(q), num_heads * head_dim))
        self._attention(
            q.data_ptr(),
            q.stride(0),
            key_blocks.data_ptr(),
            value_blocks.data_ptr(),
            _TYPE_CODES[key_blocks.dtype],
            block_size,
            num_kv_heads,
            num_heads // num_kv_heads,
            head_dim,
            block_tables.data_ptr(),
            block_tables.shape[1],
            cu_seqlens_q.data_ptr(),
            context_lens.data_ptr(),
            len(context_lens),
            scale,
            window or 0,
            soft_cap or 0.0,
            out.data_ptr(),
            self._num_threads,
        )
        return out


def _place(rows: Tensor, halves: Tensor) -> None:
    """Rows ``[columns, depth]`` into panels ``[P, depth, halves, VL]`` that are zero so far."""
    num_halves, width = halves.shape[2:]
    num_whole = len(rows) // (num_halves * width)
    whole, rest = rows[: num_whole * num_halves * width], rows[num_whole * num_halves * width :]
    # Straight to its place: a large matrix and several copies of it are more than loading needs.
    by_panel = whole.view(num_whole, num_halves, width, rows.shape[1])
    halves[:num_whole].copy_(by_panel.permute(0, 3, 1, 2))
    for number, first in enumerate(range(0, len(rest), width)):
        half = rest[first : first + width]
        halves[num_whole, :, number, : len(half)] = half.T


@cache
def load_library(num_threads: int) -> Library:
    """Raises CannotCompile where there is no compiler."""
    return Library(library_path(), num_threads)
