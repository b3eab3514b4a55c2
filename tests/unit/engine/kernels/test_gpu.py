"""Every kernel against its reference at real shapes, on a GPU: ``pytest -m gpu``."""

from __future__ import annotations

import pytest
import torch

from baton.engine.kernels.registry import TRITON
from baton.engine.kv_cache import KvCache
from baton.engine.sampling.draw import draw_tokens
from baton.engine.sampling.kernel_draw import draw_for
from baton.protocol.layout import KvLayout
from tests.unit.engine.kernels.cases import (
    Paged,
    assert_close,
    both,
    check,
    forget_unseen,
    paged,
    randn,
    requests,
    sampling_inputs,
)

pytestmark = pytest.mark.gpu

CUDA = "cuda"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SHAPES = [(1, 64), (2, 128), (3, 64), (4, 128), (5, 96), (6, 64), (7, 128), (8, 96)]
MASKS = [(None, None), (1000, None), (None, 30.0), (64, 30.0)]
CONTEXTS = [1, 15, 16, 17, 511, 512, 513, 2047, 3000, 0]


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(1)


def cache(contexts: list[int], dim: int, dtype: torch.dtype) -> Paged:
    return paged(contexts, kv_heads=4, dim=dim, dtype=dtype, device=CUDA, block_size=16)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("group", "dim"), SHAPES)
