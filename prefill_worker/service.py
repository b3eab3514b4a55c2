"""The prefill worker as a service: executor, decider, shell and links put together."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping

import msgspec
import zmq.asyncio

from baton.engine.block_pool import BlockPool
from baton.engine.executor import Executor
from baton.engine.scheduler import Scheduler
from baton.messaging.link import make_hello
from baton.protocol.clock import Clock
from baton.protocol.config import KvTransferConfig
from baton.protocol.messages import AnyMessage, Hello, HelloReply, WorkerRef
from baton.protocol.spec import WorkerSpec
from baton.worker.events import ShellFacts
from baton.worker.shell import WorkerShell
from kv_transfer.codecs.contract import Quality
from kv_transfer.coding import KvCoding
from kv_transfer.controller import CodecController
from kv_transfer.estimates import CodecEstimates, ComputeEstimate
from kv_transfer.frames import FrameCut
from kv_transfer.instructions import CancelPush, PushEnd, PushKv, ToDecode
from kv_transfer.sender import Sender
from prefill_worker.decider import ROLE, DecodeRefused, FromDecode, PrefillDecider
from prefill_worker.links import DecodeLinks


class PrefillService:
    """``bind`` tells the address, ``run`` serves until cancelled."""

    def __init__(
        self, spec: WorkerSpec, incarnation: str, executor: Executor, clock: Clock
    ) -> None:
        self._spec = spec
        self._incarnation = incarnation
        self._executor = executor
        self._clock = clock
        # A sequence leaves with its first token: there is nothing to guess.
        engine = msgspec.structs.replace(spec.pool.engine, speculation="off")
        pool = BlockPool(engine.num_blocks, engine.block_size)
        scheduler = Scheduler(
            pool,
            engine,
            frozenset(executor.spec.eos_token_ids),
            block_bytes=executor.block_bytes,
            num_layers=executor.spec.num_layers,
        )
        scheduler.set_rates(executor.swap_rates)
        self._coding = KvCoding.of_model(spec.model.path, executor.layout)
        names = self._coding.names(spec.kv_transfer.codec)
        codecs = self._coding.qualities(names)
        sender = Sender(pool, executor.layout, spec.kv_transfer, codecs, self._coding.labels(names))
        compute = ComputeEstimate()
        self.decider = PrefillDecider(
            spec.worker_id,
            incarnation,
            pool,
            scheduler,
            sender,
            executor.spec.vocab_size,
            compute=compute,
            # With several ranks KV is gathered from all of them, when they are done with a step.
            is_layer_wise=not executor.rank_fds,
        )
        self._context = zmq.asyncio.Context()
        self._shell = WorkerShell(
            self._context,
            self.decider,
            executor,
            clock,
            describe=self._describe,
            perform=self._perform,
            facts=self._facts,
            grammars=executor.grammars,
        )
        self._links = DecodeLinks(
            self._context,
            make_hello(spec.worker_id, incarnation, ROLE),
            executor.layout,
            spec.kv_transfer,
            self._read_kv,
            on_message=self._on_decode_message,
            on_refused=self._on_decode_refused,
            coding=self._coding,
            make_controller=_controllers(spec.kv_transfer, codecs, compute),
            reads_beside=bool(executor.rank_fds),
        )

    def bind(self) -> str:
        """Raises ConfigError when the host cannot be bound."""
        return self._shell.server.bind(self._spec.host)

    async def run(self) -> None:
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._links.run(), name="links")
                group.create_task(self._shell.run(), name="shell")
        finally:
            self._coding.close()
            self._context.destroy(linger=0)

    def _describe(self, hello: Hello, version: int) -> HelloReply:
        engine = self._spec.pool.engine
        return HelloReply(
            refusal="",
            version=version,
            worker_id=self._spec.worker_id,
            incarnation=self._incarnation,
            role=ROLE,
            layout_fingerprint=self._executor.layout.fingerprint(version),
            capacity_tokens=engine.num_blocks * engine.block_size,
            layout=self._executor.layout,
        )

    def _perform(self, instruction: object) -> None:
        now = self._clock.now()
        match instruction:
            case ToDecode(decode, message):
                self._links.send(decode, message, now)
            case PushKv() | PushEnd():
                self._links.push(instruction, now)
            case CancelPush(transfer_id, is_committed):
                self._links.cancel_push(transfer_id, is_committed=is_committed)
            case _:
                raise AssertionError(f"unknown instruction {instruction!r}")

    def _read_kv(
        self, block_table: tuple[int, ...], cut: FrameCut, room: memoryview | None
    ) -> memoryview:
        return self._executor.read_kv(
            block_table, cut.token_start, cut.num_tokens, cut.layer_start, cut.num_layers, room
        )

    def _on_decode_message(self, decode: WorkerRef, message: AnyMessage) -> None:
        self._shell.feed(FromDecode(decode, message))

    def _on_decode_refused(self, decode: WorkerRef, reason: str) -> None:
        self._shell.feed(DecodeRefused(decode, reason))

    def _facts(self) -> ShellFacts:
        self._links.close_idle(self._clock.now())
        links = self._links.links()
        return ShellFacts(
            kv_bytes_sent=sum(link.num_bytes for link in links),
            kv_bytes_received=0,
            kv_transport="+".join(sorted({link.transport for link in links})),
            num_tasks=len(asyncio.all_tasks()),
            kv_links=links,
        )


def _controllers(
    config: KvTransferConfig, codecs: Mapping[str, Quality], compute: ComputeEstimate
) -> Callable[[], CodecController | None]:
    """Of each link; what codecs cost here is the same for all of them."""
    costs = CodecEstimates()
    return lambda: CodecController(codecs, costs, compute) if config.codec == "auto" else None
