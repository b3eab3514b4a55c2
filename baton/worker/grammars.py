"""Compiles grammars for a worker's shell: off the event loop, off the engine's thread, and
first where it can be abandoned (``grammar_trial``).

What passed the trial is compiled a second time in this process, in a thread: it is known to end
soon. What the trial said no to is remembered, so that asking again costs nothing.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable

from baton.engine.structured.store import GrammarStore
from baton.protocol.constraint import Constraint
from baton.protocol.errors import BatonError, Overloaded
from baton.worker.events import GrammarFailed, GrammarReady
from baton.worker.grammar_trial import Trial, Withdrawn

NUM_TRIALS = 2
"""At a time, so that one hostile grammar does not keep all others waiting."""
TRIAL_IDLE_S = 5.0
"""Then its process ends; the next grammar starts another one."""
MAX_WAITING = 1_024
MAX_REFUSALS = 256

Answer = Callable[[GrammarReady | GrammarFailed], None]


class GrammarCompiler:
    """answer: called on the event loop, once per ``request``ed constraint, never within it, and
    not for one that was forgotten before its turn."""

    def __init__(self, store: GrammarStore, answer: Answer) -> None:
        self._store = store
        self._answer = answer
        self._waiting: OrderedDict[Constraint, None] = OrderedDict()
        self._some_wait = asyncio.Event()
        self._running: dict[Constraint, Trial] = {}
        self._refusals: OrderedDict[Constraint, GrammarFailed] = OrderedDict()

    @property
    def num_open(self) -> int:
        """Constraints that wait for a trial or are in one."""
        return len(self._waiting) + len(self._running)

    def request(self, constraint: Constraint) -> None:
        compiled = self._store.get(constraint)
        known = self._refusals.get(constraint)
        if compiled is not None:
            self._soon(GrammarReady(constraint, compiled))
        elif known is not None:
            self._soon(known)
        elif constraint not in self._waiting and constraint not in self._running:
            if self.num_open >= MAX_WAITING:
                reason = Overloaded(f"{MAX_WAITING} new grammars wait to be compiled; retry later")
                self._soon(_failed(constraint, reason))
                return
            self._waiting[constraint] = None
            self._some_wait.set()

    def forget(self, constraint: Constraint) -> None:
        """Nobody waits for it any more: take it out of the queue, or end its trial."""
        self._waiting.pop(constraint, None)
        trial = self._running.pop(constraint, None)
        if trial is not None:
            trial.abandon()

    def _soon(self, event: GrammarReady | GrammarFailed) -> None:
        asyncio.get_running_loop().call_soon(self._answer, event)

    async def run(self) -> None:
        async with asyncio.TaskGroup() as group:
            for number in range(NUM_TRIALS):
                group.create_task(self._work(), name=f"grammars-{number}")

    async def _work(self) -> None:
        trial = Trial(self._store.vocabulary)
        try:
            while True:
                try:
                    async with asyncio.timeout(TRIAL_IDLE_S if trial.is_alive else None):
                        await self._until_some_wait()
                except TimeoutError:
                    await trial.end()
                    continue
                constraint, _ = self._waiting.popitem(last=False)
                self._running[constraint] = trial
                try:
                    event = await self._compile(trial, constraint)
                except Withdrawn:
                    continue
                # Forgotten and asked for once more, it may be another trial's by now.
                if self._running.get(constraint) is trial:
                    del self._running[constraint]
                self._answer(event)
        finally:
            await trial.end()

    async def _until_some_wait(self) -> None:
        while not self._waiting:
            self._some_wait.clear()
            await self._some_wait.wait()

    async def _compile(self, trial: Trial, constraint: Constraint) -> GrammarReady | GrammarFailed:
        try:
            await trial.run(constraint)
            compiled = await asyncio.to_thread(self._store.add, constraint)
        except BatonError as exc:
            failed = _failed(constraint, exc)
            if not failed.retryable:
                self._refusals[constraint] = failed
                if len(self._refusals) > MAX_REFUSALS:
                    self._refusals.popitem(last=False)
            return failed
        return GrammarReady(constraint, compiled)


def _failed(constraint: Constraint, error: BatonError) -> GrammarFailed:
    return GrammarFailed(constraint, error.code, error.message, error.retryable)
