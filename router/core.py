"""The router core as a ``Frontend``: the asyncio around ``RouterDecider``."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator

import zmq.asyncio

from baton.messaging.link import Link, make_hello
from baton.protocol.clock import Clock
from baton.protocol.messages import HelloReply
from baton.protocol.spec import WorkerInfo
from router.decider import RouterDecider, conflict
from router.events import (
    Announced,
    ClientAbort,
    Connect,
    Deliver,
    Disconnect,
    DrainAll,
    Event,
    Failure,
    FromWorker,
    Gone,
    Greeted,
    Instruction,
    Tick,
    ToWorker,
)
from router.frontend import GenerateSpec, Loads, ModelInfo, Output
from router.mailbox import Mailbox
from router.tick_watch import TickWatch

log = logging.getLogger(__name__)

TICK_S = 0.1
ALLOWED_TICK_S = 2 * TICK_S
TOLD_LATE_S = 1.0
"""A tick that is later than this leaves a line in the log."""
TICKS_PER_ALIVE = 10
ROLE = "router"


class RouterCore:
    """``run`` owns the links and the clock; the servers call the ``Frontend`` methods."""

    def __init__(
        self,
        context: zmq.asyncio.Context,
        decider: RouterDecider,
        model: ModelInfo,
        clock: Clock,
        *,
        router_id: str,
        incarnation: str,
    ) -> None:
        self._context = context
        self._decider = decider
        self._model = model
        self._clock = clock
        self._hello = make_hello(router_id, incarnation, ROLE)
        self._links: dict[str, tuple[Link, asyncio.Task[None]]] = {}
        self._mailboxes: dict[str, Mailbox] = {}
        self._group: asyncio.TaskGroup | None = None
        self._drained: asyncio.Event | None = None

    async def run(self) -> None:
        """Serve until cancelled."""
        try:
            async with asyncio.TaskGroup() as group:
                self._group = group
                group.create_task(self._tick(), name="ticks")
        finally:
            self._group = None

    # --- Frontend -----------------------------------------------------------------------

    @property
    def model(self) -> ModelInfo:
        return self._model

    async def generate(self, spec: GenerateSpec) -> AsyncIterator[Output]:
        if spec.request_id in self._mailboxes:
            raise conflict(spec)
        instructions = self._decider.submit(spec, self._clock.now())
        mailbox = self._mailboxes[spec.request_id] = Mailbox(spec.n)
        try:
            self._execute(instructions)
            while (output := await mailbox.get()) is not None:
                yield output
        finally:
            if self._mailboxes.pop(spec.request_id, None) is not None:
                self.feed(ClientAbort(spec.request_id))
            self._note_drained()

    def abort(self, request_id: str) -> bool:
        if request_id not in self._mailboxes:
            return False
        self.feed(ClientAbort(request_id))
        return True

    def loads(self) -> Loads:
        return self._decider.loads(self._clock.now())

    def ready(self) -> str | None:
        return self._decider.ready()

    # --- lifecycle ----------------------------------------------------------------------

    def announce(self, info: WorkerInfo) -> None:
        self.feed(Announced(info))

    def worker_gone(self, worker_id: str, incarnation: str) -> None:
        self.feed(Gone(worker_id, incarnation))

    async def drain(self, timeout_s: float) -> None:
        """Admit nothing new; returns when all is finished or the time is up."""
        self.feed(DrainAll())
        if self._is_drained:
            return
        self._drained = asyncio.Event()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._drained.wait(), timeout_s)

    # --- the shell ----------------------------------------------------------------------

    def feed(self, event: Event) -> None:
        self._execute(self._decider.handle(event, self._clock.now()))

    def _execute(self, instructions: list[Instruction]) -> None:
        for instruction in instructions:
            match instruction:
                case ToWorker(worker_id, message):
                    connection = self._links.get(worker_id)
                    if connection is not None:
                        connection[0].send(message)
                case Deliver(output):
                    mailbox = self._mailboxes.get(output.request_id)
                    if mailbox is not None:
                        mailbox.put(output)
                case Failure(request_id, error):
                    mailbox = self._mailboxes.get(request_id)
                    if mailbox is not None:
                        mailbox.fail(error)
                case Connect(info):
                    self._connect(info)
                case Disconnect(worker_id):
                    self._disconnect(worker_id)

        self._note_drained()

    @property
    def _is_drained(self) -> bool:
        """Nothing runs, and no client has anything left to read."""
        return self._decider.num_open == 0 and not self._mailboxes

    def _note_drained(self) -> None:
        if self._drained is not None and self._is_drained:
            self._drained.set()

    def _connect(self, info: WorkerInfo) -> None:
        assert self._group is not None, "run comes first"
        self._disconnect(info.worker_id)
        link = Link(
            self._context,
            info.address,
            self._hello,
            on_message=lambda message: self.feed(FromWorker(info.worker_id, message)),
            on_reply=lambda reply: self._greeted(info, reply),
        )
        link.connect()
        task = self._group.create_task(link.run(), name=f"link to {info.worker_id}")
        self._links[info.worker_id] = (link, task)

    def _greeted(self, info: WorkerInfo, reply: HelloReply) -> None:
        if reply.refusal:
            log.warning("worker %s refused the hello: %s", info.worker_id, reply.refusal)
        self.feed(Greeted(info.worker_id, reply))

    def _disconnect(self, worker_id: str) -> None:
        connection = self._links.pop(worker_id, None)
        if connection is not None:
            link, task = connection
            link.close()
            task.cancel()

    async def _tick(self) -> None:
        num_ticks = 0
        watch = TickWatch(ALLOWED_TICK_S)
        while True:
            await asyncio.sleep(TICK_S)
            late_s = watch.late_s(self._clock.now())
            if late_s > TOLD_LATE_S:
                log.warning("the router did not run for %.1f s; all leases are renewed", late_s)
            self.feed(Tick(late_s))
            num_ticks += 1
            if num_ticks % TICKS_PER_ALIVE == 0:
                self._execute(self._decider.alive(self._clock.now()))
