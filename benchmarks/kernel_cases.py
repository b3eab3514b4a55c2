"""What ``benchmarks.kernels`` times: every operation at the shapes of an 8B model, and for each
the fewest bytes and operations that any implementation needs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from baton.engine.kernels.paged_decode_attention import SPLIT_TOKENS
from baton.engine.kernels.registry import Kernels


@dataclass(frozen=True)
class Sizes:
    """Of the model and of the work. ``REAL`` is Llama 3 8B; experts are Mixtral's."""

    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    hidden: int = 4096
    inner: int = 14336
    vocab: int = 128_256
    experts: int = 8
    block_size: int = 16
    layers: int = 32
    rows: int = 8192
    batch: int = 64
    context: int = 8192
    chunk: int = 512
    suffix: int = 256


REAL = Sizes()


@dataclass(frozen=True)
class Case:
    """run: one call. num_bytes: every input read once, every output written once. num_flops: what
    the definition asks for, masked pairs not counted. target: share of the floor to reach."""

    name: str
    shape: str
    run: Callable[[], object]
    num_bytes: int
    num_flops: int = 0
    target: float | None = None


@dataclass(frozen=True)
class _Cache:
    key_blocks: Tensor
    value_blocks: Tensor
    tables: Tensor
    lengths: Tensor


