"""Compiles grammars for a worker's shell: off the event loop, off the engine's thread, and
first where it can be abandoned (``baton.engine.structured.trial``).

What passed the trial is compiled a second time in this process, in a thread: it is known to end
soon. What failed it is remembered, so that asking again costs nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import signal
import sys
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

from baton.engine.structured.store import GrammarStore
from baton.protocol.constraint import Constraint
from baton.protocol.errors import BatonError, InvalidRequest, Overloaded, Unavailable, from_code
from baton.worker.events import GrammarFailed, GrammarReady

log = logging.getLogger(__name__)

NUM_TRIALS = 2
"""At a time, so that one hostile grammar does not keep all others waiting."""
TRIAL_CPU_S = 5.0
TRIAL_S = 60.0
"""By the clock, where a process gets no CPU."""
TRIAL_IDLE_S = 5.0
"""Then its process ends; the next grammar starts another one."""
MAX_WAITING = 1_024
MAX_REFUSALS = 256
STREAM_LIMIT_BYTES = 2**20

Answer = Callable[[GrammarReady | GrammarFailed], None]


class GrammarCompiler:
    """answer: called on the event loop, once per ``request``ed constraint, never within it."""

    def __init__(self, store: GrammarStore, answer: Answer) -> None:
        self._store = store
        self._answer = answer
        self._asked: asyncio.Queue[Constraint] = asyncio.Queue()
        self._open: set[Constraint] = set()
        self._refusals: OrderedDict[Constraint, GrammarFailed] = OrderedDict()

    def request(self, constraint: Constraint) -> None:
        known = self._refusals.get(constraint)
        if self._store.has(constraint):
            self._soon(GrammarReady(constraint))
        elif known is not None:
            self._soon(known)
        elif constraint not in self._open:
            if len(self._open) >= MAX_WAITING:
                reason = Overloaded(f"{MAX_WAITING} new grammars wait to be compiled; retry later")
                self._soon(_failed(constraint, reason))
                return
            self._open.add(constraint)
            self._asked.put_nowait(constraint)

    def _soon(self, event: GrammarReady | GrammarFailed) -> None:
        asyncio.get_running_loop().call_soon(self._answer, event)

    async def run(self) -> None:
        async with asyncio.TaskGroup() as group:
            for number in range(NUM_TRIALS):
                group.create_task(self._work(), name=f"grammars-{number}")

    async def _work(self) -> None:
        trial = _Trial(self._store)
        try:
            while True:
                try:
                    async with asyncio.timeout(TRIAL_IDLE_S if trial.is_alive else None):
                        constraint = await self._asked.get()
                except TimeoutError:
                    await trial.end()
                    continue
                event = await self._compile(trial, constraint)
                self._open.discard(constraint)
                self._answer(event)
        finally:
            await trial.end()

    async def _compile(self, trial: _Trial, constraint: Constraint) -> GrammarReady | GrammarFailed:
        try:
            await trial.run(constraint)
            await asyncio.to_thread(self._store.add, constraint)
        except BatonError as exc:
            failed = _failed(constraint, exc)
            if not failed.retryable:
                self._refusals[constraint] = failed
                if len(self._refusals) > MAX_REFUSALS:
                    self._refusals.popitem(last=False)
            return failed
        return GrammarReady(constraint)


class _Trial:
    """One process that tries out one constraint after the other, and may die of one."""

    def __init__(self, store: GrammarStore) -> None:
        self._vocabulary = store.vocabulary
        self._process: asyncio.subprocess.Process | None = None

    @property
    def is_alive(self) -> bool:
        return self._process is not None

    async def run(self, constraint: Constraint) -> None:
        """Raises what the trial found, or what ended it."""
        process = self._process or await self._start()
        assert process.stdin is not None
        assert process.stdout is not None
        asked = json.dumps({"kind": constraint.kind, "text": constraint.text})
        try:
            async with asyncio.timeout(TRIAL_S):
                process.stdin.write(asked.encode() + b"\n")
                with contextlib.suppress(ConnectionError):
                    await process.stdin.drain()
                line = await process.stdout.readline()
        except TimeoutError as exc:
            await self.end()
            raise _too_long(constraint, f"{TRIAL_S:g} s") from exc
        if not line.endswith(b"\n"):
            code = await process.wait()
            self._process = None
            log.warning("the trial of a %s ended with code %d", constraint.kind, code)
            if code == -signal.SIGPROF:
                raise _too_long(constraint, f"{TRIAL_CPU_S:g} s of CPU time")
            raise InvalidRequest(
                f"{constraint.kind} ends the compiler, or needs too much memory; allowed: "
                "simpler ones",
                param=constraint.kind,
            )
        found = json.loads(line)
        if found["code"]:
            raise from_code(found["code"], found["message"], param=constraint.kind)

    async def _start(self) -> asyncio.subprocess.Process:
        vocabulary = self._vocabulary
        try:
            self._process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "baton.engine.structured.trial", str(TRIAL_CPU_S)),
                *(str(vocabulary.tokenizer_path), str(vocabulary.size)),
                *map(str, vocabulary.eos_token_ids),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                limit=STREAM_LIMIT_BYTES,
                env=os.environ | {"PYTHONPATH": _import_path()},
            )
        except OSError as exc:
            raise Unavailable(f"no process can be started to compile grammars: {exc}") from exc
        return self._process

    async def end(self) -> None:
        """Idempotent."""
        process, self._process = self._process, None
        if process is not None:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.communicate()


def _import_path() -> str:
    """This very package first, however this process came to find it."""
    own = str(Path(__file__).resolve().parents[2])
    return os.pathsep.join(filter(None, (own, os.environ.get("PYTHONPATH"))))


def _too_long(constraint: Constraint, most: str) -> InvalidRequest:
    return InvalidRequest(
        f"{constraint.kind} takes longer than {most} to compile; allowed: simpler ones",
        param=constraint.kind,
    )


def _failed(constraint: Constraint, error: BatonError) -> GrammarFailed:
    return GrammarFailed(constraint, error.code, error.message, error.retryable)
