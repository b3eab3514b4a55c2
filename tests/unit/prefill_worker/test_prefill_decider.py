"""``assert decider.handle(event, now) == [instructions]`` along the ways of a request."""

from __future__ import annotations

from functools import partial
from typing import Any

import msgspec

from baton.engine.plan import SampledToken, SequenceChunk, StepPlan, StepResult
from baton.protocol.messages import (
    Abort,
    Dispatch,
    Granted,
    HopTimes,
    KvProgress,
    LeaseRenew,
    RequestBody,
    Reserve,
    RouterAlive,
    TokenItem,
    TransferAck,
    TransferCancel,
    TransferEnd,
    TransferNack,
    WorkerRef,
)
from baton.worker.events import (
    LayersDone,
    RunStep,
    StepDone,
    StepRaised,
    StepWanted,
    Tick,
)
from kv_transfer.frames import KV_VERSION, RAW
from kv_transfer.instructions import CancelPush, PushEnd, PushKv, ToDecode
from prefill_worker.decider import DecodeRefused
from tests.support.core import (
    DECODE,
    EOS_ID,
    LAYOUT,
    VOCAB_SIZE,
    body,
)
from tests.support.deciders import Prefill, ack, failure, prefill_tokens

T = "r/0"
CANCELLED = [ToDecode(DECODE, TransferCancel(T)), CancelPush(T)]


failed = partial(failure, "prefill")


def dispatch(request: RequestBody, decode: WorkerRef | None = DECODE) -> Dispatch:
    return Dispatch(request, decode)


def reserve(request: RequestBody) -> ToDecode:
    fingerprints = LAYOUT.fingerprint(1), LAYOUT.fingerprint()
    return ToDecode(DECODE, Reserve(T, fingerprints[0], request, KV_VERSION, fingerprints[1]))


def parked(prefill: Prefill, request: RequestBody) -> None:
    prefill.tell(dispatch(request))
    prefill.step()


def push(
    first: int,
    table: tuple[int, ...],
    start: int,
    count: int,
    total: int = 20,
    layers: range = range(3),
) -> PushKv:
    return PushKv(DECODE, T, 7, first, table, start, count, total, layers, codecs=(RAW,))


def test_the_first_token_goes_to_the_router_and_the_kv_to_the_decode_worker() -> None:
    prefill = Prefill()
    request = body("r", 20, max_tokens=4)
    assert prefill.tell(dispatch(request), 1.0) == []
    chunk = SequenceChunk(T, tuple(range(16)), 0, (0, 1), False, request.sampling)
    later = msgspec.structs.replace(request, deadline_in_s=599.0)
    assert prefill(StepWanted(), 2.0) == [RunStep(StepPlan(1, (chunk,))), reserve(later)]
    assert prefill(StepDone(StepResult(1, (), 0.1)), 3.0) == []
    granted = prefill.answer(Granted(T, 7, 10.0), 3.0)
    assert granted == [push(0, (0, 1), 0, 16)]
    rest = SequenceChunk(T, (16, 17, 18, 19), 16, (0, 1, 2), True, request.sampling)
    assert prefill(StepWanted(), 3.0) == [RunStep(StepPlan(2, (rest,)))]
    hop = HopTimes(queued_s=1.0, prefill_s=2.0, num_chunks=2)
    assert prefill(StepDone(StepResult(2, (SampledToken(T, 42),), 0.1)), 4.0) == [
        prefill_tokens(TokenItem("r", 0, 0, (42,), hop=hop)),
        push(1, (0, 1, 2), 16, 4),
        PushEnd(DECODE, TransferEnd(T, 7, 2, 20, (42,)), 4.0),
    ]
    assert prefill.tell(ack(1), 4.0) == []
    assert prefill.decider.num_open == 1, "the KV is not acknowledged"
    assert prefill.answer(TransferAck(T, 7), 5.0) == [CancelPush(T, is_committed=True)]
    assert prefill.decider.num_open == 0
    prefill.idle()


def test_an_end_at_the_first_token_cancels_the_reservation() -> None:
    prefill = Prefill()
    request = body("r", 4, max_tokens=4)
    prefill.tell(dispatch(request))
    hop = HopTimes(num_chunks=1)
    item = TokenItem("r", 0, 0, (EOS_ID,), finish_reason="stop", hop=hop)
    chunk = SequenceChunk(T, (0, 1, 2, 3), 0, (0,), True, request.sampling)
    assert prefill.step(token_id=EOS_ID) == [
        RunStep(StepPlan(1, (chunk,))),
        reserve(request),
        prefill_tokens(item),
        *CANCELLED,
    ]
    prefill.idle()
    assert prefill.answer(Granted(T, 7, 10.0)) == CANCELLED[:1], "the grant crossed it"


