"""The compiler around grammars, with its real processes: nothing pathological stays or blocks."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import psutil
import pytest

from baton.engine.structured.grammar import Vocabulary
from baton.engine.structured.store import GrammarStore
from baton.protocol.constraint import Constraint
from baton.worker import grammar_trial, grammars
from baton.worker.events import GrammarFailed, GrammarReady
from baton.worker.grammar_trial import TRIAL_NICENESS
from baton.worker.grammars import GrammarCompiler
from tests.support.byte_tokenizer import EOS_ID, VOCAB_SIZE, write_byte_tokenizer

ENDLESS = Constraint("grammar", "start: R\nR: ~/(.*a.{12}.*)/ & ~/(.*b.{13}.*)/ & /(.*c.{14}.*)/\n")
"""Keeps the compiler busy for ever, in spite of its own limits."""
DIGITS = Constraint("regex", "[0-9]+")
LETTERS = Constraint("regex", "[a-z]+")


@pytest.fixture
def store(tmp_path: Path) -> GrammarStore:
    return GrammarStore(Vocabulary(write_byte_tokenizer(tmp_path), VOCAB_SIZE, (EOS_ID,)))


class Answers:
    def __init__(self) -> None:
        self.queue: asyncio.Queue[GrammarReady | GrammarFailed] = asyncio.Queue()

    async def next(self) -> GrammarReady | GrammarFailed:
        async with asyncio.timeout(120):
            return await self.queue.get()


async def until(is_so: Callable[[], bool]) -> None:
    async with asyncio.timeout(60):
        while True:
            if is_so():
                return
            await asyncio.sleep(0.005)


@contextlib.asynccontextmanager
async def running(store: GrammarStore) -> AsyncIterator[tuple[GrammarCompiler, Answers]]:
    answers = Answers()
    compiler = GrammarCompiler(store, answers.queue.put_nowait)
    task = asyncio.create_task(compiler.run())
    try:
        yield compiler, answers
    finally:
        task.cancel()
        await asyncio.wait([task])
        assert psutil.Process().children() == []


async def test_each_grammar_is_compiled_once_and_answered_always(store: GrammarStore) -> None:
    async with running(store) as (compiler, answers):
        for _ in range(2):
            compiler.request(DIGITS)
        assert await answers.next() == GrammarReady(DIGITS)
        assert store.get(DIGITS) is not None
        compiler.request(DIGITS)
        assert await answers.next() == GrammarReady(DIGITS)
        assert answers.queue.empty()


async def test_what_is_wrong_is_said_once_more_without_trying(store: GrammarStore) -> None:
    wrong = Constraint("regex", "((")
    async with running(store) as (compiler, answers):
        compiler.request(wrong)
        first = await answers.next()
        assert isinstance(first, GrammarFailed)
        assert (first.code, first.retryable) == ("invalid_request", False)
        assert "unclosed" in first.message
        compiler.request(wrong)
        compiler.request(LETTERS)
        assert await answers.next() == first
        assert await answers.next() == GrammarReady(LETTERS)


async def test_an_endless_one_fails_alone(
    store: GrammarStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Others are compiled beside it, and its process is gone with it."""
    monkeypatch.setattr(grammar_trial, "TRIAL_CPU_S", 0.5)
    async with running(store) as (compiler, answers):
        compiler.request(ENDLESS)
        compiler.request(DIGITS)
        assert await answers.next() == GrammarReady(DIGITS)
        failed = await answers.next()
        assert isinstance(failed, GrammarFailed)
        assert (failed.constraint, failed.code) == (ENDLESS, "invalid_request")
        assert "takes longer than 0.5 s" in failed.message
        compiler.request(LETTERS)
        assert await answers.next() == GrammarReady(LETTERS)


