"""The decode (or mixed) worker as a service: executor, decider, shell and KV input."""

from __future__ import annotations

import asyncio

import zmq.asyncio

from baton.engine.block_pool import BlockPool
from baton.engine.executor import Executor
from baton.engine.scheduler import Scheduler
from baton.protocol.clock import Clock
from baton.protocol.messages import Hello, HelloReply, KvLink, KvOffer, TransferEnd
from baton.protocol.spec import WorkerSpec
from baton.worker.events import ShellFacts
from baton.worker.shell import WorkerShell
from decode_worker.decider import DecodeDecider, EndArrived
from decode_worker.kv_input import KvInput
from kv_transfer.coding import KvCoding
from kv_transfer.instructions import ToPrefill, WriteKv
from kv_transfer.puller import KvPuller
from kv_transfer.receiver import Receiver
from kv_transfer.transports.choose import FALLBACK
from kv_transfer.transports.make import Receivers


class DecodeService:
    """``bind`` tells the address, ``run`` serves until cancelled."""

    def __init__(
        self, spec: WorkerSpec, incarnation: str, executor: Executor, clock: Clock
    ) -> None:
        self._spec = spec
        self._incarnation = incarnation
        self._executor = executor
        engine = spec.pool.engine
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
        names = self._coding.decodable(spec.kv_transfer.codec)
        codecs = self._coding.qualities(names)
        self.decider = DecodeDecider(
            spec.worker_id,
            incarnation,
            spec.pool.role,
            engine,
            pool,
            scheduler,
            Receiver(
                pool,
                executor.layout,
                engine,
                spec.kv_transfer,
                codecs,
                self._coding.labels(names),
                self._is_ready,
            ),
            executor.spec.vocab_size,
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
        self._kv_input = KvInput(
            executor,
            self._coding,
            self._shell.feed,
            writes_beside=bool(executor.rank_fds),
            codecs=self._coding.names(spec.kv_transfer.codec),
        )
        self._puller = KvPuller(self._kv_input.on_frame, self._on_end)
        self._receivers = Receivers(spec.kv_transfer.transport, self._context, self._puller.handler)
        self._kv_offers: tuple[KvOffer, ...] = ()

    def bind(self) -> str:
        """Raises ConfigError when the host cannot be bound."""
        self._kv_offers = self._receivers.bind(self._spec.host)
        return self._shell.server.bind(self._spec.host)

    async def run(self) -> None:
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._receivers.run(), name="kv")
                group.create_task(self._shell.run(), name="shell")
        finally:
            self._receivers.close()
            self._coding.close()
            self._context.destroy(linger=0)

    def _describe(self, hello: Hello, version: int) -> HelloReply:
        engine = self._spec.pool.engine
        return HelloReply(
            refusal="",
            version=version,
            worker_id=self._spec.worker_id,
            incarnation=self._incarnation,
            role=self._spec.pool.role,
            layout_fingerprint=self._executor.layout.fingerprint(version),
            kv_address=next(o.address for o in self._kv_offers if o.transport == FALLBACK),
            capacity_tokens=engine.num_blocks * engine.block_size,
            kv_offers=self._kv_offers,
            layout=self._executor.layout,
        )

    def _is_ready(self, codec: str) -> bool:
        """A codec that was asked for is compiled when it is first used, others before."""
        return codec == self._spec.kv_transfer.codec or self._coding.is_ready(codec)

    def _on_end(self, end: TransferEnd) -> None:
        self._shell.feed(EndArrived(end))

    def _perform(self, instruction: object) -> None:
        match instruction:
            case ToPrefill(peer_key, message):
                self._shell.server.send(peer_key, message)
            case WriteKv():
                self._kv_input.accept(instruction)
            case _:
                raise AssertionError(f"unknown instruction {instruction!r}")

    def _facts(self) -> ShellFacts:
        received = self._receivers.bytes_by_kind()
        return ShellFacts(
            kv_bytes_sent=0,
            kv_bytes_received=sum(received.values()),
            kv_transport="+".join(sorted(received)),
            num_tasks=len(asyncio.all_tasks()),
            kv_links=tuple(KvLink("", kind, "", count) for kind, count in received.items()),
        )
