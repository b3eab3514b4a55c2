"""Which rows of layers that slide are asked for, and what is known of the others afterwards."""

from __future__ import annotations

import pytest

from baton.engine.block_pool import BlockPool
from baton.protocol.layout import KvLayout
from baton.protocol.messages import Granted, KvFrame, Reserve, TransferEnd
from decode_worker.handover import arrived_job
from kv_transfer.frames import KV_VERSION, RAW, Framing, end_checksum
from kv_transfer.instructions import Arrived, ToPrefill, WriteKv
from kv_transfer.receiver import Receiver
from tests.support.core import body, engine_config, transfer_config

T, P = "r/0", "p-0|1"
CRC = 77


def layout(*windows: int | None) -> KvLayout:
    return KvLayout.uniform(
        num_layers=len(windows),
        num_kv_heads=1,
        head_dim=2,
        dtype="float32",
        model_digest="m",
        windows=windows,
    )


def handed_over(kv: KvLayout, num_tokens: int, version: int) -> tuple[Arrived, list[KvFrame]]:
    """As a prefill worker of that version does it, in frames as large as can be."""
    pool = BlockPool(8, 8)
    receiver = Receiver(pool, kv, engine_config(8), transfer_config())
    request = body("r", num_tokens, max_tokens=30)
    ask = Reserve(T, kv.fingerprint(1), request, version, kv.fingerprint() if version > 1 else "")
    receiver.reserve(P, ask, 0.0)
    [granted] = receiver.grant(1, 0.0)
    assert isinstance(granted, ToPrefill)
    assert isinstance(granted.message, Granted)
    epoch = granted.message.epoch
    framing = Framing(kv, version)
    frames = []
    for index, cut in enumerate(framing.cuts(0, num_tokens, 100_000, num_tokens_total=num_tokens)):
        sent = KvFrame(
            T,
            epoch,
            framing.fingerprint,
            index,
            cut.layer_start,
            cut.num_layers,
            cut.token_start,
            cut.num_tokens,
            RAW,
            framing.num_bytes(cut),
            CRC,
            version,
            cut.group,
        )
        [write] = receiver.frame(sent, sent.num_bytes, CRC, 0.0)
        assert isinstance(write, WriteKv)
        receiver.written(sent, 0.0, "", 0.0)
        frames.append(sent)
    end = TransferEnd(T, epoch, len(frames), num_tokens, (5,), version)
    end = TransferEnd(T, epoch, len(frames), num_tokens, (5,), version, end_checksum(end))
    [arrived] = [i for i in receiver.end(end, 0.0) if isinstance(i, Arrived)]
    return arrived, frames


@pytest.mark.parametrize(
    ("windows", "complete_from"),
    [((None, None), 0), ((4, None), 17), ((6, 4), 17), ((21, None), 0), ((1, 4), 20), ((1,), 20)],
)
def test_the_sequence_knows_from_where_on_its_rows_are_complete(
    windows: tuple[int | None, ...], complete_from: int
) -> None:
    arrived, frames = handed_over(layout(*windows), 20, KV_VERSION)
    assert arrived.complete_from == complete_from
    _, sequence = arrived_job(arrived, 0.0)
    assert (sequence.complete_from, sequence.num_computed) == (complete_from, 20)
    rows = sum(f.num_layers * f.num_tokens for f in frames)
    assert rows == sum(20 if w is None else min(20, w - 1) for w in windows)


def test_a_peer_of_version_1_sends_all_rows() -> None:
    arrived, [only] = handed_over(layout(4, None, 6), 20, 1)
    assert arrived.complete_from == 0
    assert (only.num_layers, only.num_tokens) == (3, 20)
