"""``assert decider.handle(event, now) == [instructions]`` along the ways of a request."""

from __future__ import annotations

from functools import partial

import msgspec
import pytest

from baton.engine.plan import SampledToken, SequenceChunk, StepPlan, StepResult
from baton.protocol.messages import (
    Abort,
    Denied,
    Dispatch,
    Granted,
    HopTimes,
    LeaseRenew,
    RequestBody,
    Reserve,
    RouterAlive,
    TokenItem,
    TransferAck,
    TransferCancel,
    TransferEnd,
    TransferNack,
)
from baton.worker.events import (
    RunStep,
    StepDone,
    StepRaised,
    StepWanted,
    Tick,
)
from decode_worker.decider import EndArrived
from kv_transfer.frames import KV_VERSION, RAW, end_checksum
from kv_transfer.instructions import ToPrefill, WriteKv
from tests.support.core import (
    LAYOUT,
    ROW_BYTES,
    VOCAB_SIZE,
    body,
    run_plan,
)
from tests.support.deciders import (
    CRC,
    PREFILL_PEER,
    Decode,
    ack,
    decode_tokens,
    end,
    failure,
    frame,
    transfer_of,
)

T = "r/0"
P = PREFILL_PEER
failed = partial(failure, "decode")


def test_a_hand_over_is_granted_written_committed_and_decoded() -> None:
    decode = Decode()
    request = body("r", 10, max_tokens=3)
    assert decode.reserve(request, 1.0) == [ToPrefill(P, Granted(T, 1, 10.0))]
    whole = frame(request, 1)
    assert decode.frame(whole, 2.0) == [WriteKv(whole, (0, 1), 10)]
    assert decode(end(request, 1, 42), 3.0) == [ToPrefill(P, TransferAck(T, 1))]
    chunk = SequenceChunk(T, (42,), 10, (0, 1), True, request.sampling)
    assert decode(StepWanted(), 3.0) == [RunStep(StepPlan(1, (chunk,)))]
    hop = HopTimes(
        transfer_s=1.0,
        transfer_bytes=10 * LAYOUT.bytes_per_token,
        transfer_frames=1,
        codec=RAW,
        transport="zeromq",
        first_step_s=1.5,
        transfer_raw_bytes=10 * LAYOUT.bytes_per_token,
    )
    step = StepResult(1, (SampledToken(T, 43),), 0.0)
    assert decode(StepDone(step), 4.5) == [decode_tokens(TokenItem("r", 0, 1, (43,), hop=hop))]
    last = TokenItem("r", 0, 2, (44,), finish_reason="length")
    assert decode.step(5.0, token_id=44) == [decode_tokens(last)]
    decode.tell(ack(3))
    assert decode.decider.num_open == 0
    decode.idle()


def test_both_phases_here() -> None:
    decode = Decode("mixed")
    request = body("r", 4, max_tokens=2, stop_token_ids=(50,))
    assert decode.tell(Dispatch(request, None), 1.0) == []
    hop = HopTimes(num_chunks=1)
    assert decode.step(1.0, token_id=9) == [decode_tokens(TokenItem("r", 0, 0, (9,), hop=hop))]
    stopped = TokenItem("r", 0, 1, (50,), finish_reason="stop", stop_token_id=50)
    assert decode.step(2.0, token_id=50) == [decode_tokens(stopped)]
    decode.idle()


def test_no_room_is_granted_when_there_is_some() -> None:
    decode = Decode(num_blocks=4)
    running = body("a", 20, max_tokens=3, ignore_eos=True)
    decode.arrive(running)
    request = body("r", 10, max_tokens=3)
    assert decode.reserve(request, 1.0) == []
    assert decode.reserve(request, 1.0) == [], "asked twice"
    report = decode.report()
    assert report.num_backpressured == 1
    assert len(decode.step(2.0)) == 1
    last = decode.step(2.0)
    assert last[1:] == [ToPrefill(P, Granted(T, 2, 10.0))]


def test_preempted_sequences_come_back_before_anything_is_let_in() -> None:
    decode = Decode(num_blocks=4, growth_tokens=1)
    for epoch, name in enumerate(("a", "b"), 1):
        decode.arrive(body(name, 15, max_tokens=17), epoch)
    decode.step()
    [run] = decode(StepWanted())
    assert [c.seq_id for c in run.plan.chunks] == ["a/0"], "b gave its blocks"
    assert decode.pool.num_free == 1
    assert decode.reserve(body("r", 4, max_tokens=3)) == [], "though one block would do"
    decode(StepDone(run_plan(run.plan)))
    report = decode.report()
    assert (report.num_preemptions, report.num_waiting, report.num_running) == (1, 1, 1)
    assert decode.tell(Abort("b", 0)) == [ToPrefill(P, Granted(T, 3, 10.0))]


