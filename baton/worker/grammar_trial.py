"""The process in which a new constraint is compiled first, seen from the worker.

Only what the trial itself said, or died of, is held against a constraint: a process that was
killed from outside, or got no CPU, says nothing about the grammar that it was at.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import signal
import sys
from pathlib import Path
from typing import Any

from baton.engine.structured.grammar import Vocabulary
from baton.protocol.constraint import Constraint
from baton.protocol.errors import BatonError, InvalidRequest, Overloaded, Unavailable, from_code

log = logging.getLogger(__name__)

TRIAL_CPU_S = 5.0
TRIAL_MEMORY_BYTES = 4 * 2**30
TRIAL_S = 60.0
"""By the clock, where a process gets no CPU."""
TRIAL_GRACE_S = 0.5
TRIAL_NICENESS = 19
"""A constraint that takes longer than ``TRIAL_GRACE_S`` goes on with the CPU that serving leaves.
Not from the start: where serving leaves none, a millisecond of work would take half a minute."""
STREAM_LIMIT_BYTES = 2**20
CRASHES = frozenset(
    {signal.SIGABRT, signal.SIGSEGV, signal.SIGBUS, signal.SIGILL, signal.SIGFPE, signal.SIGPROF}
)
"""What a process does to itself. All other ends come from outside."""


class Withdrawn(Exception):
    """Nobody waits for the trial's answer any more."""


class Trial:
    """One process at a time, which tries out one constraint after the other and may die of one."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._process: asyncio.subprocess.Process | None = None
        self._is_running = False
        self._is_abandoned = False

    @property
    def is_alive(self) -> bool:
        return self._process is not None

    async def run(self, constraint: Constraint) -> None:
        """Raises what the trial found, or what ended it; ``Withdrawn`` after ``abandon``.

        InvalidRequest is about the constraint; Unavailable and Overloaded are about this host.
        """
        self._is_running, self._is_abandoned = True, False
        error = await self._ask(constraint)
        if isinstance(error, Unavailable) and not self._is_abandoned:
            error = await self._ask(constraint)
        self._is_running = False
        if self._is_abandoned:
            await self.end()
            raise Withdrawn
        if error is not None:
            raise error

    def abandon(self) -> None:
        """End the ``run`` in progress, if there is one, with its process."""
        self._is_abandoned = self._is_running
        if self._is_running and self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()

    async def end(self) -> None:
        """Idempotent."""
        process, self._process = self._process, None
        if process is not None:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.communicate()

    async def _ask(self, constraint: Constraint) -> BatonError | None:
        """Unavailable: the process was killed from outside, or could not be started."""
        if self._process is not None and self._process.returncode is not None:
            await self.end()
        try:
            async with asyncio.timeout(TRIAL_S):
                error = None if self.is_alive else await self._start()
                if error is not None or self._is_abandoned:
                    return error
                found, code = await self._exchange(constraint)
        except TimeoutError:
            await self.end()
            return Overloaded(
                f"{constraint.kind} was not compiled within {TRIAL_S:g} s, in which it got less "
                f"than {TRIAL_CPU_S:g} s of CPU time: this host is busy; retry later"
            )
        if found is not None:
            return _error(found)
        if not self._is_abandoned:
            log.warning("the trial of a %s ended with code %d", constraint.kind, code)
        return _what_ended_it(constraint, code)

    async def _start(self) -> BatonError | None:
        """An end before it is ready is no grammar's doing."""
        vocabulary = self._vocabulary
        # A backtrace where memory has run out can take all of the CPU time.
        environment = {"PYTHONPATH": _import_path(), "RUST_BACKTRACE": "0"}
        try:
            self._process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "baton.engine.structured.trial"),
                *(str(TRIAL_CPU_S), str(TRIAL_MEMORY_BYTES)),
                *(str(vocabulary.tokenizer_path), str(vocabulary.size)),
                *map(str, vocabulary.eos_token_ids),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                limit=STREAM_LIMIT_BYTES,
                env=os.environ | environment,
            )
        except OSError as exc:
            return Unavailable(f"no process can be started to compile grammars: {exc}")
        if self._is_abandoned:
            return None
        found, code = await self._answer(self._process)
        if found is None:
            return Unavailable(f"a process to compile grammars ended with code {code} at its start")
        error = _error(found)
        if error is not None:
            await self.end()
        return error

    async def _exchange(self, constraint: Constraint) -> tuple[Any, int]:
        """What the process found, or None and what it ended with."""
        process = self._process
        assert process is not None
        assert process.stdin is not None
        asked = json.dumps({"kind": constraint.kind, "text": constraint.text})
        process.stdin.write(asked.encode() + b"\n")
        with contextlib.suppress(ConnectionError):
            await process.stdin.drain()
        loop = asyncio.get_running_loop()
        slowing = loop.call_later(TRIAL_GRACE_S, _give_way, process)
        grace_ends_at = slowing.when()
        try:
            found, code = await self._answer(process)
        finally:
            slowing.cancel()
        if found is not None and loop.time() >= grace_ends_at:
            # What has given way once can never come back.
            await self.end()
        return found, code

    async def _answer(self, process: asyncio.subprocess.Process) -> tuple[Any, int]:
        assert process.stdout is not None
        line = await process.stdout.readline()
        if line.endswith(b"\n"):
            return json.loads(line), 0
        code = await process.wait()
        self._process = None
        return None, code


def _give_way(process: asyncio.subprocess.Process) -> None:
    if process.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            os.setpriority(os.PRIO_PROCESS, process.pid, TRIAL_NICENESS)


def _error(found: Any) -> BatonError | None:
    """found: a line of the trial's."""
    return (
        from_code(found["code"], found["message"], param=found["param"]) if found["code"] else None
    )


def _import_path() -> str:
    """This very package first, however this process came to find it."""
    own = str(Path(__file__).resolve().parents[2])
    return os.pathsep.join(filter(None, (own, os.environ.get("PYTHONPATH"))))


def _what_ended_it(constraint: Constraint, code: int) -> BatonError:
    """code: of the process, negative for a signal."""
    if -code not in CRASHES:
        return Unavailable(
            f"the process that compiles a {constraint.kind} was ended from outside (code {code}), "
            "twice; retry later, and see whether the host is out of memory"
        )
    match -code:
        case signal.SIGPROF:
            reason = f"takes longer than {TRIAL_CPU_S:g} s of CPU time to compile"
        case signal.SIGABRT:
            # So ends the compiler when memory is refused to it.
            reason = f"needs more than {TRIAL_MEMORY_BYTES / 2**30:g} GiB of memory to compile"
        case _:
            reason = f"ends the compiler with {signal.Signals(-code).name}"
    return InvalidRequest(
        f"{constraint.kind} {reason}; allowed: simpler ones", param=constraint.kind
    )
