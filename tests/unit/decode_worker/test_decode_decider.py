"""``assert decider.handle(event, now) == [instructions]`` along the ways of a request."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from baton.engine.block_pool import BlockPool
from baton.engine.plan import SampledToken, SequenceChunk, StepPlan, StepResult
from baton.engine.scheduler import Scheduler
from baton.protocol.messages import (
    Abort,
    Denied,
    Dispatch,
    Granted,
    HopTimes,
    KvFrame,
    LeaseRenew,
    RequestBody,
    RequestFailed,
    Reserve,
    RouterAlive,
    TokenAck,
    TokenAckItem,
    TokenBatch,
    TokenItem,
    TransferAck,
    TransferCancel,
    TransferEnd,
    TransferNack,
)
from baton.worker.events import (
    FromPeer,
    RunStep,
    ShellFacts,
    StepDone,
    StepRaised,
    StepWanted,
    Tick,
    ToRouter,
)
from decode_worker.decider import DecodeDecider, EndArrived, FrameArrived
from kv_transfer.frames import RAW
from kv_transfer.instructions import ToPrefill, WriteKv
from kv_transfer.receiver import Receiver
from tests.support.core import (
    EOS_ID,
    LAYOUT,
    ROW_BYTES,
    VOCAB_SIZE,
    body,
    engine_config,
    run_plan,
    transfer_config,
)

T = "r/0"
P = "p-0|1"
CRC = 7


class Decode:
    def __init__(self, role: str = "decode", **engine: Any) -> None:
        config = engine_config(**engine)
        self.pool = BlockPool(config.num_blocks, config.block_size)
        scheduler = Scheduler(self.pool, config, frozenset([EOS_ID]))
        receiver = Receiver(self.pool, LAYOUT, config, transfer_config())
        self.decider = DecodeDecider(
            "d-0", "inc-d", role, config, self.pool, scheduler, receiver, VOCAB_SIZE
        )

    def __call__(self, event: object, now: float = 0.0) -> list[Any]:
        return self.decider.handle(event, now)

    def router(self, message: Any, now: float = 0.0) -> list[Any]:
        return self(FromPeer("router-0|1", "router-0", "router", message), now)

    def prefill(self, message: Any, now: float = 0.0) -> list[Any]:
        return self(FromPeer(P, "p-0", "prefill", message), now)

    def reserve(self, request: RequestBody, now: float = 0.0) -> list[Any]:
        transfer = f"{request.request_id}/{request.attempt}"
        return self.prefill(Reserve(transfer, LAYOUT.fingerprint(), request), now)

    def frame(self, frame: KvFrame, now: float = 0.0, crc: int = CRC) -> list[Any]:
        return self(FrameArrived(frame, frame.num_bytes, crc), now)

    def step(self, now: float = 0.0, token_id: int | None = None) -> list[Any]:
        [run] = self(StepWanted(), now)
        result = run_plan(run.plan)
        if token_id is not None:
            sampled = tuple(SampledToken(s.seq_id, token_id) for s in result.sampled)
            result = StepResult(result.step, sampled, 0.0)
        return self(StepDone(result), now)

    def idle(self) -> None:
        report = self.decider.report(ShellFacts(0, 0, "", 0))
        assert report.integrity_errors == ()
        assert report.num_free_blocks == report.num_blocks
        assert (report.num_leases, report.num_running, report.num_waiting) == (0, 0, 0)


def frame(request: RequestBody, epoch: int, **change: Any) -> KvFrame:
    transfer = f"{request.request_id}/{request.attempt}"
    count = len(request.prompt_ids) + len(request.output_ids)
    size = 3 * count * ROW_BYTES
    sent = KvFrame(transfer, epoch, LAYOUT.fingerprint(), 0, 0, 3, 0, count, RAW, size, CRC)
    return msgspec.structs.replace(sent, **change)


def end(request: RequestBody, epoch: int, token_id: int) -> EndArrived:
    transfer = f"{request.request_id}/{request.attempt}"
    count = len(request.prompt_ids) + len(request.output_ids)
    return EndArrived(TransferEnd(transfer, epoch, 1, count, (token_id,)))


def arrive(decode: Decode, request: RequestBody, epoch: int = 1, token_id: int = 42) -> None:
    """The whole hand-over, at time 0."""
    transfer = f"{request.request_id}/{request.attempt}"
    granted = [ToPrefill(P, Granted(transfer, epoch, 10.0))]
    assert decode.reserve(request) == granted
    [written] = decode.frame(frame(request, epoch))
    assert isinstance(written, WriteKv)
    assert decode(end(request, epoch, token_id)) == [ToPrefill(P, TransferAck(transfer, epoch))]


def tokens(*items: TokenItem) -> ToRouter:
    return ToRouter("router-0", TokenBatch("d-0", "inc-d", items))


def failed(
    code: str, message: str, retryable: bool, suspect: str = "", hop: str = "decode"
) -> ToRouter:
    return ToRouter("router-0", RequestFailed("r", 0, code, message, retryable, hop, suspect))


def ack(next_seq: int) -> TokenAck:
    return TokenAck((TokenAckItem("r", 0, next_seq),))


def test_a_hand_over_is_granted_written_committed_and_decoded() -> None:
    decode = Decode()
    request = body("r", 10, max_tokens=3)
    assert decode.reserve(request, 1.0) == [ToPrefill(P, Granted(T, 1, 10.0))]
    whole = frame(request, 1)
    assert decode.frame(whole, 2.0) == [WriteKv(whole, (0, 1))]
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
    )
    step = StepResult(1, (SampledToken(T, 43),), 0.0)
    assert decode(StepDone(step), 4.5) == [tokens(TokenItem("r", 0, 1, (43,), hop=hop))]
    last = TokenItem("r", 0, 2, (44,), finish_reason="length")
    assert decode.step(5.0, token_id=44) == [tokens(last)]
    decode.router(ack(3))
    assert decode.decider.num_open == 0
    decode.idle()


def test_both_phases_here() -> None:
    decode = Decode("mixed")
    request = body("r", 4, max_tokens=2, stop_token_ids=(50,))
    assert decode.router(Dispatch(request, None), 1.0) == []
    hop = HopTimes(num_chunks=1)
    assert decode.step(1.0, token_id=9) == [tokens(TokenItem("r", 0, 0, (9,), hop=hop))]
    stopped = TokenItem("r", 0, 1, (50,), finish_reason="stop", stop_token_id=50)
    assert decode.step(2.0, token_id=50) == [tokens(stopped)]
    decode.idle()


def test_no_room_is_granted_when_there_is_some() -> None:
    decode = Decode(num_blocks=4)
    running = body("a", 20, max_tokens=3, ignore_eos=True)
    arrive(decode, running)
    request = body("r", 10, max_tokens=3)
    assert decode.reserve(request, 1.0) == []
    assert decode.reserve(request, 1.0) == [], "asked twice"
    report = decode.decider.report(ShellFacts(0, 0, "", 0))
    assert report.num_backpressured == 1
    assert len(decode.step(2.0)) == 1
    last = decode.step(2.0)
    assert last[1:] == [ToPrefill(P, Granted(T, 2, 10.0))]


def test_preempted_sequences_come_back_before_anything_is_let_in() -> None:
    decode = Decode(num_blocks=4, growth_tokens=1)
    for epoch, name in enumerate(("a", "b"), 1):
        arrive(decode, body(name, 15, max_tokens=17), epoch)
    decode.step()
    [run] = decode(StepWanted())
    assert [c.seq_id for c in run.plan.chunks] == ["a/0"], "b gave its blocks"
    assert decode.pool.num_free == 1
    assert decode.reserve(body("r", 4, max_tokens=3)) == [], "though one block would do"
    decode(StepDone(run_plan(run.plan)))
    report = decode.decider.report(ShellFacts(0, 0, "", 0))
    assert (report.num_preemptions, report.num_waiting, report.num_running) == (1, 1, 1)
    assert decode.router(Abort("b", 0)) == [ToPrefill(P, Granted(T, 3, 10.0))]


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
    [denied] = decode.prefill(Reserve("x/0", LAYOUT.fingerprint(), body("r", 4)))
    assert denied.message.message == "the transfer id does not belong to the request"
    decode.idle()
    assert decode.reserve(body("r", 4)) == [ToPrefill(P, Granted(T, 1, 10.0))]


def test_a_lease_that_runs_out_is_told_to_both_and_fenced() -> None:
    decode = Decode()
    request = body("r", 10)
    decode.reserve(request)
    decode.router(RouterAlive(1), 10.0)
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
    arrive(running, request)
    arrive(in_flight, request)
    in_flight(StepWanted())
    for decode in (reserved, running, in_flight):
        assert decode.router(Abort("r", 0)) == []
        assert decode.router(Abort("r", 0)) == []
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
    arrive(decode, body("r", 10))
    arrive(decode, body("s", 10), 2)
    decode(StepWanted())
    assert decode(StepRaised("boom")) == [failed("internal", "boom", True, "d-0")]
    [batch] = decode.step()
    assert [i.request_id for i in batch.message.items] == ["s"]
    decode.router(Abort("s", 0))
    decode.idle()


def test_the_deadline_and_a_silent_router_end_requests() -> None:
    decode = Decode()
    arrive(decode, body("r", 10, deadline_in_s=5.0))
    arrive(decode, body("s", 10), 2)
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
    mixed.router(Dispatch(request, None))
    mixed.router(Dispatch(request, None))
    assert mixed.decider.num_open == 1
    decode = Decode()
    arrive(decode, request)
    assert decode.reserve(request) == []
    assert decode.decider.num_open == 1


def test_one_batch_a_step_and_tokens_until_they_are_acknowledged() -> None:
    decode = Decode()
    arrive(decode, body("r", 10, max_tokens=3))
    arrive(decode, body("s", 10, max_tokens=3), 2)
    [batch] = decode.step(1.0)
    assert [(i.request_id, i.seq) for i in batch.message.items] == [("r", 1), ("s", 1)]
    [resent] = decode(Tick(), 2.1)
    assert resent == batch
    decode.router(ack(2), 2.2)
    [resent] = decode(Tick(), 3.3)
    assert [i.request_id for i in resent.message.items] == ["s"]


def test_what_was_received_is_cached_for_whoever_comes_next() -> None:
    """Choices of one prompt hold its full blocks once, however often they crossed."""
    decode = Decode(num_blocks=16, growth_tokens=1)
    for epoch, name in enumerate(("r", "s"), 1):
        arrive(decode, body(name, 20, max_tokens=8), epoch)
    report = decode.decider.report(ShellFacts(0, 0, "", 0))
    assert report.num_blocks - report.num_free_blocks == 2 + 1 + 1
    decode.router(Dispatch(body("t", 20, max_tokens=8), None))
    [run] = decode(StepWanted())
    chunks = {c.seq_id: c for c in run.plan.chunks}
    assert (chunks["t/0"].start, len(chunks["t/0"].token_ids)) == (16, 4)
    assert len({chunk.block_table[:2] for chunk in chunks.values()}) == 1
    decode(StepDone(run_plan(run.plan)))
    report = decode.decider.report(ShellFacts(0, 0, "", 0))
    assert (report.num_cache_queried_tokens, report.num_cache_hit_tokens) == (20, 16)
    for name in ("r", "s", "t"):
        decode.router(Abort(name, 0))
    decode.idle()
