"""Every kernel against its reference on tiny shapes, in Triton's interpreter.

Not collected by itself: ``test_interpreter.py`` runs this file in a process of its own, because
Triton decides when it is imported whether it interprets.
"""

from __future__ import annotations

import pytest
import torch

from baton.engine.kernels.registry import REFERENCES, TRITON
from baton.engine.kv_cache import KvCache
from baton.engine.sampler import Sampler
from baton.engine.sampling.draw import draw_tokens
from baton.engine.sampling.kernel_draw import drawn_by
from baton.engine.sampling.rows import SampleRow
from baton.protocol.layout import KvLayout
from baton.protocol.sampling import SamplingParams
from tests.unit.engine.kernels.cases import (
    UNREADABLE_BLOCK,
    assert_close,
    both,
    check,
    forget_unseen,
    paged,
    randn,
    requests,
    sampling_inputs,
)

FLOAT32, FLOAT16, BFLOAT16 = torch.float32, torch.float16, torch.bfloat16
DTYPES = [FLOAT32, FLOAT16, BFLOAT16]
PLAIN = {"scale": 0.11, "window": None, "soft_cap": None}
ATTENTION = [
    pytest.param(group, dim, dtype, window, soft_cap, id=f"gqa{group}-d{dim}-{str(dtype)[6:]}-{n}")
    for n, (group, dim, dtype, window, soft_cap) in enumerate(
        [
            (1, 64, FLOAT32, None, None),
            (2, 64, BFLOAT16, None, None),
            (3, 64, FLOAT32, 5, None),
            (4, 128, BFLOAT16, None, 10.0),
            (5, 96, FLOAT32, 3, 10.0),
            (6, 64, FLOAT16, None, None),
            (7, 64, FLOAT32, 40, None),
            (8, 96, BFLOAT16, 1, None),
        ]
    )
]


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(1)


@pytest.mark.parametrize(("group", "dim", "dtype", "window", "soft_cap"), ATTENTION)
def test_decode_attention(
    group: int, dim: int, dtype: torch.dtype, window: int | None, soft_cap: float | None
) -> None:
    kv = paged([13, 1, 37], kv_heads=2, dim=dim, dtype=dtype, device="cpu")
    kv = forget_unseen(kv, [1, 1, 1], window)
    q = randn(3, 2 * group, dim, dtype=dtype, device="cpu")
    check(
        "paged_decode_attention",
        q,
        kv.key_blocks,
        kv.value_blocks,
        kv.block_tables,
        kv.context_lens,
        scale=0.11,
        window=window,
        soft_cap=soft_cap,
    )


@pytest.mark.parametrize("window", [None, 300])
def test_decode_attention_over_several_splits_with_a_padding_row(window: int | None) -> None:
    kv = paged([1029, 0, 512], kv_heads=1, dim=64, dtype=FLOAT32, device="cpu", block_size=16)
    kv = forget_unseen(kv, [1, 0, 1], window)
    q = randn(3, 6, 64, dtype=FLOAT32, device="cpu")[:, 1:3]
    found = check(
        "paged_decode_attention",
        q,
        kv.key_blocks,
        kv.value_blocks,
        kv.block_tables,
        kv.context_lens,
        scale=0.11,
        window=window,
        soft_cap=None,
    )
    assert not found[1].any()