@pytest.mark.parametrize(("window", "soft_cap"), MASKS)
def test_decode_attention(
    group: int, dim: int, dtype: torch.dtype, window: int | None, soft_cap: float | None
) -> None:
    kv = forget_unseen(cache(CONTEXTS, dim, dtype), [1] * len(CONTEXTS), window)
    q = randn(len(CONTEXTS), 4 * group, dim, dtype=dtype, device=CUDA)
    check(
        "paged_decode_attention",
        q,
        kv.key_blocks,
        kv.value_blocks,
        kv.block_tables,
        kv.context_lens,
        scale=dim**-0.5,
        window=window,
        soft_cap=soft_cap,
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("group", "dim"), SHAPES)
@pytest.mark.parametrize(("window", "soft_cap"), MASKS)
def test_prefill_attention(
    group: int, dim: int, dtype: torch.dtype, window: int | None, soft_cap: float | None
) -> None:
    kv = forget_unseen(cache([700, 2049, 33, 1500], dim, dtype), [700, 513, 1, 257], window)
    starts = torch.tensor([0, 700, 1213, 1214, 1471], dtype=torch.int32, device=CUDA)
    q = randn(1471, 4 * group, dim, dtype=dtype, device=CUDA)
    check(
        "paged_prefill_attention",
        q,
        kv.key_blocks,
        kv.value_blocks,
        kv.block_tables,
        starts,
        kv.context_lens,
        scale=dim**-0.5,
        window=window,
        soft_cap=soft_cap,
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("group", "dim"), SHAPES)
def test_shared_prefix_attention(group: int, dim: int, dtype: torch.dtype) -> None:
    contexts = [1537, 1536 + 700, 1540, 2000] * 9
    kv = cache(contexts, dim, dtype)
    members = torch.tensor([*range(0, 36, 2), *range(35, 0, -4)], dtype=torch.int32, device=CUDA)
    bounds = torch.tensor([0, 18, 27], dtype=torch.int32, device=CUDA)
    prefix_lens = torch.zeros_like(kv.context_lens)
    for rows, num_tokens in ((members[:18].long(), 1536), (members[18:].long(), 1024)):
        prefix_lens[rows] = num_tokens
        kv.block_tables[rows, : num_tokens // 16] = kv.block_tables[rows[0], : num_tokens // 16]
    check(
        "shared_prefix_decode_attention",
        randn(len(contexts), 4 * group, dim, dtype=dtype, device=CUDA),
        kv.key_blocks,
        kv.value_blocks,
        kv.block_tables,
        kv.context_lens,
        prefix_lens,
        members,
        bounds,
        scale=dim**-0.5,
        soft_cap=None,
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_are_the_same_to_the_bit_in_any_batch_and_any_chunk(dtype: torch.dtype) -> None:
    kv = cache([2047, 900, 513], 128, dtype)
    blocks = (kv.key_blocks, kv.value_blocks)
    plain = {"scale": 0.1, "window": None, "soft_cap": None}
    q = randn(3, 16, 128, dtype=dtype, device=CUDA)
    together = TRITON.paged_decode_attention(q, *blocks, kv.block_tables, kv.context_lens, **plain)
    for row in range(3):
        table = kv.block_tables[row : row + 1, : -(-int(kv.context_lens[row]) // 16)]
        lengths = kv.context_lens[row : row + 1]
        alone = TRITON.paged_decode_attention(q[row : row + 1], *blocks, table, lengths, **plain)
        assert torch.equal(alone[0], together[row])

    def prefill(first: int, stop: int) -> torch.Tensor:
        starts = torch.tensor([0, stop - first], dtype=torch.int32, device=CUDA)
        length = torch.tensor([stop], dtype=torch.int32, device=CUDA)
        table = kv.block_tables[:1]
        return TRITON.paged_prefill_attention(
            prompt[first:stop], *blocks, table, starts, length, **plain
        )

    prompt = randn(2047, 16, 128, dtype=dtype, device=CUDA)
    assert torch.equal(prefill(0, 2047), torch.cat((prefill(0, 777), prefill(777, 2047))))


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_of_a_model(dtype: torch.dtype) -> None:
    x, residual = randn(2, 333, 5120, dtype=dtype, device=CUDA)
    weight = randn(5120, dtype=dtype, device=CUDA)
    for rest in (None, residual):
        expected, found = both("rms_norm", x, weight, 1e-5, rest)
        for ours, theirs in zip(expected, found, strict=True):
            assert_close(ours, theirs)
    heads = randn(333, 48, 128, dtype=dtype, device=CUDA)[:, :40]
    for half in (64, 32, 24):
        angles = torch.randn(333, half, device=CUDA)
        check("rotate", heads, angles.cos(), angles.sin())
    gate_up = randn(333, 2 * 13824, dtype=dtype, device=CUDA)
    check("silu_mul", gate_up)
    check("gelu_tanh_mul", gate_up)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_rows", [7, 64, 2049])
def test_grouped_matmul(dtype: torch.dtype, num_rows: int) -> None:
    experts = torch.randint(0, 8, (num_rows,), device=CUDA).sort().values.int()
    weights = randn(8, 1000, 2048, dtype=dtype, device=CUDA) / 45
    check("grouped_matmul", randn(num_rows, 2048, dtype=dtype, device=CUDA), weights, experts)


def test_sampling() -> None:
    expected, found = both("sample_top_k_top_p", *sampling_inputs(64, 128_256, CUDA))
    # exp differs from the reference's in the last bit, which may move a draw at a border.
    assert (expected != found).sum().item() <= 1


def test_draws_by_the_kernel_are_those_without() -> None:
    params, positions = requests(512, 128_256), range(512)
    logits = 3 * torch.randn(512, 128_256, device=CUDA)
    plain = draw_tokens(logits, params, positions)
    assert draw_for(torch.device(CUDA)) is not draw_tokens
    by_kernel = draw_for(torch.device(CUDA))(logits, params, positions)
    # exp2 for exp differs in the last bit, which may move a draw at a border.
    assert (by_kernel != plain).sum().item() <= 2


@pytest.mark.parametrize("dtype", DTYPES)
def test_copies(dtype: torch.dtype) -> None:
    blocks = randn(8, 2, 300, 16, 8, 128, dtype=dtype, device=CUDA)
    slots = torch.randperm(300 * 16, device=CUDA)[:1001]
    slots[::10] = -1
    expected, rows = both("gather_blocks", blocks, slots, 2, 5)
    assert torch.equal(expected, rows)
    scattered = torch.zeros_like(blocks)
    TRITON.scatter_blocks(scattered, slots, 2, rows)
    assert torch.equal(TRITON.gather_blocks(scattered, slots, 2, 5), rows)
    assert scattered.count_nonzero() == rows.count_nonzero()
    k, v = randn(2, 1001, 8, 128, dtype=dtype, device=CUDA)
    TRITON.store_kv(k, v, scattered[0, 0], scattered[0, 1], slots)
    assert torch.equal(
        TRITON.gather_blocks(scattered, slots, 0, 1)[0, 0][slots >= 0], k[slots >= 0]
    )


def test_a_cache_on_a_gpu_gives_and_takes_the_bytes_of_one_on_a_cpu() -> None:
    layout = KvLayout.uniform(
        num_layers=5, num_kv_heads=8, head_dim=128, dtype="bfloat16", model_digest=""
    )
    caches = [
        KvCache(layout, num_blocks=70, block_size=16, dtype=torch.bfloat16, device=device)
        for device in (torch.device("cpu"), torch.device(CUDA))
    ]
    caches[0].blocks.normal_()
    table = tuple(torch.randperm(70).tolist())
    size = 3 * 1001 * layout.bytes_per_token_layer
    expected = bytes(caches[0].read(table, 13, 1001, 1, 3))
    assert len(expected) == size
    caches[1].write(table, 13, 1001, 1, 3, expected)
    out = memoryview(bytearray(size))
    assert bytes(caches[1].read(table, 13, 1001, 1, 3)) == expected
    assert bytes(caches[1].read(table, 13, 1001, 1, 3, out)) == expected