def test_a_nack_voids_what_came_and_the_resend_is_taken() -> None:
    decode = Decode()
    request = body("r", 10)
    decode.reserve(request)
    [nack] = decode.frame(frame(request, 1), crc=CRC + 1)
    assert isinstance(nack.message, TransferNack)
    assert (nack.message.dead_epoch, nack.message.epoch) == (1, 2)
    assert decode.frame(frame(request, 1)) == []
    assert len(decode.frame(frame(request, 2))) == 1
    assert decode(end(request, 2, 42)) == [ToPrefill(P, TransferAck(T, 2))]


@pytest.mark.parametrize(("token_id", "max_tokens"), [(VOCAB_SIZE, 4), (5, 1)])
def test_a_drawn_token_that_nothing_can_follow_fails_the_request(
    token_id: int, max_tokens: int
) -> None:
    decode = Decode()
    request = body("r", 10, max_tokens=max_tokens)
    decode.reserve(request)
    decode.frame(frame(request, 1))
    reason = f"the prefill side drew {token_id}, which nothing can follow"
    assert decode(end(request, 1, token_id)) == [
        ToPrefill(P, TransferAck(T, 1)),
        failed("transfer_failed", reason, True),
    ]
    decode.idle()
    assert decode(StepWanted()) == []


def test_what_never_fits_is_denied_and_leaves_nothing_behind() -> None:
    decode = Decode(num_blocks=2)
    [denied] = decode.reserve(body("r", 10, max_tokens=8))
    assert denied.message.code == "invalid_request"
    [denied] = decode.prefill(Reserve(T, "feed", body("r", 4)))
    assert denied.message.code == "incompatible_peer"
    [denied] = decode.prefill(Reserve("x/0", LAYOUT.fingerprint(1), body("r", 4)))
    assert denied.message.message == "the transfer id does not belong to the request"
    decode.idle()
    assert decode.reserve(body("r", 4)) == [ToPrefill(P, Granted(T, 1, 10.0))]


def test_a_lease_that_runs_out_is_told_to_both_and_fenced() -> None:
    decode = Decode()
    request = body("r", 10)
    decode.reserve(request)
    decode.tell(RouterAlive(1), 10.0)
    denied = Denied(T, "transfer_failed", "the prefill side was silent for 10.0 s", True)
    assert decode(Tick(), 10.5) == [ToPrefill(P, denied)]
    assert decode.frame(frame(request, 1), 11.0) == []
    assert decode(end(request, 1, 42), 11.0) == []
    dropped = Denied(T, "transfer_failed", "the decode side has dropped it", True)
    assert decode.prefill(LeaseRenew((T,)), 11.0) == [ToPrefill(P, dropped)]
    decode.idle()


def test_abort_is_idempotent_and_reaches_every_state() -> None:
    request = body("r", 10)
    reserved, running, in_flight = Decode(), Decode(), Decode()
    reserved.reserve(request)
    running.arrive(request)
    in_flight.arrive(request)
    in_flight(StepWanted())
    for decode in (reserved, running, in_flight):
        assert decode.tell(Abort("r", 0)) == []
        assert decode.tell(Abort("r", 0)) == []
        assert decode.decider.num_open == 0
    assert in_flight.pool.num_free < 16, "the engine may be writing still"
    assert in_flight(StepDone(StepResult(1, (SampledToken(T, 3),), 0.0))) == []
    for decode in (reserved, running, in_flight):
        decode.idle()
    assert running.prefill(TransferCancel(T)) == []


def test_a_cancelled_reservation_makes_room_for_the_next() -> None:
    decode = Decode(num_blocks=2)
    decode.reserve(body("r", 10, max_tokens=2))
    assert decode.reserve(body("s", 10, max_tokens=2)) == []
    assert decode.prefill(TransferCancel(T)) == [ToPrefill(P, Granted("s/0", 2, 10.0))]


def test_a_step_that_raises_costs_its_own_requests() -> None:
    decode = Decode(max_num_batched_tokens=1)
    decode.arrive(body("r", 10))
    decode.arrive(body("s", 10), 2)
    decode(StepWanted())
    assert decode(StepRaised("boom")) == [failed("internal", "boom", True, suspect="d-0")]
    [batch] = decode.step()
    assert [i.request_id for i in batch.message.items] == ["s"]
    decode.tell(Abort("s", 0))
    decode.idle()


def test_the_deadline_and_a_silent_router_end_requests() -> None:
    decode = Decode()
    decode.arrive(body("r", 10, deadline_in_s=5.0))
    decode.arrive(body("s", 10), 2)
    decode.reserve(body("w", 10), 0.0)
    late = failed("deadline_exceeded", "the deadline passed in the decode worker", False)
    assert decode(Tick(), 5.1) == [late]
    assert decode(Tick(), 9.9) == []
    assert decode.decider.num_open == 2
    [denied] = [i for i in decode(Tick(), 10.1) if isinstance(i, ToPrefill)]
    assert denied.message.transfer_id == "w/0"
    assert decode.decider.num_open == 0
    decode.idle()


