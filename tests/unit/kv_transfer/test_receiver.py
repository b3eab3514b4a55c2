from __future__ import annotations

from typing import Any

import msgspec

from baton.engine.block_pool import BlockPool
from baton.protocol.messages import (
    Denied,
    Granted,
    KvFrame,
    KvProgress,
    LeaseRenew,
    RequestBody,
    Reserve,
    TransferAck,
    TransferEnd,
    TransferNack,
)
from kv_transfer.codecs.contract import Quality
from kv_transfer.frames import KV_VERSION, RAW, end_checksum
from kv_transfer.instructions import Arrived, ToPrefill, WriteKv
from kv_transfer.receiver import Receiver
from tests.support.core import LAYOUT, ROW_BYTES, body, engine_config, transfer_config

T = "r/0"
P = "p-0|1"
BODY = body("r", 20, max_tokens=30)
CRC = 77
INT8 = {"int8": Quality.HIGH}


def make(num_blocks: int = 8, **engine: Any) -> tuple[Receiver, BlockPool]:
    pool = BlockPool(num_blocks, 8)
    config = engine_config(num_blocks, **engine)
    return Receiver(pool, LAYOUT, config, transfer_config()), pool


def ask(request: RequestBody = BODY, transfer: str = T) -> Reserve:
    """As a peer of KV version 1."""
    return Reserve(transfer, LAYOUT.fingerprint(1), request)


def to(message: Any) -> ToPrefill:
    return ToPrefill(P, message)


def frame(epoch: int, index: int = 0, start: int = 0, count: int = 20, **change: Any) -> KvFrame:
    size = 3 * count * ROW_BYTES
    values = {"codec": RAW, "num_bytes": size, "checksum": CRC} | change
    fingerprint = LAYOUT.fingerprint(1)
    return KvFrame(T, epoch, fingerprint, index, 0, 3, start, count, **values)


def end(epoch: int, num_frames: int = 1, token_ids: tuple[int, ...] = (5,)) -> TransferEnd:
    return TransferEnd(T, epoch, num_frames, 20, token_ids)


def reserved(**engine: Any) -> tuple[Receiver, BlockPool]:
    receiver, pool = make(**engine)
    assert receiver.reserve(P, ask(), 1.0) == []
    assert receiver.grant(1, 3.0) == [to(Granted(T, 1, 10.0))]
    return receiver, pool


def write(
    receiver: Receiver, sent: KvFrame, now: float, blocks: tuple[int, ...] = (0, 1, 2, 3)
) -> list[Any]:
    """Let in and written at once; what comes of the latter."""
    assert receiver.frame(sent, sent.num_bytes, CRC, now) == [WriteKv(sent, blocks, 20)]
    return [*receiver.written(sent, 0.25, "", now)]


def arrived(blocks: tuple[int, ...], num_frames: int, transfer_s: float, **change: Any) -> Arrived:
    num_bytes = 20 * LAYOUT.bytes_per_token
    values = {"num_tokens": 20, "num_raw_bytes": num_bytes, "codecs": {RAW: num_bytes}} | change
    return Arrived(T, BODY, (5,), blocks, 1.0, 2.0, transfer_s, num_bytes, num_frames, **values)


def test_frames_are_written_and_the_end_commits() -> None:
    receiver, pool = reserved()
    first, second = frame(1, 0, 0, 12), frame(1, 1, 12, 8)
    assert write(receiver, first, 4.0) == write(receiver, second, 5.0) == []
    assert receiver.end(end(1, 2), 6.5) == [
        to(TransferAck(T, 1)),
        arrived((0, 1, 2, 3), 2, 2.5),
    ]
    assert receiver.num_open == 0
    assert pool.num_free == 4, "20 + 8 tokens; they are the decode worker's now"
    assert receiver.end(end(1, 2), 7.0) == [to(TransferAck(T, 1))], "said again, answered again"
    assert receiver.frame(second, second.num_bytes, CRC, 7.0) == []
    assert receiver.reserve(P, ask(), 8.0) == []
    assert (receiver.num_open, receiver.num_stale) == (0, 2)


def test_a_damaged_frame_voids_the_epoch() -> None:
    receiver, pool = reserved()
    good, bad = frame(1, 0, 0, 12), frame(1, 1, 12, 8)
    write(receiver, good, 4.0)
    [answer] = receiver.frame(bad, bad.num_bytes, CRC + 1, 4.0)
    reason = f"KV frame 1 of {T}: checksum 0x4e, header says 0x4d"
    assert answer == to(TransferNack(T, 1, 2, reason))
    assert receiver.frame(bad, bad.num_bytes, CRC, 4.0) == [], "the old epoch is dead"
    assert receiver.num_corrupt == 1
    again = frame(2)
    assert write(receiver, again, 5.0) == []
    assert receiver.end(end(2), 5.0) == [to(TransferAck(T, 2)), arrived((0, 1, 2, 3), 1, 1.0)]
    assert pool.owners == {T}


