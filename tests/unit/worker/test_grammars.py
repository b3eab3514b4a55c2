"""The compiler around grammars, with its real processes: nothing pathological stays or blocks."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import psutil
import pytest

from baton.engine.structured.grammar import Vocabulary
from baton.engine.structured.store import GrammarStore
from baton.protocol.constraint import Constraint
from baton.worker import grammars
from baton.worker.events import GrammarFailed, GrammarReady
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
        assert store.has(DIGITS)
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
    monkeypatch.setattr(grammars, "TRIAL_CPU_S", 1.0)
    async with running(store) as (compiler, answers):
        compiler.request(ENDLESS)
        compiler.request(DIGITS)
        assert await answers.next() == GrammarReady(DIGITS)
        failed = await answers.next()
        assert isinstance(failed, GrammarFailed)
        assert (failed.constraint, failed.code) == (ENDLESS, "invalid_request")
        assert "takes longer than 1 s" in failed.message
        compiler.request(LETTERS)
        assert await answers.next() == GrammarReady(LETTERS)


async def test_a_compiler_that_dies_fails_its_grammar_and_the_next_one_starts_another(
    store: GrammarStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running(store) as (compiler, answers):
        monkeypatch.setattr(grammars.sys, "executable", "/bin/false")
        compiler.request(DIGITS)
        failed = await answers.next()
        assert isinstance(failed, GrammarFailed)
        assert "ends the compiler" in failed.message
        monkeypatch.setattr(grammars.sys, "executable", "/nowhere")
        compiler.request(LETTERS)
        failed = await answers.next()
        assert isinstance(failed, GrammarFailed)
        assert (failed.code, failed.retryable) == ("unavailable", True)
        monkeypatch.undo()
        compiler.request(LETTERS)
        assert await answers.next() == GrammarReady(LETTERS)


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