def test_one_token_alone_asks_for_no_room() -> None:
    for request, seq in ((body("r", 4, max_tokens=1), 0), (body("r", 4, output=(9,) * 3), 3)):
        prefill = Prefill()
        prefill.tell(dispatch(request))
        [run, batch] = prefill.step(token_id=5)
        assert isinstance(run, RunStep)
        item = TokenItem("r", 0, seq, (5,), finish_reason="length", hop=HopTimes(num_chunks=1))
        assert batch == prefill_tokens(item)
        prefill.idle()


def test_parked_then_granted() -> None:
    prefill = Prefill()
    parked(prefill, body("r", 12))
    report = prefill.report()
    assert (report.num_parked, report.num_free_blocks) == (1, 14)
    pushed = prefill.answer(Granted(T, 3, 10.0), 9.0)
    assert [type(i) for i in pushed] == [PushKv, PushEnd]
    prefill.answer(TransferAck(T, 3))
    prefill.idle()


def test_a_nack_sends_again_and_too_many_fail_the_request() -> None:
    prefill = Prefill()
    parked(prefill, body("r", 12))
    prefill.answer(Granted(T, 3, 10.0))
    for dead in (3, 4):
        cancel, push, end = prefill.answer(TransferNack(T, dead, dead + 1, "checksum"))
        assert (cancel, push.epoch, push.first_index) == (CancelPush(T), dead + 1, 0)
        assert end.end.epoch == dead + 1
    suspect = failure("transfer", "transfer_failed", "checksum; sent 3 times", True, suspect="d-0")
    assert prefill.answer(TransferNack(T, 5, 6, "checksum")) == [*CANCELLED, suspect]
    prefill.idle()


def test_a_refused_decode_worker_fails_the_request_at_once() -> None:
    prefill = Prefill()
    prefill.tell(dispatch(body("r", 12)))
    prefill(StepWanted())
    assert prefill(DecodeRefused(DECODE, "version")) == [
        CancelPush(T),
        failure("transfer", "incompatible_peer", "version", True, suspect="d-0"),
    ]
    assert prefill.pool.num_free == 14, "the engine may be writing still"
    chunk_done = StepResult(1, (SampledToken(T, 3),), 0.0)
    assert prefill(StepDone(chunk_done)) == []
    prefill.idle()


def test_a_dispatch_said_twice_runs_once() -> None:
    prefill = Prefill()
    request = body("r", 4)
    prefill.tell(dispatch(request))
    assert prefill.tell(dispatch(request)) == []
    prefill.step()
    assert prefill.tell(dispatch(request)) == [], "nor while its KV is on its way"
    assert prefill(StepWanted()) == []


def test_abort_is_idempotent_and_reaches_every_state() -> None:
    for num_steps in (0, 1, 2):
        prefill = Prefill()
        prefill.tell(dispatch(body("r", 20)))
        for _ in range(num_steps):
            prefill.step()
        said = prefill.tell(Abort("r", 0))
        assert said == (CANCELLED if num_steps else [])
        assert prefill.tell(Abort("r", 0)) == []
        assert prefill.decider.num_open == 0
        prefill.idle()


def test_abort_in_flight_frees_when_the_step_is_done() -> None:
    prefill = Prefill()
    prefill.tell(dispatch(body("r", 4)))
    prefill(StepWanted())
    assert prefill.tell(Abort("r", 0)) == CANCELLED
    assert prefill.pool.num_free == 15
    assert prefill(StepDone(StepResult(1, (SampledToken(T, 3),), 0.0))) == []
    prefill.idle()


def test_abort_spares_a_newer_attempt() -> None:
    prefill = Prefill()
    prefill.tell(dispatch(body("r", 4, attempt=1)))
    assert prefill.tell(Abort("r", 0)) == []
    assert prefill.decider.num_open == 1
    assert prefill.tell(Abort("r", 2**62)) == []
    assert prefill.decider.num_open == 0


def test_the_deadline_ends_a_request_in_every_state() -> None:
    message = "the deadline passed in the prefill worker"
    late = failed("deadline_exceeded", message, False)
    for num_steps in (0, 1, 2):
        prefill = Prefill()
        prefill.tell(dispatch(body("r", 20, deadline_in_s=5.0)))
        for _ in range(num_steps):
            prefill.step()
        prefill.tell(ack(1))
        prefill.tell(RouterAlive(1), 5.0)
        before = prefill(Tick(), 5.0)
        assert before == ([ToDecode(DECODE, LeaseRenew((T,)))] if num_steps else [])
        assert prefill(Tick(), 5.1) == [*(CANCELLED if num_steps else []), late]
        assert prefill(Tick(), 5.2) == []
        prefill.idle()