def test_a_dispatch_or_reserve_said_twice_runs_once() -> None:
    mixed = Decode("mixed")
    request = body("r", 10)
    mixed.tell(Dispatch(request, None))
    mixed.tell(Dispatch(request, None))
    assert mixed.decider.num_open == 1
    decode = Decode()
    decode.arrive(request)
    assert decode.reserve(request) == []
    assert decode.decider.num_open == 1


def test_one_batch_a_step_and_tokens_until_they_are_acknowledged() -> None:
    decode = Decode()
    decode.arrive(body("r", 10, max_tokens=3))
    decode.arrive(body("s", 10, max_tokens=3), 2)
    [batch] = decode.step(1.0)
    assert [(i.request_id, i.seq) for i in batch.message.items] == [("r", 1), ("s", 1)]
    [resent] = decode(Tick(), 2.1)
    assert resent == batch
    decode.tell(ack(2), 2.2)
    [resent] = decode(Tick(), 3.3)
    assert [i.request_id for i in resent.message.items] == ["s"]


def test_what_was_received_is_cached_for_whoever_comes_next() -> None:
    """Choices of one prompt hold its full blocks once, however often they crossed."""
    decode = Decode(num_blocks=16, growth_tokens=1)
    for epoch, name in enumerate(("r", "s"), 1):
        decode.arrive(body(name, 20, max_tokens=8), epoch)
    report = decode.report()
    assert report.num_blocks - report.num_free_blocks == 2 + 1 + 1
    decode.tell(Dispatch(body("t", 20, max_tokens=8), None))
    [run] = decode(StepWanted())
    chunks = {c.seq_id: c for c in run.plan.chunks}
    assert (chunks["t/0"].start, len(chunks["t/0"].token_ids)) == (16, 4)
    assert len({chunk.block_table[:2] for chunk in chunks.values()}) == 1
    decode(StepDone(run_plan(run.plan)))
    report = decode.report()
    assert (report.num_cache_queried_tokens, report.num_cache_hit_tokens) == (20, 16)
    for name in ("r", "s", "t"):
        decode.tell(Abort(name, 0))
    decode.idle()


def arrive_short(decode: Decode, request: RequestBody, num_tokens: int) -> None:
    """A hand-over of KV version 2 that ends behind so many tokens."""
    transfer, newest = transfer_of(request), LAYOUT.fingerprint()
    ask = Reserve(transfer, LAYOUT.fingerprint(1), request, KV_VERSION, newest)
    [granted] = decode.prefill(ask)
    epoch = granted.message.epoch
    if num_tokens:
        size = LAYOUT.num_layers * num_tokens * ROW_BYTES
        change = {"num_tokens": num_tokens, "num_bytes": size, "fingerprint": newest}
        decode.frame(frame(request, epoch, version=2, **change))
    said = TransferEnd(transfer, epoch, int(num_tokens > 0), num_tokens, (42,), 2)
    decode(EndArrived(msgspec.structs.replace(said, checksum=end_checksum(said))))


@pytest.mark.parametrize("num_came", [0, 1, 8, 9])
def test_what_did_not_come_is_computed_here_and_nothing_is_drawn_twice(num_came: int) -> None:
    decode = Decode(max_num_batched_tokens=4)
    request = body("r", 10, max_tokens=3, ignore_eos=True)
    arrive_short(decode, request, num_came)
    tokens = (*request.prompt_ids, 42)
    items: list[TokenItem] = []
    for start in range(num_came, 11, 4):
        [run] = decode(StepWanted(), 1.0)
        [chunk] = run.plan.chunks
        stop = min(start + 4, 11)
        assert (chunk.start, chunk.token_ids) == (start, tokens[start:stop])
        assert chunk.samples == (stop == 11)
        said = decode(StepDone(run_plan(run.plan)), 1.0)
        items += [item for i in said for item in i.message.items]
    [item] = items
    assert (item.seq, len(item.token_ids)) == (1, 1)
    assert item.hop is not None
    assert item.hop.recomputed_tokens == 10 - num_came
    assert decode.step()
    decode.tell(ack(3))
    decode.idle()


def test_a_short_hand_over_beside_decodes_stays_within_the_budget() -> None:
    decode = Decode(max_num_batched_tokens=4, num_blocks=16)
    decode.arrive(body("a", 4, max_tokens=9, ignore_eos=True))
    arrive_short(decode, body("r", 10, max_tokens=3, ignore_eos=True), 0)
    [run] = decode(StepWanted(), 1.0)
    assert [(c.seq_id, len(c.token_ids)) for c in run.plan.chunks] == [("a/0", 1), ("r/0", 3)]