def impostor(folder: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> Callable[[], int]:
    """Runs ``script`` in the place of Python; the answer counts how often."""
    path, starts = folder / "impostor", folder / "starts"
    path.write_text(f'#!/bin/sh\necho x >> "{starts}"\n{script}\n')
    path.chmod(0o755)
    starts.touch()
    monkeypatch.setattr(grammar_trial.sys, "executable", str(path))
    return lambda: len(starts.read_text().splitlines())


KILLED = "kill -KILL $$"
ONCE = '[ $(wc -l < "$(dirname "$0")/starts") -gt 1 ]'


@pytest.mark.parametrize("end", [KILLED, "kill -SEGV $$", "exit 1"])
async def test_an_end_before_the_start_is_no_grammars_doing(
    store: GrammarStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, end: str
) -> None:
    num_starts = impostor(tmp_path, monkeypatch, end)
    async with running(store) as (compiler, answers):
        compiler.request(DIGITS)
        failed = await answers.next()
        assert isinstance(failed, GrammarFailed)
        assert (failed.code, failed.retryable) == ("unavailable", True)
        assert "at its start" in failed.message
        assert num_starts() == 2
        monkeypatch.undo()
        compiler.request(DIGITS)
        assert await answers.next() == GrammarReady(DIGITS), "not remembered"


async def test_a_trial_that_is_killed_at_its_start_is_run_again(
    store: GrammarStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    num_starts = impostor(tmp_path, monkeypatch, f'{ONCE} || {KILLED}; exec {sys.executable} "$@"')
    async with running(store) as (compiler, answers):
        compiler.request(DIGITS)
        assert await answers.next() == GrammarReady(DIGITS)
        assert num_starts() == 2


async def at_work(but: int = 0) -> psutil.Process:
    """The trial that has begun with its constraint, and is not ``but``."""
    found: list[psutil.Process] = []

    def is_here() -> bool:
        children = psutil.Process().children()
        found[:] = [c for c in children if c.pid != but and c.nice() == TRIAL_NICENESS]
        return bool(found)

    await until(is_here)
    return found[0]


@pytest.fixture
def gives_way_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a trial at work can be told by its niceness."""
    monkeypatch.setattr(grammar_trial, "TRIAL_GRACE_S", 0.0)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
@pytest.mark.usefixtures("gives_way_at_once")
async def test_a_trial_that_is_killed_twice_says_nothing_about_the_grammar(
    store: GrammarStore, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    monkeypatch.setattr(grammar_trial, "TRIAL_CPU_S", 60.0)
    async with running(store) as (compiler, answers):
        compiler.request(ENDLESS)
        first = await at_work()
        first.send_signal(number)
        second = await at_work(but=first.pid)
        second.send_signal(number)
        failed = await answers.next()
        assert isinstance(failed, GrammarFailed)
        assert (failed.code, failed.retryable) == ("unavailable", True)
        assert f"ended from outside (code -{int(number)})" in failed.message
        compiler.request(ENDLESS)
        assert (await at_work()).pid not in (first.pid, second.pid), "not remembered"


@pytest.mark.usefixtures("gives_way_at_once")
async def test_a_trial_that_is_killed_once_says_what_it_finds_the_second_time(
    store: GrammarStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grammar_trial, "TRIAL_CPU_S", 0.5)
    async with running(store) as (compiler, answers):
        compiler.request(ENDLESS)
        first = await at_work()
        first.kill()
        failed = await answers.next()
        assert isinstance(failed, GrammarFailed)
        assert (failed.code, failed.retryable) == ("invalid_request", False)
        assert "takes longer than 0.5 s of CPU time" in failed.message


async def test_a_process_that_was_killed_while_idle_is_replaced(store: GrammarStore) -> None:
    async with running(store) as (compiler, answers):
        compiler.request(DIGITS)
        assert await answers.next() == GrammarReady(DIGITS)
        [child] = psutil.Process().children()
        child.kill()
        await until(lambda: not psutil.pid_exists(child.pid))
        compiler.request(LETTERS)
        assert await answers.next() == GrammarReady(LETTERS)


async def test_a_host_that_gives_no_time_is_to_blame_and_not_the_grammar(
    store: GrammarStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    num_starts = impostor(tmp_path, monkeypatch, "exec sleep 600")
    monkeypatch.setattr(grammar_trial, "TRIAL_S", 0.3)
    async with running(store) as (compiler, answers):
        compiler.request(DIGITS)
        failed = await answers.next()
        assert isinstance(failed, GrammarFailed)
        assert (failed.code, failed.retryable) == ("overloaded", True)
        assert "not compiled within 0.3 s" in failed.message
        assert num_starts() == 1
        monkeypatch.undo()
        compiler.request(DIGITS)
        assert await answers.next() == GrammarReady(DIGITS), "not remembered"


async def test_a_process_that_cannot_be_started_is_said_so(
    store: GrammarStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running(store) as (compiler, answers):
        monkeypatch.setattr(grammar_trial.sys, "executable", "/nowhere")
        compiler.request(LETTERS)
        failed = await answers.next()
        assert isinstance(failed, GrammarFailed)
        assert (failed.code, failed.retryable) == ("unavailable", True)
        assert "/nowhere" in failed.message


@pytest.mark.parametrize("number", [signal.SIGSEGV, signal.SIGABRT])
@pytest.mark.usefixtures("gives_way_at_once")
async def test_what_crashes_the_compiler_is_refused_for_good(
    store: GrammarStore, number: signal.Signals
) -> None:
    async with running(store) as (compiler, answers):
        compiler.request(ENDLESS)
        (await at_work()).send_signal(number)
        failed = await answers.next()
        assert isinstance(failed, GrammarFailed)
        assert (failed.code, failed.retryable) == ("invalid_request", False)
        compiler.request(ENDLESS)
        assert await answers.next() == failed
        assert psutil.Process().children() == [], "not tried again"


async def test_memory_that_runs_out_is_named(
    store: GrammarStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grammar_trial, "TRIAL_MEMORY_BYTES", 2**26)
    monkeypatch.setattr(grammar_trial, "TRIAL_CPU_S", 60.0)
    async with running(store) as (compiler, answers):
        compiler.request(DIGITS)
        assert await answers.next() == GrammarReady(DIGITS), "a small one fits"
        compiler.request(ENDLESS)
        failed = await answers.next()
        assert isinstance(failed, GrammarFailed)
        assert (failed.code, failed.retryable) == ("invalid_request", False)
        assert "needs more than 0.0625 GiB of memory" in failed.message


async def test_forgotten_ones_make_way(store: GrammarStore) -> None:
    """Withdrawn in its trial, which ends with its process, or while it still waits."""
    endless = [Constraint("grammar", ENDLESS.text + f"// {n}\n") for n in range(40)]
    async with running(store) as (compiler, answers):
        for constraint in endless:
            compiler.request(constraint)
        await until(lambda: len(psutil.Process().children()) == 2)
        doomed = psutil.Process().children()
        compiler.request(DIGITS)
        assert compiler.num_open == 41
        for constraint in endless:
            compiler.forget(constraint)
        assert compiler.num_open == 1
        assert await answers.next() == GrammarReady(DIGITS)
        assert not any(psutil.pid_exists(child.pid) for child in doomed)
        assert answers.queue.empty()


async def test_a_forgotten_one_may_be_asked_for_again_at_once(
    store: GrammarStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grammar_trial, "TRIAL_CPU_S", 0.5)
    async with running(store) as (compiler, answers):
        compiler.request(ENDLESS)
        await until(lambda: bool(psutil.Process().children()))
        compiler.forget(ENDLESS)
        compiler.request(ENDLESS)
        failed = await answers.next()
        assert "takes longer than 0.5 s" in getattr(failed, "message", "")
        compiler.request(DIGITS)
        assert await answers.next() == GrammarReady(DIGITS)
        assert answers.queue.empty(), "one answer for each that was not forgotten"
        compiler.forget(DIGITS)
        assert compiler.num_open == 0


async def test_a_slow_one_takes_what_serving_leaves_and_its_process_ends(
    store: GrammarStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Niceness cannot be taken back, so the next one gets another process."""
    own = psutil.Process().nice()
    monkeypatch.setattr(grammars, "NUM_TRIALS", 1)
    monkeypatch.setattr(grammar_trial, "TRIAL_GRACE_S", 60.0)
    async with running(store) as (compiler, answers):
        compiler.request(DIGITS)
        assert await answers.next() == GrammarReady(DIGITS)
        [quick] = psutil.Process().children()
        assert quick.nice() == own
        monkeypatch.setattr(grammar_trial, "TRIAL_GRACE_S", 0.0)
        compiler.request(LETTERS)
        assert await answers.next() == GrammarReady(LETTERS)
        assert quick not in psutil.Process().children()
        compiler.request(ENDLESS)
        assert (await at_work()).nice() == TRIAL_NICENESS


async def test_cancelling_ends_a_trial_in_progress(store: GrammarStore) -> None:
    async with running(store) as (compiler, _):
        compiler.request(ENDLESS)
        await until(lambda: bool(psutil.Process().children()))


async def test_an_idle_process_ends(store: GrammarStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grammars, "TRIAL_IDLE_S", 0.01)
    async with running(store) as (compiler, answers):
        compiler.request(DIGITS)
        assert await answers.next() == GrammarReady(DIGITS)
        await until(lambda: not psutil.Process().children())