def test_the_requests_of_a_silent_router_are_dropped() -> None:
    prefill = Prefill()
    prefill.tell(dispatch(body("r", 20)))
    prefill.tell(dispatch(body("s", 4, router_id="router-1")))
    prefill.tell(RouterAlive(1), 5.0)
    assert prefill(Tick(), 10.1) == []
    assert prefill.decider.num_open == 1
    assert prefill(Tick(), 15.1) == []
    assert prefill.decider.num_open == 0
    prefill.idle()


def test_a_step_that_raises_costs_its_own_requests() -> None:
    prefill = Prefill(max_num_batched_tokens=16)
    first, second = body("r", 16), body("s", 8)
    prefill.tell(dispatch(first))
    prefill.tell(dispatch(second))
    prefill(StepWanted())
    assert prefill(StepRaised("boom")) == [
        *CANCELLED,
        failed("internal", "boom", True, suspect="p-0"),
    ]
    [run, _, batch] = prefill.step()
    assert [c.seq_id for c in run.plan.chunks] == ["s/0"]
    assert batch.message.items[0].request_id == "s"
    prefill.tell(Abort("s", 0))
    prefill.idle()


def test_what_cannot_run_is_refused_with_the_reason() -> None:
    prefill = Prefill(num_blocks=2)
    for request, reason in (
        (body("r", 17), "KV of 17 tokens never fits into the pool's 16"),
        (body("r", ()), "the prompt has no tokens"),
        (body("r", (VOCAB_SIZE,)), "token ids must be below the vocabulary's 1000"),
        (body("r", 2, output=(1, 2), max_tokens=2), "2 tokens are there already"),
    ):
        [refused] = prefill.tell(dispatch(request))
        assert refused.message.code == "invalid_request"
        assert refused.message.message.startswith(reason)
        assert not refused.message.retryable
    [refused] = prefill.tell(dispatch(body("r", 4), None))
    assert refused.message.code == "internal"
    prefill.idle()


def test_a_token_that_was_not_acknowledged_is_sent_again_after_the_request() -> None:
    prefill = Prefill()
    prefill.tell(dispatch(body("r", 4, max_tokens=1)))
    [_, batch] = prefill.step(1.0)
    assert prefill.decider.num_open == 1
    assert prefill(Tick(), 1.5) == []
    assert prefill(Tick(), 2.5) == [batch]
    prefill.tell(ack(1), 2.5)
    assert prefill(Tick(), 9.0) == []
    assert prefill.decider.num_open == 0


def test_a_prompt_stays_cached_once_its_transfer_has_ended() -> None:
    """The second of the same computes its last block alone, and all its KV is sent."""
    prefill = Prefill(max_num_batched_tokens=32)
    parked(prefill, body("r", 20))
    prefill.answer(Granted(T, 3, 10.0))
    prefill.answer(TransferAck(T, 3))
    prefill.idle()
    again = body("again", 20)
    prefill.tell(dispatch(again))
    [run, *_] = prefill.step()
    assert [(c.start, len(c.token_ids)) for c in run.plan.chunks] == [(16, 4)]
    [push, _] = prefill.answer(Granted("again/0", 4, 10.0))
    assert isinstance(push, PushKv)
    assert (push.token_start, push.num_tokens) == (0, 20)
    report = prefill.report()
    assert (report.num_cache_queried_tokens, report.num_cache_hit_tokens) == (40, 16)
    prefill.answer(TransferAck("again/0", 4))
    prefill.idle()


def test_tenants_are_kept_apart() -> None:
    prefill = Prefill(max_num_batched_tokens=32)
    for name in ("a", "b"):
        request = msgspec.structs.replace(body(name, 20, max_tokens=1), tenant=name)
        prefill.tell(dispatch(request))
        [run, *_] = prefill.step()
        assert [c.start for c in run.plan.chunks] == [0]
    prefill.idle()


def places(instructions: list[Any]) -> list[tuple[range, int, int]]:
    """(layers, first token, number of tokens) of each push."""
    pushes = [i for i in instructions if isinstance(i, PushKv)]
    return [(p.layers, p.token_start, p.num_tokens) for p in pushes]