class CaseMaker:
    """bfloat16 on ``device``; numbers are random, so that timings are those of real data."""

    def __init__(self, kernels: Kernels, device: torch.device, sizes: Sizes) -> None:
        self._kernels, self._device, self._sizes = kernels, device, sizes

    def all(self) -> Iterator[Case]:
        """Made one at a time: each one's tensors can go before the next one's come."""
        s = self._sizes
        yield self.decode(s.batch, s.context, target=0.8)
        yield self.decode(1, 4 * s.context)
        yield self.prefill(s.context, s.context, target=0.45)
        yield self.prefill(s.chunk, s.context)
        yield self.shared_prefix(s.batch, s.context // SPLIT_TOKENS * SPLIT_TOKENS)
        yield self.store_kv()
        yield from self.rows()
        yield self.grouped(2 * s.rows)
        yield self.grouped(2 * s.batch)
        yield self.sampling()
        yield from self.copies()

    def decode(self, batch: int, context: int, target: float | None = None) -> Case:
        s, cache = self._sizes, self._cache(batch, context)
        q = self._randn(batch, s.heads, s.head_dim)

        def run() -> Tensor:
            return self._kernels.paged_decode_attention(
                q,
                cache.key_blocks,
                cache.value_blocks,
                cache.tables,
                cache.lengths,
                scale=s.head_dim**-0.5,
                window=None,
                soft_cap=None,
            )

        num_bytes = 2 * batch * context * self._kv_row_bytes + 2 * _bytes(q)
        flops = 4 * batch * s.heads * s.head_dim * context
        shape = f"batch {batch}, context {context:,}"
        return Case("paged_decode_attention", shape, run, num_bytes, flops, target)

    def prefill(self, chunk: int, context: int, target: float | None = None) -> Case:
        s, cache = self._sizes, self._cache(1, context)
        q = self._randn(chunk, s.heads, s.head_dim)
        starts = torch.tensor([0, chunk], dtype=torch.int32, device=self._device)

        def run() -> Tensor:
            return self._kernels.paged_prefill_attention(
                q,
                cache.key_blocks,
                cache.value_blocks,
                cache.tables,
                starts,
                cache.lengths,
                scale=s.head_dim**-0.5,
                window=None,
                soft_cap=None,
            )

        pairs = chunk * (context - chunk) + chunk * (chunk + 1) // 2
        num_bytes = 2 * context * self._kv_row_bytes + 2 * _bytes(q)
        flops = 4 * s.heads * s.head_dim * pairs
        shape = f"chunk {chunk:,}, context {context:,}, causal"
        return Case("paged_prefill_attention", shape, run, num_bytes, flops, target)

    def shared_prefix(self, batch: int, prefix_len: int, *, is_shared: bool = True) -> Case:
        """Rows with a common prefix of whole ``SPLIT_TOKENS``, read once or each for itself."""
        s = self._sizes
        cache = self._cache(batch, prefix_len + s.suffix)
        num_shared = prefix_len // s.block_size
        cache.tables[:, :num_shared] = cache.tables[0, :num_shared].clone()
        members = torch.arange(batch, dtype=torch.int32, device=self._device)
        bounds = torch.tensor([0, batch], dtype=torch.int32, device=self._device)
        prefix_lens = torch.full_like(cache.lengths, prefix_len)
        q = self._randn(batch, s.heads, s.head_dim)
        arguments = (q, cache.key_blocks, cache.value_blocks, cache.tables, cache.lengths)
        scale = s.head_dim**-0.5

        def together() -> Tensor:
            return self._kernels.shared_prefix_decode_attention(
                *arguments, prefix_lens, members, bounds, scale=scale, soft_cap=None
            )

        def apart() -> Tensor:
            return self._kernels.paged_decode_attention(
                *arguments, scale=scale, window=None, soft_cap=None
            )

        num_tokens = prefix_len + batch * s.suffix
        return Case(
            "shared_prefix_decode_attention" if is_shared else "paged_decode_attention",
            f"batch {batch}, prefix {prefix_len:,}, suffixes {s.suffix}",
            together if is_shared else apart,
            2 * num_tokens * self._kv_row_bytes + 2 * _bytes(q),
            4 * batch * s.heads * s.head_dim * (prefix_len + s.suffix),
        )

    def store_kv(self) -> Case:
        s, cache = self._sizes, self._cache(1, self._sizes.rows)
        k, v = self._randn(2, s.rows, s.kv_heads, s.head_dim)
        slots = torch.randperm(s.rows, device=self._device)

        def run() -> None:
            self._kernels.store_kv(k, v, cache.key_blocks, cache.value_blocks, slots)

        return Case("store_kv", f"{s.rows:,} rows", run, 4 * _bytes(k))

    def rows(self) -> Iterator[Case]:
        s, kernels = self._sizes, self._kernels
        shape = f"{s.rows:,} rows"
        x, residual = self._randn(2, s.rows, s.hidden)
        weight = self._randn(s.hidden)
        yield Case(
            "rms_norm",
            f"{shape}, with residual",
            lambda: kernels.rms_norm(x, weight, 1e-5, residual),
            4 * _bytes(x),
        )
        heads = self._randn(s.rows, s.heads + s.kv_heads, s.head_dim)
        angles = torch.rand(s.rows, s.head_dim // 2, device=self._device)
        cos, sin = angles.cos(), angles.sin()
        yield Case(
            "rotate",
            f"{shape}, {heads.shape[1]} heads",
            lambda: kernels.rotate(heads, cos, sin),
            2 * _bytes(heads) + 2 * _bytes(cos),
        )
        gate_up = self._randn(s.rows, 2 * s.inner)
        num_bytes = 3 * _bytes(gate_up) // 2
        yield Case("silu_mul", shape, lambda: kernels.silu_mul(gate_up), num_bytes)
        yield Case("gelu_tanh_mul", shape, lambda: kernels.gelu_tanh_mul(gate_up), num_bytes)

    def grouped(self, num_rows: int) -> Case:
        s = self._sizes
        x, weights = self._randn(num_rows, s.hidden), self._randn(s.experts, s.inner, s.hidden)
        experts = torch.randint(0, s.experts, (num_rows,), device=self._device).sort().values.int()
        used = int(experts.bincount().count_nonzero())
        num_bytes = _bytes(x) + _bytes(weights) * used // s.experts + 2 * num_rows * s.inner
        return Case(
            "grouped_matmul",
            f"{num_rows:,} rows, {s.experts} experts",
            lambda: self._kernels.grouped_matmul(x, weights, experts),
            num_bytes,
            2 * num_rows * s.hidden * s.inner,
        )

    def sampling(self) -> Case:
        s = self._sizes
        logits = 3 * torch.randn(s.batch, s.vocab, device=self._device)

        def column(value: float, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.full((s.batch,), value, dtype=dtype, device=self._device)

        arguments = (column(0.8), column(50, torch.int32), column(0.95), column(0.02))
        uniforms = torch.rand(s.batch, device=self._device)
        return Case(
            "sample_top_k_top_p",
            f"{s.batch} rows of {s.vocab:,}",
            lambda: self._kernels.sample_top_k_top_p(logits, *arguments, uniforms),
            _bytes(logits),
        )

    def copies(self) -> Iterator[Case]:
        s = self._sizes
        num_blocks = -(-s.rows // s.block_size)
        blocks = self._randn(s.layers, 2, num_blocks, s.block_size, s.kv_heads, s.head_dim)
        slots = torch.randperm(num_blocks * s.block_size, device=self._device)[: s.rows]
        rows = self._kernels.gather_blocks(blocks, slots, 0, s.layers)
        shape = f"{s.rows:,} tokens of {s.layers} layers"
        yield Case(
            "gather_blocks",
            shape,
            lambda: self._kernels.gather_blocks(blocks, slots, 0, s.layers),
            2 * _bytes(rows),
        )
        yield Case(
            "scatter_blocks",
            shape,
            lambda: self._kernels.scatter_blocks(blocks, slots, 0, rows),
            2 * _bytes(rows),
        )

    @property
    def _kv_row_bytes(self) -> int:
        """One token's K, or V, of one layer."""
        return 2 * self._sizes.kv_heads * self._sizes.head_dim

    def _cache(self, batch: int, context: int) -> _Cache:
        """Blocks in random order, as a pool that has been in use hands them out."""
        s = self._sizes
        columns = -(-context // s.block_size)
        keys, values = self._randn(2, batch * columns, s.block_size, s.kv_heads, s.head_dim)
        order = torch.randperm(batch * columns, dtype=torch.int32, device=self._device)
        lengths = torch.full((batch,), context, dtype=torch.int32, device=self._device)
        return _Cache(keys, values, order.view(batch, columns), lengths)

    def _randn(self, *shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.bfloat16, device=self._device)


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
