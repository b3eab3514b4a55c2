"""Whatever well-typed message comes, and whenever: a worker answers or ignores it.

A peer of another version, or one gone mad, may cost its own requests and never the process.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import msgspec
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from baton.engine.plan import FailedSequence, StepPlan
from baton.protocol.messages import (
    Abort,
    Dispatch,
    Granted,
    Message,
    Reserve,
    RouterAlive,
    TransferAck,
    TransferNack,
)
from baton.worker.events import (
    FromPeer,
    RunStep,
    StepDone,
    StepRaised,
    StepWanted,
    Tick,
)
from decode_worker.decider import EndArrived, FrameArrived
from prefill_worker.decider import DecodeRefused, FromDecode
from tests.support.core import (
    DECODE,
    LAYOUT,
    body,
    run_plan,
)
from tests.support.deciders import Decode, Prefill, Worker
from tests.support.message_strategies import messages

SMALL = {"num_blocks": 6, "max_num_batched_tokens": 8}
SETTINGS = settings(
    deadline=None,
    max_examples=200,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
BODIES = st.builds(
    body,
    request_id=st.sampled_from(["r", "s"]),
    prompt=st.just(4) | st.integers(0, 20),
    attempt=st.integers(0, 1),
    max_tokens=st.integers(-1, 6),
    deadline_in_s=st.sampled_from([0.0, 5.0, 600.0]),
)
RESERVES = st.builds(
    lambda request: Reserve(
        f"{request.request_id}/{request.attempt}", LAYOUT.fingerprint(1), request
    ),
    BODIES,
)
SANE = (
    st.builds(Dispatch, BODIES, st.none() | st.just(DECODE))
    | RESERVES
    | st.builds(Abort, st.sampled_from(["r", "s"]), st.integers(0, 2**62))
    | st.builds(RouterAlive, st.just(1))
)
TRANSFERS = st.sampled_from(["r/0", "r/0", "s/0", "r/1"])
EPOCHS = st.integers(0, 3)
ANSWERS = (
    st.builds(Granted, TRANSFERS, EPOCHS, st.just(1.0))
    | st.builds(TransferAck, TRANSFERS, EPOCHS)
    | st.builds(TransferNack, TRANSFERS, EPOCHS, EPOCHS, st.just("?"))
)
ENGINE = st.sampled_from(
    [StepWanted(), StepWanted(), Tick(), StepRaised("boom"), "done", "done", "one fails"]
)


def _done(plan: StepPlan, how: str) -> StepDone:
    """Where one fails, its KV is to be doubted."""
    doubtful = plan.chunks[:1] if how == "one fails" else ()
    failed = tuple(FailedSequence(c.seq_id, "internal", "stuck", True) for c in doubtful)
    return StepDone(dataclasses.replace(run_plan(plan), failed=failed))


def run(worker: Worker, events: list[object]) -> None:
    """Feed them as a shell would, then abort all: nothing may be left."""
    plan: StepPlan | None = None
    now = 0.0
    for event in events:
        now += 0.5
        if isinstance(event, StepWanted) and plan is not None:
            continue
        if isinstance(event, str | StepRaised):
            if plan is None:
                continue
            event, plan = (event if isinstance(event, StepRaised) else _done(plan, event)), None
        for instruction in worker(event, now):
            if isinstance(instruction, RunStep):
                plan = instruction.plan
        assert worker.pool.check_integrity() == []
    if plan is not None:
        worker(StepDone(run_plan(plan)), now)
    worker(Tick(), now + 2e9)
    report = worker.report()
    assert report.integrity_errors == ()
    assert worker.pool.num_free == worker.pool.num_blocks


def from_peer(message: Message) -> FromPeer:
    return FromPeer("router-0|1", "router-0", "router", message)  # type: ignore[arg-type]


def from_decode(message: Message) -> FromDecode:
    return FromDecode(DECODE, message)  # type: ignore[arg-type]


@given(
    st.lists(
        ENGINE
        | SANE.map(from_peer)
        | messages().map(from_peer)
        | ANSWERS.map(from_decode)
        | messages().map(from_decode)
        | st.just(DecodeRefused(DECODE, "no")),
        max_size=30,
    )
)
@SETTINGS
def test_a_prefill_worker_survives_any_message(events: list[object]) -> None:
    begun = [from_peer(Dispatch(body("r", 4), DECODE)), StepWanted()]
    run(Prefill(**SMALL), [*begun, *events])


def frame_of(message: Any) -> FrameArrived:
    return FrameArrived(message, message.num_bytes, message.checksum)


def named(kind: str) -> type[Message]:
    return next(k for k in Message.__subclasses__() if k.__name__ == kind)


FRAMES = messages(named("KvFrame")).map(
    lambda f: msgspec.structs.replace(
        f,
        transfer_id="r/0",
        epoch=f.epoch % 4,
        fingerprint=LAYOUT.fingerprint(1),
        index=0,
        layer_start=0,
        num_layers=3,
        token_start=0,
        num_tokens=4,
        codec="raw",
        num_bytes=4 * LAYOUT.bytes_per_token,
        checksum=7,
    )
)
ENDS = messages(named("TransferEnd")).map(
    lambda e: msgspec.structs.replace(
        e, transfer_id="r/0", epoch=e.epoch % 4, num_frames=1, num_tokens=4
    )
)


@given(
    st.lists(
        ENGINE
        | SANE.map(from_peer)
        | messages().map(from_peer)
        | FRAMES.map(frame_of)
        | ENDS.map(EndArrived)
        | messages(named("KvFrame")).map(frame_of)
        | messages(named("TransferEnd")).map(EndArrived),
        max_size=30,
    ),
    st.sampled_from(["decode", "mixed"]),
)
@SETTINGS
def test_a_decode_worker_survives_any_message(events: list[object], role: str) -> None:
    begun = [from_peer(Reserve("r/0", LAYOUT.fingerprint(1), body("r", 4)))]
    run(Decode(role, **SMALL), [*begun, *events])