def test_a_prompt_on_its_way_through_the_layers_is_sent_group_by_group() -> None:
    prefill = Prefill(prefill_mode="layered", max_num_batched_tokens=16)
    prefill.tell(dispatch(body("r", 40)))
    for layer in range(3):
        [run, *_] = stepped = prefill.step()
        assert [(c.layer_start, c.num_layers) for c in run.plan.chunks] == [(layer, 1)]
        sent = places([*stepped, *prefill.answer(Granted(T, 3, 10.0))])
        assert sent == [(range(layer, layer + 1), 0, 40)]
    prefill.answer(TransferAck(T, 3))
    prefill.idle()


def streaming(num_tokens: int, bytes_per_s: float) -> Prefill:
    """Its first step, of 16 tokens, took a second; KV moves at that rate."""
    prefill = Prefill(num_blocks=32)
    prefill.tell(dispatch(body("r", num_tokens)), 0.0)
    prefill(StepWanted(), 0.0)
    prefill.answer(Granted(T, 7, 10.0), 0.0)
    assert places(prefill(StepDone(StepResult(1, (), 1.0)), 1.0)) == [(range(3), 0, 16)]
    size = 16 * LAYOUT.bytes_per_token
    prefill.answer(KvProgress(T, 7, 1, size, 0.0), 1.0 + size / bytes_per_s)
    return prefill


def test_the_last_chunk_goes_layer_after_layer_where_the_link_is_slow() -> None:
    rate = 8 * LAYOUT.bytes_per_token
    prefill = streaming(32, bytes_per_s=rate)
    [run, *others] = prefill(StepWanted(), 3.0)
    assert run.layer_marks == (1, 2)
    assert others == []
    table = run.plan.chunks[0].block_table
    first = [push(1, table, 16, 16, total=32, layers=range(1))]
    assert prefill(LayersDone(2, 1), 3.3) == first
    assert places(prefill(LayersDone(2, 2), 3.6)) == [(range(1, 2), 16, 16)]
    result = StepResult(2, (SampledToken(T, 42),), 1.0)
    assert places(prefill(StepDone(result), 4.0)) == [(range(2, 3), 16, 16)]
    prefill.answer(TransferAck(T, 7), 5.0)
    prefill.tell(ack(1), 5.0)
    prefill.idle()


def test_what_a_fast_link_moves_in_no_time_goes_whole() -> None:
    prefill = streaming(32, bytes_per_s=1e6 * LAYOUT.bytes_per_token)
    [run, *_] = prefill(StepWanted(), 3.0)
    assert run.layer_marks == ()


def test_a_chunk_that_the_next_step_hides_goes_whole() -> None:
    prefill = streaming(48, bytes_per_s=40 * LAYOUT.bytes_per_token)
    [run, *_] = prefill(StepWanted(), 3.0)
    assert run.layer_marks == ()


def test_a_chunk_that_the_next_step_would_not_hide_goes_layer_after_layer() -> None:
    """Or the link would stand idle under the first chunk, and be late by as much at the end."""
    prefill = streaming(48, bytes_per_s=16 * LAYOUT.bytes_per_token)
    [run, *_] = prefill(StepWanted(), 3.0)
    assert run.layer_marks == (1, 2)


def test_layers_of_a_step_that_is_over_or_of_a_prompt_that_is_gone_are_nothing() -> None:
    prefill = streaming(32, bytes_per_s=8 * LAYOUT.bytes_per_token)
    assert prefill(LayersDone(1, 1), 3.0) == []
    prefill(StepWanted(), 3.0)
    prefill.tell(Abort("r", 0), 3.1)
    assert prefill(LayersDone(2, 1), 3.2) == []
    prefill(StepDone(StepResult(2, (SampledToken(T, 42),), 1.0)), 4.0)
    prefill.idle()


def test_layers_are_told_of_only_where_they_can_be_read() -> None:
    prefill = streaming(32, bytes_per_s=8 * LAYOUT.bytes_per_token)
    prefill.decider._rows._is_layer_wise = False
    [run, *_] = prefill(StepWanted(), 3.0)
    assert run.layer_marks == ()


def test_a_cached_prefix_goes_while_the_rest_is_computed() -> None:
    prefill = Prefill()
    prefill.tell(dispatch(body("a", 20, max_tokens=1)))
    prefill.step()
    prefill.step()
    prefill.tell(dispatch(body("r", 20)))
    [run, *_] = prefill(StepWanted(), 0.0)
    assert run.plan.chunks[0].start == 16
    assert places(prefill.answer(Granted(T, 7, 10.0))) == [(range(3), 0, 16)]
