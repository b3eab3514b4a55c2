import pytest
import torch

from baton.engine.kv_cache import KvCache
from baton.protocol.errors import InternalError
from baton.protocol.layout import KvLayout

LAYERS, HEADS, DIM = 3, 2, 4


def make_cache(dtype: str = "float32", *, num_blocks: int = 6, block_size: int = 8) -> KvCache:
    layout = KvLayout.uniform(
        num_layers=LAYERS, num_kv_heads=HEADS, head_dim=DIM, dtype=dtype, model_digest="x"
    )
    return KvCache(
        layout,
        num_blocks=num_blocks,
        block_size=block_size,
        dtype=getattr(torch, dtype),
        device=torch.device("cpu"),
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_bytes_move_between_block_sizes_and_tables(dtype: str) -> None:
    source, target = make_cache(dtype), make_cache(dtype, num_blocks=4, block_size=16)
    source.blocks[:] = torch.randn(source.blocks.shape).to(source.blocks.dtype)
    payload = source.read((5, 0, 3), 3, 15, 1, 2)
    assert payload.nbytes == 15 * 2 * source.layout.bytes_per_token_layer
    assert payload.contiguous
    assert payload.format == "B"
    untouched = target.blocks.clone()
    target.write((2, 1), 3, 15, 1, 2, bytes(payload))
    assert bytes(target.read((2, 1), 3, 15, 1, 2)) == bytes(payload)
    # Position 10 is slot 2 of the source's second block and slot 10 of the target's first.
    assert torch.equal(target.blocks[1:, :, 2, 10], source.blocks[1:, :, 0, 2])
    assert torch.equal(target.blocks[0], untouched[0])
    assert torch.equal(target.blocks[:, :, 2, :3], untouched[:, :, 2, :3])


def test_a_read_is_an_own_copy() -> None:
    cache = make_cache()
    payload = cache.read((0,), 0, 4, 0, 1)
    cache.blocks.fill_(7)
    assert bytes(payload) == bytes(payload.nbytes)


def test_read_only_and_unaligned_payloads_are_taken() -> None:
    cache = make_cache()
    size = 2 * LAYERS * cache.layout.bytes_per_token_layer
    padded = bytes(range(1, 201)) * size
    cache.write((1,), 2, 2, 0, LAYERS, memoryview(padded)[1 : 1 + size])
    assert bytes(cache.read((1,), 2, 2, 0, LAYERS)) == padded[1 : 1 + size]


def test_no_tokens_are_no_bytes() -> None:
    cache = make_cache()
    assert bytes(cache.read((0,), 3, 0, 0, LAYERS)) == b""
    cache.write((0,), 3, 0, 0, LAYERS, b"")


@pytest.mark.parametrize("difference", [-1, 1])
def test_a_wrong_length_changes_nothing(difference: int) -> None:
    cache = make_cache()
    size = 4 * LAYERS * cache.layout.bytes_per_token_layer
    with pytest.raises(InternalError, match=f"{size + difference} bytes; {size} expected"):
        cache.write((0,), 0, 4, 0, LAYERS, b"\x01" * (size + difference))
    assert not cache.blocks.any()


@pytest.mark.parametrize(
    ("table", "start", "num_tokens", "layer_start", "num_layers"),
    [
        ((0,), 0, 9, 0, 1),
        ((0,), -1, 2, 0, 1),
        ((0,), 0, -1, 0, 1),
        ((6,), 0, 1, 0, 1),
        ((-1,), 0, 1, 0, 1),
        ((0,), 0, 1, 0, 4),
        ((0,), 0, 1, 3, 1),
        ((0,), 0, 1, -1, 1),
        ((0,), 0, 1, 0, 0),
    ],
)
def test_what_is_not_there_is_refused(
    table: tuple[int, ...], start: int, num_tokens: int, layer_start: int, num_layers: int
) -> None:
    with pytest.raises(InternalError):
        make_cache().read(table, start, num_tokens, layer_start, num_layers)