def test_the_end_of_a_dead_epoch_is_refused_again() -> None:
    """The first nack may be lost; the sender has nothing else to wait for."""
    receiver, _ = reserved()
    receiver.end(end(1), 4.0)
    answer = to(TransferNack(T, 1, 2, "frames of this epoch were refused"))
    assert receiver.end(end(1), 5.0) == [answer]
    assert receiver.end(end(3), 5.0) == [], "an epoch that was never given"
    assert receiver.num_corrupt == 1


def test_an_end_that_does_not_fit_voids_the_epoch() -> None:
    whole = frame(1)
    for wrong in (end(1, 2), end(1, 1, ()), end(1, 1, (5, 6)), TransferEnd(T, 1, 1, 19, (5,))):
        receiver, pool = reserved()
        write(receiver, whole, 4.0)
        [answer] = receiver.end(wrong, 4.0)
        assert isinstance(answer, ToPrefill)
        assert isinstance(answer.message, TransferNack)
        assert pool.owners == {T}
    receiver, _ = reserved()
    [answer] = receiver.end(end(1, 0), 4.0)
    assert isinstance(answer, ToPrefill)
    assert isinstance(answer.message, TransferNack), "no frame came"


def test_nothing_is_written_before_it_is_granted() -> None:
    receiver, _ = make()
    receiver.reserve(P, ask(), 1.0)
    early = frame(0)
    assert receiver.frame(early, early.num_bytes, CRC, 1.0) == []
    assert receiver.end(end(0), 1.0) == []
    assert receiver.num_stale == 2


def test_what_can_never_be_taken_is_denied_at_once() -> None:
    receiver, _ = make(num_blocks=2)
    message = "20 tokens never fit into 2 KV blocks"
    assert receiver.reserve(P, ask(), 0.0) == [to(Denied(T, "invalid_request", message, False))]
    other = Reserve(T, "feed", body("r", 3))
    [answer] = receiver.reserve(P, other, 0.0)
    assert isinstance(answer, ToPrefill)
    assert answer.message.code == "incompatible_peer"
    assert receiver.num_open == 0


def test_room_is_given_by_priority_then_in_order_and_never_past_the_head() -> None:
    receiver, pool = make(num_blocks=4)
    pool.allocate("running", 2)
    receiver.reserve(P, ask(body("late", 4, priority=1, max_tokens=2), "late/0"), 0.0)
    receiver.reserve(P, ask(body("big", 20, max_tokens=2), "big/0"), 0.0)
    receiver.reserve(P, ask(body("small", 4, max_tokens=2), "small/0"), 0.0)
    assert receiver.grant(9, 0.0) == receiver.grant(9, 0.1) == []
    assert receiver.num_blocked == 1, "one reservation waits, however often it is looked at"
    pool.release("running", [0, 1])
    assert receiver.grant(9, 1.0) == [
        to(Granted("big/0", 1, 10.0)),
        to(Granted("small/0", 2, 10.0)),
    ]
    assert receiver.grant(9, 1.0) == []
    assert receiver.num_blocked == 2


def test_seats_bound_the_reservations() -> None:
    receiver, _ = make()
    for name in ("a", "b"):
        receiver.reserve(P, ask(body(name, 4, max_tokens=2), f"{name}/0"), 0.0)
    assert receiver.grant(1, 0.0) == [to(Granted("a/0", 1, 10.0))]
    assert receiver.grant(1, 0.0) == []
    assert receiver.grant(2, 0.0) == [to(Granted("b/0", 2, 10.0))]


def test_the_watermark_is_kept_unless_the_pool_is_empty() -> None:
    receiver, pool = make(num_blocks=4, watermark=0.5)
    pool.allocate("running", 1)
    receiver.reserve(P, ask(body("r", 10, max_tokens=2)), 0.0)
    assert receiver.grant(1, 0.0) == [], "2 wanted, 2 kept, 3 free"
    pool.release("running", [0])
    assert receiver.grant(1, 0.0) == [to(Granted(T, 1, 10.0))]


