"""The heads of the ranks, side by side, are the heads of the model."""

from __future__ import annotations

import numpy as np
import pytest

from baton.engine.parallel.kv import join_heads, split_heads
from baton.protocol.errors import InternalError
from baton.protocol.layout import KvLayout

LAYOUT = KvLayout.uniform(
    num_layers=3, num_kv_heads=4, head_dim=6, dtype="float16", model_digest="m"
)


@pytest.mark.parametrize("num_ranks", [1, 2, 4])
@pytest.mark.parametrize(("num_layers", "num_tokens"), [(3, 5), (1, 1), (2, 0)])
def test_a_rank_has_its_heads_of_every_token_and_layer(
    num_ranks: int, num_layers: int, num_tokens: int
) -> None:
    shape = (num_layers, 2, num_tokens, 4, 6)
    whole = np.arange(np.prod(shape), dtype=np.float16).reshape(shape)
    parts = split_heads(whole.tobytes(), num_layers * num_tokens, LAYOUT, num_ranks)
    own_heads = 4 // num_ranks
    for rank, part in enumerate(parts):
        found = np.frombuffer(part, np.float16).reshape(*shape[:3], own_heads, 6)
        expected = whole[..., rank * own_heads : (rank + 1) * own_heads, :]
        assert np.array_equal(found, expected)
    assert bytes(join_heads(parts, LAYOUT)) == whole.tobytes()


def test_ranks_beyond_the_heads_have_one_each() -> None:
    """``Executor`` refuses them; the plan, and so this, does not."""
    whole = np.arange(2 * 4 * 6, dtype=np.float16).reshape(1, 2, 1, 4, 6)
    parts = split_heads(whole.tobytes(), 1, LAYOUT, 8)
    for rank, part in enumerate(parts):
        assert np.array_equal(np.frombuffer(part, np.float16), whole[..., rank // 2, :].reshape(-1))
    assert bytes(join_heads(parts, LAYOUT)) == whole.tobytes()


def test_a_payload_of_another_length_is_refused() -> None:
    with pytest.raises(InternalError, match="KV payload has 95 bytes; 96 expected"):
        split_heads(bytes(95), 1, LAYOUT, 2)
