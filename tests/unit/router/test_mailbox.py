from __future__ import annotations

import asyncio
from typing import Any

import pytest

from baton.protocol.errors import Cancelled
from baton.protocol.ids import RequestId
from router.frontend import Output, Token
from router.mailbox import MAX_TOKENS_AT_ONCE, Mailbox, join


def output(seq: int, text: str, index: int = 0, **end: Any) -> Output:
    tokens = tuple(Token(ord(char), char) for char in text)
    return Output(RequestId("r"), index, seq, tokens, text, 3, seq + len(tokens), **end)


async def test_a_slow_reader_gets_fewer_and_larger_outputs() -> None:
    mailbox = Mailbox(1)
    mailbox.put(output(0, "ab"))
    mailbox.put(output(2, "c"))
    mailbox.put(output(3, "d", finish_reason="length"))
    got = await mailbox.get()
    assert got == output(0, "abcd", finish_reason="length")
    assert await mailbox.get() is None
    assert await mailbox.get() is None


async def test_one_output_is_bounded_and_nothing_is_lost() -> None:
    mailbox = Mailbox(1)
    text = "x" * (2 * MAX_TOKENS_AT_ONCE + 5)
    for seq, char in enumerate(text):
        end = {"finish_reason": "length"} if seq == len(text) - 1 else {}
        mailbox.put(output(seq, char, **end))
    sizes = []
    while (got := await mailbox.get()) is not None:
        assert got.seq == sum(sizes)
        sizes.append(len(got.tokens))
    assert sizes == [MAX_TOKENS_AT_ONCE, MAX_TOKENS_AT_ONCE, 5]


async def test_choices_take_turns_and_all_must_finish() -> None:
    mailbox = Mailbox(2)
    mailbox.put(output(0, "a", 0))
    mailbox.put(output(0, "x", 1, finish_reason="stop"))
    mailbox.put(output(1, "b", 0))
    assert await mailbox.get() == output(0, "ab", 0)
    assert await mailbox.get() == output(0, "x", 1, finish_reason="stop")
    waiting = asyncio.ensure_future(mailbox.get())
    await asyncio.sleep(0)
    assert not waiting.done()
    mailbox.put(output(2, "c", 0, finish_reason="length"))
    assert await waiting == output(2, "c", 0, finish_reason="length")
    assert await mailbox.get() is None


async def test_an_error_comes_behind_what_was_delivered() -> None:
    mailbox = Mailbox(1)
    mailbox.put(output(0, "a"))
    mailbox.fail(Cancelled("no more"))
    assert await mailbox.get() == output(0, "a")
    for _ in range(2):
        with pytest.raises(Cancelled, match="no more"):
            await mailbox.get()


async def test_a_waiting_reader_hears_the_error() -> None:
    mailbox = Mailbox(1)
    waiting = asyncio.ensure_future(mailbox.get())
    await asyncio.sleep(0)
    mailbox.fail(Cancelled("no more"))
    with pytest.raises(Cancelled):
        await waiting


def test_a_gap_is_our_bug() -> None:
    with pytest.raises(AssertionError, match="no gaps"):
        join([output(0, "a"), output(2, "c")])
