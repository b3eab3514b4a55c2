from __future__ import annotations

import msgspec
import pytest

from baton.protocol.layout import KvLayout

LAYOUT = KvLayout(
    num_layers=4, num_kv_heads=2, head_dim=64, dtype="bfloat16", model_digest="0123abcd"
)


def test_bytes_of_a_token() -> None:
    assert LAYOUT.bytes_per_token_layer == 2 * 2 * 64 * 2
    assert LAYOUT.bytes_per_token == 4 * 512
    wide = msgspec.structs.replace(LAYOUT, dtype="float32")
    assert wide.bytes_per_token == 2 * LAYOUT.bytes_per_token


def test_the_fingerprint_is_stable() -> None:
    """Peers of other builds compare it: a change of these digits is a change of the wire."""
    assert LAYOUT.fingerprint() == "f1d7be27927fbed1"
    assert msgspec.structs.replace(LAYOUT).fingerprint() == LAYOUT.fingerprint()


@pytest.mark.parametrize(
    "change",
    [
        {"num_layers": 5},
        {"num_kv_heads": 1},
        {"head_dim": 32},
        {"dtype": "float16"},
        {"model_digest": "0123abce"},
        {"arithmetic": "kernels-1/torch-2.13/tp-1"},
        {"version": 2},
    ],
)
def test_each_field_changes_the_fingerprint(change: dict[str, object]) -> None:
    other = msgspec.structs.replace(LAYOUT, **change)
    assert other.fingerprint() != LAYOUT.fingerprint()
    assert len(other.fingerprint()) == 16


def test_the_parameters_cover_every_field() -> None:
    assert len(msgspec.structs.fields(KvLayout)) == 7