def test_a_silent_prefill_side_loses_its_room_and_is_fenced() -> None:
    receiver, pool = reserved()
    assert receiver.renew(P, LeaseRenew((T,)), 8.0) == [to(Granted(T, 1, 10.0))]
    assert receiver.tick(18.0) == []
    denied = Denied(T, "transfer_failed", "the prefill side was silent for 10.0 s", True)
    assert receiver.tick(18.5) == [to(denied)]
    assert pool.num_free == 8
    late = frame(1)
    assert receiver.frame(late, late.num_bytes, CRC, 19.0) == []
    assert receiver.end(end(1), 19.0) == []


def test_frames_renew_the_lease_and_another_peer_does_not() -> None:
    receiver, _ = reserved()
    first = frame(1, 0, 0, 12)
    write(receiver, first, 9.0)
    assert receiver.renew("q|1", LeaseRenew((T,)), 15.0) == []
    assert receiver.tick(19.0) == []
    assert len(receiver.tick(19.5)) == 1


def test_renewing_says_again_what_may_have_been_lost() -> None:
    receiver, _ = reserved()
    renew = LeaseRenew((T,))
    assert receiver.renew(P, renew, 4.0) == [to(Granted(T, 1, 10.0))]
    whole = frame(1)
    write(receiver, whole, 4.0)
    assert receiver.renew(P, renew, 4.0) == [], "frames come, so the grant was heard"
    receiver.end(end(1), 4.0)
    assert receiver.renew(P, renew, 5.0) == [to(TransferAck(T, 1))]
    unknown = Denied("gone/0", "transfer_failed", "the decode side has dropped it", True)
    assert receiver.renew(P, LeaseRenew(("gone/0",)), 5.0) == [to(unknown)]


def test_those_that_gave_up_do_not_pile_up_behind_one_that_waits() -> None:
    receiver, pool = make()
    others = pool.allocate("other", 7)
    receiver.reserve(P, ask(), 0.0)
    for attempt in range(1_000):
        late = f"late/{attempt}"
        receiver.reserve(P, ask(transfer=late), 0.0)
        receiver.cancel(late, 0.0)
    assert receiver.grant(8, 0.0) == []
    assert len(receiver._waiting) < 100
    pool.release("other", others)
    assert receiver.grant(8, 0.0) == [to(Granted(T, 1, 10.0))]


def test_cancel_is_idempotent() -> None:
    receiver, pool = reserved()
    assert receiver.cancel(T, 4.0)
    assert not receiver.cancel(T, 4.0)
    assert (receiver.num_open, pool.num_free) == (0, 8)
    receiver.reserve(P, ask(body("w", 4), "w/0"), 4.0)
    assert receiver.cancel("w/0", 4.0), "one that only waits, too"
    assert receiver.grant(1, 5.0) == []


# --- version 2 ------------------------------------------------------------------------


def newest(**engine: Any) -> tuple[Receiver, BlockPool]:
    """A reservation of version 2; int8 can be decoded here."""
    pool = BlockPool(8, 8)
    receiver = Receiver(pool, LAYOUT, engine_config(8, **engine), transfer_config(), INT8)
    asked = Reserve(T, LAYOUT.fingerprint(1), BODY, KV_VERSION, LAYOUT.fingerprint())
    assert receiver.reserve(P, asked, 1.0) == []
    assert receiver.grant(1, 3.0) == [to(Granted(T, 1, 10.0, 2, ("int8", RAW)))]
    return receiver, pool


def frame2(epoch: int, index: int = 0, start: int = 0, count: int = 20, **change: Any) -> KvFrame:
    fingerprint = LAYOUT.fingerprint()
    values = {"fingerprint": fingerprint, "version": 2} | change
    return msgspec.structs.replace(frame(epoch, index, start, count), **values)


def end2(epoch: int, num_frames: int = 1, num_tokens: int = 20) -> TransferEnd:
    said = TransferEnd(T, epoch, num_frames, num_tokens, (5,), 2, lag_s=0.5)
    return msgspec.structs.replace(said, checksum=end_checksum(said))


def test_progress_is_told_and_told_again_with_a_renewal() -> None:
    receiver, _ = newest()
    first, second = frame2(1, 0, 0, 12), frame2(1, 1, 12, 8, codec="int8", num_bytes=100)
    told = to(KvProgress(T, 1, 1, first.num_bytes, 0.25))
    assert write(receiver, first, 4.0) == [told]
    assert receiver.renew(P, LeaseRenew((T,)), 4.5) == [told]
    assert write(receiver, second, 5.0) == [to(KvProgress(T, 1, 2, first.num_bytes + 100, 0.5))]
    [_, arrived] = receiver.end(end2(1, 2), 6.0)
    assert isinstance(arrived, Arrived)
    assert arrived.codecs == {RAW: first.num_bytes, "int8": 100}
    assert arrived.quality == "high", "as good as the worst of it"
    assert (arrived.num_bytes, arrived.num_raw_bytes) == (
        first.num_bytes + 100,
        20 * LAYOUT.bytes_per_token,
    )
    assert arrived.exposed_s == 0.5


