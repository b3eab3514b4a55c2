from __future__ import annotations

import msgspec
import pytest

from baton.engine.block_pool import BlockPool
from baton.protocol.messages import (
    Denied,
    Granted,
    LeaseRenew,
    Reserve,
    TransferAck,
    TransferCancel,
    TransferEnd,
    TransferNack,
    WorkerRef,
)
from kv_transfer.codecs.contract import Quality
from kv_transfer.frames import KV_VERSION, RAW
from kv_transfer.instructions import CancelPush, PushEnd, PushKv, SendClosed, ToDecode
from kv_transfer.sender import Sender, owner_name
from tests.support.core import DECODE, LAYOUT, body, transfer_config

T = "r/0"
BODY = body("r", 20, max_tokens=8)
RESERVE = ToDecode(
    DECODE, Reserve(T, LAYOUT.fingerprint(1), BODY, KV_VERSION, LAYOUT.fingerprint())
)
CANCEL = ToDecode(DECODE, TransferCancel(T))


def begun(*, max_resends: int = 2) -> tuple[Sender, BlockPool, tuple[int, ...]]:
    """A transfer of 20 tokens; its three blocks have their name of after prefill already."""
    pool = BlockPool(8, 8)
    sender = Sender(pool, LAYOUT, transfer_config(max_resends=max_resends))
    assert sender.begin(T, DECODE, BODY, 0.0) == [RESERVE]
    return sender, pool, tuple(pool.allocate(owner_name(T), 3))


def push(table: tuple[int, ...], epoch: int, first: int, start: int, count: int) -> PushKv:
    return PushKv(DECODE, T, epoch, first, table, start, count, 20, range(3), codecs=(RAW,))


def end(epoch: int, num_frames: int, prefilled_at: float = 1.0) -> PushEnd:
    return PushEnd(DECODE, TransferEnd(T, epoch, num_frames, 20, (5,)), prefilled_at)


def flushing(max_resends: int = 2) -> tuple[Sender, BlockPool, tuple[int, ...]]:
    sender, pool, table = begun(max_resends=max_resends)
    assert sender.granted(Granted(T, 4, 10.0), DECODE, 0.0) == []
    assert sender.computed(T, table, 20, 1.0) == [push(table, 4, 0, 0, 20)]
    assert sender.prefill_done(T, (5,), 1.0) == [end(4, 1)]
    return sender, pool, table


def test_granted_before_prefill_is_done_streams_chunk_after_chunk() -> None:
    sender, pool, table = begun()
    assert sender.computed(T, table[:1], 8, 0.5) == []
    assert sender.granted(Granted(T, 4, 10.0), DECODE, 1.0) == [push(table[:1], 4, 0, 0, 8)]
    assert sender.computed(T, table, 20, 2.0) == [push(table, 4, 1, 8, 12)]
    assert sender.prefill_done(T, (5,), 2.0) == [end(4, 2, 2.0)]
    assert (sender.num_parked, pool.num_free) == (0, 5)
    assert sender.acked(TransferAck(T, 4), 3.0) == [CancelPush(T, is_committed=True), SendClosed(T)]
    assert (sender.num_open, pool.num_free) == (0, 8)


def test_parked_until_granted() -> None:
    sender, _, table = begun()
    assert sender.computed(T, table, 20, 1.0) == []
    assert sender.prefill_done(T, (5,), 1.0) == []
    assert sender.num_parked == 1
    granted = sender.granted(Granted(T, 9, 10.0), DECODE, 5.0)
    assert granted == [push(table, 9, 0, 0, 20), end(9, 1)]
    assert sender.granted(Granted(T, 10, 10.0), DECODE, 5.0) == [], "once is enough"


def test_a_nack_sends_all_again_under_the_new_epoch() -> None:
    sender, pool, table = flushing()
    nack = TransferNack(T, 4, 5, "checksum")
    assert sender.nacked(nack, 2.0) == [CancelPush(T), push(table, 5, 0, 0, 20), end(5, 1)]
    assert sender.nacked(nack, 2.0) == [], "epoch 4 is dead already"
    assert sender.acked(TransferAck(T, 4), 2.0) == []
    assert pool.num_free == 5
    assert sender.acked(TransferAck(T, 5), 2.0) == [CancelPush(T, is_committed=True), SendClosed(T)]