def test_a_rows_attention_is_the_same_to_the_bit_whatever_is_beside_it() -> None:
    kv = paged([520, 3, 70], kv_heads=1, dim=64, dtype=FLOAT32, device="cpu", block_size=16)
    q = randn(3, 2, 64, dtype=FLOAT32, device="cpu")
    tables, lengths = kv.block_tables, kv.context_lens
    together = TRITON.paged_decode_attention(
        q, kv.key_blocks, kv.value_blocks, tables, lengths, **PLAIN
    )
    for row in range(3):
        columns = -(-int(lengths[row]) // 16)
        alone = TRITON.paged_decode_attention(
            q[row : row + 1],
            kv.key_blocks,
            kv.value_blocks,
            tables[row : row + 1, :columns],
            lengths[row : row + 1],
            **PLAIN,
        )
        assert torch.equal(alone[0], together[row])


@pytest.mark.parametrize(("group", "dim", "dtype", "window", "soft_cap"), ATTENTION)
def test_prefill_attention(
    group: int, dim: int, dtype: torch.dtype, window: int | None, soft_cap: float | None
) -> None:
    """A whole prompt, one row behind a cached prefix, a chunk behind one, then padding."""
    kv = paged([9, 37, 30], kv_heads=2, dim=dim, dtype=dtype, device="cpu")
    kv = forget_unseen(kv, [9, 1, 11], window)
    starts = torch.tensor([0, 9, 10, 21], dtype=torch.int32)
    q = randn(21 + 2, 2 * group, dim, dtype=dtype, device="cpu")
    expected, found = both(
        "paged_prefill_attention",
        q,
        kv.key_blocks,
        kv.value_blocks,
        kv.block_tables,
        starts,
        kv.context_lens,
        scale=0.11,
        window=window,
        soft_cap=soft_cap,
    )
    assert_close(expected[:21], found[:21])


def test_prefill_attention_over_many_tiles() -> None:
    """Whole tiles without a mask lie between those at the window's edge and at the diagonal."""
    kv = paged([290, 130], kv_heads=1, dim=64, dtype=BFLOAT16, device="cpu", block_size=16)
    q = randn(140, 4, 64, dtype=BFLOAT16, device="cpu")
    for window in (None, 150):
        kv = forget_unseen(kv, [70, 70], window)
        check(
            "paged_prefill_attention",
            q,
            kv.key_blocks,
            kv.value_blocks,
            kv.block_tables,
            torch.tensor([0, 70, 140], dtype=torch.int32),
            kv.context_lens,
            scale=0.11,
            window=window,
            soft_cap=None,
        )


@pytest.mark.parametrize(
    ("group", "dim", "dtype", "soft_cap"),
    [(1, 64, FLOAT32, None), (3, 96, BFLOAT16, 10.0), (8, 128, FLOAT16, None)],
)
def test_shared_prefix_attention(
    group: int, dim: int, dtype: torch.dtype, soft_cap: float | None
) -> None:
    """Rows in two groups and in none, a padding row, and an empty group behind them."""
    lengths = [1030, 600, 90, 1025, 0, 513, 1600, 515]
    kv = with_prefixes(lengths, dim, dtype, {(6, 0, 3): 1024, (5, 1, 7): 512})
    q = randn(len(lengths), 2 * group, dim, dtype=dtype, device="cpu")
    plain = REFERENCES.paged_decode_attention(
        q, *kv[:4], scale=0.11, window=None, soft_cap=soft_cap
    )
    found = check("shared_prefix_decode_attention", q, *kv, scale=0.11, soft_cap=soft_cap)
    assert_close(plain, found)
    assert not found[4].any()


def test_a_group_of_more_rows_than_a_tile_reads_its_prefix_by_its_first_row() -> None:
    lengths = [513 + n for n in range(20)]
    kv = with_prefixes(lengths, 64, FLOAT32, {tuple(range(19)): 512})
    kv[2][1:19, : 512 // 32] = UNREADABLE_BLOCK
    q = randn(20, 14, 64, dtype=FLOAT32, device="cpu")
    check("shared_prefix_decode_attention", q, *kv, scale=0.11, soft_cap=None)


def with_prefixes(
    lengths: list[int], dim: int, dtype: torch.dtype, groups: dict[tuple[int, ...], int]
) -> tuple[torch.Tensor, ...]:
    """Keys, values, tables, lengths, and the groups' tensors. A group's rows share blocks."""
    kv = paged(lengths, kv_heads=2, dim=dim, dtype=dtype, device="cpu", block_size=32)
    prefix_lens = torch.zeros(len(lengths), dtype=torch.int32)
    for rows, num_tokens in groups.items():
        kv.block_tables[list(rows), : num_tokens // 32] = kv.block_tables[
            rows[0], : num_tokens // 32
        ]
        prefix_lens[list(rows)] = num_tokens
    members = torch.tensor([row for rows in groups for row in rows], dtype=torch.int32)
    bounds = torch.tensor([0, *(len(rows) for rows in groups), 0], dtype=torch.int32).cumsum(0)
    return (
        kv.key_blocks, kv.value_blocks, kv.block_tables, kv.context_lens,
        prefix_lens, members, bounds.int(),
    )  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("with_residual", [False, True])
def test_rms_norm(dtype: torch.dtype, with_residual: bool) -> None:
    x = randn(5, 200, dtype=dtype, device="cpu")[:, :131]
    residual = randn(5, 131, dtype=dtype, device="cpu") if with_residual else None
    weight = randn(131, dtype=dtype, device="cpu")
    expected, found = both("rms_norm", x, weight, 1e-5, residual)
    for ours, theirs in zip(expected, found, strict=True):
        assert_close(ours, theirs)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("dim", "half"), [(64, 32), (96, 48), (96, 36), (128, 16)])
def test_rotate(dtype: torch.dtype, dim: int, half: int) -> None:
    heads = randn(5, 7, dim, dtype=dtype, device="cpu")[:, :5]
    angles = torch.randn(5, half)
    check("rotate", heads, angles.cos(), angles.sin())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["silu_mul", "gelu_tanh_mul"])
def test_gated_activations(name: str, dtype: torch.dtype) -> None:
    check(name, randn(3, 2 * 1030, dtype=dtype, device="cpu"))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("counts", [[3, 0, 1, 7], [0, 70, 0, 1], [0, 0, 0, 2]])
def test_grouped_matmul(dtype: torch.dtype, counts: list[int]) -> None:
    x = randn(sum(counts), 72, dtype=dtype, device="cpu")
    weights = randn(len(counts), 70, 72, dtype=dtype, device="cpu") / 8
    experts = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts)).int()
    check("grouped_matmul", x, weights, experts)