def test_an_end_waits_for_the_last_write() -> None:
    receiver, pool = newest()
    whole = frame2(1)
    receiver.frame(whole, whole.num_bytes, CRC, 4.0)
    assert receiver.end(end2(1), 4.0) == receiver.end(end2(1), 4.5) == []
    acked, arrived = receiver.written(whole, 1.0, "", 6.0)
    assert acked == to(TransferAck(T, 1))
    assert isinstance(arrived, Arrived)
    assert arrived.exposed_s == 0.5 + 2.0
    assert pool.owners == {T}


def test_blocks_stay_until_no_write_of_a_revoked_transfer_runs() -> None:
    for revoke in (lambda r: r.tick(30.0), lambda r: r.cancel(T, 5.0)):
        receiver, pool = newest()
        first, second = frame2(1, 0, 0, 12), frame2(1, 1, 12, 8)
        for sent in (first, second):
            receiver.frame(sent, sent.num_bytes, CRC, 4.0)
        revoke(receiver)
        assert (T in receiver, receiver.num_open, pool.owners) == (False, 1, {T})
        assert receiver.reserve(P, ask(), 31.0) == []
        assert receiver.frame(frame2(1, 2), 1, CRC, 31.0) == []
        assert receiver.written(first, 0.1, "", 31.0) == []
        assert pool.owners == {T}
        assert receiver.written(second, 0.1, "did not decode", 31.0) == []
        assert (receiver.num_open, pool.num_free) == (0, 8)


def test_a_new_epoch_begins_only_when_no_write_of_the_old_one_runs() -> None:
    receiver, _ = newest()
    good, bad = frame2(1, 0, 0, 12), frame2(1, 1, 12, 8)
    receiver.frame(good, good.num_bytes, CRC, 4.0)
    assert receiver.frame(bad, bad.num_bytes, CRC + 1, 4.0) == []
    assert receiver.end(end2(1, 2), 4.0) == receiver.renew(P, LeaseRenew((T,)), 4.0) == []
    [nack] = receiver.written(good, 0.1, "", 5.0)
    assert isinstance(nack, ToPrefill)
    assert (nack.message.dead_epoch, nack.message.epoch) == (1, 2)
    again = frame2(2)
    assert write(receiver, again, 6.0) == [to(KvProgress(T, 2, 1, again.num_bytes, 0.25))]
    assert receiver.num_corrupt == 1


def test_what_does_not_decode_voids_the_epoch() -> None:
    receiver, _ = newest()
    first = frame2(1, codec="int8", num_bytes=100)
    receiver.frame(first, 100, CRC, 4.0)
    [nack] = receiver.written(first, 0.1, "escapes are missing", 5.0)
    assert isinstance(nack, ToPrefill)
    assert "escapes are missing" in nack.message.reason


def test_an_end_may_cover_a_part_and_no_more_than_came() -> None:
    receiver, _ = newest()
    write(receiver, frame2(1, 0, 0, 12), 4.0)
    [_, arrived] = receiver.end(end2(1, 1, 12), 5.0)
    assert isinstance(arrived, Arrived)
    assert arrived.num_tokens == 12
    receiver, _ = newest()
    [_, arrived] = receiver.end(end2(1, 0, 0), 5.0)
    assert isinstance(arrived, Arrived)
    assert (arrived.num_tokens, arrived.num_bytes) == (0, 0)
    receiver, _ = newest()
    write(receiver, frame2(1, 0, 0, 12), 4.0)
    [nack] = receiver.end(end2(1, 1, 13), 5.0)
    assert isinstance(nack.message, TransferNack)


def test_a_damaged_end_voids_the_epoch() -> None:
    for change in ({"token_ids": (4,)}, {"checksum": 1}, {"lag_s": 0.25}, {"version": 1}):
        receiver, _ = newest()
        write(receiver, frame2(1), 4.0)
        [nack] = receiver.end(msgspec.structs.replace(end2(1), **change), 5.0)
        assert isinstance(nack.message, TransferNack)


def test_another_layout_in_version_2_is_refused_and_named() -> None:
    receiver, _ = make()
    asked = Reserve(T, LAYOUT.fingerprint(1), BODY, KV_VERSION, "feed")
    [answer] = receiver.reserve(P, asked, 0.0)
    assert isinstance(answer, ToPrefill)
    assert answer.message.code == "incompatible_peer"
    assert "feed" in answer.message.message
