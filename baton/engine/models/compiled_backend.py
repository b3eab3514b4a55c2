"""Everything through the compiled CPU kernels: rows in float32, weights in the model's dtype.

Deterministic by construction: see ``baton.engine.kernels.compiled``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import embedding

from baton.checkpoint.spec import Activation
from baton.engine.kernels.compiled.library import Library, PackedMatrix
from baton.engine.kv_cache import KvCache
from baton.engine.models.attention_spec import AttentionSpec
from baton.engine.models.backend import Embedding, GroupedProduct, Product
from baton.engine.rope import Rotation
from baton.engine.step_inputs import StepInputs


@dataclass(frozen=True, slots=True)
class _Product:
    matrix: PackedMatrix
    bias: Tensor | None
    library: Library

    def __call__(self, rows: Tensor, residual: Tensor | None = None) -> Tensor:
        return self.library.linear(rows, self.matrix, self.bias, residual)


@dataclass(frozen=True, slots=True)
class _GroupedProduct:
    matrices: tuple[PackedMatrix, ...]
    library: Library

    def __call__(self, rows: Tensor, expert_of_row: Tensor) -> Tensor:
        counts = torch.bincount(expert_of_row, minlength=len(self.matrices)).tolist()
        parts = torch.split(rows, counts)
        return torch.cat(
            [self.library.linear(p, m) for p, m in zip(parts, self.matrices, strict=True) if len(p)]
        )


@dataclass(frozen=True, slots=True)
class _Table:
    table: Tensor

    def __len__(self) -> int:
        return len(self.table)

    def __call__(self, token_ids: Tensor) -> Tensor:
        return embedding(token_ids, self.table).float()


@dataclass(frozen=True, slots=True)
class _PackedTable:
    matrix: PackedMatrix
    library: Library

    def __len__(self) -> int:
        return self.matrix.columns

    def __call__(self, token_ids: Tensor) -> Tensor:
        return self.library.rows(self.matrix, token_ids)


class CompiledBackend:
    def __init__(self, library: Library) -> None:
        self._library = library

    @property
    def arithmetic(self) -> str:
        return f"{self._library.name}/torch-{torch.__version__}"

    @property
    def shares_prefixes(self) -> bool:
        """A row's sum has one order, whatever it shares."""
        return False

    def storage_dtype(self, dtype: torch.dtype) -> torch.dtype:
        return dtype

    def product(self, weight: Tensor, bias: Tensor | None) -> Product:
        return self._packed(weight, bias, None)

    def gated(self, weight: Tensor, bias: Tensor | None, activation: Activation) -> Product:
        return self._packed(weight, bias, activation)

    def grouped(self, weights: Tensor, activation: Activation | None) -> GroupedProduct:
        packed = tuple(self._library.pack(weight, activation) for weight in weights)
        _give_back(weights)
        return _GroupedProduct(packed, self._library)

    def embedding_and_head(self, table: Tensor, head: Tensor) -> tuple[Embedding, Product]:
        tied = table is head
        product = self._packed(head, None, None)
        if tied:
            return _PackedTable(product.matrix, self._library), product
        return _Table(table), product

    def norm_weight(self, weight: Tensor) -> Tensor:
        return weight.float()

    def norm(
        self, rows: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None
    ) -> Tensor:
        return self._library.rms_norm(rows, weight, eps, residual)

    def attention(
        self,
        qkv: Tensor,
        spec: AttentionSpec,
        rotation: Rotation,
        inputs: StepInputs,
        cache: KvCache,
        layer: int,
    ) -> Tensor:
        key_blocks, value_blocks = cache.of_layer(layer)
        self._library.place_heads(
            qkv,
            spec.num_heads,
            rotation.cos,
            rotation.sin,
            spec.norms,
            spec.eps,
            key_blocks,
            value_blocks,
            inputs.slots,
        )
        return self._library.attention(
            qkv,
            spec.num_heads,
            key_blocks,
            value_blocks,
            inputs.block_tables,
            inputs.cu_seqlens_q,
            inputs.context_lens,
            scale=spec.scale,
            window=spec.window,
            soft_cap=spec.soft_cap,
        )

    def _packed(
        self, weight: Tensor, bias: Tensor | None, activation: Activation | None
    ) -> _Product:
        matrix = self._library.pack(weight, activation)
        _give_back(weight)
        return _Product(matrix, None if bias is None else bias.float(), self._library)


def _give_back(weight: Tensor) -> None:
    """Else loading a model would need room for two of it."""
    weight.untyped_storage().resize_(0)
