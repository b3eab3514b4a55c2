"""The references against torch's own operations and by hand: they are what kernels must equal."""

from __future__ import annotations

import torch
from torch.nn.functional import rms_norm, scaled_dot_product_attention

from baton.engine.kernels.registry import REFERENCES

BLOCK_SIZE = 4


def test_prefill_and_decode_equal_torchs_attention_over_the_gathered_rows() -> None:
    torch.manual_seed(0)
    length, heads, kv_heads, dim = 11, 6, 2, 8
    q = torch.randn(length, heads, dim)
    k, v = torch.randn(2, length, kv_heads, dim)
    blocks = torch.full((2, 6, BLOCK_SIZE, kv_heads, dim), float("nan"))
    table = torch.tensor([[5, 0, 3]], dtype=torch.int32)
    positions = torch.arange(length)
    slots = table[0].long()[positions // BLOCK_SIZE] * BLOCK_SIZE + positions % BLOCK_SIZE
    REFERENCES.store_kv(k, v, blocks[0], blocks[1], slots)
    expected = scaled_dot_product_attention(
        q.transpose(0, 1)[None],
        k.transpose(0, 1)[None],
        v.transpose(0, 1)[None],
        is_causal=True,
        enable_gqa=True,
        scale=0.3,
    )[0].transpose(0, 1)
    chunk = REFERENCES.paged_prefill_attention(
        q[4:],
        blocks[0],
        blocks[1],
        table,
        torch.tensor([0, length - 4], dtype=torch.int32),
        torch.tensor([length], dtype=torch.int32),
        scale=0.3,
        window=None,
        soft_cap=None,
    )
    torch.testing.assert_close(chunk, expected[4:])
    last = REFERENCES.paged_decode_attention(
        q[-1:],
        blocks[0],
        blocks[1],
        table,
        torch.tensor([length], dtype=torch.int32),
        scale=0.3,
        window=None,
        soft_cap=None,
    )
    torch.testing.assert_close(last, expected[-1:])


def test_a_padding_row_is_zero_and_slot_minus_one_stores_nothing() -> None:
    blocks = torch.zeros(2, 2, BLOCK_SIZE, 1, 8)
    REFERENCES.store_kv(
        torch.ones(2, 1, 8), torch.ones(2, 1, 8), blocks[0], blocks[1], torch.tensor([-1, 3])
    )
    assert blocks.sum().item() == 2 * 8
    out = REFERENCES.paged_decode_attention(
        torch.ones(1, 1, 8),
        blocks[0],
        blocks[1],
        torch.zeros(1, 1, dtype=torch.int32),
        torch.zeros(1, dtype=torch.int32),
        scale=1.0,
        window=None,
        soft_cap=None,
    )
    assert not out.any()


def test_rms_norm_equals_torchs() -> None:
    torch.manual_seed(0)
    x, residual, weight = torch.randn(3, 16), torch.randn(3, 16), torch.randn(16)
    normed, total = REFERENCES.rms_norm(x, weight, 1e-5, residual)
    torch.testing.assert_close(total, x + residual)
    torch.testing.assert_close(normed, rms_norm(x + residual, (16,), weight, 1e-5))


def test_rotating_keeps_lengths_and_what_is_past_the_rotary_part() -> None:
    torch.manual_seed(0)
    heads, angles = torch.randn(3, 2, 8), torch.randn(3, 2)
    turned = REFERENCES.rotate(heads, angles.cos(), angles.sin())
    torch.testing.assert_close(turned[..., 4:], heads[..., 4:])
    pairs, turned_pairs = (t[..., :4].unflatten(-1, (2, 2)) for t in (heads, turned))
    torch.testing.assert_close(turned_pairs.norm(dim=-2), pairs.norm(dim=-2))
    assert not torch.allclose(turned[..., :4], heads[..., :4])


def test_grouped_rows_meet_their_own_expert() -> None:
    torch.manual_seed(0)
    x, weights = torch.randn(5, 4), torch.randn(3, 6, 4)
    experts = torch.tensor([0, 0, 2, 2, 2], dtype=torch.int32)
    expected = torch.stack([weights[e] @ row for e, row in zip(experts, x, strict=True)])
    torch.testing.assert_close(REFERENCES.grouped_matmul(x, weights, experts), expected)


def test_gathered_blocks_go_back_where_they_came_from() -> None:
    torch.manual_seed(0)
    blocks = torch.randn(3, 2, 2, BLOCK_SIZE, 1, 8)
    slots = torch.tensor([6, -1, 1])
    rows = REFERENCES.gather_blocks(blocks, slots, 1, 2)
    assert torch.equal(rows[0, 1, 0], blocks[1, 1, 1, 2])
    assert not rows[:, :, 1].any()
    empty = torch.zeros_like(blocks)
    REFERENCES.scatter_blocks(empty, slots, 1, rows)
    assert torch.equal(REFERENCES.gather_blocks(empty, slots, 1, 2), rows)
    assert not empty[0].any()
    assert empty.count_nonzero().item() == rows.count_nonzero().item()
