"""The deciders of both kinds of worker, with everything around them but a shell."""

from __future__ import annotations

from typing import Any

import msgspec

from baton.engine.block_pool import BlockPool
from baton.engine.plan import SampledToken, StepResult
from baton.engine.scheduler import Scheduler
from baton.protocol.config import EngineConfig
from baton.protocol.messages import (
    Granted,
    KvFrame,
    LoadReport,
    RequestBody,
    RequestFailed,
    Reserve,
    TokenAck,
    TokenAckItem,
    TokenBatch,
    TokenItem,
    TransferAck,
    TransferEnd,
)
from baton.worker.events import (
    Decider,
    FromPeer,
    RunStep,
    ShellFacts,
    StepDone,
    StepWanted,
    ToRouter,
)
from decode_worker.decider import DecodeDecider, EndArrived, FrameArrived, KvWritten
from kv_transfer.frames import RAW
from kv_transfer.instructions import ToPrefill, WriteKv
from kv_transfer.receiver import Receiver
from kv_transfer.sender import Sender
from prefill_worker.decider import FromDecode, PrefillDecider
from tests.support.core import (
    DECODE,
    EOS_ID,
    LAYOUT,
    ROW_BYTES,
    VOCAB_SIZE,
    engine_config,
    run_plan,
    transfer_config,
)

PREFILL_PEER = "p-0|1"
CRC = 7


class Worker:
    """Called with an event, it answers with the decider's instructions."""

    decider: Decider

    def __init__(self, config: EngineConfig) -> None:
        self.pool = BlockPool(config.num_blocks, config.block_size)
        self.scheduler = Scheduler(
            self.pool, config, frozenset([EOS_ID]), num_layers=LAYOUT.num_layers
        )

    def __call__(self, event: object, now: float = 0.0) -> list[Any]:
        return self.decider.handle(event, now)

    def tell(self, message: Any, now: float = 0.0) -> list[Any]:
        """From the router."""
        return self(FromPeer("router-0|1", "router-0", "router", message), now)

    def step(self, now: float = 0.0, token_id: int | None = None) -> list[Any]:
        """Schedule and complete; what came of both. token_id: drawn in place of the engine's."""
        first = self(StepWanted(), now)
        [plan] = [i.plan for i in first if isinstance(i, RunStep)]
        result = run_plan(plan)
        if token_id is not None:
            sampled = tuple(SampledToken(s.seq_id, token_id) for s in result.sampled)
            result = StepResult(result.step, sampled, 0.0)
        return [*first, *self(StepDone(result), now)]

    def report(self) -> LoadReport:
        return self.decider.report(ShellFacts(0, 0, "", 0))

    def idle(self) -> None:
        """Nothing is left, and the worker says so itself."""
        report = self.report()
        assert report.integrity_errors == ()
        assert report.num_free_blocks == report.num_blocks
        assert (report.num_transfers, report.num_leases) == (0, 0)
        assert (report.num_running, report.num_waiting) == (0, 0)


class Prefill(Worker):
    def __init__(self, **engine: Any) -> None:
        super().__init__(engine_config(**engine))
        sender = Sender(self.pool, LAYOUT, transfer_config())
        self.decider = PrefillDecider("p-0", "inc-p", self.pool, self.scheduler, sender, VOCAB_SIZE)

    def answer(self, message: Any, now: float = 0.0) -> list[Any]:
        """From the decode worker."""
        return self(FromDecode(DECODE, message), now)


class Decode(Worker):
    def __init__(self, role: str = "decode", **engine: Any) -> None:
        config = engine_config(**engine)
        super().__init__(config)
        receiver = Receiver(self.pool, LAYOUT, config, transfer_config())
        self.decider = DecodeDecider(
            "d-0", "inc-d", role, config, self.pool, self.scheduler, receiver, VOCAB_SIZE
        )

    def step(self, now: float = 0.0, token_id: int | None = None) -> list[Any]:
        """What came of it besides the step itself."""
        [_, *others] = super().step(now, token_id)
        return others

    def prefill(self, message: Any, now: float = 0.0) -> list[Any]:
        """From the prefill worker."""
        return self(FromPeer(PREFILL_PEER, "p-0", "prefill", message), now)

    def reserve(self, request: RequestBody, now: float = 0.0) -> list[Any]:
        """As a peer of KV version 1."""
        return self.prefill(Reserve(transfer_of(request), LAYOUT.fingerprint(1), request), now)

    def frame(self, frame: KvFrame, now: float = 0.0, crc: int = CRC) -> list[Any]:
        """What is let in is written at once."""
        said = self(FrameArrived(frame, frame.num_bytes, crc, "zeromq"), now)
        written = [i for i in said if isinstance(i, WriteKv)]
        return [*said, *(i for w in written for i in self(KvWritten(w.frame, 0.001), now))]

    def arrive(self, request: RequestBody, epoch: int = 1, token_id: int = 42) -> None:
        """The whole hand-over, at time 0."""
        transfer = transfer_of(request)
        granted = [ToPrefill(PREFILL_PEER, Granted(transfer, epoch, 10.0))]
        assert self.reserve(request) == granted
        [written] = self.frame(frame(request, epoch))
        assert isinstance(written, WriteKv)
        acked = [ToPrefill(PREFILL_PEER, TransferAck(transfer, epoch))]
        assert self(end(request, epoch, token_id)) == acked


def transfer_of(request: RequestBody) -> str:
    return f"{request.request_id}/{request.attempt}"


def frame(request: RequestBody, epoch: int, **change: Any) -> KvFrame:
    """All KV of a request in one."""
    count = len(request.prompt_ids) + len(request.output_ids)
    size = LAYOUT.num_layers * count * ROW_BYTES
    sent = KvFrame(
        transfer_of(request), epoch, LAYOUT.fingerprint(1), 0, 0, 3, 0, count, RAW, size, CRC
    )
    return msgspec.structs.replace(sent, **change)


def end(request: RequestBody, epoch: int, token_id: int) -> EndArrived:
    count = len(request.prompt_ids) + len(request.output_ids)
    return EndArrived(TransferEnd(transfer_of(request), epoch, 1, count, (token_id,)))


def ack(next_seq: int) -> TokenAck:
    return TokenAck((TokenAckItem("r", 0, next_seq),))


def prefill_tokens(*items: TokenItem) -> ToRouter:
    return ToRouter("router-0", TokenBatch("p-0", "inc-p", items))


def decode_tokens(*items: TokenItem) -> ToRouter:
    return ToRouter("router-0", TokenBatch("d-0", "inc-d", items))


def failure(
    hop: str, code: str, message: str, retryable: bool, *, suspect: str = "", request_id: str = "r"
) -> ToRouter:
    failed = RequestFailed(request_id, 0, code, message, retryable, hop, suspect)
    return ToRouter("router-0", failed)