def test_one_nack_too_many_fails_the_transfer() -> None:
    sender, pool, _ = flushing(max_resends=1)
    sender.nacked(TransferNack(T, 4, 5, "checksum"), 2.0)
    assert sender.nacked(TransferNack(T, 5, 6, "checksum"), 3.0) == [
        CANCEL,
        CancelPush(T),
        SendClosed(T, "transfer_failed", "checksum; sent 2 times", True, "d-0"),
    ]
    assert (sender.num_open, pool.num_free) == (0, 8)


def test_a_nack_before_anything_was_granted_is_nobodys() -> None:
    sender, _, table = begun()
    assert sender.nacked(TransferNack(T, 0, 1, "?"), 0.0) == []
    assert sender.acked(TransferAck(T, 0), 0.0) == []
    sender.computed(T, table, 20, 0.0)
    sender.prefill_done(T, (5,), 0.0)
    assert sender.nacked(TransferNack(T, 0, 1, "?"), 0.0) == []
    assert sender.num_open == 1


def test_denied_for_good_and_for_now() -> None:
    for retryable, suspect in ((True, "d-0"), (False, "")):
        sender, pool, table = begun()
        sender.computed(T, table, 20, 1.0)
        sender.prefill_done(T, (5,), 1.0)
        closed = SendClosed(T, "overloaded", "full", retryable, suspect)
        denied = Denied(T, "overloaded", "full", retryable)
        assert sender.denied(denied, 2.0) == [CancelPush(T), closed]
        assert sender.denied(denied, 2.0) == []
        assert pool.num_free == 8


def test_denied_while_streaming_leaves_the_blocks_to_their_owner() -> None:
    sender, pool, table = begun()
    sender.granted(Granted(T, 4, 10.0), DECODE, 0.0)
    sender.computed(T, table, 8, 0.0)
    sender.denied(Denied(T, "transfer_failed", "lease", True), 1.0)
    assert pool.num_free == 5


def test_cancel_is_idempotent_and_frees() -> None:
    sender, pool, _ = flushing()
    assert sender.cancel(T, 2.0) == [CANCEL, CancelPush(T)]
    assert sender.cancel(T, 2.0) == []
    assert (sender.num_open, pool.num_free) == (0, 8)
    assert sender.granted(Granted(T, 7, 10.0), DECODE, 2.0) == [CANCEL], "let go of the room"


def test_a_refused_hello_fails_what_goes_there_and_nothing_else() -> None:
    sender, _, _ = begun()
    other = WorkerRef("d-1", "inc", "tcp://127.0.0.1:2")
    sender.begin("q/0", other, body("q"), 0.0)
    [_, closed] = sender.refused(DECODE, "version", 1.0)
    assert closed == SendClosed(T, "incompatible_peer", "version", True, "d-0")
    assert "q/0" in sender
    assert T not in sender


def test_leases_are_renewed_and_an_unanswered_end_is_said_again() -> None:
    sender, _, _ = flushing()
    renew = ToDecode(DECODE, LeaseRenew((T,)))
    assert sender.tick(1.0) == [renew]
    assert sender.tick(2.0) == [], "three times a lease"
    assert sender.tick(5.0) == [renew]
    assert sender.tick(10.9) == [renew], "answered late is no reason yet"
    assert sender.tick(15.0) == [renew, end(4, 1)]
    assert sender.tick(20.0) == [renew]
    sender.acked(TransferAck(T, 4), 20.0)
    assert sender.tick(30.0) == []