def test_sampling_draws_the_same_tokens() -> None:
    expected, found = both("sample_top_k_top_p", *sampling_inputs(8, 613, "cpu"))
    assert torch.equal(expected, found)


def test_the_last_tie_that_top_p_needs_stays() -> None:
    logits = torch.zeros(2, 10)
    logits[1, 0] = 1.0
    ones = torch.ones(2)
    last_kept = TRITON.sample_top_k_top_p(
        logits, ones, torch.zeros(2, dtype=torch.int32), 0.45 * ones, 0 * ones, 0.999 * ones
    )
    # 4.5 of ten equal weights take five; 45 % of e + 9 ones takes e and three of the ones.
    assert last_kept.tolist() == [4, 3]


def test_sampling_walks_a_vocabulary_of_several_steps() -> None:
    logits, temperature, top_k, top_p, min_p, uniforms = sampling_inputs(3, 5000, "cpu")
    top_k[:] = torch.tensor([0, 2000, 30])
    temperature[:] = torch.tensor([1.0, 2.0, 0.7])
    expected, found = both(
        "sample_top_k_top_p", logits, temperature, top_k, top_p, min_p * 0, uniforms
    )
    assert torch.equal(expected, found)


def test_the_sampler_draws_by_the_kernel_what_it_draws_without() -> None:
    """Through the sampler, with rules and log-probabilities, ties and tokens that are out."""
    params = requests(24, 997)
    params[7] = SamplingParams(seed=3, repetition_penalty=1.4, logit_bias=((4, 9.0),))
    params[8] = SamplingParams(seed=4, allowed_token_ids=(5, 700), num_logprobs=3)
    rows = [SampleRow(f"s{n}", p, 7 + n, (1, 2), (4,)) for n, p in enumerate(params)]
    logits = 4 * torch.randn(24, 997)
    logits[::3] = logits[::3].round()
    logits[:, ::11] = float("-inf")
    logits[8, 5] = 1.0
    draws = (draw_tokens, drawn_by(TRITON.sample_top_k_top_p))
    plain, by_kernel = (Sampler((0,), draw).sample(logits.clone(), rows) for draw in draws)
    assert by_kernel == plain
    assert len({sampled.token_id for sampled in plain}) > 9


@pytest.mark.parametrize("dtype", DTYPES)
def test_copies_are_equal_to_the_bit_and_skip_slot_minus_one(dtype: torch.dtype) -> None:
    blocks = randn(3, 2, 4, 4, 2, 24, dtype=dtype, device="cpu")
    blocks[0, 0, 0, 0] = float("nan")
    slots = torch.tensor([3, -1, 0, 15, 4])
    expected, rows = both("gather_blocks", blocks, slots, 1, 2)
    assert torch.equal(expected, rows)
    stored = [torch.zeros_like(blocks), torch.zeros_like(blocks)]
    for kernels, place in zip((REFERENCES, TRITON), stored, strict=True):
        kernels.scatter_blocks(place, slots, 1, rows)
        kernels.store_kv(
            blocks[2, 0].flatten(0, 1)[:5],
            blocks[2, 1].flatten(0, 1)[:10:2],
            place[0, 0],
            place[0, 1],
            slots,
        )
    assert torch.equal(*stored)
    assert stored[0].count_nonzero().item() == 2 * 2 * 4 * 48 + 2 * 4 * 48


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_cache_moves_the_same_bytes_by_kernels(dtype: str) -> None:
    layout = KvLayout.uniform(
        num_layers=3, num_kv_heads=2, head_dim=24, dtype=dtype, model_digest=""
    )
    caches = [
        KvCache(layout, num_blocks=6, block_size=8, dtype=getattr(torch, dtype),
                device=torch.device("cpu"))
        for _ in range(2)
    ]  # fmt: skip
    plain, by_kernels = caches
    by_kernels._kernels = TRITON
    payload = torch.randint(0, 100, (plain.blocks.nbytes,), dtype=torch.uint8).numpy().data
    for table, start, num_tokens, first, num_layers in (
        ((5, 0, 3), 3, 15, 1, 2),
        ((2,), 0, 8, 0, 3),
        ((4, 1), 7, 2, 2, 1),
        ((4, 1), 7, 0, 0, 3),
    ):
        size = num_layers * num_tokens * layout.bytes_per_token_layer
        for cache in caches:
            cache.write(table, start, num_tokens, first, num_layers, payload[1 : 1 + size])
        assert torch.equal(by_kernels.blocks, plain.blocks)
        expected = bytes(plain.read(table, start, num_tokens, first, num_layers))
        assert expected == bytes(payload[1 : 1 + size])
        assert bytes(by_kernels.read(table, start, num_tokens, first, num_layers)) == expected
        if size:
            out = memoryview(bytearray(size))
            found = by_kernels.read(table, start, num_tokens, first, num_layers, out)
            assert found is out
            assert bytes(out) == expected
