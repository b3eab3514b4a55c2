"""Products through torch's matrix library, everything else through ``baton.engine.kernels``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import embedding, linear, pad

from baton.checkpoint.spec import Activation
from baton.engine.kernels.registry import Kernels, kernels_for
from baton.engine.kv_cache import KvCache
from baton.engine.models.attention_spec import AttentionSpec
from baton.engine.models.backend import Embedding, GroupedProduct, Product
from baton.engine.rope import Rotation
from baton.engine.step_inputs import StepInputs

KERNELS_VERSION = 2
"""Raised whenever a change to a kernel changes a bit of its results."""
TILE_ROWS = 32
"""Rows of one product in deterministic mode. The library's choice of an algorithm depends on
the shape alone, so a row's result is the same in every tile and at every place in it."""

Multiply = Callable[[Tensor, Tensor, Tensor | None], Tensor]


def tiled_linear(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``linear`` in tiles of ``TILE_ROWS`` rows, the last one padded with zeros."""
    if not len(rows):
        return linear(rows, weight, bias)
    missing = -len(rows) % TILE_ROWS
    padded = pad(rows, (0, 0, 0, missing)) if missing else rows
    tiles = [linear(tile, weight, bias) for tile in torch.split(padded, TILE_ROWS)]
    return torch.cat(tiles)[: len(rows)]


@dataclass(frozen=True, slots=True)
class _Product:
    weight: Tensor
    bias: Tensor | None
    multiply: Multiply
    gated: Callable[[Tensor], Tensor] | None = None

    def __call__(self, rows: Tensor, residual: Tensor | None = None) -> Tensor:
        out = self.multiply(rows, self.weight, self.bias)
        if self.gated is not None:
            out = self.gated(out)
        return out if residual is None else residual + out


@dataclass(frozen=True, slots=True)
class _GroupedProduct:
    weights: Tensor
    kernels: Kernels
    gated: Callable[[Tensor], Tensor] | None

    def __call__(self, rows: Tensor, expert_of_row: Tensor) -> Tensor:
        out = self.kernels.grouped_matmul(rows, self.weights, expert_of_row)
        return out if self.gated is None else self.gated(out)


@dataclass(frozen=True, slots=True)
class _TiledGroupedProduct:
    """Expert by expert, each in the tiles of ``tiled_linear``: the kernel's tile would depend on
    how many rows the whole step has."""

    weights: Tensor
    gated: Callable[[Tensor], Tensor] | None

    def __call__(self, rows: Tensor, expert_of_row: Tensor) -> Tensor:
        counts = torch.bincount(expert_of_row, minlength=len(self.weights)).tolist()
        parts = zip(torch.split(rows, counts), self.weights, strict=True)
        out = torch.cat([tiled_linear(part, weight, None) for part, weight in parts])
        return out if self.gated is None else self.gated(out)


@dataclass(frozen=True, slots=True)
class _Embedding:
    table: Tensor

    def __len__(self) -> int:
        return len(self.table)

    def __call__(self, token_ids: Tensor) -> Tensor:
        return embedding(token_ids, self.table)


class TorchBackend:
    """On a CPU it computes in float32 on widened weights: most CPUs have no matrix units for
    the narrow types, and torch is ten times slower in them there."""

    def __init__(self, device: torch.device, *, deterministic: bool) -> None:
        self._is_cpu = device.type == "cpu"
        machine = "cpu" if self._is_cpu else torch.cuda.get_device_name(device)
        self._arithmetic = f"{machine}/kernels-{KERNELS_VERSION}/torch-{torch.__version__}"
        self._kernels = kernels_for(device)
        self._is_deterministic = deterministic
        self._multiply: Multiply = tiled_linear if deterministic else linear
        self._gates: dict[Activation, Callable[[Tensor], Tensor]] = {
            "silu": self._kernels.silu_mul,
            "gelu_tanh": self._kernels.gelu_tanh_mul,
        }

    @property
    def arithmetic(self) -> str:
        return self._arithmetic

    @property
    def shares_prefixes(self) -> bool:
        """Queries of many rows in one product are summed in another order than those of one."""
        return not self._is_deterministic

    def storage_dtype(self, dtype: torch.dtype) -> torch.dtype:
        return torch.float32 if self._is_cpu else dtype

    def product(self, weight: Tensor, bias: Tensor | None) -> Product:
        return _Product(weight, bias, self._multiply)

    def gated(self, weight: Tensor, bias: Tensor | None, activation: Activation) -> Product:
        return _Product(weight, bias, self._multiply, self._gates[activation])

    def grouped(self, weights: Tensor, activation: Activation | None) -> GroupedProduct:
        gate = None if activation is None else self._gates[activation]
        if self._is_deterministic:
            return _TiledGroupedProduct(weights, gate)
        return _GroupedProduct(weights, self._kernels, gate)

    def embedding_and_head(self, table: Tensor, head: Tensor) -> tuple[Embedding, Product]:
        return _Embedding(table), self.product(head, None)

    def norm_weight(self, weight: Tensor) -> Tensor:
        return weight

    def norm(
        self, rows: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None
    ) -> Tensor:
        normed, _ = self._kernels.rms_norm(rows, weight, eps, None)
        return normed if residual is None else residual + normed

    def attention(
        self,
        qkv: Tensor,
        spec: AttentionSpec,
        rotation: Rotation,
        inputs: StepInputs,
        cache: KvCache,
        layer: int,
    ) -> Tensor:
        heads = qkv.view(len(qkv), -1, spec.head_dim)
        q, k, v = torch.split(heads, [spec.num_heads, spec.num_kv_heads, spec.num_kv_heads], dim=1)
        key_blocks, value_blocks = cache.of_layer(layer)
        # What a token reads is the same rounded value whether its row ran in this step or an
        # earlier one; queries are rounded alike, as matrix units want one type.
        dtype = key_blocks.dtype
        q = self._turned(q, spec, rotation, 0).to(dtype)
        k = self._turned(k, spec, rotation, 1).to(dtype)
        self._kernels.store_kv(k, v.to(dtype), key_blocks, value_blocks, inputs.slots)
        mixed = self._attend(q, key_blocks, value_blocks, spec, inputs)
        return mixed.flatten(1).to(qkv.dtype)

    def _turned(self, heads: Tensor, spec: AttentionSpec, rotation: Rotation, which: int) -> Tensor:
        if spec.norms is not None:
            flat = heads.reshape(-1, spec.head_dim)
            normed, _ = self._kernels.rms_norm(flat, spec.norms[which], spec.eps, None)
            heads = normed.view(heads.shape)
        return self._kernels.rotate(heads, rotation.cos, rotation.sin)

    def _attend(
        self,
        q: Tensor,
        key_blocks: Tensor,
        value_blocks: Tensor,
        spec: AttentionSpec,
        inputs: StepInputs,
    ) -> Tensor:
        # The kernels for decodes and for chunks add up in different orders, and a row may come
        # as either: deterministic mode has one of them.
        num_decodes = 0 if self._is_deterministic else inputs.num_decodes
        bounds = inputs.cu_seqlens_q if self._is_deterministic else inputs.cu_seqlens_prefill
        parts = []
        if num_decodes:
            decodes = q[:num_decodes]
            parts.append(self._attend_decodes(decodes, key_blocks, value_blocks, spec, inputs))
        if num_decodes < len(q):
            parts.append(
                self._kernels.paged_prefill_attention(
                    q[num_decodes:],
                    key_blocks,
                    value_blocks,
                    inputs.block_tables[num_decodes:],
                    bounds,
                    inputs.context_lens[num_decodes:],
                    scale=spec.scale,
                    window=spec.window,
                    soft_cap=spec.soft_cap,
                )
            )
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _attend_decodes(
        self,
        q: Tensor,
        key_blocks: Tensor,
        value_blocks: Tensor,
        spec: AttentionSpec,
        inputs: StepInputs,
    ) -> Tensor:
        tables, lengths = inputs.block_tables[: len(q)], inputs.context_lens[: len(q)]
        # With a window, rows of unlike lengths see unlike parts of a prefix.
        if inputs.shared is not None and spec.window is None:
            return self._kernels.shared_prefix_decode_attention(
                q,
                key_blocks,
                value_blocks,
                tables,
                lengths,
                inputs.shared.prefix_lens,
                inputs.shared.rows,
                inputs.shared.starts,
                scale=spec.scale,
                soft_cap=spec.soft_cap,
            )
        return self._kernels.paged_decode_attention(
            q,
            key_blocks,
            value_blocks,
            tables,
            lengths,
            scale=spec.scale,
            window=spec.window,
            soft_cap=spec.soft_cap,
        )
