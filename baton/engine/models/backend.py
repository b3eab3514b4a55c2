"""What a decoder computes with: one implementation per kind of device.

Shapes: T rows (tokens of a step), h hidden size, H query heads, K KV heads, D head_dim.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from baton.checkpoint.spec import Activation
from baton.engine.kv_cache import KvCache
from baton.engine.models.attention_spec import AttentionSpec
from baton.engine.rope import Rotation
from baton.engine.step_inputs import StepInputs


class Product(Protocol):
    """A matrix of the model, with its bias and, for the first one of an MLP, its activation."""

    def __call__(self, rows: Tensor, residual: Tensor | None = None) -> Tensor:
        """``[T, in] -> [T, out]``, with ``residual`` (``[T, out]``) added."""
        ...


class GroupedProduct(Protocol):
    """The like matrices of a layer's experts."""

    def __call__(self, rows: Tensor, expert_of_row: Tensor) -> Tensor:
        """``[T, in] -> [T, out]``. expert_of_row: ``[T]`` int32, ascending."""
        ...


class Embedding(Protocol):
    def __len__(self) -> int: ...

    def __call__(self, token_ids: Tensor) -> Tensor:
        """``[T] -> [T, h]``."""
        ...


class Backend(Protocol):
    """Makers of products take their weight over: its memory may be given back.

    arithmetic: equal for two workers whose results agree to the bit when nothing but the
      company of a request, its chunks and its place differ.
    shares_prefixes: whether ``StepInputs.shared`` is of use to it.
    """

    @property
    def arithmetic(self) -> str: ...

    @property
    def shares_prefixes(self) -> bool: ...

    def storage_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """What weights are loaded in where the model is to run in ``dtype``."""
        ...

    def product(self, weight: Tensor, bias: Tensor | None) -> Product: ...

    def gated(self, weight: Tensor, bias: Tensor | None, activation: Activation) -> Product:
        """weight: ``[2 * inner, h]``, gates in front. The product gives ``[T, inner]``."""
        ...

    def grouped(self, weights: Tensor, activation: Activation | None) -> GroupedProduct:
        """weights: ``[E, out, in]``; with an activation, gated as above."""
        ...

    def embedding_and_head(self, table: Tensor, head: Tensor) -> tuple[Embedding, Product]:
        """Both ``[V, h]``, and the same tensor where the checkpoint ties them."""
        ...

    def norm_weight(self, weight: Tensor) -> Tensor: ...

    def norm(
        self, rows: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None
    ) -> Tensor:
        """RMSNorm of ``[T, h]``, then ``residual`` added."""
        ...

    def attention(
        self,
        qkv: Tensor,
        spec: AttentionSpec,
        rotation: Rotation,
        inputs: StepInputs,
        cache: KvCache,
        layer: int,
    ) -> Tensor:
        """Store the rows' K and V; ``[T, H * D]`` of what each row sees.

        qkv: ``[T, (H + 2K) * D]``, which may be written to.
        """
        ...
