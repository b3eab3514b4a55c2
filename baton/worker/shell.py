"""The asyncio around a worker's decider: one event loop, one engine thread, one bound socket.

The shell feeds events in and executes instructions; whatever is special to a role
(``prefill_worker.service``, ``decode_worker.service``) hangs its own handlers on it.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

import zmq.asyncio

from baton.engine.plan import StepPlan, StepResult
from baton.engine.structured.store import GrammarStore
from baton.messaging.server import MessageServer, Peer
from baton.protocol.clock import Clock
from baton.protocol.errors import BatonError, RankLost
from baton.protocol.messages import AnyMessage, Hello, HelloReply
from baton.worker.events import (
    CompileGrammar,
    Decider,
    ForgetGrammar,
    FromPeer,
    LayersDone,
    RunStep,
    ShellFacts,
    StepDone,
    StepRaised,
    StepWanted,
    Tick,
    ToRouter,
)
from baton.worker.grammars import GrammarCompiler

log = logging.getLogger(__name__)

TICK_S = 0.2


class Engine(Protocol):
    def execute(
        self,
        plan: StepPlan,
        layer_marks: Collection[int] = (),
        on_layers: Callable[[int], None] | None = None,
    ) -> StepResult: ...


class WorkerShell:
    """perform: executes the instructions that are not every worker's.
    facts: the counters that only the shell of that role knows.
    """

    def __init__(
        self,
        context: zmq.asyncio.Context,
        decider: Decider,
        engine: Engine,
        clock: Clock,
        *,
        describe: Callable[[Hello, int], HelloReply],
        perform: Callable[[object], None],
        facts: Callable[[], ShellFacts],
        grammars: GrammarStore,
    ) -> None:
        self._decider = decider
        self._engine = engine
        self._clock = clock
        self._perform = perform
        self._facts = facts
        self._server = MessageServer(context, describe, self._on_message)
        self._engine_thread = ThreadPoolExecutor(1, thread_name_prefix="engine")
        self._grammars = GrammarCompiler(grammars, self.feed)
        self._steps: asyncio.Queue[RunStep] = asyncio.Queue(1)
        self._step_is_wanted = False
        self._failed = asyncio.Event()
        self._failure: Exception | None = None

    @property
    def server(self) -> MessageServer:
        return self._server

    async def run(self) -> None:
        """Serve until cancelled; a step in flight is waited for. Raises whatever deciding or
        performing raises, in whatever callback."""
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._server.run(), name="messages")
                group.create_task(self._run_steps(), name="steps")
                group.create_task(self._tick(), name="ticks")
                group.create_task(self._grammars.run(), name="grammars")
                group.create_task(self._raise_failure(), name="failures")
        finally:
            self._engine_thread.shutdown(wait=True)

    def feed(self, event: object) -> None:
        """Decide, execute, and let the engine look for work once this turn is over."""
        self._execute(event)
        if not self._step_is_wanted:
            self._step_is_wanted = True
            asyncio.get_running_loop().call_soon(self._want_step)

    def _execute(self, event: object) -> None:
        for instruction in self._decider.handle(event, self._clock.now()):
            match instruction:
                case ToRouter(router_id, message):
                    self._server.send_to(router_id, message)
                case CompileGrammar(constraint):
                    self._grammars.request(constraint)
                case ForgetGrammar(constraint):
                    self._grammars.forget(constraint)
                case RunStep():
                    self._steps.put_nowait(instruction)
                case _:
                    self._perform(instruction)

    def _want_step(self) -> None:
        self._step_is_wanted = False
        if not self._decider.has_step_in_flight:
            self._guarded(self._execute, StepWanted())

    def _guarded(self, handle: Callable[[object], None], event: object) -> None:
        """In a callback of the loop, which only logs what it raises: a worker that takes no step
        any more would go on reporting its load."""
        try:
            handle(event)
        except Exception as exc:
            self._failure = self._failure or exc
            self._failed.set()

    async def _raise_failure(self) -> None:
        await self._failed.wait()
        assert self._failure is not None
        raise self._failure

    def _on_message(self, peer: Peer, message: AnyMessage) -> None:
        self.feed(FromPeer(peer.key, peer.sender_id, peer.role, message))

    async def _run_steps(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            step = await self._steps.get()
            plan = step.plan
            try:
                result = await loop.run_in_executor(self._engine_thread, self._run, step, loop)
            except RankLost:
                # No further step can run either: the worker ends, and counts as lost.
                raise
            except Exception as exc:
                # Whatever else a step raises costs the requests of that step and nothing else.
                self.feed(_raised(plan, exc))
            else:
                self.feed(StepDone(result))

    def _run(self, step: RunStep, loop: asyncio.AbstractEventLoop) -> StepResult:
        """In the engine thread."""
        plan = step.plan
        if not step.layer_marks:
            return self._engine.execute(plan)

        def tell(num_layers: int) -> None:
            loop.call_soon_threadsafe(self._guarded, self.feed, LayersDone(plan.step, num_layers))

        return self._engine.execute(plan, step.layer_marks, tell)

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(TICK_S)
            self.feed(Tick())
            report = self._decider.report(self._facts())
            for router in self._server.peers("router"):
                self._server.send(router.key, report)


def _raised(plan: StepPlan, exc: Exception) -> StepRaised:
    seq_id = (exc.request_id or "") if isinstance(exc, BatonError) else ""
    log.error("step %d raised; to blame: %s", plan.step, seq_id or "unknown", exc_info=exc)
    return StepRaised(f"the engine step raised {type(exc).__name__}: {exc}", seq_id)