def test_frames_are_counted_as_they_are_cut() -> None:
    pool = BlockPool(8, 8)
    three_rows = 3 * LAYOUT.bytes_per_token_layer
    config = msgspec.structs.replace(transfer_config(), max_frame_bytes=three_rows)
    sender = Sender(pool, LAYOUT, config)
    sender.begin(T, DECODE, BODY, 0.0)
    table = tuple(pool.allocate(owner_name(T), 3))
    sender.granted(Granted(T, 1, 10.0), DECODE, 0.0)
    assert sender.computed(T, table, 7, 0.0) == [push(table, 1, 0, 0, 7)]
    # Three layers, seven tokens in frames of three: three frames a layer.
    assert sender.computed(T, table, 20, 0.0) == [push(table, 1, 9, 7, 13)]
    assert sender.prefill_done(T, (5,), 0.0) == [end(1, 9 + 15, 0.0)]


CODECS = {
    RAW: Quality.EXACT,
    "split": Quality.EXACT,
    "int8": Quality.HIGH,
    "kv1": Quality.MEDIUM,
}
LABELS = {"kv1": "kv1@feed"}


@pytest.mark.parametrize(
    ("floor", "offered", "codecs", "may_recompute"),
    [
        ("", ("raw", "split", "int8", "kv1@feed"), ("raw", "split"), True),
        ("exact", ("split",), ("raw", "split"), False),
        ("lossless", ("int8",), ("raw",), True),
        ("high", ("split", "int8", "kv1@feed"), ("raw", "split", "int8"), True),
        ("low", ("kv1@feed",), ("raw", "kv1"), True),
        ("low", ("kv1", "kv1@other"), ("raw",), True),
    ],
)
def test_codecs_are_those_of_both_ends_that_keep_the_floor(
    floor: str, offered: tuple[str, ...], codecs: tuple[str, ...], may_recompute: bool
) -> None:
    sender = Sender(BlockPool(8, 8), LAYOUT, transfer_config(), CODECS, LABELS)
    sender.begin(T, DECODE, msgspec.structs.replace(BODY, kv_quality=floor), 0.0)
    sender.granted(Granted(T, 4, 10.0, 2, offered), DECODE, 0.0)
    [job] = sender.computed(T, (0, 1, 2), 20, 1.0)
    assert isinstance(job, PushKv)
    assert (job.codecs, job.may_recompute) == (codecs, may_recompute)


def test_bits_that_come_out_the_same_may_be_computed_again_for_any_floor() -> None:
    layout = msgspec.structs.replace(LAYOUT, arithmetic="fixed")
    sender = Sender(BlockPool(8, 8), layout, transfer_config())
    sender.begin(T, DECODE, msgspec.structs.replace(BODY, kv_quality="exact"), 0.0)
    sender.granted(Granted(T, 4, 10.0, 2), DECODE, 0.0)
    [job] = sender.computed(T, (0, 1, 2), 20, 1.0)
    assert isinstance(job, PushKv)
    assert job.may_recompute


def test_a_version_that_was_not_asked_for_fails_the_transfer() -> None:
    sender, _, _ = begun()
    [cancel, _, closed] = sender.granted(Granted(T, 4, 10.0, 3), DECODE, 0.0)
    assert cancel == CANCEL
    assert isinstance(closed, SendClosed)
    assert "KV version 3" in closed.message


def test_layers_go_as_they_are_computed_and_all_of_them_once() -> None:
    sender, _, table = begun()
    sender.granted(Granted(T, 4, 10.0, 2), DECODE, 0.0)
    places = [
        [(job.layers, job.token_start, job.num_tokens, job.first_index) for job in pushed]
        for pushed in (
            sender.layers_computed(T, table, 12, 2, 1.0),
            sender.layers_computed(T, table, 12, 2, 1.0),
            sender.computed(T, table, 12, 1.0),
            sender.layers_computed(T, table, 20, 1, 1.0),
            sender.computed(T, table, 20, 1.0),
        )
    ]
    assert places == [
        [(range(2), 0, 12, 0)],
        [],
        [(range(2, 3), 0, 12, 1)],
        [(range(1), 12, 8, 2)],
        [(range(1, 3), 12, 8, 3)],
    ]
